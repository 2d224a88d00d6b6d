"""The workload of a run from its real rows: the micro-batches that the schedule will make, before any is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from llamafactory.data.answer_batch import shared_length
from llamafactory.data.views import find_view
from llamafactory.model.workload import MicroBatch, Part, Workload, squares_of, tokens_of
from llamafactory.train.windows import Item, Schedule

if TYPE_CHECKING:
    from llamafactory.data.table import Examples
    from llamafactory.data.types import ViewName
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.hparams.train import TrainConfig
    from llamafactory.model.demands import Sampling
    from llamafactory.train.rollout_rules import RolloutRules

_MOST_WINDOWS = 2000
"""Optimizer steps that are looked at; a longer run is judged by these and by its longest rows."""
_EXAMPLES_OF_A_ROW: dict[ViewName, int] = {"pairs": 2, "ranked": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSizes:
    """The lengths of the rows, and what belongs together.

    Attributes:
        tokens: of each example.
        offsets: group `g` holds the examples `offsets[g]` up to `offsets[g + 1]`.
        supervised: share of the tokens that carry loss.
        shared: first example of a group -> tokens that its examples share, which flat batches hold once; None where
            rows are trained one by one.
        times: how often the tokens of an item count against the limit of a forward pass.
    """

    tokens: list[int]
    offsets: list[int]
    supervised: float
    shared: Mapping[int, int] | None = None
    times: int = 1

    @classmethod
    def of(cls, examples: Examples, view: ViewName = "sft") -> RowSizes:
        """The sizes of examples; the supervised share is that of up to 500 of them, evenly spread."""
        tokens, offsets = examples.lengths.tolist(), examples.offsets.tolist()
        sample = [examples[place] for place in range(0, len(tokens), max(1, len(tokens) // 500))]
        number = sum(len(example) for example in sample)
        supervised = sum(example.num_supervised for example in sample) / max(1, number)
        shared: dict[int, int] | None = {} if find_view(view).is_whole else None
        if view in _EXAMPLES_OF_A_ROW and shared is not None:
            groups = [range(start, end) for start, end in pairwise(offsets) if end > start]
            shared |= {group[0]: shared_length([examples[index] for index in group]) for group in groups}
        times = 2 if view == "feedback" else 1  # each judged answer is measured beside a mismatched one
        return cls(tokens=tokens, offsets=offsets, supervised=supervised, shared=shared, times=times)

    def cut(self, cutoff_len: int) -> RowSizes:
        """The sizes with another `cutoff_len`, not above the one that the rows were made with."""
        shared = None if self.shared is None else {key: min(n, cutoff_len) for key, n in self.shared.items()}
        return replace(self, tokens=[min(size, cutoff_len) for size in self.tokens], shared=shared)

    def firsts(self) -> list[int]:
        """Tokens of the first example of each group."""
        return [self.tokens[start] for start, end in pairwise(self.offsets) if end > start]

    def parts(self, item: Item, *, is_padded: bool) -> list[Part]:
        """What an item lays into a batch: its examples, or in a flat batch of groups one prefix tree."""
        sizes = [self.tokens[index] for index in item]
        if is_padded or self.shared is None:
            return list(sizes)
        prefix = self.shared.get(item[0], 0)
        return [(prefix, *(size - prefix for size in sizes))]


def assumed_rows(cfg: RunConfig, view: ViewName, num_devices: int) -> RowSizes:
    """Rows of one optimizer step where nothing is known about them: all have `cutoff_len` tokens, all supervised."""
    train, each = cfg.train, _EXAMPLES_OF_A_ROW.get(view, 1)
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * num_devices
    return RowSizes(
        tokens=[cfg.data.cutoff_len] * (rows * each),
        offsets=list(range(0, rows * each + 1, each)),
        supervised=1.0,
        shared={} if find_view(view).is_whole else None,
        times=2 if view == "feedback" else 1,
    )


def workload_of_rows(rows: RowSizes, schedule: Schedule, train: TrainConfig) -> Workload:
    """What the rows mean for the plan.

    Args:
        rows: the training rows.
        schedule: over them, with any token limit.
        train: number of steps and epochs.
    """
    sizes, is_padded = rows.tokens, schedule.is_padded
    windows = schedule.windows_per_epoch
    num_steps = schedule.total_windows(max_steps=train.max_steps, num_epochs=train.num_train_epochs)

    def tokens(item: Item) -> int:
        return rows.times * sum(map(tokens_of, rows.parts(item, is_padded=is_padded)))

    schedule = replace(schedule, lengths=[tokens(item) for item in schedule.items])

    def largest(limit: int | None) -> MicroBatch:
        group, count = largest_group(replace(schedule, micro_batch_tokens=limit), tokens, num_steps)
        parts = tuple(part for item in group for part in rows.parts(item, is_padded=is_padded))
        whole = sum(sizes[index] for item in group for index in item)
        return MicroBatch(lengths=parts, targets=round(whole * rows.supervised), num_micro_batches=count)

    parts = [part for item in schedule.items for part in rows.parts(item, is_padded=is_padded)]
    return Workload(
        largest=cache(largest),
        tokens=sum(map(tokens_of, parts)) / windows,
        squares=sum(map(squares_of, parts)) / windows,
        targets=sum(sizes) * rows.supervised / windows,
        num_steps=num_steps,
        num_tokens=sum(sizes),
        source=f"{_count_words(rows)}, {sum(sizes):,} tokens, the longest {max(sizes):,}{_shared_words(rows)}",
    )


def workload_of_prompts(
    rows: RowSizes, schedule: Schedule, train: TrainConfig, rules: RolloutRules, sampling: Sampling
) -> Workload:
    """What sampled answers to the rows' prompts mean for the plan; each is taken to be as long as it may be.

    Args:
        rows: prompts, some with an answer behind them.
        schedule: over them, with any token limit.
        train: number of steps and epochs.
        rules: of the rollouts.
        sampling: of one device.
    """
    prompts, new, group = rows.firsts(), sampling.new_tokens, rules.group_size
    longest, mean = max(prompts), sum(prompts) / len(prompts)
    per_device = schedule.items_per_device * schedule.accumulation
    per_step = per_device * schedule.num_ranks

    def largest(limit: int | None) -> MicroBatch:
        fits = sampling.rows_at_once if limit is None else max(1, (limit - longest) // new)
        each = min(group, fits)
        passes = sampling.rows_at_once // each if limit is None else limit // (longest + each * new)
        sizes = [each] * max(1, min(passes, per_device * math.ceil(group / each)))
        trees: list[Part] = [(longest, *(new,) * size) for size in sizes]
        lengths = [longest + new] * sum(sizes) if schedule.is_padded else trees
        count = math.ceil(per_device * group / sum(sizes))
        return MicroBatch(lengths=tuple(lengths), targets=new * sum(sizes), num_micro_batches=count)

    rollout = replace(schedule, accumulation=schedule.accumulation * rules.num_parts)
    windows = rollout.total_windows(max_steps=-1, num_epochs=train.num_train_epochs) * rules.num_updates
    copies = group if schedule.is_padded else 1
    return Workload(
        largest=cache(largest),
        tokens=per_step * (copies * mean + group * new),
        squares=per_step * (copies * mean**2 + group * ((mean + new) ** 2 - mean**2)),
        targets=per_step * group * new,
        num_steps=train.max_steps if train.max_steps > 0 else windows,
        num_tokens=sum(rows.tokens),
        source=f"{len(prompts):,} prompts, the longest {longest:,} tokens; every answer is assumed to reach "
        f"max_new_tokens ({new:,})",
    )


def _count_words(rows: RowSizes) -> str:
    answers, groups = len(rows.tokens), len(rows.offsets) - 1
    return (
        f"{answers:,} rows" if rows.shared is None or groups == answers else f"{groups:,} rows of {answers:,} answers"
    )


def _shared_words(rows: RowSizes) -> str:
    saved = sum((rows.shared or {}).values())
    return f"; {saved:,} of them are in the prompt that both answers of a pair share" if saved else ""


def largest_group(schedule: Schedule, tokens: Callable[[Item], int], num_steps: int) -> tuple[Sequence[Item], int]:
    """The micro-batch that needs most memory, and most micro-batches of a step on one device.

    Args:
        schedule: of the run.
        tokens: of an item.
        num_steps: optimizer steps of the run.

    Returns:
        The items of the micro-batch with most positions (padding included) in the first epoch, and the count. Of a
        longer epoch than 2,000 steps the first 2,000 are looked at, and the longest rows together; of later epochs
        that draw other rows, the longest row.
    """

    def positions(group: Sequence[Item]) -> int:
        return schedule.positions([tokens(item) for item in group])

    best: Sequence[Item] = ()
    most_tokens = most_groups = 0
    steps = min(num_steps, schedule.windows_per_epoch)
    for step in range(min(steps, _MOST_WINDOWS)):
        for share in schedule.window(step):
            most_groups = max(most_groups, len(share))
            for group in share:
                found = positions(group)
                if found > most_tokens:
                    best, most_tokens = group, found
    if steps > _MOST_WINDOWS:
        longest = sorted(range(len(schedule.items)), key=lambda place: -schedule.lengths[place])
        groups = schedule.micro_batches(longest[: schedule.items_per_device])
        best = max([best, *groups], key=positions)
    later = schedule.longest_later(num_steps)
    if later is not None:
        best = max([best, (later,)], key=positions)
    return best, most_groups
