"""Built-in checks: `name` or `name:argument` -> a function of one answer."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem
from llamafactory.extras.packages import install_hint, is_installed
from llamafactory.train.rewards.answer import Answer

_Check = Callable[[Answer], float]


def find_check(spec: str) -> _Check | None:
    """The check that a text names, or None where no check has that name.

    Raises:
        ConfigError: an argument is missing, unwanted or wrong.
    """
    name, colon, argument = spec.partition(":")
    if name in _PLAIN:
        if colon:
            raise _problem(spec, f"{name} takes no argument")
        return _PLAIN[name]()
    if name in _WITH_ARGUMENT:
        if not argument:
            raise _problem(spec, f"{name} needs an argument", f"{name}:{_EXAMPLES[name]}")
        return _WITH_ARGUMENT[name](argument)
    return None


def check_names() -> list[str]:
    """Every check as a user writes it."""
    return [*_PLAIN, *(f"{name}:{_EXAMPLES[name]}" for name in _WITH_ARGUMENT)]


def _problem(spec: str, message: str, allowed: str | None = None) -> ConfigError:
    return ConfigError(Problem(key="reward_functions", given=spec, message=message, allowed=allowed))


def _require(module: str, spec: str) -> None:
    if not is_installed(module):
        raise ConfigError(
            Problem(
                key="reward_functions",
                given=spec,
                message=f"needs the package {module}, which is not installed",
                fix=install_hint("rewards"),
            )
        )


def _exact_match() -> _Check:
    """1 where the answer is the row's, spaces around it aside."""
    return lambda answer: float(answer.completion.strip() == _known(answer, "exact_match").strip())


def _contains(text: str) -> _Check:
    return lambda answer: float(text in answer.completion)


def _ends_with(text: str) -> _Check:
    return lambda answer: float(answer.completion.rstrip().endswith(text))


def _regex(pattern: str) -> _Check:
    """1 where the pattern is found; `.` matches line ends too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise _problem(f"regex:{pattern}", f"not a regular expression: {error}") from None
    return lambda answer: float(compiled.search(answer.completion) is not None)


def _length(limit: str) -> _Check:
    """1 up to that many tokens, then falling to 0 at twice as many."""
    if not limit.isdigit() or int(limit) < 1:
        raise _problem(f"length:{limit}", "a number of tokens from 1 up is needed", "length:200")
    wanted = int(limit)
    return lambda answer: min(1.0, max(0.0, 2.0 - len(answer.completion_ids) / wanted))


def _json() -> _Check:
    return lambda answer: float(_parsed(answer.completion) is not None)


def _json_schema(file: str) -> _Check:
    """1 where the answer is JSON that the schema allows."""
    _require("jsonschema", f"json_schema:{file}")
    import jsonschema
    from jsonschema.validators import validator_for

    try:
        schema: Any = json.loads(Path(file).read_text(encoding="utf-8"))
        validator: Any = validator_for(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        message = f"no JSON schema can be read: {str(error).splitlines()[0]}"
        raise _problem(f"json_schema:{file}", message) from None
    checker = validator(schema)

    def check(answer: Answer) -> float:
        parsed = _parsed(answer.completion)
        return float(parsed is not None and checker.is_valid(parsed[0]))

    return check


def _math() -> _Check:
    """1 where the answer's last formula or number equals the row's, as math-verify compares them."""
    _require("math_verify", "math")
    from math_verify import parse, verify

    def check(answer: Answer) -> float:
        known = _known(answer, "math")
        # An answer like 9**9**9 must not hang the run; the clock needs signals, which only the main thread may set.
        seconds = 5 if threading.current_thread() is threading.main_thread() else 0
        gold: Any = parse(known if "\\boxed" in known or "$" in known else f"${known}$", parsing_timeout=seconds)
        found: Any = parse(answer.completion, parsing_timeout=seconds)
        return float(bool(verify(gold, found, timeout_seconds=seconds)))

    return check


def _parsed(text: str) -> tuple[Any] | None:
    """The JSON value of a text as a tuple of one, or None where it is no JSON."""
    try:
        return (json.loads(text),)
    except (ValueError, RecursionError):
        return None


def _known(answer: Answer, check: str) -> str:
    if answer.answer is None:
        raise LlamaFactoryError(f"{check} compares with the row's own answer, and this row has none")
    return answer.answer


_PLAIN: dict[str, Callable[[], _Check]] = {"exact_match": _exact_match, "json": _json, "math": _math}
_WITH_ARGUMENT: dict[str, Callable[[str], _Check]] = {
    "contains": _contains,
    "ends_with": _ends_with,
    "regex": _regex,
    "length": _length,
    "json_schema": _json_schema,
}
_EXAMPLES = {
    "contains": "TEXT",
    "ends_with": "TEXT",
    "regex": "PATTERN",
    "length": "TOKENS",
    "json_schema": "schema.json",
}
