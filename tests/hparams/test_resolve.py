"""What becomes of good configurations: values, origins, notes, secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamafactory.compose import load_config, resolve_config
from llamafactory.extras.secrets import MASK

TOKEN = "hf_" + "a1B2" * 8


def origins(resolution: Any) -> dict[str, str]:
    return {value.key: value.origin for value in resolution.values}


def test_origins_say_where_values_came_from(workspace: Path) -> None:
    text = "# a comment\nmodel_name_or_path: model\ndataset: rows\ndo_train: true\noutput_dir: out\nseed: 1\n"
    (workspace / "c.yaml").write_text(text, encoding="utf-8")
    found = origins(resolve_config(["c.yaml", "seed=2", "--bf16"]))
    assert found["model_name_or_path"] == "c.yaml:2"
    assert found["output_dir"] == "c.yaml:5"
    assert found["seed"] == found["bf16"] == "command line"
    assert found["cutoff_len"] == "default"


def test_the_command_line_wins_and_its_last_word_too(workspace: Path, good: dict[str, Any]) -> None:
    (workspace / "c.json").write_text(json.dumps(good | {"seed": 1}), encoding="utf-8")
    assert load_config(["c.json", "seed=2", "--seed", "3"]).train.seed == 3


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("save_strategy: no", "save_strategy", "no"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: yes", "run_name", "yes"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),
        ("run_name: '  a  '", "run_name", "  a  "),
        ("model_revision: 12e4567", "model_revision", "12e4567"),
        ("run_name: null", "run_name", None),
        ("run_name:", "run_name", None),
        ("max_samples: 1e3", "max_samples", 1000),
        ("packing: yes", "packing", True),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("report_to: none", "report_to", []),
        ("eval_dataset: null", "eval_dataset", []),
        ("lora_target: q_proj, v_proj", "lora_target", ["q_proj", "v_proj"]),
        ("lora_target: [q_proj, v_proj]", "lora_target", ["q_proj", "v_proj"]),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("data_variables: {name: Ada, year: 1}", "data_variables", {"name": "Ada", "year": "1"}),
        ("warmup_steps: 0.1", "warmup_steps", 0.1),
        ("default_system: |-\n  two\n  lines", "default_system", "two\nlines"),
    ],
)
def test_yaml_values_mean_what_people_mean(text: str, key: str, value: Any, workspace: Path) -> None:
    good = "model_name_or_path: model\ndataset: rows\ndo_train: true\noutput_dir: out\n"
    (workspace / "c.yaml").write_text(good + text + "\n", encoding="utf-8")
    assert load_config(["c.yaml"]).flat()[key] == value


def test_yaml_merge_keys_and_aliases(workspace: Path) -> None:
    text = "lr_scheduler_kwargs: &a {num_cycles: 2, x: 1}\ndata_variables: {<<: *a, x: 3}\nmodel_name_or_path: model\n"
    (workspace / "c.yaml").write_text(text, encoding="utf-8")
    assert load_config(["c.yaml"], command="chat").data.data_variables == {"num_cycles": "2", "x": "3"}


def test_a_dotted_word_sets_one_entry_of_a_mapping(workspace: Path, good: dict[str, Any]) -> None:
    (workspace / "c.json").write_text(json.dumps(good | {"lr_scheduler_kwargs": {"a": 1}}), encoding="utf-8")
    config = load_config(["c.json", "lr_scheduler_kwargs.b=2", "data_variables.name=Ada Lovelace"])
    assert config.train.lr_scheduler_kwargs == {"a": 1, "b": "2"}
    assert config.data.data_variables == {"name": "Ada Lovelace"}


def test_free_mappings_may_hold_any_key(good: dict[str, Any]) -> None:
    kwargs = {"anything": {"deeper": [1, None, "x"]}}
    assert load_config(good | {"lr_scheduler_kwargs": kwargs}).train.lr_scheduler_kwargs == kwargs


def test_unknown_keys_are_listed_when_they_are_allowed(good: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    resolution = resolve_config(good | {"sed": 1, "foo": 2})
    assert resolution.config is not None
    assert resolution.notes == ("unknown keys are ignored because ALLOW_EXTRA_ARGS is on: sed, foo",)


def test_keys_that_do_nothing_give_one_note(good: dict[str, Any]) -> None:
    given = {"finetuning_type": "full", "lora_rank": 4, "export_dir": "x", "eval_steps": 5, "pref_beta": 0.2}
    (note,) = resolve_config(good | given).notes
    assert note.startswith("no effect in this run:")
    for part in ("lora_rank: only with finetuning_type: lora", "export_dir: only read by", "eval_steps", "pref_beta"):
        assert part in note


def test_a_rule_that_quotes_a_value_shows_no_secret(good: dict[str, Any]) -> None:
    secret = "hf_" + "a1B2" * 8
    resolution = resolve_config(good | {"model_name_or_path": f"https://me:{secret}@hub/m"})
    (problem,) = resolution.problems
    assert secret not in str(problem)
    assert problem.message == "no such folder: https://********@hub/m"


def test_the_note_names_every_stage_that_reads_a_key(good: dict[str, Any]) -> None:
    (note,) = resolve_config(good | {"ref_model_quantization_bit": 4, "pref_loss": "orpo"}).notes
    assert "ref_model_quantization_bit: only with stage: dpo or kto" in note
    assert "pref_loss: only with stage: dpo" in note


def test_a_reward_model_has_no_logits_to_cut_into_chunks(good: dict[str, Any]) -> None:
    (note,) = resolve_config(good | {"stage": "rm", "loss_chunk_size": 64}).notes
    assert "loss_chunk_size: a reward model makes no logits" in note
    assert resolve_config(good | {"loss_chunk_size": 64}).notes == ()


def test_defaults_written_out_give_no_note(good: dict[str, Any]) -> None:
    assert resolve_config(good | {"export_size": 5, "temperature": 0.95, "eval_steps": None}).notes == ()


def test_chat_says_which_keys_it_does_not_read() -> None:
    resolution = resolve_config(
        {"model_name_or_path": "model", "template": "chatml", "output_dir": "x"}, command="chat"
    )
    assert resolution.problems == ()
    (note,) = resolution.notes
    assert "output_dir: only read by the command train" in note


def test_home_folder(good: dict[str, Any], monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    monkeypatch.setenv("HOME", str(workspace))
    monkeypatch.setenv("USERPROFILE", str(workspace))
    config = load_config(good | {"model_name_or_path": "~/model", "output_dir": "~/out"})
    assert Path(config.model.model_name_or_path or "") == workspace / "model"


def test_a_config_cannot_be_changed(good: dict[str, Any]) -> None:
    config = load_config(good)
    with pytest.raises(AttributeError):
        config.command = "chat"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 1


def test_flat_is_json_and_reads_back(good: dict[str, Any]) -> None:
    flat = load_config(good).flat()
    assert flat["dataset"] == ["rows"]
    assert load_config(json.loads(json.dumps(flat))).flat() == flat


def test_secrets_are_masked_everywhere(
    good: dict[str, Any], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llamafactory.cli import main

    given = good | {"hf_hub_token": TOKEN, "dataset": "rows,x", "hf_hub_tken": TOKEN, "swanlab_api_key": TOKEN}
    given |= {"cache_dir": "https://me:pass@host/x", "run_name": f"a {TOKEN}"}
    (workspace / "c.json").write_text(json.dumps(given), encoding="utf-8")
    for words in (["check", "c.json"], ["check", "c.json", "--json"], ["train", "c.json"], ["train", f"x{TOKEN}"]):
        assert main(words) == 2
    del given["hf_hub_tken"], given["swanlab_api_key"]
    config = load_config(given | {"dataset": "rows"})
    shown = "".join(capsys.readouterr()) + repr(config) + json.dumps(config.flat(mask_secrets=True))
    assert "me:pass" not in shown.replace(repr(config), "")
    assert TOKEN not in shown.replace(repr(config), "")
    assert f"hf_hub_token='{TOKEN}'" not in repr(config)
    assert config.flat(mask_secrets=True)["hf_hub_token"] == MASK
    assert config.flat()["hf_hub_token"] == TOKEN


def test_a_token_on_the_command_line_gives_a_warning(good: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{key}={str(value).lower() if value is True else value}" for key, value in good.items()]
    load_config([*words, f"hf_hub_token={TOKEN}"])
    message = capsys.readouterr().err
    assert message.startswith("warning: hf_hub_token on the command line can be read by every user")
    assert TOKEN not in message


@pytest.mark.parametrize(
    ("value", "is_noted"), [("all", True), ("non_padding", False), (True, False), (False, False), ("no", False)]
)
def test_counting_padding_is_said_to_have_no_effect(good: dict[str, Any], value: Any, is_noted: bool) -> None:
    found = resolve_config(good | {"include_num_input_tokens_seen": value})
    assert any("padding is never counted" in note for note in found.notes) is is_noted
