"""Atheris (libFuzzer, guided by the coverage of Python code) at the decoders' boundary: any bytes are a sample or a
RequestError."""

import importlib
import sys

import atheris

from bundle.catalog import select

LONGEST = 1 << 18  # bytes of an input
SLOWEST = 10  # s: a worker's whole time for a batch
MOST_MEMORY = 3000  # MB: what is accepted unpacks to some hundred, and torch has been imported


def run(model: str, seconds: int) -> None:
    """Ends the process when the time is over, with status 0; at the first finding, with another one, and its bytes in
    build/fuzz/atheris."""
    [config] = select([model])
    with atheris.instrument_imports(include=["PIL", "soundfile", "handlers"]):
        module = importlib.import_module(f"handlers.{config.bundle.handler}")
        errors = importlib.import_module("handlers.core.errors")
        request = importlib.import_module("handlers.core.request")
    # they import Pillow, which is instrumented only where it is imported first
    from tests.trials.fuzz.corpus import corpus
    from tests.trials.fuzz.findings import FOLDER

    folder = FOLDER / "atheris" / model
    seeds = folder / "corpus"
    seeds.mkdir(parents=True, exist_ok=True)
    for index, content in enumerate(corpus(model).values()):
        if len(content) <= LONGEST:
            (seeds / f"seed-{index}").write_bytes(content)
    [handler_class] = [one for one in vars(module).values() if getattr(one, "__module__", "") == module.__name__
                       and isinstance(one, type)]  # fmt: skip
    handler = handler_class()
    handler.settings = handler.Settings.model_validate(config.config["handler"])
    handler.load_assets(config.path)
    reader = request.RequestReader(handler.Inputs, handler.Options, max_instances=1)

    def decode(content: bytes) -> None:
        try:
            [inputs] = reader.read({"body": content}, {}).inputs
            handler.decode(inputs)
        except errors.RequestError:
            pass

    options = {
        "max_total_time": seconds,
        "max_len": LONGEST,
        "timeout": SLOWEST,
        "rss_limit_mb": MOST_MEMORY,
        "artifact_prefix": f"{folder}/",
        "print_final_stats": 1,
    }
    arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(seeds)]
    atheris.Setup(arguments, decode)
    atheris.Fuzz()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
