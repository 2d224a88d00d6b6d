"""Many completions at once, token ids in and token ids out: a prompt is read once for all its completions.

Rows that end leave the batch. What is sampled depends on a row's own seed and tokens, and not on which rows are beside
it, up to the rounding of matrix products of another size. What this file never does: turn ids into text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llamafactory.model.sampling import Choice, Sampling, choose_tokens, uniforms

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAVE_SHARE = 8
"""Ended rows are taken out as soon as they are one in this many: taking rows out copies the cache."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer.

    Attributes:
        ids: sampled tokens, the stop among them where there is one.
        logps: float32 `[tokens]`, log-probability of each at the sampling temperature (see `Choice`).
        entropies: float32 `[tokens]`, in nats, of the distribution each was sampled from.
        is_stopped: a stop token ended it; else the limit did.
    """

    ids: list[int]
    logps: NDArray[np.float32]
    entropies: NDArray[np.float32]
    is_stopped: bool


def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[Sequence[int]],
    pad_id: int,
    rows_at_once: int = 64,
) -> list[list[Completion]]:
    """Completes every prompt as often as it has seeds.

    Args:
        model: a causal language model, bare or wrapped by peft; it is put back into its mode afterwards.
        prompts: token ids, of any lengths, none empty.
        sampling: how tokens are chosen.
        seeds: for each prompt one seed a completion.
        pad_id: fills short prompts on the left; any id.
        rows_at_once: completions that are made together; bounds the memory of the cache.

    Returns:
        The completions of each prompt, in the order of its seeds.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    found: list[list[Completion]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with _evaluating(model), torch.no_grad():
        for chosen in _batches(order, seeds, rows_at_once):
            jobs = [(index, seeds[index][start:stop]) for index, start, stop in chosen]
            rows = _Rows(model, [prompts[index] for index, _ in jobs], [part for _, part in jobs], sampling, pad_id)
            rows.run()
            finished = iter(rows.completions())
            for index, part in jobs:
                found[index] += [next(finished) for _ in part]
    return found


def _batches(order: Sequence[int], seeds: Sequence[Sequence[int]], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Prompts of about the same length together, at most `limit` completions; `(prompt, first, last)` seeds."""
    batch: list[tuple[int, int, int]] = []
    room = limit
    for index in order:
        start = 0
        while start < len(seeds[index]):
            stop = min(len(seeds[index]), start + room)
            batch.append((index, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class _Tokens:
    """What one row has sampled so far."""

    ids: list[int] = field(default_factory=list[int])
    logps: list[float] = field(default_factory=list[float])
    entropies: list[float] = field(default_factory=list[float])
    is_stopped: bool = False


class _Rows:
    """The rows of one batch while they grow."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        pad_id: int,
    ) -> None:
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.sampling = sampling
        self.device = next(self.model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        self.prompts = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
        self.mask = torch.zeros_like(self.prompts)
        for row, prompt in enumerate(prompts):
            self.prompts[row, width - len(prompt) :] = torch.tensor(list(prompt))
            self.mask[row, width - len(prompt) :] = 1
        self.repeats = torch.tensor([len(part) for part in seeds])
        self.seeds = np.array([seed for part in seeds for seed in part], dtype=np.uint64)
        self.tokens = [_Tokens() for _ in self.seeds]
        self.alive = list(range(len(self.seeds)))

    def run(self) -> None:
        """Reads the prompts once, then adds a token to every row until all have ended."""
        cache = _roomy_cache(self.model)
        mask = self.mask.to(self.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self._forward(self.prompts.to(self.device), mask, positions, cache)
        owners = torch.repeat_interleave(torch.arange(len(self.repeats)), self.repeats).to(self.device)
        cache.batch_select_indices(owners)
        logits, mask, places = logits[owners], mask[owners], positions[owners, -1]
        for place in range(self.sampling.max_new_tokens):
            choice = choose_tokens(logits, self._uniform(place), self.sampling)
            keep = self._add(choice)
            if not self.alive or place + 1 == self.sampling.max_new_tokens:
                return
            ids = choice.ids
            if len(keep) < len(ids):
                chosen = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(chosen)
                ids, mask, places = ids[chosen], mask[chosen], places[chosen]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = places + 1
            logits = self._forward(ids[:, None], mask, places[:, None], cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the last position, `[rows, vocab]`."""
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1]

    def _uniform(self, place: int) -> Tensor:
        values = torch.from_numpy(uniforms(self.seeds[self.alive], place))
        return values.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)

    def _add(self, choice: Choice) -> list[int]:
        """Writes the tokens down; `alive` becomes the rows of the next pass, whose places in this one are returned."""
        ids, logps, entropies = choice.ids.tolist(), choice.logps.tolist(), choice.entropies.tolist()
        going: list[int] = []
        for place, row in enumerate(self.alive):
            tokens = self.tokens[row]
            if tokens.is_stopped:
                continue
            tokens.ids.append(ids[place])
            tokens.logps.append(logps[place])
            tokens.entropies.append(entropies[place])
            tokens.is_stopped = ids[place] in self.sampling.stop_ids
            if not tokens.is_stopped:
                going.append(place)
        num_ended = len(self.alive) - len(going)
        keep = going if num_ended * _LEAVE_SHARE >= len(self.alive) else list(range(len(self.alive)))
        self.alive = [self.alive[place] for place in keep] if going else []
        return keep

    def completions(self) -> Iterator[Completion]:
        """What was made, in the order of the seeds."""
        for row in self.tokens:
            yield Completion(
                ids=row.ids,
                logps=np.array(row.logps, dtype=np.float32),
                entropies=np.array(row.entropies, dtype=np.float32),
                is_stopped=row.is_stopped,
            )


class _RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, so that a new token is written in place and nothing is copied."""

    _TOKENS = 128

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds states; see `DynamicLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        room: Tensor | None = getattr(self, "_room", None)
        if room is None or room.shape[1] != key_states.shape[0] or room.shape[-2] < new:
            batch, heads, _, width = key_states.shape
            room = key_states.new_zeros(2, batch, heads, new + self._TOKENS, width)
            if old and self.keys is not None and self.values is not None:
                room[0, :, :, :old], room[1, :, :, :old] = self.keys, self.values
            self._room = room
        room[0, :, :, old:new], room[1, :, :, old:new] = key_states, value_states
        self.keys, self.values = room[0, :, :, :new], room[1, :, :, :new]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows, or repeats them; the room moves along."""
        if self.get_seq_length() > 0:
            length = self.get_seq_length()
            self._room = self._room[:, indices]
            self.keys, self.values = self._room[0, :, :, :length], self._room[1, :, :, :length]


def _roomy_cache(model: Any) -> DynamicCache:
    """A cache of the kinds of layers that the model has; those that grow without limit get room."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
