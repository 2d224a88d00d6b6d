"""Whose folder is this? Decides, before anything is loaded, whether a run may start, resume or must not touch it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.log import is_main_process, note, warn
from llamafactory.train.checkpoint.folders import clear_leftovers, list_checkpoints, newest_checkpoint
from llamafactory.train.checkpoint.manifest import MANIFEST, find_fault, read_facts
from llamafactory.train.continuity import problem, require_same_configuration

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

RUN_FILE = "run.json"
RECORD_FORMAT = 1
LINKS = ("last", "best")
OWN_FILES = (
    "README.md", "trainer_log.jsonl", "trainer_log.1.jsonl", "trainer_state.json", "*_results.json", "training_*.png",
    "adapter_*.safetensors", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja",
    "generated_predictions.*", ".staging-*", *LINKS, RUN_FILE,
)  # fmt: skip
"""What a run writes into its folder, as patterns; `run.json` goes last."""
_FINISHED = (
    "choose another output_dir, or set overwrite_output_dir: true to train again; for more steps: "
    "resume_from_checkpoint=true with a larger num_train_epochs or max_steps and --allow-change of that key"
)
_MODEL_MARKS = ("adapter_config.json", "config.json", "adapter_model.safetensors", "model.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What may be done with an output folder.

    Attributes:
        output_dir: the folder; it exists and is writable.
        run_id: new, or that of the run that is continued.
        resume_from: checkpoint folder to continue, or None to start at step 0.
        replaces: whether an earlier run's files are removed before the first file is written.
        record: `run.json` of the run that is continued, or None.
        times_continued: how often this run was started before; checkpoints of later times are newer.
    """

    output_dir: Path
    run_id: str
    resume_from: Path | None = None
    replaces: bool = False
    record: Mapping[str, Any] | None = None
    times_continued: int = 0


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
    asked = cfg.train.resume_from_checkpoint or None
    if cfg.train.overwrite_output_dir and not asked:
        _warn_of_work_that_goes(folder)
        return Claim(output_dir=folder, run_id=uuid.uuid4().hex, replaces=_has_record(folder))
    if isinstance(asked, str):
        return _claim_for(Path(asked), folder, cfg)
    record = _read_record(folder)
    if record is None:
        if asked:
            raise problem(folder, "has no run.json, so there is no run to resume", "remove resume_from_checkpoint")
        _refuse_foreign_model(folder)
        return Claim(output_dir=folder, run_id=uuid.uuid4().hex)
    require_same_configuration(folder, record, cfg)
    if record.get("state") == "finished" and not asked:
        raise problem(folder, "holds this run already, finished", _FINISHED)
    checkpoint = newest_checkpoint(folder, record["run_id"])
    if checkpoint is None:
        if asked:
            raise problem(folder, "has no checkpoint to resume", "remove resume_from_checkpoint")
        _refuse_foreign_checkpoints(folder)
    return _continuing(folder, record, checkpoint)


def _claim_for(checkpoint: Path, folder: Path, cfg: RunConfig) -> Claim:
    """The claim of a run that goes on from a named checkpoint, which may lie elsewhere.

    Raises:
        ConfigError: it is no checkpoint of this run's configuration, or the output folder holds another run.
        LlamaFactoryError: it is damaged.
    """
    if fault := find_fault(checkpoint):
        raise LlamaFactoryError(f"resume_from_checkpoint: {checkpoint} is not used: {fault}{_hint(checkpoint)}")
    source = checkpoint.parent if _has_record(checkpoint.parent) else checkpoint.resolve().parent
    record = _read_record(source)
    if record is None:
        raise problem(
            source,
            f"has no run.json, so there is no run to resume: it lies beside {checkpoint.name} where that was written",
            "put it there too, or give the checkpoint as adapter_name_or_path (or model_name_or_path) of a new run",
        )
    require_same_configuration(source, record, cfg)
    if folder.resolve() == source.resolve():
        return _continuing(folder, record, checkpoint)
    replaces = False
    if cfg.train.overwrite_output_dir:
        replaces = _has_record(folder) and _run_id(folder) != record["run_id"]
    elif (own := _read_record(folder)) is None:
        _refuse_foreign_model(folder)
    elif own["run_id"] != record["run_id"]:
        raise problem(
            folder,
            f"holds another run than that of {checkpoint}",
            "choose another output_dir, or set overwrite_output_dir: true to replace it",
        )
    elif own.get("state") == "finished":
        raise problem(folder, "holds this run already, finished", _FINISHED)
    return _continuing(folder, record, checkpoint, replaces=replaces)


def _continuing(
    folder: Path, record: Mapping[str, Any], checkpoint: Path | None, *, replaces: bool | None = None
) -> Claim:
    times = record.get("times_continued")
    return Claim(
        output_dir=folder,
        run_id=record["run_id"],
        resume_from=checkpoint,
        replaces=checkpoint is None if replaces is None else replaces,
        record=record if checkpoint else None,
        times_continued=times + 1 if isinstance(times, int) else 1,
    )


def _hint(folder: Path) -> str:
    """What to do with a folder of weights that another program wrote."""
    if (folder / MANIFEST).exists():
        return ""
    key = "adapter_name_or_path" if (folder / "adapter_config.json").is_file() else "model_name_or_path"
    is_model = any((folder / name).is_file() for name in _MODEL_MARKS)
    return f". Its weights can begin a new run: {key}: {folder}" if is_model else ""


def clear_replaced_run(claim: Claim) -> None:
    """Removes the files of the run that is replaced; what no run of ours writes, and checkpoints of others, stay."""
    if not claim.replaces:
        return
    replaced = _run_id(claim.output_dir)
    for pattern in (*OWN_FILES[:-1], "checkpoint-*", RUN_FILE):
        for path in sorted(claim.output_dir.glob(pattern)):
            if path.is_symlink() or not path.is_dir():
                if path.is_symlink() or path.name not in LINKS:
                    path.unlink()
            elif path.name.startswith(".staging-"):
                shutil.rmtree(path)
            elif (path / "trainer_state.json").is_file():
                if read_facts(path).get("run_id", replaced) == replaced:
                    shutil.rmtree(path)
                else:
                    note(f"{path} stays: another run wrote it")


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
        raise problem(
            folder, f"cannot be written: {error.strerror or error}", "give a folder that this user may write to"
        ) from error


def _read_record(folder: Path) -> dict[str, Any] | None:
    """`run.json` of a folder, or None where there is none.

    Raises:
        ConfigError: it is damaged, or of a later version.
    """
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("run_id"), str):
            raise ValueError("it names no run")
        if not all(
            isinstance(record.get(part, {}), dict) for part in ("config", "files", "data", "plan", "packages", "text")
        ):
            raise ValueError("it is no record of a run")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise problem(
            folder,
            f"its {RUN_FILE} is damaged ({error})",
            "put a whole one in its place, choose another output_dir, or set overwrite_output_dir: true to start anew",
        ) from error
    if record.get("format", RECORD_FORMAT) != RECORD_FORMAT:
        raise problem(
            folder,
            f"its {RUN_FILE} has format {record['format']}, and this version reads {RECORD_FORMAT}",
            "continue the run with the version that began it, or choose another output_dir",
        )
    return record


def _has_record(folder: Path) -> bool:
    return (folder / RUN_FILE).exists()


def _run_id(folder: Path) -> str | None:
    """The run that a folder's `run.json` names, or None where that cannot be read."""
    try:
        return _read_record(folder)["run_id"]  # pyright: ignore[reportOptionalSubscript]
    except (LlamaFactoryError, TypeError):
        return None


def _warn_of_work_that_goes(folder: Path) -> None:
    try:
        record = _read_record(folder) or {"state": "finished"}
    except LlamaFactoryError:
        return
    if record.get("state") != "finished" and (found := list_checkpoints(folder)):
        warn(
            f"{folder} holds an unfinished run up to {found[-1].name}: overwrite_output_dir starts anew, and "
            "removes it when the model is loaded; resume_from_checkpoint=true would go on with it"
        )


def _refuse_foreign_checkpoints(folder: Path) -> None:
    """A run without a checkpoint of its own starts anew; it must not do so among those of another run."""
    if found := [path.name for path in list_checkpoints(folder)]:
        raise problem(
            folder,
            f"holds no checkpoint of this run, but of another one ({', '.join(found[:4])})",
            f"to go on from it: resume_from_checkpoint={folder / found[-1]}; or move it away; or choose another "
            "output_dir",
        )


def _refuse_foreign_model(folder: Path) -> None:
    found = [name for name in _MODEL_MARKS if (folder / name).exists()]
    found += [path.name for path in folder.glob("checkpoint-*")]
    if found:
        raise problem(
            folder,
            f"holds files of another run ({', '.join(sorted(set(found))[:4])})",
            "choose another output_dir, or set overwrite_output_dir: true",
        )
