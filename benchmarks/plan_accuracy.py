"""Memory forecast against the measured peak. `python benchmarks/plan_accuracy.py [--only N] [--threads T]`.

Each configuration trains the bundled model for two steps in its own process. The forecast is the one that this run
made before it loaded any weights; the peak is what the system reports for the whole process when it has ended.
Writes benchmarks/results/plan_accuracy.md and .json after each configuration; one that is measured again takes the
place of its old figures. `python scripts/plan_page.py` then brings them into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 0.15
COMMON = {
    "model_name_or_path": "SmolLM2-135M-Instruct", "stage": "sft", "do_train": True, "use_cpu": True, "max_steps": 2,
    "dataset": "rows", "template": "auto", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    "overwrite_output_dir": True,
}  # fmt: skip
ON, OFF = False, True  # disable_gradient_checkpointing
CONFIGS: list[dict[str, Any]] = [
    {"finetuning_type": "lora", "cutoff_len": 128, "per_device_train_batch_size": 1},
    {"finetuning_type": "full", "cutoff_len": 128, "per_device_train_batch_size": 1},
    {"finetuning_type": "lora", "cutoff_len": 512, "per_device_train_batch_size": 1},
    {"finetuning_type": "full", "cutoff_len": 256, "per_device_train_batch_size": 2},
    {"finetuning_type": "lora", "cutoff_len": 512, "per_device_train_batch_size": 1,
     "disable_gradient_checkpointing": ON},
    {"finetuning_type": "full", "cutoff_len": 512, "per_device_train_batch_size": 1,
     "disable_gradient_checkpointing": ON},
    {"finetuning_type": "lora", "cutoff_len": 256, "per_device_train_batch_size": 4},
    {"finetuning_type": "lora", "cutoff_len": 1024, "per_device_train_batch_size": 1},
    {"finetuning_type": "lora", "cutoff_len": 256, "per_device_train_batch_size": 2, "flash_attn": "disabled"},
    {"finetuning_type": "lora", "cutoff_len": 256, "per_device_train_batch_size": 2, "lora_rank": 64,
     "lora_dropout": 0.1},
    {"finetuning_type": "full", "cutoff_len": 128, "per_device_train_batch_size": 2, "save_strategy": "steps",
     "save_steps": 1},
    {"finetuning_type": "full", "cutoff_len": 512, "per_device_train_batch_size": 1},
    {"stage": "dpo", "dataset": "pairs", "finetuning_type": "lora", "cutoff_len": 256,
     "per_device_train_batch_size": 2},
    {"stage": "dpo", "dataset": "pairs", "finetuning_type": "full", "cutoff_len": 128,
     "per_device_train_batch_size": 1},
    {"stage": "rm", "dataset": "pairs", "finetuning_type": "lora", "cutoff_len": 256,
     "per_device_train_batch_size": 2},
    {"stage": "grpo", "finetuning_type": "lora", "cutoff_len": 64, "per_device_train_batch_size": 2,
     "num_generations": 16, "max_new_tokens": 16, "reward_functions": "length:32"},
]  # fmt: skip

WATCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""A small process between us and the run: Linux counts the peak of the process that calls exec, before it does, as
the new program's own, so that a run started from a large process would seem at least as large as that."""


def write_rows(folder: Path, num_rows: int = 48, words: int = 2200) -> None:
    """Rows longer than every cutoff_len, so that each row has exactly that many tokens; and pairs of such answers."""
    rows = [
        {"instruction": f"Count from {n}.", "input": "", "output": " ".join(str(n + k) for k in range(words))}
        for n in range(num_rows)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    pairs = [
        {"instruction": row["instruction"], "input": "", "chosen": row["output"], "rejected": row["output"][::-1]}
        for row in rows
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    entries = {
        "rows": {"file_name": "rows.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")


def measure(config: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """Trains in a process of its own.

    Returns:
        The configuration, forecast and measured peak in bytes, and their relative difference.
    """
    output = folder / "out"
    options = COMMON | {"dataset_dir": str(folder), "output_dir": str(output)} | config
    words = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WATCHER, sys.executable, "-m", "llamafactory", "train", *words]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{config} ended with {child.returncode}:\n{child.stderr[-2000:]}")
    plan = json.loads((output / "run.json").read_text(encoding="utf-8"))["plan"]
    measured = int(child.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    forecast = plan["costs"]["memory"]["total"]
    return {
        "config": config,
        "forecast": forecast,
        "measured": measured,
        "error": forecast / measured - 1,
        "parts": plan["costs"]["memory"],
        "checkpoint_every": plan["checkpoint_every"],
    }


def render(rows: list[dict[str, Any]], threads: int) -> str:
    """The table as Markdown."""
    lines = [
        "# Memory forecast against measured peak",
        "",
        f"`python benchmarks/plan_accuracy.py`; SmolLM2-135M-Instruct, float32, CPU, {threads} thread(s), 2 steps;",
        f"peak resident memory of the process; Python {platform.python_version()}, {platform.machine()}.",
        "",
        "| method | cutoff_len | batch | recomputed | more | forecast GB | measured GB | difference |",
        "|---|---:|---:|---|---|---:|---:|---:|",
    ]
    shown = {"finetuning_type", "cutoff_len", "per_device_train_batch_size", "disable_gradient_checkpointing"}
    for row in rows:
        config = row["config"]
        more = ", ".join(f"{key} {value}" for key, value in config.items() if key not in shown)
        blocks = {0: "no", 1: "every block"}.get(row["checkpoint_every"], f"one of {row['checkpoint_every']}")
        lines.append(
            f"| {config['finetuning_type']} | {config['cutoff_len']} | {config['per_device_train_batch_size']} | "
            f"{blocks} | {more} | {row['forecast'] / 1e9:.2f} | {row['measured'] / 1e9:.2f} | {row['error']:+.1%} |"
        )
    worst = max(abs(row["error"]) for row in rows)
    within = sum(abs(row["error"]) <= LIMIT for row in rows)
    lines += ["", f"{within} of {len(rows)} within {LIMIT:.0%}; the largest difference is {worst:.1%}.", ""]
    return "\n".join(lines)


def write_results(row: dict[str, Any], threads: int) -> None:
    """Puts a measured configuration among the results, in the order of `CONFIGS`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "plan_accuracy.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    known = {json.dumps(old["config"]): old for old in [*rows, row]}
    rows = [known[json.dumps(config)] for config in CONFIGS if json.dumps(config) in known]
    file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "plan_accuracy.md").write_text(render(rows, threads), encoding="utf-8")


def main() -> int:
    """Measures every configuration, prints each as it is done, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for number, config in enumerate(CONFIGS):
        if arguments.only is not None and number not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as name:
            write_rows(Path(name))
            row = measure(config, Path(name), arguments.threads)
        rows.append(row)
        write_results(row, arguments.threads)
        figures = f"{row['forecast'] / 1e9:.2f} GB forecast, {row['measured'] / 1e9:.2f} measured, {row['error']:+.1%}"
        print(f"{number}. {config}: {figures}", flush=True)
    print(f"results: {RESULTS / 'plan_accuracy.md'}")
    return 0 if all(abs(row["error"]) <= LIMIT for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
