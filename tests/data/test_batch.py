from __future__ import annotations

import numpy as np
import torch

from llamafactory.data.collate import collate_flat
from llamafactory.data.types import Example


def test_moving_a_batch_moves_every_tensor_and_changes_no_count() -> None:
    ids = np.arange(1, 6, dtype=np.int32)
    batch = collate_flat([Example(input_ids=ids, labels=ids), Example(input_ids=ids[:3], labels=ids[:3])])
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.position_ids, moved.target_rows, moved.target_ids)
    assert all(tensor.device == torch.device("meta") for tensor in tensors)
    assert moved.attention_mask is None
    assert moved.target_weights is None
    assert (moved.num_rows, moved.num_tokens, moved.num_targets) == (2, 8, batch.num_targets)
