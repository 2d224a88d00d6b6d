"""Any process of any number of processes reads exactly its part of what a checkpoint holds."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from llamafactory.model.shards import local_part, read_whole, shard_sizes
from llamafactory.train.checkpoint.shards import OPTIMIZER_SHARDS, read_optimizer_shards, spread

SHAPES = {"0": (7, 3), "1": (1,), "2": (4, 2), "3": (5,)}


@pytest.fixture
def saved(tmp_path):
    """Moments of four parameters, written as the only process of a run does."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{index}.exp_avg": torch.randn(shape, generator=generator) for index, shape in SHAPES.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = HuggingFaceStorageWriter(str(tmp_path / OPTIMIZER_SHARDS), save_distributed=True)
        save(dict(tensors), storage_writer=writer, no_dist=True)
    return tmp_path, tensors


def as_rank(rank, count, work):
    """`work()` in a process that believes to be one of `count`; it may call no operator on a DTensor, as torch keeps
    the results' layout for the first rank that asks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        return work()
    finally:
        dist.destroy_process_group()


def sharded_optimizer(count):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (count,))
    whole = [torch.zeros(shape) for shape in SHAPES.values()]
    parameters = [distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) for one in whole]
    return torch.optim.SGD(parameters, lr=1.0)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("source", ["shards", "whole tensors"])
def test_the_parts_of_all_ranks_are_the_whole(saved, count, source):
    folder, tensors = saved
    parts = {name: [] for name in tensors}
    for rank in range(count):

        def read(rank=rank):
            optimizer = sharded_optimizer(count)
            found = spread(tensors, optimizer) if source != "shards" else read_optimizer_shards(folder, optimizer)
            return {name: local_part(tensor).clone() for name, tensor in found.items()}

        for name, part in as_rank(rank, count, read).items():
            parts[name].append(part)
    for name, whole in tensors.items():
        assert torch.equal(torch.cat(parts[name]), whole)


def test_one_process_reads_the_whole(saved):
    folder, tensors = saved
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()], lr=1.0)
    for found in (read_whole(folder / OPTIMIZER_SHARDS), read_optimizer_shards(folder, plain)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], whole) for name, whole in tensors.items())
    assert shard_sizes(folder / OPTIMIZER_SHARDS)["0.exp_avg"] == ((7, 3), torch.float32)


def test_nothing_in_a_folder_of_shards_is_a_pickle(saved):
    folder, _ = saved
    assert {path.suffix for path in (folder / OPTIMIZER_SHARDS).iterdir()} == {".safetensors"}
