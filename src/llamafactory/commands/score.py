"""`score`: a reward model's number for every answer of a data set."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem

_FLAGS = {"--output": True, "--json": False}


def main(argv: list[str]) -> int:
    """Score, and write one JSON line a row.

    Returns:
        0, or 1 where a row could not be scored.

    Raises:
        LlamaFactoryError: the configuration, the model or the data cannot be used, or the file cannot be written.
    """
    words, own = _split(argv)
    if "json" in own and "output" not in own:
        raise ConfigError(Problem(key="--json", message="the lines are on standard output", fix="add --output FILE"))
    target = Path(own["output"]) if "output" in own else None
    if target is not None and target.exists():
        raise ConfigError(
            Problem(key="--output", given=str(target), message="is there already", fix="name another file")
        )
    from llamafactory.compose import load_config

    config = load_config(words, command="score")
    from llamafactory.train.reward_scores import score_rows

    if target is None:
        summary = _write(score_rows(config), sys.stdout)
    else:
        staging = target.with_name(f".{target.name}.part")
        try:
            with _opened(staging, target) as file:
                summary = _write(score_rows(config), file, str(target))
            with _explained(str(target)):
                staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    _say(summary, as_json="json" in own)
    return 1 if summary["failed"] else 0


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    words: list[str] = []
    own: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        key, has_value, value = word.partition("=")
        if key not in _FLAGS:
            words.append(word)
            continue
        own[key.removeprefix("--")] = (value if has_value else next(rest, "")) if _FLAGS[key] else "true"
        if not own[key.removeprefix("--")]:
            raise ConfigError(Problem(key=key, message="has no value", fix=f"{key} FILE"))
    return words, own


@contextmanager
def _opened(staging: Path, target: Path) -> Iterator[TextIO]:
    try:
        file = staging.open("w", encoding="utf-8")
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        problem = Problem(key="--output", given=str(target), message=message, fix="name another file")
        raise ConfigError(problem) from error
    try:
        yield file
    except BaseException:
        with suppress(OSError):  # what could not be written cannot be written now either
            file.close()
        raise
    with _explained(str(target)):
        file.close()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the system says about writing, as an error; a reader that went away is the command line's to handle."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LlamaFactoryError(f"{name} cannot be written: {error.strerror or error}. Free some room") from error


def _write(lines: Iterable[Mapping[str, Any]], stream: TextIO, name: str = "standard output") -> dict[str, Any]:
    """Writes the lines; what they are in sum."""
    scores: list[float] = []
    margins: list[float] = []
    failed = 0
    for line in lines:
        with _explained(name):
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        values = [line[name] for name in ("score", "chosen", "rejected") if name in line]
        if any(value is None for value in values):
            failed += 1
            continue
        scores += values
        if len(values) == 2:
            margins.append(values[0] - values[1])
    with _explained(name):
        stream.flush()
    summary: dict[str, Any] = {"rows": len(scores) - len(margins), "failed": failed}
    if scores:
        mean = sum(scores) / len(scores)
        spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
        summary |= {"mean": mean, "std": spread, "min": min(scores), "max": max(scores)}
    if margins:
        summary["accuracy"] = sum(margin > 0 for margin in margins) / len(margins)
        summary["margin"] = sum(margins) / len(margins)
    return summary


def _say(summary: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    figures = [f"{name} {value:.4g}" for name, value in summary.items() if name not in ("rows", "failed")]
    text = f"{summary['rows']:,} rows scored" + (f", {summary['failed']:,} could not be" if summary["failed"] else "")
    print(": ".join([text, ", ".join(figures)]) if figures else text, file=sys.stderr)
