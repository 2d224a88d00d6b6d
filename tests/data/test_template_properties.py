"""What holds for every template, named or published, and for any texts: the whole, the supervised part, the mask."""

from __future__ import annotations

import copy
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.conftest import dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.encode import Encoder, assemble
from llamafactory.data.jinja_template import JinjaTemplate
from llamafactory.data.render import render_turns
from llamafactory.data.row_error import RowError
from llamafactory.data.types import IGNORE_INDEX, Conversation, MaskOptions, Segment, Template, Turn

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC is not None and SPEC.origin else Path("absent")
FILES = sorted(file.stem for file in FOLDER.glob("*.jinja") if "_training" not in file.name)
ALL = [*template_names(), *(f"auto: {name}" for name in FILES)]
NO_STOP = ("empty", "auto: glm4moe")
"""`empty` writes nothing but the texts; the published template of GLM-4.5 ends the last answer with nothing."""
MARKS = re.compile(r"<[|｜][^<>\s]*[|｜]>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]")
PIECES = [*'aZ9.,{}|"\\éü你', " ", "\n", "<|im_end|>", "<|im_start|>", "{{ x }}", "{% y %}", "[/INST]"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(lambda parts: f"b{''.join(parts)}b")
TALKS = st.lists(TEXTS, min_size=2, max_size=6).map(lambda texts: texts[: len(texts) // 2 * 2])


@cache
def template_of(name: str, tokenizer: Any, thinking: bool | None) -> Template:
    if name.startswith("auto: "):
        text = (FOLDER / f"{name.removeprefix('auto: ')}.jinja").read_text(encoding="utf-8")
        return JinjaTemplate(text, tokenizer, enable_thinking=thinking)
    eos = {"deepseekcoder": "<|EOT|>", "granite3": "<|end_of_text|>"}.get(name, tokenizer.eos_token)
    return NamedTemplate(record=find_record(name), bos="<s>", eos=eos, enable_thinking=thinking)


@cache
def with_marks(name: str, tokenizer: Any) -> Any:
    """A copy of the tokenizer that knows the special tokens of a published template, as the template's own does.

    Without them a token of plain text may reach from a stop into what follows.
    """
    if not name.startswith("auto: "):
        return tokenizer
    text = (FOLDER / f"{name.removeprefix('auto: ')}.jinja").read_text(encoding="utf-8")
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": sorted(set(MARKS.findall(text)))})
    return own


def joined(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


def supervised(turn: Turn) -> str:
    return "".join(segment.text for segment in turn.answer if segment.trainable)


def sequences_of(template: Template, talk: Conversation) -> list[tuple[Turn, ...]]:
    try:
        return render_turns(talk, template, MaskOptions())
    except RowError as error:
        if error.reason not in ("the tokenizer's chat template refuses the row", "a special token inside a text"):
            raise
        return []


@cache
def frame(name: str, tokenizer: Any, thinking: bool | None) -> tuple[str, str]:
    """What a template writes into an answer before and behind its text, told from a plain answer."""
    [[turn]] = sequences_of(template_of(name, tokenizer, thinking), dialogue("hello", "PLAIN"))
    before, text, behind = supervised(turn).partition("PLAIN")
    assert text
    return before, behind


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(ALL), texts=TALKS, thinking=st.sampled_from([True, False, None]))
def test_an_answer_is_trained_behind_its_prompt_with_its_stop_and_nothing_else(
    tokenizer: Any, name: str, texts: list[str], thinking: bool | None
) -> None:
    template, talk = template_of(name, tokenizer, thinking), dialogue(*texts)
    places = []
    for turns in sequences_of(template, talk):
        whole = ""
        for turn in turns:
            whole += joined(turn.prompt)
            if any(segment.trainable for segment in turn.answer):
                places.append(turn.message_index)
                asked = Conversation(messages=talk.messages[: turn.message_index])
                own = whole
                if isinstance(template, NamedTemplate) and thinking is None:  # a row decides for itself
                    own = whole.removesuffix(template.record.empty_thought)
                assert own == joined(template.render_prompt(asked))
                before, behind = frame(name, tokenizer, thinking)
                text = supervised(turn)
                assert text.startswith(before + talk.messages[turn.message_index].content)
                tail = text.removeprefix(before + talk.messages[turn.message_index].content)
                stops = (behind.strip(), tokenizer.eos_token, *template.stop_words)
                assert tail.strip().endswith(tuple(stop for stop in stops if stop)) == (name not in NO_STOP)
                assert not any(segment.trainable for segment in turn.prompt)
            whole += joined(turn.answer)
    assert places in ([], [index for index, message in enumerate(talk.messages) if message.role == "assistant"])


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(ALL), texts=TALKS, cutoff=st.integers(8, 200), keep_last=st.booleans())
def test_ids_and_mask_are_those_of_the_text_also_where_it_is_cut(
    tokenizer: Any, name: str, texts: list[str], cutoff: int, keep_last: bool
) -> None:
    tokenizer = with_marks(name, tokenizer)
    template = template_of(name, tokenizer, None)
    sequences = sequences_of(template, dialogue(*texts))
    for turns, encoded in zip(
        sequences, Encoder(tokenizer, is_whole=template.is_tokenized_whole).encode(sequences), strict=True
    ):
        example = assemble(encoded, 100_000)
        text = "".join(joined(turn.prompt) + joined(turn.answer) for turn in turns)
        assert tokenizer.decode(example.input_ids) == text
        kept = example.labels != IGNORE_INDEX
        assert tokenizer.decode(example.input_ids[kept]) == "".join(supervised(turn) for turn in turns)
        cut = assemble(encoded, cutoff, keep_last=keep_last)
        assert len(cut) <= cutoff
        assert ((cut.labels == cut.input_ids) | (cut.labels == IGNORE_INDEX)).all()
        pairs = list(zip(example.input_ids.tolist(), kept.tolist(), strict=True))
        left = iter(pairs)  # what is left is a part of the whole, in its order, each token with its mark
        assert all(
            pair in left for pair in zip(cut.input_ids.tolist(), (cut.labels != IGNORE_INDEX).tolist(), strict=True)
        )


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(ALL), texts=TALKS)
def test_strings_of_special_tokens_in_rows_never_become_special_tokens(
    tokenizer: Any, name: str, texts: list[str]
) -> None:
    template = template_of(name, tokenizer, None)
    encoder = Encoder(tokenizer, is_whole=template.is_tokenized_whole)

    def special_ids(talk: Conversation) -> list[int]:
        examples = [assemble(turns, 100_000) for turns in encoder.encode(sequences_of(template, talk))]
        special = set(tokenizer.all_special_ids)
        return [token for example in examples for token in example.input_ids.tolist() if token in special]

    if sequences_of(template, dialogue(*texts)):
        plain = [text.replace("<|", "(").replace("|>", ")") for text in texts]
        assert special_ids(dialogue(*texts)) == special_ids(dialogue(*plain))


def test_published_templates_are_there() -> None:
    if not FILES:
        pytest.skip("needs the chat templates in package trl")
    assert len(FILES) > 25
