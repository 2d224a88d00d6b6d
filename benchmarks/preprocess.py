"""Rows -> token ids and labels: ours against `datasets.map` with one tokenizer call a turn; memory and speed by size.

Both sides read the same file and must give the same ids and labels. Each measurement is a process of its own; what
counts is the CPU time (user and system) of reading, tokenising and keeping, without imports and without loading the
tokenizer.

    python benchmarks/preprocess.py [--rows 10000] [--sizes 1000 10000 100000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CUTOFF_LEN = 2048
SHAPES = {"short": (1, 2, 4), "long": (4, 8, 16)}
"""How many shipped rows a row is joined from: about 100 tokens a row, or about 500."""
SIDES = ("datasets.map", "datasets.map, warm", "ours", "ours, warm")


def write_rows(path: Path, count: int, joined: Sequence[int] = SHAPES["short"]) -> None:
    """Shipped instruction rows, each joined from several and numbered, so that no text occurs twice."""
    source = json.loads((ROOT / "data" / "general_instructions.json").read_text(encoding="utf-8"))
    chooser = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            parts = chooser.sample(source, chooser.choice(joined))
            row = {
                "instruction": f"{number}. " + " ".join(part["instruction"] for part in parts),
                "input": parts[0]["input"],
                "output": "\n\n".join(part["output"] for part in parts) + f" ({number})",
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_tokenizer() -> Any:
    """The default model's tokenizer."""
    from transformers import AutoTokenizer

    from llamafactory.model.embedded import resolve_model_path

    return AutoTokenizer.from_pretrained(resolve_model_path("SmolLM2-135M-Instruct"))


def with_datasets(rows: Path, cache: Path) -> Sequence[dict[str, list[int]]]:
    """The usual way: `datasets` reads the file, and a function calls the tokenizer for each side of a turn."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer()
    start = begin()

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for asked, more, answer in zip(batch["instruction"], batch["input"], batch["output"], strict=True):
            question = asked + "\n" + more if more else asked
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
            answer_ids = tokenizer.encode(f"{answer}<|im_end|>\n", add_special_tokens=False)
            ids = (prompt_ids + answer_ids)[:CUTOFF_LEN]
            out["input_ids"].append(ids)
            out["attention_mask"].append([1] * len(ids))
            out["labels"].append(([-100] * len(prompt_ids) + answer_ids)[:CUTOFF_LEN])
        return out

    data = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
    columns = ["instruction", "input", "output"]
    mapped = data.map(encode, batched=True, remove_columns=columns, new_fingerprint=sha256(b"encode").hexdigest()[:16])
    end(start)
    return mapped


def with_ours(rows: Path, cache: Path) -> Any:
    """This project: `prepare_data`, as training calls it."""
    from llamafactory.data.pipeline import prepare_data
    from llamafactory.data.template_choice import build_template
    from llamafactory.hparams.data import DataConfig

    tokenizer = load_tokenizer()
    template = build_template("chatml", tokenizer)
    data = DataConfig(dataset=(str(rows),), dataset_dir=str(rows.parent), template="chatml", cutoff_len=CUTOFF_LEN)
    start = begin()
    table = prepare_data(data, template, tokenizer, seed=0, cache_dir=cache).train
    end(start)
    return table


measured: dict[str, Any] = {}


def begin() -> tuple[float, float, float]:
    """CPU and wall seconds, and resident MiB, before the work."""
    import psutil

    return time.process_time(), time.perf_counter(), psutil.Process().memory_info().rss / 2**20


def end(start: tuple[float, float, float]) -> None:
    """Note what the work took; the peak of memory is what it added to what imports had taken."""
    import resource

    cpu, wall, before = begin()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured.update(cpu_s=cpu - start[0], wall_s=wall - start[1], added_mib=max(peak - start[2], 0.0), now_mib=before)


def content(examples: Any) -> tuple[str, int]:
    """A digest of all ids and labels, and the number of tokens."""
    import numpy as np

    digest, count = sha256(), 0
    for example in examples:
        ids, labels = (
            (example["input_ids"], example["labels"])
            if isinstance(example, dict)
            else (example.input_ids, example.labels)
        )
        digest.update(np.asarray(ids, dtype=np.int32).tobytes() + np.asarray(labels, dtype=np.int32).tobytes())
        count += len(ids)
    return digest.hexdigest(), count


def child(side: str, rows: Path, cache: Path, is_compared: bool) -> None:
    """One measurement, as a line of JSON."""
    if side == "tenths":
        measured["tenths"] = tenths(rows)
    else:
        examples = (with_datasets if side.startswith("datasets") else with_ours)(rows, cache)
        if is_compared:
            measured["digest"], measured["tokens"] = content(examples)
    print(json.dumps(measured))


def tenths(rows: Path) -> list[float]:
    """CPU seconds of each tenth of the rows, cold: flat if the last row costs what the first one costs."""
    from llamafactory.data import tokenised
    from llamafactory.data.encoded_rows import RowEncoder, open_reader
    from llamafactory.data.registry import find_specs
    from llamafactory.data.template_choice import build_template
    from llamafactory.hparams.data import DataConfig

    tokenizer = load_tokenizer()
    data = DataConfig(dataset=(str(rows),), dataset_dir=str(rows.parent), template="chatml", cutoff_len=CUTOFF_LEN)
    encoder = RowEncoder.from_config(data, "sft", build_template("chatml", tokenizer), tokenizer)
    (spec,) = find_specs(data.dataset, data.dataset_dir)
    reader = open_reader(spec, data, encoder.view, seed=0)
    with rows.open("rb") as stream:
        size = sum(1 for _ in stream) // 10
    chunks: Iterator[Any] = tokenised.row_chunks(reader.rows(), size)
    seconds = []
    start = time.process_time()
    for chunk in chunks:
        for part in tokenised.row_chunks(iter(chunk), tokenised.ROWS_PER_SHARD):
            tokenised.encode_shard(part, reader, encoder)
        seconds.append(time.process_time() - start)
        start = time.process_time()
    return seconds[:10]


def run(side: str, rows: Path, cache: Path, *, is_compared: bool = False) -> dict[str, Any]:
    """Measure in a fresh process, one computing thread."""
    words = [sys.executable, __file__, "--child", side, str(rows), str(cache), str(int(is_compared))]
    quiet = {"LLAMAFACTORY_VERBOSITY": "ERROR", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    one_thread = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    found = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **quiet, **one_thread}
    )
    return json.loads(found.stdout.splitlines()[-1])


def compare(folder: Path, count: int, repeats: int, shape: str) -> dict[str, Any]:
    """Both sides in turns, cold and warm, on the same rows."""
    rows = folder / f"{shape}-{count}.jsonl"
    write_rows(rows, count, SHAPES[shape])
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(repeats):
        for side in SIDES:
            cache = folder / f"{'theirs' if side.startswith('datasets') else 'ours'}-{shape}-{repeat}"
            found[side].append(run(side, rows, cache, is_compared=repeat == 0))
    digests = {values[0]["digest"] for values in found.values()}
    if len(digests) != 1:
        raise SystemExit("the two sides do not give the same ids and labels")
    tokens = found["ours"][0]["tokens"]
    sides = {
        side: {
            "cpu_s": round(statistics.median(value["cpu_s"] for value in values), 3),
            "wall_s": round(statistics.median(value["wall_s"] for value in values), 3),
            "tokens_per_cpu_s": round(tokens / statistics.median(value["cpu_s"] for value in values)),
            "added_mib": round(max(value["added_mib"] for value in values), 1),
        }
        for side, values in found.items()
    }
    return {"shape": shape, "rows": count, "tokens": tokens, "sides": sides}


def scale(folder: Path, count: int) -> dict[str, Any]:
    """Ours at that number of rows: CPU a row, memory, and the rate of the last tenth against the first."""
    rows = folder / f"scale-{count}.jsonl"
    write_rows(rows, count)
    cold, warm = (run("ours", rows, folder / f"scale-{count}") for _ in range(2))
    seconds = run("tenths", rows, folder)["tenths"]
    return {
        "rows": count,
        "cpu_us_per_row": round(1e6 * cold["cpu_s"] / count, 1),
        "added_mib_cold": round(cold["added_mib"], 1),
        "added_mib_warm": round(warm["added_mib"], 1),
        "warm_ms": round(1000 * warm["cpu_s"], 1),
        "last_tenth_rate": round(seconds[0] / seconds[-1], 3),
    }


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Measures, prints tables, and writes them with the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        child(words.child[0], Path(words.child[1]), Path(words.child[2]), words.child[3] == "1")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: metadata.version(name) for name in ("tokenizers", "transformers", "datasets", "numpy")},
            "config": {"template": "chatml", "cutoff_len": CUTOFF_LEN, "workers": 1, "repeats": words.repeats},
        }
        path = RESULTS / f"preprocess-{result['date']}.json"
        result["compare"] = []
        for shape in SHAPES:
            result["compare"].append(compare(Path(folder), words.rows, words.repeats, shape))
            keep(path, result)
            show_sides(result["compare"][-1])
        result["scale"] = []
        for size in words.sizes:
            result["scale"].append(scale(Path(folder), size))
            keep(path, result)
            show_size(result["scale"][-1], has_title=len(result["scale"]) == 1)
    return 0


def show_sides(compared: dict[str, Any]) -> None:
    """Both sides as a table."""
    base = compared["sides"]["datasets.map"]["tokens_per_cpu_s"]
    what = f"{compared['rows']:,} {compared['shape']} rows, {compared['tokens']:,} tokens"
    print(f"{what}; the same ids and labels on all sides")
    print(f"{'':<20}{'CPU s':>9}{'tokens/CPU s':>15}{'ratio':>8}{'MiB added':>11}")
    for side, value in compared["sides"].items():
        rate = value["tokens_per_cpu_s"]
        print(f"{side:<20}{value['cpu_s']:>9.3f}{rate:>15,}{rate / base:>8.1f}{value['added_mib']:>11.0f}")


def show_size(one: dict[str, Any], *, has_title: bool) -> None:
    """A line of the table by sizes."""
    if has_title:
        names = ("ours, rows", "CPU us/row", "MiB cold", "MiB warm", "warm ms", "last/first tenth")
        print("\n" + "".join(f"{name:>{width}}" for name, width in zip(names, (10, 12, 10, 10, 9, 18), strict=True)))
    print(
        f"{one['rows']:>10,}{one['cpu_us_per_row']:>12.1f}{one['added_mib_cold']:>10.1f}"
        f"{one['added_mib_warm']:>10.1f}{one['warm_ms']:>9.1f}{one['last_tenth_rate']:>18.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
