"""What a run says while it trains: `trainer_log.jsonl` with the compatible keys, and a line or a bar for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from llamafactory.extras import failpoints, log

LOG_FILE = "trainer_log.jsonl"
OLDER_LOG_FILE = "trainer_log.1.jsonl"
MOST_BYTES = 32 << 20
"""A longer log is put aside as `OLDER_LOG_FILE`, and a new one is begun: two such files are the most there is."""
MOST_ROWS = 20_000
"""Rows of the history that every checkpoint holds; when there are more, every second of the older half goes."""


class RunLog:
    """Writes log rows to disk and shows progress.

    On a terminal a bar with the remaining time stays at the bottom; elsewhere each row is one plain line. A log file
    or a tracker that fails is reported once and never stops the training.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        done_steps: int,
        history: list[dict[str, Any]],
        bar: bool | None,
        tracker: Callable[[dict[str, Any], int], None] | None = None,
    ) -> None:
        """Starts a log.

        Args:
            output_dir: of the run.
            total_steps: optimizer steps of the whole run.
            done_steps: steps done before this process (resume).
            history: rows logged before this process.
            bar: True or False forces the bar on or off; None shows it on a terminal only.
            tracker: gets each row and its step too, for example accelerate's `log`.
        """
        self.history = list(history)
        self._path = output_dir / LOG_FILE
        self._total, self._first = total_steps, done_steps
        self._start = time.monotonic()
        self._tracker = tracker
        self._is_main = log.is_main_process()
        if done_steps and self._is_main:
            self._cut_back()
        wants_bar = sys.stderr.isatty() if bar is None else bar
        self._bar = _Bar(total_steps, done_steps) if wants_bar and self._is_main else None

    def __enter__(self) -> RunLog:
        """Shows the bar, where there is one."""
        if self._bar:
            self._bar.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the bar away."""
        if self._bar:
            self._bar.progress.stop()

    @property
    def seconds(self) -> float:
        """Since this log was started."""
        return time.monotonic() - self._start

    def stage(self, name: str) -> None:
        """Names what is going on now: training, evaluating, saving."""
        if self._bar:
            self._bar.progress.update(self._bar.task, description=name)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar:
            self._bar.progress.update(self._bar.task, completed=step)

    def write(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Logs one row.

        Args:
            step: optimizer steps done.
            epoch: passes over the data done.
            values: for example loss, lr, grad_norm, eval_loss; None values are left out.
        """
        rate = self.seconds / max(1, step - self._first)
        row = {
            "current_steps": step,
            "total_steps": self._total,
            **{key: value for key, value in values.items() if value is not None},
            "epoch": round(epoch, 4),
            "percentage": round(100 * step / self._total, 2) if self._total else 100.0,
            "elapsed_time": _clock(self.seconds),
            "remaining_time": _clock(rate * (self._total - step)),
        }
        self.history.append(row)
        if len(self.history) > MOST_ROWS:
            self.history = thinned(self.history)
        if not self._is_main:
            return
        try:
            failpoints.visit("log")
            if self._path.exists() and self._path.stat().st_size > MOST_BYTES:
                self._path.replace(self._path.with_name(OLDER_LOG_FILE))
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            log.warn(f"{self._path} cannot be written ({error}); training goes on", once=True)
        self._track(row, step)
        self._show(_line(row), values.get("throughput"))

    def _cut_back(self) -> None:
        """Takes rows out of the file that were logged after the checkpoint: they will be logged again."""
        staging = self._path.with_name(f".{self._path.name}")
        try:
            staging.write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")
            staging.replace(self._path)
            self._path.with_name(OLDER_LOG_FILE).unlink(missing_ok=True)  # the history begins at the first step
        except OSError as error:
            log.warn(f"{self._path} cannot be written ({error}); training goes on", once=True)
            staging.unlink(missing_ok=True)

    def _track(self, row: dict[str, Any], step: int) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker({key: value for key, value in row.items() if isinstance(value, int | float)}, step)
        except Exception as error:  # a tracker is third-party code on a network; the run goes on without it
            log.warn(f"the tracker failed ({type(error).__name__}: {error}); training goes on", once=True)

    def _show(self, line: str, rate: float | None) -> None:
        if self._bar:
            if rate is not None:
                self._bar.progress.update(self._bar.task, rate=f"{rate:.0f} supervised tokens/s")
            self._bar.progress.console.print(line, highlight=False, markup=False)
        else:
            log.info(line)


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history without every second row of training in its older half; evaluations stay."""
    half = len(history) // 2
    is_kept, found = True, list[dict[str, Any]]()
    for row in history[:half]:
        if "loss" in row:
            is_kept = not is_kept
        if is_kept or "loss" not in row:
            found.append(row)
    return found + history[half:]


class _Bar:
    """A rich progress bar with remaining time."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[rate]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task("training", total=total, completed=done, rate="")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def _line(row: dict[str, Any]) -> str:
    shown = [f"step {row['current_steps']}/{row['total_steps']}", f"epoch {row['epoch']:.2f}"]
    formats = {"loss": "loss {:.4f}", "lr": "lr {:.2e}", "grad_norm": "grad norm {:.3f}",
               "throughput": "{:.0f} supervised tokens/s", "mfu": "MFU {:.0%}"}  # fmt: skip
    shown += [text.format(row[key]) for key, text in formats.items() if key in row]
    shown += [f"{key} {value:.4f}" for key, value in row.items() if key.startswith("eval_") and "loss" in key]
    return " · ".join([*shown, f"{row['elapsed_time']} elapsed", f"{row['remaining_time']} left"])
