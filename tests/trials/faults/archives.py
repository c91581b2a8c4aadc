"""Archives for trials: out of the image, with something changed, put into the running container's store."""

import subprocess
import tempfile
from pathlib import Path

from bundle import mar
from bundle.catalog import CONFIG_NAME
from tests.docker.stack import Stack, docker
from tests.support import altered

FAULTY = Path(__file__).parent / "faulty.py"


def shipped(stack: Stack, name: str, folder: Path) -> Path:
    """The image's archive of a model."""
    docker("cp", f"{stack.container()}:/opt/bundle/archives/{name}.mar", str(folder / f"{name}.mar"))
    return folder / f"{name}.mar"


def put(stack: Stack, archive: Path) -> None:
    """Into the store of the running container."""
    command = ["docker", "exec", "-i", stack.container(), "sh", "-c", f"cat > model_store/{archive.name}"]
    subprocess.run(command, input=archive.read_bytes(), check=True, capture_output=True)


def register_faulty(stack: Stack, settings: str = "") -> None:
    """The model `faulty`: the text model, its workers too, with the handler of faulty.py.

    Args:
        settings: lines to add to its model-config.yaml.
    """
    with tempfile.TemporaryDirectory() as temporary:
        text = shipped(stack, "text", Path(temporary))
        manifest = mar.read(text, mar.MANIFEST).replace(b'"text.py"', b'"faulty.py"')
        config = mar.read(text, CONFIG_NAME) + f"\n{settings}\n".encode()
        members = {"faulty.py": FAULTY.read_bytes(), mar.MANIFEST: manifest, CONFIG_NAME: config}
        put(stack, altered(text, Path(temporary) / "faulty.mar", members))
    stack.client.register("faulty.mar", "faulty")
