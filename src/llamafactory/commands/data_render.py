"""`data render`: conversations in OpenAI form, one a line, as a template writes them. Needs no GPU stack."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory.commands.data_inputs import split_words
from llamafactory.extras.errors import ConfigError, DataError, LlamaFactoryError, Problem
from llamafactory.extras.suggest import did_you_mean

if TYPE_CHECKING:
    from llamafactory.data.types import Template

_BOS, _EOS = "<BOS>", "<EOS>"


def main(argv: list[str]) -> int:
    """Render each line of a file.

    Returns:
        0 where every line was rendered, 1 where one could not be used.

    Raises:
        ConfigError: words are missing or unknown, or there is no such template.
        LlamaFactoryError: the file or the tokenizer cannot be used.
    """
    words, own = split_words("render", argv)
    file = _read_words(words, own)
    find_template = cache(_template_finder(own["template"], own.get("tokenizer")))
    from llamafactory.data.render_lines import render_line
    from llamafactory.data.row_error import RowError

    default = None if own["template"] == "auto" else True  # as in a config
    is_ok = True
    for number, line in _lines(file):
        try:
            sequences = render_line(line, f"{file.name}:{number}", find_template, default_thinking=default)
        except (RowError, DataError) as error:
            is_ok = False
            print(f"error: {file}:{number}: {error}", file=sys.stderr)
            continue
        listed = [[{"text": text, "trainable": trainable} for text, trainable in parts] for parts in sequences]
        if "json" in own:
            print(json.dumps({"file": str(file), "line": number, "sequences": listed}, ensure_ascii=False))
            continue
        if len(listed) > 1:
            text = f"becomes {len(listed)} training sequences; the last one is shown"
            print(f"note: {file}:{number}: {text}", file=sys.stderr)
        print(json.dumps(listed[-1], ensure_ascii=False))
    return 0 if is_ok else 1


def _read_words(words: list[str], own: dict[str, str]) -> Path:
    """The file to render.

    Raises:
        ConfigError: not exactly one file, an unknown word, or no template.
    """
    problems = [
        Problem(key=word, message="unknown word", fix=did_you_mean(word, ("--template", "--tokenizer", "--json")))
        for word in words
        if word.startswith("--")
    ]
    files = [word for word in words if not word.startswith("--")]
    if len(files) != 1:
        given = " ".join(files) or None
        problems.append(Problem(key="FILE.jsonl", given=given, message="one file is needed", fix="give its path"))
    if "template" not in own:
        problems.append(Problem(key="--template", message="missing", fix="--template chatml"))
    elif own["template"] == "auto" and "tokenizer" not in own:
        fix = "add --tokenizer PATH, or name a template"
        problems.append(Problem(key="--template", given="auto", message="needs a tokenizer", fix=fix))
    if problems:
        raise ConfigError(problems)
    return Path(files[0])


def _template_finder(name: str, tokenizer_path: str | None) -> Callable[[bool | None], Template]:
    """What gives the template for a value of `enable_thinking`.

    Raises:
        ConfigError: there is no such template.
        LlamaFactoryError: the tokenizer cannot be loaded.
    """
    from llamafactory.data.chat_template import NamedTemplate, find_record

    record = None
    if name != "auto":
        try:
            record = find_record(name)
        except DataError as error:
            problem = Problem(key="--template", given=name, message=error.what, allowed=error.expected, fix=error.fix)
            raise ConfigError(problem) from error
        if tokenizer_path is None:
            return lambda thinking: NamedTemplate(
                record=record, bos=_BOS, eos=_EOS, enable_thinking=thinking, is_bare=True
            )
    from llamafactory.compose import load_config

    config = load_config({"model_name_or_path": tokenizer_path, "template": name}, command="chat")
    from llamafactory.data.template_choice import build_template
    from llamafactory.train.text import load_text

    tokenizer, _ = load_text(config)
    if record is None:
        return lambda thinking: build_template(name, tokenizer, enable_thinking=thinking)
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    return lambda thinking: NamedTemplate(record=record, bos=bos, eos=eos, enable_thinking=thinking, is_bare=True)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank.

    Raises:
        LlamaFactoryError: the file cannot be read as UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise LlamaFactoryError(f"{file}:{line}: the file is not UTF-8 text") from error
    except OSError as error:
        raise LlamaFactoryError(f"{file}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line
