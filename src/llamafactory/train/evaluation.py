"""One evaluation: the loss and the metrics of a stage over every evaluation set, and scores of generated answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llamafactory.train import step as steps

if TYPE_CHECKING:
    from llamafactory.train.job import Job


def evaluate(job: Job, *, generates: bool = True) -> dict[str, float]:
    """Evaluates every evaluation set once.

    Args:
        job: of the run.
        generates: whether answers are generated and scored, where the run asks for that.

    Returns:
        The compatible names: `eval_loss` per unit, the stage's metrics, run time in seconds, rates, and where answers
        are generated `eval_rouge-1` and so on.
    """
    values: dict[str, float] = {}
    for prefix, feed in job.evaluation.items():
        started = time.monotonic()
        batches = feed.one_pass(job.accelerator.process_index)
        averages, num_targets = steps.evaluation_loss(job.accelerator, job.module, batches)
        seconds = time.monotonic() - started
        values |= {
            **{f"{prefix}_{name}": value for name, value in averages.items()},
            f"{prefix}_runtime": round(seconds, 4),
            f"{prefix}_samples_per_second": round(feed.schedule.items_per_epoch / seconds, 3),
            f"{prefix}_steps_per_second": round(feed.schedule.windows_per_epoch / seconds, 3),
            f"{prefix}_supervised_tokens": float(num_targets),
        }
    if generates and job.predictions is not None and job.predictions.in_evaluation:
        values |= job.predictions.score()
    return values
