"""Rows laid end to end give what each row gives alone, for every model type that claims it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.model import attention
from llamafactory.model.family import FAMILIES, family_of
from llamafactory.train.logprob import _forward

LENGTHS = (7, 1, 23, 7, 12)


def build(config, implementation):
    torch.manual_seed(0)
    attention.register()
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", sorted(name for name, family in FAMILIES.items() if family.segments))
@pytest.mark.parametrize("window", [None, 5])
def test_flat_logits_equal_those_of_each_row_alone(model_type, window, tiny_config, make_examples):
    changes = {} if window is None else {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    config = tiny_config(model_type, **changes)
    examples = make_examples(LENGTHS)
    flat = _forward(build(config, attention.NAME), collate_flat(examples)).logits[0]
    stock = build(config, "eager")
    for example, piece in zip(examples, flat.split(LENGTHS), strict=True):
        alone = stock(input_ids=torch.tensor(example.input_ids, dtype=torch.long)[None]).logits[0]
        torch.testing.assert_close(piece, alone, rtol=1e-5, atol=1e-5)


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


def test_unlisted_model_types_promise_nothing():
    assert not family_of("mamba").segments
    assert family_of("mamba").head is None
