"""What the stage of a configuration asks of the machine, for its plan: reference, value head, sampled answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llamafactory.model.demands import Demands, Sampling
from llamafactory.model.loader import load_model_config
from llamafactory.model.method import load_method
from llamafactory.model.precision import training_dtype
from llamafactory.model.quantised import quantised_bytes
from llamafactory.model.skeleton import num_parameters
from llamafactory.train.stage import Stage, load_stage

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.train.workload import RowSizes


def demands_of(cfg: RunConfig, rows: RowSizes) -> Demands:
    """The demands of a run's stage.

    Args:
        cfg: the resolved configuration.
        rows: the training rows; only stages that sample look at them.

    Raises:
        LlamaFactoryError: `ref_model` has no config that can be read.
    """
    stage, options = load_stage(cfg.train.stage), cfg.stage_options
    kind = _reference_of(cfg, stage)
    own = getattr(options, "ref_model", None) if kind == "copy" else None
    sampling = _sampling_of(cfg, stage, rows)
    if sampling is None:
        passes = float(kind != "none") + float(stage.prepares(options)) + float(stage.view == "feedback")
    else:
        rules = stage.rollout(options) if stage.rollout is not None else None
        measured = [rules is not None and rules.needs_old, rules is not None and rules.needs_reference]
        passes = (sum(measured) + float(stage.has_value_head)) / sampling.num_epochs
    return Demands(
        reference=kind,
        reference_parameters=None if own is None else num_parameters(load_model_config(_named(cfg, own))),
        reference_bytes=None if own is None else _quantised_bytes(cfg, own),
        has_value_head=stage.has_value_head,
        makes_logits=not stage.has_value_head or sampling is not None,
        passes=passes,
        sampling=sampling,
    )


def _reference_of(cfg: RunConfig, stage: Stage) -> Literal["none", "base", "adapter", "copy"]:
    """Where `companions.load_reference` will find it."""
    options: Any = cfg.stage_options
    if not stage.needs_reference(options):
        return "none"
    method = load_method(cfg.train.finetuning_type)
    if options.ref_model is not None or not method.saves_adapter:
        return "copy"
    folders: Any = cfg.model.adapter_name_or_path
    return "base" if len(method.merged_before(cfg.adapter_options, folders)) == len(folders) else "adapter"


def _quantised_bytes(cfg: RunConfig, name: str) -> int | None:
    bits = getattr(cfg.stage_options, "ref_model_quantization_bit", None)
    if bits is None:
        return None
    element = 4 if training_dtype(cfg)[0] == "float32" else 2
    return quantised_bytes(load_model_config(_named(cfg, name)), bits=bits, element=element)


def _sampling_of(cfg: RunConfig, stage: Stage, rows: RowSizes) -> Sampling | None:
    if stage.rollout is None:
        return None
    options: Any = cfg.stage_options
    rules, train = stage.rollout(options), cfg.train
    prompts = train.per_device_train_batch_size * train.gradient_accumulation_steps * rules.num_parts
    return Sampling(
        rows_at_once=options.rollout_batch_size,
        group_size=rules.group_size,
        prompt_tokens=max(rows.firsts()),
        new_tokens=cfg.generation.max_new_tokens or cfg.generation.max_length,
        answers=prompts * rules.group_size,
        num_epochs=rules.num_epochs,
    )


def _named(cfg: RunConfig, name: str) -> Any:
    return cfg.model.model_copy(update={"model_name_or_path": name, "adapter_name_or_path": ()})
