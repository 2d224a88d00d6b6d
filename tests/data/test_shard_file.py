from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamafactory.data.shard_file import DamagedShardError, read_shard, write_shard
from llamafactory.data.table import Shard, ShardBuilder
from llamafactory.data.types import Example


def shard(*, is_weighted: bool = False) -> Shard:
    builder = ShardBuilder()
    for number in range(5):
        ids = np.arange(number + 1, dtype=np.int32)
        weights = np.full(len(ids), 0.5, np.float32) if is_weighted else None
        builder.add([Example(input_ids=ids, labels=ids, weights=weights, num_cut=number)], flag=number % 2)
    return builder.build()


@pytest.mark.parametrize("is_weighted", [False, True])
def test_what_is_written_is_read_and_others_can_read_it_too(tmp_path: Path, is_weighted: bool) -> None:
    from safetensors.numpy import load_file

    path = tmp_path / "0.safetensors"
    written = shard(is_weighted=is_weighted)
    write_shard(path, written, {"rows": 5, "text": "ünïcode"})
    read, record = read_shard(path)
    assert record == {"rows": 5, "text": "ünïcode"}
    arrays = load_file(path)
    for name in ("tokens", "example_ends", "cuts", "group_ends", "flags", *(("weights",) if is_weighted else ())):
        assert getattr(read, name).tolist() == getattr(written, name).tolist() == arrays[name].tolist()
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert (read.weights is None) is not is_weighted
    assert [file.name for file in tmp_path.iterdir()] == ["0.safetensors"]


def test_a_shard_without_examples_is_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "0", ShardBuilder().build(), {})
    assert len(read_shard(tmp_path / "0")[0].tokens) == 0


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    write_shard(path, shard(), {"rows": 5})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            read, record = read_shard(path)
        except DamagedShardError:
            continue
        # the only bytes that mean nothing are the blanks with which the header is filled up
        assert (record, read.tokens.tolist()) == ({"rows": 5}, shard().tokens.tolist())
        assert whole[place : place + 1] in b" :,"
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedShardError):
            read_shard(path, is_checked=False)
    path.unlink()
    with pytest.raises(DamagedShardError):
        read_shard(path)
