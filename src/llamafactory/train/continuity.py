"""Is this still the same run? What a run that goes on must have in common with the record of its beginning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.log import note
from llamafactory.hparams.sharding import configuration_files

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

_HARMLESS = frozenset(
    {"resume_from_checkpoint", "overwrite_output_dir", "logging_steps", "logging_first_step", "save_steps",
     "save_strategy", "save_total_limit", "save_only_model", "eval_steps", "eval_strategy", "eval_on_start",
     "per_device_eval_batch_size", "plot_loss", "report_to", "run_name", "disable_tqdm", "ddp_timeout",
     "print_param_status", "include_num_input_tokens_seen", "include_effective_tokens_per_second", "hf_hub_token",
     "offline", "cache_dir", "preprocessing_num_workers", "do_eval", "do_predict",
     "predict_with_generate", "async_save", "verify_after_save", "save_grace",
     "allow_change", "rerun_of", "on_nan", "load_best_model_at_end", "early_stopping_steps",
     "ignore_plan", "tokenized_path", "overwrite_cache", "output_dir", "enable_torch_profiler"}
)  # fmt: skip
_HARMLESS_PREFIX = "profiler_"
_BASE_KEY = "model_name_or_path"
_BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")
_IN_CHECKPOINT = frozenset({"finetuning_type", "optim", "pure_bf16"})
"""What a checkpoint holds in its own form, besides the adapter with its options: a change would be without effect."""
_SAMPLING_KEYS = ("temperature", "top_k", "top_p")
"""They have other defaults where answers are sampled to train on, so that it matters whether they were given."""


def require_same_configuration(folder: Path, record: Mapping[str, Any], cfg: RunConfig) -> None:
    """Refuses to continue a run with another configuration, unless `allow_change` names what differs.

    Args:
        folder: output folder, for the message.
        record: `run.json` of the run.
        cfg: the configuration now.

    Raises:
        ConfigError: what differs.
    """
    before, now = dict(record.get("config") or {}), cfg.flat(mask_secrets=True)
    files = record.get("files") or {}
    for key, content in configuration_files(cfg).items():
        if key in files or not isinstance(before.get(key), str):  # what they hold counts, not where they lie
            now[key] = content
    before |= files
    ignored = _HARMLESS | {*_BATCH_KEYS} | set(type(cfg.export).model_fields)
    if hasattr(cfg.stage_options, "reward_functions"):  # it trains on answers that it samples
        if "given" in record:
            before, now = _as_given(before, record["given"]), _as_given(now, cfg.given_keys())
    else:
        ignored |= set(type(cfg.generation).model_fields)
    differences = {
        key: text for key, text in _differences(before, now, ignored).items() if not key.startswith(_HARMLESS_PREFIX)
    }
    fixed = differences.keys() & {*_IN_CHECKPOINT, *type(cfg.adapter_options).model_fields}
    if {before.get("optim"), now.get("optim")} == {"adamw_torch", "adamw_torch_fused"}:
        fixed -= {"optim"}  # the same numbers in another kernel
    asked = set(cfg.train.allow_change)
    if fixed & asked:
        raise problem(
            folder,
            "its checkpoints hold the adapter and the optimizer in their own form, so that a run that goes on cannot "
            f"change {', '.join(sorted(fixed & asked))}: " + "; ".join(differences[key] for key in sorted(fixed)),
            "undo the change, or start a new run in another output_dir with the checkpoint as adapter_name_or_path "
            "(or model_name_or_path)",
        )
    if not (wrong := [key for key in differences if key not in asked]):
        return
    fix = "choose another output_dir, set overwrite_output_dir: true to replace it, or undo the changes to resume"
    if fixed:
        fix += f" ({', '.join(sorted(fixed))} cannot change: the checkpoints hold the adapter and the optimizer)"
    else:
        more = "resume_from_checkpoint=true " if record.get("state") == "finished" else ""
        fix += f"; or resume with them: {more}--allow-change {','.join(wrong)}"
    raise problem(
        folder, "holds a run with another configuration: " + "; ".join(differences[key] for key in wrong), fix
    )


def _as_given(config: Mapping[str, Any], given: Any) -> dict[str, Any]:
    return {key: None if key in _SAMPLING_KEYS and key not in given else value for key, value in config.items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Set[str]) -> dict[str, str]:
    """`key old -> new` for each key that differs; a key that only one of them knows counts as null there."""
    changed: dict[str, str] = {}
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), json.loads(json.dumps(now.get(key)))
        if key not in ignored and old != new:
            changed[key] = "; ".join(_spelled(key, old, new))
    return changed


def _spelled(key: str, old: Any, new: Any) -> Iterator[str]:
    """`key old -> new`; of two mappings only the entries that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield f"{key} {json.dumps(old)} -> {json.dumps(new)}"
        return
    before, now = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield from _spelled(f"{key}.{name}", before.get(name), now.get(name))


def require_same_data(
    cfg: RunConfig, folder: Path, record: Mapping[str, Any] | None, data: Mapping[str, Any], num_processes: int
) -> None:
    """Refuses to continue a run with other rows or another number of rows in a step: the order would silently differ.

    Args:
        cfg: the resolved configuration.
        folder: output folder, for the message.
        record: `run.json` of the run that is continued, or None.
        data: the data report of this run.
        num_processes: that train together.

    Raises:
        ConfigError: what differs.
    """
    if record is None:
        return
    is_changed = _fingerprints(record.get("data", {})) != _fingerprints(data)
    if is_changed and "data" not in cfg.train.allow_change:
        raise problem(
            folder,
            "holds a run that was started with other rows: the data sets have changed since",
            "put the old rows back, set overwrite_output_dir: true to start anew, or --allow-change data to go on "
            "with the new ones",
        )
    before = _batch_shape(record.get("config", {}), record.get("num_processes", num_processes))
    now = _batch_shape(cfg.flat(), num_processes)
    if prod(before) != prod(now) and not set(_BATCH_KEYS) & set(cfg.train.allow_change):
        raise problem(
            folder,
            f"holds a run with {_describe_shape(before)}, and this one has {_describe_shape(now)}: its steps would "
            "hold other rows",
            f"keep {prod(before)} rows a step (NPROC_PER_NODE, {', '.join(_BATCH_KEYS)}), or set "
            "overwrite_output_dir: true to start anew",
        )
    if before != now:
        note(
            f"{_describe_shape(before)} before, {_describe_shape(now)} now: every step holds the rows that it would "
            "have held; losses may differ in their last digits"
        )


def require_same_base(cfg: RunConfig, folder: Path, record: Mapping[str, Any], base: str) -> None:
    """Refuses to continue a run beside other weights of its base model than those that it began with.

    Args:
        cfg: the resolved configuration.
        folder: output folder, for the message.
        record: `run.json` of the run; those of earlier versions have no fingerprint.
        base: fingerprint of the weights that are there now.

    Raises:
        ConfigError: the weights have changed.
    """
    if record.get("base") in (None, base) or _BASE_KEY in cfg.train.allow_change:
        return
    raise problem(
        folder,
        f"holds a run that began with other weights: those of {cfg.model.model_name_or_path}, or of an adapter beside "
        "it, have changed since",
        "put the old weights back, set overwrite_output_dir: true to start anew, or --allow-change "
        f"{_BASE_KEY} to go on with the new ones",
    )


def require_same_text(
    cfg: RunConfig, folder: Path, record: Mapping[str, Any] | None, parts: Mapping[str, str]
) -> None:
    """Refuses to continue a run whose rows would become other tokens than those that it began with.

    Args:
        cfg: the resolved configuration.
        folder: output folder, for the message.
        record: `run.json` of the run; those of earlier versions do not know their tokenizer and template.
        parts: see `data.cache_key.text_parts`.

    Raises:
        ConfigError: tokenizer or template have changed.
    """
    before = (record or {}).get("text") or {}
    others = [name for name in parts if name in before and before[name] != parts[name]]
    if wrong := [name for name in others if name not in cfg.train.allow_change]:
        raise problem(
            folder,
            f"holds a run that began with another {' and another '.join(wrong)}, whose content has changed since: its "
            "rows would become other tokens",
            "put the old one back, set overwrite_output_dir: true to start anew, or --allow-change "
            f"{','.join(wrong)} to go on with the new one",
        )


def say_other_versions(record: Mapping[str, Any] | None, versions: Mapping[str, str]) -> None:
    """Says which packages have changed since the run began: its rows stay, the last digits of its numbers may not."""
    old = (record or {}).get("packages") or {}
    others = [f"{name} {old[name]} -> {versions.get(name)}" for name in old if old[name] != versions.get(name)]
    if others:
        note(f"versions have changed since this run began, so its last digits may too: {'; '.join(others)}")


def _batch_shape(config: Mapping[str, Any], num_processes: int) -> tuple[int, int, int]:
    size, accumulation = (int(config.get(key) or 1) for key in _BATCH_KEYS)
    return num_processes, size, accumulation


def _describe_shape(shape: tuple[int, int, int]) -> str:
    num_processes, size, accumulation = shape
    return f"{prod(shape)} rows a step ({num_processes} processes x {size} rows x {accumulation} accumulated)"


def _fingerprints(data: Mapping[str, Any]) -> list[Any]:
    return [(one.get("name"), one.get("fingerprint")) for one in data.get("datasets", [])]


def problem(folder: Path, message: str, fix: str) -> ConfigError:
    """The error of an output folder that cannot be used."""
    return ConfigError(Problem(key="output_dir", given=str(folder), message=message, fix=fix))
