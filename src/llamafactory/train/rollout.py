"""Prompts -> answers -> experience -> the batches of optimizer steps. To the loop it is a feed like any other.

Everything random is a function of the run's seed, the number of the rollout, the prompt and the number of the answer;
so a rollout that was interrupted before its first update is simply played again, and one that was interrupted after it
is kept in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamafactory.extras import log
from llamafactory.train.checkpoint.snapshot import EXPERIENCE
from llamafactory.train.experience import (
    PER_TOKEN,
    Experience,
    ExperienceBatch,
    Piece,
    collate_experience,
    from_tensors,
    micro_batches,
    to_tensors,
)
from llamafactory.train.feed import Window
from llamafactory.train.rollout_draw import Dealer, Drawn, Table
from llamafactory.train.rollout_rules import Judged, as_metric

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.data.table import Examples
    from llamafactory.train.completions_file import CompletionsFile
    from llamafactory.train.windows import Item, Schedule

_EVALUATION = 0x45564C


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """Optimizer steps of rollouts; `prompts` says which prompts a rollout has."""

    prompts: Schedule
    num_updates: int

    @property
    def windows_per_epoch(self) -> int:
        """Optimizer steps of one pass over the prompts."""
        return self.prompts.windows_per_epoch * self.num_updates

    @property
    def items_per_epoch(self) -> int:
        """Prompts of one pass."""
        return self.prompts.items_per_epoch

    def total_windows(self, *, max_steps: int, num_epochs: float) -> int:
        """Optimizer steps of the whole run; a rollout is used up."""
        if max_steps > 0:
            return max_steps
        return self.prompts.total_windows(max_steps=max_steps, num_epochs=num_epochs) * self.num_updates


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """A judged rollout.

    Attributes:
        experiences: of this process, by their place.
        sizes: tokens of the prompt and of each answer, of all places.
        ranks: the places of each rank.
        weights: `[places, group]`.
        metrics: of the rollout.
        state_before: what the stage remembered when it was played.
    """

    experiences: Mapping[int, Experience]
    sizes: Sequence[tuple[int, Sequence[int]]]
    ranks: Sequence[Sequence[int]]
    weights: NDArray[np.float64]
    metrics: Mapping[str, Tensor]
    state_before: Mapping[str, Any]


class Rollouts:
    """Plays rollouts when their first optimizer step asks for one, and hands out their steps."""

    def __init__(self, prompts: Examples, schedule: Schedule, table: Table, accelerator: Accelerator) -> None:
        """Nothing is generated yet.

        Args:
            prompts: examples; an item of the schedule is a prompt and, where the row has one, its answer.
            schedule: a window of it is one rollout.
            table: see there.
            accelerator: of the run.
        """
        self._prompts, self._table, self._accelerator = prompts, table, accelerator
        self._dealer = Dealer(prompts, schedule.items, table, accelerator)
        self.schedule = RolloutSchedule(prompts=schedule, num_updates=table.rules.num_updates)
        self.state: Mapping[str, Any] = table.rules.state
        self._kept: dict[int, _Rollout] = {}
        self._next_step = 0
        self.journal: CompletionsFile | None = None

    def before_each_token(self, look: Callable[[], None]) -> None:
        """Has `look` called before each token that this process samples; it may raise StopSignal."""
        self._dealer.look = look

    @property
    def examples(self) -> Sequence[int]:
        """One entry a prompt."""
        return range(len(self.schedule.prompts.items))

    def window(self, step: int, rank: int) -> Window:
        """The batches of optimizer step `step` (0-based); plays a rollout where it begins one."""
        number, place = divmod(step, self.schedule.num_updates)
        if number not in self._kept:
            if place:
                log.warn(f"step {step}: the rollout that it belongs to is not in the checkpoint; it is played again")
            self._kept = {old: kept for old, kept in self._kept.items() if old == number - 1}
            self._kept[number] = self._play(number)
        self._next_step = step + 1
        return self._window(self._kept[number], number, place, rank)

    def rows(self, step: int) -> list[str]:
        """Names of the rows of the prompts of an optimizer step's rollout."""
        shares = _shares(self.schedule.prompts, step // self.schedule.num_updates)
        return [self._prompts.origin(item[0]) or f"prompt {item[0]}" for share in shares for item in share]

    def cursor(self, step: int) -> dict[str, Any]:
        """Where optimizer step `step` begins, and what the stage remembers there; JSON-able.

        That step is also the one whose rollout `keeper` keeps. It may be an earlier one than the last that was asked
        for: a step that is given up, with the rollout that it began, is done anew.
        """
        self._next_step = step
        number, place = divmod(step, self.schedule.num_updates)
        later = self._kept.get(number + (place > 0))  # was played behind the place that is meant
        return {"rollout": number, "update": place, "state": dict(self.state if later is None else later.state_before)}

    def one_pass(self, rank: int) -> Iterator[list[ExperienceBatch]]:
        """One answer to every prompt, with the same seeds each time; for an evaluation."""
        for number in range(self.schedule.prompts.windows_per_epoch):
            shares = _shares(self.schedule.prompts, number)
            drawn = self._dealer.draw(shares, 1, (_EVALUATION, number), num_redraws=0)
            measured = self._dealer.measured(drawn.experiences)
            zeros = [replace(one, advantages=np.zeros_like(one.sampler)) for one in measured]
            if zeros and zeros[0].values is not None:
                zeros = [replace(one, returns=one.values) for one in zeros]
            rollout = _rollout(zeros, drawn, shares, np.ones(drawn.played.rewards.shape), drawn.metrics)
            parts = self._parts(rollout, list(range(len(rollout.sizes))), rank)
            yield self._with_metrics(parts, drawn.metrics)

    def keeper(self) -> Callable[[Path], None]:
        """A function that writes the rollout now in use into a checkpoint; nothing where the next step begins one.

        Every process must ask for it, because each has a part of the rollout.
        """
        return partial(_write_tensors, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        number, place = divmod(self._next_step, self.schedule.num_updates)
        kept = self._kept.get(number)
        if not place or kept is None:
            return {}
        sizes = [[prompt, *answers] for prompt, answers in kept.sizes]
        return {
            **to_tensors(self._of_all_ranks(kept.experiences)),
            "table.sizes": torch.tensor(sizes),
            "table.weights": torch.from_numpy(kept.weights),
            "table.ranks": torch.tensor([rank for rank, share in enumerate(kept.ranks) for _ in share]),
        }

    def _of_all_ranks(self, experiences: Mapping[int, Experience]) -> list[Experience]:
        if self._accelerator.num_processes == 1:
            return list(experiences.values())
        from accelerate.utils import gather_object

        parts: list[Mapping[int, Experience]] = gather_object([dict(experiences)])
        found = {place: one for part in parts for place, one in part.items()}
        return [found[place] for place in sorted(found)]

    def restore(self, cursor: Mapping[str, Any], checkpoint: Path) -> None:
        """Takes up a checkpoint: what the stage remembers, and the rollout that is in use."""
        self.state = cursor.get("state", self.state)
        if not cursor.get("update") or not (checkpoint / EXPERIENCE).is_file():
            return
        from safetensors.torch import load_file

        tensors = load_file(checkpoint / EXPERIENCE)
        sizes = [(row[0], row[1:]) for row in tensors.pop("table.sizes").tolist()]
        weights = tensors.pop("table.weights").numpy()
        owners, num_ranks = tensors.pop("table.ranks").tolist(), self._accelerator.num_processes
        ranks = [
            [place for place, owner in enumerate(owners) if owner % num_ranks == rank] for rank in range(num_ranks)
        ]
        experiences = {one.place: one for one in from_tensors(tensors)}
        self._kept[int(cursor["rollout"])] = _Rollout(
            experiences=experiences, sizes=sizes, ranks=ranks, weights=weights, metrics={}, state_before={}
        )

    def _play(self, number: int) -> _Rollout:
        """Samples, scores and judges one rollout."""
        rules = self._table.rules
        shares = _shares(self.schedule.prompts, number)
        drawn = self._dealer.draw(shares, rules.group_size, (number,), num_redraws=rules.num_redraws)
        measured = self._dealer.measured(drawn.experiences)
        judged: Judged = rules.judge(drawn.played, measured, self.state, self._dealer.total)
        before, self.state, metrics = self.state, judged.state, drawn.metrics
        flat = np.ptp(drawn.played.rewards, axis=1) <= 1e-8
        if rules.group_size > 1:
            metrics["flat_groups"] = as_metric(flat)
            if flat.all():
                log.warn(
                    f"rollout {number}: all answers to each prompt earn the same, so that there is nothing to learn "
                    "from it (raise temperature or num_generations, or make the reward less strict)"
                )
        elif np.ptp(drawn.played.rewards) <= 1e-8:
            log.warn(
                f"rollout {number}: all answers earn the same ({drawn.played.rewards.flat[0]:g}), so that none is "
                "better than another (raise temperature or the batch size, or make the reward less strict)"
            )
        if self.journal is not None:
            self.journal.write(number * self.schedule.num_updates, drawn.scored, judged.experiences)
        rollout = _rollout(judged.experiences, drawn, shares, judged.weights, {**metrics, **judged.metrics})
        return replace(rollout, state_before=before)

    def _window(self, rollout: _Rollout, number: int, place: int, rank: int) -> Window:
        """One optimizer step of a rollout."""
        rules = self._table.rules
        epoch, part = divmod(place, rules.num_parts)
        count = len(rollout.sizes)
        order = np.arange(count)
        if rules.num_updates > 1:
            order = np.random.default_rng([self._table.seed, number, epoch, 0x5041]).permutation(count)
        chosen = sorted(order[part * count // rules.num_parts : (part + 1) * count // rules.num_parts].tolist())
        batches = self._parts(rollout, chosen, rank)
        if place == 0:
            batches = self._with_metrics(batches, rollout.metrics)
        counted = rollout.weights[chosen] > 0
        lengths = np.array([rollout.sizes[one][1] for one in chosen])
        tokens = int(lengths[counted].sum())
        return Window(
            batches=batches,
            num_units=max(1, rules.num_units(int(counted.sum()), tokens, self._table.sampling.max_new_tokens)),
            num_targets=int(lengths.sum()),
            lengths=[rollout.sizes[one][0] + length for one in chosen for length in rollout.sizes[one][1]],
            num_rows=len(chosen),
        )

    def _parts(self, rollout: _Rollout, chosen: Sequence[int], rank: int) -> list[ExperienceBatch]:
        """This rank's forward passes over some places; every rank gets as many."""
        wanted = set(chosen)
        plans: list[list[list[Piece]]] = []
        shares = [[place for place in share if place in wanted] for share in rollout.ranks]
        for share in shares:
            sizes = [rollout.sizes[place] for place in share]
            plans.append(micro_batches(sizes, self._table.plan, self._table.rows_at_once) if share else [])
        most = max(1, *(len(one) for one in plans))
        batches = [
            [rollout.experiences[shares[rank][number]].part(first, last) for number, first, last in sorted(pieces)]
            for pieces in plans[rank]
        ]
        filler = next(iter(rollout.experiences.values()), None)
        blank = filler.blank() if filler is not None else self._nothing()
        batches += [[blank]] * (most - len(batches))
        return [collate_experience(part, self._table.plan.layout, self._table.pad_id) for part in batches]

    def _nothing(self) -> Experience:
        """An experience without weight, for a process that has no prompt in a rollout."""
        zero = np.zeros(1, dtype=np.float32)
        known: dict[str, Any] = {name: zero for name in PER_TOKEN}
        if not self._table.rules.needs_old:
            known["old"] = None
        return Experience(
            place=-1, row=0, prompt=self._prompts[self.schedule.prompts.items[0][0]].input_ids,
            answers=(np.array([self._table.pad_id], dtype=np.int32),), weights=zero, **known,
        )  # fmt: skip

    @staticmethod
    def _with_metrics(batches: list[ExperienceBatch], metrics: Mapping[str, Tensor]) -> list[ExperienceBatch]:
        return [replace(batches[0], rollout_metrics=metrics), *batches[1:]]


def _shares(schedule: Schedule, number: int) -> list[list[Item]]:
    """Prompts of each rank in a rollout."""
    return [[item for group in share for item in group] for share in schedule.window(number)]


def _rollout(
    experiences: Sequence[Experience],
    drawn: Drawn,
    shares: Sequence[Sequence[Item]],
    weights: NDArray[np.float64],
    metrics: Mapping[str, Tensor],
) -> _Rollout:
    places = iter(range(len(drawn.num_prompt)))
    return _Rollout(
        experiences={one.place: one for one in experiences},
        sizes=list(zip(drawn.num_prompt, drawn.played.lengths.tolist(), strict=True)),
        ranks=[[next(places) for _ in share] for share in shares],
        weights=weights,
        metrics=metrics,
        state_before={},
    )


def _write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    if tensors:
        from safetensors.torch import save_file

        save_file(tensors, folder / EXPERIENCE)
