"""The frozen model that a stage compares the policy with: another model, an adapter, or the policy's base.

What this file never does: change a weight, or decide whether a stage needs a reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "reference"
"""Name of the frozen copy of an adapter that training continues."""
REWARD_ADAPTER = "reward"
"""Name of the frozen adapter that scores answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Where the reference is.

    Attributes:
        model: a model of its own, or None where the policy holds the reference.
        adapter: name of the policy's frozen adapter, or None where the reference is the policy without any adapter.
        bits: of a weight of the quantised model of its own; None where it is not quantised.
    """

    model: nn.Module | None = None
    adapter: str | None = None
    bits: int | None = None

    @contextmanager
    def of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference as a model, in evaluation mode and without gradients, while the context lasts.

        Args:
            policy: the model that is trained; its state is the same again afterwards.
        """
        if self.model is not None:
            with torch.no_grad():
                yield self.model
            return
        was_training = policy.training
        policy.eval()
        try:
            with torch.no_grad(), self._switched(policy):
                yield policy
        finally:
            policy.train(was_training)

    def digest(self, policy: nn.Module) -> str:
        """Names the reference's weights by their content.

        Args:
            policy: the model that is trained; adapters that are not part of the reference do not count.
        """
        model: Any = policy if self.model is None else self.model
        others = set[str]() if self.model is not None else set(getattr(model, "peft_config", {})) - {self.adapter}
        found = hashlib.blake2b(digest_size=16)
        for name, tensor in model.state_dict().items():
            if not others.isdisjoint(name.split(".")):
                continue
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    @contextmanager
    def _switched(self, policy: Any) -> Iterator[None]:
        if self.adapter is None:
            with policy.disable_adapter():
                yield
            return
        trained = policy.active_adapter
        policy.base_model.set_adapter(self.adapter, inference_mode=True)
        try:
            yield
        finally:
            policy.base_model.set_adapter(trained)


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model; a policy that is compared with a reference or with its own samples drops nothing."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "attention_dropout" in vars(module):  # the config keeps its number, which is saved with the model
            module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType]
    return model


def freeze(model: nn.Module) -> nn.Module:
    """The same model, in evaluation mode, no weight of it trainable."""
    model.requires_grad_(False)
    return model.eval()
