"""Modelfiles: rendered by Go's own text/template where Go is installed, as Ollama does."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.modelfile import UnwritableTemplateError, write_modelfile
from llamafactory.data.types import Conversation, Message

REPEATS_BEGIN = {"llama2", "llama2_zh", "seed_coder", "seed_oss"}
_TEXTS = ("a", "Wie geht es dir?\nGut.", "{{ .System }} {{", '"x" \\n', "你好 🙂", "<|im_end|>", " spaced ")


def bound(name: str, **options: Any) -> NamedTemplate:
    return NamedTemplate(record=find_record(name), bos="<BOS>", eos="<EOS>", **options)


def body(modelfile: str) -> str:
    match = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[1]


def conversations(seed: int) -> list[tuple[list[dict[str, str]], Conversation]]:
    """Dialogues as Ollama has them (thoughts apart) and as rows have them, the words of a thought left to fill in."""
    choose = random.Random(seed)
    made = []
    for _ in range(6):
        theirs, ours = [], []
        if choose.random() < 0.5:
            theirs.append({"Role": "system", "Content": choose.choice(_TEXTS)})
        for _ in range(choose.randint(0, 2)):
            theirs.append({"Role": "user", "Content": choose.choice(_TEXTS)})
            thought = choose.choice(("", "Hm.\nYes."))
            theirs.append({"Role": "assistant", "Content": choose.choice(_TEXTS[:4]), "Thinking": thought})
        theirs.append({"Role": "user", "Content": choose.choice(_TEXTS)})
        if choose.random() < 0.3:
            theirs += [{"Role": "assistant", "Content": "calls"}, {"Role": "tool", "Content": "result"}]
        ours = [Message(role=one["Role"], content=one["Content"]) for one in theirs]  # type: ignore[arg-type]
        made.append((theirs, Conversation(messages=tuple(ours))))
    return made


def with_thoughts(theirs: list[dict[str, str]], template: NamedTemplate) -> Conversation:
    """The row: thoughts inside the answers of a template that has them."""
    opening, closing = template.record.thought_words
    messages: list[Message] = []
    for one in theirs:
        thought = one.get("Thinking", "") if template.record.is_reasoning else ""
        text = f"{opening}{thought}{closing}{one['Content']}" if thought else one["Content"]
        role: Any = one["Role"]
        messages.append(Message(role=role, content=text))
    return Conversation(messages=tuple(messages))


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go (Debian: golang-go)")
def test_go_writes_what_the_template_writes() -> None:
    requests, expected = [], []
    for number, name in enumerate(name for name in template_names() if name not in REPEATS_BEGIN):
        for choice in (True, False):
            template = bound(name, enable_thinking=choice, preserve_thinking=number % 4 == 0)
            default = template.record.default_system
            for theirs, _ in conversations(number):
                given = theirs[0]["Content"] if theirs[0]["Role"] == "system" else default
                is_set = theirs[-1]["Role"] == "tool"
                data = {"System": given, "Messages": theirs, "Think": number % 2 == 0, "IsThinkSet": is_set}
                requests.append({"Template": body(write_modelfile(template)), "Data": data})
                asked = replace(template, enable_thinking=number % 2 == 0) if is_set else template
                prompt = asked.render_prompt(with_thoughts(theirs, template))
                text = "".join(segment.text for segment in prompt)
                expected.append((name, text.removeprefix("<BOS>")))
    script = Path(__file__).parent / "ollama_render.go"
    done = subprocess.run(
        ["go", "run", str(script)], input=json.dumps(requests), capture_output=True, text=True, check=True
    )
    written = json.loads(done.stdout)
    assert len(written) == len(expected) > 1000
    wrong = {name: (text, right) for text, (name, right) in zip(written, expected, strict=True) if text != right}
    assert not wrong, next(iter(wrong.items()))


@pytest.mark.parametrize("name", template_names())
def test_a_modelfile_is_written_or_says_why_not(name: str) -> None:
    template = bound(name)
    if name in REPEATS_BEGIN:
        with pytest.raises(UnwritableTemplateError, match="the begin token is repeated"):
            write_modelfile(template)
        return
    text = write_modelfile(template)
    assert text.startswith("FROM .\n")
    assert "<BOS>" not in text
    stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    assert set(stops) == {template.end_token, "<EOS>", *template.stop_words}
    assert len(stops) == len(set(stops))
    assert ("\nSYSTEM " in text) == bool(template.record.default_system)


def test_the_whole_of_a_small_one() -> None:
    assert write_modelfile(bound("vicuna", default_system="Be kind.")) == (
        "FROM .\n\n"
        'TEMPLATE """{{ $first := true }}{{ $last := -1 }}{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}'
        "{{ $last = $i }}{{ end }}{{ end }}{{ if $.System }}{{ $.System }}{{ end }}"
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}USER: {{ .Content }} ASSISTANT:'
        '{{ else if eq .Role "tool" }}USER: {{ .Content }} ASSISTANT:'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<EOS>{{ end }}{{ end }}"""\n\n'
        'SYSTEM """Be kind."""\n\n'
        'PARAMETER stop "<EOS>"\n'
        "PARAMETER num_ctx 4096\n"
    )


def test_a_system_text_that_ends_the_quotes_is_refused() -> None:
    with pytest.raises(UnwritableTemplateError, match='no way to write """'):
        write_modelfile(bound("chatml", default_system='Say """hi""".'))
