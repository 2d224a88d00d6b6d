"""What a training run needs and what it reports: records between the parts of a run, no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from llamafactory.hparams.train import TrainConfig
    from llamafactory.train.checkpoint.state import RunState
    from llamafactory.train.feed import Feed
    from llamafactory.train.model_files import ModelFiles
    from llamafactory.train.predict import Predictions
    from llamafactory.train.rollout import Rollouts
    from llamafactory.train.stream_feed import StreamFeed


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What changes the weights: the prepared optimizer, and the schedule that is stepped once an optimizer step."""

    optimizer: Optimizer
    scheduler: LRScheduler


@dataclass(kw_only=True)
class Progress:
    """How far a run is, for those who look on from another thread.

    Attributes:
        step: optimizer steps that were begun; 0 before the first one.
    """

    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a training run needs, ready-made.

    Attributes:
        cfg: the section of training keys.
        output_dir: of the run.
        run_id: of the run.
        accelerator: devices and ranks.
        module: the prepared `StageModule`.
        updates: optimizer and schedule, or None for a run that only evaluates.
        feed: training batches.
        evaluation: prefix of the metric names (`eval`, or `eval_<name>`) -> batches.
        total_steps: optimizer steps of the whole run.
        start: where to begin; its step is 0 for a new run.
        model_files: writes the model and tokenizer files.
        step_flops: FLOPs of a window, `(lengths, num_targets) -> FLOPs`, or None where the model's are not known.
        measure_peak: measures the FLOP/s that all ranks' devices reach in a plain matrix product.
        is_async: whether checkpoints are written while training goes on.
        facts: what every checkpoint says of the run besides its id and step.
        is_sharded: whether parameters and optimizer are spread over the processes.
        first_step_is_over: called once, when this process has done its first step.
        progress: kept up to date by the loop.
        predictions: of the evaluation rows, or None where there are none.
    """

    cfg: TrainConfig
    output_dir: Path
    run_id: str
    accelerator: Accelerator
    module: nn.Module
    updates: Updates | None
    feed: Feed | StreamFeed | Rollouts
    evaluation: Mapping[str, Feed | Rollouts]
    total_steps: int
    start: RunState
    model_files: ModelFiles
    step_flops: Callable[[list[int], int], int | None]
    measure_peak: Callable[[], float]
    is_async: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_sharded: bool = False
    first_step_is_over: Callable[[], None] = lambda: None
    predictions: Predictions | None = None
    progress: Progress = field(default_factory=Progress)

    def doing(self) -> str:
        """The step that is being done and its rows, in words; empty before the first one."""
        if not self.progress.step:
            return ""
        rows = self.feed.rows(self.progress.step - 1)
        more = f" and {len(rows) - 12} more" if len(rows) > 12 else ""
        return f"step {self.progress.step}, rows: {', '.join(rows[:12])}{more}"


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a finished or interrupted loop reports.

    Attributes:
        state: at the last completed step.
        stop_signal: number of the signal that stopped the run, or 0.
        metrics: the compatible names, for `train_results.json`.
        last_checkpoint: the newest one that this process wrote.
        evaluation: what `evaluate` found after the last step, or None where it was not evaluated then.
        save_failure: why the last checkpoint could not be written, or None.
        stopped_early: evaluations in a row that were no better, where they ended the run.
    """

    state: RunState
    stop_signal: int
    metrics: dict[str, float]
    last_checkpoint: Path | None
    evaluation: dict[str, float] | None
    save_failure: str | None = None
    stopped_early: int = 0
