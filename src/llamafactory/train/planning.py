"""The plan of a run from its rows: what `train` follows and the command `plan` prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llamafactory.data.views import find_view
from llamafactory.model.costs import process_bytes_of
from llamafactory.model.plan import plan_training
from llamafactory.train.build import build_schedule_of_rows
from llamafactory.train.demands import demands_of
from llamafactory.train.stage import load_stage
from llamafactory.train.workload import RowSizes, assumed_rows, workload_of_prompts, workload_of_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from llamafactory.data.mix import Mix
    from llamafactory.data.table import Examples
    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.model.workload import Workload


def planner(
    model_config: PreTrainedConfig,
    hardware: Hardware,
    examples: Examples | None,
    *,
    num_devices: int | None = None,
    rate: float | None = None,
    mix: Mix | None = None,
) -> Callable[[RunConfig], ModelPlan]:
    """A function that plans a configuration for this model, machine and these rows.

    Args:
        model_config: the model's config.
        hardware: the machine; processes of one machine share its RAM.
        examples: the training rows; None assumes rows of `cutoff_len` tokens.
        num_devices: devices that train together; None asks the launcher's environment.
        rate: FLOP/s of one device, or None to leave times out.
        mix: how several data sets make up an epoch.
    """
    devices = num_devices or int(os.environ.get("WORLD_SIZE", "1"))
    if hardware.device == "cpu":
        share = hardware.memory_bytes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        hardware = replace(hardware, memory_bytes=share)
    known: dict[str, RowSizes] = {}

    def rows_of(cfg: RunConfig) -> RowSizes:
        view = load_stage(cfg.train.stage).view
        if examples and view not in known:
            known[view] = RowSizes.of(examples, view)
        return known[view].cut(cfg.data.cutoff_len) if examples else assumed_rows(cfg, view, devices)

    def workload_of(cfg: RunConfig, is_padded: bool) -> Workload:
        rows, stage = rows_of(cfg), load_stage(cfg.train.stage)
        is_whole = find_view(stage.view).is_whole
        schedule = build_schedule_of_rows(
            cfg, rows, is_whole=is_whole, num_ranks=devices, training=True, mix=mix if examples else None
        )
        schedule = replace(schedule, is_padded=is_padded)
        if stage.rollout is None:
            workload = workload_of_rows(rows, schedule, cfg.train)
        else:
            rules = stage.rollout(cfg.stage_options)
            sampling = demands_of(cfg, rows).sampling
            if sampling is None:
                raise ValueError("a stage with rollouts samples")
            workload = workload_of_prompts(rows, schedule, cfg.train, rules, sampling)
        if examples:
            return workload
        steps = cfg.train.max_steps if cfg.train.max_steps > 0 else None
        what = "prompt" if stage.rollout is not None else "row" if rows.shared is None else "answer, with its prompt,"
        source = f"every {what} is assumed to have {cfg.data.cutoff_len:,} tokens (cutoff_len)"
        source += ", all of them supervised" if stage.rollout is None else f"; {workload.source.split('; ')[-1]}"
        return replace(workload, num_steps=steps, num_tokens=None, source=source)

    return partial(
        plan_training,
        model_config=model_config,
        hardware=hardware,
        workload_of=workload_of,
        demands_of=lambda cfg: demands_of(cfg, rows_of(cfg)),
        num_devices=devices,
        rate=rate,
        process_bytes=process_bytes_of(hardware.device),
    )


def keep_split(plan: ModelPlan, record: Mapping[str, Any] | None, *, is_set: bool = False) -> ModelPlan:
    """The plan with the micro-batches of the run that is continued: sums in another order would differ in bits.

    Args:
        plan: made for the memory that is free now.
        record: `run.json` of the run that is continued, or None.
        is_set: the user set `micro_batch_tokens`, which wins.
    """
    before = (record or {}).get("plan", {})
    if is_set or "micro_batch_tokens" not in before or before["micro_batch_tokens"] == plan.micro_batch_tokens:
        return plan
    reasons = {**plan.reasons, "micro_batch_tokens": "as in the run that is continued, so that its numbers repeat"}
    return replace(plan, micro_batch_tokens=before["micro_batch_tokens"], reasons=reasons)
