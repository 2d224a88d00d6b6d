"""What a checkpoint knows besides tensors: `trainer_state.json`. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llamafactory.extras.errors import LlamaFactoryError

STATE = "trainer_state.json"


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
        data: where in the data the next step begins, as the feed says it.
        best: the best evaluation so far, as `train.selection` keeps it; empty where none was.
        num_skipped: steps whose gradient was not finite and left out (`on_nan: skip:N`).
        loss_sum: losses of all steps so far, over all ranks.
        num_units: what they are divided by for their mean.
    """

    run_id: str
    step: int
    epoch: float
    scheduler: Mapping[str, Any]
    log_history: list[dict[str, Any]]
    num_tokens: int
    num_supervised_tokens: int
    seconds: float
    scaler: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    best: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_skipped: int = 0
    loss_sum: float = 0.0
    num_units: int = 0


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


def write_state(folder: Path, state: RunState, **more: Any) -> None:
    """Writes `trainer_state.json`; `more` are further JSON-able entries."""
    document = {
        "run_id": state.run_id,
        "global_step": state.step,
        "epoch": state.epoch,
        "scheduler": dict(state.scheduler),
        "num_tokens": state.num_tokens,
        "num_supervised_tokens": state.num_supervised_tokens,
        "scaler": dict(state.scaler),
        "seconds": state.seconds,
        "data": dict(state.data),
        "best": dict(state.best),
        "num_skipped": state.num_skipped,
        "loss_sum": state.loss_sum,
        "num_units": state.num_units,
        **more,
        "log_history": state.log_history,
    }
    (folder / STATE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_document(folder: Path) -> dict[str, Any]:
    """The whole `trainer_state.json` of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns what a verified checkpoint holds, and cannot be, into one clear error.

    Raises:
        LlamaFactoryError: its files are those of its manifest, but not what this program writes.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise LlamaFactoryError(
            f"{folder} cannot be used: its files are as they were saved, but hold something else than they should "
            f"({type(error).__name__}: {error}). resume_from_checkpoint takes an older one."
        ) from error


def load_state(folder: Path) -> RunState:
    """Reads the state of a verified checkpoint.

    Raises:
        LlamaFactoryError: it holds something else.
    """
    with reading(folder):
        return _state_of(read_document(folder))


def _state_of(document: Mapping[str, Any]) -> RunState:
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
        data=document.get("data", {}),
        best=document.get("best", {}),
        num_skipped=document.get("num_skipped", 0),
        loss_sum=document.get("loss_sum", 0.0),
        num_units=document.get("num_units", 0),
    )
