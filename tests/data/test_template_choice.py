from __future__ import annotations

from typing import Any

import pytest

from llamafactory.data.jinja_template import JinjaTemplate
from llamafactory.data.template_choice import build_template, plain_stop
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


def test_a_stop_without_a_token_of_its_own_is_said_once(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build_template("auto", tokenizer)
    assert "no token of its own" not in capsys.readouterr().err
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    other.chat_template = tokenizer.chat_template
    for _ in range(2):
        assert build_template("auto", other).name == "auto"
    said = capsys.readouterr().err
    assert said.count('ends answers with "<|im_end|>", for which the tokenizer has no token of its own') == 1
    assert "template: default, which ends answers with the tokenizer's </s>" in said.replace("\n", " ")
    other.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert plain_stop(build_template("auto", other), other) == ""
