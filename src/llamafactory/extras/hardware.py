"""What this machine has, and how fast it multiplies matrices. Reads only; torch is imported inside the functions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_CGROUP_USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The devices that one process may compute on.

    Attributes:
        device: torch's device type: cpu, cuda, mps, xpu, npu, ...
        name: the product name of the device.
        num_devices: devices of that type that are visible (1 for a CPU).
        memory_bytes: what a run may count on: a device's whole memory, or on a CPU the RAM that is free now.
        cpu_threads: hardware threads that this process may use.
        ram_bytes: RAM of the machine, or of the container where that is less.
        ram_available_bytes: RAM that is free now.
        has_bf16: whether the device computes bfloat16 natively.
    """

    device: str
    name: str
    num_devices: int
    memory_bytes: int
    cpu_threads: int
    ram_bytes: int
    ram_available_bytes: int
    has_bf16: bool


def read_hardware(*, use_cpu: bool = False) -> Hardware:
    """Look at this machine. `use_cpu` leaves accelerators out."""
    import torch

    total, available = read_ram()
    threads = num_cpu_threads()
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return Hardware(
            device="cpu",
            name=_cpu_name(),
            num_devices=1,
            memory_bytes=available,
            cpu_threads=threads,
            ram_bytes=total,
            ram_available_bytes=available,
            has_bf16=_cpu_has_bf16(),
        )
    name, memory, has_bf16 = _describe(accelerator.type)
    return Hardware(
        device=accelerator.type,
        name=name,
        num_devices=torch.accelerator.device_count(),
        memory_bytes=memory or total,
        cpu_threads=threads,
        ram_bytes=total,
        ram_available_bytes=available,
        has_bf16=has_bf16,
    )


def num_cpu_threads() -> int:
    """Return the number of hardware threads that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_ram() -> tuple[int, int]:
    """Return (total, available now) in bytes, within the container's limit where one is set; (0, 0) where unknown."""
    if sys.platform == "linux":
        return _linux_ram(Path("/proc/meminfo"), _first_number(_CGROUP_LIMITS), _first_number(_CGROUP_USED))
    if sys.platform == "win32":
        return _windows_ram()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def read_process_memory() -> tuple[int, int]:
    """Return (resident now, highest so far) of this process in bytes; (0, 0) where the system does not tell."""
    if sys.platform == "linux":
        try:
            rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
        except OSError:
            return 0, 0
        return int(rows.get("VmRSS", 0)) * 1024, int(rows.get("VmHWM", 0)) * 1024
    if sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    return 0, 0


def forget_process_peak() -> int:
    """Lets the highest memory of this process, see `read_process_memory`, begin again from what it holds now.

    Returns:
        Bytes of the highest memory so far where the system cannot forget it (only Linux can), else 0.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return read_process_memory()[1]
    return 0


def measure_gemm_peak(device: str | torch.device, dtype: torch.dtype, *, size: int = 1024, repeats: int = 8) -> float:
    """Return the best matrix-multiply rate of `repeats` tries, in FLOP/s (2 x size^3 a multiplication).

    Args:
        device: where to measure.
        dtype: element type of both factors.
        size: edge of the square matrices. 1024 fills two CPU cores; a large GPU wants 8192.
        repeats: timed tries; one untimed try comes first.
    """
    import torch

    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)  # its own, so that a run's random numbers stay what they are
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    wait: Callable[[], None] = _no_wait if device.type == "cpu" else torch.accelerator.synchronize
    best = float("inf")
    with torch.no_grad():
        torch.mm(left, right)
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            torch.mm(left, right)
            wait()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _no_wait() -> None:
    """A CPU call returns when its work is done."""


def _describe(device_type: str) -> tuple[str, int, bool]:
    """Name, memory in bytes (0: unknown) and native bfloat16 of the first device of an accelerator type."""
    import torch

    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory, torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "mps":
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
        return f"{_cpu_name()} GPU", torch.mps.recommended_max_memory(), has_bf16
    module = getattr(torch, device_type, None)
    if module is None or not hasattr(module, "get_device_properties"):
        return device_type, 0, False
    properties = module.get_device_properties(0)
    has_bf16 = bool(getattr(module, "is_bf16_supported", lambda: False)())
    return getattr(properties, "name", device_type), int(getattr(properties, "total_memory", 0)), has_bf16


def _cpu_has_bf16() -> bool:
    import torch

    read_capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch that works here
    if read_capabilities is None:
        return False
    return any("bf16" in key and value is True for key, value in read_capabilities().items())


def _cpu_name() -> str:
    if sys.platform == "linux":
        try:
            found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        except OSError:
            found = None
        if found:
            return found[1].strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        if result.returncode == 0:
            return result.stdout.strip()
    return platform.processor() or platform.machine()


def _linux_ram(meminfo: Path, limit: int | None, used: int | None) -> tuple[int, int]:
    try:
        rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE))
    except OSError:
        return 0, 0
    total = int(rows.get("MemTotal", 0)) * 1024
    available = int(rows.get("MemAvailable", 0)) * 1024
    if limit is not None and limit < total:
        total = limit
        available = min(available, max(0, limit - (used or 0)))
    return total, available


def _first_number(paths: tuple[Path, ...]) -> int | None:
    for path in paths:
        try:
            return int(path.read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None


def _windows_ram() -> tuple[int, int]:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total_physical", ctypes.c_ulonglong),
            ("available_physical", ctypes.c_ulonglong),
            ("rest", ctypes.c_ulonglong * 5),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return 0, 0
    return status.total_physical, status.available_physical
