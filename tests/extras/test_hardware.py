from __future__ import annotations

from pathlib import Path

import pytest

from llamafactory.extras import hardware
from llamafactory.extras.hardware import measure_gemm_peak, read_hardware, read_ram


def test_this_machine_is_described() -> None:
    found = read_hardware()
    assert found.device
    assert found.name
    assert found.num_devices >= 1
    assert found.cpu_threads >= 1
    assert found.memory_bytes > 2**20
    assert found.ram_bytes >= found.ram_available_bytes > 2**20


def test_use_cpu_leaves_accelerators_out() -> None:
    found = read_hardware(use_cpu=True)
    assert (found.device, found.num_devices) == ("cpu", 1)
    assert found.memory_bytes == found.ram_available_bytes


def test_available_ram_agrees_with_psutil() -> None:
    psutil = pytest.importorskip("psutil")
    total, available = read_ram()
    assert total <= psutil.virtual_memory().total
    assert available <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, None, (8000 * 1024, 5000 * 1024)),
        (2**62, 10, (8000 * 1024, 5000 * 1024)),  # "no limit" of cgroup v1
        (3000 * 1024, 1000 * 1024, (3000 * 1024, 2000 * 1024)),
        (3000 * 1024, 4000 * 1024, (3000 * 1024, 0)),
    ],
)
def test_a_container_limit_counts(
    tmp_path: Path, limit: int | None, used: int | None, expected: tuple[int, int]
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        8000 kB\nMemFree:          100 kB\nMemAvailable:    5000 kB\n")
    assert hardware._linux_ram(meminfo, limit, used) == expected


def test_gemm_peak_is_a_plausible_rate() -> None:
    import torch

    rate = measure_gemm_peak("cpu", torch.float32, size=256, repeats=3)
    assert 1e8 < rate < 1e15


@pytest.mark.gpu
def test_a_gpu_is_described() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = read_hardware()
    assert found.device == "cuda"
    assert found.memory_bytes > 2**30
    assert measure_gemm_peak("cuda", torch.bfloat16, size=4096) > 1e12
