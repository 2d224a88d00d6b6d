"""`deepspeed`: a DeepSpeed configuration -> the ZeRO stage that it asks for, and what of it has no effect here.

A stage says what is spread over the processes; torch's FSDP2 spreads it (`sharding.py`). Every value must be `"auto"`
or that of the run, as in transformers; what only tunes DeepSpeed's own buffers has no effect; what would change the
numbers is an error. Key names: DeepSpeed's configuration reference, https://www.deepspeed.ai/docs/config-json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.suggest import did_you_mean
from llamafactory.hparams.json_file import parse_json
from llamafactory.hparams.run_config import RunConfig

_SCHEDULES = {"warmupdecaylr": "linear", "warmuplr": "constant_with_warmup", "warmupcosinelr": "cosine"}
"""Schedule of DeepSpeed, in lower case -> its `lr_scheduler_type`."""
_SAME: dict[str, tuple[str, Callable[[RunConfig], Any]]] = {
    "train_micro_batch_size_per_gpu": (
        "per_device_train_batch_size",
        lambda run: run.train.per_device_train_batch_size,
    ),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", lambda run: run.train.gradient_accumulation_steps),
    "gradient_clipping": ("max_grad_norm", lambda run: run.train.max_grad_norm),
    "fp16.enabled": ("fp16", lambda run: run.train.fp16),
    "bf16.enabled": ("bf16", lambda run: run.train.bf16 or run.train.pure_bf16),
    "optimizer.params.lr": ("learning_rate", lambda run: run.train.learning_rate),
    "optimizer.params.betas": ("adam_beta1, adam_beta2", lambda run: [run.train.adam_beta1, run.train.adam_beta2]),
    "optimizer.params.eps": ("adam_epsilon", lambda run: run.train.adam_epsilon),
    "optimizer.params.weight_decay": ("weight_decay", lambda run: run.train.weight_decay),
    "scheduler.params.warmup_max_lr": ("learning_rate", lambda run: run.train.learning_rate),
    "scheduler.params.warmup_num_steps": ("warmup_steps", lambda run: run.train.warmup_steps),
    "scheduler.params.total_num_steps": ("max_steps", lambda run: run.train.max_steps),
}
"""Key -> the option that must have its value, and how to find that."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "prescale_gradients": (False,), "sparse_gradients": (False,), "gradient_predivide_factor": (1,),
    "communication_data_type": (None, "fp32"), "data_types.grad_accum_dtype": (None, "fp32"),
    "zero_optimization.zero_quantized_weights": (False,), "zero_optimization.zero_quantized_gradients": (False,),
    "zero_optimization.zero_quantized_nontrainable_weights": (False,),
    "tensor_parallel.autotp_size": (0, 1), "bf16.bf16_optimizer_states": (False,),
    "bf16.bf16_master_weights_and_grads": (False,), "optimizer.params.adam_w_mode": (True,),
    "optimizer.params.bias_correction": (True,), "optimizer.params.amsgrad": (False,),
    "scheduler.params.warmup_min_lr": (0,), "scheduler.params.warmup_type": ("linear",),
    "scheduler.params.warmup_min_ratio": (0,), "scheduler.params.cos_min_ratio": (0,),
    "scheduler.params.last_batch_iteration": (-1,),
}  # fmt: skip
"""Key -> the values with which it changes nothing; others would change the numbers."""
_TUNING = "tunes DeepSpeed's own buffers and reports"
NOT_OFFLOADED = "nothing is moved to RAM or to a disk; the plan checks that the run fits into the devices without"
_ZERO_TUNING = (
    "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "sub_group_size", "cpu_offload_use_pin_memory", "ignore_unused_parameters", "legacy_stage1",
    "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "memory_efficient_linear",
    "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory", "leaf_module", "mics_shard_size", "mics_hierarchical_params_gather",
    "model_persistence_threshold", "stage3_model_persistence_threshold", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance",
)  # fmt: skip
_REASONS = {
    **{f"zero_optimization.{name}": _TUNING for name in _ZERO_TUNING},
    **dict.fromkeys(
        (
            "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "disable_allgather",
            "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "seq_parallel_communication_data_type",
            "dataloader_drop_last", "graph_harvesting", "use_data_before_expert_parallelism", "aio", "timers",
            "bf16.immediate_grad_update", "optimizer.params.torch_adam",
            "optimizer.params.fused", "optimizer.legacy_fusion", "optimizer.params.set_grad_none", "checkpoint",
        ),
        _TUNING,
    ),
    "zero_optimization.offload_optimizer": NOT_OFFLOADED, "zero_optimization.offload_param": NOT_OFFLOADED,
    "zero_optimization.cpu_offload": NOT_OFFLOADED, "zero_optimization.cpu_offload_param": NOT_OFFLOADED,
    "zero_optimization.cpu_offload_params": NOT_OFFLOADED,
    "bf16.check_grad_overflow": "a gradient that is not finite always stops the step (on_nan)",
    "activation_checkpointing": "the plan recomputes where memory asks; disable_gradient_checkpointing decides",
    "flops_profiler": "the plan counts FLOPs, and the log shows MFU; profile: true writes a trace",
    "comms_logger": "profile: true writes a trace",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config"), "report_to chooses trackers"),
    **dict.fromkeys(
        (f"fp16.{name}" for name in (
            "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
            "min_loss_scale", "auto_cast", "fp16_master_weights_and_grads", "fp16_master_weights_and_gradients",
            "fp16_optimizer_states",
        )),
        "fp16 is off",
    ),
}  # fmt: skip
"""Key, or the beginning of keys -> why it has no effect."""
_REFUSED = (
    "amp", "torch_autocast", "fp8", "compression_training", "sparse_attention", "curriculum_learning",
    "data_efficiency", "progressive_layer_drop", "eigenvalue", "quantize_training", "elasticity", "autotuning",
    "hybrid_engine", "pipeline", "tensor_parallel", "nebula", "compile", "zenflow", "sequence_parallel_size",
    "weight_quantization",
)  # fmt: skip
"""Keys and sections that may only be switched off."""
_READ = ("zero_optimization.stage", "optimizer.type", "scheduler.type", "train_batch_size")
_GATHER = (
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    "zero_optimization.gather_16bit_weights_on_model_save",
)
_OF_ACCELERATE = {
    "zero_stage": "zero_optimization.stage", "zero3_save_16bit_model": _GATHER[0],
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_param_device": "zero_optimization.offload_param.device", "deepspeed_config_file": "deepspeed: that file",
}  # fmt: skip
"""Key of accelerate's own configuration -> what says the same to DeepSpeed."""
_KNOWN = (
    *_READ, *_GATHER, *_SAME, *_ONLY, *_REASONS, *_REFUSED,
)  # fmt: skip
_DROPPED = ("", None, "none", {}, [])
"""Values that ask for nothing."""
_SECTIONS = {key.split(".")[0] for key in _KNOWN if "." in key}
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_MAX_FILE_BYTES, _MAX_PROBLEMS, _MAX_DEPTH = 1_000_000, 20, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroRequest:
    """What a DeepSpeed configuration asks for.

    Attributes:
        name: its file name, or `deepspeed` for a mapping.
        stage: ZeRO stage, 0 to 3.
        gathers_weights: whether checkpoints shall hold whole weights.
        train_batch_size: rows of a step over all processes, where it is given.
        without_effect: keys that do nothing here -> why.
    """

    name: str
    stage: int = 0
    gathers_weights: bool = True
    train_batch_size: int | None = None
    without_effect: Mapping[str, str] = field(default_factory=dict[str, str])

    def refuse_batch(self, rows: int, num_processes: int) -> Problem:
        """Says that a step takes `rows` rows, and not `train_batch_size`."""
        message = f"{num_processes} processes take {rows} rows in a step"
        fix = '"auto", or another per_device_train_batch_size, gradient_accumulation_steps or NPROC_PER_NODE'
        return _problem("train_batch_size", self.train_batch_size, message, fix=fix)


def read_deepspeed(run: RunConfig) -> tuple[ZeroRequest | None, list[Problem]]:
    """What `deepspeed` asks for, None where it is off; and everything that is wrong with it."""
    given = run.train.deepspeed
    if not given:
        return None, []
    name = Path(given).name if isinstance(given, str) else "deepspeed"
    try:
        entries = _entries(given)
    except ConfigError as error:
        return None, list(error.problems)
    leaves = dict(_leaves(entries))
    problems, without_effect = _judge_all(run, leaves)
    stage = leaves.get("zero_optimization.stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int | float) or stage not in (0, 1, 2, 3):
        problems.append(_problem("zero_optimization.stage", stage, "not a ZeRO stage", allowed="0, 1, 2, 3"))
        stage = 0
    problems.extend(_check_kinds(run, leaves))
    if "scheduler.type" in leaves and "scheduler.params.warmup_type" not in leaves and run.train.warmup_steps:
        without_effect["scheduler.params.warmup_type"] = "the warm-up is linear; DeepSpeed's is logarithmic by default"
    batch = leaves.get("train_batch_size", "auto")
    rows = run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps
    if batch != "auto" and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1 or batch % rows):
        message = f"not a multiple of per_device_train_batch_size x gradient_accumulation_steps = {rows}"
        problems.append(_problem("train_batch_size", batch, message, fix='"auto"'))
        batch = "auto"
    request = ZeroRequest(
        name=name,
        stage=int(stage),
        gathers_weights=stage < 3 or any(leaves.get(name) is True for name in _GATHER),
        train_batch_size=None if batch == "auto" else batch,
        without_effect=without_effect,
    )
    return request, problems


def _entries(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """The configuration itself.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not isinstance(given, str):
        return given
    try:
        path = Path(given).expanduser()
        if path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
            raise OSError(f"more than {_MAX_FILE_BYTES:,} bytes are no configuration")
        return {key: value for key, value, _ in parse_json(path.read_text(encoding="utf-8-sig"), given)}
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise ConfigError(
            Problem(
                key="deepspeed",
                given=given,
                message=f"cannot be read: {error}",
                allowed="a mapping, or the path of a JSON file, seen from the folder of the command",
                fix="examples/deepspeed has such files",
            )
        ) from None


def _leaves(entries: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything that asks for something; a section that is switched off asks for nothing."""
    for name, value in entries.items():
        key = f"{before}{str(name).replace('.', '_')}".replace("bfloat16", "bf16")
        if not isinstance(value, Mapping) or key.count(".") > _MAX_DEPTH:
            yield key, _plain(value)
            continue
        section = cast("Mapping[str, Any]", value)
        is_off = key != "zero_optimization" and (
            _plain(section.get("enabled", True)) is False or _plain(section.get("device", "")) is None
        )
        if is_off and key in ("fp16", "bf16"):
            yield f"{key}.enabled", False
        elif is_off or not section:
            yield key, {}
        else:
            yield from _leaves(section, f"{key}.")


def _plain(value: Any) -> Any:
    """A value that may be written as text: `"5e8"`, `"true"`, `"AUTO"`."""
    if isinstance(value, list):
        return [_plain(one) for one in cast("list[Any]", value)]
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word == "auto" or word in _WORDS:
        return _WORDS.get(word, word)
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        return value


def _judge_all(run: RunConfig, leaves: Mapping[str, Any]) -> tuple[list[Problem], dict[str, str]]:
    """What is wrong with the entries, the first of it where it is much; and what has no effect."""
    problems: list[Problem] = []
    without_effect: dict[str, str] = {}
    for key, value in leaves.items():
        if len(problems) == _MAX_PROBLEMS:
            problems.append(_problem(key, value, "not looked at, nor what follows", fix="mend what is above first"))
            break
        if key in _GATHER and not isinstance(value, bool) and value not in ("auto", None):
            problems.append(_problem(key, value, "not a boolean", allowed='true, false, "auto"'))
        if key not in _READ and key not in _GATHER and (problem := _judge(run, key, value, leaves, without_effect)):
            problems.append(problem)
    return problems, without_effect


def _judge(
    run: RunConfig, key: str, value: Any, leaves: Mapping[str, Any], without_effect: dict[str, str]
) -> Problem | None:
    """What is wrong with an entry; what has no effect is noted."""
    if key in _SAME:
        return _compare(run, key, value)
    if key in _ONLY:
        if value == "auto" or any(value == one and type(value) in (type(one), float) for one in _ONLY[key]):
            return None
        allowed = ", ".join(str(one).lower() for one in _ONLY[key])
        return _problem(key, value, "would change the numbers, and is not implemented", allowed=allowed)
    top = key.split(".")[0]
    if top in _REFUSED:
        if value is False or value in _DROPPED:
            return None
        return _problem(key, value, "known, but not implemented in this version", fix=f"remove {top}")
    prefix = next((one for one in _prefixes(key) if one in _REASONS), None)
    if prefix is None:
        return _refuse_unknown(key, value)
    is_quiet = prefix.startswith("fp16") or value is False or value in ("auto", *_DROPPED)
    if not is_quiet:
        without_effect[prefix.removeprefix("zero_optimization.")] = _REASONS[prefix]
    return None


def _compare(run: RunConfig, key: str, value: Any) -> Problem | None:
    """Whether a value of `_SAME` is `"auto"`, or that of the run."""
    option, find = _SAME[key]
    expected = find(run)
    both = zip(value, expected, strict=False) if _is_pair(value) and _is_pair(expected) else [(value, expected)]
    if all(one in ("auto", None) or _is_same(one, other) for one, other in both):
        return None
    fix = '"auto"'
    if "," not in option and isinstance(value, bool | int | float) and abs(value) < float("inf"):
        fix += f", or {option}: {_shown(value)}"
    return _problem(key, value, f"differs from {option}: {_shown(expected)}", fix=fix)


def _refuse_unknown(key: str, value: Any) -> Problem | None:
    if key in (*_SECTIONS, "optimizer.params", "scheduler.params"):
        if value in _DROPPED:
            return None
        return _problem(key, value, "must be a section", allowed='{"key": value, ...}')
    if key in _OF_ACCELERATE:
        fix = f"accelerate's name; in a DeepSpeed configuration it is {_OF_ACCELERATE[key]}"
    else:
        fix = did_you_mean(key, _KNOWN) if len(key) < 200 else ""
    return _problem(key, value, "unknown key", fix=fix or f"remove {_cut(key)}")


def _prefixes(key: str) -> Iterator[str]:
    """The key, and its beginnings, longest first."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def _check_kinds(run: RunConfig, leaves: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether optimizer and schedule are those of the run."""
    optimizer = leaves.get("optimizer.type")
    if optimizer is not None and str(optimizer).lower() not in ("adam", "adamw"):
        yield _problem("optimizer.type", optimizer, "not implemented", allowed="AdamW", fix="remove optimizer; optim")
    elif optimizer is not None and not str(run.train.optim).startswith("adamw"):
        yield _problem("optimizer.type", optimizer, f"differs from optim: {run.train.optim}", fix="remove optimizer")
    schedule = leaves.get("scheduler.type")
    if schedule is None:
        return
    expected = _SCHEDULES.get(str(schedule).lower())
    if expected is None:
        yield _problem("scheduler.type", schedule, "not implemented", fix="remove scheduler; lr_scheduler_type")
    elif expected != str(run.train.lr_scheduler_type):
        message = f"differs from lr_scheduler_type: {run.train.lr_scheduler_type}"
        yield _problem("scheduler.type", schedule, message, fix=f"remove scheduler, or lr_scheduler_type: {expected}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(cast("list[Any]", value)) == 2


def _is_same(value: Any, expected: Any) -> bool:
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut where it is long."""
    return _cut(json.dumps(value, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _problem(key: str, value: Any, message: str, *, allowed: str | None = None, fix: str | None = None) -> Problem:
    key = _cut(key)
    return Problem(
        key="deepspeed", given=f"{key}: {_shown(value)}", message=f"{key}: {message}", allowed=allowed, fix=fix
    )
