"""Every stage on two processes is every stage on one: same curves, same evaluation, same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from safetensors.torch import load_file

from llamafactory.compose import load_config
from llamafactory.launcher import find_free_port
from llamafactory.train.tuner import run_exp

pytestmark = pytest.mark.long

PAIRS: dict[str, Any] = {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
         "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}}  # fmt: skip
JUDGED = {"file_name": "judged.json", "formatting": "sharegpt",
          "columns": {"messages": "conversations", "kto_tag": "label"}}  # fmt: skip
SAMPLED: dict[str, Any] = {"dataset": "asked", "max_new_tokens": 5, "learning_rate": 1e-3}
EVEN = """
def even(completion_ids):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""
STAGES = {
    "dpo": {"stage": "dpo", "dataset": "pairs"},
    "dpo kto_pair": {"stage": "dpo", "dataset": "pairs", "pref_loss": "kto_pair"},
    "kto": {"stage": "kto", "dataset": "judged"},
    "rm": {"stage": "rm", "dataset": "pairs"},
    "rm of both": {"stage": "rm", "dataset": "pairs_with_margins,scored", "learning_rate": 1e-3},
    "dpo kept": {"stage": "dpo", "dataset": "pairs", "cache_reference": True, "overwrite_cache": True},
    "pt": {"stage": "pt", "dataset": "text"},
    "grpo": {"stage": "grpo", "num_generations": 4, "grpo_epochs": 2, **SAMPLED},
    "ppo": {"stage": "ppo", "ppo_epochs": 2, "ppo_whiten_rewards": True, "ppo_score_norm": True, **SAMPLED},
}
CURVES = (
    "loss",
    "rewards/margins",
    "kl",
    "accuracy",
    "reward",
    "entropy",
    "value_loss",
    "ratio",
    "logp_gap/p95",
    "mse",
)
LAUNCH = """
import json, sys
from llamafactory.compose import load_config
from llamafactory.train.tuner import run_exp
for options in json.load(open(sys.argv[1])):
    assert run_exp(load_config(options)).exit_code == 0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
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
    scored = [row | {"score": number / 4 - 1} for number, row in enumerate(judged[:6])]
    with_margins = [row | {"margin": number / 4} for number, row in enumerate(pairs[:7])]
    named = {"pairs": pairs, "judged": judged, "text": text, "scored": scored, "pairs_with_margins": with_margins}
    for name, rows in named.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "rewards.py").write_text(EVEN)
    (folder / "asked.json").write_text(json.dumps([{"instruction": ask[0]["value"], "output": ""} for ask in asked]))
    entries = {
        "pairs": PAIRS, "judged": JUDGED, "text": {"file_name": "text.json", "columns": {"prompt": "text"}},
        "scored": {"file_name": "scored.json", "formatting": "sharegpt",
                   "columns": {"messages": "conversations", "score": "score"}},
        "pairs_with_margins": PAIRS | {"file_name": "pairs_with_margins.json",
                                       "columns": PAIRS["columns"] | {"margin": "margin"}},
        "asked": {"file_name": "asked.json", "columns": {"prompt": "instruction"}},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


def options(model, data, name, ranks):
    rewards = {"reward_functions": [f"{data}/rewards.py:even"]} if name in ("grpo", "ppo") else {}
    return {
        "model_name_or_path": str(model), "dataset_dir": str(data), "template": "chatml", "do_train": True,
        "output_dir": str(data / f"{name} {ranks}"), "logging_steps": 1, "use_cpu": True, "cutoff_len": 64,
        "per_device_train_batch_size": 4 // ranks, "num_train_epochs": 1, "learning_rate": 1e-2, "val_size": 3,
        "save_strategy": "no", "overwrite_output_dir": True, **STAGES[name], **rewards,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_model_dir, data, repo_dir):
    """Folder of the stages' runs: on one rank in this process, on two in one launch for all stages."""
    for name in STAGES:
        assert run_exp(load_config(options(tiny_model_dir, data, name, 1))).exit_code == 0
    runs = [options(tiny_model_dir, data, name, 2) for name in STAGES]
    (data / "runs.json").write_text(json.dumps(runs))
    (data / "launch.py").write_text(LAUNCH)
    port = find_free_port()
    with (data / "errors.txt").open("w") as errors:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(data / "launch.py"), str(data / "runs.json")],
                stdout=subprocess.DEVNULL, stderr=errors, cwd=repo_dir,
                env=os.environ | {"PYTHONPATH": str(repo_dir / "src"), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
                                  "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            )
            for rank in (0, 1)
        ]  # fmt: skip
        try:
            codes = [process.wait(timeout=600) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    assert codes == [0, 0], (data / "errors.txt").read_text()[-5000:]
    return data


def read(folder):
    """Curves, final results and weights of a run."""
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    curves = {key: [row[key] for row in rows if key in row] for key in CURVES}
    results = json.loads((folder / "all_results.json").read_text())
    return curves, results, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_equal_one(name, runs):
    curves, results, weights = read(runs / f"{name} 1")
    curves_two, results_two, weights_two = read(runs / f"{name} 2")
    passes = 2 if name in ("grpo", "ppo") else 1
    assert len(curves["loss"]) == 3 * passes or name == "pt"  # 10 rows, 4 a step: the last window holds 2
    for key, values in curves.items():
        assert curves_two[key] == pytest.approx(values, rel=1e-4, abs=1e-5), key
    for key in (key for key in results if key.startswith("eval_") and "second" not in key and "time" not in key):
        assert results_two[key] == pytest.approx(results[key], rel=1e-4, abs=1e-5), key
    assert weights_two.keys() == weights.keys()
    for tensor, weight in weights.items():
        assert (weights_two[tensor] - weight).abs().max() <= 1e-3 * weight.abs().max() + 1e-6
    if name == "pt":
        assert results["eval_perplexity"] > 1
