"""All sources of rewards of a run together: their sum is the reward, a gold checker only watches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.train.rewards.answer import Answer, Reward
from llamafactory.train.rewards.functions import load_function, require_columns, scores_of
from llamafactory.train.rewards.options import RewardOptions
from llamafactory.train.rewards.service import service_score


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What some answers earned.

    Attributes:
        total: float64 `[answers]`, weighted sum of the rewards.
        columns: float64 `[answers, sources]`, each source's own numbers, not weighted; the gold checker is last.
        faults: bool `[answers, sources]`, where a source could not score an answer; it counts as 0 there.
    """

    total: NDArray[np.float64]
    columns: NDArray[np.float64]
    faults: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Team:
    """The sources of a run.

    Attributes:
        rewards: added up.
        gold: only logged, or None.
        policy: `reward_errors`.
    """

    rewards: tuple[Reward, ...]
    gold: Reward | None = None
    policy: str = "stop"

    @property
    def names(self) -> list[str]:
        """Names of the curves, in the order of `Scores.columns`."""
        names = [f"rewards/{reward.name}" for reward in self.rewards]
        return [*names, f"gold/{self.gold.name}"] if self.gold else names

    @property
    def wants_rows(self) -> bool:
        """Whether a source looks at the rows that prompts are from."""
        return any(one.wants_rows for one in (*self.rewards, self.gold) if one)

    def require_columns(self, row: Mapping[str, Any]) -> None:
        """Stops where a source asks for a column that this row does not have.

        Raises:
            ConfigError: it does.
        """
        for reward in self.rewards:
            require_columns(reward, row)
        if self.gold is not None:
            require_columns(self.gold, row, "gold_function")

    def score(self, answers: Sequence[Answer]) -> Scores:
        """Asks every source.

        Raises:
            RewardUnavailableError: a source fails and the policy is `stop`, or a service is gone.
        """
        sources = [*self.rewards, *([self.gold] if self.gold else [])]
        found = [scores_of(source, answers, policy=self.policy) for source in sources]
        columns = np.array(found, dtype=np.float64).reshape(len(sources), len(answers)).T
        faults = np.isnan(columns)
        columns = np.where(faults, 0.0, columns)
        weights = np.array([reward.weight for reward in self.rewards])
        return Scores(total=columns[:, : len(weights)] @ weights, columns=columns, faults=faults)


def build_team(options: RewardOptions, model_reward: Reward | None = None) -> Team:
    """Loads the functions that the options name.

    Args:
        options: see there.
        model_reward: of `reward_model`, of the types that run in this process.

    Raises:
        ConfigError: no source of rewards, one that cannot be loaded, or a wrong number of weights.
    """
    rewards = [load_function(spec) for spec in options.reward_functions]
    if options.reward_model is not None and options.reward_model_type == "api":
        score = service_score(options.reward_model, timeout=options.reward_timeout, retries=options.reward_retries)
        rewards.append(Reward(name="reward_model", score=score))
    elif model_reward is not None:
        rewards.append(model_reward)
    if not rewards:
        raise ConfigError(
            Problem(
                key="reward_functions",
                message="there is nothing that scores answers",
                allowed="reward_functions, reward_model, or both",
                fix="reward_functions: rewards.py:score, or a built-in check such as json",
            )
        )
    weights = options.reward_weights or (1.0,) * len(rewards)
    if len(weights) != len(rewards):
        raise ConfigError(
            Problem(
                key="reward_weights",
                given=", ".join(f"{weight:g}" for weight in weights),
                message=f"{len(weights)} weights for {len(rewards)} sources of rewards",
                allowed=f"one for each of {', '.join(reward.name for reward in rewards)}",
            )
        )
    names = [reward.name for reward in rewards]
    named = [
        replace(reward, name=name if names.count(name) == 1 else f"{name}_{place}", weight=weight)
        for place, (name, reward, weight) in enumerate(zip(names, rewards, weights, strict=True), start=1)
    ]
    gold = load_function(options.gold_function, key="gold_function") if options.gold_function else None
    return Team(rewards=tuple(named), gold=gold, policy=options.reward_errors)
