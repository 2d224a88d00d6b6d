from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import TOOL_DIALOGUE, dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.row_tools import split_calls
from llamafactory.data.types import Conversation, Message, Turn
from llamafactory.extras.errors import DataError

KEYS = (
    "multi",
    "single",
    "single|enable_thinking=false",
    "system",
    "thought",
    "thought|enable_thinking=false",
    "tool",
)


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Any:
    return json.loads((shared_dir / "golden" / "templates_compat.json").read_text(encoding="utf-8"))


def conversation(given: Any) -> Conversation:
    """A golden input in canonical form."""
    messages = [Message(role="system", content=given["system"])] if given["system"] else []
    for message in given["messages"]:
        match message["role"]:
            case "function":
                before, calls = split_calls(message["content"], "content")
                messages.append(Message(role="assistant", content=before, tool_calls=calls))
            case "observation":
                messages.append(Message(role="tool", content=message["content"]))
            case role:
                messages.append(Message(role=role, content=message["content"]))
    return Conversation(messages=tuple(messages), tools=None if given["tools"] is None else tuple(given["tools"]))


def text(turns: tuple[Turn, ...]) -> list[list[str]]:
    return [["".join(segment.text for segment in side) for side in (turn.prompt, turn.answer)] for turn in turns]


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("key", KEYS)
def test_each_entry_writes_what_is_known_of_it(golden: Any, name: str, key: str) -> None:
    expected = golden["templates"][name].get(key)
    if expected is None:
        pytest.skip("no such case for this template")
    template = NamedTemplate(record=find_record(name), bos="<BOS>", eos="<EOS>")
    [turns] = template.render(conversation(golden["inputs"][key.split("|")[0]]))
    assert text(turns) == expected


@pytest.mark.parametrize("name", template_names())
def test_each_entry_has_the_known_stop_words_and_flags(golden: Any, name: str) -> None:
    known, record = golden["templates"][name]["_meta"], find_record(name)
    assert sorted(record.stop_words) == sorted(known["stop_words"])
    assert record.default_system == known["default_system"]
    assert (record.replace_eos, record.efficient_eos) == (known["replace_eos"], known["efficient_eos"])
    assert list(record.thought_words) == known["thought_words"]


def test_an_entry_inherits_what_it_does_not_say() -> None:
    parent, child = find_record("chatml"), find_record("smollm2")
    assert child.name == "smollm2"
    assert child.user == parent.user
    assert child.stop_words == ("<|im_end|>",)


def test_an_unknown_name_gets_near_matches() -> None:
    with pytest.raises(DataError, match=r"unknown template 'chatlm'(?s:.*)chatml(?s:.*)did you mean 'chatml'"):
        find_record("chatlm")


def test_braces_in_a_row_are_never_filled() -> None:
    template = NamedTemplate(record=find_record("default"), eos="<EOS>")
    [turns] = template.render(dialogue("{{content}} {{eos}}", "{{bos}}{{system}}"))
    assert text(turns) == [["Human: {{content}} {{eos}}<EOS>\nAssistant:", "{{bos}}{{system}}<EOS>\n"]]


def test_row_text_is_literal_and_markup_is_not() -> None:
    [[turn]] = NamedTemplate(record=find_record("chatml")).render(dialogue("Hi", "Hello"))
    assert [(segment.text, segment.is_literal) for segment in turn.prompt] == [
        ("<|im_start|>user\n", False),
        ("Hi", True),
        ("<|im_end|>\n<|im_start|>assistant\n", False),
    ]
    assert [segment.trainable for segment in (*turn.prompt, *turn.answer)] == [False] * 3 + [True] * 2


def test_the_prompt_of_an_answer_is_the_rendering_up_to_it() -> None:
    template = NamedTemplate(record=find_record("smollm2"))
    for messages in (TOOL_DIALOGUE.messages, dialogue("a", "b", "c", "d", system="s").messages):
        whole = Conversation(messages=messages, tools=TOOL_DIALOGUE.tools)
        [turns] = template.render(whole)
        shown = "".join("".join(part) for part in text(turns[:-1])) + text(turns[-1:])[0][0]
        prompt = template.render_prompt(Conversation(messages=messages[:-1], tools=TOOL_DIALOGUE.tools))
        assert "".join(segment.text for segment in prompt) == shown


def test_a_given_default_system_replaces_the_templates_own() -> None:
    record = find_record("smollm2")
    [[turn]] = NamedTemplate(record=record, default_system="Be kind.").render(dialogue("Hi", "Hello"))
    assert turn.prompt[1].text == "Be kind."
    [[turn]] = NamedTemplate(record=record, default_system="").render(dialogue("Hi", "Hello"))
    assert turn.prompt[0].text == "<|im_start|>user\n"


def test_results_of_parallel_calls_share_one_observation() -> None:
    messages = (*TOOL_DIALOGUE.messages[:3], Message(role="tool", content="second"), TOOL_DIALOGUE.messages[3])
    [turns] = NamedTemplate(record=find_record("chatml")).render(Conversation(messages=messages))
    assert text(turns)[1][0] == '<|im_start|>tool\n{"temp": 21}\nsecond<|im_end|>\n<|im_start|>assistant\n'
