"""Whose folder is this? Decides, before anything is loaded, whether a run may start, resume or must not touch it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem
from llamafactory.extras.log import is_main_process, note
from llamafactory.train.checkpoint.folders import clear_leftovers, newest_checkpoint
from llamafactory.train.checkpoint.manifest import find_fault

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

RUN_FILE = "run.json"
LINKS = ("last", "best")
OWN_FILES = (
    "README.md", "trainer_log.jsonl", "trainer_log.1.jsonl", "trainer_state.json", "*_results.json", "training_*.png",
    "adapter_*.safetensors", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja",
    "generated_predictions.*", ".staging-*", *LINKS, RUN_FILE,
)  # fmt: skip
"""What a run writes into its folder, as patterns; `run.json` goes last."""
_MODEL_MARKS = ("adapter_config.json", "config.json", "adapter_model.safetensors", "model.safetensors")
_HARMLESS = frozenset(
    {"resume_from_checkpoint", "overwrite_output_dir", "logging_steps", "logging_first_step", "save_steps",
     "save_strategy", "save_total_limit", "save_only_model", "eval_steps", "eval_strategy", "eval_on_start",
     "per_device_eval_batch_size", "plot_loss", "report_to", "run_name", "disable_tqdm", "ddp_timeout",
     "print_param_status", "include_num_input_tokens_seen", "include_effective_tokens_per_second", "hf_hub_token",
     "offline", "cache_dir", "preprocessing_num_workers", "do_eval", "do_predict",
     "predict_with_generate", "async_save", "verify_after_save", "save_grace",
     "allow_change", "rerun_of", "on_nan", "load_best_model_at_end", "early_stopping_steps",
     "ignore_plan", "tokenized_path", "overwrite_cache", "output_dir"}
)  # fmt: skip


_BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What may be done with an output folder.

    Attributes:
        output_dir: the folder; it exists and is writable.
        run_id: new, or that of the run that is continued.
        resume_from: checkpoint folder to continue, or None to start at step 0.
        replaces: whether an earlier run's files are removed before the first file is written.
        record: `run.json` of the run that is continued, or None.
    """

    output_dir: Path
    run_id: str
    resume_from: Path | None = None
    replaces: bool = False
    record: Mapping[str, Any] | None = None


def claim_output_dir(cfg: RunConfig) -> Claim:
    """Looks at `output_dir` and decides.

    An unfinished run of the same configuration is continued at its newest intact checkpoint, or at the one that
    `resume_from_checkpoint` names. Other model files in the folder are an error unless `overwrite_output_dir` is set;
    then they go only once this run has something to write.

    Raises:
        ConfigError: not writable, it holds another or a finished run, or there is no checkpoint to resume.
        LlamaFactoryError: it has checkpoints and none is intact, or the named one is not.
    """
    folder = Path(cfg.train.output_dir or "")
    make_writable(folder)
    if is_main_process():
        clear_leftovers(folder)
    asked = cfg.train.resume_from_checkpoint
    named = Path(asked) if isinstance(asked, str) else None
    if cfg.train.overwrite_output_dir and not asked:
        return Claim(output_dir=folder, run_id=uuid.uuid4().hex, replaces=_read_record(folder) is not None)
    if named is not None and (fault := find_fault(named)):
        raise LlamaFactoryError(f"resume_from_checkpoint: {named} is not used: {fault}")
    record = _read_record(folder if named is None else named.parent)
    if record is None:
        if asked:
            raise _problem(folder, "has no run.json, so there is no run to resume", "remove resume_from_checkpoint")
        _refuse_foreign_model(folder)
        return Claim(output_dir=folder, run_id=uuid.uuid4().hex)
    _require_same_configuration(folder, record, cfg)
    if record.get("state") == "finished" and named is None:
        raise _problem(
            folder,
            "holds this run already, finished",
            "choose another output_dir, or set overwrite_output_dir: true to train again",
        )
    checkpoint = named or newest_checkpoint(folder, record["run_id"])
    if asked and checkpoint is None:
        raise _problem(folder, "has no checkpoint to resume", "remove resume_from_checkpoint")
    return Claim(
        output_dir=folder,
        run_id=record["run_id"],
        resume_from=checkpoint,
        replaces=checkpoint is None,
        record=record if checkpoint else None,
    )


def require_same_data(cfg: RunConfig, claim: Claim, data: Mapping[str, Any], num_processes: int) -> None:
    """Refuses to continue a run with other rows or another number of rows in a step: the order would silently differ.

    Raises:
        ConfigError: what differs.
    """
    record = claim.record
    if record is None:
        return
    is_changed = _fingerprints(record.get("data", {})) != _fingerprints(data)
    if is_changed and "data" not in cfg.train.allow_change:
        raise _problem(
            claim.output_dir,
            "holds a run that was started with other rows: the data sets have changed since",
            "put the old rows back, set overwrite_output_dir: true to start anew, or --allow-change data to go on "
            "with the new ones",
        )
    before = _batch_shape(record.get("config", {}), record.get("num_processes", num_processes))
    now = _batch_shape(cfg.flat(), num_processes)
    if prod(before) != prod(now) and not set(_BATCH_KEYS) & set(cfg.train.allow_change):
        raise _problem(
            claim.output_dir,
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


def _batch_shape(config: Mapping[str, Any], num_processes: int) -> tuple[int, int, int]:
    size, accumulation = (int(config.get(key) or 1) for key in _BATCH_KEYS)
    return num_processes, size, accumulation


def _describe_shape(shape: tuple[int, int, int]) -> str:
    num_processes, size, accumulation = shape
    return f"{prod(shape)} rows a step ({num_processes} processes x {size} rows x {accumulation} accumulated)"


def clear_replaced_run(claim: Claim) -> None:
    """Removes the files of the run that is replaced; files that no run of ours writes stay."""
    if not claim.replaces:
        return
    for pattern in (*OWN_FILES[:-1], "checkpoint-*", RUN_FILE):
        for path in sorted(claim.output_dir.glob(pattern)):
            if path.is_symlink() or not path.is_dir():
                if path.is_symlink() or path.name not in LINKS:
                    path.unlink()
            elif path.name.startswith(".staging-") or (path / "trainer_state.json").is_file():
                shutil.rmtree(path)


def _require_same_configuration(folder: Path, record: Mapping[str, Any], cfg: RunConfig) -> None:
    ignored = (
        _HARMLESS
        | {*_BATCH_KEYS, *cfg.train.allow_change}
        | set(type(cfg.generation).model_fields)
        | set(type(cfg.export).model_fields)
    )
    differences = _differences(record.get("config", {}), cfg.flat(mask_secrets=True), ignored)
    if differences:
        raise _problem(
            folder,
            "holds a run with another configuration: " + "; ".join(differences),
            "choose another output_dir, set overwrite_output_dir: true to replace it, undo the changes to resume, or "
            f"resume with them: --allow-change {','.join(one.split()[0] for one in differences)}",
        )


def _fingerprints(data: Mapping[str, Any]) -> list[Any]:
    return [(one.get("name"), one.get("fingerprint")) for one in data.get("datasets", [])]


def make_writable(folder: Path) -> None:
    """Makes the folder where it is missing, and tries to write into it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _problem(
            folder, f"cannot be written: {error.strerror or error}", "give a folder that this user may write to"
        ) from error


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _problem(
            folder, f"its {RUN_FILE} is damaged ({error})", "remove that file, or set overwrite_output_dir: true"
        ) from error


def _refuse_foreign_model(folder: Path) -> None:
    found = [name for name in _MODEL_MARKS if (folder / name).exists()]
    found += [path.name for path in folder.glob("checkpoint-*")]
    if found:
        raise _problem(
            folder,
            f"holds files of another run ({', '.join(sorted(set(found))[:4])})",
            "choose another output_dir, or set overwrite_output_dir: true",
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Set[str]) -> list[str]:
    """`key old -> new` for each key that differs; a key that only one of them knows counts as null there."""
    changed = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), json.loads(json.dumps(now.get(key)))
        if key not in ignored and old != new:
            changed.append(f"{key} {json.dumps(old)} -> {json.dumps(new)}")
    return changed


def _problem(folder: Path, message: str, fix: str) -> ConfigError:
    return ConfigError(Problem(key="output_dir", given=str(folder), message=message, fix=fix))
