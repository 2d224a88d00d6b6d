"""Rebuilds the tables of docs/plan.md: `python scripts/plan_page.py`.

A block begins with `<!-- plan WORDS -->`, the words of a `plan` command, or with `<!-- accuracy -->`, the newest
benchmarks/results/plan_accuracy.json; it ends with `<!-- end -->`. What is between is written anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "plan.md"
RESULTS = ROOT / "benchmarks" / "results" / "plan_accuracy.json"
_BLOCK = re.compile(r"<!-- (plan|accuracy) ?(.*?) ?-->\n.*?<!-- end -->", re.DOTALL)


def rebuilt(text: str, *, only: str = "") -> str:
    """The page with its blocks written anew; those whose words do not hold `only` stay as they are."""

    def block(found: re.Match[str]) -> str:
        kind, words = found.groups()
        if only not in words:
            return found.group(0)
        body = accuracy_table() if kind == "accuracy" else f"```text\n{printed_plan(shlex.split(words))}\n```"
        return f"<!-- {f'{kind} {words}'.strip()} -->\n{body}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def printed_plan(words: Sequence[str]) -> str:
    """What the command prints for these words."""
    from llamafactory import cli

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.chdir(ROOT):
        code = cli.main(["plan", *words])
    if code not in (0, 2):
        raise RuntimeError(f"plan {shlex.join(words)} ended with {code}")
    return output.getvalue().strip()


def accuracy_table() -> str:
    """Forecast beside measured peak of each configuration that the benchmark ran."""
    if not RESULTS.is_file():
        return f"No results yet: run `python benchmarks/{RESULTS.stem}.py`."
    lines = ["| configuration | forecast, GB | measured, GB | difference |", "|---|---:|---:|---:|"]
    for row in json.loads(RESULTS.read_text(encoding="utf-8")):
        config = dict(row["config"])
        names = [config.pop("stage", "sft"), config.pop("finetuning_type")]
        config.pop("dataset", None)
        what = ", ".join([*names, *(f"{key}: {str(value).lower()}" for key, value in config.items())])
        figures = f"{row['forecast'] / 1e9:.2f} | {row['measured'] / 1e9:.2f} | {row['error']:+.1%}"
        lines.append(f"| {what} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(rebuilt(PAGE.read_text(encoding="utf-8"), only=" ".join(sys.argv[1:])), encoding="utf-8")
