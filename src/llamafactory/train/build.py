"""Puts the parts of a run together: text, model, batches, optimizer. Each function returns something ready-made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from llamafactory.data.mix import Mix
from llamafactory.data.saved_template import chat_template_to_save
from llamafactory.data.views import find_view
from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.hardware import measure_gemm_peak
from llamafactory.model.checkpointing import recompute_blocks
from llamafactory.model.compilation import compile_blocks, require_compiler
from llamafactory.model.flops import step_flops
from llamafactory.model.idle_keys import idle_keys
from llamafactory.model.loader import adapter_folders, load_model
from llamafactory.model.method import apply_method, load_method
from llamafactory.train.checkpoint.room import may_save_async
from llamafactory.train.checkpoint.snapshot import restore_training
from llamafactory.train.checkpoint.state import fresh_state, load_state
from llamafactory.train.companions import language_model, load_reference, with_stage_parts
from llamafactory.train.feed import Feed
from llamafactory.train.job import Job, Updates
from llamafactory.train.noise import EmbeddingNoise
from llamafactory.train.optim import build_optimizer
from llamafactory.train.reference_cache import TRAINING, keep_reference
from llamafactory.train.rollout_parts import build_rollouts, parts_of
from llamafactory.train.rows import ROWS
from llamafactory.train.schedule import build_schedule, go_on
from llamafactory.train.sharded_files import model_files
from llamafactory.train.sharding import placed, say_sharding, shard_model
from llamafactory.train.stage import Models, load_stage
from llamafactory.train.step import StageModule
from llamafactory.train.stream_feed import build_stream_feed
from llamafactory.train.text import data_seed
from llamafactory.train.windows import PackedMix, Schedule, group_items, packed_items, single_items
from llamafactory.train.workload import RowSizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from llamafactory.data.pipeline import PreparedData
    from llamafactory.data.table import Examples
    from llamafactory.data.types import Template, ViewName
    from llamafactory.hparams.model import ModelConfig
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.hparams.section import Section
    from llamafactory.hparams.train import TrainConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.output_dir import Claim


def start_accelerator(cfg: RunConfig, plan: ModelPlan) -> Accelerator:
    """Starts accelerate for this process (alone or one of many) and seeds every generator.

    Raises:
        ConfigError: the number of processes is not the one that the configuration counts on.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from transformers import enable_full_determinism, set_seed

    accelerator = Accelerator(
        mixed_precision=plan.autocast,
        cpu=cfg.train.use_cpu,
        log_with=list(cfg.train.report_to) or None,
        project_dir=cfg.train.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=cfg.train.ddp_timeout))],
    )
    say_sharding(cfg, accelerator.num_processes)
    if cfg.train.report_to:
        shown = {
            key: value for key, value in cfg.flat(mask_secrets=True).items() if isinstance(value, int | float | str)
        }
        accelerator.init_trackers("llamafactory", config=shown, init_kwargs=_tracker_names(cfg.train))
    if cfg.train.full_determinism:
        enable_full_determinism(cfg.train.seed)
    else:
        set_seed(cfg.train.seed)
    return accelerator


def _tracker_names(train: TrainConfig) -> dict[str, dict[str, str]]:
    """Where each tracker takes the name of a run."""
    if train.run_name is None:
        return {}
    keys = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name"}
    return {tracker: {key: train.run_name} for tracker, key in keys.items() if tracker in train.report_to}


def load_policy(cfg: RunConfig, plan: ModelPlan, *, resume_from: Path | None) -> nn.Module:
    """Loads the model that is trained, with its adapter; a resumed run takes its weights from the checkpoint.

    Args:
        cfg: the resolved configuration.
        plan: dtype, attention and checkpointing.
        resume_from: checkpoint folder, or None.
    """
    if plan.compiled_blocks:
        require_compiler(cfg.train, plan.device)
    source, folders = cfg.model, adapter_folders(cfg.model)
    options = cfg.adapter_options
    if resume_from is not None:
        source, options, folders = _resumed(cfg, resume_from, folders)
    model = load_model(source, dtype=plan.weight_dtype, attention=plan.attention)
    policy = apply_method(model, cfg.train.finetuning_type, options, adapters=folders, trainable=cfg.train.do_train)
    policy = with_stage_parts(cfg, policy, resume_from=resume_from)
    dtype = torch.bfloat16 if cfg.train.pure_bf16 else torch.float32
    for parameter in policy.parameters():
        if parameter.requires_grad:  # master precision of everything trained, modules_to_save among it
            parameter.data = parameter.data.to(dtype)
    for sentence in idle_keys(cfg, plan):
        log.warn(sentence)
    recompute_blocks(policy, plan.checkpoint_every, use_reentrant=cfg.model.use_reentrant_gc)
    if plan.compiled_blocks:
        compile_blocks(language_model(policy), cfg.train)
    return policy


def needs_base(cfg: RunConfig) -> bool:
    """Whether a run that is continued reads the weights that it began with; a whole model is in its checkpoint."""
    return load_method(cfg.train.finetuning_type).saves_adapter or load_stage(cfg.train.stage).needs_reference(
        cfg.stage_options
    )


def _resumed(
    cfg: RunConfig, checkpoint: Path, adapters: tuple[Path, ...]
) -> tuple[ModelConfig, Section, tuple[Path, ...]]:
    """Where a resumed run finds its weights: the base with what was merged into it, then the checkpoint."""
    method = load_method(cfg.train.finetuning_type)
    if not method.saves_adapter:
        return (
            cfg.model.model_copy(update={"model_name_or_path": str(checkpoint), "train_from_scratch": False}),
            cfg.adapter_options,
            (),
        )
    merged = method.merged_before(cfg.adapter_options, adapters)
    options = cfg.adapter_options
    if "create_new_adapter" in type(options).model_fields:
        options = options.model_copy(update={"create_new_adapter": False})
    return cfg.model, options, (*merged, checkpoint)


def assemble_job(
    cfg: RunConfig,
    claim: Claim,
    *,
    plan: ModelPlan,
    data: PreparedData,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    model_config: PreTrainedConfig,
    accelerator: Accelerator,
    facts: Mapping[str, Any],
    template: Template,
    first_step_is_over: Callable[[], None] = lambda: None,
) -> Job:
    """Puts together what the loop needs, and places it on the devices.

    Args:
        cfg: the resolved configuration.
        claim: output folder and checkpoint to continue.
        plan: of the model.
        data: training and evaluation examples.
        policy: the model, with its adapter.
        tokenizer: saved beside the weights.
        model_config: for the FLOP count.
        accelerator: of the run.
        facts: what every checkpoint says of the run.
        template: says what ends an answer.
        first_step_is_over: called once, after the first step of this process.
    """
    train = cfg.train
    stage = load_stage(train.stage)
    reference = load_reference(cfg, plan, language_model(policy), device=accelerator.device)
    models = Models(policy=policy, plan=plan, reference=reference)
    parts = parts_of(
        cfg, stage, models, template=template, tokenizer=tokenizer, accelerator=accelerator,
        source_rows=data.source_rows,
    )  # fmt: skip
    models = models if parts is None else parts.models
    alpha = train.neftune_noise_alpha if train.do_train else None
    noise = None if alpha is None else EmbeddingNoise(language_model(policy), alpha)
    module: Any = StageModule(stage, models, cfg.stage_options, noise=noise)
    pad_id = cast("int", tokenizer.pad_token_id)
    feed: Any = partial(build_feed, cfg, plan, view=stage.view, pad_id=pad_id, num_ranks=accelerator.num_processes)
    if parts is not None:
        feed = partial(build_rollouts, parts, partial(build_schedule_of_rows, cfg))
    if data.stream is None:
        training: Any = feed(data.train, training=True, mix=data.mix)
    else:
        quiet = partial(feed, training=True, is_quiet=True)
        training = build_stream_feed(cfg, data, data.stream, feed=quiet, num_ranks=accelerator.num_processes)
    total_steps = training.schedule.total_windows(max_steps=train.max_steps, num_epochs=train.num_train_epochs)
    start, updates = fresh_state(claim.run_id), None
    sharded = shard_model(cfg, module, policy, accelerator)
    files = model_files(sharded, policy, tokenizer, chat_template=chat_template_to_save(cfg.data, tokenizer))
    if train.do_train:
        optimizer: Any = build_optimizer(module, train, device=accelerator.device.type)
        scheduler = build_schedule(optimizer, train, total_steps=total_steps)
        if claim.resume_from is not None:
            start = load_state(claim.resume_from)
            if data.stream is not None:
                training.restore(start.data)
            if accelerator.scaler is not None and start.scaler:
                accelerator.scaler.load_state_dict(dict(start.scaler))
        if parts is not None:
            files = parts.take_up(training, files, claim.output_dir, start=start, checkpoint=claim.resume_from)
        module, optimizer = placed(accelerator, sharded, module, optimizer)
        if claim.resume_from is not None:  # once it is placed, which casts what it holds to the dtype of the weights
            if not restore_training(claim.resume_from, optimizer, accelerator.process_index):
                log.note("this run has more processes than before: rows go on as they were, dropout does not")
            go_on(scheduler, start.scheduler)
        updates = Updates(optimizer=optimizer, scheduler=scheduler)
    else:
        (module,) = placed(accelerator, sharded, module)
    feeds: dict[str, Any] = {_prefix(name): feed(rows, training=False) for name, rows in data.evaluation.items()}
    feeds = keep_reference(cfg, {TRAINING: training, **feeds}, models, module, accelerator)
    training = feeds.pop(TRAINING)
    flops = partial(_flops, model_config, load_method(train.finetuning_type).trains_base)
    return Job(
        cfg=train, output_dir=claim.output_dir, run_id=claim.run_id, accelerator=accelerator, module=module,
        updates=updates, feed=training,
        evaluation=feeds,
        total_steps=total_steps, start=start, model_files=files, step_flops=flops,
        measure_peak=lambda: _peak_flops(plan) * accelerator.num_processes,
        is_async=may_save_async(train, policy, plan.device), facts=facts, first_step_is_over=first_step_is_over,
        is_sharded=sharded is not None,
    )  # fmt: skip


def say_lines(lines: Sequence[str]) -> None:
    """Prints facts for people, one a line."""
    for line in lines:
        log.info(line)


def _flops(config: PreTrainedConfig, full: bool, lengths: list[int], num_targets: int) -> int | None:
    return step_flops(config, lengths=lengths, num_targets=num_targets, full=full)


def _peak_flops(plan: ModelPlan) -> float:
    """FLOP/s of one device in the dtype that the run computes in."""
    dtype = cast(
        "torch.dtype", getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}.get(plan.autocast, plan.weight_dtype))
    )
    return measure_gemm_peak(plan.device, dtype, size=1024 if plan.device == "cpu" else 8192)


def _prefix(name: str) -> str:
    return name if name == "eval" else f"eval_{name}"


def build_feed(
    cfg: RunConfig,
    plan: ModelPlan,
    examples: Examples,
    *,
    view: ViewName,
    pad_id: int,
    num_ranks: int,
    training: bool,
    mix: Mix | None = None,
    is_quiet: bool = False,
) -> Feed:
    """Batches over examples, for training or for evaluation.

    What the batch size counts is one example, or one group where the view keeps those together. Packed bins hold at
    most `cutoff_len` tokens and count as one.
    """
    sizes = RowSizes.of(examples)
    is_whole = find_view(view).is_whole
    schedule = build_schedule_of_rows(cfg, sizes, is_whole=is_whole, num_ranks=num_ranks, training=training, mix=mix)
    packs = training and schedule.items and not is_whole and (cfg.data.packing or cfg.data.neat_packing)
    if packs and not is_quiet:
        filled = sum(schedule.lengths) / (len(schedule.items) * cfg.data.cutoff_len)
        num_packed = sum(map(len, schedule.items))
        log.info(
            f"packing: {num_packed:,} examples in {len(schedule.items):,} bins of {cfg.data.cutoff_len:,} tokens, "
            f"{filled:.0%} full; examples of a bin never see each other"
        )
    kind = ROWS[view]
    read = kind.reader(examples, data_seed(cfg), cfg.data.cutoff_len)
    if is_whole:  # what a forward pass computes: a prompt that is shared counts once
        lengths = [sum(kind.num_tokens(row, plan.layout) for row in read(item)) for item in schedule.items]
        schedule = replace(schedule, lengths=lengths)
    schedule = replace(schedule, micro_batch_tokens=plan.micro_batch_tokens, is_padded=plan.layout == "padded")
    return Feed(examples=examples, schedule=schedule, layout=plan.layout, pad_id=pad_id, kind=kind, read=read)


def build_schedule_of_rows(
    cfg: RunConfig, rows: RowSizes, *, is_whole: bool, num_ranks: int, training: bool, mix: Mix | None = None
) -> Schedule:
    """Which rows make up which step; the plan then says how many of them share a forward pass.

    A mix counts rows. With packing each epoch packs the rows that it draws, into bins that are no longer than those of
    the first, which the plan looks at.
    """
    train, sizes = cfg.train, rows.tokens
    items = group_items(rows.offsets) if is_whole else single_items(len(sizes))
    if mix is not None and not is_whole:
        ends = [rows.offsets[end] for end in accumulate(mix.sizes)]
        mix = replace(mix, sizes=tuple(end - start for start, end in pairwise([0, *ends])))
    redraw = None
    if training and items and not is_whole and (cfg.data.packing or cfg.data.neat_packing):
        if mix is None:
            items = packed_items(sizes, cfg.data.cutoff_len)
        else:
            packed, mix = PackedMix(mix=mix, lengths=sizes, capacity=cfg.data.cutoff_len), None
            items = packed.bins(0, shuffle=not train.disable_shuffling)
            redraw = None if train.disable_shuffling else packed.within(items)
    return Schedule(
        items=items,
        lengths=[sum(sizes[index] for index in item) for item in items],
        items_per_device=train.per_device_train_batch_size if training else train.per_device_eval_batch_size,
        accumulation=train.gradient_accumulation_steps if training else 1,
        num_ranks=num_ranks,
        micro_batch_tokens=None,
        seed=data_seed(cfg),
        shuffle=training and not train.disable_shuffling,
        mix=mix,
        redraw=redraw,
    )


def trainable_report(policy: nn.Module) -> tuple[int, int, str]:
    """Counts what is trained.

    Returns:
        Trainable and total parameters, and the kinds of module that hold the trainable ones, each with its number, so
        that a pattern that missed shows: `q_proj x 30, v_proj x 30`.
    """
    kinds: dict[str, set[str]] = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            module = re.split(r"\.(?:lora_|modules_to_save|weight$|bias$)", name)[0]
            kinds.setdefault(module.rsplit(".", 1)[-1], set()).add(module)
    total = sum(parameter.numel() for parameter in policy.parameters())
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    return trained, total, ", ".join(f"{kind} x {len(modules)}" for kind, modules in sorted(kinds.items()))


def require_trainable(num_trainable: int) -> None:
    """Refuses a run that would train nothing."""
    if num_trainable == 0:
        raise ConfigError(
            Problem(
                key="finetuning_type", message="no parameter is trainable", fix="check lora_target and freeze keys"
            )
        )
