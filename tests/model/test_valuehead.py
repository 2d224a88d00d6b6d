"""The value head's file has the compatible keys, and the exported classifier gives the same scores."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model.valuehead import (
    FILE,
    add_value_head,
    as_classifier,
    padding_token,
    save_value_head,
    split_value_head,
)


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)


def test_the_file_has_the_compatible_keys_and_is_read_back(model, tmp_path):
    first = add_value_head(model)
    save_value_head({f"v_head.{k}": v for k, v in first.v_head.state_dict().items()}, tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)
    }  # fmt: skip
    assert not add_value_head(model).v_head.summary.weight.equal(first.v_head.summary.weight)
    assert add_value_head(model, source=tmp_path).v_head.summary.weight.equal(first.v_head.summary.weight)


def test_a_head_of_another_width_is_refused(model, tiny_config, tmp_path):
    split_value_head(add_value_head(model), tmp_path, None)
    wide = AutoModelForCausalLM.from_config(tiny_config(hidden_size=64), dtype=torch.float32)
    with pytest.raises(LlamaFactoryError, match="width 32, and this one has 64"):
        add_value_head(wide, source=tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_gives_the_same_scores(tied, tiny_model_dir, tiny_config, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_config(
        tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=tied, pad_token_id=tokenizer.pad_token_id),
        dtype=torch.float32,
    )
    scored = add_value_head(base)
    classifier, pad = as_classifier(base, scored.v_head, tokenizer)
    assert pad not in (tokenizer.eos_token, tokenizer.bos_token)
    classifier.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ends = [tokenizer.eos_token_id]
    rows = [[5, 9, 300, 7, *ends], [12, 8, *ends]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [loaded.config.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        found = loaded(input_ids=ids, attention_mask=mask).logits[:, 0]
        for row, score in zip(rows, found, strict=True):
            states = base.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1:]
            torch.testing.assert_close(scored.v_head(states)[0], score, rtol=1e-5, atol=1e-6)


def test_a_bias_or_no_pad_token_is_an_error(model, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    head = add_value_head(model).v_head
    torch.nn.init.ones_(head.summary.bias)
    with pytest.raises(LlamaFactoryError, match="has a bias"):
        as_classifier(model, head, tokenizer)
    assert padding_token(tokenizer) in tokenizer.all_special_tokens
