"""Each view through the whole pipeline, on real rows and on rows written for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.encode import share_budget
from llamafactory.data.pipeline import PreparedData, prepare_data
from llamafactory.data.template_choice import build_template
from llamafactory.data.types import IGNORE_INDEX, ViewName
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

Make = Callable[..., DataConfig]
RANKING = {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}
JUDGED = {"columns": {"prompt": "q", "response": "a", "kto_tag": "liked"}}
TEXT = {"columns": {"prompt": "text"}}


def prepare(data: DataConfig, tokenizer: Any, view: ViewName, template: str = "chatml") -> PreparedData:
    return prepare_data(data, build_template(template, tokenizer), tokenizer, seed=1, view=view)


def answer_of(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode(example.labels[example.labels != IGNORE_INDEX])


def test_judged_answers_equal_the_reference(shared_dir: Path, reference_tokenizer: Any) -> None:
    expected = json.loads((shared_dir / "golden" / "tokens_kto_smollm2_384.json").read_text())
    data = DataConfig(
        dataset=("kto_en_demo",), dataset_dir=str(shared_dir / "data"), cutoff_len=384, max_samples=len(expected)
    )
    table = prepare(data, reference_tokenizer, "feedback", template="smollm2").train
    assert table.flags is not None
    assert table.flags.tolist() == [int(row["kto_tags"]) for row in expected]
    assert [example.input_ids.tolist() for example in table] == [row["input_ids"] for row in expected]
    assert [example.labels.tolist() for example in table] == [row["labels"] for row in expected]


@pytest.mark.parametrize("template", ["chatml", "auto"])
@pytest.mark.parametrize("cutoff_len", [64, 2048])
def test_both_answers_of_a_pair_stand_behind_the_same_prompt(
    shared_dir: Path, tokenizer: Any, template: str, cutoff_len: int
) -> None:
    data = DataConfig(
        dataset=("dpo_en_demo",), dataset_dir=str(shared_dir / "data"), cutoff_len=cutoff_len, max_samples=40
    )
    prepared = prepare(data, tokenizer, "pairs", template=template)
    [report] = prepared.report.datasets
    table = prepared.train
    assert report.num_kept + sum(report.dropped.values()) == 40
    assert table.offsets.tolist() == [2 * number for number in range(report.num_kept + 1)]
    for chosen, rejected in zip(table[0::2], table[1::2], strict=True):
        starts = [int((side.labels != IGNORE_INDEX).argmax()) for side in (chosen, rejected)]
        assert chosen.input_ids[: min(starts)].tolist() == rejected.input_ids[: min(starts)].tolist()
        assert starts[0] == starts[1]
        assert max(len(chosen), len(rejected)) <= cutoff_len


def test_the_longer_answer_of_a_pair_decides_the_cut(data_config: Make, tokenizer: Any) -> None:
    row = {"q": "ask " * 60, "good": "yes " * 70, "bad": "no " * 10}
    whole = prepare(data_config([row], entry=RANKING), tokenizer, "pairs").train
    cut = prepare(data_config([row], entry=RANKING, cutoff_len=80), tokenizer, "pairs").train
    num_prompt = int((whole[0].labels != IGNORE_INDEX).argmax())
    kept = share_budget(num_prompt, len(whole[0]) - num_prompt, 80)
    for side, full in zip(cut, whole, strict=True):
        answer = full.input_ids[num_prompt:][: kept[1]].tolist()
        assert side.input_ids.tolist() == full.input_ids[: kept[0]].tolist() + answer
        assert side.num_cut == len(full) - len(side)


def test_a_pair_is_dropped_as_a_whole(data_config: Make, tokenizer: Any) -> None:
    rows = [{"q": "a", "good": "yes " * 99, "bad": "no"}, {"q": "a", "good": "yes", "bad": "no"}]
    prepared = prepare(data_config(rows, entry=RANKING, cutoff_len=64, overlong="drop"), tokenizer, "pairs")
    assert [answer_of(tokenizer, example) for example in prepared.train] == ["yes<|im_end|>\n", "no<|im_end|>\n"]
    assert prepared.report.datasets[0].dropped == {"longer than cutoff_len": 1}


def test_only_the_judged_answer_carries_loss(data_config: Make, tokenizer: Any) -> None:
    rows = [{"q": "a", "a": "b", "liked": True, "history": [["c", "d"]]}, {"q": "e", "a": "f", "liked": False}]
    columns = {**JUDGED["columns"], "history": "history"}
    table = prepare(data_config(rows, entry={"columns": columns}), tokenizer, "feedback").train
    assert [answer_of(tokenizer, example) for example in table] == ["b<|im_end|>\n", "f<|im_end|>\n"]
    assert table.flags is not None
    assert table.flags.tolist() == [1, 0]


def test_documents_end_with_the_end_token_and_are_cut_into_blocks(data_config: Make, tokenizer: Any) -> None:
    rows = [{"text": f"one two three {number} <|im_end|> four"} for number in range(9)]
    data = data_config(rows, entry=TEXT, cutoff_len=16)
    end = tokenizer.eos_token_id
    documents = [
        [*ids, end]
        for ids in (prepare(data.model_copy(update={"packing": False}), tokenizer, "text").train)
        for ids in [ids.input_ids.tolist()[:-1]]
    ]
    assert all(end not in document[:-1] for document in documents)  # the row's own text is never the end token
    stream = [token for document in documents for token in document]
    blocks = prepare(data, tokenizer, "text").train
    assert [token for block in blocks for token in block.input_ids.tolist()] == stream
    assert {len(block) for block in blocks[:-1]} == {16}
    assert all(block.labels.tolist() == block.input_ids.tolist() for block in blocks)
    alone = prepare(data.model_copy(update={"neat_packing": True}), tokenizer, "text").train
    assert all(end not in block.input_ids[:-1] for block in alone)
    assert sum(len(block) for block in alone) == len(stream)


def test_a_prompt_stops_before_the_answer_and_keeps_its_end(data_config: Make, tokenizer: Any) -> None:
    rows = [{"instruction": "Why?", "input": "", "output": "Because."}]
    table = prepare(data_config(rows), tokenizer, "prompts").train
    assert table.offsets.tolist() == [0, 2]
    assert tokenizer.decode(table[0].input_ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert table[0].num_supervised == 0
    assert tokenizer.decode(table[1].input_ids) == "Because."
    long = prepare(data_config([{"text": "word " * 50}], entry=TEXT, cutoff_len=16), tokenizer, "prompts").train
    assert len(long) == 1
    assert len(long[0]) == 16
    assert tokenizer.decode(long[0].input_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert long[0].num_cut > 30


ASKED = [{"role": "user", "content": "Why?"}]
EMPTY = {
    "alpaca": ({}, [{"instruction": "Why?", "output": text} for text in ("", None, " \n")]),
    "sharegpt": (
        {"formatting": "sharegpt"},
        [
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": ""}]},
            {"conversations": [{"from": "human", "value": "Why?"}]},
        ],
    ),
    "openai": (
        {"formatting": "openai"},
        [
            {"messages": [*ASKED, {"role": "assistant", "content": ""}]},
            {"messages": [*ASKED, {"role": "assistant", "content": None}]},
            {"messages": ASKED},
        ],
    ),
}


@pytest.mark.parametrize("formatting", EMPTY)
def test_a_prompt_needs_no_answer(data_config: Make, tokenizer: Any, formatting: str) -> None:
    entry, rows = EMPTY[formatting]
    data = data_config(rows, entry=entry, max_bad_rows=0.0)
    table = prepare(data, tokenizer, "prompts").train
    assert len(table) == len(rows)  # no answer, no second example
    assert {tokenizer.decode(prompt.input_ids) for prompt in table} == {
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    }
    for view in ("sft", "labelled"):
        with pytest.raises(DataError, match="rows cannot be used|rows can be used|no row"):
            prepare(data, tokenizer, view)


def test_a_prompt_needs_the_column_that_is_named_and_texts_in_it(data_config: Make, tokenizer: Any) -> None:
    rows = [{"instruction": "Why?"}, {"instruction": "Why?", "output": 3}, {"instruction": "", "output": ""}]
    for row, reason in zip(rows, ("column 'output' is missing", "not a text", "the prompt is empty"), strict=True):
        with pytest.raises(DataError, match=reason):
            prepare(data_config([row], max_bad_rows=0.0), tokenizer, "prompts")


@pytest.mark.parametrize(
    ("view", "row", "entry", "found", "stages"),
    [
        ("sft", {"q": "a", "good": "b", "bad": "c"}, RANKING, "preference pairs", "rm, dpo"),
        ("pairs", {"q": "a", "a": "b", "liked": True}, JUDGED, "judged answers", "kto"),
        ("feedback", {"instruction": "a", "output": "b"}, {}, "conversations whose answers are all good", "sft, ppo"),
        ("text", {"instruction": "a", "output": "b"}, {}, "conversations whose answers are all good", "sft, ppo"),
        ("pairs", {"text": "a"}, TEXT, "plain text", "pt"),
        ("prompts", {"q": "a", "a": "b", "liked": True}, JUDGED, "judged answers", "kto"),
    ],
)
def test_data_of_another_stage_is_one_clear_error(
    data_config: Make, tokenizer: Any, view: ViewName, row: Any, entry: Any, found: str, stages: str
) -> None:
    pattern = rf"rows: the data set does not fit the stage(?s:.*)found: +{found}(?s:.*)stages: {stages}"
    with pytest.raises(DataError, match=pattern):
        prepare(data_config([row], entry=entry), tokenizer, view)
