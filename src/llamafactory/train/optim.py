"""Optimizers by name; what decays and what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from llamafactory.hparams.train import TrainConfig


def build_optimizer(model: nn.Module, cfg: TrainConfig, *, device: str) -> torch.optim.Optimizer:
    """Builds the optimizer over the trainable parameters.

    Args:
        model: the model whose `requires_grad` parameters are trained.
        cfg: learning rate, betas, decay and `optim`.
        device: torch device type; fused AdamW exists on cpu, cuda and mps.

    Returns:
        An optimizer with two groups: with weight decay, and without (biases and 1-D norm weights).
    """
    groups = _parameter_groups(model, cfg.weight_decay)
    if cfg.optim == "sgd":
        return torch.optim.SGD(groups, lr=cfg.learning_rate)
    if cfg.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=cfg.learning_rate, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(
        groups,
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_epsilon,
        fused=cfg.optim == "adamw_torch_fused" and device in ("cpu", "cuda", "mps"),
    )


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decays: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or name.endswith("bias") else decays).append(parameter)
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
