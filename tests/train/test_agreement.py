"""Processes that ask each other stop at the same micro-batch, however unequal they are."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from llamafactory.train import agreement
from llamafactory.train.agreement import Turns, together


class Ranks:
    """Threads that stand for processes: each sum waits for all."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=30)
        self.parts: list[torch.Tensor | None] = [None] * count
        self.num_sums = 0

    def accelerator(self, rank: int) -> SimpleNamespace:
        def reduce(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            self.parts[rank] = tensor
            self.barrier.wait()
            total = torch.stack([part for part in self.parts if part is not None]).sum(dim=0)
            self.num_sums += rank == 0
            self.barrier.wait()
            return total

        device = torch.device("cpu")
        return SimpleNamespace(num_processes=len(self.parts), process_index=rank, device=device, reduce=reduce)


@pytest.mark.parametrize("told", [1, 7, 40])
def test_all_ranks_stop_at_the_same_micro_batch(told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    ranks, stopped_at, signals = Ranks(3), [0] * 3, [0] * 3

    def work(rank: int) -> None:
        turns = Turns(ranks.accelerator(rank))
        for place in range(1, 200):
            clock[0] += 0.003 * (rank + 1)
            number = turns.ask(15 if rank == 2 and place >= told else 0)
            if number:
                stopped_at[rank], signals[rank] = place, number
                return

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(stopped_at)) == 1
    assert told <= stopped_at[0] < told + 16
    assert signals == [15] * 3
    assert ranks.num_sums < stopped_at[0] or told == 1


def test_micro_batches_that_take_long_are_asked_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    asked: list[int] = []
    ranks = Ranks(1)
    accelerator = ranks.accelerator(0)
    accelerator.num_processes = 2  # it asks as if there were another
    turns = Turns(accelerator)
    for place in range(20):
        before = ranks.num_sums
        turns.ask(0)
        asked += [place] * (ranks.num_sums - before)
        clock[0] += 0.1 if place < 10 else 5.0
    assert asked[:4] == [0, 2, 6, 14]  # every second, about, and never more than twice as far as before
    assert asked[4:] == [15, 16, 17, 18, 19]


def test_one_process_only_looks_at_its_own_flag() -> None:
    turns = Turns(SimpleNamespace(num_processes=1))
    assert [turns.ask(0), turns.ask(2), turns.ask(0)] == [0, 2, 0]


@pytest.mark.parametrize("failing", [None, 0, 2])
def test_where_the_disk_fails_one_process_none_goes_on(failing: int | None) -> None:
    ranks, ended = Ranks(3), [""] * 3

    def write(rank: int) -> int:
        if rank == failing:
            raise OSError(28, "No space left on device")
        return rank

    def work(rank: int) -> None:
        try:
            ended[rank] = str(together(ranks.accelerator(rank), lambda: write(rank)))
        except OSError as error:
            ended[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    other = "another process could not read or write"
    expected = [str(rank) for rank in range(3)] if failing is None else [other] * 3
    if failing is not None:
        expected[failing] = "[Errno 28] No space left on device"
    assert ended == expected
