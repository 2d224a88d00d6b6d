"""Which keys may differ when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.train.continuity import require_same_configuration, say_other_versions
from llamafactory.train.report import run_record

FOLDER = Path("out")


def go_on(before, now):
    record = {"config": before.flat(mask_secrets=True), "given": before.given_keys(), "state": "running"}
    require_same_configuration(FOLDER, record, now)


@pytest.mark.parametrize(
    "change",
    [{"lora_rank": 4}, {"lora_dropout": 0.5}, {"lora_target": "q_proj"}, {"use_dora": True}, {"optim": "adafactor"},
     {"create_new_adapter": True}, {"pure_bf16": True}],
)  # fmt: skip
def test_what_checkpoints_hold_in_their_own_form_cannot_change(train_config, change):
    (key,) = change
    with pytest.raises(ConfigError, match=f"{key} cannot change: the checkpoints hold the adapter"):
        go_on(train_config(), train_config(**change))
    with pytest.raises(ConfigError, match=f"so that a run that goes on cannot change {key}: {key} "):
        go_on(train_config(), train_config(**change, allow_change=[key]))


def test_the_same_optimizer_in_another_kernel_may_be_allowed(train_config):
    with pytest.raises(ConfigError, match="--allow-change optim"):
        go_on(train_config(), train_config(optim="adamw_torch"))
    go_on(train_config(), train_config(optim="adamw_torch", allow_change=["optim"]))


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_new_tokens": 9}, {"top_p": 0.9}])
def test_how_answers_are_sampled_matters_where_they_are_trained_on(train_config, tmp_path, change):
    (key,) = change
    go_on(train_config(), train_config(**change))
    (tmp_path / "rewards.py").write_text("def score(completions):\n    return [0.0 for _ in completions]\n")
    grpo = {"stage": "grpo", "reward_functions": f"{tmp_path / 'rewards.py'}:score"}
    with pytest.raises(ConfigError, match=f"another configuration: {key} "):
        go_on(train_config(**grpo), train_config(**grpo, **change))


def test_a_default_of_chat_is_a_change_where_answers_are_sampled_to_train_on(train_config, tmp_path):
    (tmp_path / "rewards.py").write_text("def score(completions):\n    return [0.0 for _ in completions]\n")
    grpo = {"stage": "grpo", "reward_functions": f"{tmp_path / 'rewards.py'}:score"}
    with pytest.raises(ConfigError, match=r"temperature null -> 0\.95"):
        go_on(train_config(**grpo), train_config(**grpo, temperature=0.95))


def test_the_profiler_may_be_turned_on(train_config):
    go_on(train_config(), train_config(enable_torch_profiler=True, profiler_wait_steps=3))


def test_a_key_that_does_not_exist_cannot_be_allowed(train_config):
    with pytest.raises(
        ConfigError, match=r"'learing_rate' is no option of this run\n.*\n.*did you mean 'learning_rate'"
    ):
        train_config(allow_change=["learing_rate"])
    train_config(allow_change=["data", "learning_rate"])


def test_other_versions_are_said(capsys):
    say_other_versions({"packages": {"torch": "1", "peft": "2"}}, {"torch": "3", "peft": "2"})
    assert "versions have changed since this run began, so its last digits may too: torch 1 -> 3" in (
        capsys.readouterr().err
    )
    say_other_versions({"packages": {"torch": "3"}}, {"torch": "3"})
    say_other_versions(None, {"torch": "3"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config"])
def test_what_a_configuration_file_holds_counts_and_not_where_it_lies(train_config, tmp_path, key):
    """The file is changed, moved, written into the YAML, and gone."""
    file, moved = tmp_path / "a.json", tmp_path / "b.json"
    stages = [json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": True}}) for stage in (3, 2)]
    contents = (
        stages if key == "deepspeed" else ['{"reshard_after_forward": true}', '{"reshard_after_forward": false}']
    )
    file.write_text(contents[0])
    moved.write_text(contents[0])
    more = {} if key == "deepspeed" else {"fsdp": True}
    cfg = train_config(**more, **{key: str(file)})
    record = run_record(cfg, run_id="a", state="running", plan={}, data={})
    require_same_configuration(FOLDER, record, cfg)
    require_same_configuration(FOLDER, record, train_config(**more, **{key: str(moved)}))
    require_same_configuration(FOLDER, record, train_config(**more, **{key: json.loads(contents[0])}))
    file.write_text(contents[1])
    said = "zero_optimization.stage 3 -> 2" if key == "deepspeed" else "reshard_after_forward true -> false"
    with pytest.raises(ConfigError, match=rf"another configuration: {key}\.{said}\n") as caught:
        require_same_configuration(FOLDER, record, cfg)
    assert f"--allow-change {key}" in str(caught.value)
    require_same_configuration(FOLDER, record, train_config(**more, **{key: str(file), "allow_change": [key]}))
    inline = train_config(**more, **{key: json.loads(contents[0])})
    before = run_record(inline, run_id="a", state="running", plan={}, data={})
    require_same_configuration(FOLDER, before, train_config(**more, **{key: str(moved)}))
