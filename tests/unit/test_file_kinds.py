"""What a file is that is not TorchScript, and the lines of Python that make a TorchScript file of it."""

import io
import json
import runpy
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bundle.build.export import load_torchscript
from bundle.build.file_kinds import identify
from bundle.errors import BundleError
from tests.unit.workbench import SmallNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
IMAGES = torch.rand(3, 3, 32, 32)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet(3, 32).eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the working directory, where the suggested lines write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rejected(file: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        load_torchscript(file)
    assert "\n" not in str(caught.value)
    return caught.value


def follow(error: BundleError, model: nn.Module) -> None:
    """Run the suggested lines with another module of the same class as `model`; the file must compute the same."""
    Path("suggested.py").write_text(error.details)
    runpy.run_path("suggested.py", {"model": SmallNet(3, 32)})
    made = load_torchscript(Path("theirs.torchscript.pt"))
    torch.testing.assert_close(made(IMAGES), model(IMAGES))


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_weights_become_torchscript_by_the_suggested_lines(folder, model, as_zip, key):
    optimizer = torch.optim.Adam(model.parameters())
    content = {"epoch": 3, key: model.state_dict(), "optimizer": optimizer.state_dict()} if key else model.state_dict()
    torch.save(content, folder / "theirs.pt", _use_new_zipfile_serialization=as_zip)
    error = rejected(folder / "theirs.pt")
    assert ("training checkpoint" if key else "weights of a module (state_dict)") in str(error)
    follow(error, model)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("key", [None, "model"])
def test_pickled_module_becomes_torchscript_by_the_suggested_lines(folder, model, as_zip, key):
    content = {"epoch": 3, key: model} if key else model
    torch.save(content, folder / "theirs.pt", _use_new_zipfile_serialization=as_zip)
    error = rejected(folder / "theirs.pt")
    assert "it is a pickled module (tests.unit.workbench.SmallNet)" in str(error)
    assert "whom you trust" in str(error)
    follow(error, model)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_sequence_of_pytorchs_own_modules_is_a_module(folder, protocol):
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), folder / "theirs.pt", pickle_protocol=protocol)
    assert "a pickled module (torch.nn.modules.container.Sequential)" in str(rejected(folder / "theirs.pt"))


@pytest.mark.parametrize("batch", ["dynamic", "constant"])
def test_exported_program_becomes_torchscript_by_the_suggested_lines(folder, model, batch):
    shapes = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=shapes)
    torch.export.save(program, folder / "theirs.pt2")
    error = rejected(folder / "theirs.pt2")
    assert "a program of torch.export (.pt2)" in str(error)
    follow(error, model)


def test_safetensors_become_torchscript_by_the_suggested_lines(folder, model):
    save_file(model.state_dict(), folder / "theirs.safetensors", metadata={"format": "pt"})
    error = rejected(folder / "theirs.safetensors")
    assert "weights of a module (safetensors)" in str(error)
    follow(error, model)


class PrintsWhenUnpickled:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickle_is_named_without_unpickling_it(folder, capsys, as_zip):
    content = OrderedDict(weights=PrintsWhenUnpickled())
    torch.save(content, folder / "theirs.pt", _use_new_zipfile_serialization=as_zip)
    error = rejected(folder / "theirs.pt")
    assert "it is a pickle with collections.OrderedDict, " in str(error)
    assert "builtin" in str(error)
    assert "print" in str(error)
    assert "unpickled" not in capsys.readouterr().out


def test_checkpoint_of_ultralytics_names_its_own_export(folder):
    """The opcodes of `{"model": DetectionModel()}`, as pickle protocol 2 writes them."""
    body = b"\x80\x02}(X\x05\x00\x00\x00epochK\x01X\x05\x00\x00\x00modelcultralytics.nn.tasks\nDetectionModel\n)\x81"
    body += b"}X\x0b\x00\x00\x00_parameters}sbu."
    with zipfile.ZipFile(folder / "best.pt", "w") as archived:
        archived.writestr("best/data.pkl", body)
    error = rejected(folder / "best.pt")
    assert "a checkpoint of Ultralytics (ultralytics.nn.tasks.DetectionModel)" in str(error)
    assert ".export(format='torchscript')" in error.details


def message(*fields: tuple[int, int | bytes | str]) -> bytes:
    """Encode a protobuf message of numbers below 128, strings and messages."""
    content = b""
    for number, value in fields:
        if isinstance(value, int):
            content += bytes([number << 3, value])
        else:
            value = value.encode() if isinstance(value, str) else value
            assert len(value) < 128
            content += bytes([number << 3 | 2, len(value)]) + value
    return content


def small_onnx() -> bytes:
    """Encode a model of one node, y = Relu(x), field by field as onnx.proto3 numbers them."""
    shape = message((1, message((1, 1))), (1, message((1, 4))))
    kind = message((1, message((1, 1), (2, shape))))
    node = message((1, "x"), (2, "y"), (4, "Relu"))
    value = [message((1, name), (2, kind)) for name in "xy"]
    graph = message((1, node), (2, "graph"), (11, value[0]), (12, value[1]))
    return message((1, 8), (2, "pytorch"), (7, graph), (8, message((2, 17))))


def test_onnx_is_named_with_a_converter(folder):
    (folder / "theirs.onnx").write_bytes(small_onnx())
    error = rejected(folder / "theirs.onnx")
    assert "it is an ONNX model. PyTorch cannot load ONNX files" in str(error)
    assert "onnx2torch" in error.details
    compile(error.details, "lines", "exec")


@pytest.mark.parametrize("damage", ["truncated", "appended", "no graph"])
def test_other_protobuf_messages_are_not_onnx(folder, damage):
    content = {
        "truncated": small_onnx()[:-3],
        "appended": small_onnx() + b"\xff",
        "no graph": message((1, 8), (2, "pytorch"), (8, message((2, 17)))),
    }[damage]
    (folder / "theirs.bin").write_bytes(content)
    assert "ONNX" not in str(rejected(folder / "theirs.bin"))


@pytest.mark.parametrize(
    ("suffix", "found"),
    [
        (".onnx", "an ONNX model, by its name"),
        (".ONNX", "an ONNX model, by its name"),
        (".pb", "a model of TensorFlow, by its name"),
        (".mlmodel", "a model of Core ML"),
        (".engine", "an engine of TensorRT"),
        (".pdmodel", "a model of PaddlePaddle"),
        (".caffemodel", "a model of Caffe"),
        (".txt", "a text file"),
    ],
)
def test_file_whose_bytes_do_not_show_its_kind_is_named_by_its_name(folder, suffix, found):
    """Such bytes are UTF-8 by chance, and the ONNX file is truncated."""
    file = folder / f"theirs{suffix}"
    file.write_bytes(small_onnx()[:-3])
    error = rejected(file)
    assert f"it is {found}" in str(error)
    assert ("onnx2torch" in error.details) == (suffix.lower() == ".onnx")


def test_program_of_executorch_is_named(folder):
    (folder / "theirs.pte").write_bytes(b"\x24\0\0\0ET12" + bytes(60))
    assert "a program of ExecuTorch" in str(rejected(folder / "theirs.pte"))


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archived:
        for name, content in members.items():
            archived.writestr(name, content)
    return file.getvalue()


def tarred(compressed: bool) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz" if compressed else "w") as archived:
        archived.addfile(tarfile.TarInfo("weights.bin"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it is empty. Copy or download it again"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "a model or weights of Keras"),
        (zipped(**{"config.json": b"{}", "model.weights.h5": b""}), "a model or weights of Keras"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(100), "a model of TensorFlow Lite"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page. The download failed"),
        (b"not a model", "a text file"),
        (b"\x00\x01\x02\xff" * 40, "damaged, or in an unknown format"),
        (b"\x80\x02nonsense", "a damaged checkpoint"),
        (zipped(**{"readme.txt": b"nothing"}), r"a zip archive without a model \(readme.txt\)"),
        (zipped(**{"a.txt": b"nothing"})[:-10], "a damaged zip archive"),
        (zipped(**{"MAR-INF/MANIFEST.json": b"{}"}), "an archive of TorchServe"),
        (zipped(**{"m/data/aotinductor/m/x.so": b"", "m/archive_format": b"pt2"}), "compiled for one kind of machine"),
        (tarred(compressed=True), "a compressed archive"),
        (tarred(compressed=False), "a compressed archive"),
        (struct.pack("<Q", 1000) + b'{"a": ', "damaged, or in an unknown format"),
    ],
)
def test_other_files_are_named(folder, content, found):
    (folder / "theirs.bin").write_bytes(content)
    with pytest.raises(BundleError, match=found) as caught:
        load_torchscript(folder / "theirs.bin")
    assert "miniz" not in caught.value.details or "unknown format" in found, "the kind already explains it"


def test_tensors_and_plain_values_are_named(folder):
    torch.save(torch.rand(3), folder / "theirs.pt")
    assert "it is a saved tensor" in str(rejected(folder / "theirs.pt"))
    torch.save({"accuracy": 0.5}, folder / "theirs.pt")
    assert "a pickle with plain values" in str(rejected(folder / "theirs.pt"))


def test_truncated_torchscript_is_damaged(folder, model):
    torch.jit.script(model).save("theirs.pt")
    content = Path("theirs.pt").read_bytes()
    Path("theirs.pt").write_bytes(content[:-2000])
    assert "a damaged zip archive: its end is missing" in str(rejected(folder / "theirs.pt"))


def test_torchscript_with_an_operator_that_is_missing_is_torchscript(folder, model):
    torch.jit.script(model).save("theirs.pt")
    with zipfile.ZipFile("theirs.pt") as old, zipfile.ZipFile("other.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content.replace(b"torch.relu", b"ops.theirs.relu") if "code/" in name else content)
    error = rejected(folder / "other.pt")
    assert "TorchScript that this PyTorch cannot load" in str(error)
    assert "theirs" in error.details


def test_header_of_another_length_is_not_safetensors(folder):
    header = json.dumps({"a": [1]}).encode()
    (folder / "x.bin").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "safetensors" not in identify(folder / "x.bin").what
