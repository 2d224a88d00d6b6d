"""Compares named templates with the published ones in package trl, and writes the table of differences.

python scripts/list_published_differences.py [--check]   # --check writes nothing and fails if the page is not current

Compared is what the model sees before its next answer. Needs no tokenizer: begin and end token are placeholders.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from reference_page import write_or_check

from llamafactory.data.chat_template import NamedTemplate, find_record
from llamafactory.data.jinja_environment import RefusedByTemplateError, compile_jinja, run_jinja
from llamafactory.data.jinja_messages import MessageStyle, as_dicts
from llamafactory.data.types import Conversation, Message, ToolCall

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "published_templates.md"
PUBLISHED = {
    "cohere": "cohere",
    "deepseek3": "deepseekv3",
    "deepseekr1": "deepseek_r1_distill",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "gemma4": "gemma4_v5",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gptoss",
    "lfm2": "lfm2_v2",
    "lfm2_vl": "lfm2_2_5_vl",
    "llama3": "llama3",
    "phi": "phi3_5",
    "qwen": "qwen2_5",
    "qwen2_vl": "qwen2_5_vl",
    "qwen3": "qwen3",
    "qwen3_5": "qwen3_5_think",
    "qwen3_5_nothink": "qwen3_5_nothink",
    "qwen3_6": "qwen3_6",
    "qwen3_nothink": "qwen3_instruct_2507",
    "qwen3_vl_nothink": "qwen3_vl",
}
"""Name of a template -> published file."""
_CALL = ToolCall(name="get_weather", arguments='{"city": "Paris", "days": 2}')
_SECOND = ToolCall(name="get_weather", arguments='{"city": "Rome"}')
_TOOL = {
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "City name"}},
        "required": ["city"],
    },
}
_ASK = Message(role="user", content="How are you?")
_ANSWER = Message(role="assistant", content="I am fine!")
_SYSTEM = Message(role="system", content="Be terse.")
_WEATHER = Message(role="user", content="Weather in Paris?")
_CALLED = Message(role="assistant", content="", tool_calls=(_CALL,))
_RESULT = Message(role="tool", content="21 degrees")
CASES = {
    "one turn": Conversation(messages=(_ASK,)),
    "system": Conversation(messages=(_SYSTEM, _ASK)),
    "three turns": Conversation(messages=(_SYSTEM, _ASK, _ANSWER, _ASK, _ANSWER, _ASK)),
    "past thought": Conversation(
        messages=(_SYSTEM, _ASK, Message(role="assistant", content="{opening}Hm.{closing}Fine."), _ASK)
    ),
    "tools": Conversation(messages=(_SYSTEM, _WEATHER), tools=(_TOOL,)),
    "call and result": Conversation(messages=(_SYSTEM, _WEATHER, _CALLED, _RESULT)),
    "two calls": Conversation(
        messages=(
            _SYSTEM,
            _WEATHER,
            Message(role="assistant", content="", tool_calls=(_CALL, _SECOND)),
            _RESULT,
            _RESULT,
        )
    ),
}
_HEAD = """\
# Named templates and the published ones

Written by `scripts/list_published_differences.py`; a test holds that it is current. For every named template that has
a published counterpart in package trl (`trl/chat_templates`): is the text before the next answer the same? `=` means
that it is, character by character; `refused` that the published template raises an error or writes no tools at all.

Named templates write what LLaMA Factory 0.9 writes, so that its configurations train the same texts. Where the
published template differs, it is the published one that the model was made with: use `template: auto` (the default
where a tokenizer brings a template), which writes the published text exactly ([table](auto_templates.md)). A named
template beside a tokenizer that brings another one shows the difference when a run starts.

Four tool texts of LLaMA Factory look unlike what their models were made with. What became of them:

- `glm4_moe`, and with it `glm4_5v`, `glm4_7` and `aeva`: follows the published template of GLM-4.5 in what servers
  read: every call is closed with `</tool_call>`, and results stand between `<tool_response>` tags. LLaMA Factory
  leaves the last call open and results bare. The place of the tools and the empty thought stay LLaMA Factory's.
- `gemma4`: as LLaMA Factory. The published template puts results inside of the model's own turn, under the tool's
  name, which the slots of a named template cannot say.
- `seed_oss`, `minimax2`: as LLaMA Factory. There is no published template here to compare with.

| name | published | {cases} |
|---|---|{lines}|
"""


def folder() -> Path | None:
    """The published templates; None where package trl is not installed."""
    spec = find_spec("trl")
    return Path(spec.origin).parent / "chat_templates" if spec is not None and spec.origin else None


def page() -> str:
    """The text of the page."""
    head = _HEAD.format(cases=" | ".join(CASES), lines="|".join(["---"] * len(CASES)))
    rows, details = [], []
    for name, file in PUBLISHED.items():
        cells = []
        for case, conversation in CASES.items():
            ours, theirs = texts(name, file, conversation)
            cells.append("refused" if theirs is None else "=" if ours == theirs else "differs")
            if cells[-1] == "differs" and theirs is not None:
                details.append(f"| `{name}` | {case} | {' | '.join(_difference(ours, theirs))} |\n")
        rows.append(f"| `{name}` | `{file}` | {' | '.join(cells)} |\n")
    second = "\n## Where they part\n\nThe first place of each difference, with the text around it.\n\n"
    second += "| name | case | named | published |\n|---|---|---|---|\n"
    return "".join([head, *rows, second, *details])


def texts(name: str, file: str, conversation: Conversation) -> tuple[str, str | None]:
    """What the named and the published template write; None where the published one refuses or leaves tools out."""
    record = find_record(name)
    opening, closing = record.thought_words
    messages = [
        Message(
            role=message.role,
            content=message.content.replace("{opening}", opening).replace("{closing}", closing),
            tool_calls=message.tool_calls,
        )
        for message in conversation.messages
    ]
    shown = Conversation(messages=tuple(messages), tools=conversation.tools)
    template = NamedTemplate(record=record, bos="<BOS>", eos="<EOS>")
    ours = "".join(segment.text for segment in template.render_prompt(shown))
    path = folder()
    if path is None:
        raise FileNotFoundError("package trl is not installed")
    compiled = compile_jinja((path / f"{file}.jinja").read_text(encoding="utf-8"))
    variables: dict[str, Any] = {
        "messages": as_dicts(shown.messages, MessageStyle()),
        "tools": [{"type": "function", "function": tool} for tool in shown.tools or ()] or None,
        "add_generation_prompt": True,
        "bos_token": "<BOS>",
        "eos_token": template.end_token,
    }
    try:
        theirs = run_jinja(compiled, variables)
    except RefusedByTemplateError:
        return ours, None
    asks_for_tools = bool(shown.tools) or any(message.tool_calls for message in shown.messages)
    return ours, theirs if "get_weather" in theirs or not asks_for_tools else None


def _difference(ours: str, theirs: str) -> tuple[str, str]:
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))))
    start = max(common - 12, 0)
    return _code(ours[start : common + 28]), _code(theirs[start : common + 28])


def _code(text: str) -> str:
    """Code in a table cell: bars and line breaks escaped."""
    return "`" + text.replace("\n", "\\n").replace("|", "\\|").replace("`", "'") + "`"


def main(words: list[str]) -> int:
    """Writes or checks the page.

    Returns:
        0, or 1 where `--check` finds another text.
    """
    return write_or_check(words, PAGE, page(), command="python scripts/list_published_differences.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
