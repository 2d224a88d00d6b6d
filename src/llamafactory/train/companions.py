"""The parts of a stage's model besides the policy: its value head, and the reference it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.model.loader import adapter_folders, folder_with, load_model, load_tokenizer
from llamafactory.model.method import load_method
from llamafactory.model.patches.bitsandbytes_cpu import as_asked_for
from llamafactory.model.patches.peft_future_warning import without_future_warning
from llamafactory.model.quantised import quantisation
from llamafactory.model.reference import ADAPTER, Reference, freeze, without_dropout
from llamafactory.model.valuehead import FILE as VALUE_HEAD
from llamafactory.model.valuehead import ModelWithValueHead, add_value_head
from llamafactory.train.stage import load_stage

if TYPE_CHECKING:
    from llamafactory.hparams.model import ModelConfig
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan


def with_stage_parts(cfg: RunConfig, policy: nn.Module, *, resume_from: Path | None) -> nn.Module:
    """The policy as its stage wants it: with a value head, without dropout where its numbers are compared.

    Args:
        cfg: the resolved configuration.
        policy: the model, with its adapter.
        resume_from: checkpoint folder, or None.
    """
    stage = load_stage(cfg.train.stage)
    if stage.needs_reference(cfg.stage_options) or stage.rollout is not None:
        without_dropout(policy)
    if not stage.has_value_head:
        return policy
    folders = adapter_folders(cfg.model)
    source = resume_from or (folders[-1] if folders else folder_with(cfg.model, VALUE_HEAD))
    return add_value_head(policy, source=source, trainable=cfg.train.do_train)


def language_model(policy: nn.Module) -> nn.Module:
    """The policy without its value head."""
    return policy.pretrained_model if isinstance(policy, ModelWithValueHead) else policy


def load_reference(cfg: RunConfig, plan: ModelPlan, policy: Any, *, device: Any) -> Reference | None:
    """The reference that the stage needs, or None where it needs none.

    It is `ref_model` where that is set; else the model as it was before training: the policy without its adapter, a
    frozen copy of the adapter that training continues, or a second copy of the weights.

    Args:
        cfg: the resolved configuration.
        plan: dtype and attention.
        policy: the model that is trained; it may get a second, frozen adapter.
        device: where a model of its own goes.

    Raises:
        ConfigError: `ref_model` has another vocabulary, or nothing is left to compare with.
    """
    options: Any = cfg.stage_options
    if not load_stage(cfg.train.stage).needs_reference(options):
        return None
    if options.ref_model is not None:
        bits = getattr(options, "ref_model_quantization_bit", None)
        if bits is not None:
            return _quantised_model(cfg, plan, bits, device)
        return _own_model(cfg, plan, options.ref_model, options.ref_model_adapters, device)
    method = load_method(cfg.train.finetuning_type)
    if not method.saves_adapter or not hasattr(policy, "peft_config"):
        if not cfg.train.do_train:
            raise ConfigError(
                Problem(key="ref_model", message="an evaluation without training has no model to compare with",
                        fix="set ref_model to the model that training started from")
            )  # fmt: skip
        log.info("reference: a second copy of the model's weights")
        return Reference(
            model=freeze(load_model(cfg.model, dtype=plan.weight_dtype, attention=plan.attention)).to(device)
        )
    folders = adapter_folders(cfg.model)
    merged = method.merged_before(cfg.adapter_options, folders)
    if not cfg.train.do_train or len(merged) == len(folders):
        log.info("reference: the model without its adapter")
        return Reference()
    with without_future_warning():
        policy.load_adapter(str(folders[-1]), adapter_name=ADAPTER, is_trainable=False)
    log.info(f"reference: a frozen copy of the adapter {folders[-1]}")
    return Reference(adapter=ADAPTER)


def _own_model(cfg: RunConfig, plan: ModelPlan, name: str, adapters: tuple[str, ...], device: Any) -> Reference:
    source = cfg.model.model_copy(update={"model_name_or_path": name, "adapter_name_or_path": adapters})
    _require_same_vocabulary(cfg.model, source)
    model: Any = load_model(source, dtype=plan.weight_dtype, attention=plan.attention)
    from peft import PeftModel

    with without_future_warning():
        for folder in adapter_folders(source):
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    log.info(f"reference: {name}" + _with(adapters))
    return Reference(model=freeze(model).to(device))


def _quantised_model(cfg: RunConfig, plan: ModelPlan, bits: int, device: Any) -> Reference:
    """`ref_model` in few bits, quantised on load; its adapter stays beside it, as merging would round it away."""
    options: Any = cfg.stage_options
    source = cfg.model.model_copy(
        update={"model_name_or_path": options.ref_model, "adapter_name_or_path": options.ref_model_adapters}
    )
    _require_same_vocabulary(cfg.model, source)
    compute = {"bf16": "bfloat16", "fp16": "float16"}.get(plan.autocast, plan.weight_dtype)
    model: Any = load_model(
        source, dtype=plan.weight_dtype, attention=plan.attention, device=str(device),
        quantization=quantisation(bits, compute=compute),
    )  # fmt: skip
    from peft import PeftModel

    with without_future_warning():
        for folder in adapter_folders(source):
            model = PeftModel.from_pretrained(model, str(folder))
    log.info(f"reference: {options.ref_model}, quantised to {bits} bits" + _with(options.ref_model_adapters))
    return Reference(model=as_asked_for(freeze(model)), bits=bits)


def _with(adapters: tuple[str, ...]) -> str:
    return f" with {', '.join(adapters)}" if adapters else ""


def _require_same_vocabulary(policy: ModelConfig, reference: ModelConfig) -> None:
    ours, theirs = (load_tokenizer(source).get_vocab() for source in (policy, reference))
    if ours == theirs:
        return
    others = sum(theirs.get(token) != number for token, number in ours.items())
    raise ConfigError(
        Problem(
            key="ref_model",
            given=str(reference.model_name_or_path),
            message=f"has another vocabulary: {others:,} of the model's {len(ours):,} tokens have another id or none",
            fix="take a reference with the same tokenizer, or leave ref_model out",
        )
    )
