"""Fuzz the decoders with Atheris (libFuzzer, guided by the coverage of Python code).

Any bytes must decode to a sample or raise a RequestError.
"""

import importlib
import sys

import atheris

from bundle.catalog import select

LONGEST = 1 << 18  # bytes of an input
SLOWEST = 10  # s: the time limit that a worker has for a batch
MOST_MEMORY = 3000  # MB: an accepted input unpacks to a few hundred, and torch is imported


def run(model: str, seconds: int) -> None:
    """Fuzz one model's decoder, then exit.

    The process exits with status 0 after `seconds`. At the first finding it exits with another status and writes the
    input to build/fuzz/atheris.
    """
    [config] = select([model])
    with atheris.instrument_imports(include=["PIL", "soundfile", "handlers"]):
        module = importlib.import_module(f"handlers.{config.bundle.handler}")
        errors = importlib.import_module("handlers.core.errors")
        request = importlib.import_module("handlers.core.request")
    # these import Pillow, which must first be imported inside `instrument_imports`
    from tests.trials.fuzz.corpus import corpus, headers
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
            [inputs] = reader.read({"body": content}, headers(model)).inputs
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
