"""Facts that stand in two files agree, and the lock fits any machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from llamafactory.model.embedded import INSTALL_COMMAND


@pytest.fixture(scope="module")
def locked(repo_dir: Path) -> dict[str, str]:
    lines = (repo_dir / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([a-z0-9-]+)==([\w.]+)( ; .+)?", line) for line in lines if not line.startswith("#")]
    assert all(pins), "every line of requirements.lock is a plain pin"
    return {pin[1]: pin[2] for pin in pins if pin}


def test_the_lock_holds_every_dependency(repo_dir: Path, locked: dict[str, str]) -> None:
    project = tomllib.loads((repo_dir / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in wanted}
    assert names - set(locked) == set()


def test_the_lock_names_no_build_and_no_gpu_library(locked: dict[str, str]) -> None:
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert "+" not in locked["torch"]


def test_setup_installs_the_model_that_errors_name(repo_dir: Path) -> None:
    script = (repo_dir / "scripts" / "setup_env.py").read_text(encoding="utf-8")
    assert f'EMBEDDED_MODEL = "{INSTALL_COMMAND.split()[-1]}"' in script
