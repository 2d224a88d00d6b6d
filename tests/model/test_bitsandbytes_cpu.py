"""An import of bitsandbytes runs no code of the hub."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llamafactory.model.patches import bitsandbytes_cpu

LIKE_THE_REAL_ONE = """
import logging
try:
    from kernels import get_kernel
    get_kernel("kernels-community/quantization-bitsandbytes")
except Exception as error:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load: %s", error)
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What `kernels` was asked for, beside a package that asks as bitsandbytes 0.50 does."""
    names: list[str] = []
    kernels = ModuleType("kernels")
    kernels.get_kernel = names.append  # type: ignore[attr-defined]
    (tmp_path / "bitsandbytes.py").write_text(LIKE_THE_REAL_ONE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(bitsandbytes_cpu, "is_installed", lambda name: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what is there now comes back afterwards
    del sys.modules["bitsandbytes"]
    return names


def test_nothing_of_the_hub_is_run(asked: list[str], caplog: pytest.LogCaptureFixture) -> None:
    kernels = sys.modules["kernels"]
    assert bitsandbytes_cpu.import_bitsandbytes() is sys.modules["bitsandbytes"]
    assert (asked, caplog.records) == ([], [])
    assert sys.modules["kernels"] is kernels
    assert bitsandbytes_cpu.import_bitsandbytes() is sys.modules["bitsandbytes"]


def test_the_package_would_ask_otherwise(asked: list[str]) -> None:
    importlib.import_module("bitsandbytes")
    assert len(asked) == 1


def test_where_it_is_not_installed_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes_cpu, "is_installed", lambda name: False)
    assert bitsandbytes_cpu.import_bitsandbytes() is None
