"""Keys that a user set and that the plan of this run makes no use of: each is a warning that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan


def idle_keys(cfg: RunConfig, plan: ModelPlan) -> list[str]:
    """One sentence for each key without effect under this plan."""
    found: list[str] = []
    if cfg.model.use_reentrant_gc and not plan.checkpoint_every:
        found.append("use_reentrant_gc has no effect: the plan keeps all activations (see checkpoint_every above)")
    if cfg.train.compiles and not plan.compiled_blocks:
        found.append(
            "torch_compile has no effect: blocks run through the fused CPU functions, which torch cannot compile; "
            "fused_kernels: false runs and compiles the model's own"
        )
    if cfg.train.loss_chunk_size is not None and not plan.fused_head:
        found.append(
            "loss_chunk_size has no effect on the cross-entropy: the head of this model type is not known, so the "
            "model makes all logits itself"
        )
    return found
