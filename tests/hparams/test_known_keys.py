"""Every key of LLaMA Factory and of transformers' training arguments is known."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from llamafactory.compose import all_sections, resolve_config
from llamafactory.hparams.known_keys import asks_for_nothing, load_known_keys
from llamafactory.hparams.train import LrScheduler, TrainConfig

COMPAT_KEYS = (Path(__file__).parent / "compat_keys.txt").read_text(encoding="utf-8").split()


def field_names() -> set[str]:
    return {key for section in all_sections().values() for key in section.model_fields}


def test_the_list_is_whole() -> None:
    assert len(COMPAT_KEYS) == len(set(COMPAT_KEYS)) == 443


def test_every_key_is_known() -> None:
    assert set(COMPAT_KEYS) - field_names() - load_known_keys().names() == set()


def test_a_key_of_the_list_is_never_called_unknown(good: dict[str, Any]) -> None:
    resolution = resolve_config(good | dict.fromkeys(COMPAT_KEYS, "x"))
    assert [problem.key for problem in resolution.problems if problem.message == "unknown key"] == []


def test_every_training_argument_of_transformers_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    names = {field.name for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
    assert names - field_names() - load_known_keys().names() == set()


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = TrainConfig()
    different = {
        field.name
        for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)
        if field.name in TrainConfig.model_fields and getattr(ours, field.name) != field.default
    }
    assert different == {"report_to", "include_num_input_tokens_seen"}  # () and False mean none and "no"


def test_schedules_are_those_of_transformers() -> None:
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    later = {value for key, value in load_known_keys().not_implemented_values if key == "lr_scheduler_type"}
    assert set(typing.get_args(LrScheduler)) | later == {kind.value for kind in trainer_utils.SchedulerType}


def test_optimizers_of_transformers_are_known() -> None:
    arguments = pytest.importorskip("transformers.training_args")
    later = {value for key, value in load_known_keys().not_implemented_values if key == "optim"}
    choices = typing.get_args(TrainConfig.model_fields["optim"].annotation)
    assert {kind.value for kind in arguments.OptimizerNames} - later - set(choices) == set()


def test_no_key_is_listed_twice() -> None:
    known = load_known_keys()
    kinds = (set(known.aliases), set(known.no_effect), set(known.not_implemented))
    assert sum(map(len, kinds)) == len(known.names())


def test_aliases_lead_to_known_keys() -> None:
    known = load_known_keys()
    assert {alias.to for alias in known.aliases.values()} <= field_names() | known.names()


def test_defaults_of_keys_of_later_versions_are_silent(good: dict[str, Any]) -> None:
    for place in (0, -1):
        defaults = {key: entry.defaults[place] for key, entry in load_known_keys().not_implemented.items()}
        resolution = resolve_config(good | defaults)
        assert resolution.problems == ()
        assert resolution.notes == ()


def test_values_that_ask_for_nothing() -> None:
    assert asks_for_nothing("0.10", (0.1,))
    assert asks_for_nothing("False", (False,))
    assert asks_for_nothing(None, (4,))
    assert not asks_for_nothing(1, (True,))
    assert not asks_for_nothing(0, ("",))


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"evaluation_strategy": "epoch", "val_size": 0.1}, "eval_strategy", "epoch"),
        ({"gradient_checkpointing": True}, "disable_gradient_checkpointing", False),
        ({"gradient_checkpointing": "false"}, "disable_gradient_checkpointing", True),
        ({"no_cuda": True}, "use_cpu", True),
        ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
        ({"adafactor": True}, "optim", "adafactor"),
        ({"adafactor": False}, "optim", "adamw_torch_fused"),
        ({"micro_batch_size": 2}, "per_device_train_batch_size", 2),
        ({"train_sampling_strategy": "sequential"}, "disable_shuffling", True),
    ],
)
def test_other_names_are_understood_with_a_note(
    given: dict[str, Any], key: str, value: Any, good: dict[str, Any]
) -> None:
    resolution = resolve_config(good | given)
    assert resolution.problems == ()
    assert resolution.require().flat()[key] == value
    old = next(iter(given))
    if value != "adamw_torch_fused":
        assert [note for note in resolution.notes if old in note]


def test_keys_without_effect_give_one_note(good: dict[str, Any]) -> None:
    given = {"preprocessing_num_workers": 16, "preprocessing_batch_size": 5, "dataloader_num_workers": 4}
    (note,) = resolve_config(good | given).notes
    assert note.startswith("accepted, without effect:")
    assert all(key in note for key in given)


def test_environment_switches_of_later_versions_are_refused(
    good: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_RAY", "1")
    (problem,) = resolve_config(good).problems
    assert (problem.key, problem.origin) == ("USE_RAY", "environment")
    monkeypatch.setenv("USE_RAY", "false")
    assert resolve_config(good).problems == ()
