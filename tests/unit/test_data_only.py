"""Files that are loaded are data and never run code, as SECURITY.md says: no pickle, no `eval`, no unsafe YAML."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEVER = {
    "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads",
    "pandas.read_pickle", "pickle.load", "pickle.loads", "pickle.Unpickler", "shelve.open", "yaml.full_load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "builtins.eval", "builtins.exec",
}  # fmt: skip
ONLY_WEIGHTS = {"torch.load", "torch.hub.load_state_dict_from_url"}


def faults(source: str) -> list[str]:
    """Find the calls that could run code from a file, as line numbers and names."""
    tree = ast.parse(source)
    names = imported(tree) | {"eval": "builtins.eval", "exec": "builtins.exec"}
    return [f"{call.lineno}: {name}" for call, name in calls(tree, names) if is_fault(call, name)]


def imported(tree: ast.AST) -> dict[str, str]:
    """Map the names that a module imports to their full names."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def calls(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            yield node, ".".join(filter(None, (names.get(first, first), rest)))


def is_fault(call: ast.Call, name: str) -> bool:
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ONLY_WEIGHTS:
        return options.get("weights_only") != "True"
    return name in NEVER or options.get("allow_pickle", "False") != "False"


def test_repository_has_no_unsafe_call():
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = listed.stdout.split("\0")[:-1]
    assert len(files) > 100
    found = {file: faults((ROOT / file).read_text()) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "from torch import load as read\nread(file)",
        "import torch.hub as hub\nhub.load_state_dict_from_url(url)",
        "import pickle\npickle.loads(data)",
        "from pickle import Unpickler\nUnpickler(file)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import numpy\nnumpy.load(file, allow_pickle=trusted)",
        "eval(text)",
    ],
)
def test_unsafe_call_is_found(source):
    assert len(faults(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(file, weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "import numpy\nnumpy.load(file)",
        "model.eval()",
        "import torch\ntorch.jit.load(file)",  # TorchScript is a program, and it is trusted
    ],
)
def test_safe_call_is_accepted(source):
    assert faults(source) == []
