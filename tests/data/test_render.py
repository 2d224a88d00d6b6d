from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.data.conftest import dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record
from llamafactory.data.render import render_turns
from llamafactory.data.types import Conversation, MaskOptions
from llamafactory.extras.errors import DataError

TEMPLATE = NamedTemplate(record=find_record("chatml"))
TWO_TURNS = dialogue("a", "b", "c", "d")


def marked(mask: MaskOptions, **changes: dict[str, Any]) -> list[str]:
    """Texts of the supervised sides; `b` and `d` change the messages with that text."""
    messages = tuple(replace(message, **changes.get(message.content, {})) for message in TWO_TURNS.messages)
    sequences = render_turns(Conversation(messages=messages), TEMPLATE, mask)
    sides = [side for turns in sequences for turn in turns for side in (turn.prompt, turn.answer)]
    return ["".join(segment.text for segment in side) for side in sides if all(segment.trainable for segment in side)]


def test_answers_are_supervised_with_their_stop() -> None:
    assert marked(MaskOptions()) == ["b<|im_end|>\n", "d<|im_end|>\n"]


def test_only_the_last_answer() -> None:
    assert marked(MaskOptions(mask_history=True)) == ["d<|im_end|>\n"]


def test_prompts_too() -> None:
    assert len(marked(MaskOptions(train_on_prompt=True))) == 4


def test_the_mark_of_a_message_beats_the_options() -> None:
    assert marked(MaskOptions(), b={"train": False}) == ["d<|im_end|>\n"]
    assert marked(MaskOptions(mask_history=True), b={"train": True}) == ["b<|im_end|>\n", "d<|im_end|>\n"]
    assert marked(MaskOptions(), d={"weight": 0.0}) == ["b<|im_end|>\n"]


def test_a_conversation_without_anything_to_train_gives_no_sequence() -> None:
    assert marked(MaskOptions(), b={"train": False}, d={"train": False}) == []
    assert render_turns(dialogue("a"), TEMPLATE, MaskOptions()) == []


def test_weights_are_on_the_segments() -> None:
    messages = (TWO_TURNS.messages[0], replace(TWO_TURNS.messages[1], weight=0.5))
    [[turn]] = render_turns(Conversation(messages=messages), TEMPLATE, MaskOptions())
    assert {segment.weight for segment in turn.answer} == {0.5}
    assert {segment.weight for segment in turn.prompt} == {1.0}


def test_prompts_are_not_trained_again_and_again_where_history_is_rewritten() -> None:
    class Rewriting(NamedTemplate):
        def render(self, conversation: Conversation) -> Any:
            [turns] = NamedTemplate.render(self, conversation)
            return [(turn,) for turn in turns]

    template = Rewriting(record=find_record("chatml"))
    with pytest.raises(DataError, match="train_on_prompt: template 'chatml' rewrites history"):
        render_turns(TWO_TURNS, template, MaskOptions(train_on_prompt=True))
    [turns] = render_turns(TWO_TURNS, template, MaskOptions(mask_history=True))
    assert turns[0].message_index == 3
