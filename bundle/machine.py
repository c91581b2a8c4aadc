"""Describe what a measurement was made on: this machine, its software, and the commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import psutil

from bundle.paths import ROOT

PACKAGES = ("torch", "torchvision", "torchserve")


class Record(TypedDict):
    """The machine and the versions, as JSON has them."""

    cpu: str
    cores: int
    gpus: list[str]
    memory_gib: float
    system: str
    versions: dict[str, str]


def record(cores: int) -> Record:
    """Return the machine and the versions, for JSON.

    Args:
        cores: number of cores that the measurement could use.
    """
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "gpus": gpus(),
        "memory_gib": round(memory_gib(), 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def about() -> dict[str, str]:
    """Return the date, the commit, the machine and the versions, in words."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "CPU": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory_gib():.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "torch": version("torch"),
    }


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpus() -> list[str]:
    """Return the names of the GPUs that PyTorch sees."""
    import torch  # takes seconds

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def memory_gib() -> float:
    return psutil.virtual_memory().total / 2**30


def commit() -> str:
    """Return the commit of this repository, and whether tracked files differ from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
