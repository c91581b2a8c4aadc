"""Choose the package index of torch, torchvision and torchaudio: all three come from the same one."""

import platform
import re
import sys
import threading
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.request import Request, urlopen

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYPI = "pypi"  # in place of a URL: the index of all other packages
PACKAGES = ("torch", "torchvision", "torchaudio")
# the Makefile looks for the same files
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
ANSWER_SECONDS = 5


@dataclass(frozen=True)
class Source:
    """Where torch comes from.

    Attributes:
        index: a URL, or PYPI.
        line: says so, and why, to the person at the terminal.
    """

    index: str
    line: str


class Probe(threading.Thread):
    """Find out in the background whether an index has all packages for this Python and this machine.

    Args:
        pins: version of each package.
    """

    def __init__(self, index: str, pins: dict[str, str]):
        super().__init__(daemon=True)
        self.index, self.pins, self.found = index, pins, False
        self.start()

    def run(self) -> None:
        self.found = all(has_cpu_build(self.index, name, self.pins[name]) for name in PACKAGES)

    def answer(self) -> bool:
        """Return the result. Return False if the index does not answer within ANSWER_SECONDS."""
        self.join(ANSWER_SECONDS)
        return self.found


def has_cpu_build(index: str, name: str, pinned: str) -> bool:
    """Return whether the index lists the CPU build of this version, for this Python and this machine."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheel = rf"{name}-{re.escape(pinned)}(%2B|\+)cpu-{python}-{python}-\w*{platform.machine()}\.whl"
    try:
        page = Request(f"{index}/{name}/", headers={"User-Agent": "torchserve-bundle", "Accept": "text/html"})
        with urlopen(page, timeout=ANSWER_SECONDS) as answer:
            return re.search(wheel, answer.read().decode(), re.IGNORECASE) is not None
    except (OSError, ValueError, HTTPException):
        return False


def choose(asked: str, recorded: str, own_index: bool, probe: Probe | None) -> Source:
    """Return the source of torch.

    Args:
        asked: of TORCH_INDEX_URL.
        recorded: the source of the torch that is installed.
        own_index: whether pip's settings replace PyPI.
        probe: of CPU_INDEX. None, if the choice does not depend on it.
    """
    cpu, cuda = f"CPU builds: TORCH_INDEX_URL={CPU_INDEX}", f"CUDA builds: TORCH_INDEX_URL={PYPI}"
    if asked:
        return Source(asked, "torch comes from TORCH_INDEX_URL.")  # not the URL, which may have a password
    if recorded:
        return Source(recorded, "torch comes from the same index as the torch that is installed.")
    if has_driver():
        return Source(PYPI, f"torch comes from PyPI, with CUDA, because an NVIDIA driver was found. {cpu}")
    if own_index:
        return Source(PYPI, f"torch comes from the index in pip's settings. {cpu}")
    if probe and probe.answer():
        return Source(CPU_INDEX, f"torch is PyTorch's CPU build, because no NVIDIA driver was found. {cuda}")
    return Source(PYPI, "torch comes from PyPI, with CUDA, because PyTorch's index of CPU builds does not answer.")


def has_driver() -> bool:
    """Return whether this machine has NVIDIA's driver."""
    return any(Path(file).exists() for file in DRIVER)


def unused_gpu() -> str:
    """Return a sentence if this machine has NVIDIA's driver, and torch is a CPU build; otherwise ""."""
    try:
        build = version("torch")
    except PackageNotFoundError:
        return ""
    if not build.endswith("+cpu") or not has_driver():
        return ""
    return (
        f"This machine has an NVIDIA driver, but torch {build} is a CPU build, so no GPU is used. "
        f"For CUDA builds: make setup TORCH_INDEX_URL={PYPI}, in Docker: make image TORCH_INDEX_URL={PYPI}"
    )
