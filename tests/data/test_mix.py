from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory.data.data_report import mix_lines
from llamafactory.data.mix import Mix, MixStrategy, mix_rows, source_order
from llamafactory.extras.errors import DataError

ORACLE = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}
STRATEGIES = st.sampled_from(list(ORACLE))


def mix_of(sizes: Any, strategy: Any, probs: Any = None, seed: int = 0) -> Mix:
    names = tuple("abcdef"[: len(sizes)])
    return Mix(names=names, sizes=tuple(sizes), strategy=strategy, probs=probs and tuple(probs), seed=seed)


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    weights = st.lists(st.floats(0.05, 5), min_size=len(sizes), max_size=len(sizes))
    return mix_of(sizes, draw(STRATEGIES), draw(st.none() | weights), draw(st.integers(0, 99)))


@settings(deadline=None)
@given(mix=mixes())
def test_without_shuffling_the_rows_are_those_of_datasets(mix: Mix) -> None:
    from datasets import Dataset, interleave_datasets

    starts = np.cumsum([0, *mix.sizes])
    parts = [Dataset.from_dict({"row": list(range(a, b))}) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    probs = None if mix.probs is None else [float(share) for share in mix.shares() or ()]
    strategy: Any = ORACLE[mix.strategy]
    oracle = interleave_datasets(parts, probabilities=probs, seed=mix.seed, stopping_strategy=strategy)
    assert mix_rows(mix, 0, shuffle=False).tolist() == list(oracle["row"])


@given(mix=mixes(), epoch=st.integers(0, 3))
def test_every_epoch_has_the_same_counts_and_other_rows(mix: Mix, epoch: int) -> None:
    plain, drawn = mix_rows(mix, 0, shuffle=False), mix_rows(mix, epoch)
    owner = np.repeat(np.arange(len(mix.sizes)), mix.sizes)
    assert owner[plain].tolist() == owner[drawn].tolist()
    seen = np.bincount(drawn, minlength=sum(mix.sizes))
    for number in range(len(mix.sizes)):
        assert np.ptp(seen[owner == number]) <= 1  # no row comes twice before all came once
    assert (mix_rows(mix, epoch) == drawn).all()


def test_an_epoch_draws_anew() -> None:
    mix = mix_of([1000, 10], "interleave_under", [0.5, 0.5])
    assert set(mix_rows(mix, 0).tolist()) != set(mix_rows(mix, 1).tolist())


@settings(deadline=None, max_examples=20)
@given(
    probs=st.lists(st.floats(0.2, 1), min_size=2, max_size=4),
    strategy=st.sampled_from(list(ORACLE)[:2]),
    seed=st.integers(0, 9),
)
def test_the_mix_of_large_sets_is_within_one_per_cent(probs: list[float], strategy: MixStrategy, seed: int) -> None:
    mix = mix_of([60_000] * len(probs), strategy, probs, seed)
    assert all(abs(one["share"] - one["asked"]) < 0.01 for one in mix.realised())


def test_the_report() -> None:
    lines = mix_lines(mix_of([10, 30], "interleave_over").realised())
    assert lines == [
        "mix: a: 50.0%, 30 draws, 3.00 times its rows",
        "mix: b: 50.0%, 30 draws, 1.00 times its rows",
    ]
    assert "(asked: 25.0%)" in mix_lines(mix_of([10, 30], "interleave_once", [1, 3]).realised())[0]


@pytest.mark.parametrize("strategy", ["interleave_over", "interleave_once"])
def test_a_share_of_zero_never_ends(strategy: MixStrategy) -> None:
    with pytest.raises(DataError, match=r"interleave_probs: 'b' would never run out(?s:.*)share of 0"):
        source_order(mix_of([2, 2], strategy, [1, 0]))
    assert source_order(mix_of([2, 2], "interleave_under", [1, 0])).tolist() == [0, 0]


def test_an_epoch_without_end() -> None:
    with pytest.raises(DataError, match="an epoch would need about 1,000,0(?s:.*)raise its share"):
        source_order(mix_of([2, 1000], "interleave_over", [1, 1e-6]))
