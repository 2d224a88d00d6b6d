"""Every stage on two processes is every stage on one, and goes on bit by bit after a stop."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.long

PAIRS = {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
         "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}}  # fmt: skip
JUDGED = {"file_name": "judged.json", "formatting": "sharegpt",
          "columns": {"messages": "conversations", "kto_tag": "label"}}  # fmt: skip
STAGES = {
    "dpo": ["--stage", "dpo", "--dataset", "pairs"],
    "dpo kto_pair": ["--stage", "dpo", "--dataset", "pairs", "--pref_loss", "kto_pair"],
    "kto": ["--stage", "kto", "--dataset", "judged"],
    "rm": ["--stage", "rm", "--dataset", "pairs"],
    "pt": ["--stage", "pt", "--dataset", "text"],
}


@pytest.fixture
def data(tmp_path):
    said = [f"number {number} " * (1 + number % 4) for number in range(13)]
    asked = [[{"from": "human", "value": f"Say {number}."}] for number in range(13)]
    pairs = [
        {"conversations": ask, "chosen": {"from": "gpt", "value": text}, "rejected": {"from": "gpt", "value": "no"}}
        for ask, text in zip(asked, said, strict=True)
    ]
    judged = [
        {"conversations": [*ask, {"from": "gpt", "value": text}], "label": number % 3 != 1}
        for number, (ask, text) in enumerate(zip(asked, said, strict=True))
    ]
    text = [{"text": line * 8} for line in said]
    for name, rows in (("pairs", pairs), ("judged", judged), ("text", text)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    entries = {"pairs": PAIRS, "judged": JUDGED, "text": {"file_name": "text.json", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_equal_one(name, cli, tiny_model_dir, data):
    found = {}
    for ranks in (1, 2):
        folder = data / f"ranks {ranks}"
        done = cli(
            "train", "--model_name_or_path", str(tiny_model_dir), "--dataset_dir", str(data), "--template", "chatml",
            "--do_train", "--output_dir", str(folder), "--logging_steps", "1", "--use_cpu", "--cutoff_len", "64",
            "--per_device_train_batch_size", str(4 // ranks), "--num_train_epochs", "2", "--learning_rate", "1e-2",
            "--val_size", "3", *STAGES[name],
            env={"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        results = json.loads((folder / "all_results.json").read_text())
        shown = {
            key: [row[key] for row in rows if key in row] for key in ("loss", "rewards/margins", "kl", "accuracy")
        }
        found[ranks] = shown, results, load_file(folder / "adapter_model.safetensors")
    for key, values in found[1][0].items():
        assert found[2][0][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key
    for key in (key for key in found[1][1] if key.startswith("eval_") and "second" not in key and "time" not in key):
        assert found[2][1][key] == pytest.approx(found[1][1][key], rel=1e-4, abs=1e-5), key
    for tensor, weight in found[1][2].items():
        assert (found[2][2][tensor] - weight).abs().max() <= 1e-3 * weight.abs().max() + 1e-6
    if name == "pt":
        assert found[1][1]["eval_perplexity"] > 1
