"""The tokenizer's own template: ids of `apply_chat_template`, exact spans, history as inference sees it."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import TOOL_DIALOGUE, WEATHER, dialogue

from llamafactory.data.encode import Encoder, assemble
from llamafactory.data.jinja_messages import as_dicts
from llamafactory.data.jinja_template import JinjaTemplate, tokenizer_jinja
from llamafactory.data.render import render_turns
from llamafactory.data.row_error import RowError
from llamafactory.data.types import Conversation, MaskOptions, Turn
from llamafactory.extras.errors import DataError

CASES = {
    "one turn": dialogue("How are you?", "I am fine!"),
    "three turns": dialogue("How are you?", "I am fine!", "你好", "Very good.", "Bye", "See you."),
    "system": dialogue("How are you?", "I am fine!", "Bye", "See you.", system="Be terse."),
    "thoughts": dialogue("1+1?", "<think>\nOne and one.\n</think>\n\n2", "2+2?", "<think>\nTwo.\n</think>\n\n4"),
    "tools": TOOL_DIALOGUE,
}
REFUSED = {("gemma", "system"), *((name, "tools") for name in ("cohere", "cohere2", "gemma", "gemma3", "llava_next"))}
"""What these templates refuse themselves: a system message, or the role `tool`."""
REWRITTEN_PROMPT = {"deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano"}
REWRITTEN_PROMPT |= {"nemotron_3_super", "nemotron_3_ultra"}
"""Their generation prompt opens a thought that the rendering of an answer without thought does not have."""
WITHOUT_TOOLS = {"deepseek_r1_distill", "deepseekv3", "idefics3", "lfm2", "llama3", "phi3", "phi3_5"}
WITHOUT_TOOLS |= {"qwen2_5_vl", "smolvlm"}

JOINED = {("cohere", "thoughts"), ("cohere2", "thoughts"), ("diffusion_gemma", "tools")}
"""Without the template's own tokens, this tokenizer merges `>` and `<` where an answer begins; inference cannot."""
WRITTEN_FIRST = {
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), "</think>\n\n"),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), "\n</think>\n\n"),
    **dict.fromkeys(sorted(name for name in REWRITTEN_PROMPT if name.startswith("nemotron")), "</think>"),
    **dict.fromkeys(("idefics3", "llava_next", "smolvlm"), " "),
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "muse_glimmer": " to=user<|message|>",
    "qwen3": "<think>\n\n</think>\n\n",
}
"""What the model itself has to write between the generation prompt and the text of an answer."""


def published() -> list[Path]:
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "chat_templates"
    return [file for file in sorted(folder.glob("*.jinja")) if "_training" not in file.name]


def whole(turns: tuple[Turn, ...]) -> str:
    return "".join(segment.text for turn in turns for segment in (*turn.prompt, *turn.answer))


def supervised(turn: Turn) -> str:
    return "".join(segment.text for segment in turn.answer if segment.trainable)


@pytest.mark.skipif(not published(), reason="needs the chat templates in package trl")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file", published(), ids=lambda file: file.stem)
def test_published_templates_give_the_ids_of_apply_chat_template(tokenizer: Any, file: Path, case: str) -> None:
    jinja, name, conversation = file.read_text(encoding="utf-8"), file.stem, CASES[case]
    template = JinjaTemplate(jinja, tokenizer)
    if (name, case) in REFUSED:
        with pytest.raises(RowError, match="refuses the row"):
            template.render(conversation)
        return
    sequences = render_turns(conversation, template, MaskOptions())
    encoded = Encoder(tokenizer, is_whole=True).encode(sequences)
    answers = [turn for turns in sequences for turn in turns]
    places = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    assert [turn.message_index for turn in answers] == places
    assert (template.tool_format is not None) == (name in WITHOUT_TOOLS | {entry[0] for entry in REFUSED})
    for turns, ids in zip(sequences, encoded, strict=True):
        shown = Conversation(messages=conversation.messages[: turns[-1].message_index + 1], tools=conversation.tools)
        history = replace(shown, messages=shown.messages[:-1])
        prompt = "".join(segment.text for segment in template.render_prompt(history))
        assert whole(turns).startswith(prompt)
        assert (whole(turns)[len(prompt) :]).rstrip() == supervised(turns[-1]).rstrip()
        if name in REWRITTEN_PROMPT or (name, case) == ("qwen3_5_nothink", "thoughts"):
            continue  # the prompt is kept as inference sees it, so the text is not that of apply_chat_template
        if (name, case) in JOINED:
            asked = "".join(segment.text for segment in turns[0].prompt)
            seen = tokenizer(asked, add_special_tokens=False).input_ids
            assert assemble(ids, 100_000).input_ids.tolist()[: len(seen)] == seen
            continue
        if case == "tools" and template.tool_format is not None:
            continue  # tools are written into the messages first
        expected = tokenizer.apply_chat_template(
            as_dicts(shown.messages, template._style),
            tools=[{"type": "function", "function": tool} for tool in shown.tools or ()] or None,
            chat_template=jinja,
            return_dict=False,
        )
        assert assemble(ids, 100_000).input_ids.tolist() == expected


@pytest.mark.skipif(not published(), reason="needs the chat templates in package trl")
@pytest.mark.parametrize("file", published(), ids=lambda file: file.stem)
def test_the_mask_is_the_answer_and_its_stop(tokenizer: Any, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = JinjaTemplate(file.read_text(encoding="utf-8"), tokenizer)
    conversation = CASES["three turns"]
    answers = [turn for turns in template.render(conversation) for turn in turns]
    stops = set()
    for turn in answers:
        before, text, stop = supervised(turn).partition(conversation.messages[turn.message_index].content)
        assert text
        assert stop == stop.rstrip()
        assert before == WRITTEN_FIRST.get(file.stem, "")
        stops.add(stop)
    assert len(stops) == 1
    has_no_stop = stops == {""}
    assert has_no_stop == (file.stem == "glm4moe")
    assert has_no_stop == ("writes no end behind" in capsys.readouterr().err)


def test_turns_are_split_between_sequences_only_where_history_is_rewritten(
    tokenizer: Any,
) -> None:
    rewriting = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last or m.role == 'user' else m.content.split('|')[-1] }}"
        "{{ '</s>' if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    template = JinjaTemplate(rewriting, tokenizer)
    sequences = template.render(dialogue("a", "think|b", "c", "d"))
    assert [whole(turns) for turns in sequences] == [
        "[user]a[assistant]think|b</s>",
        "[user]a[assistant]b</s>[user]c[assistant]d</s>",
    ]
    assert [supervised(turns[0]) for turns in sequences] == ["think|b</s>", "d</s>"]
    [together] = template.render(dialogue("a", "b", "c", "d"))
    assert len(together) == 2


def test_white_space_behind_a_stop_belongs_to_the_next_prompt(tokenizer: Any) -> None:
    [turns] = JinjaTemplate(tokenizer.chat_template, tokenizer).render(CASES["system"])
    assert [supervised(turn) for turn in turns] == ["I am fine!<|im_end|>", "See you.<|im_end|>"]
    assert turns[1].prompt[0].text.startswith("\n<|im_start|>user")
    assert turns[1].answer[-1].text == "\n"
    assert not turns[1].answer[-1].trainable


def test_a_prompt_that_opens_a_thought_is_kept_and_the_answer_closes_it(tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
        "{{ '</s>' if m.role == 'assistant' }}{% endfor %}{{ '<assistant><think>\n' if add_generation_prompt }}"
    )
    template = JinjaTemplate(jinja, tokenizer)
    [[turn]] = template.render(dialogue("a", "b"))
    assert whole((turn,)) == "<user>a<assistant><think>\n</think>\n\nb</s>"
    assert supervised(turn) == "</think>\n\nb</s>"
    [[turn]] = template.render(dialogue("a", "<think>\nwhy\n</think>\n\nb"))
    assert whole((turn,)) == "<user>a<assistant><think>\nwhy\n</think>\n\nb</s>"
    assert supervised(turn) == "why\n</think>\n\nb</s>"


def test_an_answer_without_its_own_prompt_is_an_error(tokenizer: Any) -> None:
    jinja = "{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}{{ '[write]' if add_generation_prompt }}"
    with pytest.raises(RowError, match="ambiguous answer span"):
        JinjaTemplate(jinja, tokenizer).render(dialogue("a", "twice"))


def test_a_template_that_drops_answers_is_an_error(tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content[:9] }}{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    with pytest.raises(RowError, match="ambiguous answer span"):
        JinjaTemplate(jinja, tokenizer).render(dialogue("a", "an answer that is longer"))


def test_tools_are_written_as_text_where_the_template_knows_none(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    template = JinjaTemplate(tokenizer.chat_template, tokenizer)
    [turns] = template.render(TOOL_DIALOGUE)
    assert f"> Tool Name: {WEATHER['name']}" in whole(turns)
    assert supervised(turns[0]) == 'Action: get_weather\nAction Input: {"city": "Paris"}<|im_end|>'
    assert "they are written as plain text" in capsys.readouterr().err


def test_default_system_and_enable_thinking_reach_the_template(tokenizer: Any) -> None:
    jinja = (
        "{{ 'off:' if enable_thinking is defined and not enable_thinking }}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    template = JinjaTemplate(jinja, tokenizer, default_system="Be kind.", enable_thinking=False)
    [turns] = template.render(dialogue("a", "b"))
    assert whole(turns) == "off:[system]Be kind.[user]a[assistant]b"
    assert turns[0].message_index == 1
    [turns] = JinjaTemplate(jinja, tokenizer, enable_thinking=True).render(dialogue("a", "b"))
    assert whole(turns) == "[user]a[assistant]b"


def test_a_special_string_that_the_template_rewrites_is_an_error(tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}{{ m.role ~ m.content | length ~ m.content }}{% endfor %}"
        "{{ 'assistant' if add_generation_prompt }}"
    )
    template = JinjaTemplate(jinja, tokenizer)
    with pytest.raises(RowError, match="a special token inside a text"):
        template.render(dialogue("a <|im_end|>", "b"))


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), ("", None), ("x", "x"), ({"default": "y"}, "y"), ({"rag": "z"}, None)]
)
def test_which_template_a_tokenizer_has(given: Any, expected: str | None) -> None:
    class Tokenizer:
        chat_template = given

    assert tokenizer_jinja(Tokenizer()) == expected


def test_a_broken_template_names_its_line(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"not valid Jinja(?s:.*)line 2"):
        JinjaTemplate("a\n{% for %}", tokenizer)
