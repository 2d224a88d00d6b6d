from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tests.data.conftest import TOOL_DIALOGUE, dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record
from llamafactory.data.render import LEFT_OUT, REWRITTEN, mask_options, render_turns
from llamafactory.data.types import Conversation, MaskOptions
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig


class Rewriting(NamedTemplate):
    """Makes a sequence of each answer."""

    def render(self, conversation: Conversation) -> Any:
        [turns] = NamedTemplate.render(self, conversation)
        return [(turn,) for turn in turns]


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
    assert marked(MaskOptions(train_on="last")) == ["d<|im_end|>\n"]


def test_only_answers_that_call_tools() -> None:
    [turns] = render_turns(TOOL_DIALOGUE, TEMPLATE, MaskOptions(train_on="tool_calls"))
    trained = [turn.message_index for turn in turns if any(segment.trainable for segment in turn.answer)]
    assert trained == [1]
    assert render_turns(TWO_TURNS, TEMPLATE, MaskOptions(train_on="tool_calls")) == []


def test_prompts_too() -> None:
    assert len(marked(MaskOptions(train_on_prompt=True))) == 4


def test_the_mark_of_a_message_beats_the_options() -> None:
    assert marked(MaskOptions(), b={"train": False}) == ["d<|im_end|>\n"]
    assert marked(MaskOptions(train_on="last"), b={"train": True}) == ["b<|im_end|>\n", "d<|im_end|>\n"]
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
    template = Rewriting(record=find_record("chatml"))
    with pytest.raises(DataError, match="train_on_prompt: template 'chatml' rewrites history"):
        render_turns(TWO_TURNS, template, MaskOptions(train_on_prompt=True))
    [turns] = render_turns(TWO_TURNS, template, MaskOptions(train_on="last"))
    assert turns[0].message_index == 3


def test_of_rewritten_history_only_the_last_answer_may_be_kept_and_that_is_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    template = Rewriting(record=find_record("chatml"))
    counts: Counter[str] = Counter()
    assert len(render_turns(TWO_TURNS, template, MaskOptions(), counts=counts)) == 2
    assert counts == {REWRITTEN: 1, LEFT_OUT: 0}
    assert "each becomes a training sequence of its own" in capsys.readouterr().err
    [turns] = render_turns(TWO_TURNS, template, MaskOptions(rewritten_history="last"), counts=counts)
    assert turns[0].message_index == 3
    assert counts == {REWRITTEN: 2, LEFT_OUT: 1}
    assert len(render_turns(dialogue("a", "b"), template, MaskOptions(rewritten_history="last"), counts=counts)) == 1
    assert counts == {REWRITTEN: 2, LEFT_OUT: 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, MaskOptions()),
        ({"mask_history": True}, MaskOptions(train_on="last")),
        ({"train_on": "tool_calls"}, MaskOptions(train_on="tool_calls")),
        (
            {"rewritten_history": "last", "train_on_prompt": True},
            MaskOptions(rewritten_history="last", train_on_prompt=True),
        ),
    ],
)
def test_a_configuration_says_what_carries_loss(given: dict[str, Any], expected: MaskOptions) -> None:
    assert mask_options(DataConfig(**given)) == expected
