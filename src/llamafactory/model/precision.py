"""How the numbers of a run are kept and multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

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
