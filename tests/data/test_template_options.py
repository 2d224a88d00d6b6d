"""Options that `build_template` hands to named templates, and what all named templates have in common."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import TOOL_DIALOGUE, dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.jinja_template import JinjaTemplate
from llamafactory.data.template_choice import build_template, template_difference
from llamafactory.data.types import Segment, Turn
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

_MESSAGE = st.text("ab\n {}<|>/", max_size=6) | st.sampled_from(
    ["{{content}}{{eos}}", "<|im_end|>", "<think>\nOne.\n</think>\n\n1", "</think>", "<think>", "[/INST] <BOS>"]
)


class Bare:
    """A tokenizer without a chat template."""

    chat_template = None
    bos_token = "<s>"
    eos_token = "</s>"


def joined(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


def test_a_tool_format_replaces_the_templates_own() -> None:
    template = build_template("chatml", Bare(), tool_format="qwen")
    prompt = joined(template.render_prompt(TOOL_DIALOGUE))
    assert '<tool_call>\n{"name": "get_weather"' in prompt
    with pytest.raises(DataError, match=r"unknown tool format 'qwem'(?s:.*)did you mean 'qwen'"):
        build_template("chatml", Bare(), tool_format="qwem")


@pytest.mark.parametrize("choice", [True, False, None])
def test_a_tokenizers_own_template_is_told_what_was_chosen_and_no_more(tokenizer: Any, choice: bool | None) -> None:
    published = (files("trl") / "chat_templates" / "gemma4_v5.jinja").read_text(encoding="utf-8")
    template = JinjaTemplate(published, tokenizer, enable_thinking=choice)
    options = {} if choice is None else {"enable_thinking": choice}
    messages = [{"role": "user", "content": "Hi"}]
    for is_asked in (True, False):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=published, tokenize=False, add_generation_prompt=is_asked, **options
        )
        assert template._render(dialogue("Hi"), generation_prompt=is_asked).text == expected


def test_thoughts_of_past_turns_stay_where_the_template_knows_how(tokenizer: Any) -> None:
    published = (files("trl") / "chat_templates" / "gemma4_v5.jinja").read_text(encoding="utf-8")
    assert JinjaTemplate(published, tokenizer, preserve_thinking=True)._variables["preserve_thinking"] is True


def test_a_word_on_thinking_that_the_template_does_not_know_is_said(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    build_template("auto", tokenizer, enable_thinking=False)
    assert "does not know enable_thinking" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"template": "auto"}, None),
        ({"template": "auto", "enable_thinking": True}, True),
        ({"template": "qwen3"}, True),
        ({"template": "qwen3", "enable_thinking": None}, None),
    ],
)
def test_what_thinking_is_where_nobody_said(given: dict[str, Any], expected: bool | None) -> None:
    assert DataConfig(**given).enable_thinking is expected


@pytest.mark.parametrize("option", [{"tool_format": "qwen"}, {"preserve_thinking": True}])
def test_options_of_named_templates_are_refused_beside_auto(tokenizer: Any, option: dict[str, Any]) -> None:
    [key] = option
    with pytest.raises(DataError, match=f"{key}: the tokenizer's own chat template decides this itself"):
        build_template("auto", tokenizer, **option)


def test_thinking_options_reach_the_template() -> None:
    talk = dialogue("a", "<think>\nOne.\n</think>\n\n1", "b")
    closed: Any = build_template("qwen3", Bare(), enable_thinking=False)
    assert joined(closed.render_prompt(talk)).endswith("<think>\n\n</think>\n\n")
    kept: Any = build_template("qwen3", Bare(), preserve_thinking=True)
    assert "One." in joined(kept.render_prompt(talk))
    [turns] = kept.render(dialogue("a", "<think>\nOne.\n</think>\n\n1", "b", "2"))
    assert "One." in joined(turns[0].answer)


@given(
    name=st.sampled_from(template_names()),
    texts=st.lists(_MESSAGE, min_size=2, max_size=6),
    system=st.none() | _MESSAGE,
    choice=st.sampled_from([True, False, None]),
)
def test_turns_joined_are_the_rendered_whole(
    name: str, texts: list[str], system: str | None, choice: bool | None
) -> None:
    talk = dialogue(*texts[: len(texts) // 2 * 2], system=system)
    template = NamedTemplate(
        record=find_record(name),
        bos="<s>",
        eos="</s>",
        enable_thinking=choice,
        preserve_thinking=True,
        is_bare=True,
    )
    [turns] = template.render(talk)
    tail = template.record.empty_thought if choice is False else ""
    shown = "".join(joined(turn.prompt) + joined(turn.answer) for turn in turns)
    assert shown + tail == joined(template.render_prompt(talk))
    answers = [message.content for message in talk.messages if message.role == "assistant"]
    for turn, answer in zip(turns, answers, strict=True):
        assert not any(segment.trainable for segment in turn.prompt)
        assert all(segment.trainable for segment in turn.answer)
        assert choice is False or answer in joined(turn.answer)
        assert _markup_is_the_templates(turn, template)


def _markup_is_the_templates(turn: Turn, template: NamedTemplate) -> bool:
    """Whether nothing that a row said passes for markup."""
    record = template.record
    slots = [record.prefix, record.system, record.user, record.assistant, record.empty_thought, *record.thought_words]
    known = "".join(slots) + template.bos + template.eos + "".join(record.stop_words)
    markup = [segment.text for segment in (*turn.prompt, *turn.answer) if not segment.is_literal]
    return all(text in known for text in markup)


def test_the_difference_is_that_of_what_is_before_an_answer(tokenizer: Any) -> None:
    same = NamedTemplate(record=find_record("smollm2"), default_system="You are a helpful AI assistant named SmolLM.")
    shown = template_difference(same, tokenizer, tokenizer.chat_template)
    assert "with a system message" not in shown
    assert "-You are a helpful AI assistant named SmolLM.<|im_end|>" in shown


@pytest.mark.parametrize("choice", [True, False])
def test_empty_thoughts_that_only_training_sees_are_no_difference(tokenizer: Any, choice: bool) -> None:
    published = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    template = NamedTemplate(record=find_record("qwen3"), eos="<|im_end|>", enable_thinking=choice)
    assert template_difference(template, tokenizer, published) == ""


def test_a_published_template_may_refuse_what_a_named_one_writes(tokenizer: Any) -> None:
    published = (files("trl") / "chat_templates" / "gemma.jinja").read_text(encoding="utf-8")
    template = NamedTemplate(record=find_record("gemma"), bos=tokenizer.bos_token)
    assert "with a system message" not in template_difference(template, tokenizer, published)
