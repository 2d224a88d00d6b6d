"""What one forward pass reads: token ids, positions, and which positions are scored.

Targets are chosen here, on the CPU, so that a training step never has to ask the device how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A padded batch (one row an example) or a flat one (one row, examples end to end).

    Attributes:
        input_ids: int64 `[rows, time]`.
        position_ids: int64 `[rows, time]`; restarts at 0 at each segment of a flat batch.
        attention_mask: int64 `[rows, time]`, 1 where a token is real; None for a flat batch, which has no padding.
        segment_lengths: tokens of each segment of a flat batch, in order, or the sizes of each prefix tree; None for a
            padded batch.
        target_rows: int64 `[targets]`, indices into the flattened `[rows * time]` positions whose next token is
            supervised. A segment's first token is never a target.
        target_ids: int64 `[targets]`, the supervised next tokens.
        target_weights: float32 `[targets]`, or None when all weights are 1.
        num_rows: conversations in the batch.
        num_tokens: real tokens, padding left out.
        num_targets: length of `target_rows`, known without a device sync.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segment_lengths: tuple[int | tuple[int, ...], ...] | None
    target_rows: Tensor
    target_ids: Tensor
    target_weights: Tensor | None
    num_rows: int
    num_tokens: int
    num_targets: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
            attention_mask=move(self.attention_mask),
            target_rows=self.target_rows.to(device, non_blocking=non_blocking),
            target_ids=self.target_ids.to(device, non_blocking=non_blocking),
            target_weights=move(self.target_weights),
        )
