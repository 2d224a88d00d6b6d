"""Processes that would not do the same are told what differs; of several plans the most careful one counts."""

from __future__ import annotations

import pytest

from llamafactory.train.likeness import careful, differences


def test_what_differs_is_named_once_with_hosts_and_a_fix() -> None:
    first = {"seed": "1", "rows of a": "x", "begins with": "checkpoint-4"}
    other = {"seed": "2", "rows of a": "x", "begins with": "nothing", "rows of b": "y"}
    problems = differences([("one", first), ("one", first), ("two", other), ("three", other)])
    assert [problem.message for problem in problems] == [
        "begins with: checkpoint-4 in rank 0, nothing in rank 2 (one and two)",
        "rows of b: nothing in rank 0, y in rank 2 (one and two)",
        "seed: 1 in rank 0, 2 in rank 2 (one and two)",
    ]
    assert "share" in str(problems[0].fix)
    assert "same files" in str(problems[1].fix)
    assert differences([("one", first), ("two", dict(first))]) == []


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ([(1024, 0), (512, 0)], (512, 0)),
        ([(None, 4), (2048, 0), (4096, 2)], (2048, 2)),
        ([(None, 0), (None, 0)], (None, 0)),
        ([(None, 1), (256, 3)], (256, 1)),
    ],
)
def test_the_most_careful_split_counts(splits: list[tuple[int | None, int]], expected: tuple[int | None, int]) -> None:
    assert careful(splits) == expected
