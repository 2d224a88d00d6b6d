"""The one training loop: step, log, evaluate, save, stop. Stages, data and models come in ready-made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.train import step as steps
from llamafactory.train.checkpoint import RunState, save_checkpoint
from llamafactory.train.log import RunLog
from llamafactory.train.signals import StopRequest
from llamafactory.train.step import summed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from llamafactory.hparams.train import TrainConfig
    from llamafactory.train.feed import Feed


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What changes the weights: the prepared optimizer, and the schedule that is stepped once an optimizer step."""

    optimizer: Optimizer
    scheduler: LRScheduler


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
        write_model: writes the model and tokenizer files into a folder.
        step_flops: FLOPs of a window, `(lengths, num_targets) -> FLOPs`, or None where the model's are not known.
        measure_peak: measures the FLOP/s that all ranks' devices reach in a plain matrix product.
    """

    cfg: TrainConfig
    output_dir: Path
    run_id: str
    accelerator: Accelerator
    module: nn.Module
    updates: Updates | None
    feed: Feed
    evaluation: Mapping[str, Feed]
    total_steps: int
    start: RunState
    write_model: Callable[[Path], None]
    step_flops: Callable[[list[int], int], int | None]
    measure_peak: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a finished or interrupted loop reports.

    Attributes:
        state: at the last completed step.
        stop_signal: number of the signal that stopped the run, or 0.
        metrics: the compatible names, for `train_results.json`.
        last_checkpoint: the newest one that this process wrote.
        evaluation: what `evaluate` found after the last step, or None where it was not evaluated then.
    """

    state: RunState
    stop_signal: int
    metrics: dict[str, float]
    last_checkpoint: Path | None
    evaluation: dict[str, float] | None


def fit(job: Job) -> FitResult:
    """Trains from `job.start` to `job.total_steps`, or until a signal asks to stop.

    Raises:
        LlamaFactoryError: the loss is not finite.
    """
    run = _Run(job)
    with run.log, StopRequest() as stop:
        if job.cfg.eval_on_start and run.step == 0:
            run.evaluate()
        while run.step < job.total_steps:
            if run.agree_to_stop(stop):
                break
            run.train_step()
            if run.is_due(job.cfg.logging_steps) or (run.step == 1 and job.cfg.logging_first_step):
                run.log_training()
            if job.cfg.eval_strategy != "no" and run.is_moment(job.cfg.eval_strategy, job.cfg.eval_steps):
                run.evaluate()
            if job.cfg.save_strategy != "no" and run.is_moment(job.cfg.save_strategy, job.cfg.save_steps):
                run.save()
        run.log_training()
        if run.stop_signal or job.cfg.save_strategy != "no":
            run.save()
        return run.result()


def evaluate(job: Job) -> dict[str, float]:
    """Evaluates every evaluation set once.

    Returns:
        The compatible names: `eval_loss` in nats per supervised token, run time in seconds, and rates.
    """
    values: dict[str, float] = {}
    for prefix, feed in job.evaluation.items():
        started = time.monotonic()
        batches = feed.one_pass(job.accelerator.process_index)
        loss, units = steps.evaluation_loss(job.accelerator, job.module, batches)
        seconds = time.monotonic() - started
        values |= {
            f"{prefix}_loss": loss,
            f"{prefix}_runtime": round(seconds, 4),
            f"{prefix}_samples_per_second": round(len(feed.examples) / seconds, 3),
            f"{prefix}_steps_per_second": round(feed.schedule.windows_per_epoch / seconds, 3),
            f"{prefix}_supervised_tokens": float(units),
        }
    return values


class _Run:
    """The moving parts of one call of `fit`."""

    def __init__(self, job: Job) -> None:
        if job.updates is None:
            raise ValueError("a job without optimizer cannot train")
        self.job, self.updates = job, job.updates
        self.step = job.start.step
        self.supervised = job.start.num_supervised_tokens
        self.last_checkpoint: Path | None = None
        self.log = RunLog(
            job.output_dir,
            total_steps=job.total_steps,
            done_steps=job.start.step,
            history=job.start.log_history,
            bar=None if job.cfg.disable_tqdm is None else not job.cfg.disable_tqdm,
            tracker=(lambda row, at: job.accelerator.log(row, step=at)) if job.cfg.report_to else None,
        )
        self.num_tokens = job.start.num_tokens
        self.stop_signal = 0
        self._evaluated: tuple[int, dict[str, float]] | None = None
        self._peak = job.measure_peak()
        self._peaks_left = 3
        self._whole, self._since_log = _Span(), _Span()
        self._logged_at = self._saved_at = job.start.step
        job.module.train()

    @property
    def epoch(self) -> float:
        return self.step / self.job.feed.schedule.windows_per_epoch

    def train_step(self) -> None:
        job = self.job
        window = job.feed.window(self.step, job.accelerator.process_index)
        loss = steps.accumulate(job.accelerator, job.module, window)
        norm = steps.apply_gradient(job.accelerator, job.module, self.updates.optimizer, job.cfg.max_grad_norm)
        rate = float(self.updates.scheduler.get_last_lr()[0])
        self.updates.scheduler.step()
        self.step += 1
        self.supervised += window.num_units
        self.num_tokens += sum(window.lengths)
        flops = job.step_flops(list(window.lengths), window.num_units)
        for span in (self._whole, self._since_log):
            span.add(loss, window.num_units, sum(window.lengths), len(window.lengths), flops)
            span.grad_norm, span.learning_rate = norm, rate
        self.log.advance(self.step)

    def log_training(self) -> None:
        """Writes a row of the steps since the last one; this is where the device is waited for."""
        if self.step == self._logged_at:
            return
        span = self._since_log
        loss = span.mean_loss(self.job.accelerator)
        seconds = span.seconds
        with self._pause():
            self._measure_peak_again()
        row = {
            "loss": loss,
            "lr": span.learning_rate,
            "grad_norm": None if span.grad_norm is None else float(span.grad_norm),
            "throughput": round(span.units / seconds, 2),
            "total_tokens": self.num_tokens,
            "supervised_tokens": self.supervised,
            "mfu": self._mfu(span, seconds),
        }
        self._since_log = _Span()
        self._logged_at = self.step
        self.log.write(self.step, self.epoch, row)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise LlamaFactoryError(
                f"the loss is {loss} at step {self.step}: stopping before anything is saved over a good checkpoint. "
                "Lower learning_rate, use bf16 instead of fp16, or look at the rows of the last steps."
            )

    def evaluate(self) -> None:
        """Evaluates, and logs the losses."""
        with self._pause("evaluating"):
            values = evaluate(self.job)
            self.log.write(self.step, self.epoch, {key: x for key, x in values.items() if key.endswith("_loss")})
        self._evaluated = self.step, values

    def save(self) -> None:
        """Writes a checkpoint of the current step, once."""
        job = self.job
        if self.step in (self._saved_at, 0):
            return
        self.log_training()
        with self._pause("saving"):
            if job.accelerator.is_main_process:
                self.last_checkpoint = save_checkpoint(
                    job.output_dir,
                    self.state(),
                    write_model=job.write_model,
                    optimizer=None if job.cfg.save_only_model else self.updates.optimizer,
                    limit=job.cfg.save_total_limit,
                )
            self._saved_at = self.step
            job.accelerator.wait_for_everyone()

    def state(self) -> RunState:
        scaler = self.job.accelerator.scaler
        return RunState(
            run_id=self.job.run_id,
            step=self.step,
            epoch=self.epoch,
            scheduler=_plain(self.updates.scheduler.state_dict()),
            log_history=self.log.history,
            num_tokens=self.num_tokens,
            num_supervised_tokens=self.supervised,
            seconds=self.job.start.seconds + self.log.seconds,
            scaler={} if scaler is None else scaler.state_dict(),
        )

    def result(self) -> FitResult:
        span = self._whole
        metrics: dict[str, float] = {"epoch": round(self.epoch, 4)}
        if span.units:
            metrics["train_loss"] = span.mean_loss(self.job.accelerator)
            seconds = span.seconds
            metrics["train_runtime"] = round(seconds, 4)
            metrics["train_samples_per_second"] = round(span.examples / seconds, 3)
            metrics["train_steps_per_second"] = round((self.step - self.job.start.step) / seconds, 3)
            metrics["train_supervised_tokens_per_second"] = round(span.units / seconds, 2)
            metrics["total_flos"] = float(span.flops or 0)
            if self.job.cfg.include_effective_tokens_per_second:
                metrics["effective_tokens_per_sec"] = round(span.tokens / seconds, 2)
            if (mfu := self._mfu(span, seconds)) is not None:
                metrics["train_mfu"] = mfu
        is_current = self._evaluated is not None and self._evaluated[0] == self.step
        return FitResult(
            evaluation=self._evaluated[1] if self._evaluated and is_current else None,
            state=self.state(),
            stop_signal=self.stop_signal,
            metrics=metrics,
            last_checkpoint=self.last_checkpoint,
        )

    def agree_to_stop(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop. All ranks get the same `stop_signal`, and read only that afterwards."""
        accelerator = self.job.accelerator
        self.stop_signal = stop.signal
        if accelerator.num_processes > 1:
            flags = torch.zeros(accelerator.num_processes, dtype=torch.int64, device=accelerator.device)
            flags[accelerator.process_index] = stop.signal
            self.stop_signal = int(summed(accelerator, flags).max())
        return bool(self.stop_signal)

    @contextmanager
    def _pause(self, stage: str | None = None) -> Iterator[None]:
        """Leaves what happens inside out of the training time, and names it on the progress bar."""
        if stage:
            self.log.stage(stage)
        started = time.monotonic()
        yield
        for span in (self._whole, self._since_log):
            span.paused += time.monotonic() - started
        if stage:
            self.log.stage("training")

    def is_due(self, every: float) -> bool:
        """Whether the current step is a multiple of `every` steps; below 1 it is a share of the run."""
        interval = max(1, round(every if every >= 1 else every * self.job.total_steps))
        return self.step % interval == 0

    def is_moment(self, strategy: str, every: float | None) -> bool:
        """Whether the current step ends an epoch (`epoch`) or an interval (`steps`)."""
        if strategy == "epoch":
            return self.step % self.job.feed.schedule.windows_per_epoch == 0
        return self.is_due(every or self.job.cfg.logging_steps)

    def _mfu(self, span: _Span, seconds: float) -> float | None:
        return None if span.flops is None else round(span.flops / seconds / self._peak, 4)

    def _measure_peak_again(self) -> None:
        """A busy moment understates the peak, and so flatters the run: the best of several moments counts."""
        if self._peaks_left > 0:
            self._peaks_left -= 1
            self._peak = max(self._peak, self.job.measure_peak())


class _Span:
    """Sums over the steps since it was made. The loss stays on the device until `mean_loss` waits for it."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.paused = 0.0
        self.loss: torch.Tensor | None = None
        self.units = self.tokens = self.examples = 0
        self.flops: int | None = 0
        self.grad_norm: torch.Tensor | None = None
        self.learning_rate: float = 0.0

    def add(self, loss: torch.Tensor, units: int, tokens: int, examples: int, flops: int | None) -> None:
        self.loss = loss if self.loss is None else self.loss + loss
        self.units += units
        self.tokens += tokens
        self.examples += examples
        self.flops = None if flops is None or self.flops is None else self.flops + flops

    @property
    def seconds(self) -> float:
        """Training time so far; true on an asynchronous device right after `mean_loss`."""
        return max(1e-9, time.monotonic() - self._started - self.paused)

    def mean_loss(self, accelerator: Accelerator) -> float:
        """Nats per supervised token over all ranks; waits for the device."""
        if self.loss is None:
            return float("nan")
        return float(summed(accelerator, self.loss.clone())) / max(1, self.units)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON-able part of a schedule's state; its functions are rebuilt from the config."""
    return {key: value for key, value in state.items() if isinstance(value, int | float | str | bool | list)}
