"""What a training stage is: a record of pure functions, no base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llamafactory.data.batch import Batch
    from llamafactory.data.types import ViewName
    from llamafactory.model.plan import ModelPlan
    from llamafactory.model.reference import Reference
    from llamafactory.train.rollout_rules import RolloutRules


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models that a stage may use.

    Attributes:
        policy: the model that is trained.
        plan: how it is run.
        reference: the frozen model that the policy is compared with, or None.
        temperature: that answers are sampled at, and that log-probabilities of sampled tokens are taken at.
    """

    policy: nn.Module
    plan: ModelPlan
    reference: Reference | None = None
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of one batch, not yet divided.

    Attributes:
        loss_sum: scalar, summed over the batch's units.
        num_units: the units on this device (supervised tokens in SFT, pairs in DPO); the loop divides by their global
            number.
        metrics: name -> `[2]` on the device, a sum and what it is divided by; summed over batches and ranks before the
            division. No gradient. A name that begins with `_` is only there for the stage's `summarise`.
        spreads: name -> counts of values that are not negative (see `train.spread`), whose largest value and 95th
            percentile are logged.
    """

    loss_sum: Tensor
    num_units: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    spreads: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


def _never(options: Any) -> bool:
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A training stage.

    Attributes:
        name: as in the key `stage`.
        view: how it reads rows: `sft`, `pairs`, `ranked`, `feedback`, `text` or `prompts` (see `data.views`).
        loss: `(models, batch, options) -> LossOutput`.
        prepare: `(models, batch, options) -> (sums, batch)`, run without gradients on every batch of an optimizer step
            before its first loss. The sums, added up over batches and ranks, come back to `loss` as
            `batch.step_sums`; so a statistic of the step does not depend on how the step is split.
        prepares: `options -> bool`, whether `prepare` is needed.
        needs_reference: `options -> bool`.
        has_value_head: the policy gets a head that gives one number a token.
        summarise: `averages -> averages`, what follows from the averages of logged steps or of an evaluation, for
            example perplexity; names come without their prefix.
        rollout: `options -> RolloutRules` of a stage that trains on answers which the policy samples; None where the
            data holds the answers.
        predicts: what `do_predict` writes of the evaluation rows: `answers` to their prompts, or `scores` of the value
            head; None for nothing.
    """

    name: str
    view: ViewName
    loss: Callable[[Models, Any, Any], LossOutput]
    prepare: Callable[[Models, Any, Any], tuple[Tensor, Batch]] | None = None
    prepares: Callable[[Any], bool] = _never
    needs_reference: Callable[[Any], bool] = _never
    has_value_head: bool = False
    summarise: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    rollout: Callable[[Any], RolloutRules] | None = None
    predicts: Literal["answers", "scores"] | None = None


def load_stage(name: str) -> Stage:
    """Finds a stage by file name in `train/stages`, or by the dotted path of a module that holds a `STAGE`.

    Raises:
        ConfigError: there is no such stage.
    """
    import importlib
    import importlib.util

    module_name = name if "." in name else f"llamafactory.train.stages.{name}"
    module: Any = importlib.import_module(module_name) if importlib.util.find_spec(module_name) else None
    if module is None:
        from llamafactory.extras.errors import ConfigError, Problem

        raise ConfigError(Problem(key="stage", given=name, message="there is no such stage"))
    return module.STAGE
