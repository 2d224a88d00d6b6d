from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import TOOL_DIALOGUE, dialogue

from llamafactory.data import templates
from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.row_tools import split_calls
from llamafactory.data.templates.index import LEFT_OUT
from llamafactory.data.tool_formats import find_tool_format
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


# Texts that are known to differ, by (template, case), each with its reason.
_GLM = "the published template of GLM-4.5 closes every call, and puts results between <tool_response> tags"
DIFFERENCES = {(name, "tool"): _GLM for name in ("aeva", "glm4_5v", "glm4_7", "glm4_moe")}
_KEY_ORDER = ("name", "type", "description", "parameters", "enum", "properties", "city", "unit", "required")


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Any:
    return json.loads((shared_dir / "golden" / "templates_compat.json").read_text(encoding="utf-8"))


def in_order(value: Any) -> Any:
    """The tools in the order of keys that they were rendered with; the file has them sorted."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value, key=_KEY_ORDER.index)}
    return value


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
    tools = None if given["tools"] is None else tuple(in_order(tool) for tool in given["tools"])
    return Conversation(messages=tuple(messages), tools=tools)


def text(turns: tuple[Turn, ...]) -> list[list[str]]:
    return [["".join(segment.text for segment in side) for side in (turn.prompt, turn.answer)] for turn in turns]


def bound(name: str, **options: Any) -> NamedTemplate:
    return NamedTemplate(record=find_record(name), bos="<BOS>", eos="<EOS>", **options)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", template_names())
def test_each_entry_writes_what_is_known_of_it(golden: Any, name: str, key: str) -> None:
    case, _, option = key.partition("|")
    template = bound(name, enable_thinking=not option, is_bare=True)
    [turns] = template.render(conversation(golden["inputs"][case]))
    today = f"{date.today():%d %b %Y}"
    expected = json.loads(json.dumps(golden["templates"][name][key]).replace("{{TODAY}}", today))
    reason = DIFFERENCES.get((name, key))
    assert (text(turns) == expected) is (reason is None), reason or text(turns)


def test_every_known_name_and_every_known_case_is_there(golden: Any) -> None:
    assert golden["templates"].keys() == set(template_names())
    assert {key for known in golden["templates"].values() for key in known} == {"_meta", *KEYS}


@pytest.mark.parametrize("name", template_names())
def test_each_entry_has_the_known_stop_words_and_flags(golden: Any, name: str) -> None:
    known, record = golden["templates"][name]["_meta"], find_record(name)
    assert list(record.stop_words) == known["stop_words"]
    assert record.default_system == known["default_system"]
    assert (record.replace_eos, record.efficient_eos) == (known["replace_eos"], known["efficient_eos"])
    assert list(record.thought_words) == known["thought_words"]
    assert record.is_reasoning == ("Reasoning" in known["class"])
    assert record.system_in_user == (known["class"] == "Llama2Template")


def test_an_entry_inherits_what_it_does_not_say() -> None:
    parent, child = find_record("chatml"), find_record("smollm2")
    assert child.name == "smollm2"
    assert child.user == parent.user
    assert child.stop_words == ("<|im_end|>",)


def test_an_unknown_name_gets_near_matches() -> None:
    with pytest.raises(DataError, match=r"unknown template 'chatlm'(?s:.*)did you mean(?s:.*)'chatml'"):
        find_record("chatlm")
    with pytest.raises(DataError, match=r"unknown template 'xyz'(?s:.*)aeva, (?s:.*)chatml, (?s:.*)zephyr"):
        find_record("xyz")


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_name_that_is_left_out_is_said_to_be_so(name: str) -> None:
    assert name not in template_names()
    with pytest.raises(DataError, match=rf"'{name}' of LLaMA Factory is left out(?s:.*)template: auto") as caught:
        find_record(name)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", template_names())
def test_a_name_is_found_again_by_its_near_matches(name: str) -> None:
    middle = len(name) // 2
    for wrong in (name.upper().replace("_", "-"), name[:middle] + "x" + name[middle:], name + "_"):
        with pytest.raises(DataError, match=f"did you mean.*'{re.escape(name)}'"):
            find_record(wrong)


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


def test_efficient_eos_adds_an_end_token_behind_the_last_answer_only() -> None:
    talk = dialogue("a", "b", "c", "d")
    [turns] = bound("glm4").render(talk)
    assert text(turns) == [
        ["[gMASK]<sop><|user|>\na<|assistant|>", "\nb<|user|>"],
        ["\nc<|assistant|>", "\nd<EOS>"],
    ]
    assert turns[0].answer[-1].trainable
    assert turns[-1].answer[-1].trainable
    [turns] = bound("glm4").render(TOOL_DIALOGUE)
    assert text(turns)[0][1].endswith("<|observation|>")
    assert "<EOS>" not in "".join(segment.text for segment in bound("glm4").render_prompt(talk))


def test_an_end_token_that_history_does_not_have_makes_each_answer_a_sequence() -> None:
    first, second = bound("solar").render(dialogue("a", "b", "c", "d"))
    assert text(first) == [["### User:\na\n\n### Assistant:\n", "b<EOS>"]]
    assert text(second) == [
        ["### User:\na\n\n### Assistant:\n", "b"],
        ["### User:\nc\n\n### Assistant:\n", "d<EOS>"],
    ]
    assert [segment.trainable for turn in second for segment in turn.answer] == [False, True, True]


OTHER_ENDS = {"deepseekcoder": "<|EOT|>", "granite3": "<|end_of_text|>"}
"""The end token of these models' tokenizers, which their slots write out."""


@pytest.mark.parametrize("name", template_names())
def test_every_supervised_answer_ends_with_what_stops_generation(name: str) -> None:
    template = NamedTemplate(record=find_record(name), bos="<BOS>", eos=OTHER_ENDS.get(name, "<EOS>"))
    for talk in (dialogue("a", "b", "c", "d", system="s"), TOOL_DIALOGUE):
        answers = [turn for turns in template.render(talk) for turn in turns if turn.answer[-1].trainable]
        places = [place for place, message in enumerate(talk.messages) if message.role == "assistant"]
        assert [turn.message_index for turn in answers] == places
        for turn in answers:
            ends = (
                "".join(segment.text for segment in turn.answer)
                .rstrip()
                .endswith((template.eos, *template.stop_words))
            )
            assert ends == (name != "empty")  # which writes nothing but the texts


@pytest.mark.parametrize("name", template_names())
def test_every_supervised_answer_stands_behind_what_generation_sees(name: str) -> None:
    template = bound(name)
    for talk in (dialogue("a", "b", "c", "<think>\nx\n</think>\n\nd", "e", "f", system="s"), TOOL_DIALOGUE):
        for turns in template.render(talk):
            for number, turn in enumerate(turns):
                if not turn.answer[-1].trainable:
                    continue
                before = "".join("".join(sides) for sides in text(turns[:number])) + text((turn,))[0][0]
                asked = replace(talk, messages=talk.messages[: turn.message_index])
                assert before == "".join(segment.text for segment in template.render_prompt(asked))


def test_the_system_text_of_some_families_is_inside_the_first_user_message() -> None:
    [turns] = bound("llama2").render(dialogue("a", "b", "c", "d", system="s"))
    assert [sides[0] for sides in text(turns)] == [
        "<BOS>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST]",
        "<BOS>[INST] c [/INST]",
    ]
    twice = (Message(role="system", content="s"), Message(role="user", content="a"), Message(role="user", content="b"))
    prompt = bound("gemma").render_prompt(Conversation(messages=twice))
    assert "".join(segment.text for segment in prompt).count("s\n\n") == 1
    alone = bound("gemma").render_prompt(Conversation(messages=twice[:1]))
    assert "".join(segment.text for segment in alone) == "<BOS>s\n\n"


def test_tools_may_have_a_slot_of_their_own() -> None:
    prompt = bound("phi4_mini").render_prompt(Conversation(messages=(), tools=({"name": "f"},)))
    assert [(segment.text, segment.is_literal) for segment in prompt][1:4] == [
        ("<|tool|>", False),
        ('[{"name": "f"}]', True),
        ("<|/tool|>", False),
    ]
    other = bound("phi4_mini", tool_format_name="default")
    assert "Tool Name" in "".join(
        s.text for s in other.render_prompt(Conversation(messages=(), tools=({"name": "f"},)))
    )


def test_the_index_knows_all_entries_and_each_names_a_tool_format() -> None:
    folder = Path(templates.__file__).parent
    parsed = [name for file in folder.glob("*.toml") for name in tomllib.loads(file.read_text(encoding="utf-8"))]
    assert sorted(parsed) == list(template_names())
    for name in parsed:
        assert find_tool_format(find_record(name).tool_format)


def test_one_entry_is_found_without_parsing_the_other_files(repo_dir: Path) -> None:
    code = (
        "from llamafactory.data.chat_template import find_record; find_record('qwen3_vl'); "
        "from llamafactory.data.templates import index; "
        "print(index._read_file.cache_info().currsize)"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo_dir / "src")}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert int(output) == 2  # its own file, and that of chatml
