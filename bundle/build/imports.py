"""Import a user's Python files from wherever they are, together with the modules that they import."""

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def import_file(name: str, file: Path) -> ModuleType:
    """Import a file as a module of this name, which is in `sys.modules` only while the file's code runs.

    Dataclasses and pydantic look it up there when they resolve annotations that are strings.

    Raises:
        Exception: the file's code raised it.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
    return module


@contextmanager
def importable(cls: type) -> Iterator[None]:
    """Let pydantic find, in the block, the names in a class's module that `import_file` has imported.

    It needs them for annotations that are strings, if it resolves them after the file's code has run.
    """
    name, before = cls.__module__, sys.modules.get(cls.__module__)
    module = ModuleType(name)
    for each in vars(cls).values():
        vars(module).update(getattr(each, "__globals__", {}))
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before


@contextmanager
def imports_from(paths: Iterable[Path]) -> Iterator[None]:
    """Make these modules and packages importable in the block, each by its file's name, as in a fresh worker.

    They take precedence over modules of the same name, which come back after the block. Other files are data: a
    `torch.json` must not unload torch.
    """
    paths = list(paths)
    names = {path.stem for path in paths if path.suffix == ".py" or path.is_dir()}
    folders = list(dict.fromkeys(str(path.parent) for path in paths))

    def withdraw() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}

    before, path = withdraw(), sys.path[:]
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.path[:] = path
        withdraw()
        sys.modules.update(before)
