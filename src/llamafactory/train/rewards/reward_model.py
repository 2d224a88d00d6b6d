"""A reward model in the same process: an adapter on the policy's own base, or a model of its own.

The sampled token ids are scored as they are, at each answer's last token; nothing is decoded. What this file never
does: train, or read pickled weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llamafactory.data.answer_batch import AnswerGroup, collate_answers
from llamafactory.data.types import IGNORE_INDEX, Example
from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.model.loader import load_classifier, load_model, load_model_config, load_tokenizer
from llamafactory.model.patches.peft_future_warning import without_future_warning
from llamafactory.model.reference import REWARD_ADAPTER, Reference, freeze
from llamafactory.model.valuehead import FILE, ModelWithValueHead, ValueHead, add_value_head, load_value_head
from llamafactory.train.answers import answer_scores
from llamafactory.train.experience import micro_batches
from llamafactory.train.rewards.answer import Answer, Reward

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from llamafactory.hparams.model import ModelConfig
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.rewards.options import RewardOptions

_ADAPTER, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "value_head.bin"
Opened = Callable[[], AbstractContextManager[ModelWithValueHead]]


def load_reward_model(
    cfg: RunConfig,
    options: RewardOptions,
    *,
    plan: ModelPlan,
    policy: Callable[[], nn.Module],
    accelerator: Accelerator,
    rows_at_once: int,
) -> Reward | None:
    """The reward model of types `lora` and `full`; None where there is none or a service is asked.

    Args:
        cfg: the resolved configuration.
        options: names the reward model.
        plan: dtype, attention and layout.
        policy: gives the language model that is trained; with type `lora` it gets a frozen adapter.
        accelerator: of the run.
        rows_at_once: answers of a pass where the plan gives no number of tokens.

    Raises:
        ConfigError: it is not there, has no value head, another vocabulary or another base.
    """
    name = options.reward_model
    if name is None or options.reward_model_type == "api":
        return None
    source = cfg.model.model_copy(update={"model_name_or_path": name, "adapter_name_or_path": ()})
    kinds = {"lora": _adapter_on, "full": _own_model}
    opened = kinds[options.reward_model_type](cfg, source, plan, policy, accelerator.device)
    pad_id = 0

    def score(answers: Sequence[Answer]) -> Sequence[float]:
        groups = [
            AnswerGroup(answers=tuple(_example(prompt, answer.completion_ids) for answer in part))
            for prompt, part in groupby(answers, key=lambda answer: list(answer.prompt_ids))
        ]
        sizes = [
            (0, [len(one) for one in group.answers]) if plan.layout == "padded" else _tree_sizes(group)
            for group in groups
        ]
        found = [np.zeros(len(group.answers)) for group in groups]
        with opened() as model, torch.no_grad(), accelerator.autocast():
            for pieces in micro_batches(sizes, plan, rows_at_once):
                pieces = sorted(pieces)
                parts = [AnswerGroup(answers=groups[number].answers[first:last]) for number, first, last in pieces]
                batch = collate_answers(parts, plan.layout, pad_id).to(accelerator.device)
                values = answer_scores(model, batch, plan).double().cpu().numpy()
                ends = np.cumsum([last - first for _, first, last in pieces])[:-1]
                for (number, first, last), own in zip(pieces, np.split(values, ends), strict=True):
                    found[number][first:last] = own
        return np.concatenate(found).tolist()

    return Reward(name="reward_model", score=score)


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return Example(input_ids=ids, labels=np.full(len(ids), IGNORE_INDEX, dtype=np.int32))


def _tree_sizes(group: AnswerGroup) -> tuple[int, list[int]]:
    """Tokens of the prompt, which is there once, and of each answer."""
    first = group.answers[0]
    shared = next((place for place in range(len(first)) if _differs(group, place)), len(first))
    return shared, [len(one) - shared for one in group.answers]


def _differs(group: AnswerGroup, place: int) -> bool:
    token = group.answers[0].input_ids[place]
    return any(len(one) <= place or one.input_ids[place] != token for one in group.answers)


def _adapter_on(
    cfg: RunConfig, source: ModelConfig, plan: ModelPlan, policy: Callable[[], nn.Module], device: Any
) -> Opened:
    """The policy with the reward adapter in place of its own."""
    name = str(source.model_name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        raise _problem(name, "there is no such folder", "the output_dir of a run with stage: rm and LoRA")
    if not (folder / _ADAPTER).is_file() or not (folder / _WEIGHTS).is_file():
        raise _problem(
            name, f"holds no adapter ({_ADAPTER} and {_WEIGHTS})", "the output_dir of a run with stage: rm and LoRA",
            fix="reward_model_type: full, if it is a whole model",
        )  # fmt: skip
    _require_head(folder)
    model: Any = policy()
    if not hasattr(model, "peft_config"):
        raise _problem(
            name, "reward_model_type lora puts the reward adapter on the base of the policy, and here that base is "
            "trained itself", "finetuning_type: lora",
            fix="export the reward model and set reward_model_type: full",
        )  # fmt: skip
    _require_same_vocabulary(cfg.model, source)
    was_training = model.training
    with without_future_warning():
        model.load_adapter(str(folder), adapter_name=REWARD_ADAPTER, is_trainable=False)
    model.train(was_training)
    base = model.peft_config[REWARD_ADAPTER].base_model_name_or_path
    if base and Path(base).name != Path(str(cfg.model.model_name_or_path)).name:
        log.warn(f"reward_model: {name} was trained on {base}, and is used on {cfg.model.model_name_or_path}")
    if cfg.model.adapter_name_or_path and cfg.train.do_train:
        log.note("reward_model: it scores on the base with what adapter_name_or_path merged into it")
    head = ValueHead(model.config.get_text_config().hidden_size)
    load_value_head(head, folder)
    head = head.requires_grad_(False).to(device)
    frozen = Reference(adapter=REWARD_ADAPTER)
    log.info(f"reward model: the adapter {folder} on the policy's own base")

    @contextmanager
    def opened() -> Iterator[ModelWithValueHead]:
        with frozen.of(policy()) as switched:
            yield ModelWithValueHead(switched, head)

    return opened


def _own_model(
    cfg: RunConfig, source: ModelConfig, plan: ModelPlan, policy: Callable[[], nn.Module], device: Any
) -> Opened:
    """A language model with `value_head.safetensors`, or a sequence classifier with one label."""
    name, folder = str(source.model_name_or_path), Path(str(source.model_name_or_path))
    if (folder / _ADAPTER).is_file():
        raise _problem(
            name, "is an adapter, not a whole model", "a model with a value head, or a sequence classifier",
            fix="reward_model_type: lora",
        )  # fmt: skip
    _require_same_vocabulary(cfg.model, source)
    architectures = load_model_config(source).architectures or []
    if (folder / FILE).is_file():
        inner: Any = load_model(source, dtype=plan.weight_dtype, attention=plan.attention)
        model = add_value_head(inner, source=folder, trainable=False)
    elif any(one.endswith("ForSequenceClassification") for one in architectures):
        inner = load_classifier(source, dtype=plan.weight_dtype, attention=plan.attention)
        if getattr(inner, "num_labels", 0) != 1 or not hasattr(inner, "score"):
            raise _problem(name, f"is a classifier of {inner.num_labels} labels", "a classifier with one label")
        if getattr(inner.score, "bias", None) is not None:
            raise _problem(name, "is a classifier with a bias", "a classifier whose score has no bias")
        head = ValueHead(inner.config.get_text_config().hidden_size)
        with torch.no_grad():
            head.summary.weight.copy_(inner.score.weight)
        model = ModelWithValueHead(inner, head)
    else:
        _require_head(folder)
        raise AssertionError("unreachable")
    model = freeze(model).to(device)
    log.info(f"reward model: {name}, a model of its own")

    @contextmanager
    def opened() -> Iterator[ModelWithValueHead]:
        yield model  # type: ignore[misc]

    return opened


def _require_head(folder: Path) -> None:
    if (folder / FILE).is_file():
        return
    if (folder / _PICKLED).is_file():
        raise _problem(
            str(folder), f"its value head is pickled ({_PICKLED}), and such files are never loaded", FILE,
            fix=f"write its two tensors to {FILE} with safetensors, in a place where running their code does no harm",
        )  # fmt: skip
    raise _problem(str(folder), "has no value head", f"{FILE}, as stage: rm writes it, or a sequence classifier")


def _require_same_vocabulary(policy: ModelConfig, reward: ModelConfig) -> None:
    if not (Path(str(reward.model_name_or_path)) / "tokenizer.json").is_file() and _is_adapter(reward):
        return  # an adapter without a tokenizer has that of its base
    ours, theirs = (load_tokenizer(source).get_vocab() for source in (policy, reward))
    if ours == theirs:
        return
    others = sum(theirs.get(token) != number for token, number in ours.items())
    raise _problem(
        str(reward.model_name_or_path),
        f"has another vocabulary: {others:,} of the policy's {len(ours):,} tokens have another id or none there",
        "a reward model with the tokenizer of the policy",
        fix="serve it, and set reward_model_type: api, which passes texts",
    )


def _is_adapter(source: ModelConfig) -> bool:
    return (Path(str(source.model_name_or_path)) / _ADAPTER).is_file()


def _problem(name: str, message: str, allowed: str, fix: str | None = None) -> ConfigError:
    return ConfigError(Problem(key="reward_model", given=name, message=message, allowed=allowed, fix=fix))
