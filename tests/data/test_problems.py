"""The check of a data set: every problem, each where an editor finds it, and nothing of a row's content whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.problems import CheckedDataset, check_dataset, row_lines
from llamafactory.data.registry import find_specs
from llamafactory.data.template_choice import build_template
from llamafactory.hparams.data import DataConfig

GOOD = {"instruction": "Say hello.", "output": "Hello."}
SECRET = "my private diary entry " * 20


def check(config: DataConfig, tokenizer: Any) -> CheckedDataset:
    (spec,) = find_specs(config.dataset, config.dataset_dir)
    return check_dataset(spec, config, build_template("chatml", tokenizer), tokenizer, seed=0)


def test_a_good_data_set_has_no_problems(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    checked = check(data_config([GOOD, GOOD]), tokenizer)
    assert (checked.num_rows, checked.num_usable, checked.problems, checked.stops_training) == (2, 2, (), False)


def test_all_problems_are_found_with_their_lines(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    rows = [GOOD if number % 2 else {"instruction": SECRET, "output": ""} for number in range(40)]
    checked = check(data_config(json.dumps(rows, indent=2)), tokenizer)
    assert (checked.num_rows, checked.num_usable, len(checked.problems)) == (40, 20, 20)
    assert checked.stops_training
    assert [problem.row for problem in checked.problems] == list(range(1, 41, 2))
    assert [problem.line for problem in checked.problems] == [2 + 4 * number for number in range(0, 40, 2)]
    first = checked.problems[0]
    assert (first.file, first.field, first.dataset) == ("rows.json", "output", "rows")
    assert first.reason
    assert first.found
    assert first.expected
    assert first.render().startswith("rows.json:2 (row 1): output: ")
    assert SECRET not in "".join(problem.render() for problem in checked.problems)


def test_lines_of_a_jsonl_file(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    text = "\n".join(
        [json.dumps(GOOD), "{broken", "", json.dumps(GOOD), json.dumps({"instruction": "a", "output": 3})]
    )
    checked = check(data_config(text, file_name="rows.jsonl", max_bad_rows=0.5), tokenizer)
    assert [(problem.file, problem.line, problem.row) for problem in checked.problems] == [
        ("rows.jsonl", 2, None),
        ("rows.jsonl", 5, None),
    ]
    assert not checked.stops_training


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"inst', 3, "the file is not valid JSON"),
        (b"\xff\xfe", None, "the file is not UTF-8"),
        ("[]", None, "no rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem(
    content: str | bytes, line: int | None, reason: str, data_config: Callable[..., DataConfig], tokenizer: Any
) -> None:
    checked = check(data_config(content), tokenizer)
    (problem,) = checked.problems
    assert (problem.line, problem.row, problem.reason) == (line, None, reason)
    assert problem.file.endswith("rows.json")
    assert checked.stops_training


def test_data_of_another_stage_is_a_problem(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    checked = check(data_config([GOOD], entry={"ranking": True}), tokenizer)
    assert [problem.reason for problem in checked.problems] == ["the data set does not fit the stage"]


def test_rows_without_a_target_and_rows_that_are_too_long(
    data_config: Callable[..., DataConfig], tokenizer: Any
) -> None:
    masked = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 99}]}
    entry = {"formatting": "openai"}
    checked = check(data_config([masked, long], entry=entry, cutoff_len=64), tokenizer)
    assert [(problem.row, problem.reason) for problem in checked.problems] == [(1, "no supervised token")]
    checked = check(data_config([masked, long], entry=entry, cutoff_len=64, overlong="error"), tokenizer)
    assert [problem.reason for problem in checked.problems] == [
        "no supervised token",
        "an example is longer than cutoff_len",
    ]
    assert checked.stops_training


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(json_values, max_size=6), st.sampled_from([None, 0, 2]), st.sampled_from(["", "\n\n", "\r\n "]))
def test_row_lines_are_where_the_rows_begin(rows: list[Any], indent: int | None, before: str) -> None:
    text = before + json.dumps(rows, indent=indent)
    lines = row_lines(text)
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        first = json.dumps(row, indent=indent).split("\n")[0]
        assert first in text.split("\n")[line - 1]
