"""kill -9 at any moment: the run goes on with the same rows, and ends with the same losses and weights."""

from __future__ import annotations

import random

import pytest
from tests.faults.cells import CELLS
from tests.faults.harness import Place, compare, kill_at_random

QUICK = ("sft lora dropout, accumulation", "sft full packed, bf16", "sft lora evaluated, best kept",
         "sft lora, streamed")  # fmt: skip


def kill_and_compare(make_place, tally, cell: str, kills: int, seed: int) -> None:
    """Kills runs of one cell until `kills` kills have hit, each run against the same reference."""
    place: Place = make_place(**CELLS[cell])
    place.finish("warm")
    reference, seconds = place.seconds_of("reference")
    rng = random.Random(seed)
    done = number = 0
    while done < kills:
        number += 1
        hit = kill_at_random(place, f"killed-{number}", min(kills - done, 5), seconds, rng)
        compare(place, f"killed-{number}", reference, tally, cell, hit)
        done += hit
        assert number < 3 * kills + 3, "kills never hit"


@pytest.mark.parametrize("cell", QUICK)
def test_a_killed_run_equals_an_uninterrupted_one(make_place, tally, cell):
    kill_and_compare(make_place, tally, cell, kills=3, seed=20261124)


def test_a_kill_while_tokenising_leaves_nothing_half_made(make_place):
    place: Place = make_place()
    reference = place.finish("reference")
    fresh = f"tokenized_path={place.folder / 'tokens'}"
    assert place.begin("killed", fresh, fault="data:1:kill").wait() == -9
    assert place.finish("killed", fresh) == reference


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS)
def test_many_killed_runs_equal_uninterrupted_ones(make_place, tally, cell, request):
    kills = -(-request.config.getoption("--kills") // len(CELLS))  # at least as many in all
    kill_and_compare(make_place, tally, cell, kills=kills, seed=sum(map(ord, cell)))
