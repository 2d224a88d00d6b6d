"""Sampling and scoring the answers of one rollout, with what every process has to know of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamafactory.extras import log
from llamafactory.extras.errors import SaveAndStopError
from llamafactory.model.generation import Completion, complete
from llamafactory.model.sampling import Sampling, row_seed
from llamafactory.train.agreement import FAILED, agree, fault_of_all
from llamafactory.train.experience import Experience, ExperienceBatch, collate_experience, micro_batches
from llamafactory.train.logprob import unwrap_peft
from llamafactory.train.metrics import summed
from llamafactory.train.rewards.answer import Answer
from llamafactory.train.rollout_rules import Played, RolloutRules, as_metric
from llamafactory.train.signals import StopSignal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerFast

    from llamafactory.data.table import Examples
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.rewards.team import Scores, Team
    from llamafactory.train.windows import Item

_FIXED = 5
"""Columns of a rollout's table before those of the rewards."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a rollout needs besides prompts and policy.

    Attributes:
        rules: of the stage.
        sampling: of answers.
        team: sources of rewards.
        tokenizer: makes text of ids, for rewards alone.
        seed: of everything random.
        plan: layout and tokens of a forward pass.
        pad_id: fills rows.
        rows_at_once: answers that are generated together.
        measure: `batch -> {old, reference, values}` of each token without gradient, for those that are asked for.
        policy: gives the language model that samples.
        row_of: `(examples, place) -> row` as its file has it, where a source of rewards asks for rows.
    """

    rules: RolloutRules
    sampling: Sampling
    team: Team
    tokenizer: PreTrainedTokenizerFast
    seed: int
    plan: ModelPlan
    pad_id: int
    rows_at_once: int
    measure: Callable[[ExperienceBatch, bool], Mapping[str, Tensor]]
    policy: Callable[[], torch.nn.Module]
    row_of: Callable[[Examples, int], Mapping[str, object]] | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A rollout before it is judged.

    Attributes:
        experiences: of this process.
        played: of all processes.
        metrics: of all processes.
        num_prompt: tokens of each prompt, of all processes.
        scored: this process's answers to each prompt, and what they earned.
    """

    experiences: list[Experience]
    played: Played
    metrics: dict[str, Tensor]
    num_prompt: list[int]
    scored: list[tuple[list[Answer], Scores]]


class Dealer:
    """Samples and scores answers."""

    def __init__(self, prompts: Examples, items: Sequence[Item], table: Table, accelerator: Accelerator) -> None:
        """Nothing is generated yet.

        Args:
            prompts: examples.
            items: each a prompt and, where the row has one, its answer.
            table: see there.
            accelerator: of the run.
        """
        self._prompts, self._items, self.table, self._accelerator = prompts, items, table, accelerator
        self.look: Callable[[], None] = lambda: None

    def draw(self, shares: Sequence[Sequence[Item]], group: int, seed: tuple[int, ...], *, num_redraws: int) -> Drawn:
        """Answers to this process's prompts, and what all processes know of all answers.

        Args:
            shares: prompts of each rank.
            group: answers to a prompt.
            seed: of this rollout.
            num_redraws: how often prompts whose answers all earn the same are replaced.

        Raises:
            StopSignal: any process was told to stop; all of them raise it.
            SaveAndStopError: the answers of any process cannot be scored; all of them raise it.
        """
        first = sum(len(share) for share in shares[: self._accelerator.process_index])
        items = list(shares[self._accelerator.process_index])
        samples, num_redrawn, signal, fault = [], 0, 0, None
        try:
            samples, num_redrawn = self._samples(items, first, group, seed, num_redraws)
        except StopSignal as stopped:
            signal = stopped.number
        except SaveAndStopError as error:
            signal, fault = FAILED, error
        number = agree(self._accelerator, signal)[0]
        if number == FAILED:
            raise fault_of_all(self._accelerator, fault)
        if number:
            raise StopSignal(number)
        total = sum(len(share) for share in shares)
        filled = self.total(self._filled(samples, first, total, group)).numpy()
        played = Played(
            rewards=filled[:, :, 4], lengths=filled[:, :, 1].astype(np.int64), stopped=filled[:, :, 2] > 0,
            limit=self.table.sampling.max_new_tokens,
        )  # fmt: skip
        metrics = self._metrics(filled, played)
        if num_redraws:
            redrawn = self.total(torch.tensor([float(num_redrawn), 0.0], dtype=torch.float64))[0]
            metrics["redrawn_prompts"] = torch.stack([redrawn, redrawn.new_tensor(float(total))])
        found = [
            Experience(
                place=first + place,
                row=items[place][0],
                prompt=np.array(answers[0].prompt_ids, dtype=np.int32),
                answers=tuple(np.array(one.ids, dtype=np.int32) for one in completions),
                sampler=np.concatenate([one.logps for one in completions]),
                weights=np.ones(len(completions), dtype=np.float32),
            )
            for place, (answers, completions, _) in enumerate(samples)
        ]
        return Drawn(
            experiences=found, played=played, metrics=metrics, num_prompt=filled[:, 0, 0].astype(np.int64).tolist(),
            scored=[(answers, scores) for answers, _, scores in samples],
        )  # fmt: skip

    def _samples(
        self, items: list[Item], first: int, group: int, seed: tuple[int, ...], num_redraws: int
    ) -> tuple[list[tuple[list[Answer], list[Completion], Scores]], int]:
        """Answers to prompts, and how many prompts were replaced; `items` then holds those that took their place."""
        samples = self._sample(items, group, seed)
        num_redrawn = 0
        for redraw in range(1, num_redraws + 1):
            flat = [place for place, (_, _, scores) in enumerate(samples) if np.ptp(scores.total) <= 1e-8]
            if not flat:
                break
            num_redrawn += len(flat)
            for place in flat:
                draw = np.random.default_rng([self.table.seed, *seed, redraw, first + place])
                every = self._items
                items[place] = every[int(draw.integers(len(every)))]
            again = self._sample([items[place] for place in flat], group, (*seed, redraw))
            for place, sample in zip(flat, again, strict=True):
                samples[place] = sample
        return samples, num_redrawn

    def _sample(
        self, items: Sequence[Item], group: int, seed: tuple[int, ...]
    ) -> list[tuple[list[Answer], list[Completion], Scores]]:
        table = self.table
        if not items:
            return []
        rows = [item[0] for item in items]
        groups = [[self._prompts[index] for index in item] for item in items]
        prompts = [group_of[0].input_ids.tolist() for group_of in groups]
        seeds = [[row_seed(table.seed, *seed, row, number) for number in range(group)] for row in rows]
        watched = unwrap_peft(table.policy()).register_forward_pre_hook(lambda module, inputs: self.look())
        with self._accelerator.autocast(), watched:
            completions = complete(
                table.policy(), prompts, table.sampling, seeds=seeds, pad_id=table.pad_id,
                rows_at_once=table.rows_at_once,
            )  # fmt: skip
        found: list[list[Answer]] = []
        for row, prompt, examples, made in zip(rows, prompts, groups, completions, strict=True):
            known = self._text(examples[1].input_ids.tolist()) if len(examples) > 1 else None
            columns = {} if table.row_of is None else table.row_of(self._prompts, row)
            text = str(table.tokenizer.decode(prompt, skip_special_tokens=False))
            found.append(
                [
                    Answer(
                        prompt=text,
                        completion=self._text(one.ids),
                        answer=known,
                        prompt_ids=prompt,
                        completion_ids=one.ids,
                        is_stopped=one.is_stopped,
                        row=row,
                        columns=columns,
                    )
                    for one in made
                ]  # fmt: skip
            )
        scores = table.team.score([answer for answers in found for answer in answers])
        return [
            (answers, made, _scores_of(scores, place * group, (place + 1) * group))
            for place, (answers, made) in enumerate(zip(found, completions, strict=True))
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.table.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _filled(
        self,
        samples: Sequence[tuple[Sequence[Answer], Sequence[Completion], Scores]],
        first: int,
        total: int,
        group: int,
    ) -> Tensor:
        """This process's rows of the table: tokens of prompt and answer, stopped, entropy, reward, sources, faults."""
        num_sources = len(self.table.team.names)
        table = np.zeros((total, group, _FIXED + 2 * num_sources))
        for place, (answers, completions, scores) in enumerate(samples, start=first):
            table[place, :, 0] = len(answers[0].prompt_ids)
            table[place, :, 1] = [len(one.ids) for one in completions]
            table[place, :, 2] = [one.is_stopped for one in completions]
            table[place, :, 3] = [float(one.entropies.sum()) for one in completions]
            table[place, :, 4] = scores.total
            table[place, :, _FIXED : _FIXED + num_sources] = scores.columns
            table[place, :, _FIXED + num_sources :] = scores.faults
        return torch.from_numpy(table)

    def _metrics(self, filled: NDArray[np.float64], played: Played) -> dict[str, Tensor]:
        names = self.table.team.names
        found = {
            "reward": as_metric(played.rewards),
            "completion_length": as_metric(played.lengths),
            "completions_cut": as_metric(~played.stopped),
            "entropy": torch.tensor([filled[:, :, 3].sum(), filled[:, :, 1].sum()], dtype=torch.float64),
        }
        if played.rewards.shape[1] > 1:
            found["reward_std"] = as_metric(played.rewards.std(axis=1, ddof=1))
        for place, name in enumerate(names, start=_FIXED):
            found[name] = as_metric(filled[:, :, place])
            faults = filled[:, :, place + len(names)]
            if faults.any():
                found[f"{name}/faults"] = as_metric(faults)
                log.warn(
                    f"{name.partition('/')[2]} could not score {int(faults.sum())} answers; they count as 0 there"
                )
        return found

    def measured(self, experiences: Sequence[Experience]) -> list[Experience]:
        """Adds what the trainer itself knows of each sampled token before the first update."""
        table = self.table
        found: list[dict[str, list[NDArray[np.float32]]]] = [{} for _ in experiences]
        if not experiences:
            return []
        sizes = [(len(one.prompt), one.lengths) for one in experiences]
        for pieces in micro_batches(sizes, table.plan, table.rows_at_once):
            pieces = sorted(pieces)
            parts = [experiences[number].part(first, last) for number, first, last in pieces]
            batch: Any = collate_experience(parts, table.plan.layout, table.pad_id)
            values = table.measure(batch.to(self._accelerator.device), table.rules.needs_old)
            for name, tensor in values.items():
                ends = np.cumsum([0, *(sum(part.lengths) for part in parts)])
                array = tensor.float().cpu().numpy()
                for (number, _, _), start, stop in zip(pieces, ends, ends[1:], strict=False):
                    found[number].setdefault(name, []).append(array[start:stop])
        return [
            replace(one, **{name: np.concatenate(parts) for name, parts in more.items()})
            for one, more in zip(experiences, found, strict=True)
        ]

    def total(self, tensor: Tensor) -> Tensor:
        """Over all ranks; on the host."""
        if self._accelerator.num_processes == 1:
            return tensor
        return summed(self._accelerator, tensor.to(self._accelerator.device)).cpu()


def _scores_of(scores: Scores, first: int, last: int) -> Scores:
    return replace(
        scores,
        total=scores.total[first:last],
        columns=scores.columns[first:last],
        faults=scores.faults[first:last],
    )
