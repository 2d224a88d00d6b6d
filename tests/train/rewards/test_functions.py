"""Reward functions by name: built-in checks, the user's own Python, and what happens when they fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.train.rewards.answer import Answer
from llamafactory.train.rewards.functions import (
    RewardUnavailableError,
    load_function,
    require_columns,
    scores_of,
)


def make_answer(completion: str, *, answer: str | None = None, tokens: int = 5, row: int = 0) -> Answer:
    return Answer(
        prompt="Say it.", completion=completion, answer=answer, prompt_ids=[1, 2], completion_ids=list(range(tokens)),
        is_stopped=True, row=row,
    )  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def make(code: str) -> str:
        path = tmp_path / "rewards.py"
        path.write_text(code, encoding="utf-8")
        return f"{path}:score"

    return make


@pytest.mark.parametrize(
    ("spec", "completion", "expected"),
    [
        ("exact_match", " 42\n", 1.0),
        ("exact_match", "42.", 0.0),
        ("contains:fort", "comfort", 1.0),
        ("contains:Fort", "comfort", 0.0),
        ("ends_with:done", "all done \n", 1.0),
        ("ends_with:done", "done it", 0.0),
        (r"regex:^<a>.*</a>$", "<a>x\ny</a>", 1.0),
        (r"regex:^a:\d{1,3}$", "a:1234", 0.0),
        ("length:5", "x", 1.0),
        ("length:4", "x", 0.75),
        ("length:2", "x", 0.0),
        ("json", '{"a": [1, null]}', 1.0),
        ("json", "null", 1.0),
        ("json", "{'a': 1}", 0.0),
        ("math", r"so it is $\boxed{\frac{84}{2}}$", 1.0),
        ("math", "the answer is 41", 0.0),
    ],
)
def test_checks(spec: str, completion: str, expected: float) -> None:
    reward = load_function(spec)
    assert reward.score([make_answer(completion, answer="42")]) == [expected]


def test_json_schema(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}))
    texts = ['{"name": "x"}', '{"name": 3}', "[]", "no"]
    assert load_function(f"json_schema:{file}").score([make_answer(text) for text in texts]) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("exact_mach", "did you mean 'exact_match'"),
        ("json:x", "takes no argument"),
        ("contains", "needs an argument"),
        ("length:many", "from 1 up"),
        ("regex:(", "not a regular expression"),
        ("json_schema:no-such-file.json", "no JSON schema can be read"),
        ("no_such.py:score", "there is no file"),
        ("no_such_package_here:score", "cannot be loaded"),
    ],
)
def test_wrong_names_say_what_is_right(spec: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("'", ".")):
        load_function(spec)


def test_python_functions_get_what_they_ask_for(write: Callable[[str], str]) -> None:
    reward = load_function(write("def score(completions, answers):\n    return [len(c) for c in completions]"))
    assert reward.name == "score"
    assert scores_of(reward, [make_answer("ab"), make_answer("c")], policy="stop") == [2.0, 1.0]
    reward = load_function(
        write("def score(completions, **more):\n    return [len(i) for i in more['completion_ids']]")
    )
    assert scores_of(reward, [make_answer("ab", tokens=7)], policy="stop") == [7.0]


def test_a_function_gets_the_columns_of_its_rows(write: Callable[[str], str]) -> None:
    answers = [replace(make_answer("ab"), columns={"level": 3, "answers": "x"}), replace(make_answer("c"), columns={})]
    reward = load_function(
        write("def score(completions, level, weight=2):\n    return [weight * (x or 0) for x in level]")
    )
    assert reward.columns == {"level"}
    assert reward.wants_rows
    assert scores_of(reward, answers, policy="stop") == [6.0, 0.0]
    require_columns(reward, {"level": 1})
    with pytest.raises(ConfigError, match=r"asks for level, which rows do not have[\s\S]*did you mean 'levels'"):
        require_columns(reward, {"levels": 1})
    reward = load_function(write("def score(rows):\n    return [row.get('level', 1) for row in rows]"))
    assert scores_of(reward, answers, policy="stop") == [3.0, 1.0]
    everything = "def score(completions, **more):\n    return [more['answers'].count(None), more['level'][0]]"
    assert scores_of(load_function(write(everything)), answers, policy="stop") == [2.0, 3.0]
    assert not load_function("json").wants_rows
    assert not load_function(write("def score(prompts):\n    return []")).wants_rows


def test_broken_files_are_config_errors(write: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match="NameError"):
        load_function(write("undefined\n"))
    with pytest.raises(ConfigError, match="has no function score"):
        load_function(write("x = 1\n"))


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("    return [1 / (len(c) - 2) for c in completions]", "ZeroDivisionError"),
        ("    return [float('nan') if len(c) == 2 else 1.0 for c in completions]", "nan"),
        ("    return [None if len(c) == 2 else 1.0 for c in completions]", "None"),
        ("    return [1.0 for c in completions if len(c) != 2]", "0 values for 1 completions"),
    ],
)
def test_a_fault_names_its_answer_or_counts_as_nothing(write: Callable[[str], str], body: str, part: str) -> None:
    reward = load_function(write(f"def score(completions):\n{body}"))
    answers = [make_answer("a", row=3), make_answer("bb", row=4), make_answer("ccc", row=5)]
    with pytest.raises(RewardUnavailableError) as caught:
        scores_of(reward, answers, policy="stop")
    assert part in str(caught.value)
    assert "prompt 4" in str(caught.value)
    found = scores_of(reward, answers, policy="zero")
    assert [math.isnan(value) for value in found] == [False, True, False]


def test_a_wrong_type_is_named(write: Callable[[str], str]) -> None:
    reward = load_function(write("def score(completions):\n    return 1.0"))
    with pytest.raises(RewardUnavailableError, match="a float for 1 completions"):
        scores_of(reward, [make_answer("a")], policy="stop")


def test_a_row_without_an_answer_is_a_fault_of_checks_that_need_one() -> None:
    with pytest.raises(RewardUnavailableError, match="this row has none"):
        scores_of(load_function("exact_match"), [make_answer("a")], policy="stop")


def test_numpy_and_torch_values_are_numbers(write: Callable[[str], str]) -> None:
    code = "import torch\ndef score(completions):\n    return torch.tensor([1.5 for c in completions])"
    assert scores_of(load_function(write(code)), [make_answer("a")] * 2, policy="stop") == [1.5, 1.5]


def test_what_is_not_a_number_is_not_taken_for_one(write: Callable[[str], str]) -> None:
    reward: Any = load_function(write("def score(completions):\n    return ['1' for c in completions]"))
    with pytest.raises(RewardUnavailableError, match="'1'"):
        scores_of(reward, [make_answer("a")], policy="stop")
