"""The words of a recorded run make the configuration that was recorded."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from llamafactory.commands.rerun import expand_rerun
from llamafactory.compose import load_config
from llamafactory.hparams.sharding import configuration_files
from llamafactory.train.continuity import require_same_configuration
from llamafactory.train.run_index import resume_command

_FREE = {"output_dir", "rerun_of", "overwrite_output_dir", "resume_from_checkpoint", "allow_change"}


def record_of(folder, cfg):
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"run_id": "a", "config": cfg.flat(mask_secrets=True), "given": cfg.given_keys()}
    (folder / "run.json").write_text(json.dumps(record))
    return record


def settled(cfg):
    return {key: value for key, value in cfg.flat().items() if key not in _FREE}


@pytest.mark.parametrize(
    "options",
    [{}, {"run_name": "it's a \"ü\" #1 [x], {y} $HOME `id`\n--flag=1"}, {"run_name": "007"}, {"run_name": " a "},
     {"lr_scheduler_kwargs": {"num_cycles": 3}, "lr_scheduler_type": "cosine_with_restarts"},
     {"lora_target": ["q_proj", "v_proj"], "use_dora": True, "allow_change": ["data"]},
     {"temperature": 0.95, "learning_rate": 5e-5, "eval_steps": 3, "val_size": 2, "eval_strategy": "steps"}],
)  # fmt: skip
def test_a_record_becomes_the_same_configuration_also_through_a_shell(train_config, tmp_path, options):
    folder = tmp_path / "a b" / "it's ü"
    cfg = train_config(**options, output_dir=str(folder))
    record = record_of(folder, cfg)
    again = load_config(expand_rerun(["--rerun", str(folder / "run.json")]))
    assert settled(again) == settled(cfg)
    assert set(cfg.given_keys()) - _FREE <= set(again.given_keys())
    assert again.train.output_dir == f"{folder}-rerun"
    program, command, *words = shlex.split(resume_command(folder, record))
    assert (program, command) == ("llamafactory-cli", "train")
    resumed = load_config(expand_rerun(words))
    assert settled(resumed) == settled(cfg)
    assert (resumed.train.output_dir, resumed.train.rerun_of) == (str(folder), None)


def test_a_slash_at_the_end_puts_no_run_into_the_other(train_config, tmp_path):
    record_of(tmp_path / "out", train_config(output_dir=f"{tmp_path / 'out'}/"))
    again = load_config(expand_rerun([f"--rerun={tmp_path / 'out'}"]))
    assert again.train.output_dir == f"{tmp_path / 'out'}-rerun"


def test_a_run_that_began_elsewhere_and_saved_nothing_is_continued_there(train_config, tmp_path):
    cfg = train_config(output_dir=str(tmp_path / "out"), overwrite_output_dir=True)
    record = record_of(tmp_path / "out", cfg)
    assert "resume_from_checkpoint" not in resume_command(tmp_path / "out", record)  # there may be no checkpoint
    record["config"]["resume_from_checkpoint"] = "/elsewhere/a b/checkpoint-4"
    assert "'resume_from_checkpoint=/elsewhere/a b/checkpoint-4'" in resume_command(tmp_path / "out", record)
    (tmp_path / "out" / "checkpoint-6").mkdir()
    assert "resume_from_checkpoint" not in resume_command(tmp_path / "out", record)


def test_a_deepspeed_file_that_has_gone_is_taken_from_the_record(train_config, tmp_path):
    folder, file = tmp_path / "out", tmp_path / "ds.json"
    content = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
    file.write_text(json.dumps(content))
    cfg = train_config(deepspeed=str(file), output_dir=str(folder))
    record = record_of(folder, cfg) | {"files": configuration_files(cfg)}
    (folder / "run.json").write_text(json.dumps(record))
    file.unlink()
    again = load_config(expand_rerun(["--rerun", str(folder / "run.json")]))
    assert again.train.deepspeed == content
    _, _, *words = shlex.split(resume_command(folder, record))
    require_same_configuration(folder, record, load_config(expand_rerun(words)))
