"""Rows laid end to end give what each row gives alone, for every model type that claims it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.model import attention
from llamafactory.model.family import FAMILIES, family_of
from llamafactory.train.logprob import _forward, supervised_nll, token_logprobs

LENGTHS = (7, 1, 23, 7, 12)


SMALL = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "attn_logit_softcapping": 1.5, "final_logit_softcapping": 0.7, "logit_scale": 0.4, "logits_scaling": 3.0,
    "attention_multiplier": 0.7, "residual_multiplier": 0.6, "embedding_multiplier": 1.4, "rope_scaling": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Every number that a family may have and llama has not, so that a test sees whether it is used."""
WINDOW = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}
SEGMENT_TYPES = sorted(name for name, family in FAMILIES.items() if family.segments)


def build(config, implementation):
    torch.manual_seed(0)
    attention.register()
    config = copy.deepcopy(config)  # transformers writes the implementation into it
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as large as in a trained model, so that scores differ
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model


@pytest.mark.parametrize("model_type", SEGMENT_TYPES)
@pytest.mark.parametrize("window", [None, 5])
def test_flat_logits_equal_those_of_each_row_alone(model_type, window, tiny_config, make_examples):
    config = tiny_config(model_type, **SMALL, **({} if window is None else WINDOW))
    examples = make_examples(LENGTHS)
    flat = _forward(build(config, attention.NAME), collate_flat(examples)).logits[0]
    stock = build(config, "eager")
    for example, piece in zip(examples, flat.split(LENGTHS), strict=True):
        alone = stock(input_ids=torch.tensor(example.input_ids, dtype=torch.long)[None]).logits[0]
        torch.testing.assert_close(piece, alone, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("model_type", SEGMENT_TYPES)
def test_loss_and_logprobs_of_each_family_are_those_of_its_rows_alone(model_type, tiny_config, make_examples):
    config = tiny_config(model_type, **SMALL)
    examples = make_examples(LENGTHS)
    stock, ours = build(config, "eager"), build(config, attention.NAME)
    expected = []
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        logprobs = torch.log_softmax(stock(input_ids=ids[None]).logits[0, :-1], -1)
        places = torch.from_numpy(example.labels[1:] != -100)
        expected.append(logprobs[places].gather(1, ids[1:][places, None]).squeeze(1))
    plan = SimpleNamespace(fused_head=True, loss_chunk_rows=4, fused_blocks=True)
    batch = collate_flat(examples)
    torch.testing.assert_close(token_logprobs(ours, batch, plan), torch.cat(expected), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(supervised_nll(ours, batch, plan), -torch.cat(expected).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", ["cohere2", "gemma2", "gpt_oss", "granitemoe", "olmo2", "phi3", "qwen3_moe"])
def test_gradients_of_other_blocks_are_those_of_their_rows_alone(model_type, tiny_config, make_examples):
    config = tiny_config(model_type, **SMALL)
    examples = make_examples(LENGTHS)
    stock, ours = build(config, "eager"), build(config, attention.NAME)
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        places = torch.from_numpy(example.labels[1:] != -100)
        logprobs = torch.log_softmax(stock(input_ids=ids[None]).logits[0, :-1], -1)[places]
        (-logprobs.gather(1, ids[1:][places, None]).sum()).backward()
    plan = SimpleNamespace(fused_head=True, loss_chunk_rows=4, fused_blocks=True)
    supervised_nll(ours, collate_flat(examples), plan).backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in ours.named_parameters() if parameter.grad is not None} == expected.keys()
    found = dict(ours.named_parameters())
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name].grad - value).norm() < 1e-5 * whole, name


@pytest.mark.parametrize("model_type", SEGMENT_TYPES)
def test_each_family_keeps_segments_apart_and_has_an_exact_fallback(model_type, tiny_config, make_examples):
    """Another order, neighbour, chunk and pass; and right-padded batches, which the plan falls back to."""
    config = tiny_config(model_type, **SMALL)
    ours, stock = build(config, attention.NAME), build(config, "eager")
    plan = SimpleNamespace(fused_head=True, loss_chunk_rows=256, fused_blocks=False)
    rows = make_examples(LENGTHS)
    sizes = [row.num_supervised for row in rows]
    with torch.no_grad():
        whole = token_logprobs(ours, collate_flat(rows), plan)
        before = whole.split(sizes)
        turned = token_logprobs(ours, collate_flat(rows[::-1]), plan).split(sizes[::-1])
        changed = [*rows[:2], make_examples((23,), seed=9)[0], *rows[3:]]
        sizes_changed = [row.num_supervised for row in changed]
        after = token_logprobs(ours, collate_flat(changed), plan).split(sizes_changed)
        fallback = token_logprobs(stock, collate_padded(rows, pad_id=0), plan)
        small = SimpleNamespace(fused_head=True, loss_chunk_rows=3, fused_blocks=False)
        parts = [supervised_nll(ours, collate_flat(part), small) for part in (rows[:2], rows[2:])]
    for one, same in zip(before, reversed(turned), strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=1e-5)
    for place in (0, 1, 3, 4):
        torch.testing.assert_close(before[place], after[place], rtol=0, atol=1e-6)
    assert (before[2].mean() - after[2].mean()).abs() > 1e-4
    torch.testing.assert_close(fallback, whole, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(sum(parts), -whole.sum(), rtol=1e-5, atol=0)


def test_sliding_window_is_really_in_use(tiny_config, make_examples):
    examples = make_examples((23,))
    logits = [
        _forward(build(tiny_config("mistral", sliding_window=window), attention.NAME), collate_flat(examples)).logits
        for window in (None, 5)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_changing_one_segment_leaves_the_others_alone(tiny_config, make_examples):
    model = build(tiny_config(), attention.NAME)
    examples = make_examples(LENGTHS)
    changed = [examples[0], examples[1], make_examples((23,), seed=9)[0], *examples[3:]]
    before, after = (_forward(model, collate_flat(rows)).logits[0].split(LENGTHS) for rows in (examples, changed))
    for place in (0, 1, 3, 4):
        torch.testing.assert_close(before[place], after[place], rtol=0, atol=1e-6)
    assert (before[2] - after[2]).abs().max() > 1e-2


def test_permuting_segments_permutes_the_logits(tiny_config, make_examples):
    model = build(tiny_config(), attention.NAME)
    examples = make_examples(LENGTHS)
    forward = _forward(model, collate_flat(examples)).logits[0].split(LENGTHS)
    backward = _forward(model, collate_flat(examples[::-1])).logits[0].split(LENGTHS[::-1])
    for one, other in zip(forward, reversed(backward), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_padded_batches_and_generation_use_the_stock_path(tiny_config, make_examples):
    config = tiny_config()
    examples = make_examples((9, 4))
    padded = collate_padded(examples, pad_id=0)
    ours, stock = build(config, attention.NAME), build(config, "sdpa")
    torch.testing.assert_close(_forward(ours, padded).logits, _forward(stock, padded).logits)
    prompt = torch.tensor(examples[0].input_ids, dtype=torch.long)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    torch.testing.assert_close(ours.generate(prompt, **options), stock.generate(prompt, **options))


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("window", [None, 5])
def test_generation_keeps_soft_caps_and_sinks(model_type, window, tiny_config):
    config = tiny_config(model_type, **SMALL, **({} if window is None else WINDOW))
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # a short prompt, filled on the left
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    found = [
        torch.stack(build(config, name).generate(ids, return_dict_in_generate=True, **options).logits)
        for name in (attention.NAME, "eager")
    ]
    assert torch.allclose(*found, atol=1e-4)


def test_unlisted_model_types_promise_nothing():
    assert not family_of("mamba").segments
    assert family_of("mamba").head is None


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_shared_prefix_keeps_soft_caps_and_sinks(model_type, window, tiny_config, make_examples):
    config = tiny_config(model_type, **SMALL, **({} if window is None else WINDOW))
    prefix, one, other = (example.input_ids for example in make_examples((9, 7, 4)))
    model = build(config, attention.NAME)
    ids = np.concatenate([prefix, one, other])
    positions = np.concatenate([np.arange(16), np.arange(9, 13)])
    tree = model(
        input_ids=torch.tensor(ids, dtype=torch.long)[None], position_ids=torch.tensor(positions)[None],
        attention_mask=attention.no_mask("cpu"), segment_lengths=((9, 7, 4),), use_cache=False,
    ).logits[0]  # fmt: skip
    stock = build(config, "eager")
    for branch, piece in ((one, tree[9:16]), (other, tree[16:])):
        whole = torch.tensor(np.concatenate([prefix, branch]), dtype=torch.long)[None]
        torch.testing.assert_close(piece, stock(input_ids=whole).logits[0, 9:], rtol=2e-5, atol=2e-5)
