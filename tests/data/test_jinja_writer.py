"""Named templates written as Jinja write the same texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.conftest import TOOL_DIALOGUE, WEATHER, dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.jinja_environment import RefusedByTemplateError, compile_jinja, run_jinja
from llamafactory.data.jinja_messages import MessageStyle, as_dicts
from llamafactory.data.jinja_tools import tools_in_jinja
from llamafactory.data.jinja_writer import write_jinja
from llamafactory.data.tool_formats import find_tool_format, tool_format_names
from llamafactory.data.types import Conversation, Message, ToolCall

_TEXTS = st.text("ab\n {}<|>/'\"\\é你🙂", max_size=8) | st.sampled_from(
    [
        "{{ x }}",
        "{% if %}",
        "<|im_end|>",
        "<think>\nOne.\n</think>\n\n1",
        "</think>",
        "<think>a<think>b</think>c",
        "\n\n",
    ]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | _TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXTS, inner, max_size=2),
    max_leaves=4,
)
_NAMES = st.text("abc_", min_size=1, max_size=5)
_CALLS = st.builds(
    lambda name, given: ToolCall(name=name, arguments=json.dumps(given, ensure_ascii=False)),
    _NAMES,
    st.dictionaries(_NAMES, _VALUES, max_size=2),
)
_FIELD = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "integer"])},
    optional={
        "description": _TEXTS,
        "enum": st.lists(st.sampled_from(["c", "f"]), min_size=1, max_size=2),
        "items": st.just({"type": "string"}),
    },
)
_TOOLS = st.builds(
    lambda name, about, fields, required: {
        "name": name,
        "description": about,
        "parameters": {"type": "object", "properties": fields, "required": required},
    },
    _NAMES,
    _TEXTS,
    st.dictionaries(_NAMES, _FIELD, max_size=2),
    st.lists(_NAMES, max_size=2),
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Dialogues with repeated roles, calls, results and tools, all in any order."""
    messages = [Message(role="system", content=draw(_TEXTS))] if draw(st.booleans()) else []
    has_tools = draw(st.booleans())
    roles = ("user", "assistant", "tool") if has_tools else ("user", "assistant")
    for role in draw(st.lists(st.sampled_from(roles), min_size=1, max_size=6)):
        calls = draw(st.lists(_CALLS, max_size=2)) if has_tools and role == "assistant" else []
        messages.append(Message(role=role, content=draw(_TEXTS), tool_calls=tuple(calls)))
    tools = draw(st.lists(_TOOLS, min_size=1, max_size=2)) if has_tools and draw(st.booleans()) else None
    return Conversation(messages=tuple(messages), tools=None if tools is None else tuple(tools))


def bound(name: str, **options: Any) -> NamedTemplate:
    return NamedTemplate(record=find_record(name), bos="<BOS>", eos="<EOS>", **options)


def shown(template: NamedTemplate, conversation: Conversation, **variables: Any) -> str:
    """What the written template writes."""
    given = {
        "messages": as_dicts(conversation.messages, MessageStyle()),
        "tools": [{"type": "function", "function": tool} for tool in conversation.tools or ()] or None,
        "add_generation_prompt": True,
        **variables,
    }
    return run_jinja(compile_jinja(write_jinja(template)), given)


def prompt(template: NamedTemplate, conversation: Conversation) -> str:
    return "".join(segment.text for segment in template.render_prompt(conversation))


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(template_names()),
    conversation=conversations(),
    choice=st.sampled_from([True, False, None]),
    keeps=st.booleans(),
    system=st.none() | _TEXTS,
)
def test_the_written_template_writes_the_same_text(
    name: str, conversation: Conversation, choice: bool | None, keeps: bool, system: str | None
) -> None:
    template = bound(name, enable_thinking=choice, preserve_thinking=keeps, default_system=system)
    has_tools = conversation.tools or any(message.tool_calls for message in conversation.messages)
    if has_tools and template.record.tool_format in ("gemma4", "lfm2"):
        with pytest.raises(RefusedByTemplateError, match="this chat template has no tools"):
            shown(template, conversation)
    else:
        assert shown(template, conversation) == prompt(template, conversation)


@pytest.mark.parametrize("name", template_names())
def test_every_template_can_be_written(name: str) -> None:
    for talk in (dialogue("a"), dialogue("a", "b", "c", system="s"), dialogue("a", "<think>\nx\n</think>\n\ny", "c")):
        for choice in (True, False):
            template = bound(name, enable_thinking=choice)
            assert shown(template, talk) == prompt(template, talk)
    if find_record(name).tool_format not in ("gemma4", "lfm2"):
        assert shown(bound(name), TOOL_DIALOGUE) == prompt(bound(name), TOOL_DIALOGUE)


def test_which_tool_syntaxes_can_be_written() -> None:
    missing = {name for name in tool_format_names() if not tools_in_jinja(name, find_tool_format(name)).calls}
    assert missing == {"gemma4", "lfm2"}
    with pytest.raises(RefusedByTemplateError, match="the tool syntax 'lfm2' cannot be written in Jinja"):
        shown(bound("lfm2"), TOOL_DIALOGUE)


def test_thinking_may_be_chosen_later() -> None:
    talk = dialogue("a", "<think>\nOne.\n</think>\n\n1", "b")
    for choice in (True, False):
        for keeps in (True, False):
            expected = prompt(bound("qwen3", enable_thinking=choice, preserve_thinking=keeps), talk)
            written = shown(bound("qwen3"), talk, enable_thinking=choice, preserve_thinking=keeps)
            assert written == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<|im_start|>user\na<|im_end|>\n"),
        ("llama3", "<BOS><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"),
        ("vicuna", "USER: a"),
        ("gemma", "<BOS><start_of_turn>user\na<end_of_turn>\n"),
    ],
)
def test_what_asks_for_an_answer_is_left_out_where_none_is_asked_for(name: str, text: str) -> None:
    assert shown(bound(name, default_system=""), dialogue("a"), add_generation_prompt=False) == text


@pytest.mark.parametrize("name", ["chatml", "llama2", "qwen3", "deepseek3", "phi4_mini"])
def test_transformers_writes_it_too(tokenizer: Any, name: str) -> None:
    template = bound(name)
    written = tokenizer.apply_chat_template(
        as_dicts(TOOL_DIALOGUE.messages, MessageStyle()),
        tools=[{"type": "function", "function": WEATHER}],
        chat_template=write_jinja(template),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert written == prompt(template, TOOL_DIALOGUE)
