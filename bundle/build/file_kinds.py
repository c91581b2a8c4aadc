"""Say what a file is that is not TorchScript, and how a TorchScript file is made of it.

Nothing is unpickled: a pickle's opcodes are read, not run.
"""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from bundle.build.pickles import Pickle, legacy_pickle, read_pickle
from bundle.errors import BundleError
from bundle.paths import relative

NESTED_WEIGHTS = ("state_dict", "model_state_dict", "model")  # where a training checkpoint keeps the weights
MAX_HEADER = 100_000_000  # bytes of safetensors' header
COMPRESSED = (b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"\xfd7zXZ", b"BZh")  # gzip, 7z, xz, bzip2
SNIFFED = 512  # bytes from the beginning of a file

RETRY = "Copy or download it again."
ORIGINAL = "It cannot be turned back into PyTorch. Save the original module with torch.jit.script."
MAKE = 'torch.jit.script(model.eval()).save("model.pt")'


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        what: completes the sentence "It is ...".
        how: what to do, in whole sentences.
        code: lines of Python that make a TorchScript file of it, after `import torch`.
        explains: whether this says all of why PyTorch cannot load the file.
    """

    what: str
    how: str
    code: list[str] = field(default_factory=list)
    explains: bool = True

    def error(self, file: Path, cause: str) -> BundleError:
        """Return the error that says this of a file.

        Args:
            cause: PyTorch's message. It is printed above the error if the kind does not explain it.
        """
        above = "\n".join(["import torch", *self.code]) if self.code else "" if self.explains else cause
        return BundleError(f"{relative(file)} cannot be loaded as TorchScript: it is {self.what}. {self.how}", above)


def identify(file: Path) -> FileKind:
    """Find out what a file is that torch.jit.load does not load."""
    with file.open("rb") as stream:
        start = stream.read(SNIFFED)
    if not start:
        return FileKind("empty", RETRY)
    if zipfile.is_zipfile(file):
        return of_zip(file)
    for matches, kind in UNZIPPED:
        if matches(file, start):
            return kind(file)
    if by_name := BY_NAME.get(file.suffix.lower()):
        return by_name(file)
    if is_text(start):
        return FileKind("a text file", "Name the model's file.")
    return FileKind("damaged, or in an unknown format", f"Make one: {MAKE}", explains=False)


# --- zip archives ----------------------------------------------------------------------------------------------------


def of_zip(file: Path) -> FileKind:
    """Tell TorchScript, torch.save, torch.export, Keras and TorchServe apart by the members."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        inner = {name.split("/", 1)[-1] for name in names}
        if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
            return FileKind(
                "TorchScript that this PyTorch cannot load",
                "A newer PyTorch saved it, it needs operators of a package that is not installed, or it is damaged.",
                explains=False,
            )
        if any(name.startswith("data/aotinductor/") for name in inner):
            return FileKind(
                "a .pt2 file that was compiled for one kind of machine (AOTInductor)",
                ORIGINAL,
            )
        if "models/model.json" in inner or "serialized_exported_program.json" in inner:
            return exported_program(file)
        if "data.pkl" in inner:
            member = next(name for name in names if name.split("/", 1)[-1] == "data.pkl")
            with archive.open(member) as stream:
                return of_pickle(file, read_pickle(stream))
        if "MAR-INF/MANIFEST.json" in names:
            return FileKind("an archive of TorchServe", "Copy it into model_store/, and register it there.")
        if "model.weights.h5" in names:
            return keras(file)
        shown = ", ".join(names[:3]) or "no files"
        return FileKind(f"a zip archive without a model ({shown})", "Unpack it, and name the model's file.")


def exported_program(file: Path) -> FileKind:
    return FileKind(
        "a program of torch.export (.pt2)",
        "The lines above make one. It takes the batches that it was exported for: a dynamic batch, or a batch of one, "
        "which is served one input at a time.",
        [
            f"program = torch.export.load({source(file)})",
            f"torch.jit.trace(program.module(), program.example_inputs[0]).save({target(file)})",
        ],
    )


# --- pickles ---------------------------------------------------------------------------------------------------------


def of_pickle(file: Path, read: Pickle | None) -> FileKind:
    """Tell weights, a training checkpoint and a pickled module apart."""
    if read is None:
        return FileKind("a damaged checkpoint", RETRY)
    if read.module:
        return pickled_module(file, read.module, read.key if read.is_dict else None)
    if any("_rebuild_" in name for name in read.classes) and read.is_dict:
        nested = next((key for key in NESTED_WEIGHTS if key in read.strings), None)
        kind = (
            f"a training checkpoint with weights under {nested!r}" if nested else "the weights of a module (state_dict)"
        )
        found = f"torch.load({source(file)}, map_location='cpu', weights_only=True)" + (
            f"[{nested!r}]" if nested else ""
        )
        return weights(file, kind, found)
    if any("_rebuild_" in name for name in read.classes):
        return FileKind("a saved tensor", f"It has no module. Save that: {MAKE}")
    content = ", ".join(dict.fromkeys(read.classes[:3])) or "plain values"
    return FileKind(f"a pickle with {content}", f"It has no PyTorch module. Save one: {MAKE}")


def weights(file: Path, what: str, found: str, imports: Sequence[str] = ()) -> FileKind:
    """Describe a file that has weights only, which the expression `found` loads."""
    return FileKind(
        what,
        "Weights cannot be served without the code of their module. With your module as `model`, the lines above "
        "make one.",
        [*imports, f"model.load_state_dict({found})", f"torch.jit.script(model.eval()).save({target(file)})"],
    )


def pickled_module(file: Path, name: str, key: str | None) -> FileKind:
    if name.startswith("ultralytics."):
        return FileKind(
            f"a checkpoint of Ultralytics ({name})",
            "The lines above make one, beside it.",
            ["from ultralytics import YOLO", f"YOLO({source(file)}).export(format='torchscript')"],
        )
    found = f"torch.load({source(file)}, map_location='cpu', weights_only=False)" + (f"[{key!r}]" if key else "")
    return FileKind(
        f"a pickled module ({name})",
        f"The lines above make one, in a program that can import {name}. They run code from the file, so the file "
        "must come from someone whom you trust.",
        [f"model = {found}", f"torch.jit.script(model.eval()).save({target(file)})"],
    )


# --- other formats ---------------------------------------------------------------------------------------------------


def is_onnx(file: Path) -> bool:
    """Return whether a file is a protobuf message with the fields of an ONNX model, to its last byte."""
    size, seen = file.stat().st_size, set()
    with file.open("rb") as stream:
        try:
            while stream.tell() < size:
                tag = varint(stream)
                number, wire = tag >> 3, tag & 7
                if not 1 <= number <= 25 or (number in (1, 5) and wire != 0) or (number not in (1, 5) and wire != 2):
                    return False  # ir_version and model_version are integers; all others are messages and strings
                seen.add(number)
                value = varint(stream)
                if wire == 2:
                    stream.seek(value, 1)
            return stream.tell() == size and {1, 7, 8} <= seen  # ir_version, graph, opset_import
        except EOFError:
            return False


def varint(stream: IO[bytes]) -> int:
    """Read an integer as protobuf writes it.

    Raises:
        EOFError: the file ends within it, or it is too long.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise EOFError


def is_safetensors(file: Path, start: bytes) -> bool:
    """Return whether a file begins with the length of a JSON object and that object."""
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(MAX_HEADER, file.stat().st_size - 8) or start[8:9] != b"{":
        return False
    with file.open("rb") as stream:
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    return all(isinstance(each, dict) for each in header.values())


def onnx(file: Path) -> FileKind:
    return FileKind(
        "an ONNX model",
        "PyTorch cannot load ONNX files. Save the original PyTorch module with torch.jit.script. If you do not have "
        "it, install onnx2torch (pip install onnx2torch), which converts many models, and run the lines above with an "
        "input of your model's shape.",
        [
            "from onnx2torch import convert",
            f"torch.jit.trace(convert({source(file)}).eval(), torch.rand(1, 3, 224, 224)).save({target(file)})",
        ],
    )


def safetensors(file: Path) -> FileKind:
    return weights(
        file,
        "the weights of a module (safetensors)",
        f"load_file({source(file)})",
        ["from safetensors.torch import load_file"],
    )


def keras(file: Path) -> FileKind:
    return FileKind(
        "a model or weights of Keras",
        "TorchServe serves PyTorch models. The lines above, with Keras 3, make an ONNX file of a model; name that "
        "file instead, to see how it becomes TorchScript.",
        [
            "import keras",
            f"keras.saving.load_model({source(file)}).export({json.dumps(file.stem + '.onnx')}, format='onnx')",
        ],
    )


def tflite(file: Path) -> FileKind:
    return FileKind(
        "a model of TensorFlow Lite",
        f"TorchServe serves PyTorch models. `python -m tf2onnx.convert --tflite {relative(file)} --output "
        f"{file.stem}.onnx` makes an ONNX file of it; name that file instead, to see how it becomes TorchScript.",
    )


def checkpoint(file: Path) -> FileKind:
    with file.open("rb") as stream:
        return of_pickle(file, legacy_pickle(stream))


def plain(what: str, how: str) -> Callable[[Path], FileKind]:
    return lambda _: FileKind(what, how)


# tests of a file and its first bytes, in order
UNZIPPED: list[tuple[Callable[[Path, bytes], bool], Callable[[Path], FileKind]]] = [
    (lambda _, start: start.startswith(b"PK"), plain("a damaged zip archive: its end is missing", RETRY)),
    (lambda _, start: start.startswith(b"\x80"), checkpoint),
    (lambda _, start: start.startswith(b"\x89HDF\r\n\x1a\n"), keras),
    (lambda _, start: start[4:8] == b"TFL3", tflite),
    (
        lambda _, start: start[4:6] == b"ET" and start[6:8].isdigit(),
        plain("a program of ExecuTorch (.pte)", ORIGINAL),
    ),
    (lambda _, start: start.startswith(b"GGUF"), plain("a GGUF file of llama.cpp", "No handler here serves it.")),
    (
        lambda _, start: start.startswith(b"version https://git-lfs"),
        plain("a pointer of Git LFS in place of the file", "Run: git lfs pull"),
    ),
    (
        lambda _, start: start.startswith(COMPRESSED) or start[257:262] == b"ustar",
        plain("a compressed archive", "Unpack it, and name the model's file."),
    ),
    (is_safetensors, safetensors),
    (lambda file, _: is_onnx(file), onnx),
    (
        lambda _, start: start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")),
        plain("a web page", "The download failed. Download the file itself."),
    ),
]
# what has no reliable mark of its own, or is damaged, by the end of its name
BY_NAME: dict[str, Callable[[Path], FileKind]] = {
    ".onnx": lambda file: replace(onnx(file), what="an ONNX model, by its name", explains=False),
    ".pb": plain("a model of TensorFlow, by its name", "TorchServe serves PyTorch models. " + ORIGINAL),
    ".mlmodel": plain("a model of Core ML, by its name", ORIGINAL),
    **dict.fromkeys(
        (".engine", ".plan", ".trt"), plain("an engine of TensorRT, by its name: made for one kind of GPU", ORIGINAL)
    ),
    **dict.fromkeys((".pdmodel", ".pdiparams"), plain("a model of PaddlePaddle, by its name", ORIGINAL)),
    ".caffemodel": plain("a model of Caffe, by its name", ORIGINAL),
}


def is_text(start: bytes) -> bool:
    try:
        start.decode()
    except UnicodeDecodeError as exc:
        return exc.start > SNIFFED - 4  # a character that the end of `start` cuts
    return b"\x00" not in start


def source(file: Path) -> str:
    """Return the file's path as a Python string."""
    return json.dumps(str(relative(file)))


def target(file: Path) -> str:
    """Return the name of the TorchScript file as a Python string: never that of the file itself."""
    return json.dumps(f"{file.stem}.torchscript.pt")
