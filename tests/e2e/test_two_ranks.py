"""Two processes train as one does: same loss at every step, same weights at the end."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file


def test_two_ranks_equal_one(cli, tiny_model_dir, tmp_path):
    rows = [
        {"instruction": f"Say {number}.", "output": f"number {number} " * (1 + number % 4)} for number in range(13)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / f"ranks {ranks}"
        done = cli(
            "train", "--model_name_or_path", str(tiny_model_dir), "--dataset", "rows", "--dataset_dir", str(tmp_path),
            "--template", "chatml", "--do_train", "--output_dir", str(folder), "--logging_steps", "1", "--use_cpu",
            "--per_device_train_batch_size", str(4 // ranks), "--num_train_epochs", "2", "--learning_rate", "1e-2",
            "--val_size", "3",
            env={"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        results = json.loads((folder / "all_results.json").read_text())
        losses = [row["loss"] for row in log if "loss" in row]
        found[ranks] = losses, results["eval_loss"], load_file(folder / "adapter_model.safetensors")
    assert len(found[1][0]) == 6  # 10 rows, 4 a step: the last window of an epoch holds 2
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[2][1] == pytest.approx(found[1][1], rel=1e-5)
    for name, weight in found[1][2].items():
        assert (found[2][2][name] - weight).abs().max() <= 1e-4 * weight.abs().max() + 1e-6
