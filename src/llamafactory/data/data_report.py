"""What became of the rows: counts for people and for `run.json`, and the list of rows that were left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llamafactory.data.row_error import RowError
from llamafactory.extras.errors import DataError

BAD_ROWS_NAME = "bad_rows.jsonl"
_NUM_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LostRow:
    """A row that was left out, and why. Holds no content of the row."""

    dataset: str
    origin: str
    reason: str
    field: str = ""
    found: str = ""
    expected: str = ""
    fix: str = ""
    is_bad: bool = True

    @classmethod
    def from_error(cls, dataset: str, origin: str, error: RowError) -> LostRow:
        """The row that broke a rule."""
        return cls(
            dataset=dataset,
            origin=origin,
            reason=error.reason,
            field=error.field,
            found=error.found,
            expected=error.expected,
            fix=error.fix,
        )

    def render(self) -> str:
        """One line."""
        text = f"{self.origin}: {self.field}: {self.reason}; found {self.found}; expected {self.expected}"
        return f"{text}; {self.fix}" if self.fix else text


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetReport:
    """Counts of one data set.

    Attributes:
        num_rows: rows read.
        num_kept: rows that became at least one example.
        num_examples: training sequences; more than `num_kept` where each answer has its own.
        dropped: rows left out, by reason.
        num_truncated: examples that were cut.
        num_cut_tokens: tokens that the cuts removed.
        fingerprint: sha256 of the rows, and of how they are picked and read.
        num_rewritten: rows in which the template writes earlier answers otherwise than they were generated.
        num_left_out: answers of such rows that `rewritten_history: last` leaves out.
        is_streamed: rows are read while training goes on; the counts are 0.
    """

    name: str
    num_rows: int
    num_kept: int
    num_examples: int
    dropped: dict[str, int]
    num_truncated: int
    num_cut_tokens: int
    num_tokens: int
    num_supervised_tokens: int
    fingerprint: str
    num_rewritten: int = 0
    num_left_out: int = 0
    is_streamed: bool = False

    def line(self) -> str:
        """The counts in one line."""
        if self.is_streamed:
            return f"{self.name}: streamed; its rows are read, counted and tokenised while training goes on"
        share = 100 * self.num_supervised_tokens / max(self.num_tokens, 1)
        text = f"{self.name}: {self.num_kept:,} of {self.num_rows:,} rows used"
        if self.num_examples != self.num_kept:
            text += f" as {self.num_examples:,} sequences"
        text += f", {self.num_tokens:,} tokens, {self.num_supervised_tokens:,} of them supervised ({share:.0f} %)"
        if self.num_rewritten:
            text += f"; {self.num_rewritten:,} rows with rewritten history"
            text += f" ({self.num_left_out:,} answers left out)" if self.num_left_out else ""
        if self.num_truncated:
            text += f"; {self.num_truncated:,} cut to cutoff_len ({self.num_cut_tokens:,} tokens lost)"
        if self.dropped:
            text += "; dropped: " + ", ".join(f"{reason} ({count:,})" for reason, count in self.dropped.items())
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Counts of all data sets of a run, how many examples went where, and how they are mixed (see `Mix.realised`)."""

    datasets: tuple[DatasetReport, ...]
    num_train: int
    num_evaluation: dict[str, int]
    mix: tuple[dict[str, Any], ...] = ()

    @property
    def fingerprint(self) -> str:
        """One sha256 for all rows of all data sets."""
        return sha256("\n".join(report.fingerprint for report in self.datasets).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            **asdict(self),
            "datasets": [asdict(report) for report in self.datasets],
            "fingerprint": self.fingerprint,
        }

    def lines(self) -> list[str]:
        """Lines for people."""
        return [report.line() for report in self.datasets] + mix_lines(self.mix)


def mix_lines(mix: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `Mix.realised` found, one line a data set."""
    lines: list[str] = []
    for one in mix:
        asked = "" if one["asked"] is None else f" (asked: {one['asked']:.1%})"
        times = f"{one['drawn'] / one['rows']:.2f} times" if one["rows"] else "no rows, not"
        lines.append(f"mix: {one['name']}: {one['share']:.1%}{asked}, {one['drawn']:,} draws, {times} its rows")
    return lines


def write_lost_rows(rows: Sequence[LostRow], output_dir: Path) -> Path | None:
    """Write `bad_rows.jsonl`, one lost row a line; None (and no file) where no row was lost."""
    if not rows:
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / BAD_ROWS_NAME
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def has_too_many_bad_rows(lost: Sequence[LostRow], num_rows: int, max_bad_rows: float) -> bool:
    """Whether more rows are bad than the share `max_bad_rows` allows; the allowed number is rounded down."""
    return sum(row.is_bad for row in lost) > int(max_bad_rows * num_rows + 1e-9)


def refuse_bad_rows(name: str, lost: Sequence[LostRow], num_rows: int, max_bad_rows: float) -> None:
    """Stop if more rows are bad than the share `max_bad_rows` allows; the allowed number is rounded down.

    So with the default of 1 % a set of fewer than 100 rows may have no bad row at all.

    Raises:
        DataError: too many; lists the first ones and counts all by reason.
    """
    if not has_too_many_bad_rows(lost, num_rows, max_bad_rows):
        return
    bad = [row for row in lost if row.is_bad]
    counts = Counter(row.reason for row in bad)
    shown = [row.render() for row in bad[:_NUM_SHOWN]]
    if len(bad) > len(shown):
        shown.append(
            f"... and {len(bad) - len(shown):,} more ({', '.join(f'{r}: {n:,}' for r, n in counts.most_common())})"
        )
    raise DataError(
        f"{len(bad):,} of {num_rows:,} rows cannot be used",
        where=name,
        found="\n              ".join(shown),
        expected=f"at most {max_bad_rows:.1%} of the rows (max_bad_rows)",
        fix="correct the rows, or raise max_bad_rows to drop them",
    )
