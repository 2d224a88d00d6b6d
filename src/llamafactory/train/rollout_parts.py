"""Puts together what rollouts need: rewards, sampling, and what the trainer measures of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from llamafactory.extras import log
from llamafactory.model.sampling import Sampling
from llamafactory.model.valuehead import ModelWithValueHead
from llamafactory.train.answers import policy_logps, reference_logps
from llamafactory.train.companions import language_model
from llamafactory.train.completions_file import CompletionsFile
from llamafactory.train.logprob import target_states, unwrap_peft
from llamafactory.train.model_files import ModelFiles
from llamafactory.train.rewards.options import RewardOptions
from llamafactory.train.rewards.reward_model import load_reward_model
from llamafactory.train.rewards.team import Team, build_team
from llamafactory.train.rollout import Rollouts
from llamafactory.train.rollout_draw import Table
from llamafactory.train.stage import Models, Stage
from llamafactory.train.workload import RowSizes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerFast

    from llamafactory.data.mix import Mix
    from llamafactory.data.source_rows import SourceRows
    from llamafactory.data.table import Examples
    from llamafactory.data.types import Template
    from llamafactory.hparams.generation import GenerationConfig
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.train.checkpoint.state import RunState
    from llamafactory.train.experience import ExperienceBatch
    from llamafactory.train.rollout_rules import RolloutRules
    from llamafactory.train.windows import Schedule


@dataclass(frozen=True, kw_only=True)
class RolloutParts:
    """What all rollouts of a run share.

    Attributes:
        rules: of the stage.
        options: of the stage.
        models: policy, reference, plan, temperature.
        team: sources of rewards.
        sampling: of answers.
        tokenizer: of the model.
        seed: of the run.
        accelerator: of the run.
        source_rows: the rows that prompts are from, or None where they were not read.
    """

    rules: RolloutRules
    options: RewardOptions
    models: Models
    team: Team
    sampling: Sampling
    tokenizer: PreTrainedTokenizerFast
    seed: int
    accelerator: Accelerator
    source_rows: SourceRows | None = None

    def rollouts(self, prompts: Examples, schedule: Schedule) -> Rollouts:
        """Rollouts over prompts.

        Raises:
            ConfigError: a reward function asks for a column that the first row does not have.
        """
        row_of = self.source_rows.row if self.source_rows is not None and self.team.wants_rows else None
        if len(prompts):
            self.team.require_columns({} if row_of is None else row_of(prompts, schedule.items[0][0]))
        table = Table(
            rules=self.rules, sampling=self.sampling, team=self.team, tokenizer=self.tokenizer, seed=self.seed,
            plan=self.models.plan, pad_id=cast("int", self.tokenizer.pad_token_id),
            rows_at_once=cast("Any", self.options).rollout_batch_size, measure=self._measure,
            policy=lambda: language_model(self.models.policy), row_of=row_of,
        )  # fmt: skip
        return Rollouts(prompts, schedule, table, self.accelerator)

    def take_up(
        self, rollouts: Rollouts, files: ModelFiles, folder: Path, *, start: RunState, checkpoint: Path | None
    ) -> ModelFiles:
        """Continues what a checkpoint holds, and opens the file of sampled answers in the first process.

        Args:
            rollouts: of the training.
            files: of the model.
            folder: of the run.
            start: state that training begins with.
            checkpoint: that it comes from, or None.

        Returns:
            The files of a checkpoint, with the rollout that is in use.
        """
        if checkpoint is not None:
            rollouts.restore(start.data, checkpoint)
        if self.accelerator.is_main_process and self.options.log_completions:
            limit, names = self.options.log_completions, self.team.names
            rollouts.journal = CompletionsFile(folder, limit=limit, names=names, done_steps=start.step)
        return FilesWithExperience(files, rollouts)

    def _measure(self, batch: ExperienceBatch, needs_old: bool) -> Mapping[str, Tensor]:
        policy, models = self.models.policy, replace(self.models, policy=language_model(self.models.policy))
        was_training = policy.training
        policy.eval()
        found: dict[str, Tensor] = {}
        with torch.no_grad(), self.accelerator.autocast():
            if needs_old:
                found["old"] = policy_logps(models, batch)
            if isinstance(policy, ModelWithValueHead):
                found["values"] = policy.v_head(
                    target_states(unwrap_peft(policy.pretrained_model), batch, models.plan)
                )
            if self.rules.needs_reference:
                found["reference"] = reference_logps(models, batch)
        policy.train(was_training)
        return found


def parts_of(
    cfg: RunConfig,
    stage: Stage,
    models: Models,
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    accelerator: Accelerator,
    source_rows: SourceRows | None = None,
) -> RolloutParts | None:
    """Rewards and sampling of a stage that trains on answers which the policy samples; None for any other."""
    if stage.rollout is None:
        return None
    options = cast("RewardOptions", cfg.stage_options)
    ends = cast("Any", language_model(models.policy)).generation_config.eos_token_id
    sampling = sampling_of(cfg.generation, template, tokenizer, [] if ends is None else np.atleast_1d(ends).tolist())
    rows_at_once = cast("Any", options).rollout_batch_size
    reward_model = load_reward_model(
        cfg, options, plan=models.plan, policy=lambda: language_model(models.policy), accelerator=accelerator,
        rows_at_once=rows_at_once,
    )  # fmt: skip
    return RolloutParts(
        rules=stage.rollout(options),
        options=options,
        models=replace(models, temperature=sampling.temperature),
        team=build_team(options, reward_model),
        sampling=sampling,
        tokenizer=tokenizer,
        seed=cfg.train.seed,
        accelerator=accelerator,
        source_rows=source_rows,
    )


def build_rollouts(
    parts: RolloutParts,
    schedule_rows: Callable[..., Schedule],
    examples: Examples,
    *,
    training: bool,
    mix: Mix | None = None,
) -> Rollouts:
    """Rollouts over prompts, for training or for evaluation; the batch size counts prompts."""
    num_ranks = parts.accelerator.num_processes
    rows = RowSizes.of(examples)
    schedule = schedule_rows(rows, is_whole=True, num_ranks=num_ranks, training=training, mix=mix)
    if training:
        schedule = replace(schedule, accumulation=schedule.accumulation * parts.rules.num_parts)
    return parts.rollouts(examples, schedule)


def sampling_of(
    generation: GenerationConfig, template: Template, tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int]
) -> Sampling:
    """How answers are sampled: from the whole distribution of the policy, unless a key says otherwise.

    Args:
        generation: only the keys that were set count for temperature, top_k and top_p.
        template: its stop words of one token end an answer.
        tokenizer: its end token ends an answer.
        end_ids: ends that the model names.
    """
    given = generation.model_fields_set
    vocabulary = tokenizer.get_vocab()
    words = [tokenizer.eos_token, *template.stop_words]
    new_tokens = generation.max_new_tokens or generation.max_length
    sampling = Sampling(
        max_new_tokens=new_tokens,
        stop_ids=frozenset(end_ids) | {vocabulary[word] for word in words if word in vocabulary},
        temperature=generation.temperature if "temperature" in given else 1.0,
        top_k=generation.top_k if "top_k" in given else 0,
        top_p=generation.top_p if "top_p" in given else 1.0,
    )
    log.info(
        f"sampling: temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p {sampling.top_p:g}, at most "
        f"{sampling.max_new_tokens} tokens"
    )
    return sampling


class FilesWithExperience(ModelFiles):
    """Model files, and beside them, in a checkpoint, the rollout that is in use."""

    def __init__(self, files: ModelFiles, rollouts: Rollouts) -> None:
        """Wraps both; nothing is copied yet."""
        self._files, self._rollouts = files, rollouts

    def prepare(self, *, is_async: bool, is_writer: bool, for_checkpoint: bool = False) -> Callable[[Path], None]:
        """See `ModelFiles`; a checkpoint has the rollout, gathered from all processes at once."""
        write = self._files.prepare(is_async=is_async, is_writer=is_writer, for_checkpoint=for_checkpoint)
        if not for_checkpoint:
            return write
        keep = self._rollouts.keeper()

        def write_both(folder: Path) -> None:
            write(folder)
            keep(folder)

        return write_both

    def shards(self) -> Mapping[str, Tensor]:
        """Those of the model."""
        return self._files.shards()

    def write_whole(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The model alone."""
        self._files.write_whole(folder, weights)
