"""Writes a model that stands alone: adapters merged in fp32, cast once, sharded; then proves it is the same.

The proof compares logits on held prompts: the adapter model in memory against the exported folder, loaded anew from
disk. A gap over the limit is an error, and the folder is left under a name that says so.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llamafactory.data.modelfile import MODELFILE_NAME
from llamafactory.data.saved_template import CHAT_TEMPLATE_NAME, chat_template_to_save, modelfile_to_save
from llamafactory.data.template_choice import end_token
from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem
from llamafactory.extras.files import give_usual_modes, write_json
from llamafactory.extras.hardware import read_hardware
from llamafactory.extras.network import go_offline
from llamafactory.model.layout import stock_attention
from llamafactory.model.loader import adapter_folders, load_model, load_model_config, load_tokenizer
from llamafactory.model.method import apply_method
from llamafactory.model.valuehead import FILE as VALUE_HEAD_FILE
from llamafactory.model.valuehead import add_value_head, as_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llamafactory.hparams.data import DataConfig
    from llamafactory.hparams.model import ModelConfig
    from llamafactory.hparams.run_config import RunConfig

HELD_PROMPTS = (
    "The capital of France is",
    "Who are you, and who made you?",
    "def fibonacci(n):\n    ",
    "Translate to German: Good morning, how are you?",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\nI am writing to",
    "人工智能是",
    "List three fruits:\n1.",
)
MAX_GAP = {"float32": 1e-3, "bfloat16": 1.0, "float16": 0.25}
"""Largest accepted difference of a logit, by dtype of the export: rounding, not another model."""
REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportProof:
    """How far the exported model is from the trained one, over all positions of the held prompts.

    Attributes:
        max_gap: largest absolute difference of a logit.
        mean_gap: mean absolute difference.
        adapter_effect: largest absolute difference between base and adapter model; 0 means that the adapter does
            nothing. None where there is no adapter.
        top1_agreement: share of positions at which both name the same most likely token.
        limit: largest accepted `max_gap`.
    """

    max_gap: float
    mean_gap: float
    adapter_effect: float | None
    top1_agreement: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the gap is within the limit and the adapter, if any, does something."""
        return self.max_gap <= self.limit and self.adapter_effect != 0.0

    def line(self) -> str:
        """One line for people."""
        effect = "" if self.adapter_effect is None else f", effect of the adapter {self.adapter_effect:.3g}"
        return (
            f"max logit gap {self.max_gap:.3g} (limit {self.limit:g}), mean {self.mean_gap:.3g}, same top token at "
            f"{self.top1_agreement:.1%} of positions{effect}"
        )


def export_and_verify(cfg: RunConfig) -> ExportProof:
    """Merges, casts, writes and verifies.

    Raises:
        ConfigError: `export_dir` holds something already.
        LlamaFactoryError: the exported model is not the trained one; the folder is renamed to `<export_dir>-rejected`.
    """
    if cfg.model.offline:
        go_offline()
    target = Path(cfg.export.export_dir or "")
    _refuse_occupied(target)
    tokenizer = load_tokenizer(cfg.model, eos_token=end_token(cfg.data.template))
    prompts = _held_prompts(tokenizer)
    model, before, base = _merged(cfg, prompts)
    head = _value_head_folder(cfg.model)
    if head is not None:
        model, tokenizer, before, base = _classifier(model, head, tokenizer, prompts)
    dtype = _export_dtype(cfg.model, model)
    staging = target.with_name(f".{target.name}.staging-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    log.info(f"writing {dtype} weights in files of at most {cfg.export.export_size} GB")
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(str(staging), max_shard_size=f"{cfg.export.export_size}GB")
    _complete_folder(staging, model, tokenizer, cfg.data)
    del model
    limit = cfg.export.export_max_logit_gap
    kind = "AutoModelForCausalLM" if head is None else "AutoModelForSequenceClassification"
    limit = MAX_GAP[dtype] if limit is None else limit
    proof = _prove(cfg.model, staging, prompts, before, base, limit, kind=kind)
    write_json(
        staging / "export_proof.json",
        {**{name: getattr(proof, name) for name in ExportProof.__slots__}, "dtype": dtype, "passed": proof.passed,
         "base_model": cfg.model.model_name_or_path, "adapters": list(cfg.model.adapter_name_or_path)},
    )  # fmt: skip
    if not proof.passed:
        rejected = _free_name(target.with_name(f"{target.name}-{REJECTED}"))
        staging.rename(rejected)
        raise LlamaFactoryError(
            f"the exported model is not the trained one: {proof.line()}. It was left in {rejected}. Export with "
            "infer_dtype: float32, or raise export_max_logit_gap if you accept the rounding."
        )
    if target.exists():
        target.rmdir()
    staging.rename(target)
    log.info(f"exported to {target}: {proof.line()}")
    return proof


def run(cfg: RunConfig) -> int:
    """Runs the command.

    Returns:
        Exit code 0; every failure is an error.
    """
    export_and_verify(cfg)
    return 0


def _refuse_occupied(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            Problem(
                key="export_dir",
                given=str(target),
                message="is not empty",
                fix="choose another folder, or remove this one",
            )
        )
    target.parent.mkdir(parents=True, exist_ok=True)


def _free_name(path: Path) -> Path:
    """`path`, or with the first number behind it that no file has."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def _held_prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in HELD_PROMPTS]


def _merged(
    cfg: RunConfig, prompts: Sequence[Sequence[int]]
) -> tuple[Any, list[torch.Tensor], list[torch.Tensor] | None]:
    """The merged fp32 model, the adapter model's logits, and the base model's where there is an adapter."""
    device = "cpu" if cfg.export.export_device == "cpu" else read_hardware(use_cpu=cfg.train.use_cpu).device
    attention = stock_attention(load_model_config(cfg.model))
    model = load_model(cfg.model, dtype="float32", attention=attention, device=device).eval()
    adapters = adapter_folders(cfg.model)
    base = logits_of(model, prompts) if adapters else None
    policy: Any = apply_method(
        model, cfg.train.finetuning_type, cfg.adapter_options, adapters=adapters, trainable=False
    ).eval()
    before = logits_of(policy, prompts)
    merged = policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy
    return merged, before, base


def _value_head_folder(cfg: ModelConfig) -> Path | None:
    """Where the value head of a reward model lies, or None for a model without one."""
    folders = adapter_folders(cfg)
    source = folders[-1] if folders else Path(cfg.model_name_or_path or "")
    return source if (source / VALUE_HEAD_FILE).is_file() else None


def _classifier(
    model: Any, head: Path, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]]
) -> tuple[Any, PreTrainedTokenizerFast, list[torch.Tensor], None]:
    """A reward model as a standard classifier, its tokenizer, and the scores of the prompts before the change."""
    scored = add_value_head(model, source=head, trainable=False).eval()
    before = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            before.append(scored.v_head(model.base_model(input_ids=ids).last_hidden_state[0, -1:]).float().cpu())
    made, pad = as_classifier(model, scored.v_head, tokenizer)
    ours = copy.deepcopy(tokenizer)
    ours.pad_token = pad
    log.info(f"a reward model: written as {type(made).__name__} with one label; padding token {pad}")
    return made.to(model.device), ours, before, None


def _export_dtype(cfg: ModelConfig, model: Any) -> str:
    """What was asked for, else the dtype that the base model was published in."""
    if cfg.infer_dtype != "auto":
        return cfg.infer_dtype
    stored = str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    published = _published_dtype(cfg) or stored
    return published if published in MAX_GAP else "float32"


def _published_dtype(cfg: ModelConfig) -> str | None:
    dtype = load_model_config(cfg).dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _complete_folder(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> None:
    """Adds what a server needs besides weights: tokenizer with its chat template, generation config."""
    tokenizer.save_pretrained(str(folder))
    if (chat_template := chat_template_to_save(data, tokenizer)) is not None:
        (folder / CHAT_TEMPLATE_NAME).write_text(chat_template, encoding="utf-8")
    elif not tokenizer.chat_template:
        log.warn("the tokenizer has no chat template, so a server must be told which one this model was trained with")
    modelfile = modelfile_to_save(data, tokenizer) if hasattr(model, "lm_head") else None
    if modelfile is not None:
        (folder / MODELFILE_NAME).write_text(modelfile, encoding="utf-8")
    if (settings := getattr(model, "generation_config", None)) is not None:
        ends = [] if settings.eos_token_id is None else settings.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends)
        settings.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
        settings.save_pretrained(str(folder))
    give_usual_modes(folder)


def _prove(
    cfg: ModelConfig,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    before: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor] | None,
    limit: float,
    *,
    kind: str,
) -> ExportProof:
    """Compares the folder, loaded anew and computed in fp32, so that the gap is that of its weights alone.

    `kind` is the class of transformers that loads it.
    """
    import transformers

    remote = cfg.trust_remote_code
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote).eval()
    after = logits_of(model, prompts)
    gaps = [(a - b).abs() for a, b in zip(after, before, strict=True)]
    count = sum(gap.numel() for gap in gaps)
    positions = sum(len(logits) for logits in before)
    agreed = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(after, before, strict=True))
    largest = max(float(gap.max()) for gap in gaps)
    return ExportProof(
        max_gap=largest if math.isfinite(largest) else math.inf,
        mean_gap=sum(float(gap.sum()) for gap in gaps) / count,
        adapter_effect=None
        if base is None
        else max(float((a - b).abs().max()) for a, b in zip(before, base, strict=True)),
        top1_agreement=agreed / positions,
        limit=limit,
    )


@torch.inference_mode()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float32 logits `[time, vocab]` of each prompt, on the CPU."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        found.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return found
