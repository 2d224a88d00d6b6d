"""How the numbers of a run are kept and multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from llamafactory.model.method import load_method

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Number formats of a training run.

    Attributes:
        weights: dtype of the loaded weights.
        autocast: mixed precision: no, bf16 or fp16.
        pure_bf16: what is trained is kept in bfloat16 too, without autocast.
    """

    weights: DType
    autocast: Literal["no", "bf16", "fp16"]
    pure_bf16: bool

    @property
    def compute(self) -> DType:
        """Dtype of matrix products and of most kept activations."""
        names: dict[str, DType] = {"bf16": "bfloat16", "fp16": "float16"}
        return names.get(self.autocast, self.weights)


def training_dtype(cfg: RunConfig) -> tuple[DType, Literal["no", "bf16", "fp16"], str]:
    """Dtype of the loaded weights, accelerate's mixed precision, and the reason."""
    train = cfg.train
    if train.pure_bf16:
        return "bfloat16", "no", "pure_bf16: weights and arithmetic in bf16"
    if not train.bf16 and not train.fp16:
        return "float32", "no", "neither bf16 nor fp16 is set"
    autocast: Literal["bf16", "fp16"] = "bf16" if train.bf16 else "fp16"
    if load_method(train.finetuning_type).trains_base:
        return "float32", autocast, f"fp32 master weights, arithmetic in {autocast}"
    return ("bfloat16" if train.bf16 else "float16"), autocast, f"frozen base in {autocast}, adapters in fp32"
