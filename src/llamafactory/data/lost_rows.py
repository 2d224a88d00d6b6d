"""What is said and written about rows that were left out, and when they stop the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamafactory.data.data_report import LostRow, refuse_bad_rows, write_lost_rows
from llamafactory.data.tokenised import Tokenised
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note, warn
from llamafactory.hparams.data import DataConfig


def keep_lost_rows(sets: Sequence[Tokenised], output_dir: Path | None) -> None:
    """Writes the lost rows of all data sets to `bad_rows.jsonl` in that folder; None: nowhere."""
    if output_dir is not None:
        write_lost_rows([row for one in sets for row in one.lost], output_dir)
    if num_shifted := sum(one.num_shifted for one in sets):
        note(f"in {num_shifted:,} sequences the last ids of a prompt change when its answer follows", once=True)


def refuse_useless(one: Tokenised, data: DataConfig, output_dir: Path | None) -> None:
    """Stops on too many bad rows, or where no row is left; says which rows are dropped otherwise.

    Args:
        one: a data set.
        data: how many rows may be lost.
        output_dir: where `bad_rows.jsonl` goes before the stop; None: nowhere.

    Raises:
        DataError: too many bad rows, or none that can be used.
    """
    report, lost = one.report, one.lost
    try:
        refuse_bad_rows(report.name, lost, report.num_rows, data.max_bad_rows)
        if not report.num_kept:
            reasons = ", ".join(f"{reason}: {count:,} rows" for reason, count in report.dropped.items())
            raise DataError(
                "no row has a supervised token",
                where=report.name,
                found=reasons or "no rows",
                expected="at least one answer within cutoff_len",
                fix=f"raise cutoff_len (now {data.cutoff_len:,}), or look at train and weight marks in the rows",
            )
    except DataError:
        if output_dir is not None:
            write_lost_rows(lost, output_dir)
        raise
    if lost:
        warn(f"{report.name}: {len(lost):,} of {report.num_rows:,} rows are not used; first: {_short(lost[0])}")


def _short(row: LostRow) -> str:
    return row.render() if row.is_bad else f"{row.origin}: {row.reason}"
