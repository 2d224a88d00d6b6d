"""Puts together what predictions need: prompts of the evaluation rows, and how they are answered or scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llamafactory.data.pipeline import prepare_data
from llamafactory.data.sources.access import access_of
from llamafactory.extras.errors import ConfigError, DataError, Problem
from llamafactory.train.companions import language_model
from llamafactory.train.job import Job
from llamafactory.train.predict import Predictions, Predictor
from llamafactory.train.predictors import AnswerPredictor, ScorePredictor
from llamafactory.train.stage import load_stage
from llamafactory.train.text import data_seed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from llamafactory.data.pipeline import PreparedData
    from llamafactory.data.table import Examples, ExampleTable
    from llamafactory.data.types import Template
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.output_dir import Claim
    from llamafactory.train.signals import StopRequest

Prompts = Mapping[str, "ExampleTable"]


def prompts_of(cfg: RunConfig, template: Template, tokenizer: PreTrainedTokenizerFast, data: PreparedData) -> Prompts:
    """The evaluation rows as prompts, with the answers that they have; nothing where none is answered.

    Args:
        cfg: the resolved configuration.
        template: writes conversations.
        tokenizer: of the model.
        data: the same rows, as the stage evaluates them.

    Raises:
        DataError: `val_size` would hold out other rows than the evaluation's.
    """
    if not (cfg.train.predict_with_generate and data.evaluation):
        return {}
    changes: dict[str, Any] = {"tokenized_path": None, "streaming": False}
    if cfg.data.eval_dataset:
        changes["dataset"] = ()
    found = prepare_data(
        cfg.data.model_copy(update=changes),
        template,
        tokenizer,
        view="labelled",
        seed=data_seed(cfg),
        access=access_of(cfg.data, cfg.model),
        for_training=False,
        cache_dir=Path(cfg.model.cache_dir) if cfg.model.cache_dir else None,
    )
    if not cfg.data.eval_dataset:
        _require_same_split(data, found)
    return {_prefix(name): cast("ExampleTable", table) for name, table in found.evaluation.items()}


def _require_same_split(data: PreparedData, prompts: PreparedData) -> None:
    """Held-out rows are chosen by their number, so that both readings must have the same rows."""
    for ours, theirs in zip(data.report.datasets, prompts.report.datasets, strict=True):
        if ours.num_kept != theirs.num_kept:
            raise DataError(
                "val_size would hold out other rows for predictions than for evaluation",
                where=ours.name,
                found=f"{ours.num_kept:,} rows with something to learn, {theirs.num_kept:,} with a prompt",
                expected="the same rows",
                fix="remove the rows without an answer, or name held-out rows as eval_dataset",
            )
    for name, table in data.evaluation.items():
        if _origins(table) != _origins(prompts.evaluation[name]):
            raise DataError(
                "val_size would hold out other rows for predictions than for evaluation",
                where=name,
                found="as many rows with something to learn as with a prompt, but not the same ones",
                expected="the same rows",
                fix="remove the rows without an answer or without a prompt, or name held-out rows as eval_dataset",
            )


def _origins(table: Examples) -> list[str]:
    """Where each row comes from."""
    return [table.origin(int(first)) for first in table.offsets[:-1]]


def _prefix(name: str) -> str:
    return name if name == "eval" else f"eval_{name}"


def with_predictions(
    job: Job,
    cfg: RunConfig,
    claim: Claim,
    *,
    plan: ModelPlan,
    policy: nn.Module,
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Prompts,
    stop: StopRequest,
) -> Job:
    """The job with predictions, where the run asks for some."""
    train = cfg.train
    if not (train.do_predict or prompts):
        return job
    kind = load_stage(train.stage).predicts
    if kind is None:
        raise ConfigError(Problem(key="do_predict", message=f"stage {train.stage} has nothing to predict"))
    batch_size = train.per_device_eval_batch_size
    predictor: Predictor
    if kind == "answers":
        model = language_model(policy)
        ends = cast("Any", model).generation_config.eos_token_id
        vocabulary = tokenizer.get_vocab()
        words = (tokenizer.eos_token, *template.stop_words)
        predictor = AnswerPredictor(
            sets=prompts,
            model=model,
            tokenizer=tokenizer,
            generation=cfg.generation,
            stop_ids=frozenset(() if ends is None else np.atleast_1d(ends).tolist())
            | {vocabulary[word] for word in words if word in vocabulary},
            seed=train.seed,
            batch_size=batch_size,
        )
    else:
        predictor = ScorePredictor(
            feeds=cast("Any", job.evaluation),
            model=cast("Any", policy),
            plan=plan,
            device=job.accelerator.device,
            batch_size=batch_size,
        )
    predictions = Predictions(
        predictor=predictor,
        policy=policy,
        language_model=language_model(policy),
        accelerator=job.accelerator,
        batch_size=batch_size,
        stop=stop,
        starts_afresh=train.overwrite_output_dir and claim.resume_from is None,
        in_evaluation=bool(prompts),
        is_written=train.do_predict,
    )
    return replace(job, predictions=predictions)
