"""What a training stage is: a record of pure functions, no base class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llamafactory.data.batch import Batch
    from llamafactory.data.types import ViewName
    from llamafactory.hparams.section import Section
    from llamafactory.model.plan import ModelPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models that a stage may use.

    Attributes:
        policy: the model that is trained.
        plan: how it is run.
    """

    policy: nn.Module
    plan: ModelPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of one batch, not yet divided.

    Attributes:
        loss_sum: scalar, summed over the batch's supervised units.
        num_units: the units on this device (supervised tokens in SFT); the loop divides by their global number.
    """

    loss_sum: Tensor
    num_units: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A training stage.

    Attributes:
        name: as in the key `stage`.
        view: how it reads rows: `sft`, `pairs`, `feedback`, `text` or `prompts` (see `data.views`).
        loss: `(models, batch, options) -> LossOutput`.
    """

    name: str
    view: ViewName
    loss: Callable[[Models, Batch, Section], LossOutput]


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
