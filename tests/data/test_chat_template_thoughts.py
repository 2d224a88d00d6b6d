"""Templates of models that think: where thoughts stand in training and before a new answer."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.conftest import TOOL_DIALOGUE, dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.types import Conversation, Message, Segment

EMPTY = "<think>\n\n</think>\n\n"
ONE, TWO = "<think>\nOne.\n</think>\n\n1", "<think>\nTwo.\n</think>\n\n2"
REASONING = [name for name in template_names() if find_record(name).is_reasoning]


def bound(name: str = "qwen3", **options: Any) -> NamedTemplate:
    return NamedTemplate(record=find_record(name), bos="<BOS>", eos="<EOS>", **options)


def joined(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


def answers(template: NamedTemplate, conversation: Conversation) -> list[str]:
    return [joined(turns[-1].answer) for turns in template.render(conversation)]


def test_an_empty_thought_is_supervised_only_where_answers_shall_think() -> None:
    plain = dialogue("a", "b")
    [[turn]] = bound(enable_thinking=True).render(plain)
    assert joined(turn.answer) == EMPTY + "b<|im_end|>\n"
    for choice in (False, None):
        [[turn]] = bound(enable_thinking=choice).render(plain)
        assert joined(turn.prompt).endswith("assistant\n" + EMPTY)
        assert joined(turn.answer) == "b<|im_end|>\n"
        assert not any(segment.trainable for segment in turn.prompt)


def test_a_thought_in_a_row_is_taken_out_only_by_false() -> None:
    talk = dialogue("a", ONE, "b", TWO)
    for choice in (True, None):
        assert answers(bound(enable_thinking=choice), talk) == [ONE + "<|im_end|>\n", TWO + "<|im_end|>\n"]
    assert answers(bound(enable_thinking=False), talk) == ["1<|im_end|>\n", "2<|im_end|>\n"]


def test_thoughts_of_past_turns_are_left_out_before_a_new_answer() -> None:
    talk = dialogue("a", ONE, "b", TWO, "c")
    shown = joined(bound().render_prompt(talk))
    assert "<think>" not in shown
    assert "1<|im_end|>" in shown
    kept = joined(bound(preserve_thinking=True).render_prompt(talk))
    assert ONE in kept
    assert TWO in kept


@pytest.mark.parametrize(
    ("name", "past"),
    [("gpt_oss", "<|channel|>final<|message|>1"), ("glm4_moe", "<|assistant|>\n<think></think>\n1"), ("qwen3", "\n1")],
)
def test_some_models_see_where_a_past_thought_was(name: str, past: str) -> None:
    opening, closing = find_record(name).thought_words
    shown = joined(bound(name).render_prompt(dialogue("a", f"{opening}One.{closing}1", "b")))
    assert past in shown
    assert "One." not in shown


def test_thoughts_of_the_turn_that_goes_on_stay() -> None:
    call = TOOL_DIALOGUE.messages[1]
    thinking = Message(role="assistant", content="<think>\nI look it up.\n</think>\n\n", tool_calls=call.tool_calls)
    messages = (TOOL_DIALOGUE.messages[0], thinking, TOOL_DIALOGUE.messages[2])
    template = bound(tool_format_name="default")
    assert "I look it up." in joined(template.render_prompt(Conversation(messages=messages)))
    later = Conversation(messages=(*messages, Message(role="user", content="And now?")))
    assert "I look it up." not in joined(template.render_prompt(later))


def test_only_false_closes_the_thought_before_a_new_answer() -> None:
    assert joined(bound(enable_thinking=False).render_prompt(dialogue("a"))).endswith("assistant\n" + EMPTY)
    for choice in (True, None):
        assert joined(bound(enable_thinking=choice).render_prompt(dialogue("a"))).endswith("assistant\n")
    no_thoughts = bound("chatml", enable_thinking=False)
    assert joined(no_thoughts.render_prompt(dialogue("a"))).endswith("assistant\n")


@pytest.mark.parametrize("choice", [True, False, None])
@pytest.mark.parametrize("name", REASONING)
def test_the_last_answer_is_trained_behind_what_generation_sees(name: str, choice: bool | None) -> None:
    opening, closing = find_record(name).thought_words
    talk = dialogue("a", f"{opening}One.{closing}1", "b", "2")
    template = bound(name, enable_thinking=choice)
    *others, turns = template.render(talk)
    assert not (others and any(segment.trainable for turn in turns[:-1] for segment in turn.answer))
    shown = "".join(joined(turn.prompt) + joined(turn.answer) for turn in turns[:-1]) + joined(turns[-1].prompt)
    prompt = joined(template.render_prompt(dialogue("a", f"{opening}One.{closing}1", "b")))
    empty = template.record.empty_thought if choice is None else ""  # without a choice, a row decides for itself
    assert shown == prompt + empty
    assert "One." not in shown


def test_thoughts_that_are_kept_are_kept_in_training_too() -> None:
    talk = dialogue("a", ONE, "b", TWO)
    first, second = bound().render(talk)
    assert "One." in joined(first[0].answer)
    assert "One." not in joined(second[0].answer)
    [together] = bound(preserve_thinking=True).render(talk)
    assert ["One." in joined(turn.answer) for turn in together] == [True, False]
    assert all(segment.trainable for turn in together for segment in turn.answer)


def test_dialogues_without_thoughts_are_one_sequence_where_past_turns_are_written_alike() -> None:
    assert len(bound("qwen3").render(dialogue("a", "b", "c", "d"))) == 2  # an empty thought is left out later
    assert len(bound("qwen3", preserve_thinking=True).render(dialogue("a", "b", "c", "d"))) == 1
    assert len(bound("qwen3_nothink").render(dialogue("a", ONE, "c", TWO))) == 1


def test_text_behind_a_thought_keeps_its_shape() -> None:
    talk = dialogue("a", "<think>x</think>\n\n  indented\n")
    assert answers(bound(enable_thinking=False), talk) == ["  indented\n<|im_end|>\n"]


def test_an_answer_whose_thought_was_opened_by_the_prompt_gets_no_second_one() -> None:
    assert answers(bound(), dialogue("a", "One.\n</think>\n\n1")) == ["One.\n</think>\n\n1<|im_end|>\n"]


@pytest.mark.parametrize("name", ["gpt_oss", "kimi_vl", "qwen3"])
def test_the_words_around_a_thought_are_markup_and_the_thought_is_not(name: str) -> None:
    opening, closing = find_record(name).thought_words
    [[turn]] = bound(name).render(dialogue("a", f"{opening}x{opening}{closing}y{closing}"))
    markup = [segment.text for segment in turn.answer if not segment.is_literal]
    assert markup[:2] == [opening.strip(), closing.strip()]
    assert opening not in "".join(markup[2:])
    [[turn]] = bound(name).render(dialogue(f"{opening}x{closing}", "y"))
    assert f"{opening}x{closing}" in [segment.text for segment in turn.prompt if segment.is_literal]
