"""Check a model's folder before each start of a worker, then become the worker.

TorchServe starts bundle/bin/python instead of Python for every worker, no matter how its model was registered. An
archive can make TorchServe start python3 or torchrun instead, which it looks up on the PATH; bundle/bin has these, too.

    guard.py NAME -u .../ts/model_service_worker.py ...     in the model's folder

Errors are written to the worker's log, like those of a worker.
"""

import os
import resource
import sys
from importlib.util import find_spec
from pathlib import Path

WORKER = "model_service_worker.py"
LAUNCHERS = {"torchrun": ["-m", "torch.distributed.run"]}
JAVA_OPTIONS = "JDK_JAVA_OPTIONS"
UNPACKED = ("models", "workflows")  # folders of unpacked archives, in TorchServe's temporary folder


def main(name: str, *arguments: str) -> None:
    """Replace this process with the command `name`, if it is permitted."""
    try:
        permit(Path.cwd(), arguments)
    except Exception as exc:  # no worker may start after any error
        # the message of TorchServe's own worker, which bundle/server/readiness.py looks for
        sys.exit(f"Backend worker process died.\n{type(exc).__name__}: {exc}")
    # a core dump would hold clients' inputs, and would add a file to the model's folder, which must not change
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    python = os.environ["BUNDLE_PYTHON"]
    os.execve(python, [python, *LAUNCHERS.get(name, ()), *arguments], environment(Path.cwd()))


def permit(folder: Path, arguments: tuple[str, ...]) -> None:
    """Check that a command may run.

    Args:
        folder: the folder that the command runs in.

    Raises:
        BundleError: the command is not permitted.
        KeyError: `blacklist_env_vars` withholds an environment variable that decides it.
    """
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from bundle.errors import BundleError

    if all(Path(argument).name != WORKER for argument in arguments):
        # in TorchServe's own folder, it is the metrics collector; in a model's folder, it is pip or venv
        if folder != torchserve():
            raise BundleError(
                "Packages are not installed for a model (useVenv, install_py_dep_per_model), because they are not "
                "checked. Install them where the server runs."
            )
        return
    if folder.parent not in [Path(os.environ["TEMP"]).resolve() / kind for kind in UNPACKED]:
        raise BundleError(
            f"{folder} is refused: it was not unpacked from an archive of the model store. Copy the archive to the "
            "model store, and register it by its file's name."
        )
    check_folder(folder, Path(trusted) if (trusted := os.environ["TRUSTED_KEY"]) else None)


def check_folder(folder: Path, trusted: Path | None) -> None:
    """Check a model's folder: before its first worker, against the archive; later, workers may have written data.

    Args:
        trusted: the public key that must have signed the archive.

    Raises:
        BundleError: the folder is not what was archived.
    """
    from bundle.errors import BundleError
    from bundle.signing import check

    mark = folder.with_name(f"{folder.name}.checked")  # beside the folder, which must not change
    used = mark.exists()
    try:
        check(folder, trusted, used)
    except BundleError:
        if used or not mark.exists():
            raise
        check(folder, trusted, used=True)  # meanwhile, another worker has started, and has written
    mark.touch()


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables of a command that runs in this folder."""
    from bundle.paths import FRONTEND_JAR

    others = {name: value for name, value in os.environ.items() if name != JAVA_OPTIONS}
    # the agent of TorchServe's own Java (bundle/server/frontend.py) is not for a Java that the command starts
    options = os.environ.get(JAVA_OPTIONS, "").removesuffix(f'"-javaagent:{FRONTEND_JAR}"').strip()
    guards = str(Path(__file__).resolve().parent / "bin")
    path = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry != guards]
    return {
        **others,
        **({JAVA_OPTIONS: options} if options else {}),
        "PATH": os.pathsep.join(path),
        # TorchServe's own value begins with the folder of the handler that a registration names, which can be any
        "PYTHONPATH": f"{folder}{os.pathsep}{torchserve()}",
        # at the next start, compiled modules would be files that the archive does not list
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def torchserve() -> Path:
    """Return the folder that has the package `ts`."""
    found = find_spec("ts")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("TorchServe is not installed. Install it: make setup")
    return Path(found.origin).resolve().parents[1]  # as the system reports a process's own folder


if __name__ == "__main__":
    main(*sys.argv[1:])
