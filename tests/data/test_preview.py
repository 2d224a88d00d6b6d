"""What the preview shows is what is trained: text inside the marks is the text of the supervised ids."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.data_report import LostRow
from llamafactory.data.encode import EncodedTurn, assemble, clean_backend, cut_places, kept_lengths
from llamafactory.data.pipeline import prepare_data
from llamafactory.data.preview import ShownRow, decode_part, preview_rows, show_example
from llamafactory.data.registry import find_specs
from llamafactory.data.template_choice import build_template
from llamafactory.data.types import IGNORE_INDEX, Example, ViewName
from llamafactory.hparams.data import DataConfig

ROWS = [
    {"instruction": f"Question {number}? 你好 🙂", "output": f"Answer {number}: naïve\n\n🙂 <|im_end|> done"}
    for number in range(6)
]


def shown_rows(
    config: DataConfig, tokenizer: Any, num_rows: int = 3, template: str = "chatml", view: ViewName = "sft"
) -> list[Any]:
    (spec,) = find_specs(config.dataset, config.dataset_dir)
    written = build_template(template, tokenizer)
    return list(preview_rows(spec, config, written, tokenizer, seed=0, num_rows=num_rows, view=view))


@pytest.mark.parametrize("options", [{}, {"cutoff_len": 24}, {"train_on_prompt": True}])
def test_the_preview_shows_the_ids_and_labels_of_training(
    options: dict[str, Any], data_config: Callable[..., DataConfig], tokenizer: Any
) -> None:
    config = data_config(ROWS, **options)
    trained = prepare_data(config, build_template("chatml", tokenizer), tokenizer, seed=0).train
    rows = shown_rows(config, tokenizer, num_rows=4)
    assert [row.origin for row in rows] == [f"rows.json#{number}" for number in range(1, 5)]
    for row, example in zip(rows, trained, strict=False):
        (shown,) = row.examples
        assert [token.id for token in shown.tokens] == example.input_ids.tolist()
        assert [token.is_supervised for token in shown.tokens] == (example.labels != IGNORE_INDEX).tolist()
        assert (shown.num_tokens, shown.num_cut) == (len(example), example.num_cut)
        assert shown.num_supervised == example.num_supervised
        assert sum(span.num_cut_behind for span in shown.spans) == example.num_cut
        assert "".join(span.text for span in shown.spans) == tokenizer.decode(
            example.input_ids, clean_up_tokenization_spaces=False
        )


@given(data=st.data())
def test_the_text_of_supervised_spans_is_that_of_the_supervised_ids(data: st.DataObject, tokenizer: Any) -> None:
    text = data.draw(st.text(min_size=1, max_size=40))
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
    marks = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    example = Example(input_ids=ids, labels=np.where(marks, ids, np.int32(IGNORE_INDEX)))
    shown = show_example(example, clean_backend(tokenizer))
    place = 0
    for span in shown.spans:
        stop = place + 1
        while stop < len(ids) and marks[stop] == marks[place]:
            stop += 1
        assert span.is_supervised == bool(marks[place])
        assert span.text == tokenizer.decode(ids[place:stop], clean_up_tokenization_spaces=False)
        place = stop
    assert place == len(ids)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5),
    st.integers(8, 80),
    st.booleans(),
)
def test_cuts_are_where_truncation_took_tokens_out(
    lengths: list[tuple[int, int]], cutoff_len: int, keep_last: bool
) -> None:
    counter = iter(range(10_000))
    turns = [
        EncodedTurn(
            prompt_ids=array("i", [next(counter) for _ in range(prompt)]),
            prompt_weights=array("f", [0.0] * prompt),
            answer_ids=array("i", [next(counter) for _ in range(answer)]),
            answer_weights=array("f", [1.0] * answer),
        )
        for prompt, answer in lengths
    ]
    example = assemble(turns, cutoff_len, keep_last=keep_last)
    cuts = cut_places(turns, kept_lengths(turns, cutoff_len, keep_last=keep_last))
    ids = example.input_ids.tolist()
    total = sum(prompt + answer for prompt, answer in lengths)
    edges = [-1, *ids, total]
    gaps = {place: edges[place + 1] - edges[place] - 1 for place in range(len(ids) + 1)}
    assert cuts == {place: gap for place, gap in gaps.items() if gap}


def test_a_cut_answer_is_marked_where_it_is_cut(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    rows = [{"instruction": "Hi", "output": "one two three four five six seven eight nine ten " * 5}]
    (row,) = shown_rows(data_config(rows, cutoff_len=40), tokenizer)
    (example,) = row.examples
    assert example.num_cut > 0
    assert [span.num_cut_behind for span in example.spans] == [0, example.num_cut]
    assert example.spans[-1].is_supervised


def test_a_space_at_the_start_of_a_part_is_kept() -> None:
    from tokenizers import Tokenizer, decoders, models

    words = {"▁Hello": 0, "▁world": 1, "!": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="!"))
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    assert tokenizer.decode([1]) == "world"
    assert [decode_part(tokenizer, [0, 1, 2], place, place + 1) for place in range(3)] == ["Hello", " world", "!"]


def test_rows_that_are_not_used_are_shown_with_the_reason(
    data_config: Callable[..., DataConfig], tokenizer: Any
) -> None:
    rows = [{"instruction": "Hi", "output": "word " * 60}, {"instruction": "Hi", "output": ""}, ROWS[0]]
    for overlong, reason in (("drop", "longer than cutoff_len"), ("error", "an example is longer than cutoff_len")):
        found = shown_rows(data_config(rows, cutoff_len=60, overlong=overlong), tokenizer)
        assert isinstance(found[0], ShownRow)
        assert found[0].reason == reason
        assert not found[0].examples[0].is_used
        assert found[1].reason == ""
        assert isinstance(found[2], LostRow)
        assert found[2].origin == "rows.json#2"


def test_rows_that_become_several_examples(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}..."
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    class Own:
        """The tokenizer with a template that shortens earlier answers."""

        chat_template = jinja
        backend_tokenizer = tokenizer.backend_tokenizer
        eos_token = tokenizer.eos_token

    rows = [{"instruction": "C", "output": "D", "history": [["A", "B"]]}]
    config = data_config(
        rows, entry={"columns": {"prompt": "instruction", "response": "output", "history": "history"}}
    )
    (row,) = shown_rows(config, Own(), template="auto")
    assert len(row.examples) == 2
    assert "..." in row.examples[1].spans[0].text


def test_pairs_and_judged_answers_say_what_they_are(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    from llamafactory.commands.data_preview import render_row

    pair = data_config(
        [{"q": "Hi", "good": "Hello.", "bad": "What?"}],
        entry={"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    )
    (row,) = shown_rows(pair, tokenizer, view="pairs")
    lines = "\n".join(render_row(row, is_coloured=False, has_ids=False)).splitlines()
    assert [line.split(":")[0] for line in lines if "tokens" in line] == ["chosen", "rejected"]
    assert "⟦Hello.<|im_end|>" in lines
    assert "⟦What?<|im_end|>" in lines
    judged = data_config(
        [{"q": "Hi", "a": "Hello.", "liked": False}],
        entry={"columns": {"prompt": "q", "response": "a", "kto_tag": "liked"}},
    )
    (row,) = shown_rows(judged, tokenizer, view="feedback")
    assert "the answer is undesirable" in "\n".join(render_row(row, is_coloured=False, has_ids=False))
