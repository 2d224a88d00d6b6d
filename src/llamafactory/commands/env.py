"""`env`: versions and hardware, as a bug report needs them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from llamafactory import __version__
from llamafactory.extras.checkout import git_commit
from llamafactory.extras.packages import is_installed, version

_PACKAGES = {
    "PyTorch": "torch",
    "Transformers": "transformers",
    "Datasets": "datasets",
    "Accelerate": "accelerate",
    "PEFT": "peft",
    "TRL": "trl",
    "DeepSpeed": "deepspeed",
    "Bitsandbytes": "bitsandbytes",
    "vLLM": "vllm",
}
_GIB = 2**30


def main(argv: list[str]) -> int:
    """Print one line for each fact; packages that are missing are left out."""
    for name, text in _facts():
        print(f"- {name}: {text}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    yield "llamafactory version", __version__
    yield "Platform", platform.platform()
    yield "Python version", platform.python_version()
    for title, package in _PACKAGES.items():
        found = version(package)
        if found is not None:
            yield f"{title} version", found
    yield from _devices()
    commit = git_commit()
    yield "Git commit", commit or "not a git checkout"
    yield "Default data directory", "found" if Path("data", "dataset_info.json").is_file() else "not found"


def _devices() -> Iterator[tuple[str, str]]:
    if not is_installed("torch"):
        return
    from llamafactory.extras.hardware import read_hardware

    found = read_hardware()
    title = "CPU" if found.device == "cpu" else "GPU"
    yield f"{title} type", f"{found.name} ({found.device})"
    if found.device == "cpu":
        yield "CPU threads", str(found.cpu_threads)
    else:
        yield "GPU number", str(found.num_devices)
        yield "GPU memory", f"{found.memory_bytes / _GIB:.2f} GiB"
    yield "RAM", f"{found.ram_bytes / _GIB:.2f} GiB, {found.ram_available_bytes / _GIB:.2f} GiB free"
