"""The predictions there are: answers to prompts, and scores of answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llamafactory.model.generation import complete
from llamafactory.model.sampling import Sampling, row_seed
from llamafactory.train.answers import answer_scores
from llamafactory.train.text_scores import mean_scores

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from llamafactory.data.ranked_batch import RankedBatch
    from llamafactory.data.table import ExampleTable
    from llamafactory.hparams.generation import GenerationConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.model.valuehead import ModelWithValueHead
    from llamafactory.train.feed import Feed
    from llamafactory.train.predict import Line


@dataclass(frozen=True, kw_only=True)
class AnswerPredictor:
    """Answers every prompt once: `{prompt, predict, label}`.

    Attributes:
        sets: prefix of the metric names -> prompts, each with the row's own answer behind it where it has one.
        model: the language model.
        tokenizer: of the model.
        generation: how tokens are chosen.
        stop_ids: token ids that end an answer.
        seed: of the run; an answer's own seed is made of it and of the row's number.
        batch_size: answers that are made together.
    """

    sets: Mapping[str, ExampleTable]
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    generation: GenerationConfig
    stop_ids: frozenset[int]
    seed: int
    batch_size: int

    @property
    def num_rows(self) -> int:
        """Prompts of all sets."""
        return sum(table.num_groups for table in self.sets.values())

    def lines(self, rows: Sequence[int]) -> list[Line]:
        """Prompt with its special tokens, answer without, and the row's own answer (empty where there is none)."""
        found = [self._row(row) for row in rows]
        prompts = [group[0].input_ids.tolist() for group in found]
        limits = [self._limit(len(prompt)) for prompt in prompts]
        made = complete(
            self.model,
            prompts,
            self._sampling(max(limits, default=1)),
            seeds=[[row_seed(self.seed, row)] for row in rows],
            pad_id=cast("int", self.tokenizer.pad_token_id),
            rows_at_once=self.batch_size,
        )
        lines: list[Line] = []
        for group, prompt, limit, (answer,) in zip(found, prompts, limits, made, strict=True):
            label = self._text(group[1].input_ids.tolist(), is_clean=False) if len(group) > 1 else ""
            is_clean = self.generation.skip_special_tokens
            ids = answer.ids[:limit]
            if is_clean and ids and ids[-1] in self.stop_ids:
                ids = ids[:-1]
            lines.append(
                {
                    "prompt": self._text(prompt, is_clean=False),
                    "predict": self._text(ids, is_clean=is_clean),
                    "label": label,
                }
            )
        return lines

    def scores(self, lines: Iterable[Line]) -> dict[str, float]:
        """ROUGE and BLEU of each set, see `mean_scores`."""
        remaining = iter(lines)
        found: dict[str, float] = {}
        for prefix, table in self.sets.items():
            pairs = ((line["predict"], line["label"]) for line in islice(remaining, table.num_groups))
            found |= {f"{prefix}_{name}": value for name, value in mean_scores(pairs).items()}
        return found

    def made_of(self) -> dict[str, Any]:
        """Token ids of prompts and answers, and how tokens are chosen."""
        chosen = self._sampling(self.generation.max_new_tokens or self.generation.max_length)
        return {
            "rows": _digest(self.sets.values()),
            "max_new_tokens": self.generation.max_new_tokens,
            "max_length": None if self.generation.max_new_tokens else self.generation.max_length,
            "temperature": chosen.temperature,
            "top_k": chosen.top_k,
            "top_p": chosen.top_p,
            "stop_ids": sorted(chosen.stop_ids),
            "seed": self.seed if chosen.temperature else None,
            "skip_special_tokens": self.generation.skip_special_tokens,
        }

    def _row(self, row: int) -> list[Any]:
        for table in self.sets.values():
            if row < table.num_groups:
                return table.group(row)
            row -= table.num_groups
        raise IndexError(row)

    def _limit(self, num_prompt: int) -> int:
        return self.generation.max_new_tokens or max(1, self.generation.max_length - num_prompt)

    def _sampling(self, max_new_tokens: int) -> Sampling:
        greedy = Sampling(max_new_tokens=max_new_tokens, stop_ids=self.stop_ids, temperature=0.0)
        if not self.generation.do_sample:
            return greedy
        given = self.generation
        return replace(greedy, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p)

    def _text(self, ids: list[int], *, is_clean: bool) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=is_clean, clean_up_tokenization_spaces=False)
        return cast("str", text)


@dataclass(frozen=True, kw_only=True)
class ScorePredictor:
    """Scores both answers of every pair, `{chosen, rejected}`, and every single answer, `{score, label}`.

    Scores are rounded to two digits; `label` is the score that the row gives.

    Attributes:
        feeds: prefix of the metric names -> rows.
        model: with a value head, on its device.
        plan: whether the fused blocks may be used.
        device: of the model.
        batch_size: rows that are scored together.
    """

    feeds: Mapping[str, Feed]
    model: ModelWithValueHead
    plan: ModelPlan
    device: Any
    batch_size: int

    @property
    def num_rows(self) -> int:
        """Rows of all sets."""
        return sum(len(feed.schedule.items) for feed in self.feeds.values())

    def lines(self, rows: Sequence[int]) -> list[Line]:
        """A score that is not a number becomes null."""
        lines: list[Line] = []
        for feed, places in self._places(rows):
            for first in range(0, len(places), self.batch_size):
                items = [feed.schedule.items[place] for place in places[first : first + self.batch_size]]
                batch = cast("RankedBatch", feed.batch(items).to(self.device))
                scores = iter(answer_scores(self.model, batch, self.plan).tolist())
                labels = iter(batch.labels.tolist())
                for item in items:
                    names = ("chosen", "rejected") if len(item) == 2 else ("score",)
                    line: Line = {name: _rounded(next(scores)) for name in names}
                    lines.append(line if len(item) == 2 else {**line, "label": next(labels)})
        return lines

    def scores(self, lines: Iterable[Line]) -> dict[str, float]:
        """Nothing: accuracy and errors are those of the evaluation."""
        return {}

    def made_of(self) -> dict[str, Any]:
        """Token ids of the rows, and their scores."""
        return {"rows": _digest(cast("Any", feed.examples) for feed in self.feeds.values())}

    def _places(self, rows: Sequence[int]) -> Iterator[tuple[Feed, list[int]]]:
        first = 0
        for feed in self.feeds.values():
            count = len(feed.schedule.items)
            if places := [row - first for row in rows if first <= row < first + count]:
                yield feed, places
            first += count


def _rounded(score: float) -> float | None:
    return round(score, 2) if math.isfinite(score) else None


def _digest(tables: Iterable[ExampleTable]) -> str:
    """SHA-256 of all token ids, of which belong together, and of the numbers that rows bring."""
    digest = sha256()
    for table in tables:
        digest.update(np.asarray(table.offsets, dtype=np.int64).tobytes())
        if table.values is not None:
            digest.update(table.values.tobytes())
        for example in table:
            digest.update(np.asarray([len(example)], dtype=np.int64).tobytes() + example.input_ids.tobytes())
    return digest.hexdigest()
