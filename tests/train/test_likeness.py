"""Processes that would not do the same are told what differs; of several plans the most careful one counts."""

from __future__ import annotations

import json

import pytest

from llamafactory.extras.hardware import read_hardware
from llamafactory.model.plan import plan_training
from llamafactory.train.likeness import careful, differences, facts_of
from llamafactory.train.output_dir import Claim


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


def test_the_content_of_a_deepspeed_file_is_compared_and_not_its_path(train_config, tiny_config, tmp_path) -> None:
    claim = Claim(output_dir=tmp_path, run_id="a")
    facts = []
    for name, stage in (("one", 3), ("two", 3), ("three", 2)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        cfg = train_config(deepspeed=str(file))
        facts.append((name, facts_of(cfg, claim, {}, plan_training(cfg, tiny_config(), read_hardware(use_cpu=True)))))
    assert differences(facts[:2]) == []
    (problem,) = differences([facts[0], facts[2]])
    assert problem.message.startswith('deepspeed: {"zero_optimization": {"stage": 3}} in rank 0, ')
