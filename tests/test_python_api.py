"""The names that Python programs use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import llamafactory
from llamafactory.extras.errors import ConfigError
from llamafactory.hparams.run_config import RunConfig


def test_public_names_are_there() -> None:
    assert set(llamafactory.__all__) <= set(dir(llamafactory))
    for name in llamafactory.__all__:
        assert getattr(llamafactory, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        llamafactory.nope  # noqa: B018


def test_a_wrong_config_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_name_or_path: missing"):
        llamafactory.run_exp({})
    with pytest.raises(ConfigError, match="export_dir: missing"):
        llamafactory.export_model({})
    with pytest.raises(ConfigError, match="no such file"):
        llamafactory.load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="model_name_or_path: missing"):
        llamafactory.ChatModel([])


def test_every_kind_of_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr("llamafactory.train.tuner.run_exp", seen.append)
    options: dict[str, Any] = {"model_name_or_path": "org/model", "do_eval": True, "output_dir": str(tmp_path / "out")}
    options |= {"eval_dataset": "rows", "dataset_dir": {"rows": {"hf_hub_url": "a/b"}}}
    config = llamafactory.load_config(options)
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model_name_or_path: org/model\ndo_eval: true\noutput_dir: {tmp_path / 'out'}\neval_dataset: rows\n"
        "dataset_dir: {rows: {hf_hub_url: a/b}}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "argv", ["prog", str(file)])
    for args in (options, config, file, str(file), [str(file)], None):
        llamafactory.run_exp(args)
    assert seen == [config] * 6
