"""What must be alike in all processes of a run before they train: a difference would mix up their rows, or never end.

Each process reads configuration, data and output folder for itself. On one machine they are the same; on several they
are what somebody has copied there, and free memory differs from device to device.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.hparams.sharding import configuration_files
from llamafactory.train.checkpoint.manifest import read_facts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.output_dir import Claim

_OF_A_MACHINE = frozenset(
    {"output_dir", "cache_dir", "dataset_dir", "media_dir", "tokenized_path", "model_name_or_path",
     "adapter_name_or_path", "resume_from_checkpoint", "rerun_of", "profiler_output_dir", "export_dir",
     "preprocessing_num_workers", "hf_hub_token", "ms_hub_token", "om_hub_token", "offline", "save_grace"}
)  # fmt: skip
"""Keys that may differ: where things lie, not what they are."""


def facts_of(cfg: RunConfig, claim: Claim, data: Mapping[str, Any], plan: ModelPlan) -> dict[str, str]:
    """What this process would do, in words that can be compared.

    Args:
        cfg: the resolved configuration.
        claim: output folder, and the checkpoint that is continued.
        data: the report of the data, as JSON.
        plan: of the model.
    """
    values = cfg.flat(mask_secrets=True) | configuration_files(cfg)
    config = {key: value for key, value in values.items() if key not in _OF_A_MACHINE}
    found = {key: json.dumps(value, sort_keys=True) for key, value in config.items()}
    found |= {f"rows of {one['name']}": str(one.get("fingerprint")) for one in data.get("datasets", [])}
    found["begins with"] = claim.resume_from.name if claim.resume_from else "nothing"
    if claim.resume_from:
        files = json.dumps(read_facts(claim.resume_from).get("files"), sort_keys=True)
        found["files of the checkpoint"] = files
    for name in ("device", "weight_dtype", "autocast", "attention", "layout"):
        found[f"{name} of the plan"] = str(getattr(plan, name))
    return found


def require_alike(accelerator: Accelerator, facts: Mapping[str, str]) -> None:
    """Compares what the processes would do; every process must call it.

    Raises:
        ConfigError: what differs and where, the same in each process.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    found: list[tuple[str, Mapping[str, str]]] = gather_object([(socket.gethostname(), dict(facts))])
    if problems := differences(found):
        raise ConfigError(problems)


def differences(found: list[tuple[str, Mapping[str, str]]]) -> list[Problem]:
    """What differs from the first process, each fact once: for each process its host and its facts."""
    (host, first), problems = found[0], dict[str, Problem]()
    for rank, (other_host, other) in enumerate(found):
        for name in sorted({*first, *other}):
            ours, theirs = first.get(name, "nothing"), other.get(name, "nothing")
            if ours != theirs and name not in problems:
                where = "" if host == other_host else f" ({host} and {other_host})"
                values = f"{ours[:60]} in rank 0, {theirs[:60]} in rank {rank}{where}"
                problems[name] = Problem(message=f"{name}: {values}", fix=_fix_of(name))
    return list(problems.values())


def _fix_of(name: str) -> str:
    if name in ("begins with", "files of the checkpoint"):
        return "give an output_dir that all machines share, or copy the checkpoint to each of them"
    if name.startswith("rows of "):
        return "give all machines the same files"
    return "start all processes with the same configuration, on the same kind of device"


def agreed_split(accelerator: Accelerator, plan: ModelPlan) -> ModelPlan:
    """The plan with the split that suits the process with the least memory; every process must call it.

    All of them count the same micro-batches, and shared models are recomputed in step.
    """
    if accelerator.num_processes == 1:
        return plan
    from accelerate.utils import gather_object

    splits: list[tuple[int | None, int]] = gather_object([(plan.micro_batch_tokens, plan.checkpoint_every)])
    tokens, every = careful(splits)
    if (tokens, every) == (plan.micro_batch_tokens, plan.checkpoint_every):
        return plan
    why = "as for the process with the least memory"
    log.note(f"micro_batch_tokens = {tokens}, checkpoint_every = {every}: {why}")
    reasons = {**plan.reasons, "micro_batch_tokens": why, "checkpoint_every": why}
    return replace(plan, micro_batch_tokens=tokens, checkpoint_every=every, reasons=reasons)


def careful(splits: list[tuple[int | None, int]]) -> tuple[int | None, int]:
    """The smallest micro-batch (None: no limit) and the most recomputation (0: none) of several plans."""
    tokens = min((one for one, _ in splits if one is not None), default=None)
    return tokens, min((every for _, every in splits), key=lambda every: every or math.inf)
