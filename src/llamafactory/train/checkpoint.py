"""Checkpoints: written beside, verified, then renamed into place; safetensors and JSON only.

Protocol: files go to `.staging-<step>-<pid>`, each is fsynced, `MANIFEST.json` with sizes and sha256 is written last,
the folder is renamed to `checkpoint-<step>`, the parent is fsynced, and only then are old checkpoints removed. Loading
takes the newest checkpoint whose manifest verifies.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from llamafactory.extras import log
from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.files import fsync, sha256_of

MANIFEST = "MANIFEST.json"
STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"
_RNG = "rng_state.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a checkpoint holds besides tensors.

    Attributes:
        run_id: of the run that wrote it; other runs' checkpoints are never pruned or resumed.
        step: optimizer steps done.
        epoch: passes over the data done, as a float.
        scheduler: state of the learning-rate schedule, JSON-able.
        log_history: rows of the log so far.
        num_tokens: input tokens seen so far, over all ranks, padding left out.
        num_supervised_tokens: those of them that were trained on.
        seconds: of training so far.
        scaler: state of fp16 loss scaling, or empty.
    """

    run_id: str
    step: int
    epoch: float
    scheduler: Mapping[str, Any]
    log_history: list[dict[str, Any]]
    num_tokens: int
    num_supervised_tokens: int
    seconds: float
    scaler: Mapping[str, Any] = field(default_factory=dict)


def fresh_state(run_id: str) -> RunState:
    """The state before the first step."""
    return RunState(
        run_id=run_id,
        step=0,
        epoch=0.0,
        scheduler={},
        log_history=[],
        num_tokens=0,
        num_supervised_tokens=0,
        seconds=0.0,
    )


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    *,
    write_model: Callable[[Path], None],
    optimizer: Optimizer | None,
    limit: int | None,
) -> Path:
    """Writes `checkpoint-<step>`; the previous one stays until this one is complete.

    Args:
        output_dir: of the run.
        state: see `RunState`.
        write_model: writes weights and tokenizer files into a folder.
        optimizer: its state is saved too; None saves weights only (`save_only_model`).
        limit: checkpoints to keep, or None for all.

    Returns:
        The folder.
    """
    staging = output_dir / f".staging-{state.step}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write_model(staging)
        _write_state(staging, state, optimizer)
        _seal(staging, state)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    target = output_dir / f"checkpoint-{state.step}"
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    fsync(output_dir)
    _prune(output_dir, state.run_id, limit)
    return target


def _write_state(folder: Path, state: RunState, optimizer: Optimizer | None) -> None:
    if optimizer is not None:
        save_file(_optimizer_tensors(optimizer), folder / _OPTIMIZER)
        save_file(_rng_tensors(), folder / _RNG)
    document = {
        "run_id": state.run_id,
        "global_step": state.step,
        "epoch": state.epoch,
        "scheduler": dict(state.scheduler),
        "num_tokens": state.num_tokens,
        "num_supervised_tokens": state.num_supervised_tokens,
        "scaler": dict(state.scaler),
        "seconds": state.seconds,
        "param_groups": [] if optimizer is None else _group_options(optimizer),
        "log_history": state.log_history,
    }
    (folder / STATE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Raises:
        LlamaFactoryError: there are checkpoints, and none of them verifies.
    """
    candidates = list_checkpoints(output_dir)
    for folder in reversed(candidates):
        fault = verify_checkpoint(folder)
        if fault is None:
            return folder
        log.warn(f"{folder} is not used: {fault}")
    if candidates:
        raise LlamaFactoryError(
            f"{output_dir}: none of {len(candidates)} checkpoints is intact. Restore one from a backup, or start "
            "again with overwrite_output_dir: true."
        )
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, oldest first."""
    found = [
        (int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def verify_checkpoint(folder: Path) -> str | None:
    """Reads every file and compares it with the manifest.

    Returns:
        None if all is well, else what is wrong and with which file.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing (the save did not finish, or another program wrote the folder)"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if sha256_of(path) != expected["sha256"]:
            return f"{name} is damaged (its sha256 differs)"
    return None


def load_state(folder: Path) -> RunState:
    """Reads the state of a verified checkpoint."""
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return RunState(
        run_id=document["run_id"],
        step=document["global_step"],
        epoch=document["epoch"],
        scheduler=document["scheduler"],
        log_history=document["log_history"],
        num_tokens=document["num_tokens"],
        num_supervised_tokens=document["num_supervised_tokens"],
        scaler=document["scaler"],
        seconds=document["seconds"],
    )


def restore_training(folder: Path, optimizer: Optimizer) -> None:
    """Puts the optimizer's moments and the random generators back.

    Raises:
        LlamaFactoryError: the checkpoint holds weights only.
    """
    if not (folder / _OPTIMIZER).is_file():
        raise LlamaFactoryError(
            f"{folder} holds weights only (save_only_model), so training cannot continue from it exactly. Give it as "
            "adapter_name_or_path (or model_name_or_path) of a new run instead."
        )
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    _load_optimizer(optimizer, load_file(folder / _OPTIMIZER), document["param_groups"])
    _load_rng(load_file(folder / _RNG))


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    tensors: dict[str, torch.Tensor] = {}
    for index, values in state.items():
        for name, value in values.items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
            tensors[f"{index}.{name}"] = tensor.detach().cpu().contiguous().clone()
    return tensors


def _group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if isinstance(value, str | int | float | bool | list | tuple)}
        for group in optimizer.state_dict()["param_groups"]
    ]


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    current = optimizer.state_dict()
    merged = [{**ours, **saved} for ours, saved in zip(current["param_groups"], groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _rng_tensors() -> dict[str, torch.Tensor]:
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, pending = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": torch.tensor([version, float("nan") if pending is None else pending], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _load_rng(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["torch"])
    position, has_gauss, gauss = tensors["numpy_rest"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    version, pending = tensors["python_rest"].tolist()
    random.setstate((int(version), tuple(tensors["python"].tolist()), None if pending != pending else pending))
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("cuda.")]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)


def _seal(staging: Path, state: RunState) -> None:
    """Fsyncs every file and writes the manifest last."""
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        fsync(path)
        files[str(path.relative_to(staging))] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"format": 1, "run_id": state.run_id, "step": state.step, "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    fsync(staging / MANIFEST)
    fsync(staging)


def _prune(output_dir: Path, run_id: str, limit: int | None) -> None:
    """Removes this run's oldest checkpoints beyond `limit`; folders of other runs are left alone."""
    if limit is None or limit <= 0:
        return
    own = [path for path in list_checkpoints(output_dir) if _run_id(path) == run_id]
    for path in own[:-limit]:
        trash = path.with_name(f".trash-{path.name}")
        path.rename(trash)
        shutil.rmtree(trash)


def _run_id(folder: Path) -> str | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError):
        return None
