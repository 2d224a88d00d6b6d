from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.order import epoch_order, sample_order, split_order


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(8, seed=42, epoch=0).tolist() == [7, 0, 4, 2, 1, 3, 5, 6]
    assert epoch_order(8, seed=42, epoch=1).tolist() != epoch_order(8, seed=42, epoch=0).tolist()


@given(st.integers(0, 300), st.integers(-5, 2**40), st.integers(0, 10**6))
def test_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    for order in (epoch_order(num_rows, seed, epoch), split_order(num_rows, seed)):
        assert sorted(order.tolist()) == list(range(num_rows))


def test_the_split_is_unrelated_to_the_first_epoch() -> None:
    assert split_order(100, 42).tolist() != epoch_order(100, 42, 0).tolist()


def test_sampling_repeats_rows_only_where_there_are_too_few() -> None:
    few = sample_order(10, 4, seed=1).tolist()
    assert len(set(few)) == 4
    many = sample_order(3, 8, seed=1).tolist()
    assert len(many) == 8
    assert sorted(many[:3]) == [0, 1, 2]
