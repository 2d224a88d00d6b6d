"""The one training loop: step, log, evaluate, save, stop. Stages, data and models come in ready-made."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llamafactory.extras import failpoints, log
from llamafactory.extras.errors import LlamaFactoryError, SaveAndStopError, SaveError
from llamafactory.train import step as steps
from llamafactory.train.capture import capture
from llamafactory.train.checkpoint import random_state
from llamafactory.train.checkpoint.saver import Retention, SavePlan, Saver
from llamafactory.train.checkpoint.state import RunState
from llamafactory.train.evaluation import evaluate
from llamafactory.train.guard import NotFiniteError, SpikeWatch, StepGuard, poison
from llamafactory.train.job import FitResult, Job
from llamafactory.train.log import RunLog
from llamafactory.train.profile import profiling
from llamafactory.train.return_point import ReturnPoint
from llamafactory.train.selection import is_patience_over, judge
from llamafactory.train.signals import StopRequest, StopSignal
from llamafactory.train.span import Span


def fit(job: Job, stop: StopRequest) -> FitResult:
    """Trains from `job.start` to `job.total_steps`, or until a signal or a lack of progress ends it.

    Args:
        job: the run.
        stop: says when a signal asked to stop; raises inside of the model while `interruptible`.

    Raises:
        LlamaFactoryError: a loss or gradient is not finite; the state before that step is saved.
    """
    run = _Run(job)
    with run.log, run.saver:
        try:
            run.train(stop)
        except StopSignal as signal:
            run.stop_signal = signal.number
            run.give_up_window()
        except SaveAndStopError:
            run.give_up_window()
            run.save()
            run.saver.wait()
            job.accelerator.wait_for_everyone()  # a launcher ends all processes when one has failed
            raise
        except NotFiniteError as error:
            run.return_to(error.step)
            explained = run.explain(error)
            job.accelerator.wait_for_everyone()
            raise explained from error
        stop.in_time()
        run.log_training()
        if run.stop_signal or job.cfg.save_strategy != "no":
            run.save()
        run.saver.wait()
        return run.result()


class _Run:
    """The moving parts of one call of `fit`."""

    def __init__(self, job: Job) -> None:
        if job.updates is None:
            raise ValueError("a job without optimizer cannot train")
        self.job, self.updates = job, job.updates
        self.best: Mapping[str, Any] = job.start.best
        self.saver = Saver(
            SavePlan(
                output_dir=job.output_dir,
                retention=Retention(limit=job.cfg.save_total_limit, keeps_best=job.cfg.load_best_model_at_end),
                is_async=job.is_async,
                reads_back=job.cfg.verify_after_save,
                facts=job.facts,
            )
        )
        self.guard = StepGuard(
            job.accelerator,
            job.updates.optimizer,
            max_skipped=job.cfg.max_skipped,
            num_skipped=job.start.num_skipped,
        )
        self._spikes = SpikeWatch()
        self._points: deque[ReturnPoint] = deque(maxlen=2)
        self._is_in_window = False
        self.step = job.start.step
        self.supervised = job.start.num_supervised_tokens
        self.log = RunLog(
            job.output_dir,
            total_steps=job.total_steps,
            done_steps=job.start.step,
            history=job.start.log_history,
            bar=None if job.cfg.disable_tqdm is None else not job.cfg.disable_tqdm,
            tracker=(lambda row, at: job.accelerator.log(row, step=at)) if job.cfg.report_to else None,
        )
        self.num_tokens = job.start.num_tokens
        self.loss_sum, self.num_units = job.start.loss_sum, job.start.num_units
        self.stop_signal = 0
        self._evaluated: tuple[int, dict[str, float]] | None = None
        self._peak = job.measure_peak()
        self._peaks_left = 3
        self._whole, self._since_log = Span(job.accelerator.device), Span(job.accelerator.device)
        self._logged_at = self._saved_at = job.start.step
        job.module.train()

    @property
    def epoch(self) -> float:
        return self.step / self.job.feed.schedule.windows_per_epoch

    def train(self, stop: StopRequest) -> None:
        """All steps, with what happens between them.

        Raises:
            StopSignal: a signal asked to stop.
            NotFiniteError: a step is not finite.
        """
        cfg = self.job.cfg
        if cfg.eval_on_start and self.step == 0:
            self.evaluate()
        elif self.step and self._is_time_to_evaluate() and not self._was_evaluated():
            self.evaluate()  # a signal came before the evaluation that belongs to this checkpoint
        with profiling(cfg, self.job.output_dir, self.job.accelerator.process_index) as step_is_over:
            while self.step < self.job.total_steps and not is_patience_over(self.best, cfg.early_stopping_steps):
                if self.job.accelerator.num_processes == 1:  # several ask each other before micro-batches
                    stop.check()
                self.train_step()
                step_is_over()
                if self.step == self.job.start.step + 1:
                    self.job.first_step_is_over()
                if self.is_due(cfg.logging_steps) or (self.step == 1 and cfg.logging_first_step):
                    self.log_training()
                if self._is_time_to_evaluate():
                    self.evaluate()
                if self._is_time_to_save():
                    self.save()
        self.guard.settle()

    def train_step(self) -> None:
        job = self.job
        failed = failpoints.visit("step")
        self._points.append(ReturnPoint.take(self.step, self.updates, self.supervised, self.num_tokens))
        self._is_in_window = True
        job.progress.step = self.step + 1
        window = job.feed.window(self.step, job.accelerator.process_index)
        sums = steps.accumulate(job.accelerator, job.module, window)
        if failed:
            poison(job.module)
        norm, is_taken = steps.apply_gradient(
            job.accelerator,
            job.module,
            self.updates.optimizer,
            job.cfg.max_grad_norm,
            admits=lambda norm: self.guard.admits(self.step, sums.loss, norm, job.module),
        )
        self._is_in_window = False
        rate = float(self.updates.scheduler.get_last_lr()[0])
        self.updates.scheduler.step()
        self.step += 1
        if not is_taken:
            self._say_skipped()
            return
        self.supervised += window.num_targets
        self.num_tokens += sum(window.lengths)
        flops = job.step_flops(list(window.lengths), window.num_targets)
        for span in (self._whole, self._since_log):
            span.add(sums, window, flops)
            span.grad_norm, span.learning_rate = norm, rate
        self._since_log.steps.append((self.step, sums, window.num_units))
        self.log.advance(self.step)

    def _say_skipped(self) -> None:
        log.warn(
            f"step {self.step} is left out, because it is not finite ({self.guard.num_skipped} of at most "
            f"{self.job.cfg.max_skipped}); rows: {_listed(self.job.feed.rows(self.step - 1))}"
        )

    def give_up_window(self) -> None:
        """Forgets a step that was not finished: the state is that before it."""
        if self._is_in_window:
            self.return_to(self._points[-1].step)

    def return_to(self, step: int) -> None:
        """Goes back to the beginning of one of the last two steps; the weights must be those of that moment."""
        point = next(point for point in self._points if point.step == step)
        self.step, self.supervised, self.num_tokens = point.step, point.supervised, point.num_tokens
        point.put_back(self.updates)
        self._since_log.forget_after(step)

    def explain(self, error: NotFiniteError) -> LlamaFactoryError:
        """Saves the state before a step that is not finite, and says which rows it held."""
        rows = _listed(self.job.feed.rows(error.step))
        self.save()
        self.saver.wait()
        saved = f"The state before it is saved in {self.saver.last}. " if self.saver.last else ""
        return LlamaFactoryError(
            f"loss or gradient of step {error.step + 1} is not finite: the step was not taken. {saved}Its rows: "
            f"{rows}. Look at them, lower learning_rate, use bf16 instead of fp16, or set on_nan: skip:1."
        )

    def log_training(self) -> None:
        """Writes a row of the steps since the last one; this is where the device is waited for."""
        if self.step == self._logged_at:
            return
        self.guard.settle()
        span = self._since_log
        if not span.units:  # every step was left out
            return
        loss = span.mean_loss(self.job.accelerator)
        seconds = span.seconds
        with self._pause():
            self._measure_peak_again()
            totals = span.step_totals(self.job.accelerator)
            self._count(totals)
            self._look_for_spikes(totals)
        averages = span.sums.averages(self.job.accelerator)
        shown = self.job.accelerator.unwrap_model(self.job.module).summarise(averages | {"loss": loss})
        row = {
            "loss": loss,
            "lr": span.learning_rate,
            "grad_norm": None if span.grad_norm is None else float(span.grad_norm),
            "throughput": round(span.targets / seconds, 2),
            "total_tokens": self.num_tokens,
            "supervised_tokens": self.supervised,
            "mfu": self._mfu(span, seconds),
            "save_stall": round(span.stalled, 4) if span.stalled else None,
            "skipped_steps": self.guard.num_skipped or None,
            **shown,
        }
        self._since_log = Span(self.job.accelerator.device)
        self._logged_at = self.step
        self.log.write(self.step, self.epoch, row)

    def _count(self, totals: list[tuple[int, float, int]]) -> None:
        """Adds the losses of finished steps, one by one: the sum is the same wherever the run was interrupted."""
        for _, total, units in totals:
            self.loss_sum += total
            self.num_units += units

    def _look_for_spikes(self, totals: list[tuple[int, float, int]]) -> None:
        losses = [(step, total / max(1, units)) for step, total, units in totals]
        for step, loss, usual in self._spikes.look(losses):
            rows = _listed(self.job.feed.rows(step - 1))
            log.warn(f"the loss of step {step} jumps to {loss:.4f} from about {usual:.4f}; rows: {rows}")

    def evaluate(self) -> None:
        """Evaluates, logs the losses, and notes whether this is the best evaluation so far."""
        self.guard.settle()
        with self._pause("evaluating"):
            failpoints.visit("eval")
            values = evaluate(self.job)
            rates = ("_runtime", "_per_second", "_supervised_tokens")
            self.log.write(self.step, self.epoch, {key: x for key, x in values.items() if not key.endswith(rates)})
        self._evaluated = self.step, values
        if self.step:
            self.best = judge(self.best, values, self.step, self.job.cfg)

    def _is_time_to_evaluate(self) -> bool:
        cfg = self.job.cfg
        return cfg.eval_strategy != "no" and self.is_moment(cfg.eval_strategy, cfg.eval_steps)

    def _was_evaluated(self) -> bool:
        rows = (row for row in reversed(self.log.history) if row.get("current_steps") == self.step)
        return any(key.startswith("eval_") for row in rows for key in row)

    def _is_time_to_save(self) -> bool:
        cfg = self.job.cfg
        is_best = cfg.load_best_model_at_end and self.best.get("step") == self.step
        return is_best or (cfg.save_strategy != "no" and self.is_moment(cfg.save_strategy, cfg.save_steps))

    def save(self) -> None:
        """Writes a checkpoint of the current step, once."""
        job = self.job
        if self.step in (self._saved_at, 0):
            return
        self.guard.settle()
        self.log_training()
        with self._pause("saving"):
            started = time.monotonic()
            try:
                snapshot = capture(job, self.state(), self._generators(), wait=self.saver.wait)
            except SaveError as error:
                if job.accelerator.is_main_process:
                    self.saver.give_up(self.step, error)
            else:
                if job.accelerator.is_main_process:
                    self.saver.save(snapshot)
            stall = time.monotonic() - started
        for span in (self._whole, self._since_log):
            span.stalled += stall
        self._saved_at = self.step

    def _generators(self) -> random_state.Generators:
        """The random states that belong to the current step: after a return, those of its beginning."""
        found = next((point.generators for point in self._points if point.step == self.step), None)
        return found or random_state.Generators()

    def state(self) -> RunState:
        scaler = self.job.accelerator.scaler
        return RunState(
            run_id=self.job.run_id,
            step=self.step,
            epoch=self.epoch,
            scheduler=_plain(self.updates.scheduler.state_dict()),
            log_history=list(self.log.history),
            num_tokens=self.num_tokens,
            num_supervised_tokens=self.supervised,
            seconds=self.job.start.seconds + self.log.seconds,
            scaler={} if scaler is None else scaler.state_dict(),
            data=self.job.feed.cursor(self.step),
            best=self.best,
            num_skipped=self.guard.num_skipped,
            loss_sum=self.loss_sum,
            num_units=self.num_units,
        )

    def result(self) -> FitResult:
        span, patience = self._whole, self.job.cfg.early_stopping_steps
        metrics: dict[str, float] = {"epoch": round(self.epoch, 4)}
        if self.num_units:
            metrics["train_loss"] = self.loss_sum / self.num_units
        if span.units:
            seconds = span.seconds
            metrics["train_runtime"] = round(seconds, 4)
            metrics["train_samples_per_second"] = round(span.examples / seconds, 3)
            metrics["train_steps_per_second"] = round((self.step - self.job.start.step) / seconds, 3)
            metrics["train_supervised_tokens_per_second"] = round(span.targets / seconds, 2)
            metrics["total_flos"] = float(span.flops or 0)
            if self.job.cfg.include_effective_tokens_per_second:
                metrics["effective_tokens_per_sec"] = round(span.tokens / seconds, 2)
            if (mfu := self._mfu(span, seconds)) is not None:
                metrics["train_mfu"] = mfu
            if span.stalled:
                metrics["save_stall_seconds"] = round(span.stalled, 4)
        is_current = self._evaluated is not None and self._evaluated[0] == self.step
        return FitResult(
            evaluation=self._evaluated[1] if self._evaluated and is_current else None,
            state=self.state(),
            stop_signal=self.stop_signal,
            metrics=metrics,
            last_checkpoint=self.saver.last,
            save_failure=self.saver.failure,
            stopped_early=self.best["num_worse"] if is_patience_over(self.best, patience) else 0,
        )

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

    def _mfu(self, span: Span, seconds: float) -> float | None:
        return None if span.flops is None else round(span.flops / seconds / self._peak, 4)

    def _measure_peak_again(self) -> None:
        """A busy moment understates the peak, and so flatters the run: the best of several moments counts."""
        if self._peaks_left > 0:
            self._peaks_left -= 1
            self._peak = max(self._peak, self.job.measure_peak())


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON-able part of a schedule's state; its functions are rebuilt from the config."""
    return {key: value for key, value in state.items() if isinstance(value, int | float | str | bool | list)}
