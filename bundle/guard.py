"""Stands between TorchServe and its workers: checks the model's folder, then becomes the worker.

TorchServe starts bundle/bin/python instead of Python, at every start of a worker, however the model was registered. An
archive can ask for python3 and torchrun, too, which TorchServe looks for on the PATH: they are there by these names.

    guard.py NAME -u .../ts/model_service_worker.py ...     in the model's folder

What goes wrong ends in the log of the worker, as its own last words would.
"""

import os
import resource
import sys
from importlib.util import find_spec
from pathlib import Path

WORKER = "model_service_worker.py"
LAUNCHERS = {"torchrun": ["-m", "torch.distributed.run"]}
UNPACKED = ("models", "workflows")  # TorchServe's folders of unpacked archives, in its temporary one


def main(name: str, *arguments: str) -> None:
    try:
        permit(Path.cwd(), arguments)
    except Exception as exc:  # whatever it is, no worker starts
        # in the words of TorchServe's own worker, for bundle/server/readiness.py
        sys.exit(f"Backend worker process died.\n{type(exc).__name__}: {exc}")
    # a core would hold clients' inputs, and lie in the model's folder, where no file may be added
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    python = os.environ["BUNDLE_PYTHON"]
    os.execve(python, [python, *LAUNCHERS.get(name, ()), *arguments], environment(Path.cwd()))


def permit(folder: Path, arguments: tuple[str, ...]) -> None:
    """Returns where a command may run.

    Args:
        folder: in which it will.

    Raises:
        BundleError: it may not.
        KeyError: `blacklist_env_vars` holds back what says whether it may.
    """
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from bundle.errors import BundleError
    from bundle.signing import check

    if all(Path(argument).name != WORKER for argument in arguments):
        # in TorchServe's own folder, this is its collector of metrics; in a model's folder, it is pip or venv
        if folder != torchserve():
            raise BundleError(
                "A model is served with the packages that the server has: none are installed for it "
                "(useVenv, install_py_dep_per_model), because nobody has checked them."
            )
        return
    if folder.parent not in [Path(os.environ["TEMP"]).resolve() / kind for kind in UNPACKED]:
        raise BundleError(
            f"{folder} is refused: it did not come out of an archive of the model store. Put an archive there, and "
            "register it by its name."
        )
    trusted = os.environ["TRUSTED_KEY"]
    check(folder, Path(trusted) if trusted else None)


def environment(folder: Path) -> dict[str, str]:
    """What a command finds in it, in this folder."""
    guards = str(Path(__file__).resolve().parent / "bin")
    path = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry != guards]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        # TorchServe's begins with the folder of the handler that a registration names, wherever that is
        "PYTHONPATH": f"{folder}{os.pathsep}{torchserve()}",
        # compiled modules would be members that the archive does not list, at the next start
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def torchserve() -> Path:
    """The folder that the package `ts` is in."""
    found = find_spec("ts")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("TorchServe is not installed here. Set it up: make setup")
    return Path(found.origin).parents[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
