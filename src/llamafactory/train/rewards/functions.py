"""Reward functions by name: built-in checks, and Python functions that the user wrote.

A Python function gets lists, as keyword arguments, of what it asks for by name: `completions`, `prompts`, `answers`,
`completion_ids`, `prompt_ids`, `stopped`, `rows` (each row as its file has it), and any column of the rows; with
`**more` it gets all of them. It returns one number for each completion. Its file is the user's own code
and runs with the user's rights; nothing is ever fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem, SaveAndStopError
from llamafactory.extras.suggest import did_you_mean
from llamafactory.train.rewards.answer import Answer, Reward, Score
from llamafactory.train.rewards.checks import check_names, find_check

_ARGUMENTS: dict[str, Callable[[Answer], Any]] = {
    "completions": lambda answer: answer.completion,
    "prompts": lambda answer: answer.prompt,
    "answers": lambda answer: answer.answer,
    "completion_ids": lambda answer: list(answer.completion_ids),
    "prompt_ids": lambda answer: list(answer.prompt_ids),
    "stopped": lambda answer: answer.is_stopped,
    "rows": lambda answer: dict(answer.columns),
}


def load_function(spec: str, *, weight: float = 1.0, key: str = "reward_functions") -> Reward:
    """Finds a reward function.

    Args:
        spec: `path.py:name`, `package.module:name`, or a built-in check.
        weight: of its numbers.
        key: that names it, for errors.

    Raises:
        ConfigError: there is none, or it cannot be loaded or called.
    """
    check = find_check(spec)
    if check is not None:
        return Reward(name=spec, score=_one_by_one(check), weight=weight)
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        names = check_names()
        raise ConfigError(
            Problem(
                key=key,
                given=spec,
                message="neither a Python function nor a built-in check",
                allowed=f"path.py:name, or {', '.join(names)}",
                fix=did_you_mean(spec.partition(":")[0], [one.partition(":")[0] for one in names]) or None,
            )
        )
    function = getattr(_module(place, spec, key), name, None)
    if not callable(function):
        raise ConfigError(Problem(key=key, given=spec, message=f"{place} has no function {name}"))
    score, columns, wants_rows = _with_lists(function)
    return Reward(name=name, score=score, weight=weight, columns=columns, wants_rows=wants_rows)


def _module(place: str, spec: str, key: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        name = f"llamafactory_rewards_{path.stem}"
        found = importlib.util.spec_from_file_location(name, path)
        if found is None or found.loader is None:
            raise ImportError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickling of the user's own classes look there
        found.loader.exec_module(module)
        return module
    except Exception as error:  # noqa: BLE001  whatever is wrong in the user's file is reported as itself
        message = f"cannot be loaded: {type(error).__name__}: {error}"
        raise ConfigError(Problem(key=key, given=spec, message=message)) from error


def require_columns(reward: Reward, row: Mapping[str, Any], key: str = "reward_functions") -> None:
    """Stops before anything is sampled where a function asks for a column that rows do not have.

    Raises:
        ConfigError: it does.
    """
    unknown = sorted(reward.columns - set(row))
    if not unknown:
        return
    hint = next((found for name in unknown if (found := did_you_mean(name, [*_ARGUMENTS, *row]))), None)
    raise ConfigError(
        Problem(
            key=key,
            given=reward.name,
            message=f"the function asks for {', '.join(unknown)}, which rows do not have",
            allowed=f"parameters named {', '.join(_ARGUMENTS)}, or a column: {', '.join(row)}",
            fix=hint,
        )
    )


def _with_lists(function: Callable[..., Any]) -> tuple[Score, frozenset[str], bool]:
    """A score that hands lists on; the columns that the function needs; and whether it sees rows at all."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    plain = [
        one for one in parameters if one.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    asked = {one.name for one in plain}
    columns = frozenset(one.name for one in plain if one.default is inspect.Parameter.empty) - set(_ARGUMENTS)

    def score(answers: Sequence[Answer]) -> Sequence[float]:
        lists = {
            name: [read(answer) for answer in answers]
            for name, read in _ARGUMENTS.items()
            if takes_all or name in asked
        }
        for name in sorted({name for answer in answers for name in answer.columns} - set(_ARGUMENTS)):
            if takes_all or name in asked:
                lists[name] = [answer.columns.get(name) for answer in answers]
        return function(**lists)

    return score, columns, takes_all or "rows" in asked or bool(asked - set(_ARGUMENTS))


def _one_by_one(check: Callable[[Answer], float]) -> Score:
    return lambda answers: [check(answer) for answer in answers]


def scores_of(reward: Reward, answers: Sequence[Answer], *, policy: str) -> list[float]:
    """Scores answers; a fault is pinned to its answer.

    Args:
        reward: the source.
        answers: to score.
        policy: of `reward_errors`: `stop`, or `zero`, which gives NaN for the caller to count.

    Returns:
        A number for each answer, NaN where it could not be scored.

    Raises:
        LlamaFactoryError: a fault, with the policy `stop`.
    """
    try:
        return _checked(reward, reward.score(answers), answers)
    except RewardUnavailableError:
        raise
    except Exception as error:  # noqa: BLE001  a user's function may raise anything
        if len(answers) > 1:  # one at a time, to find which
            found = [value for answer in answers for value in scores_of(reward, [answer], policy=policy)]
            if not any(math.isnan(value) for value in found):
                log.warn(f"reward function {reward.name} fails on lists, but on no single answer: {error}", once=True)
            return found
        if policy == "zero":
            return [math.nan]
        raise RewardUnavailableError(
            f"reward function {reward.name}: {type(error).__name__}: {error}\n"
            f"    answer:  {answers[0].label}\n"
            "    fix:     repair the function, or set reward_errors: zero to count such answers as 0"
        ) from error


def _checked(reward: Reward, found: Any, answers: Sequence[Answer]) -> list[float]:
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, list | tuple) or len(values) != len(answers):
        what = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(found).__name__}"
        raise TypeError(f"returned {what} for {len(answers)} completions; expected a list with a number for each")
    numbers = [float(value) if isinstance(value, int | float) else math.nan for value in values]
    if not all(math.isfinite(number) for number in numbers):
        bad = next(value for value, number in zip(values, numbers, strict=True) if not math.isfinite(number))
        raise ValueError(f"returned {bad!r} where a finite number is expected")
    return numbers


class RewardUnavailableError(SaveAndStopError):
    """Answers cannot be scored."""
