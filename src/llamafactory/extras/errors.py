"""The errors that are meant for the user; commands print them without a traceback.

    LlamaFactoryError        exit code 1
    ├── SaveAndStopError     exit code 1, training cannot go on, but what it has so far is sound and is saved first
    ├── ConfigError          exit code 2, carries every problem of a configuration at once
    ├── DataError            exit code 3, says what is wrong, where, what was found, what was expected
    └── SaveError            exit code 74 (EX_IOERR), what a run made could not be saved

Any other exception is a mistake of this program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class LlamaFactoryError(Exception):
    """Base of all errors meant for the user. `exit_code` is the status that the process ends with."""

    exit_code: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        key: name of the option, None where the problem is not about one key.
        origin: where the value came from: `train.yaml:12`, `command line`, `dict` or `default`.
        given: the value as the user wrote it; secrets are masked by whoever makes the problem.
        message: what is wrong.
        allowed: what would be right.
        fix: what to do now.
    """

    message: str
    key: str | None = None
    origin: str | None = None
    given: str | None = None
    allowed: str | None = None
    fix: str | None = None

    def render(self) -> str:
        """The problem as text: a headline, then one indented line for each thing that is known."""
        if self.key is None:
            head = f"{self.origin}: {self.message}" if self.origin else self.message
        else:
            head = f"{self.key} ({self.origin}): {self.message}" if self.origin else f"{self.key}: {self.message}"
        details = (("given", self.given), ("allowed", self.allowed), ("fix", self.fix))
        return "\n".join([head, *(f"    {name + ':':<9}{text}" for name, text in details if text)])


class ConfigError(LlamaFactoryError):
    """The configuration cannot be run. `str()` shows all problems, numbered."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | Problem) -> None:
        """Keep the problems; a single one may be given bare."""
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        """All problems under one headline."""
        count = len(self.problems)
        head = "1 problem in the configuration:" if count == 1 else f"{count} problems in the configuration:"
        lines = [head]
        for number, problem in enumerate(self.problems, start=1):
            lines.append(f"{number}. " + problem.render().replace("\n", "\n   "))
        return "\n".join(lines)


class DataError(LlamaFactoryError):
    """A data file, a row or a template cannot be used as asked."""

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Build the message of its parts; `where` is a `file:line`, a dataset name or a key."""
        self.what, self.where, self.found, self.expected, self.fix = what, where, found, expected, fix
        super().__init__(what)

    def __str__(self) -> str:
        """The headline, then one indented line for each part that is known."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        details = (("found", self.found), ("expected", self.expected), ("fix", self.fix))
        return "\n".join([head, *(f"    {name + ':':<10}{text}" for name, text in details if text)])


class SaveError(LlamaFactoryError):
    """What a run made could not be written; the message says what is safe all the same."""

    exit_code = 74


class SaveAndStopError(LlamaFactoryError):
    """Something outside of training failed. The training loop saves its state and then ends with this error."""
