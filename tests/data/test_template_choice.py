from __future__ import annotations

from typing import Any

import pytest

from llamafactory.data.jinja_template import JinjaTemplate
from llamafactory.data.template_choice import build_template
from llamafactory.extras.errors import DataError


class Bare:
    """A tokenizer without a chat template."""

    chat_template = None
    bos_token = None
    eos_token = "</s>"


@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_is_the_tokenizers_own_template(tokenizer: Any, name: str | None) -> None:
    template = build_template(name, tokenizer)
    assert isinstance(template, JinjaTemplate)
    assert template.name == "auto"
    with pytest.raises(DataError, match=r"no chat template(?s:.*)chatml"):
        build_template(name, Bare())


def test_a_named_template_takes_the_tokens_of_the_tokenizer() -> None:
    template: Any = build_template("default", Bare())
    assert (template.bos, template.eos) == ("", "</s>")


def test_a_difference_from_the_tokenizers_own_is_shown_once(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    build_template("smollm2", tokenizer)
    build_template("smollm2", tokenizer)
    shown = capsys.readouterr().err
    assert shown.count("template 'smollm2' (-) is used") == 1
    assert "-You are a helpful AI assistant named SmolLM, trained by Hugging Face.<|im_end|>" in shown
    assert "+You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>" in shown
    assert "with a system message" not in shown


def test_an_unknown_name_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="unknown template 'smolm2'"):
        build_template("smolm2", tokenizer)
