"""Scores of a reward model for the answers in data sets; the language-model head is never run.

Rows are read, rendered and tokenised as in training, and stay in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from llamafactory.data.answer_batch import AnswerGroup, collate_answers
from llamafactory.data.encoded_rows import NO_TARGET, EncodedRow, RowEncoder, open_reader
from llamafactory.data.records import chunked
from llamafactory.data.registry import find_specs
from llamafactory.data.sources.access import access_of
from llamafactory.data.views import kind_of
from llamafactory.extras import log
from llamafactory.extras.hardware import read_hardware
from llamafactory.extras.network import go_offline
from llamafactory.model.loader import load_model_config
from llamafactory.model.plan import inference_dtype
from llamafactory.model.reward_model import load_reward_model
from llamafactory.train.answers import answer_scores
from llamafactory.train.planning import planner
from llamafactory.train.text import data_seed, load_text

if TYPE_CHECKING:
    from llamafactory.data.types import DatasetSpec, ViewName
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.model.valuehead import ModelWithValueHead

Line = Mapping[str, Any]
_ROWS_AT_ONCE = 512
"""Rows that are sorted by length before they are batched."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A loaded reward model.

    Attributes:
        model: in evaluation mode, on `device`.
        device: of the model.
        plan: layout of the batches, and whether the fused blocks may be used.
        pad_id: fills padded rows.
        batch_size: rows that go through the model together.
    """

    model: ModelWithValueHead
    device: str
    plan: ModelPlan
    pad_id: int
    batch_size: int

    def scores(self, rows: Sequence[EncodedRow]) -> list[list[float]]:
        """The scores of each row's answers, in the order of the rows."""
        answers = [tuple(row.examples) for row in rows]
        order = sorted(range(len(rows)), key=lambda place: max(map(len, answers[place])))
        found: list[list[float]] = [[] for _ in rows]
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            groups = [AnswerGroup(answers=answers[place]) for place in places]
            with torch.no_grad():
                batch = collate_answers(groups, self.plan.layout, self.pad_id).to(self.device)
                values = iter(answer_scores(self.model, batch, self.plan).tolist())
            for place in places:
                found[place] = [next(values) for _ in answers[place]]
        return found


def score_rows(cfg: RunConfig) -> Iterator[Line]:
    """A line for every row of `dataset`, in order.

    Yields:
        `{row, score}` for a row with one answer, `{row, chosen, rejected}` for a pair; `{row, score: None, error}` for
        a row that cannot be scored, behind the rows that were read with it.

    Raises:
        LlamaFactoryError: the configuration does not name a reward model, or the data cannot be read.
    """
    if cfg.model.offline:
        go_offline()
    tokenizer, template = load_text(cfg)
    specs = find_specs(cfg.data.dataset, cfg.data.dataset_dir, access_of(cfg.data, cfg.model))
    scorer = load_scorer(cfg, cast("int", tokenizer.pad_token_id))
    for spec in specs:
        rows = RowEncoder.from_config(cfg.data, _view_of(spec), template, tokenizer)
        yield from _lines(cfg, spec, rows, scorer)


def load_scorer(cfg: RunConfig, pad_id: int) -> Scorer:
    """Loads the reward model that the configuration names onto the best device."""
    config, hardware = load_model_config(cfg.model), read_hardware(use_cpu=cfg.train.use_cpu)
    plan = planner(config, hardware, None)(cfg)
    stored = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    model = load_reward_model(
        cfg.model,
        method=cfg.train.finetuning_type,
        options=cfg.adapter_options,
        dtype=inference_dtype(cfg.model.infer_dtype, stored, hardware),
        attention=plan.attention,
        device=hardware.device,
    )
    batch_size = cfg.train.per_device_eval_batch_size
    return Scorer(model=model, device=hardware.device, plan=plan, pad_id=pad_id, batch_size=batch_size)


def _view_of(spec: DatasetSpec) -> ViewName:
    return "pairs" if kind_of(spec) == "pairs" else "answers"


def _lines(cfg: RunConfig, spec: DatasetSpec, rows: RowEncoder, scorer: Scorer) -> Iterator[Line]:
    reader = open_reader(spec, cfg.data, rows.view, seed=data_seed(cfg), allows_media=False)
    names = ("chosen", "rejected") if rows.view.name == "pairs" else ("score",)
    num_said = num_cut = 0
    for chunk in chunked(iter(reader), _ROWS_AT_ONCE):
        encoded = list(rows.encode(chunk, reader.lose))
        usable = [row for row in encoded if row.places]
        num_cut += sum(any(row.num_cut) for row in usable)
        for row, values in zip(usable, scorer.scores(usable), strict=True):
            yield {"row": row.origin} | {name: _number(value) for name, value in zip(names, values, strict=True)}
        yield from (_failure(row.origin, NO_TARGET) for row in encoded if not row.places)
        yield from (_failure(row.origin, row.reason) for row in reader.lost[num_said:])
        num_said = len(reader.lost)
    yield from (_failure(row.origin, row.reason) for row in reader.lost[num_said:])
    if num_cut:
        log.warn(f"{spec.name}: {num_cut:,} rows were cut to cutoff_len ({cfg.data.cutoff_len:,} tokens)")


def _failure(origin: str, reason: str) -> Line:
    return {"row": origin, "score": None, "error": reason}


def _number(score: float) -> float | None:
    return score if math.isfinite(score) else None
