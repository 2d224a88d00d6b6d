"""Scores of answers and margins of pairs: found, read, refused, kept, in every row format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data import row_numbers
from llamafactory.data.pipeline import prepare_data
from llamafactory.data.preview import ShownRow, preview_rows
from llamafactory.data.problems import check_dataset
from llamafactory.data.registry import find_spec, spec_from_file
from llamafactory.data.registry_entry import spec_from_entry
from llamafactory.data.row_error import RowError
from llamafactory.data.statistics import measure_dataset, value_summary
from llamafactory.data.template_choice import build_template
from llamafactory.data.types import Conversation, DatasetSpec, Message, Preference, Scored, ViewName
from llamafactory.data.views import find_view, fit_spec
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

Make = Callable[..., DataConfig]
SAID = [{"from": "human", "value": "Why?"}]
CHAT = [{"role": "user", "content": "Why?"}]
SCORED: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Why?", "output": "So.", "score": 3.5},
    "sharegpt": {"conversations": [*SAID, {"from": "gpt", "value": "So."}], "score": 3.5},
    "openai": {"messages": [*CHAT, {"role": "assistant", "content": "So."}], "score": 3.5},
}
PAIRS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Why?", "chosen": "So.", "rejected": "No.", "margin": 2},
    "sharegpt": {
        "conversations": SAID,
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
        "margin": 2,
    },
    "openai": {
        "messages": CHAT,
        "chosen": {"role": "assistant", "content": "So."},
        "rejected": {"role": "assistant", "content": "No."},
        "margin": 2,
    },
}


def written(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(path: Path, tokenizer: Any, view: ViewName = "ranked", **options: Any) -> Any:
    data = DataConfig(dataset=(str(path),), dataset_dir=str(path.parent), **options)
    return prepare_data(data, build_template("chatml", tokenizer), tokenizer, seed=1, view=view)


@pytest.mark.parametrize("formatting", SCORED)
def test_numbers_are_found_without_an_entry_and_kept(formatting: str, tmp_path: Path, tokenizer: Any) -> None:
    singles = [SCORED[formatting] | {"score": number} for number in (1, -0.25, 7e3)]
    pairs = [PAIRS[formatting] | {"margin": number} for number in (0, 0.5)]
    for name, rows, size in (("singles.jsonl", singles, 1), ("pairs.jsonl", pairs, 2)):
        path = written(tmp_path, *rows, name=name)
        assert spec_from_file(path).formatting == formatting
        tables = [prepare(path, tokenizer).train for _ in range(2)]  # tokenised, then from the cache
        for table in tables:
            assert table.offsets.tolist() == list(range(0, len(rows) * size + 1, size))
            assert table.values.tolist() == [row.get("score", row.get("margin")) for row in rows]
        assert tables[0].select([1, 0]).values.tolist() == tables[0].values.tolist()[1::-1]


def test_both_kinds_and_pairs_without_margins_are_one_table(tmp_path: Path, tokenizer: Any) -> None:
    plain = {name: value for name, value in PAIRS["alpaca"].items() if name != "margin"}
    paths = [
        written(tmp_path, row, name=f"{name}.jsonl")
        for name, row in (("a", SCORED["openai"]), ("b", PAIRS["alpaca"]), ("c", plain))
    ]
    data = DataConfig(dataset=tuple(map(str, paths)), dataset_dir=str(tmp_path))
    table: Any = prepare_data(data, build_template("chatml", tokenizer), tokenizer, seed=1, view="ranked").train
    assert table.offsets.tolist() == [0, 1, 3, 5]
    assert table.values.tolist() == [3.5, 2.0, 0.0]


BAD = {
    "a text": ("high", "the {} is not a number", 'the text "high"'),
    "a boolean": (True, "the {} is not a number", "the boolean true"),
    "a list": ([1], "the {} is not a number", "a list of 1"),
    "NaN": (float("nan"), "the {} is not finite", "the number nan"),
    "infinite": (float("-inf"), "the {} is not finite", "the number -inf"),
    "beyond float32": (1e39, "the {} is not finite", "the number 1e+39"),
    "digits": (10**400, "the {} is not finite", "a number of too many digits"),
    "null": (None, "the {} is missing", "null"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(("column", "row"), [("score", SCORED["sharegpt"]), ("margin", PAIRS["openai"])])
def test_a_bad_number_is_named_with_its_line(
    name: str, column: str, row: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    value, reason, found = BAD[name]
    path = written(tmp_path, row, row | {column: value}, row)
    spec = find_spec(str(path), str(tmp_path))
    template = build_template("chatml", tokenizer)
    checked = check_dataset(spec, DataConfig(), template, tokenizer, seed=1, view="ranked")
    [problem] = checked.problems
    assert (problem.file, problem.line, problem.field) == ("rows.jsonl", 2, column)
    assert (problem.reason, problem.found) == (reason.format(column), found)
    assert checked.num_usable == 2
    with pytest.raises(DataError, match=rf"rows\.jsonl:2(?s:.*){reason.format(column)}"):
        prepare(path, tokenizer, max_bad_rows=0.0)


def test_a_number_that_some_rows_lack_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    without = {name: value for name, value in SCORED["alpaca"].items() if name != "score"}
    path = written(tmp_path, SCORED["alpaca"], without)
    with pytest.raises(DataError, match=r"rows\.jsonl:2(?s:.*)the score is missing(?s:.*)no such column"):
        prepare(path, tokenizer, max_bad_rows=0.0)


@pytest.mark.parametrize(("column", "row"), [("score", SCORED["openai"]), ("margin", PAIRS["alpaca"])])
def test_a_number_that_the_first_rows_lack_is_not_overlooked(
    column: str, row: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    without = {name: value for name, value in row.items() if name != column}
    path = written(tmp_path, without, without, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1(?s:.*)the {column} is missing(?s:.*)no such column"):
        prepare(path, tokenizer, max_bad_rows=0.0)


def test_texts_of_a_csv_file_are_numbers(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output,score\nWhy?,So.,4.5\nWho?,Me., -2e-1 \n")
    assert prepare(path, tokenizer).train.values.tolist() == pytest.approx([4.5, -0.2])


@given(st.one_of(st.floats(), st.integers(), st.text(max_size=8), st.none(), st.booleans()))
def test_any_value_is_a_finite_number_or_an_error(value: object) -> None:
    conversation = Conversation(messages=(Message(role="user", content="a"), Message(role="assistant", content="b")))
    spec = DatasetSpec(name="x", source="file", location="x", columns={"score": "s"})
    try:
        record = row_numbers.with_numbers(conversation, {"s": value}, spec)
    except RowError:
        return
    assert isinstance(record, Scored)
    assert not isinstance(value, bool)
    assert record.score == float(value)  # type: ignore[arg-type]
    assert abs(record.score) < 3.5e38


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r", "score": "s"}},
            "name the column as",
        ),
        ({"columns": {"prompt": "q", "response": "a", "margin": "m"}}, "set ranking: true"),
        ({"columns": {"prompt": "q", "score": "s"}}, "without an answer that it judges"),
    ],
)
def test_a_column_that_does_not_fit_the_entry_is_an_error(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        spec_from_entry("x", {"file_name": "x.json", **entry}, "folder")


@pytest.mark.parametrize(
    ("view", "row", "column"),
    [
        ("sft", SCORED["alpaca"] | {"score": "high"}, "'score' (score)"),
        ("prompts", SCORED["openai"], "'score' (score)"),
        ("answers", SCORED["openai"], "'score' (score)"),
        ("feedback", SCORED["sharegpt"] | {"label": True}, "'score' (score)"),
        ("ranked", SCORED["sharegpt"] | {"label": True}, "'label' (kto_tag)"),
        ("pairs", PAIRS["sharegpt"], "'margin' (margin)"),
    ],
)
def test_other_stages_say_that_they_do_not_use_a_column(
    view: ViewName, row: dict[str, Any], column: str, tmp_path: Path, tokenizer: Any, capsys: Any
) -> None:
    table = prepare(written(tmp_path, row), tokenizer, view).train
    assert len(table)
    assert (table.values is None) is (view != "ranked")
    assert f"rows: the column {column} is not used by this stage" in capsys.readouterr().err


def test_conversations_without_scores_are_refused_by_rm(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, {"instruction": "a", "output": "b"})
    with pytest.raises(DataError, match=r"does not fit the stage(?s:.*)scored answers \(a score column\)"):
        prepare(path, tokenizer)
    spec = find_spec(str(written(tmp_path, SCORED["alpaca"], name="scored.jsonl")), str(tmp_path))
    assert fit_spec(spec, find_view("ranked")) is spec


def test_a_margin_stays_where_placeholders_are_filled(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, PAIRS["alpaca"] | {"instruction": "Hi {{name}}"})
    table = prepare(path, tokenizer, data_variables={"name": "Ann"}).train
    assert table.values.tolist() == [2.0]
    assert "Hi Ann" in tokenizer.decode(table[0].input_ids)
    assert Preference(prompt=Conversation(messages=()), chosen=Message(role="assistant", content="a"),
                      rejected=Message(role="assistant", content="b")).margin == 0  # fmt: skip


def test_preview_and_statistics_show_the_numbers(tmp_path: Path, tokenizer: Any) -> None:
    from llamafactory.commands.data_preview import as_record, render_row
    from llamafactory.commands.data_stats import as_record as stats_record
    from llamafactory.commands.data_stats import render

    template = build_template("chatml", tokenizer)
    rows = [SCORED["alpaca"] | {"score": number} for number in (1, 2, 6)]
    for row, key, value, line in ((rows[0], "score", 1.0, "score 1"), (PAIRS["alpaca"], "margin", 2.0, "margin 2")):
        spec = find_spec(str(written(tmp_path, row, name=f"{key}.jsonl")), str(tmp_path))
        [shown] = preview_rows(spec, DataConfig(), template, tokenizer, seed=1, num_rows=1, view="ranked")
        assert isinstance(shown, ShownRow)
        assert line in list(render_row(shown, is_coloured=False, has_ids=False))
        record = as_record(shown, has_ids=False)
        assert {name: record[name] for name in ("score", "margin")} == {"score": None, "margin": None} | {key: value}
    spec = find_spec(str(written(tmp_path, *rows)), str(tmp_path))
    found = measure_dataset(spec, DataConfig(), template, tokenizer, seed=1, view="ranked")
    assert value_summary(found.values) == {"min": 1.0, "mean": 3.0, "max": 6.0, "std": pytest.approx(2.160247)}
    assert stats_record(found)["scores"]["mean"] == 3.0
    assert any("scores       min 1, mean 3, max 6" in line for line in render(found, "train", 100, "drop"))
    plain = measure_dataset(spec, DataConfig(), template, tokenizer, seed=1, view="sft")
    assert stats_record(plain)["scores"] is None


def test_a_stream_has_the_numbers(tmp_path: Path, tokenizer: Any) -> None:
    from llamafactory.data.stream_pipeline import prepare_stream

    path = written(tmp_path, *(SCORED["alpaca"] | {"score": number} for number in range(5)))
    data = DataConfig(dataset=(str(path),), dataset_dir=str(tmp_path), streaming=True)
    found: Any = prepare_stream(
        data, build_template("chatml", tokenizer), tokenizer, seed=1, view="ranked", shuffle=False
    )
    assert found.stream.window(1, 3).table.values.tolist() == [1.0, 2.0, 3.0]
