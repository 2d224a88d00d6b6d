"""The best evaluation so far, and when a run has stopped getting better: pure functions over a JSON-able record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llamafactory.extras.errors import ConfigError, Problem

if TYPE_CHECKING:
    from llamafactory.hparams.train import TrainConfig


def judge(best: Mapping[str, Any], values: Mapping[str, float], step: int, cfg: TrainConfig) -> dict[str, Any]:
    """The record of the best evaluation after one more.

    Args:
        best: the record before; empty where there was no evaluation.
        values: metrics of this evaluation.
        step: optimizer steps done.
        cfg: `metric_for_best_model` and `greater_is_better`.

    Returns:
        `metric`, its best `value`, the `step` it was seen at, `values` of that evaluation, and `num_worse`:
        evaluations since then.

    Raises:
        ConfigError: the evaluation does not report that metric.
    """
    metric = metric_name(cfg, values)
    value = values[metric]
    if not best or best.get("metric") != metric or is_better(value, best["value"], greater_is_better(cfg)):
        return {"metric": metric, "value": value, "step": step, "num_worse": 0, "values": dict(values)}
    return {**best, "num_worse": best["num_worse"] + 1}


def metric_name(cfg: TrainConfig, values: Mapping[str, float]) -> str:
    """The full name of the metric that decides; `loss` and `eval_loss` are the same.

    Raises:
        ConfigError: the evaluation does not report it.
    """
    asked = cfg.metric_for_best_model or "eval_loss"
    name = asked if asked.startswith("eval_") else f"eval_{asked}"
    if name in values:
        return name
    numbers = sorted(key for key, value in values.items() if key.startswith("eval_") and isinstance(value, float))
    if name == "eval_loss" and cfg.metric_for_best_model is None and numbers:
        return next((key for key in numbers if key.endswith("_loss")), numbers[0])
    raise ConfigError(
        Problem(
            key="metric_for_best_model",
            given=asked,
            message="the evaluation does not report this metric",
            allowed=", ".join(numbers),
        )
    )


def greater_is_better(cfg: TrainConfig) -> bool:
    """As configured; by default only a loss, a perplexity and a run time are better when smaller."""
    if cfg.greater_is_better is not None:
        return cfg.greater_is_better
    return not (cfg.metric_for_best_model or "loss").endswith(("loss", "perplexity", "runtime"))


def is_better(value: float, than: float, greater: bool) -> bool:
    """Whether a metric improved; NaN never does, and anything is better than NaN."""
    if math.isnan(value):
        return False
    return math.isnan(than) or (value > than if greater else value < than)


def is_patience_over(best: Mapping[str, Any], patience: int | None) -> bool:
    """Whether the last `patience` evaluations were all no better (`early_stopping_steps`)."""
    return bool(best) and patience is not None and best["num_worse"] >= patience
