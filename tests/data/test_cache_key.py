"""Each thing that decides the ids or the labels changes the key; where the data lies does not."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data import cache_key
from llamafactory.data.cache_key import key_of, key_parts
from llamafactory.data.day import fixed_day
from llamafactory.data.encoded_rows import RowEncoder, open_reader
from llamafactory.data.registry import find_specs
from llamafactory.data.template_choice import template_of
from llamafactory.hparams.data import DataConfig

ROWS = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(3)]


def write(folder: Path, rows: Any = ROWS, file_name: str = "rows.json", **entry: Any) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file_name).write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": file_name, **entry}}))
    return DataConfig(dataset=("rows",), dataset_dir=str(folder), template="chatml")


def key(data: DataConfig, tokenizer: Any, view: Any = "sft", seed: int = 1) -> str:
    rows = RowEncoder.from_config(data, view, template_of(data, tokenizer), tokenizer)
    (spec,) = find_specs(data.dataset, data.dataset_dir)
    return key_of(key_parts(open_reader(spec, data, rows.view, seed=seed), rows))


def test_the_key_does_not_know_where_things_lie(tmp_path: Path, tokenizer: Any) -> None:
    first = key(write(tmp_path / "a"), tokenizer)
    assert key(write(tmp_path / "elsewhere" / "b"), tokenizer, seed=2) == first
    assert key(write(tmp_path / "c", file_name="other.json"), tokenizer) == first


@pytest.mark.parametrize(
    "change",
    [
        {"template": "llama2"},
        {"template": "auto"},
        {"default_system": "Be brief."},
        {"enable_thinking": False},
        {"cutoff_len": 100},
        {"overlong": "drop"},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"train_on": "tool_calls"},
        {"rewritten_history": "last"},
        {"max_samples": 2},
        {"data_variables": {"name": "Ada"}},
    ],
    ids=str,
)
def test_an_option_that_changes_examples_changes_the_key(
    tmp_path: Path, tokenizer: Any, change: dict[str, Any]
) -> None:
    data = write(tmp_path)
    assert key(data.model_copy(update=change), tokenizer) != key(data, tokenizer)


@pytest.mark.parametrize("change", [{"packing": True}, {"val_size": 0.5}, {"max_bad_rows": 1}, {"neat_packing": True}])
def test_an_option_that_works_on_examples_does_not(tmp_path: Path, tokenizer: Any, change: dict[str, Any]) -> None:
    data = write(tmp_path)
    assert key(data.model_copy(update=change), tokenizer) == key(data, tokenizer)


def test_rows_entry_view_tokenizer_and_program_change_the_key(
    tmp_path: Path, tokenizer: Any, reference_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = key(write(tmp_path / "a"), tokenizer)
    others = {
        "row": key(write(tmp_path / "row", [*ROWS[:2], {**ROWS[2], "output": "It is 2!"}]), tokenizer),
        "order": key(write(tmp_path / "order", ROWS[::-1]), tokenizer),
        "columns": key(write(tmp_path / "c", columns={"prompt": "output", "response": "instruction"}), tokenizer),
        "num_samples": key(write(tmp_path / "n", num_samples=2), tokenizer),
        "seed of num_samples": key(write(tmp_path / "n", num_samples=2), tokenizer, seed=2),
        "tokenizer": key(write(tmp_path / "a"), reference_tokenizer),
        "view": key(write(tmp_path / "a"), tokenizer, view="prompts"),
    }
    monkeypatch.setattr(cache_key, "code_digest", lambda: "another version")
    others["program"] = key(write(tmp_path / "a"), tokenizer)
    assert len({first, *others.values()}) == len(others) + 1


def test_the_text_of_the_tokenizers_own_template_is_in_the_key(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path).model_copy(update={"template": "auto", "enable_thinking": None})

    class Own:
        chat_template = tokenizer.chat_template
        backend_tokenizer = tokenizer.backend_tokenizer
        eos_token = tokenizer.eos_token

    first = key(data, Own())
    Own.chat_template = tokenizer.chat_template.replace("system", "System", 1)
    assert key(data, Own()) != first


def test_a_template_that_names_the_day_is_another_one_tomorrow(tmp_path: Path, tokenizer: Any) -> None:
    keys: list[str] = []
    for name in ("chatml", "llama3"):
        data = write(tmp_path).model_copy(update={"template": name})
        for day in (24, 25):
            with fixed_day(date(2026, 11, day)):
                keys.append(key(data, tokenizer))
    assert keys[0] == keys[1]
    assert keys[2] != keys[3]


def test_the_digest_of_the_program_covers_its_code_and_its_tables(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.toml").write_text("x = 1\n")
    monkeypatch.setattr(cache_key, "_CODE", tmp_path)
    found = []
    for name, text in (("a.py", "x = 1\n"), ("a.py", "x = 2\n"), ("b.toml", "x = 2\n")):
        (tmp_path / name).write_text(text)
        cache_key.code_digest.cache_clear()
        found.append(cache_key.code_digest())
    cache_key.code_digest.cache_clear()
    assert len(set(found)) == 3
