"""One real run of the bundled model through the command line, shared by the tests of what comes after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cli(repo_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `llamafactory-cli` in a process of its own: `cli("train", "x.yaml", "max_steps=1")`."""

    def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llamafactory", *words],
            capture_output=True, text=True, timeout=600, check=False,
            env=os.environ | {"PYTHONPATH": str(repo_dir / "src")} | options.pop("env", {}),
            cwd=repo_dir, **options,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def trained(
    cli: Callable[..., subprocess.CompletedProcess[str]],
    embedded_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    repo_dir: Path,
) -> Path:
    """Folder of a LoRA run of a few steps on the bundled model and the shipped identity data."""
    folder = tmp_path_factory.mktemp("trained") / "mein Läuf"
    done = cli(
        "train", str(repo_dir / "examples" / "quickstart.yaml"), f"output_dir={folder}",
        'data_variables={"name": "Ada Löve", "author": "two people"}', "dataset=identity", "max_samples=24",
        "num_train_epochs=1", "per_device_train_batch_size=6", "logging_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "all_results.json").read_text())["train_loss"] > 0
    return folder
