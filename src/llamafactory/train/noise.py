"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llamafactory.data.batch import Batch


class EmbeddingNoise:
    """Adds `alpha / sqrt(length x width)` times uniform noise in [-1, 1] to a model's input embeddings.

    The length is that of a token's own sequence, also where sequences lie end to end. There is no noise outside of
    training mode, so that evaluation and a reference that lives in the policy see none. The noise comes from torch's
    generator, which checkpoints restore.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        """Hooks the embedding module of `model`."""
        self._alpha = alpha
        self._lengths: Tensor | None = None
        model.get_input_embeddings().register_forward_hook(self._add)

    def expect(self, batch: Batch) -> None:
        """Says which batch comes next."""
        if batch.segment_lengths is None:
            counts = torch.as_tensor(batch.attention_mask).sum(dim=1, keepdim=True)
            self._lengths = counts.expand(batch.input_ids.shape).float()
            return
        sizes = [length if isinstance(length, int) else sum(length) for length in batch.segment_lengths]
        tokens = torch.tensor(sizes).repeat_interleave(torch.tensor(sizes))
        self._lengths = tokens[None].to(batch.input_ids.device).float()

    def _add(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        lengths = self._lengths
        if not module.training or lengths is None or lengths.shape != output.shape[:2]:
            return output
        scale = self._alpha / (lengths * output.shape[-1]).sqrt()
        return output + (torch.rand_like(output) * 2 - 1) * scale.unsqueeze(-1).to(output.dtype)
