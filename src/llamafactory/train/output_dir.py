"""Whose folder is this? Decides, before anything is loaded, whether a run may start, resume or must not touch it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.extras.errors import ConfigError, Problem

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

RUN_FILE = "run.json"
OWN_FILES = (
    RUN_FILE, "README.md", "trainer_log.jsonl", "trainer_state.json", "all_results.json", "train_results.json",
    "eval_results.json", "training_loss.png", "training_eval_loss.png", "bad_rows.jsonl",
    "adapter_model.safetensors", "adapter_config.json",
)  # fmt: skip
_MODEL_MARKS = ("adapter_config.json", "config.json", "adapter_model.safetensors", "model.safetensors")
_HARMLESS = frozenset(
    {"resume_from_checkpoint", "overwrite_output_dir", "logging_steps", "logging_first_step", "save_steps",
     "save_strategy", "save_total_limit", "save_only_model", "eval_steps", "eval_strategy", "eval_on_start",
     "per_device_eval_batch_size", "plot_loss", "report_to", "run_name", "disable_tqdm", "ddp_timeout",
     "print_param_status", "include_num_input_tokens_seen", "include_effective_tokens_per_second", "hf_hub_token",
     "offline", "cache_dir", "preprocessing_num_workers", "do_eval"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What may be done with an output folder.

    Attributes:
        output_dir: the folder; it exists and is writable.
        run_id: new, or that of the run that is continued.
        resume_from: checkpoint folder to continue, or None to start at step 0.
        replaces: whether another run's files are removed before the first file is written.
    """

    output_dir: Path
    run_id: str
    resume_from: Path | None
    replaces: bool


def claim_output_dir(cfg: RunConfig) -> Claim:
    """Looks at `output_dir` and decides.

    An unfinished run of the same configuration is continued at its newest intact checkpoint. Other model files in the
    folder are an error unless `overwrite_output_dir` is set; then they go only once this run has something to write.

    Raises:
        ConfigError: not writable, or it holds another, or a finished, run.
        LlamaFactoryError: it has checkpoints and none is intact.
    """
    from llamafactory.train.checkpoint import newest_checkpoint

    folder = Path(cfg.train.output_dir or "")
    _make_writable(folder)
    new = Claim(output_dir=folder, run_id=uuid.uuid4().hex, resume_from=None, replaces=False)
    explicit = cfg.train.resume_from_checkpoint
    if isinstance(explicit, str):
        return Claim(
            output_dir=folder, run_id=_run_id(folder) or new.run_id, resume_from=Path(explicit), replaces=False
        )
    wants_resume = explicit is True
    if cfg.train.overwrite_output_dir and not wants_resume:
        return Claim(output_dir=folder, run_id=new.run_id, resume_from=None, replaces=True)
    record = _read_record(folder)
    if record is None:
        _refuse_foreign_model(folder)
        return new
    ignored = _HARMLESS | set(type(cfg.generation).model_fields) | set(type(cfg.export).model_fields)
    differences = _differences(record.get("config", {}), cfg.flat(mask_secrets=True), ignored)
    if differences:
        raise _problem(
            folder,
            "holds a run with another configuration: " + "; ".join(differences),
            "choose another output_dir, set overwrite_output_dir: true to replace it, or undo the changes to resume",
        )
    if record.get("state") == "finished":
        raise _problem(
            folder,
            "holds this run already, finished",
            "choose another output_dir, or set overwrite_output_dir: true to train again",
        )
    checkpoint = newest_checkpoint(folder)
    return Claim(output_dir=folder, run_id=record["run_id"], resume_from=checkpoint, replaces=checkpoint is None)


def clear_replaced_run(claim: Claim) -> None:
    """Removes the files of the run that is replaced; files that no run of ours writes stay."""
    if not claim.replaces:
        return
    for name in OWN_FILES:
        (claim.output_dir / name).unlink(missing_ok=True)
    for folder in claim.output_dir.glob("checkpoint-*"):
        if (folder / "trainer_state.json").is_file():
            shutil.rmtree(folder)
    for folder in claim.output_dir.glob(".staging-*"):
        shutil.rmtree(folder)


def _make_writable(folder: Path) -> None:
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


def _run_id(folder: Path) -> str | None:
    record = _read_record(folder)
    return record.get("run_id") if record else None


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
    changed = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), json.loads(json.dumps(now.get(key)))
        if key not in ignored and old != new:
            changed.append(f"{key} {json.dumps(old)} -> {json.dumps(new)}")
    return changed[:8] + ([f"and {len(changed) - 8} more"] if len(changed) > 8 else [])


def _problem(folder: Path, message: str, fix: str) -> ConfigError:
    return ConfigError(Problem(key="output_dir", given=str(folder), message=message, fix=fix))
