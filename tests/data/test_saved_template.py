from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import dialogue

from llamafactory.data.chat_template import NamedTemplate, find_record
from llamafactory.data.jinja_writer import write_jinja
from llamafactory.data.saved_template import chat_template_to_save, find_fault, modelfile_to_save
from llamafactory.data.template_choice import build_template
from llamafactory.hparams.data import DataConfig


class Bare:
    """A tokenizer without a chat template."""

    chat_template = None
    bos_token = "<s>"
    eos_token = "</s>"


def test_a_named_template_is_saved_where_the_tokenizer_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    text = chat_template_to_save(DataConfig(template="llama3"), Bare())
    assert text == write_jinja(NamedTemplate(record=find_record("llama3"), bos="<s>", eos="</s>"))
    assert "saved beside the weights as chat_template.jinja (the tokenizer had none)" in capsys.readouterr().err


def test_it_replaces_another_one_and_leaves_the_same_one(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat_template_to_save(DataConfig(template="auto"), tokenizer) is None
    same = DataConfig(
        template="smollm2", default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    assert chat_template_to_save(same, tokenizer) is None
    assert chat_template_to_save(DataConfig(template="smollm2"), tokenizer) is not None
    assert "in place of the tokenizer's own, which writes other texts" in capsys.readouterr().err


def test_a_text_that_is_not_the_templates_is_never_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "llamafactory.data.saved_template.write_jinja", lambda template: write_jinja(template).replace("user", "User")
    )
    assert chat_template_to_save(DataConfig(template="chatml"), Bare()) is None
    assert "template 'chatml' cannot be written as Jinja" in capsys.readouterr().err


def test_a_refusal_of_tools_is_no_fault_and_one_of_text_is() -> None:
    template = NamedTemplate(record=find_record("lfm2"), bos="<s>", eos="</s>")
    assert find_fault(template, write_jinja(template)) == ""
    assert find_fault(template, "{{ raise_exception('no') }}") == "TemplateError: no"
    other = replace(template, default_system="Be kind.")
    assert "instead of" in find_fault(other, write_jinja(template))


def test_a_modelfile_of_a_named_template(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = modelfile_to_save(DataConfig(template="chatml"), tokenizer)
    assert text is not None
    assert text.startswith('FROM .\n\nTEMPLATE """')
    assert "written from template 'chatml', without tools" in capsys.readouterr().err
    assert modelfile_to_save(DataConfig(template="llama2"), tokenizer) is None
    assert "no Modelfile is written for template 'llama2': the begin token is repeated" in capsys.readouterr().err


def test_a_modelfile_of_the_tokenizers_own_template_is_that_of_its_twin(tokenizer: Any) -> None:
    text = modelfile_to_save(DataConfig(), tokenizer)
    assert text is not None
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n" in text


def test_a_template_without_a_twin_gets_no_modelfile(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(Bare):
        backend_tokenizer = tokenizer.backend_tokenizer
        chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

    assert modelfile_to_save(DataConfig(), Other()) is None
    assert "no named template writes what the tokenizer's own does" in capsys.readouterr().err


def test_a_loaded_tokenizer_writes_what_training_wrote(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = DataConfig(template="vicuna")
    tokenizer.save_pretrained(tmp_path)
    text = chat_template_to_save(data, tokenizer)
    assert text is not None
    (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    talk = dialogue("a", "b", "c")
    named: Any = build_template("vicuna", tokenizer)
    own: Any = build_template("auto", loaded)
    assert [s.text for s in own.render_prompt(talk)] == ["".join(s.text for s in named.render_prompt(talk))]


def test_every_checkpoint_has_it(tokenizer: Any) -> None:
    from llamafactory.train.model_files import ModelFiles

    policy: Any = None
    files = ModelFiles(policy, tokenizer, chat_template="{{ messages }}")._tokenizer_files
    assert files["chat_template.jinja"] == b"{{ messages }}"
    own = ModelFiles(policy, tokenizer)._tokenizer_files["chat_template.jinja"]
    assert own.decode() == tokenizer.chat_template
