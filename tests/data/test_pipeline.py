from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.pipeline import prepare_data
from llamafactory.data.template_choice import build_template
from llamafactory.data.types import Example
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

Make = Callable[..., DataConfig]


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Say {number}.", "input": "", "output": f"It is {number}.", **changes}
        for number in range(count)
    ]


def prepare(data: DataConfig, tokenizer: Any, **options: Any) -> Any:
    return prepare_data(data, build_template("chatml", tokenizer), tokenizer, **{"seed": 1, **options})


def ids(examples: list[Example]) -> list[list[int]]:
    return [example.input_ids.tolist() for example in examples]


def test_counts_add_up_and_the_report_speaks(data_config: Make, tokenizer: Any) -> None:
    prepared = prepare(data_config(rows(20)), tokenizer)
    [report] = prepared.report.datasets
    assert (report.num_rows, report.num_kept, report.num_examples, report.dropped) == (20, 20, 20, {})
    assert report.num_tokens == sum(len(example) for example in prepared.train)
    assert report.num_supervised_tokens == sum(example.num_supervised for example in prepared.train)
    assert prepared.report.lines()[0].startswith("rows: 20 of 20 rows used, ")
    assert json.loads(json.dumps(prepared.report.to_dict()))["num_train"] == 20


def test_the_fingerprint_is_that_of_the_rows(data_config: Make, tokenizer: Any) -> None:
    first = prepare(data_config(rows(5)), tokenizer).report.fingerprint
    assert prepare(data_config(rows(5), cutoff_len=9), tokenizer).report.fingerprint == first
    assert prepare(data_config(rows(6)), tokenizer).report.fingerprint != first


@pytest.mark.parametrize(("val_size", "held_out"), [(0.1, 2), (0.01, 1), (1, 1), (1.0, 1), (5, 5)])
def test_val_size_is_a_share_or_a_number_of_rows(
    data_config: Make, tokenizer: Any, val_size: float, held_out: int
) -> None:
    data = data_config(rows(20), val_size=val_size)
    prepared = prepare(data, tokenizer)
    assert len(prepared.evaluation["eval"]) == held_out
    assert len(prepared.train) == 20 - held_out
    assert ids(prepare(data, tokenizer).evaluation["eval"]) == ids(prepared.evaluation["eval"])
    together = sorted(ids(prepared.train) + ids(prepared.evaluation["eval"]))
    assert together == sorted(ids(prepare(data_config(rows(20)), tokenizer).train))


def test_another_seed_holds_out_other_rows(data_config: Make, tokenizer: Any) -> None:
    data = data_config(rows(50), val_size=5)
    assert ids(prepare(data, tokenizer, seed=1).evaluation["eval"]) != ids(
        prepare(data, tokenizer, seed=2).evaluation["eval"]
    )


def test_max_samples_takes_the_first_rows_of_each_data_set(data_config: Make, tokenizer: Any, tmp_path: Path) -> None:
    data = data_config(rows(9))
    (tmp_path / "other.json").write_text(json.dumps(rows(9, output="Other.")))
    info = json.loads((tmp_path / "dataset_info.json").read_text()) | {"other": {"file_name": "other.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    both = data.model_copy(update={"dataset": ("rows", "other"), "max_samples": 2})
    prepared = prepare(both, tokenizer)
    texts = [tokenizer.decode(example.input_ids) for example in prepared.train]
    assert ["It is 0." in texts[0], "It is 1." in texts[1], "Other." in texts[2], "Other." in texts[3]] == [True] * 4
    assert len(texts) == 4
    evaluated = data.model_copy(update={"eval_dataset": ("rows", "other")})
    assert {key: len(value) for key, value in prepare(evaluated, tokenizer).evaluation.items()} == {"eval": 18}
    each = evaluated.model_copy(update={"eval_on_each_dataset": True})
    assert {key: len(value) for key, value in prepare(each, tokenizer).evaluation.items()} == {"rows": 9, "other": 9}


def test_few_bad_rows_are_dropped_counted_and_written(
    data_config: Make, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = rows(200)
    listed[3]["output"] = ""
    listed[7]["output"] = 5
    prepared = prepare(data_config(listed), tokenizer, output_dir=tmp_path / "out")
    assert len(prepared.train) == 198
    assert prepared.report.datasets[0].dropped == {"the answer is empty": 1, "not a text": 1}
    lost = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["origin"], row["field"], row["reason"]) for row in lost] == [
        ("rows.json#4", "output", "the answer is empty"),
        ("rows.json#8", "output", "not a text"),
    ]
    assert "2 of 200 rows are not used; first: rows.json#4: output: the answer is empty" in capsys.readouterr().err


def test_more_bad_rows_than_allowed_stop_the_run(data_config: Make, tokenizer: Any) -> None:
    listed = rows(200)
    for number in range(12):
        listed[number]["output"] = ""
    with pytest.raises(DataError, match=r"12 of 200 rows cannot be used(?s:.*)and 7 more(?s:.*)at most 1\.0%"):
        prepare(data_config(listed), tokenizer)
    assert len(prepare(data_config(listed, max_bad_rows=0.06), tokenizer).train) == 188


def test_no_file_is_written_where_no_row_is_lost(data_config: Make, tokenizer: Any, tmp_path: Path) -> None:
    prepare(data_config(rows(3)), tokenizer, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_whose_answer_is_cut_off_are_dropped_but_are_not_bad(data_config: Make, tokenizer: Any) -> None:
    long = {"instruction": "a b c d " * 50, "input": "", "output": "b"}
    prepared = prepare(data_config([*rows(3), long], cutoff_len=20), tokenizer)
    assert prepared.report.datasets[0].num_kept + sum(prepared.report.datasets[0].dropped.values()) == 4


def test_truncated_rows_are_counted(data_config: Make, tokenizer: Any) -> None:
    data = data_config([*rows(3), *rows(1, output="word " * 100)], cutoff_len=32)
    [report] = prepare(data, tokenizer).report.datasets
    assert report.num_truncated == 1
    assert report.num_cut_tokens > 50
    assert "1 cut to cutoff_len" in report.line()
    [dropped] = prepare(data.model_copy(update={"overlong": "drop"}), tokenizer).report.datasets
    assert dropped.dropped == {"longer than cutoff_len": 1}


def test_variables_are_filled(data_config: Make, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_config(
        rows(1, output="I am {{ name }} by {{author}}, not {{other}}."), data_variables={"name": "Ada", "author": "us"}
    )
    [example] = prepare(data, tokenizer).train
    assert "I am Ada by us, not {{other}}." in tokenizer.decode(example.input_ids)
    assert "placeholder" not in capsys.readouterr().err


def test_unfilled_variables_bring_one_warning(
    data_config: Make, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(data_config(rows(3, output="I am {{name}}."), file_name="unfilled.json"), tokenizer)
    assert capsys.readouterr().err.count("data_variables: {name: ...}") == 1


def test_num_samples_draws_rows(data_config: Make, tokenizer: Any) -> None:
    data = data_config(rows(4), entry={"num_samples": 10})
    assert len(prepare(data, tokenizer).train) == 10
    assert ids(prepare(data, tokenizer).train) == ids(prepare(data, tokenizer).train)


def test_train_on_prompt_and_mask_history(data_config: Make, tokenizer: Any) -> None:
    turns = [
        {"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, ["a", "b", "c", "d"], strict=True)
    ]
    data = data_config([{"conversations": turns}], entry={"formatting": "sharegpt"})

    def supervised(**options: Any) -> str:
        [example] = prepare(data.model_copy(update=options), tokenizer).train
        return tokenizer.decode(example.labels[example.labels >= 0])

    assert supervised() == "b<|im_end|>\nd<|im_end|>\n"
    assert supervised(mask_history=True) == "d<|im_end|>\n"
    assert supervised(train_on_prompt=True).startswith("<|im_start|>user\na<|im_end|>")


def test_a_path_is_a_data_set(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chat mit ümläut.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    file.write_text(json.dumps(row))
    prepared = prepare(DataConfig(dataset=(str(file),), dataset_dir=str(tmp_path)), tokenizer)
    assert len(prepared.train) == 1
    assert "rows look like 'openai'" in capsys.readouterr().err


def test_nothing_to_train_on(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        prepare(DataConfig(), tokenizer)
    assert prepare(DataConfig(), tokenizer, for_training=False).evaluation == {}


def test_val_size_beside_eval_dataset_is_refused(data_config: Make, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="both given"):
        prepare(data_config(rows(3), val_size=1, eval_dataset=("rows",)), tokenizer)


def test_a_mix_counts_the_training_rows_of_each_data_set(data_config: Make, tokenizer: Any, tmp_path: Path) -> None:
    config = data_config(rows(30), val_size=10)
    (tmp_path / "more.json").write_text(json.dumps(rows(20)))
    config = config.model_copy(
        update={
            "dataset": ("rows", str(tmp_path / "more.json")),
            "mix_strategy": "interleave_over",
            "interleave_probs": (0.25, 0.75),
        }
    )
    prepared = prepare_data(config, build_template("chatml", tokenizer), tokenizer, seed=3)
    assert prepared.mix is not None
    assert sum(prepared.mix.sizes) == len(prepared.train) == 40
    assert prepared.mix.sizes[0] < 30
    assert [one["name"] for one in prepared.report.to_dict()["mix"]] == ["rows", "more"]
    assert any(line.startswith("mix: rows: ") and "(asked: 25.0%)" in line for line in prepared.report.lines())
