"""Supervised fine-tuning on a CPU: ours, `transformers.Trainer` and TRL on the same ids, in one run.

Each run is a process of its own, arms take turns (A B A B), and losses of all arms that see the same rows must agree.

    python benchmarks/sft_cpu.py --quick                       # minutes: one small cell, once
    python benchmarks/sft_cpu.py                               # about half an hour on two quiet cores
    python benchmarks/sft_cpu.py --cells lora-32 --arms ours,batch-1 --repeats 5
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sft.cells import ARMS, CELLS, Arm, Cell, options, write_rows

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "SmolLM2-135M-Instruct"
GRID_ARMS = ("ours", "batch-1", "trl-pack")
"""Arms of the cells beside the headline: the fastest ways of the peers."""


def main() -> int:
    """Runs the benchmark and writes the report."""
    choice = _arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cells: dict[str, Any] = {}
        runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name in choice.cells:
            cell = CELLS[name]
            if choice.rows:
                cell = dataclasses.replace(cell, rows=choice.rows)
            data_dir = Path(folder) / name
            data_dir.mkdir()
            rows = prepare(cell, data_dir, choice.data)
            facts[name] = measure_facts(cell, rows)
            headline = name == choice.cells[0]
            arms = [arm for arm in choice.arms if headline or arm in GRID_ARMS or choice.all_arms]
            runs[name] = {arm: [] for arm in arms}
            for repeat in range(choice.repeats if headline else choice.grid_repeats):
                for arm in arms:
                    spent = (time.monotonic() - started) / 60
                    if spent > choice.minutes and runs[name][arm]:
                        continue
                    print(f"[{spent:5.1f} min] {name} {arm} repeat {repeat + 1}", flush=True)
                    runs[name][arm].append(run(cell, ARMS[arm], rows, data_dir, choice.threads))
        from sft import report

        every = [one for cell in runs.values() for repeats in cell.values() for one in repeats]
        peak = max(one["gemm_peak"] for one in every)
        for name, found in runs.items():
            difference = report.check_losses(found)
            cells[name] = report.summarise(name, found, facts[name], peak) | {"loss_difference": difference}
        result = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "arguments": " ".join(sys.argv[1:]),
            "threads": choice.threads,
            "gemm_peak": peak,
            "machine": report.machine(),
            "cells": cells,
            "slopes": report.slopes(cells),
        }
        text = report.markdown(result)
    print(text)
    if not choice.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{choice.name}.md").write_text(text, encoding="utf-8")
        (RESULTS / f"{choice.name}.json").write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    return 0


def prepare(cell: Cell, data_dir: Path, source: Path) -> list[dict[str, Any]]:
    """Renders the cell's rows with our pipeline; every arm trains on these ids and labels."""
    from llamafactory.compose import load_config
    from llamafactory.data.pipeline import prepare_data
    from llamafactory.train.text import load_text

    write_rows(cell, source, data_dir / "rows.json")
    (data_dir / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")
    cfg = load_config(options(cell, data_dir, data_dir / "out", MODEL), command="train")
    tokenizer, template = load_text(cfg)
    data = prepare_data(cfg.data, template, tokenizer, seed=42, for_training=True, output_dir=None)
    return [{"input_ids": list(map(int, row.input_ids)), "labels": list(map(int, row.labels))} for row in data.train]


def measure_facts(cell: Cell, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens and FLOPs of a cell: real tokens and supervised rows only."""
    from transformers import AutoConfig

    from llamafactory.model.embedded import resolve_model_path
    from llamafactory.model.flops import step_flops

    config = AutoConfig.from_pretrained(resolve_model_path(MODEL))

    def flops(part: list[dict[str, Any]]) -> int:
        lengths = [len(row["input_ids"]) for row in part]
        return step_flops(config, lengths=lengths, num_targets=_supervised(part), full=cell.full) or 0

    first = rows[: cell.step_rows]
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "supervised": _supervised(rows),
        "flops": flops(rows),
        "first_share": _supervised(first) / _supervised(rows),
    }


def run(cell: Cell, arm: Arm, rows: list[dict[str, Any]], data_dir: Path, threads: int) -> dict[str, Any]:
    """Runs one arm in a new process and reads what it wrote."""
    spec = {
        "options": options(cell, data_dir, data_dir / "out", MODEL),
        "arm": dataclasses.asdict(arm),
        "rows": rows,
        "threads": threads,
        "result": str(data_dir / "result.json"),
    }
    (data_dir / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    script = ROOT / "benchmarks" / "sft" / "worker.py"
    threads_set = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, str(script), str(data_dir / "spec.json")],
        env=os.environ | threads_set | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arm.what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads((data_dir / "result.json").read_text(encoding="utf-8"))
    if found["supervised"] not in (None, _supervised(rows)):
        raise SystemExit(f"ours trained {found['supervised']} tokens of {_supervised(rows)}")
    return found | {"comparable": not arm.packing}


def _supervised(rows: list[dict[str, Any]]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=_names(CELLS), default=list(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--arms", type=_names(ARMS), default=list(ARMS), help=f"of {', '.join(ARMS)}; ours first")
    parser.add_argument("--repeats", type=int, default=3, help="of the first cell")
    parser.add_argument("--grid-repeats", type=int, default=1, help="of the other cells")
    parser.add_argument("--all-arms", action="store_true", help="all arms in all cells, not only the fastest peers")
    parser.add_argument("--rows", type=int, help="take this many rows in every cell")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, default=30, help="start no further repeat after this time")
    parser.add_argument("--data", type=Path, default=SOURCE, help="alpaca rows")
    parser.add_argument("--name", default="sft_cpu", help="of the files in benchmarks/results")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="16 rows of the first cell, once, nothing written")
    choice = parser.parse_args()
    if choice.quick:
        choice.cells, choice.repeats, choice.rows, choice.no_write = ["lora-32"], 1, 16, True
    if not choice.data.is_file():
        choice.data = ROOT / "data" / "general_instructions.json"
        print(f"the reference rows are not on this machine: {choice.data.name} instead")
    return choice


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
