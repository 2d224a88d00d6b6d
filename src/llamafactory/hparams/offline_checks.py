"""Rules of `offline`: what needs the network by its nature is refused, so that nothing is silently left out."""

from __future__ import annotations

from collections.abc import Iterator

from llamafactory.extras.errors import Problem
from llamafactory.hparams.run_config import RunConfig

_SERVERS = frozenset({"wandb", "comet_ml", "clearml", "swanlab"})
"""Trackers that report to a server."""


def check_offline(config: RunConfig) -> Iterator[Problem]:
    """A run without network reports to no server, and asks none for rewards."""
    if not config.model.offline or config.command != "train":
        return
    if online := sorted(_SERVERS & set(config.train.report_to)):
        yield Problem(
            key="report_to", message=f"{', '.join(online)} needs the network, and offline is on", fix="tensorboard"
        )
    if getattr(config.stage_options, "reward_model_type", None) == "api":
        yield Problem(
            key="reward_model_type",
            message="a service is asked over the network, and offline is on",
            fix="remove offline; the variable HF_HUB_OFFLINE=1 alone keeps the run off the hub",
        )


OFFLINE_CHECKS = (check_offline,)
