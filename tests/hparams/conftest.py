"""A folder with a model, a data set and a way to write configurations into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = ("ALLOW_EXTRA_ARGS", "USE_V1", "USE_RAY", "USE_KT", "USE_MCA", "USE_MEGATRON_BRIDGE")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `model/`, `data/` with the data set `rows`, nothing set in the environment."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.json").write_text('[{"instruction": "a", "input": "", "output": "b"}]', encoding="utf-8")
    info = {"rows": {"file_name": "rows.json"}, "gone": {"file_name": "gone.json"}}
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return tmp_path


@pytest.fixture
def good() -> dict[str, Any]:
    """The smallest configuration that can train."""
    return {"model_name_or_path": "model", "dataset": "rows", "do_train": True, "output_dir": "out"}


@pytest.fixture
def problems_of() -> Callable[..., list[Any]]:
    """Resolves a source and gives its problems: `problems_of({...}, command="train")`."""

    def find(source: Any, command: str = "train") -> list[Any]:
        from llamafactory.compose import resolve_config

        return list(resolve_config(source, command=command).problems)

    return find
