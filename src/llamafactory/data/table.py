"""Examples as flat arrays: sliced when asked for, so that a million rows are no million Python objects.

A *group* is what one row became, and stays together: a pair of answers, or the sequences of a dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.types import IGNORE_INDEX, Example

NO_FLAG = -1
NO_VALUE = float("nan")
_ORIGIN = re.compile(r"(.*[:#])(\d+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shard:
    """The examples of some rows, end to end; the arrays may lie in memory or in mapped files.

    Attributes:
        tokens: int32 `[tokens]`; a supervised token is its id, any other is `~id`, which is negative.
        weights: float32 `[tokens]` loss weight of each token, or None where all supervised ones weigh 1.
        example_ends: int64 `[examples]`, the token behind each example.
        cuts: int32 `[examples]`, tokens that truncation took out.
        group_ends: int64 `[groups]`, the example behind each group.
        flags: int8 `[groups]`, 1 or 0 (an answer was liked or not), `NO_FLAG` where the view has none.
        values: float32 `[groups]`, the number that each row brings; None where the view has none.
        origin_rows: int32 `[groups]`, number of the row or line of each group; None where nobody noted it.
        origin_files: int32 `[groups]`, number of its file in `origin_names`.
        origin_names: files of the rows, each with the mark between its name and a number: `rows.json#`.
    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32] | None
    example_ends: NDArray[np.int64]
    cuts: NDArray[np.int32]
    group_ends: NDArray[np.int64]
    flags: NDArray[np.int8]
    values: NDArray[np.float32] | None = None
    origin_rows: NDArray[np.int32] | None = None
    origin_files: NDArray[np.int32] | None = None
    origin_names: tuple[str, ...] = ()

    def origin(self, place: int) -> str:
        """Where the example at `place` comes from, `rows.json#12`; empty where that is not known."""
        if self.origin_rows is None or self.origin_files is None:
            return ""
        group = int(np.searchsorted(self.group_ends, place, side="right"))
        return f"{self.origin_names[int(self.origin_files[group])]}{int(self.origin_rows[group])}"

    @property
    def num_supervised(self) -> NDArray[np.int64]:
        """Supervised tokens of each example that can be predicted: all but a supervised first token."""
        is_supervised = np.concatenate([self.tokens >= 0, [False]])
        starts = self.example_ends - np.diff(self.example_ends, prepend=0)
        counts = np.concatenate([[0], np.cumsum(is_supervised, dtype=np.int64)])
        return counts[self.example_ends] - counts[np.minimum(starts + 1, self.example_ends)]

    def example(self, place: int, first: int = 0, last: int | None = None) -> Example:
        """The example at `place`, or its tokens from `first` up to `last`."""
        begin = int(self.example_ends[place - 1]) if place else 0
        start, stop = begin + first, int(self.example_ends[place]) if last is None else begin + last
        stored = np.asarray(self.tokens[start:stop])
        weights = None if self.weights is None else np.array(self.weights[start:stop])
        if weights is not None and bool(((weights == 0) | (weights == 1)).all()):
            weights = None
        return Example(
            input_ids=stored ^ (stored >> 31),  # ~id where negative
            labels=np.where(stored < 0, np.int32(IGNORE_INDEX), stored),
            weights=weights,
            num_cut=int(self.cuts[place]),
        )


def shard_of(
    ids: NDArray[np.int32], weights: NDArray[np.float32], *, lengths: Sequence[int], num_cut: Sequence[int]
) -> Shard:
    """Examples that lie end to end, each a group of its own.

    Args:
        ids: `[tokens]` token ids.
        weights: `[tokens]` loss weight of each, 0: not supervised.
        lengths: tokens of each example.
        num_cut: tokens that truncation took out of each.
    """
    is_supervised = weights != 0
    return Shard(
        tokens=np.where(is_supervised, ids, ~ids),
        weights=None if bool((weights == is_supervised).all()) else weights,
        example_ends=np.cumsum(lengths, dtype=np.int64),
        cuts=np.array(num_cut, dtype=np.int32),
        group_ends=np.arange(1, len(lengths) + 1, dtype=np.int64),
        flags=np.full(len(lengths), NO_FLAG, dtype=np.int8),
    )


class ShardBuilder:
    """Collects groups of examples; `build` makes one `Shard` of them."""

    def __init__(self) -> None:
        self._tokens: list[NDArray[np.int32]] = []
        self._weights: list[NDArray[np.float32] | None] = []
        self._cuts: list[int] = []
        self._group_ends: list[int] = []
        self._flags: list[int] = []
        self._values: list[float] = []
        self._origins: dict[int, tuple[str, int]] = {}  # of groups

    def add(self, group: Sequence[Example], flag: int = NO_FLAG, value: float = NO_VALUE) -> None:
        """Append the examples of one row."""
        for example in group:
            self._tokens.append(np.where(example.labels == IGNORE_INDEX, ~example.input_ids, example.input_ids))
            self._weights.append(example.weights)
            self._cuts.append(example.num_cut)
        self._end_group(flag, value)

    def take(self, shard: Shard, places: Iterable[int], flag: int = NO_FLAG, value: float = NO_VALUE) -> None:
        """Append the examples at these places of a shard as those of one row."""
        for place in places:
            part = slice(int(shard.example_ends[place - 1]) if place else 0, int(shard.example_ends[place]))
            self._tokens.append(shard.tokens[part])
            self._weights.append(None if shard.weights is None else shard.weights[part])
            self._cuts.append(int(shard.cuts[place]))
        self._end_group(flag, value)

    def _end_group(self, flag: int, value: float) -> None:
        self._group_ends.append(len(self._tokens))
        self._flags.append(flag)
        self._values.append(value)

    def note_origin(self, origin: str) -> None:
        """Keeps where the group that was added last comes from: `rows.jsonl:12` or `rows.json#12`."""
        if match := _ORIGIN.fullmatch(origin):
            self._origins[len(self._flags) - 1] = match[1], int(match[2])

    def build(self) -> Shard:
        """All groups added so far."""
        tokens = np.concatenate([*self._tokens, np.empty(0, np.int32)]).astype(np.int32, copy=False)
        weights = None
        if any(part is not None for part in self._weights):
            parts = [
                (row >= 0).astype(np.float32) if part is None else part
                for row, part in zip(self._tokens, self._weights, strict=True)
            ]
            weights = np.concatenate(parts).astype(np.float32, copy=False)
        return Shard(
            tokens=tokens,
            weights=weights,
            example_ends=np.cumsum([len(part) for part in self._tokens], dtype=np.int64),
            cuts=np.array(self._cuts, dtype=np.int32),
            group_ends=np.array(self._group_ends, dtype=np.int64),
            flags=np.array(self._flags, dtype=np.int8),
            values=_unless_none(np.array(self._values, dtype=np.float32)),
            **self._noted_origins(),
        )

    def _noted_origins(self) -> dict[str, Any]:
        if not self._flags or len(self._origins) < len(self._flags):
            return {}
        names = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in self._origins.values()))}
        return {
            "origin_rows": np.array([row for _, row in self._origins.values()], dtype=np.int32),
            "origin_files": np.array([names[name] for name, _ in self._origins.values()], dtype=np.int32),
            "origin_names": tuple(names),
        }


class Examples(Protocol):
    """What a run trains or evaluates on: a sequence of examples, and which of them belong together."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Group `g` holds the examples `offsets[g]` up to `offsets[g + 1]`."""
        ...

    @property
    def flags(self) -> NDArray[np.int8] | None:
        """What is said about each group, see `Shard`; None where the view says nothing."""
        ...

    @property
    def values(self) -> NDArray[np.float32] | None:
        """The number that each group brings, see `Shard`."""
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def origin(self, index: int) -> str:
        """Where an example comes from, `rows.json#12`; empty where that is not known."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExampleTable(Sequence[Example]):
    """Examples of many rows. Index it for an example; `offsets` says which examples belong together.

    Attributes:
        shards: where the tokens lie.
        starts: int64 `[shards + 1]`, number of the first example of each shard, and of all examples.
        numbers: int64 `[examples]`, number of each example of this table among those of the shards.
        lengths: int64 `[examples]`, tokens of each example.
        offsets: int64 `[groups + 1]`; group `g` holds the examples `offsets[g]` up to `offsets[g + 1]`.
        flags: int8 `[groups]`, see `Shard`; None where the view has none.
        values: float32 `[groups]`, see `Shard`.
    """

    shards: tuple[Shard, ...]
    starts: NDArray[np.int64]
    numbers: NDArray[np.int64]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    flags: NDArray[np.int8] | None
    values: NDArray[np.float32] | None = None

    @property
    def num_groups(self) -> int:
        """Rows that became examples."""
        return len(self.offsets) - 1

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """One example, or a list of them."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.piece(index)

    def piece(self, index: int, first: int = 0, last: int | None = None) -> Example:
        """The tokens of an example from `first` up to `last`; by default all."""
        number = int(self.numbers[index])
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.shards[shard].example(number - int(self.starts[shard]), first, last)

    def origin(self, index: int) -> str:
        """Where an example comes from, `rows.json#12`; empty where that is not known."""
        number = int(self.numbers[index])
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.shards[shard].origin(number - int(self.starts[shard]))

    def group(self, number: int) -> list[Example]:
        """The examples of one row."""
        return [self[place] for place in range(int(self.offsets[number]), int(self.offsets[number + 1]))]

    def select(self, groups: NDArray[np.int64] | Sequence[int]) -> ExampleTable:
        """The table of these groups, in this order; a group may occur more than once."""
        chosen = np.asarray(groups, dtype=np.int64)
        sizes = np.diff(self.offsets)[chosen]
        offsets = _starts(sizes)
        places = np.repeat(self.offsets[:-1][chosen] - offsets[:-1], sizes) + np.arange(offsets[-1], dtype=np.int64)
        return replace(
            self,
            numbers=self.numbers[places],
            lengths=self.lengths[places],
            offsets=offsets,
            flags=None if self.flags is None else self.flags[chosen],
            values=None if self.values is None else self.values[chosen],
        )


def table_of(shards: Iterable[Shard]) -> ExampleTable:
    """All groups of the shards, in order."""
    parts = tuple(shards)
    starts = _starts([len(shard.example_ends) for shard in parts])
    flags = _joined([shard.flags for shard in parts], np.int8)
    ends = [shard.group_ends + start for shard, start in zip(parts, starts, strict=False)]
    return ExampleTable(
        shards=parts,
        starts=starts,
        numbers=np.arange(starts[-1], dtype=np.int64),
        lengths=_joined([np.diff(shard.example_ends, prepend=0) for shard in parts], np.int64),
        offsets=_joined([np.zeros(1, np.int64), *ends], np.int64),
        flags=flags if bool((flags != NO_FLAG).any()) else None,
        values=_joined_values([(shard.values, len(shard.group_ends)) for shard in parts]),
    )


def join_tables(tables: Sequence[ExampleTable]) -> ExampleTable:
    """All groups of all tables, one table behind another."""
    shards = tuple(shard for table in tables for shard in table.shards)
    firsts = _starts([int(table.starts[-1]) for table in tables])
    ends = _starts([len(table) for table in tables])
    flags = [np.full(table.num_groups, NO_FLAG, np.int8) if table.flags is None else table.flags for table in tables]
    return ExampleTable(
        shards=shards,
        starts=_starts([len(shard.example_ends) for shard in shards]),
        numbers=_joined([table.numbers + first for table, first in zip(tables, firsts, strict=False)], np.int64),
        lengths=_joined([table.lengths for table in tables], np.int64),
        offsets=_joined(
            [np.zeros(1, np.int64), *(table.offsets[1:] + end for table, end in zip(tables, ends, strict=False))],
            np.int64,
        ),
        flags=None if all(table.flags is None for table in tables) else _joined(flags, np.int8),
        values=_joined_values([(table.values, table.num_groups) for table in tables]),
    )


def _joined_values(parts: Sequence[tuple[NDArray[np.float32] | None, int]]) -> NDArray[np.float32] | None:
    """The values of all parts; a part without any has `NO_VALUE` for each of its groups."""
    filled = [np.full(count, NO_VALUE, np.float32) if values is None else values for values, count in parts]
    return _unless_none(_joined(filled, np.float32))


def _unless_none(values: NDArray[np.float32]) -> NDArray[np.float32] | None:
    return None if bool(np.isnan(values).all()) else values


def _starts(sizes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each part begins when they lie end to end, and the end of the last one."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)
