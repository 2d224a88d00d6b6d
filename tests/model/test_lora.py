"""LoRA: what is adapted, what is refused, and that a fresh adapter changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model.adapters import full, lora


@pytest.fixture
def base(tiny_config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32).eval()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 12)[None]).logits.clone()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_rank": 2, "lora_alpha": 1}])
def test_a_fresh_adapter_computes_what_the_base_does(base, options):
    before = logits(base)
    model = lora.apply(base, lora.Options(**options), adapters=(), trainable=True).eval()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_all_means_every_linear_layer_but_the_head(base):
    model = lora.apply(base, lora.Options(), adapters=(), trainable=True)
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(trained(model)) == 2 * 2 * 7


def test_alpha_defaults_to_twice_the_rank(base):
    model: Any = lora.apply(base, lora.Options(lora_rank=4), adapters=(), trainable=True)
    assert model.peft_config["default"].lora_alpha == 8


def test_a_name_that_matches_nothing_is_refused(base):
    with pytest.raises(LlamaFactoryError, match=r"q_porj matches no module of LlamaForCausalLM\. .* q_proj"):
        lora.apply(base, lora.Options(lora_target="q_porj,v_proj"), adapters=(), trainable=True)
    with pytest.raises(LlamaFactoryError, match="mixes all with names"):
        lora.apply(base, lora.Options(lora_target="all,lm_head"), adapters=(), trainable=True)


def test_additional_targets_are_trained_in_full_and_saved(base, tmp_path):
    from safetensors.torch import load_file

    options = lora.Options(lora_target="q_proj", additional_target="norm")
    model = lora.apply(base, options, adapters=(), trainable=True)
    assert any("modules_to_save" in name for name in trained(model))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert any(name.endswith("model.norm.weight") for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_what_is_trained_in_full_is_not_rounded_to_the_dtype_of_the_base(tiny_config, tmp_path):
    def load():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)

    options = lora.Options(additional_target=("norm",))
    model = lora.apply(load(), options, adapters=(), trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + torch.rand(parameter.shape) / 3
    model.save_pretrained(tmp_path)
    again = lora.apply(load(), options, adapters=(tmp_path,), trainable=True)
    values = dict(model.named_parameters())
    trained = [(name, one) for name, one in again.named_parameters() if one.requires_grad]
    assert any("modules_to_save" in name for name, _ in trained)
    assert all(torch.equal(one, values[name]) for name, one in trained)


def make_adapter(tiny_config, folder, seed):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)
    torch.manual_seed(seed)
    model = lora.apply(base, lora.Options(), adapters=(), trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_several_adapters_are_merged_in_order_and_the_last_is_continued(base, tiny_config, tmp_path):
    folders = tuple(make_adapter(tiny_config, tmp_path / str(seed), seed) for seed in (1, 2))
    plain = logits(base)
    one = lora.apply(base, lora.Options(), adapters=folders, trainable=True).eval()
    assert all("lora_" in name for name in trained(one))
    both = logits(one)
    assert (both - plain).abs().max() > 1e-3
    torch.manual_seed(0)
    again = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32).eval()
    merged = lora.apply(again, lora.Options(create_new_adapter=True), adapters=folders, trainable=True).eval()
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-4)


def test_full_trains_everything_or_nothing(base):
    assert trained(full.apply(base, full.Options(), adapters=(), trainable=True)) == {
        n for n, _ in base.named_parameters()
    }
    assert trained(full.apply(base, full.Options(), adapters=(), trainable=False)) == set()
