"""Checks `template: auto` on every published chat template in package trl, and writes the table of results.

python scripts/list_auto_templates.py [--check]      # --check writes nothing and fails if the page is not current

What is expected comes from transformers alone: `apply_chat_template` gives the text, its ids, and (by the length of
the rendering with the generation prompt) where an answer begins. The tokenizer is that of the embedded model, with the
special tokens of the template added.
"""

from __future__ import annotations

import copy
import re
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reference_page import write_or_check

from llamafactory.data.encode import Encoder, assemble
from llamafactory.data.jinja_messages import as_dicts
from llamafactory.data.jinja_template import JinjaTemplate
from llamafactory.data.render import render_turns
from llamafactory.data.row_error import RowError
from llamafactory.data.types import IGNORE_INDEX, Conversation, MaskOptions, Message, ToolCall, Turn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "auto_templates.md"
_SPECIAL = re.compile(
    r"<\|[\w/-]+\|?>|<[\w-]+\|>|<｜[^｜<>\s]+｜>|\[gMASK\]|<sop>|<(?:start|end)_of_\w+>|<SPECIAL_\d+>|<(?:fake_token_around_)?image>"
)
_WEATHER = {
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_TALK = (
    Message(role="user", content="How are you?"),
    Message(role="assistant", content="I am fine!"),
    Message(role="user", content="你好"),
    Message(role="assistant", content="Very good."),
    Message(role="user", content="Bye"),
    Message(role="assistant", content="See you."),
)
_CALL = ToolCall(name="get_weather", arguments='{"city": "Paris"}')
_TOOLS = (
    Message(role="user", content="Weather in Paris?"),
    Message(role="assistant", content="", tool_calls=(_CALL,)),
    Message(role="tool", content='{"temp": 21}'),
    Message(role="assistant", content="It is 21 degrees."),
    Message(role="user", content="Thanks!"),
    Message(role="assistant", content="You are welcome."),
)
_THOUGHTS = (
    Message(role="user", content="1+1?"),
    Message(role="assistant", content="<think>\nOne and one.\n</think>\n\n2"),
    Message(role="user", content="2+2?"),
    Message(role="assistant", content="<think>\nTwo and two.\n</think>\n\n4"),
)
_SYSTEM = Message(role="system", content="Be terse.")
CASES: dict[str, tuple[Conversation, bool | None]] = {
    "one turn": (Conversation(messages=_TALK[:2]), None),
    "system": (Conversation(messages=(_SYSTEM, *_TALK[:2])), None),
    "three turns": (Conversation(messages=_TALK), None),
    "tools": (Conversation(messages=_TOOLS, tools=(_WEATHER,)), None),
    "thoughts": (Conversation(messages=_THOUGHTS), None),
    "thoughts, true": (Conversation(messages=_THOUGHTS), True),
    "thoughts, false": (Conversation(messages=_THOUGHTS), False),
    "three turns, false": (Conversation(messages=_TALK), False),
}
_HEAD = """\
# `template: auto` on published chat templates

Written by `scripts/list_auto_templates.py`; a test holds that it is current. The templates are those in package trl
(`trl/chat_templates`, without `_training`). A number says how many training sequences a row becomes: where a template
shows earlier answers otherwise than they were generated, each answer has its own. For every number two things were
checked against transformers: the ids of each sequence are those of `apply_chat_template` for the dialogue up to its
last answer, and the tokens that carry loss are exactly those behind the generation prompt, up to the stop, of each
answer that the sequence trains. One column is one dialogue; `true` and `false` are `enable_thinking`, which is not
given elsewhere. `glm4moe` writes no stop behind the last answer, and a warning says so; all others supervise one.

| mark | meaning |
|---|---|
| `p` | the generation prompt is no beginning of the full text, so ids are those of the prompt, then the answer |
| `t` | the template writes no tools; they are written as text first, then ids and mask are as said |
| refused | the template itself raises an error for this dialogue, and so does the row |

"""


def published_files() -> list[Path]:
    """The chat templates in package trl; empty where it is not installed."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "chat_templates"
    return [file for file in sorted(folder.glob("*.jinja")) if "_training" not in file.name]


def with_special_tokens(tokenizer: Any, jinja: str) -> Any:
    """A copy of the tokenizer that knows the special tokens that the template writes."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(jinja)))})
    return own


def check_case(jinja: str, tokenizer: Any, conversation: Conversation, thinking: bool | None) -> str:
    """What becomes of a dialogue, as the table says it; `WRONG: ...` where ids or mask are not what they should be."""
    template = _template(jinja, tokenizer, thinking)
    try:
        sequences = render_turns(conversation, template, MaskOptions())
    except RowError as error:
        return "refused" if error.reason.endswith("refuses the row") else f"WRONG: {error.reason}"
    shown = template._complete(conversation)  # pyright: ignore[reportPrivateUsage]
    expect = _Expected(jinja, tokenizer, template, shown, thinking)
    shift = len(shown.messages) - len(conversation.messages)
    marks: set[str] = set()
    for turns, encoded in zip(sequences, Encoder(tokenizer, is_whole=True).encode(sequences), strict=True):
        example = assemble(encoded, 1_000_000)
        answers = [turn.message_index + shift for turn in turns]
        ids, mask, is_prefix = expect.sequence(answers, turns)
        if example.input_ids.tolist() != ids:
            return "WRONG: ids"
        if (example.labels != IGNORE_INDEX).tolist() != mask:
            return "WRONG: mask"
        marks |= set() if is_prefix else {"p"}
    if conversation.tools and not shown.tools:
        marks.add("t")
    places = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    if sorted(turn.message_index for turns in sequences for turn in turns) != places:
        return "WRONG: answers"
    return " ".join([str(len(sequences)), *sorted(marks)])


@lru_cache(maxsize=4)
def _template(jinja: str, tokenizer: Any, thinking: bool | None) -> JinjaTemplate:
    return JinjaTemplate(jinja, tokenizer, enable_thinking=thinking)


class _Expected:
    """Ids and masks from `apply_chat_template`."""

    def __init__(
        self, jinja: str, tokenizer: Any, template: JinjaTemplate, shown: Conversation, thinking: bool | None
    ) -> None:
        self._tokenizer, self._jinja, self._shown = tokenizer, jinja, shown
        self._style = template._style  # pyright: ignore[reportPrivateUsage]
        self._options = {} if thinking is None else {"enable_thinking": thinking}

    def text(self, stop: int, *, is_asked: bool) -> str:
        """The messages before `stop`, as transformers writes them."""
        return self._tokenizer.apply_chat_template(
            as_dicts(self._shown.messages[:stop], self._style),
            tools=[{"type": "function", "function": dict(tool)} for tool in self._shown.tools or ()] or None,
            chat_template=self._jinja,
            tokenize=False,
            add_generation_prompt=is_asked,
            **self._options,
        )

    def sequence(self, answers: list[int], turns: tuple[Turn, ...]) -> tuple[list[int], list[bool], bool]:
        """Ids, mask, and whether each generation prompt begins the full text."""
        whole = self.text(answers[-1] + 1, is_asked=False)
        prompts = [self.text(place, is_asked=True) for place in answers]
        if not all(whole.startswith(prompt) for prompt in prompts):
            return self._behind_prompt(whole, prompts, turns)
        spans = []
        for place, prompt in zip(answers, prompts, strict=True):
            until = self.text(place + 1, is_asked=False)
            spans.append((len(prompt), len(until.rstrip())))
        return *self._encoded(whole, spans), True

    def _behind_prompt(
        self, whole: str, prompts: list[str], turns: tuple[Turn, ...]
    ) -> tuple[list[int], list[bool], bool]:
        """Prompt and answer; what the answer says behind a thought, and its stop, is the end of the full text."""
        spans, text = [], ""
        for prompt, turn in zip(prompts, turns, strict=True):
            text += "".join(segment.text for segment in turn.prompt)
            assert text == prompt, "not what generation sees"
            answer = "".join(segment.text for segment in turn.answer)
            assert turn is not turns[-1] or whole.endswith(answer.split("</think>")[-1].lstrip()), "another answer"
            spans.append((len(text), len(text) + len(answer.rstrip())))
            text += answer
        return *self._encoded(text, spans), False

    def _encoded(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(first <= start < last for first, last in spans) for start, _ in encoding["offset_mapping"]]
        return list(encoding["input_ids"]), mask


def page() -> str:
    """The text of the page."""
    from transformers import AutoTokenizer

    from llamafactory.model.embedded import EMBEDDED_NAME, resolve_model_path

    base = AutoTokenizer.from_pretrained(resolve_model_path(EMBEDDED_NAME))
    lines = [f"| template | {' | '.join(CASES)} |\n", f"|---|{'---|' * len(CASES)}\n"]
    for file in published_files():
        jinja = file.read_text(encoding="utf-8")
        tokenizer = with_special_tokens(base, jinja)
        cells = [check_case(jinja, tokenizer, *case) for case in CASES.values()]
        lines.append(f"| `{file.stem}` | {' | '.join(cells)} |\n")
    return _HEAD + "".join(lines)


def main(words: list[str]) -> int:
    """Writes or checks the page.

    Returns:
        0, or 1 where `--check` finds another text.
    """
    return write_or_check(words, PAGE, page(), command="python scripts/list_auto_templates.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
