"""Turns -> Example: token ids and labels, born together. Truncation is decided here and nowhere else.

Many texts go to the Rust tokenizer at once. Special-token strings inside row text never become special tokens.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from llamafactory.data.table import Shard, shard_of
from llamafactory.data.types import Example, Segment, Turn
from llamafactory.data.word_cache import WordEncoder, word_encoder
from llamafactory.extras.log import warn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    Ids = array[int]
    Weights = array[float]


class _Run(NamedTuple):
    """Neighbouring segments of one turn side that are supervised alike: one text for the tokenizer.

    `is_mixed` says that row text in the run holds a special-token string; `label_weight` 0: not supervised.
    """

    segments: Sequence[Segment]
    label_weight: float
    text: str
    is_mixed: bool


_Sides: TypeAlias = tuple[list[_Run], list[_Run]]
"""Runs of a turn's prompt and of its answer."""


class EncodedTurn(NamedTuple):
    """Ids (int32) of a turn's prompt and answer, and the loss weight (float32) of each id (0: not supervised)."""

    prompt_ids: Ids
    prompt_weights: Weights
    answer_ids: Ids
    answer_weights: Weights


class Encoder:
    """Tokenises turns with one tokenizer.

    Attributes:
        backend: the Rust tokenizer, set neither to cut nor to pad.
        has_lost_words: looked-up words gave other ids than the tokenizer, so that ids made before are in doubt; since
            then the tokenizer makes all ids.
        num_shifted: sequences of a whole-text template in which the ids of a prompt change when its answer follows, so
            that generation starts from slightly other ids than training saw.
    """

    def __init__(self, tokenizer: Any, *, is_whole: bool = False) -> None:
        """Take a transformers tokenizer (its Rust backend does the work).

        Args:
            tokenizer: a transformers tokenizer with a `backend_tokenizer`, or a `tokenizers.Tokenizer`.
            is_whole: ids must be those of each sequence's whole text, see `Template.is_tokenized_whole`.
        """
        self.backend: Tokenizer = clean_backend(tokenizer)
        self._plain: Tokenizer | None = None
        self._words: WordEncoder | None = None
        self._is_ready = False
        self._special = special_token_pattern(self.backend)
        self._special_start = _common_start(self.backend)
        self._is_whole = is_whole
        self.has_lost_words = False
        self.num_shifted = 0

    def encode(self, sequences: Sequence[Sequence[Turn]]) -> list[list[EncodedTurn]]:
        """Ids and weights of each turn of each sequence."""
        runs = [[(self._runs(turn.prompt), self._runs(turn.answer)) for turn in turns] for turns in sequences]
        texts = dict.fromkeys(
            [run.text for turns in runs for sides in turns for side in sides for run in side if not run.is_mixed]
        )
        if self._is_whole:
            texts |= dict.fromkeys(_whole_text(turns) for turns in runs if not _has_mixed(turns))
        ids_of = dict(zip(texts, self._encode_batch(list(texts)), strict=True))
        return [self._sequence(turns, ids_of) for turns in runs]

    def _sequence(self, turns: Sequence[_Sides], ids_of: Mapping[str, Ids]) -> list[EncodedTurn]:
        encoded = [EncodedTurn(*self._side(prompt, ids_of), *self._side(answer, ids_of)) for prompt, answer in turns]
        if self._is_whole and not _has_mixed(turns):
            ids = array("i")
            for turn in encoded:
                ids += turn.prompt_ids + turn.answer_ids
            if ids_of[_whole_text(turns)] != ids:
                return self._by_offsets(turns) or encoded
        return encoded

    def _side(self, runs: Sequence[_Run], ids_of: Mapping[str, Ids]) -> tuple[Ids, Weights]:
        ids, weights = array("i"), array("f")
        for run in runs:
            new = self._mixed(run) if run.is_mixed else ids_of[run.text]
            ids = ids + new if ids else new
            weights += array("f", (run.label_weight,)) * len(new)
        return ids, weights

    def _by_offsets(self, turns: Sequence[_Sides]) -> list[EncodedTurn] | None:
        """Ids of the whole text, dealt out to the runs by the character at which each token starts.

        None if a token reaches from a prompt into its answer: generation cannot write that token, so the ids of the
        parts are right.
        """
        encoding = self.backend.encode(_whole_text(turns), add_special_tokens=False)
        starts = [offset[0] for offset in encoding.offsets]
        ids = array("i", encoding.ids)
        encoded: list[EncodedTurn] = []
        position, token = 0, 0
        for prompt, answer in turns:
            sides: list[Any] = []
            for side in (prompt, answer):
                first, weights = token, array("f")
                for run in side:
                    position += len(run.text)
                    end = token
                    while end < len(starts) and starts[end] < position:
                        end += 1
                    weights += array("f", (run.label_weight,)) * (end - token)
                    token = end
                sides += [ids[first:token], weights]
                if side is prompt and token and encoding.offsets[token - 1][1] > position:
                    return None
            encoded.append(EncodedTurn(*sides))
        asked = "".join(run.text for run in turns[0][0])
        if self.backend.encode(asked, add_special_tokens=False).ids != encoded[0].prompt_ids.tolist():
            self.num_shifted += 1
        return encoded

    def _runs(self, segments: Sequence[Segment]) -> list[_Run]:
        runs: list[_Run] = []
        group: list[Segment] = []
        weight = 0.0
        for segment in segments:
            own = segment.weight if segment.trainable else 0.0
            if own != weight:
                if group:
                    runs.append(self._run(group, weight))
                    group = []
                weight = own
            group.append(segment)
        if group:
            runs.append(self._run(group, weight))
        return runs

    def _run(self, segments: list[Segment], weight: float) -> _Run:
        is_mixed = False
        if self._special is not None:
            for segment in segments:
                if segment.is_literal and self._special_start in segment.text and self._special.search(segment.text):
                    is_mixed = True
        return _Run(segments, weight, "".join([segment.text for segment in segments]), is_mixed)

    def _mixed(self, run: _Run) -> Ids:
        """Ids of a run with special tokens where the markup has them, and plain text everywhere else."""
        if self._plain is None:
            self._plain = type(self.backend).from_str(self.backend.to_str())
            self._plain.encode_special_tokens = True
        ids = array("i")
        for is_special, pieces in groupby(self._split(run.segments), key=lambda piece: piece[0]):
            text = "".join(piece[1] for piece in pieces)
            backend = self.backend if is_special else self._plain
            ids.extend(backend.encode(text, add_special_tokens=False).ids)
        return ids

    def _split(self, segments: Sequence[Segment]) -> list[tuple[bool, str]]:
        """Pieces of the segments as (is a special token, text)."""
        pieces: list[tuple[bool, str]] = []
        for segment in segments:
            if segment.is_literal or self._special is None:
                pieces.append((False, segment.text))
                continue
            end = 0
            for match in self._special.finditer(segment.text):
                pieces += [(False, segment.text[end : match.start()]), (True, match[0])]
                end = match.end()
            pieces.append((False, segment.text[end:]))
        return [piece for piece in pieces if piece[1]]

    def _encode_batch(self, texts: list[str]) -> list[Ids]:
        if not self._is_ready:  # a warm start encodes nothing
            self._words, self._is_ready = word_encoder(self.backend), True
        if self._words is None:
            found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [array("i", encoding.ids) for encoding in found]
        ids = self._words.encode_batch(texts)
        if not self._words.is_trusted:
            self._words, self.has_lost_words = None, True
            warn(
                "ids that were looked up word by word differ from those of the tokenizer; from here on the tokenizer "
                "makes all ids, which is slower. Please report the tokenizer's name"
            )
        return ids


def clean_backend(tokenizer: Any) -> Tokenizer:
    """The Rust tokenizer behind `tokenizer`; a copy if it is set to cut, pad or ignore special tokens.

    Raises:
        TypeError: the tokenizer has no Rust backend.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise TypeError(f"{type(tokenizer).__name__} has no fast (Rust) tokenizer behind it")
    if backend.truncation is None and backend.padding is None and not backend.encode_special_tokens:
        return backend
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = False
    return copy


def special_token_pattern(backend: Tokenizer) -> re.Pattern[str] | None:
    """Finds the strings of special tokens, longest first; None if there are none."""
    words = [token.content for token in backend.get_added_tokens_decoder().values() if token.special and token.content]
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))) if words else None


class Cut(NamedTuple):
    """Turns of one example, and how many tokens of each prompt and answer it keeps, counted from the side's start."""

    turns: Sequence[EncodedTurn]
    kept: Sequence[tuple[int, int]]


def assemble(turns: Sequence[EncodedTurn], cutoff_len: int, *, keep_last: bool = False) -> Example:
    """One training example of at most `cutoff_len` tokens, cut turn by turn as `kept_lengths` says."""
    return assemble_all([Cut(turns, kept_lengths(turns, cutoff_len, keep_last=keep_last))]).example(0)


def assemble_all(cuts: Sequence[Cut]) -> Shard:
    """The examples of all cuts, end to end, each a group of its own."""
    ids: list[Ids] = []
    weights: list[Weights] = []
    lengths: list[int] = []
    num_cut: list[int] = []
    for turns, kept in cuts:
        length, total = 0, 0
        for turn, (num_prompt, num_answer) in zip(turns, kept, strict=True):
            length += num_prompt + num_answer
            total += len(turn.prompt_ids) + len(turn.answer_ids)
            ids += (turn.prompt_ids[:num_prompt], turn.answer_ids[:num_answer])
            weights += (turn.prompt_weights[:num_prompt], turn.answer_weights[:num_answer])
        lengths.append(length)
        num_cut.append(total - length)
    return shard_of(
        np.frombuffer(b"".join(ids), dtype=np.int32),
        np.frombuffer(b"".join(weights), dtype=np.float32),
        lengths=lengths,
        num_cut=num_cut,
    )


def kept_lengths(turns: Sequence[EncodedTurn], cutoff_len: int, *, keep_last: bool = False) -> list[tuple[int, int]]:
    """How many tokens of each turn's prompt and answer are kept, both counted from the side's start.

    Turn by turn, what is left of the budget is shared between a turn's prompt and its answer by `share_budget`; turns
    behind the budget are left out.

    Args:
        turns: the sequence.
        cutoff_len: budget in tokens.
        keep_last: give the budget to the last turns first (only the last answer is trained).
    """
    lengths: list[tuple[int, int]] = []
    budget = cutoff_len
    for turn in reversed(turns) if keep_last else turns:
        kept = share_budget(len(turn.prompt_ids), len(turn.answer_ids), budget) if budget > 0 else (0, 0)
        lengths.append(kept)
        budget -= sum(kept)
    return lengths[::-1] if keep_last else lengths


def cut_places(turns: Sequence[EncodedTurn], kept: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Where `assemble_kept` took tokens out: position among the ids that stay -> how many stood there."""
    places: dict[int, int] = {}
    position = 0
    for turn, counts in zip(turns, kept, strict=True):
        for ids, num_kept in zip((turn.prompt_ids, turn.answer_ids), counts, strict=True):
            position += num_kept
            if num_kept < len(ids):
                places[position] = places.get(position, 0) + len(ids) - num_kept
    return places


def join_history(turns: Sequence[EncodedTurn]) -> EncodedTurn:
    """All before the last answer as one prompt without loss, and the last answer: a judged answer with its prompt."""
    sides = [ids for turn in turns for ids in (turn.prompt_ids, turn.answer_ids)][:-1]
    prompt_ids = array("i", b"".join(sides))
    return turns[-1]._replace(prompt_ids=prompt_ids, prompt_weights=array("f", (0.0,)) * len(prompt_ids))


def share_budget(num_prompt: int, num_answer: int, budget: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer are kept when both together have `budget` tokens.

    The answer is kept whole if it takes less than half of the budget; else the prompt, if that does; else both are cut
    in proportion.
    """
    if 2 * num_answer < budget:
        limit = budget
    elif 2 * num_prompt < budget:
        limit = budget - num_prompt
    else:
        limit = int(budget * (num_answer / (num_prompt + num_answer)))
    kept_answer = min(limit, num_answer)
    return min(max(budget - kept_answer, 0), num_prompt), kept_answer


def _common_start(backend: Tokenizer) -> str:
    """The character with which all special tokens begin; empty where there is none."""
    words = [token.content for token in backend.get_added_tokens_decoder().values() if token.special and token.content]
    starts = {word[0] for word in words}
    return starts.pop() if len(starts) == 1 else ""


def _has_mixed(turns: Sequence[_Sides]) -> bool:
    return any(run.is_mixed for sides in turns for side in sides for run in side)


def _whole_text(turns: Sequence[_Sides]) -> str:
    return "".join(run.text for sides in turns for side in sides for run in side)
