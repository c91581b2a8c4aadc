"""Archives for trials: copy one from the image, change it, put it into the running container's model store."""

import subprocess
import tempfile
from pathlib import Path

from bundle import mar
from bundle.catalog import CONFIG_NAME
from tests.docker.stack import Stack, docker
from tests.support import altered

FAULTY = Path(__file__).parent / "faulty.py"


def copy_from_image(stack: Stack, name: str, folder: Path) -> Path:
    """Copy the image's archive of a model into the folder, and return its path."""
    docker("cp", f"{stack.container()}:/opt/bundle/archives/{name}.mar", str(folder / f"{name}.mar"))
    return folder / f"{name}.mar"


def put(stack: Stack, archive: Path) -> None:
    """Copy an archive into the model store of the running container."""
    command = ["docker", "exec", "-i", stack.container(), "sh", "-c", f"cat > model_store/{archive.name}"]
    subprocess.run(command, input=archive.read_bytes(), check=True, capture_output=True)


def register_faulty(stack: Stack, settings: str = "") -> None:
    """Register the model `faulty`: the text model with the handler of faulty.py.

    Args:
        stack: where to register it.
        settings: lines to add to its model-config.yaml.
    """
    with tempfile.TemporaryDirectory() as temporary:
        text = copy_from_image(stack, "text", Path(temporary))
        manifest = mar.read(text, mar.MANIFEST).replace(b'"text.py"', b'"faulty.py"')
        config = mar.read(text, CONFIG_NAME) + f"\n{settings}\n".encode()
        members = {"faulty.py": FAULTY.read_bytes(), mar.MANIFEST: manifest, CONFIG_NAME: config}
        put(stack, altered(text, Path(temporary) / "faulty.mar", members))
    stack.client.register("faulty.mar", "faulty")
