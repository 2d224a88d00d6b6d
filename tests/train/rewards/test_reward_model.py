"""A reward model in the same process scores as plain transformers does, and leaves the policy as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from llamafactory.extras.errors import ConfigError, LlamaFactoryError
from llamafactory.model.adapters import lora
from llamafactory.model.loader import load_classifier, load_model, load_tokenizer
from llamafactory.model.valuehead import FILE, ValueHead, as_classifier, save_value_head
from llamafactory.train.rewards.answer import Answer
from llamafactory.train.rewards.reward_model import load_reward_model
from llamafactory.train.tuner import run_exp

PROMPTS = [[5, 9, 31, 7], [5, 9, 31, 7], [8, 2], [8, 2], [4] * 30]
ANSWERS = [[44, 17], [44, 17, 90, 3, 12], [6], [6, 6, 1], [11] * 9]


def move(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture
def made(train_config: Callable[..., Any], tmp_path: Path) -> dict[str, Path]:
    """The same reward model as an adapter, as a whole model with a value head, and as a classifier."""
    cfg = train_config().model
    tokenizer = load_tokenizer(cfg)
    model: Any = lora.apply(
        load_model(cfg, dtype="float32", attention="eager"), lora.Options(lora_rank=4), adapters=(), trainable=True
    )
    move(model, 3)
    head = ValueHead(model.config.hidden_size)
    folders = {name: tmp_path / name for name in ("adapter", "whole", "classifier")}
    model.save_pretrained(folders["adapter"])
    merged = model.merge_and_unload()
    merged.save_pretrained(folders["whole"])
    for name in ("adapter", "whole"):
        save_value_head({f"v_head.{key}": value for key, value in head.state_dict().items()}, folders[name])
    as_classifier(merged, head, tokenizer)[0].save_pretrained(folders["classifier"])
    for folder in folders.values():
        tokenizer.save_pretrained(folder)
    return folders


def test_a_classifier_with_a_bias_is_refused(made: dict[str, Path], train_config: Callable[..., Any]) -> None:
    file = made["classifier"] / "model.safetensors"
    save_file(load_file(file) | {"score.bias": torch.ones(1)}, file, metadata={"format": "pt"})
    cfg = train_config().model.model_copy(update={"model_name_or_path": str(made["classifier"])})
    with pytest.raises(LlamaFactoryError, match=r"score\.bias"):
        load_classifier(cfg, dtype="float32", attention="eager")


@pytest.fixture
def expected(made: dict[str, Path]) -> list[float]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(made["classifier"])
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([[*prompt, *answer]])).last_hidden_state
            found.append(float(model.score(states[0, -1])))
    return found


def answers() -> list[Answer]:
    return [
        Answer(prompt="", completion="", answer=None, prompt_ids=prompt, completion_ids=ids, is_stopped=True, row=0)
        for prompt, ids in zip(PROMPTS, ANSWERS, strict=True)
    ]


def load(cfg: Any, layout: str = "flat", policy: Any = None) -> Any:
    plan: Any = SimpleNamespace(
        layout=layout, micro_batch_tokens=24, weight_dtype="float32", fused_blocks=layout == "flat",
        attention="segments" if layout == "flat" else "eager",
    )  # fmt: skip
    if policy is None:
        policy = policy_of(cfg, plan.attention)
    return load_reward_model(
        cfg, cfg.stage_options, plan=plan, policy=lambda: policy, accelerator=Accelerator(cpu=True), rows_at_once=2
    )


def policy_of(cfg: Any, attention: str = "segments") -> Any:
    base = load_model(cfg.model, dtype="float32", attention=attention)
    policy = lora.apply(base, lora.Options(lora_rank=2), adapters=(), trainable=True)
    move(policy, 8)
    return policy.train()


@pytest.mark.parametrize(
    ("name", "kind"), [("adapter", "lora"), ("whole", "full"), ("classifier", "full")], ids=lambda value: value
)
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_scores_are_those_of_plain_transformers(
    train_config: Callable[..., Any], made: dict[str, Path], expected: list[float], name: str, kind: str, layout: str
) -> None:
    cfg = train_config(stage="ppo", reward_model=str(made[name]), reward_model_type=kind)
    policy = policy_of(cfg, "segments" if layout == "flat" else "eager")
    before = {key: (p.requires_grad, p.detach().clone()) for key, p in policy.named_parameters()}
    reward = load(cfg, layout, policy)
    assert reward.score(answers()) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == len(expected)
    after = dict(policy.named_parameters())
    assert all(after[key].requires_grad == flag and after[key].equal(value) for key, (flag, value) in before.items())
    assert policy.training
    assert policy.active_adapter == "default"
    assert sum(p.requires_grad for p in policy.parameters()) == sum(flag for flag, _ in before.values())


def test_a_run_is_rewarded_by_the_model_and_does_not_save_it(
    train_config: Callable[..., Any], made: dict[str, Path], tmp_path: Path
) -> None:
    run_exp(
        train_config(
            stage="ppo", reward_model=str(made["adapter"]), reward_functions=["length:2"], reward_weights=[0.5, 2.0],
            max_steps=1, ppo_epochs=1, max_new_tokens=3,
        )
    )  # fmt: skip
    (row,) = (json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines())
    assert row["reward"] == pytest.approx(0.5 * row["rewards/length:2"] + 2.0 * row["rewards/reward_model"], abs=1e-6)
    saved = [path for path in (tmp_path / "out").rglob("*") if path.name == "reward"]
    assert not saved
    assert (tmp_path / "out" / "checkpoint-1" / FILE).is_file()


@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        (lambda made: None, {"reward_model": "no/where"}, "there is no such folder"),
        (lambda made: (made["adapter"] / FILE).unlink(), {}, "has no value head"),
        (lambda made: (made["adapter"] / FILE).rename(made["adapter"] / "value_head.bin"), {}, "never loaded"),
        (lambda made: None, {"reward_model_type": "full"}, "is an adapter, not a whole model"),
        (lambda made: None, {"of": "whole"}, "holds no adapter"),
        (lambda made: (made["whole"] / FILE).unlink(), {"of": "whole", "reward_model_type": "full"}, "no value head"),
        (lambda made: None, {"finetuning_type": "full"}, "that base is trained itself"),
    ],
    ids=["folder", "head", "pickle", "adapter as full", "full as adapter", "full without head", "no adapter"],
)  # fmt: skip
def test_what_is_wrong_is_said(
    train_config: Callable[..., Any], made: dict[str, Path], change: Any, keys: dict[str, Any], words: str
) -> None:
    change(made)
    name = str(made[keys.pop("of", "adapter")])
    cfg = train_config(**{"stage": "ppo", "reward_model": name, **keys})
    policy = load_model(cfg.model, dtype="float32", attention="eager") if "finetuning_type" in keys else None
    with pytest.raises(ConfigError, match=words):
        load(cfg, policy=policy)


def test_another_vocabulary_or_another_width_is_refused(
    train_config: Callable[..., Any], made: dict[str, Path]
) -> None:
    cfg = train_config(stage="ppo", reward_model=str(made["adapter"]))
    path = made["adapter"] / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ConfigError, match="2 of the policy's"):
        load(cfg)
    path.unlink()
    (made["adapter"] / "tokenizer_config.json").unlink()
    wide = ValueHead(8)
    save_value_head({f"v_head.{key}": value for key, value in wide.state_dict().items()}, made["adapter"])
    with pytest.raises(LlamaFactoryError, match="for a model of width 8"):
        load(cfg)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"reward_model": "http://localhost:1/score"}, "a URL is a service"),
        ({"reward_model": "saves/rm", "reward_model_type": "api"}, "a service has a URL"),
    ],
)
def test_type_and_address_must_fit(train_config: Callable[..., Any], keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train_config(stage="ppo", **keys)
