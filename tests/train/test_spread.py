"""Percentile and largest value of many values, in whatever parts they come."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llamafactory.train.spread import merged, over_ranks, read_spread, spread_of


def values(count=5000, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).lognormal(-6, 2, count).astype(np.float32))


def test_percentile_and_largest_value_are_those_of_the_values():
    found = read_spread(spread_of(values(), torch.ones(5000)))
    assert found["max"] == float(values().max())
    assert found["p95"] == pytest.approx(float(np.quantile(values().numpy(), 0.95)), rel=0.05)


def test_parts_and_ranks_make_no_difference():
    whole = spread_of(values(), torch.ones(5000))
    parts = [spread_of(part, torch.ones(len(part))) for part in values().split([1, 0, 3999, 1000])]
    together = parts[0]
    for part in parts[1:]:
        together = merged(together, part)
    assert together.equal(whole)
    ranks = SimpleNamespace(num_processes=4, gather=lambda first: torch.stack(parts)[:, None])
    assert over_ranks(ranks, parts[0][None])[0].equal(whole)


def test_what_has_no_weight_does_not_count():
    weights = torch.tensor([1.0, 0.0, 1.0])
    found = read_spread(spread_of(torch.tensor([0.0, 50.0, 0.0]), weights))
    assert found == {"max": 0.0, "p95": 0.0}
    assert read_spread(spread_of(torch.tensor([3.0]), torch.zeros(1))) == {}
    assert read_spread(spread_of(torch.tensor([3.0, torch.nan]), torch.tensor([1.0, 0.0])))["max"] == 3.0


def test_what_is_not_a_number_is_counted_and_ends_nothing():
    found = read_spread(spread_of(torch.tensor([torch.nan, 1.0, torch.inf]), torch.ones(3)))
    assert found["max"] == float("inf")


@pytest.mark.parametrize("value", [1e-12, 1e-8, 1.0, 999.0, 1e3, 1e6, float("inf")])
def test_any_size_is_counted(value):
    found = read_spread(spread_of(torch.full((3,), value), torch.ones(3)))
    assert found["max"] == pytest.approx(value)
    assert found["p95"] <= value
