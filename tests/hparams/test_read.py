"""Every form of the command line gives the same configuration as a file or a dict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamafactory.compose import load_config
from llamafactory.hparams.read import read_source

TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\x85\ufeff"), max_size=30
)
NAMES = st.lists(st.text("abcäöü_-. 0123456789", min_size=1).map(str.strip).filter(bool), max_size=3)
JSON_LEAVES = st.none() | st.booleans() | st.integers(-1000, 1000) | TEXT
JSON_VALUES = st.recursive(
    JSON_LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3), max_leaves=6
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "learning_rate": st.floats(1e-12, 1e3),
        "max_samples": st.none() | st.integers(1, 10**9),
        "bf16": st.booleans(),
        "packing": st.none() | st.booleans(),
        "run_name": st.none() | TEXT.filter(lambda text: text not in {"null", "Null", "NULL", "None"}),
        "default_system": TEXT.filter(lambda text: text not in {"null", "Null", "NULL", "None"}),
        "lora_target": NAMES,
        "lr_scheduler_kwargs": st.dictionaries(TEXT, JSON_VALUES, max_size=3),
        "save_strategy": st.sampled_from(["no", "steps", "epoch"]),
    },
)


def word(value: Any) -> str:
    """A value as a person writes it on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=OPTIONS)
def test_all_forms_give_the_same_config(options: dict[str, Any], workspace: Path, good: dict[str, Any]) -> None:
    options = good | options
    expected = load_config(options).flat()
    (workspace / "c.yaml").write_text(yaml.safe_dump(options, allow_unicode=True), encoding="utf-8")
    (workspace / "c.json").write_text(json.dumps(options), encoding="utf-8")
    words = {key: word(value) for key, value in options.items()}
    separate = [part for key, text in words.items() if not text.startswith("--") for part in (f"--{key}", text)]
    joined = [f"--{key}={text}" for key, text in words.items() if text.startswith("--")]
    assert load_config("c.yaml").flat() == expected
    assert load_config(workspace / "c.json").flat() == expected
    assert load_config([f"{key}={text}" for key, text in words.items()]).flat() == expected
    assert load_config([f"--{key}={text}" for key, text in words.items()]).flat() == expected
    assert load_config([*separate, *joined]).flat() == expected


def raw(words: list[str]) -> dict[str, Any]:
    return {item.key: item.value for item in read_source(words)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16", "--seed", "3"], {"bf16": "true", "seed": "3"}),
        (["--bf16", "false"], {"bf16": "false"}),
        (["--learning-rate", "1"], {"learning_rate": "1"}),
        (["--max_steps", "-1"], {"max_steps": "-1"}),
        (["--lora_target", "a", "b", "seed=3"], {"lora_target": ["a", "b"], "seed": "3"}),
        (["--run_name", "lr=1e-4"], {"run_name": "lr=1e-4"}),
        (["run_name=a=b c"], {"run_name": "a=b c"}),
        (['vllm_config={"a": "b c"}'], {"vllm_config": '{"a": "b c"}'}),
        (["run_name="], {"run_name": ""}),
        (["run_name=null"], {"run_name": None}),
        (["default_system=a\nb=c"], {"default_system": "a\nb=c"}),
    ],
)
def test_words(words: list[str], expected: dict[str, Any]) -> None:
    assert raw(words) == expected


def test_line_numbers_of_json_keys(workspace: Path) -> None:
    text = '{\n  "a": {"seed": 1, "b": [1,\n 2]},\n\n  "seed": "x\\"y", "c": null\n}'
    (workspace / "c.json").write_text(text, encoding="utf-8")
    found = {item.key: item.origin for item in read_source(["c.json"])}
    assert found == {"a": "c.json:2", "seed": "c.json:5", "c": "c.json:5"}


def test_names_of_files_may_have_spaces_and_umlauts(workspace: Path, good: dict[str, Any]) -> None:
    folder = workspace / "Meine Läufe"
    folder.mkdir()
    (folder / "größe 1.yaml").write_text("\ufeff" + yaml.safe_dump(good), encoding="utf-8")
    config = load_config(["Meine Läufe/größe 1.yaml", "run_name=schön"])
    assert (config.train.run_name, config.data.dataset) == ("schön", ("rows",))
