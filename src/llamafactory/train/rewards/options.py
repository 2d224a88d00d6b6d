"""The keys that choose rewards, for every stage that needs some."""

from __future__ import annotations

from typing import Literal

from llamafactory.hparams.section import Section, option

GROUP = "Rewards"


class RewardOptions(Section):
    """Where rewards come from. Several sources are added up, each with its weight."""

    reward_functions: tuple[str, ...] = option(
        (),
        "Python functions (path.py:name) and built-in checks: exact_match, contains:TEXT, ends_with:TEXT, "
        "regex:PATTERN, length:TOKENS, json, json_schema:FILE, math. A Python file is run as your own code.",
        group=GROUP,
    )
    reward_weights: tuple[float, ...] = option(
        (), "A weight for each reward function, and a last one for reward_model; empty for ones.", group=GROUP
    )
    reward_errors: Literal["stop", "zero"] = option(
        "stop",
        "A function that raises or returns no number: stop the run with its state saved, or count 0 and report it.",
        group=GROUP,
    )
    gold_function: str | None = option(
        None, "A function like those of reward_functions that is only logged, to see whether rewards are gamed.",
        group=GROUP,
    )  # fmt: skip
    reward_model: str | None = option(
        None, "Reward model: folder of an adapter or of a model with a value head, or the URL of a service.",
        group=GROUP,
    )  # fmt: skip
    reward_model_type: Literal["lora", "full", "api"] = option(
        "lora", "An adapter on the policy's own base, a model of its own, or a service (api).", group=GROUP
    )
    reward_timeout: float = option(30.0, "Seconds to wait for the service of type api.", group=GROUP, gt=0)
    reward_retries: int = option(3, "Further tries when the service of type api fails.", group=GROUP, ge=0)
    log_completions: int = option(
        4, "Answers a step that are written to completions.jsonl; 0 for none.", group=GROUP, ge=0
    )
