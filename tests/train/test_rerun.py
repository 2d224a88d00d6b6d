"""A recorded run that is run again: what differs is said, other rows stop it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.hparams.model import ModelConfig
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig
from llamafactory.train.rerun import (
    read_record,
    require_recorded_base,
    say_what_differs,
    say_what_is_computed_otherwise,
)

DATA = {"datasets": [{"name": "a", "fingerprint": "1"}, {"name": "b", "fingerprint": "2"}]}


def record(folder: Path, **changes: Any) -> str:
    document = {"config": {"seed": 1}, "data": DATA, "packages": {"torch": "2", "numpy": "1"}, **changes}
    (folder / "run.json").write_text(json.dumps(document))
    return str(folder / "run.json")


def test_a_record_is_found_in_its_folder_too(tmp_path: Path) -> None:
    path = record(tmp_path)
    assert read_record(Path(path)) == read_record(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"config": 3}', "{}"])
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="no record of a run"):
        read_record(tmp_path)


def test_the_same_is_said_to_be_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_what_differs(record(tmp_path), DATA, {"torch": "2", "numpy": "1"}, may_differ=False)
    assert "rows and versions are those of the recorded run" in capsys.readouterr().err


def test_other_versions_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_what_differs(record(tmp_path), DATA, {"torch": "3", "peft": "1"}, may_differ=False)
    assert "numpy 1 -> None; peft None -> 1; torch 2 -> 3" in capsys.readouterr().err


def test_other_rows_stop_it_unless_they_may_differ(tmp_path: Path) -> None:
    path = record(tmp_path)
    now = {"datasets": [{"name": "a", "fingerprint": "9"}, {"name": "c", "fingerprint": "2"}]}
    with pytest.raises(ConfigError, match="a: 1 -> 9; b: 2 -> not there; c: not there -> 2"):
        say_what_differs(path, now, {"torch": "2", "numpy": "1"}, may_differ=False)
    say_what_differs(path, now, {"torch": "2", "numpy": "1"}, may_differ=True)


def test_another_way_to_compute_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"device": "cpu", "micro_batch_tokens": 1024, "layout": "flat", "costs": {"room": 5}}
    path = record(tmp_path, plan=plan, num_processes=2)
    say_what_is_computed_otherwise(path, {**plan, "costs": {"room": 9}}, 2)
    assert capsys.readouterr().err == ""
    say_what_is_computed_otherwise(path, {**plan, "micro_batch_tokens": None, "compiled_blocks": True}, 1)
    said = capsys.readouterr().err
    assert "num_processes 2 -> 1; micro_batch_tokens 1024 -> None" in said
    assert "compiled_blocks" not in said  # the record of an earlier version does not know it
    assert "each step holds other rows" in said
    say_what_is_computed_otherwise(record(tmp_path), plan, 3)  # an old record knows nothing of this
    assert capsys.readouterr().err == ""


def test_other_weights_stop_it_unless_they_are_asked_for(tmp_path: Path) -> None:
    def config(model: str = "m", **train: Any) -> RunConfig:
        return RunConfig(model=ModelConfig(model_name_or_path=model), train=TrainConfig(rerun_of=path, **train))

    recorded = RunConfig(model=ModelConfig(model_name_or_path="m")).flat()
    path = record(tmp_path, config=recorded, base="1")
    require_recorded_base(config(), "1")
    with pytest.raises(ConfigError, match="the weights of m, or of an adapter beside it, are not those"):
        require_recorded_base(config(), "2")
    require_recorded_base(config("other"), "2")
    require_recorded_base(config(allow_change=("model_name_or_path",)), "2")
    record(tmp_path, config=recorded)
    require_recorded_base(config(), "2")  # the record of an earlier version
