"""Batched completions against transformers' `generate` and against a forward pass over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory.model.generation import complete
from llamafactory.model.sampling import Sampling, choose_tokens, keep_likeliest, row_seed, uniforms

PROMPTS = [[5, 9, 2], [7], [11, 3, 4, 8, 20, 31, 6], [5, 9]]


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gemma2"])
def model(request: Any, tiny_config: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    changes = {"sliding_window": 6} if request.param in ("mistral", "gemma2") else {}
    config = tiny_config(request.param, **changes)
    attention = "eager" if request.param == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # peaked distributions, so that the likeliest token is far from the next
    return model.eval()


def seeds_for(counts: list[int]) -> list[list[int]]:
    return [[row_seed(1, prompt, number) for number in range(count)] for prompt, count in enumerate(counts)]


def test_greedy_equals_generate(model: Any) -> None:
    stops = frozenset({17, 40, 41, 42, 43})
    found = complete(
        model,
        PROMPTS,
        Sampling(max_new_tokens=12, stop_ids=stops, temperature=0),
        seeds=seeds_for([1, 1, 2, 1]),
        pad_id=0,
    )
    for prompt, completions in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=sorted(stops),
            pad_token_id=0,
        )  # fmt: skip
        for completion in completions:
            assert completion.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rows_at_once", [64, 5, 1])
def test_logps_equal_those_of_whole_sequences(model: Any, rows_at_once: int) -> None:
    sampling = Sampling(max_new_tokens=10, stop_ids=frozenset(range(0, 96, 9)), temperature=0.7, top_k=50, top_p=0.98)
    found = complete(model, PROMPTS, sampling, seeds=seeds_for([3, 1, 2, 4]), pad_id=0, rows_at_once=rows_at_once)
    assert [len(completions) for completions in found] == [3, 1, 2, 4]
    lengths = set()
    for prompt, completions in zip(PROMPTS, found, strict=True):
        for completion in completions:
            whole = torch.tensor([[*prompt, *completion.ids]])
            logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1] / 0.7
            logps = logits.log_softmax(-1)
            expected = logps.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
            assert np.abs(completion.logps - expected.detach().numpy()).max() < 1e-4
            entropy = -(logps.exp() * logps).sum(-1)
            assert np.abs(completion.entropies - entropy.detach().numpy()).max() < 1e-4
            assert completion.is_stopped == (completion.ids[-1] % 9 == 0)
            assert completion.is_stopped or len(completion.ids) == 10
            assert not any(token % 9 == 0 for token in completion.ids[:-1])
            lengths.add(len(completion.ids))
    assert len(lengths) > 2  # rows left at different times


def test_a_row_does_not_depend_on_its_batch(model: Any) -> None:
    sampling = Sampling(max_new_tokens=8, stop_ids=frozenset({1}))
    seeds = seeds_for([2, 2, 2, 2])
    together = complete(model, PROMPTS, sampling, seeds=seeds, pad_id=0)
    for place, prompt in enumerate(PROMPTS):
        alone = complete(model, [prompt], sampling, seeds=[seeds[place][1:]], pad_id=0)
        assert alone[0][0].ids == together[place][1].ids


def test_mode_and_gradients_are_left_alone(model: Any) -> None:
    model.train()
    complete(model, [[3, 4]], Sampling(max_new_tokens=2, stop_ids=frozenset()), seeds=[[1]], pad_id=0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_an_empty_prompt_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        complete(model, [[1], []], Sampling(max_new_tokens=1, stop_ids=frozenset()), seeds=[[1], [2]], pad_id=0)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.5), (1, 0.9), (0, 1e-6), (500, 0.9)])
def test_kept_tokens_are_those_of_transformers(top_k: int, top_p: float) -> None:
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    kept = keep_likeliest(logits, top_k=top_k, top_p=top_p)
    kept = torch.ones_like(logits, dtype=torch.bool) if kept is None else kept
    assert torch.equal(kept, expected > -torch.inf)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -30.0])
    count = 20_000
    sampling = Sampling(max_new_tokens=1, stop_ids=frozenset(), temperature=0.8, top_k=3)
    uniform = torch.from_numpy(uniforms([row_seed(7, row) for row in range(count)], 0))
    choice = choose_tokens(logits.expand(count, 5), uniform, sampling)
    allowed = logits.index_fill(0, torch.tensor([2, 4]), -torch.inf)
    expected = (allowed / 0.8).softmax(0)
    share = torch.bincount(choice.ids, minlength=5) / count
    assert (share - expected).abs().max() < 0.012  # three standard deviations
    assert torch.allclose(choice.logps, (logits / 0.8).log_softmax(0)[choice.ids])


def test_uniforms_are_even_and_differ_by_row_and_place() -> None:
    seeds = [row_seed(3, row) for row in range(2000)]
    values = np.stack([uniforms(seeds, place) for place in range(20)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.08
    assert len(np.unique(values)) == values.size
    assert np.array_equal(values[5], uniforms(seeds, 5))
