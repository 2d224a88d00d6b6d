"""What to change where a run does not fit: each way out is planned anew, so that its total is as true as the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.model.method import load_method

if TYPE_CHECKING:
    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan

NUM_WAYS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class WayOut:
    """A change of the configuration, and what the run would need with it.

    Attributes:
        changes: key -> value.
        total: forecast in bytes.
        fits: whether that is within the room.
        price: what the change costs, in words.
    """

    changes: Mapping[str, Any]
    total: int
    fits: bool
    price: str

    def render(self) -> str:
        """`finetuning_type=lora: 18.2 GB (trains 0.5 % of the weights)`."""
        words = " ".join(f"{key}={_shown(value)}" for key, value in self.changes.items())
        return f"{words}: {self.total / 1e9:.1f} GB{'' if self.fits else ', still too much'} ({self.price})"


def require_fit(
    cfg: RunConfig, plan: ModelPlan, hardware: Hardware, plan_again: Callable[[RunConfig], ModelPlan]
) -> None:
    """Refuses a run whose forecast is beyond the room, unless `ignore_plan` is set.

    Raises:
        ConfigError: with the parts of the forecast and the three cheapest ways out.
    """
    if plan.costs is None or plan.costs.fits or cfg.train.ignore_plan:
        return
    raise ConfigError(does_not_fit(plan, hardware, find_ways_out(cfg, hardware, plan_again)))


def does_not_fit(plan: ModelPlan, hardware: Hardware, ways: list[WayOut]) -> Problem:
    """The refusal as a problem of the configuration."""
    if plan.costs is None:
        raise ValueError("a plan without costs is never refused")
    memory, room = plan.costs.memory, plan.costs.room
    where = "RAM that is free" if hardware.device == "cpu" else f"memory of one {hardware.name}"
    largest = memory.largest
    fixes = [f"{number}. {way.render()}" for number, way in enumerate(ways, start=1)]
    fixes.append("ignore_plan=true starts the run all the same")
    return Problem(
        message=f"the run needs {memory.total / 1e9:.1f} GB, and {room / 1e9:.1f} GB of the {where} may be used",
        given=f"largest part: {largest}, {memory.parts()[largest] / 1e9:.1f} GB",
        fix="\n              ".join(fixes),
    )


def find_ways_out(cfg: RunConfig, hardware: Hardware, plan_again: Callable[[RunConfig], ModelPlan]) -> list[WayOut]:
    """The cheapest changes after which the run fits; where no single one is enough, they are taken together.

    Args:
        cfg: the configuration that does not fit.
        hardware: the machine.
        plan_again: plans a changed configuration.

    Returns:
        At most three, the cheapest first; those that fit, or else those that need least.
    """
    found: list[WayOut] = []
    together: dict[str, Any] = {}
    for changes, price in _single_changes(cfg, hardware):
        alone = _try(cfg, changes, price, plan_again)
        found += alone
        if not any(way.fits for way in alone) and not any(key in together for key in changes):
            together |= changes
            if len(together) > len(changes):
                joined = _try(cfg, together, "together", plan_again)
                found += joined
                if any(way.fits for way in joined):
                    together = {}
        if sum(way.fits for way in found) >= NUM_WAYS:
            break
    fitting = [way for way in found if way.fits]
    return fitting[:NUM_WAYS] or sorted(found, key=lambda way: way.total)[:NUM_WAYS]


def changed(cfg: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values, as if the user had written them."""
    sections: dict[str, Any] = {}
    left = dict(changes)
    for name, section in cfg.sections():
        own = {key: left.pop(key) for key in list(left) if key in type(section).model_fields}
        if own:
            sections[name] = section.model_copy(update=own)
    if "train" in sections and "finetuning_type" in changes:
        sections["adapter_options"] = _options_of(changes["finetuning_type"], left)
    return replace(cfg, **sections)


def _options_of(finetuning_type: str, given: Mapping[str, Any]) -> Any:
    import importlib

    return importlib.import_module(load_method(finetuning_type).apply.__module__).Options(**given)


def _single_changes(cfg: RunConfig, hardware: Hardware) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes from the cheapest to the dearest."""
    train, trains_base = cfg.train, load_method(cfg.train.finetuning_type).trains_base
    if cfg.model.disable_gradient_checkpointing:
        yield {"disable_gradient_checkpointing": False}, "a third more computing"
    computes_half = train.bf16 or train.fp16 or train.pure_bf16
    if not computes_half and hardware.device != "cpu":
        kind = "bf16" if hardware.has_bf16 else "fp16"
        yield {kind: True}, "half the bytes and faster; 8 bits of precision in the products"
    if trains_base and train.optim.startswith("adamw"):
        yield {"optim": "adafactor"}, "no second copy of moments; tune the learning rate again"
    if trains_base:
        yield {"finetuning_type": "lora"}, "trains small matrices beside frozen weights"
    targets = getattr(cfg.adapter_options, "lora_target", ())
    if not trains_base and "all" in targets:
        yield {"lora_target": ("q_proj", "k_proj", "v_proj", "o_proj")}, "adapts attention only"
    if cfg.data.cutoff_len > 512:
        yield {"cutoff_len": max(512, cfg.data.cutoff_len // 4)}, "longer rows are cut"
    if not train.pure_bf16 and (trains_base or hardware.device == "cpu"):
        yield {"pure_bf16": True}, "no float32 master weights: small updates are lost"


def _try(
    cfg: RunConfig, changes: Mapping[str, Any], price: str, plan_again: Callable[[RunConfig], ModelPlan]
) -> list[WayOut]:
    costs = plan_again(changed(cfg, changes)).costs
    if costs is None:
        return []
    return [WayOut(changes=dict(changes), total=costs.memory.total, fits=costs.fits, price=price)]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
