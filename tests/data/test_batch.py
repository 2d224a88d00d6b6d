from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llamafactory.data.collate import collate_flat


def test_moving_a_batch_moves_every_tensor_and_changes_no_count(make_examples: Callable[..., list[Any]]) -> None:
    batch = collate_flat(make_examples([5, 3]))
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.position_ids, moved.target_rows, moved.target_ids)
    assert all(tensor.device == torch.device("meta") for tensor in tensors)
    assert moved.attention_mask is None
    assert moved.target_weights is None
    assert (moved.num_rows, moved.num_tokens, moved.num_targets) == (2, 8, batch.num_targets)
