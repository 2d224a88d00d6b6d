"""What checkpoints cost: the stall of a save as a share of a step, and the time from a command to its next step.

`python benchmarks/checkpoint_stall.py [--steps N] [--out FILE]` trains the bundled model on the shipped rows with
`save_steps: 1`, LoRA and full, and prints for each: seconds of a step, seconds that training waited in a save (from
the run's own log), their ratio, and the size of a checkpoint. Then it starts a run anew and continues another one,
each in a process of its own, and compares the CPU seconds and the time until the next step is logged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"lora": 0.05, "full": 1.0, "resume": 1.2}
COMMON = [
    "model_name_or_path=SmolLM2-135M-Instruct", "dataset=general_instructions", f"dataset_dir={ROOT / 'data'}",
    "do_train=true", "cutoff_len=512", "logging_steps=1", "max_samples=64", "num_train_epochs=9", "save_total_limit=2",
    "per_device_train_batch_size=8", "learning_rate=1e-5",
]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "llamafactory", "train", *COMMON, *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def stall(method: str, steps: int, folder: Path) -> dict[str, Any]:
    """Trains and reads the stalls out of the log.

    `save_stall` in a row is the time that the saves since the row before have held training up, waiting for an earlier
    save among it. Rates in the log leave saves out, so that a step's time is its own.
    """
    output = folder / method
    process = start([f"finetuning_type={method}", f"max_steps={steps}", "save_steps=1", f"output_dir={output}"])
    _, text = process.communicate()
    if process.returncode:
        raise SystemExit(text[-3000:])
    rows = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row][1:]  # the first step warms up
    seconds = [
        (row["supervised_tokens"] - earlier["supervised_tokens"]) / row["throughput"]
        for earlier, row in zip(rows, rows[1:], strict=False)
    ]
    stalls = [row["save_stall"] for row in rows if "save_stall" in row]
    manifest = json.loads((output / "last" / "MANIFEST.json").read_text())
    step, wait = statistics.median(seconds), statistics.median(stalls)
    return {
        "step_seconds": round(step, 3), "stall_seconds": round(wait, 4), "worst_stall_seconds": max(stalls),
        "stall_per_step": round(wait / step, 4), "limit": LIMITS[method], "saves": len(stalls),
        "checkpoint_mb": round(sum(one["size"] for one in manifest["files"].values()) / 1e6, 1),
    }  # fmt: skip


def until_step(words: list[str], step: int) -> tuple[float, float]:
    """Time and CPU seconds from the command until `step` is logged; the process is then killed."""
    began = time.monotonic()
    process = start(words)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            break
    else:
        raise SystemExit(f"step {step} never came")
    wall = time.monotonic() - began
    process.kill()
    process.stderr.close()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = -9
    return wall, usage.ru_utime + usage.ru_stime


def resume(folder: Path, repeats: int) -> dict[str, Any]:
    """A fresh start and a resume take turns, each up to one step more."""
    words = ["finetuning_type=lora", "save_steps=1", "max_steps=50"]
    made = folder / "made"
    until_step([*words, f"output_dir={made}"], 3)
    found: dict[str, list[tuple[float, float]]] = {"fresh": [], "resumed": []}
    for _ in range(repeats):
        fresh = folder / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        found["fresh"].append(until_step([*words, f"output_dir={fresh}"], 1))
        step = max(int(path.name.split("-")[1]) for path in made.glob("checkpoint-*"))
        found["resumed"].append(until_step([*words, f"output_dir={made}"], step + 1))
    wall = {name: min(one[0] for one in values) for name, values in found.items()}
    cpu = {name: min(one[1] for one in values) for name, values in found.items()}
    return {
        "fresh_seconds": round(wall["fresh"], 2), "resumed_seconds": round(wall["resumed"], 2),
        "ratio": round(wall["resumed"] / wall["fresh"], 3), "cpu_ratio": round(cpu["resumed"] / cpu["fresh"], 3),
        "limit": LIMITS["resume"], "repeats": repeats,
    }  # fmt: skip


def main() -> int:
    """Prints the figures, and writes them with their configuration where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures: dict[str, Any] = {method: stall(method, options.steps, folder) for method in ("lora", "full")}
        figures["resume"] = resume(folder, options.repeats)
    figures["config"] = [word for word in COMMON if not word.startswith("dataset_dir")]
    figures["machine"] = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    print(json.dumps(figures, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
