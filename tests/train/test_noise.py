"""The noise has the paper's size for each sequence's own length, and only in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.train.noise import EmbeddingNoise


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 16)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_noise_fits_each_sequence(layout, make_examples):
    examples = make_examples((50, 8))
    batch = collate_flat(examples) if layout == "flat" else collate_padded(examples, pad_id=0)
    model = Model().train()
    clean = model.embedding(batch.input_ids)
    noise = EmbeddingNoise(model, 5.0)
    noise.expect(batch)
    torch.manual_seed(0)
    change = (model.embedding(batch.input_ids) - clean).abs()
    rows = change[0].split([50, 8]) if layout == "flat" else (change[0, :50], change[1, :8])
    for row, length in zip(rows, (50, 8), strict=True):
        bound = 5.0 / (length * 16) ** 0.5
        assert 0.8 * bound < row.max().item() <= bound * (1 + 1e-5)
        assert row.mean().item() == pytest.approx(bound / 2, rel=0.2)


def test_there_is_no_noise_in_evaluation_or_for_another_shape(make_examples):
    batch = collate_flat(make_examples((20,)))
    model = Model()
    clean = model.embedding(batch.input_ids)
    noise = EmbeddingNoise(model, 5.0)
    noise.expect(batch)
    assert model.eval().embedding(batch.input_ids).equal(clean)
    assert model.train().embedding(batch.input_ids[:, :3]).equal(clean[:, :3])
