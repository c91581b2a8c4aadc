"""Archives for trials: out of the image, with something changed, put into the running container's store."""

import subprocess
import tempfile
import zipfile
from pathlib import Path

from bundle.signing import SEALS, seal
from tests.docker.stack import Stack, docker

FAULTY = Path(__file__).parent / "faulty.py"


def shipped(stack: Stack, name: str, folder: Path) -> Path:
    """The image's archive of a model."""
    docker("cp", f"{stack.container()}:/opt/bundle/archives/{name}.mar", str(folder / f"{name}.mar"))
    return folder / f"{name}.mar"


def altered(archive: Path, target: Path, members: dict[str, bytes | None]) -> Path:
    """A copy of an archive with these members in the place of its own, or none in the place of None."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            if entry.filename not in {*members, *SEALS}:
                new.writestr(entry.filename, old.read(entry))
        for name, content in members.items():
            if content is not None:
                new.writestr(name, content)
    seal(target, None)
    return target


def member(archive: Path, name: str) -> str:
    with zipfile.ZipFile(archive) as file:
        return file.read(name).decode()


def versioned(archive: Path, version: str) -> bytes:
    """The manifest of an archive as that of another version."""
    manifest = member(archive, "MAR-INF/MANIFEST.json")
    return manifest.replace('"modelVersion": "1.0"', f'"modelVersion": "{version}"').encode()


def put(stack: Stack, archive: Path) -> None:
    """Into the store of the running container."""
    command = ["docker", "exec", "-i", stack.container(), "sh", "-c", f"cat > model_store/{archive.name}"]
    subprocess.run(command, input=archive.read_bytes(), check=True, capture_output=True)


def register_faulty(stack: Stack, workers: int = 2) -> None:
    """The model `faulty`: the text model with the handler of faulty.py."""
    with tempfile.TemporaryDirectory() as temporary:
        text = shipped(stack, "text", Path(temporary))
        manifest = member(text, "MAR-INF/MANIFEST.json")
        members = {
            "faulty.py": FAULTY.read_bytes(),
            "MAR-INF/MANIFEST.json": manifest.replace('"text.py"', '"faulty.py"').encode(),
        }
        put(stack, altered(text, Path(temporary) / "faulty.mar", members))
    stack.client.register("faulty.mar", "faulty")
    stack.client.scale("faulty", "1.0", workers, workers)
