"""Imports between the packages of `bundle/` go one way, as bundle/README.md says; a user's files can be imported."""

import ast
import sys
from pathlib import Path

import pytest

from bundle.build.imports import import_file, imports_from
from bundle.paths import ROOT

ALLOWED = {
    "cli": {"build", "bulk", "capacity", "server", "setup", "supervisor", "tuning", "load"},
    "build": set(),
    "bulk": {"server"},
    "capacity": {"load", "server", "tuning"},
    "server": set(),
    "setup": set(),
    "supervisor": {"server"},
    "load": {"server"},
    "tuning": {"load", "server"},
    "shared": set(),
}


def imported(file: Path) -> set[str]:
    """Return the dotted names of all that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages_imported(files: list[Path]) -> set[str]:
    names = [name.split(".") for file in files for name in imported(file)]
    return {name[1] for name in names if name[0] == "bundle" and len(name) > 1} & ALLOWED.keys()


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_allowed_packages(package: str):
    files = list((ROOT / "bundle").glob("*.py" if package == "shared" else f"{package}/*.py"))
    files = [file for file in files if file.name != "__main__.py"]  # the command itself
    assert len(files) > 2
    assert packages_imported(files) - {package} <= ALLOWED[package]


def test_every_package_has_a_rule():
    packages = {file.parent.name for file in (ROOT / "bundle").glob("*/__init__.py")}
    assert packages == ALLOWED.keys() - {"shared"}


@pytest.mark.parametrize("folder", ["handlers", "models"])
def test_handlers_and_models_import_nothing_else_of_this_repository(folder: str):
    """A handler and a model folder meet in the archive, and neither needs the commands that build it."""
    others = {"bundle", "docker", "handlers", "loadtest", "models", "tests"} - {folder}
    files = list((ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    imports = {(file.name, name) for file in files for name in imported(file) if name.split(".")[0] in others}
    assert imports == set()


def test_bundle_imports_no_model_folder():
    names = {name for file in (ROOT / "bundle").rglob("*.py") for name in imported(file)}
    assert [name for name in names if name.startswith("models.")] == []


def test_import_inside_a_function_is_found(tmp_path: Path):
    (tmp_path / "file.py").write_text("def f():\n    from bundle.server import process\n    from bundle import mar\n")
    assert packages_imported([tmp_path / "file.py"]) == {"server"}


@pytest.mark.parametrize("present", [None, pytest])
def test_imported_file_can_define_a_dataclass_with_annotations_that_are_strings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: object
):
    if present:
        monkeypatch.setitem(sys.modules, "a_users_file", present)
    file = tmp_path / "model.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Size:\n    side: int = 8\n"
    )
    assert import_file("a_users_file", file).Size().side == 8
    assert sys.modules.get("a_users_file") is present


def test_file_of_data_with_the_name_of_a_module_leaves_the_module(tmp_path: Path):
    import torch

    file = tmp_path / "torch.json"
    file.write_text("{}")
    with imports_from([file]):
        assert sys.modules["torch"] is torch
