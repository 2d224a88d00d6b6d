"""Every example finds the row that it was made of, through splits, selections and rows that were lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamafactory.data import pipeline
from llamafactory.data.template_choice import build_template
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig


def every_row(made):
    """Each example of each table with its row."""
    tables = [made.train, *made.evaluation.values()]
    return [(table[index], made.source_rows.row(table, index)) for table in tables for index in range(len(table))]


def test_every_prompt_finds_its_row(tmp_path: Path, golden_tokenizer) -> None:
    for name, count in (("a", 7), ("b", 5)):
        rows = [{"instruction": f"{name} {number}", "output": "yes", "level": number} for number in range(count)]
        rows[2]["instruction"] = ""  # is lost
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    data = DataConfig(
        dataset=(str(tmp_path / "a.json"), str(tmp_path / "b.json")), dataset_dir=str(tmp_path), template="chatml",
        val_size=3, max_bad_rows=0.5,
    )  # fmt: skip
    template = build_template("chatml", golden_tokenizer)
    for _ in range(2):  # tokenised, then found in the cache
        made = pipeline.prepare_data(
            data, template, golden_tokenizer, seed=1, view="prompts", cache_dir=tmp_path / "cache"
        )
        found = every_row(made)
        assert len(found) == 20  # a prompt and its answer
        assert len({row["instruction"] for _, row in found}) == 10
        for place, (example, row) in enumerate(found):
            expected = f"{row['instruction']}<|im_end|>" if place % 2 == 0 else "yes"
            assert expected in golden_tokenizer.decode(example.input_ids)
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "x", "output": "y"}]))
    again = pipeline.prepare_data(
        data, template, golden_tokenizer, seed=1, view="prompts", cache_dir=tmp_path / "cache"
    )
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "x", "output": "y"}] * 2))
    with pytest.raises(DataError, match="have changed since"):
        every_row(again)
