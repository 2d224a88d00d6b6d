"""Linear layers that share an input, with or without LoRA: forward and backward with few temporaries.

`y = x W^T + bias + scale (x A^T) B^T`. The A matrices of all layers that read `x` are one product; LoRA's updates are
added into the base product's output; gradients of `x` are accumulated in place. Nothing here is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from llamafactory.model.kernels.product import times, times_transposed


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One linear layer, or its gradients (those that are not needed are None).

    Attributes:
        weight: `[out, in]`.
        bias: `[out]` or None.
        a: LoRA's `[rank, in]` or None.
        b: LoRA's `[out, rank]` or None.
        scale: of LoRA's update.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The four tensors, in the order in which autograd functions take them."""
        return self.weight, self.bias, self.a, self.b


_TENSORS = tuple(field.name for field in fields(Projection) if field.name != "scale")


def flatten(layers: Sequence[Projection]) -> list[Tensor | None]:
    """All tensors of the layers, as arguments of an autograd function."""
    return [tensor for layer in layers for tensor in layer.tensors()]


def refill(layers: Sequence[Projection], values: Sequence[Any]) -> list[Projection]:
    """The same layers with `values` (as `flatten` orders them) in place of their tensors."""
    size = len(_TENSORS)
    groups = [values[place * size : (place + 1) * size] for place in range(len(layers))]
    return [
        replace(layer, **dict(zip(_TENSORS, group, strict=True))) for layer, group in zip(layers, groups, strict=True)
    ]


def read_projection(module: nn.Module) -> Projection | None:
    """Reads a plain linear layer or peft's plain LoRA around one; None for anything else.

    Anything else is for example another adapter type, LoRA dropout in training, DoRA and the other variants of
    LoRA, two active adapters, a quantised base, or a module with hooks. Disabled and merged adapters count as absent.
    """
    if _is_plain(module):
        return Projection(weight=module.weight, bias=module.bias)  # type: ignore[arg-type]
    layer: Any = module
    if type(module).__name__ != "Linear" or not type(module).__module__.startswith("peft.") or _has_hooks(module):
        return None
    base = layer.base_layer
    if not _is_plain(base) or layer.fan_in_fan_out or (layer.disable_adapters and layer.merged):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return Projection(weight=base.weight, bias=base.bias)
    name = active[0]
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    is_dropping = layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0
    if len(active) > 1 or name in layer.lora_variant or is_dropping or not (_is_plain(down) and _is_plain(up)):
        return None
    if down.bias is not None or up.bias is not None:
        return None
    return Projection(weight=base.weight, bias=base.bias, a=down.weight, b=up.weight, scale=float(layer.scaling[name]))


def project(x: Tensor, layers: Sequence[Projection]) -> tuple[list[Tensor], Tensor | None]:
    """Applies layers to one input.

    Args:
        x: `[rows, in]`.
        layers: of equal input width.

    Returns:
        `[rows, out]` for each layer, and LoRA's inner states `[rows, sum of ranks]` that the backward pass wants.
    """
    stacked = _stacked_a(layers)
    inner = None if stacked is None else times_transposed(x, stacked)
    outputs = []
    place = 0
    for layer in layers:
        output = times_transposed(x, _weight(layer))
        if layer.bias is not None:
            output += layer.bias
        if layer.b is not None and inner is not None:
            rank = layer.b.shape[1]
            output.addmm_(inner[:, place : place + rank], layer.b.T, alpha=layer.scale)
            place += rank
        outputs.append(output)
    return outputs, inner


def project_back(
    grads: Sequence[Tensor],
    x: Tensor,
    inner: Tensor | None,
    layers: Sequence[Projection],
    wanted: Sequence[Projection],
    *,
    needs_input: bool,
) -> tuple[Tensor | None, list[Projection]]:
    """Gradients of `project`.

    Args:
        grads: of each output, `[rows, out]`.
        x: the input.
        inner: as `project` returned it.
        layers: as in the forward pass.
        wanted: truth values in place of tensors: which gradients are needed.
        needs_input: whether the gradient of `x` is needed.

    Returns:
        The gradient of `x` (or None), and for each layer its gradients.
    """
    stacked = _stacked_a(layers)
    outer = grad_a = None
    if stacked is not None:
        parts = [times(grad, layer.b).mul_(layer.scale) for grad, layer in zip(grads, layers, strict=True)
                 if layer.b is not None]  # fmt: skip
        outer = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if any(flags.a for flags in wanted):
            grad_a = outer.T @ x
    found = []
    place = 0
    for grad, layer, flags in zip(grads, layers, wanted, strict=True):
        part = slice(place, place + (0 if layer.b is None else layer.b.shape[1]))
        place = part.stop
        found.append(
            Projection(
                weight=grad.T @ x if flags.weight else None,
                bias=grad.sum(0) if flags.bias else None,
                a=grad_a[part] if flags.a and grad_a is not None else None,
                # the narrow matrix first: the same product the other way round is several times slower
                b=(inner[:, part].T @ grad).mul_(layer.scale).T if flags.b and inner is not None else None,
            )
        )
    if not needs_input:
        return None, found
    grad_x = times(grads[0], _weight(layers[0]))
    for grad, layer in zip(grads[1:], layers[1:], strict=True):
        grad_x += times(grad, _weight(layer))
    if outer is not None and stacked is not None:
        grad_x.addmm_(outer, stacked)
    return grad_x, found


def _weight(layer: Projection) -> Tensor:
    return cast("Tensor", layer.weight)


def _stacked_a(layers: Sequence[Projection]) -> Tensor | None:
    """The A matrices of all layers that have one, `[sum of ranks, in]`."""
    parts = [layer.a for layer in layers if layer.a is not None]
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
