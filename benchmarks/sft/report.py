"""Figures of the runs -> `results/sft_cpu.md` and `.json`."""

from __future__ import annotations

import math
import os
import platform
import statistics
from typing import Any

import torch

from sft.cells import ARMS, CELLS

TOLERANCE = 1e-3
"""Largest relative difference of a step's loss between arms that see the same rows."""


def figures(run: dict[str, Any], facts: dict[str, Any], peak: float) -> dict[str, float]:
    """Rates of one run, without its first step (allocator, primitive caches), where it has more than one.

    Args:
        run: spans of the steps and the peak RSS.
        facts: of the cell: supervised tokens and FLOPs of all rows, and of the first step.
        peak: best FLOP/s seen by any process of this benchmark.
    """
    spans = run["spans"]
    skip = 1 if len(spans) > 1 else 0
    share = 1.0 if not skip else 1 - facts["first_share"]
    if run["losses"] and not run["comparable"]:
        share = 1 - skip / len(spans)  # packs: equal budgets, other rows
    wall = sum(end[0] - begin[0] for begin, end in spans[skip:])
    cpu = sum(end[1] - begin[1] for begin, end in spans[skip:])
    tokens, flops = facts["supervised"] * share, facts["flops"] * share
    return {
        "tokens_per_second": tokens / wall,
        "cpu_seconds_per_1k": 1000 * cpu / tokens,
        "peak_rss_gb": run["peak_rss"] / 1e9,
        "mfu": flops / wall / peak,
        "seconds": wall,
    }


def summarise(cell: str, runs: dict[str, list[dict[str, Any]]], facts: dict[str, Any], peak: float) -> dict[str, Any]:
    """Median and range of every figure for every arm of a cell."""
    found: dict[str, Any] = {}
    for arm, repeats in runs.items():
        values = [figures(run, facts, peak) for run in repeats]
        found[arm] = {
            name: {
                "median": statistics.median(value[name] for value in values),
                "min": min(value[name] for value in values),
                "max": max(value[name] for value in values),
            }
            for name in values[0]
        } | {"repeats": len(values)}
    return {"config": vars(CELLS[cell]), "facts": facts, "arms": found}


def check_losses(runs: dict[str, list[dict[str, Any]]]) -> float:
    """Largest relative difference to our losses over the arms that see the same rows.

    Raises:
        AssertionError: it is above the tolerance, or an arm took another number of steps.
    """
    worst = 0.0
    reference = runs["ours"][0]["losses"]
    for arm, repeats in runs.items():
        for run in repeats:
            if run["comparable"]:
                if len(run["losses"]) != len(reference):
                    raise AssertionError(f"{arm}: {len(run['losses'])} steps, ours {len(reference)}")
                pairs = zip(reference, run["losses"], strict=True)
                worst = max(worst, *(abs(ours - theirs) / abs(ours) for ours, theirs in pairs))
    if worst > TOLERANCE:
        losses = {arm: repeats[0]["losses"] for arm, repeats in runs.items()}
        raise AssertionError(f"losses differ by {worst:.1e}: {losses}")
    return worst


def slopes(cells: dict[str, Any]) -> dict[str, float]:
    """Log-log exponents of our run: seconds over rows, seconds per token over length, and over the batch."""

    def per_token(name: str) -> float:
        return 1 / cells[name]["arms"]["ours"]["tokens_per_second"]["median"] * _rho(cells[name])

    found = {}
    for name, factor, what in (
        ("rows-x10", 10, "seconds over rows"),
        ("sequence-x4", 4, "seconds per token over sequence length"),
        ("batch-x4", 4, "seconds per token over batch size"),
    ):
        if name in cells and "lora-32" in cells:
            ratio = per_token(name) / per_token("lora-32")
            found[what] = round(math.log(ratio) / math.log(factor) + (1.0 if name == "rows-x10" else 0.0), 3)
    return found


def _rho(cell: dict[str, Any]) -> float:
    """Supervised share of the tokens, to turn rates of supervised tokens into rates of tokens."""
    return cell["facts"]["supervised"] / cell["facts"]["tokens"]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    from llamafactory.extras.hardware import read_hardware
    from llamafactory.train.report import package_versions

    versions = package_versions()
    try:
        import trl

        versions["trl"] = trl.__version__
    except ImportError:
        versions["trl"] = "not installed"
    return {
        "hardware": str(read_hardware(use_cpu=True)),
        "system": platform.platform(),
        "torch_build": next((line.strip(" -") for line in torch.__config__.show().splitlines() if "MKL" in line), ""),
        "load_at_end": os.getloadavg()[0],
        "versions": versions,
    }


def markdown(result: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Supervised fine-tuning on a CPU",
        "",
        f"`python benchmarks/sft_cpu.py {result['arguments']}`, {result['date']}, {result['threads']} threads, fp32, "
        f"SmolLM2-135M-Instruct. Peak of a plain matrix product (MKL or oneDNN, the better): "
        f"{result['gemm_peak'] / 1e9:.0f} GFLOP/s. Each run is a process of its own; arms take turns; the first step "
        "is not counted. Median (range) of the repeats. Load average at the end: "
        f"{result['machine']['load_at_end']:.1f}.",
    ]
    for name, cell in result["cells"].items():
        facts = cell["facts"]
        lines += ["", f"## {name}", ""]
        lines.append(
            f"{facts['rows']} rows, {facts['tokens']} tokens, {facts['supervised']} supervised; "
            f"{'full fine-tuning' if cell['config']['full'] else 'LoRA r=8 on all linear layers'}; "
            f"{cell['config']['step_rows']} rows a step; largest difference of losses {cell['loss_difference']:.1e}."
        )
        lines += ["", "| arm | supervised tokens/s | ours is | CPU s / 1k tokens | peak RSS GB | MFU | repeats |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        ours = cell["arms"]["ours"]["tokens_per_second"]["median"]
        for arm, values in cell["arms"].items():
            rate = values["tokens_per_second"]
            lines.append(
                f"| {ARMS[arm].what} | {rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f}) "
                f"| {ours / rate['median']:.2f}x | {values['cpu_seconds_per_1k']['median']:.2f} "
                f"| {values['peak_rss_gb']['median']:.2f} | {values['mfu']['median']:.2f} | {values['repeats']} |"
            )
    if result["slopes"]:
        lines += ["", "## Slopes (log-log exponents, ours)", ""]
        lines += [f"- {what}: {slope}" for what, slope in result["slopes"].items()]
    lines += [
        "",
        "## Machine and versions",
        "",
        f"{result['machine']['hardware']}, {result['machine']['system']}.",
        "",
    ]
    lines.append(", ".join(f"{name} {version}" for name, version in result["machine"]["versions"].items()) + ".")
    return "\n".join([*lines, ""])
