"""What a result depends on beside the options: the machine and its software."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).resolve().parents[2]
_PACKAGES = ("torchvision", "numpy", "tensorboard", "nn_backprop")


def describe_machine() -> dict[str, Any]:
    """What a result depends on beside the options: versions, commit, processor, GPU, threads.

    `versions` maps python and each package to its version, None if it is not installed. `commit`
    ends in "+changes" if tracked files differ from it, and is None outside a git checkout.
    `gpu` is the first one's name, if there is one.
    """
    # torch's own string, since the package's lacks the build (+cpu, +cu130).
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {
        "versions": versions | {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    if not (_SOURCE / ".git").exists():  # installed, perhaps inside somebody else's checkout
        return None
    command = ["git", "--no-optional-locks", "-C", str(_SOURCE), "describe"]
    command += ["--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
