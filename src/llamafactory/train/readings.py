"""A run in plain words: rules about its curves, kept as data in `readings.toml`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any


def read_run(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences that the logged rows of a run support, in the order of the rules.

    Args:
        history: rows of the log: training rows and evaluation rows, in order.
    """
    found = []
    for rule in _rules():
        values = _values(rule["when"], history)
        if values is not None:
            found.append(rule["text"].format(**values))
    return found


@cache
def _rules() -> list[dict[str, Any]]:
    text = resources.files("llamafactory.train").joinpath("readings.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["rule"]


def _values(conditions: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The named values of the conditions, or None where one of them does not hold."""
    values: dict[str, float] = {}
    for condition in conditions:
        value = fact_of(condition["metric"], condition["fact"], history)
        if value is None or not _holds(condition, value):
            return None
        values[condition.get("as", "")] = value
    return values


def fact_of(metric: str, fact: str, history: Sequence[Mapping[str, Any]]) -> float | None:
    """A number that a curve comes down to, or None where it was not logged. `gold/*` is the first name like that."""
    if "*" in metric:
        names = (name for row in history for name in row if fnmatchcase(name, metric))
        metric = next(names, metric)
    if fact == "start":
        return next((row[metric] for row in history if row.get("current_steps") == 1 and metric in row), None)
    curve = [float(row[metric]) for row in history if metric in row]
    if not curve:
        return None
    quarter = max(1, len(curve) // 4)
    first, last = (sum(part) / len(part) for part in (curve[:quarter], curve[-quarter:]))
    facts = {"first": first, "last": last, "change": last - first, "low": min(curve), "high": max(curve),
             "rise": curve[-1] - min(curve), "range": max(curve) - min(curve), "rows": float(len(curve)),
             "ratio": last / first if first else math.inf}  # fmt: skip
    return facts[fact]


def _holds(condition: Mapping[str, Any], value: float) -> bool:
    tests = {
        "below": lambda limit: value < limit,
        "above": lambda limit: value > limit,
        "inside": lambda limit: abs(value) <= limit,
        "outside": lambda limit: abs(value) > limit,
    }
    return all(test(condition[name]) for name, test in tests.items() if name in condition)
