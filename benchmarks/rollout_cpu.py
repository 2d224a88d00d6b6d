"""Batched answers against one `generate` call after the other, and grpo's training phase with and without sharing.

`python benchmarks/rollout_cpu.py [--quick] [--prompts 8 --group 4 --tokens 24 --prompt-tokens 256 ...]` writes
`results/rollout_cpu-DATE.json` and `.md`: CPU time of this process, both sides in one run, in turns, the best of
`--repeats`. It takes about five minutes on two free cores; `--quick`, half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"
MODEL = "SmolLM2-135M-Instruct"
SIZES = {"prompts": 8, "group": 4, "tokens": 24, "prompt-tokens": 256, "answer-tokens": 32, "repeats": 2}


def cpu_seconds(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least CPU time of each side, measured in turns."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.process_time()
            side()
            best[name] = min(best[name], time.process_time() - started)
    return best


def sampling(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    """Answers of the same length to the same prompts."""
    from llamafactory.model.generation import complete
    from llamafactory.model.sampling import Sampling

    rng = np.random.default_rng(0)
    prompts = [rng.integers(100, 40_000, rng.integers(16, 48)).tolist() for _ in range(options.prompts)]
    seeds = [[number] * options.group for number in range(options.prompts)]
    wanted = Sampling(max_new_tokens=options.tokens, stop_ids=frozenset())

    def one_by_one() -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(options.group):
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.tokens, do_sample=True, top_k=0,
                    min_new_tokens=options.tokens, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip

    return cpu_seconds(
        {"batched": lambda: complete(model, prompts, wanted, seeds=seeds, pad_id=0), "sequential": one_by_one},
        options.repeats,
    )


def training(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Forward and backward of one prompt with eight answers, the prompt once or eight times."""
    from types import SimpleNamespace

    from llamafactory.train.experience import Experience, collate_experience
    from llamafactory.train.stage import Models
    from llamafactory.train.stages import grpo

    rng = np.random.default_rng(1)
    count, length = 8, options.answer_tokens
    zeros = np.zeros(count * length, np.float32)
    one = Experience(
        place=0, row=0, prompt=rng.integers(100, 40_000, options.prompt_tokens).astype(np.int32),
        answers=tuple(rng.integers(100, 40_000, length).astype(np.int32) for _ in range(count)),
        sampler=zeros, advantages=np.repeat(rng.normal(size=count), length).astype(np.float32),
        weights=np.ones(count, np.float32),
    )  # fmt: skip
    plan: Any = SimpleNamespace(fused_head=True, loss_chunk_rows=256, fused_blocks=False)
    models = Models(policy=model, plan=plan)
    rules = grpo.Options(reward_functions=("json",), grpo_beta=0.0)

    def step(parts: list[Experience]) -> None:
        for part in parts:
            grpo.loss(models, collate_experience([part], "flat", 0), rules).loss_sum.backward()

    sides = {
        "shared": lambda: step([one]),
        "unshared": lambda: step([one.part(place, place + 1) for place in range(count)]),
    }
    return cpu_seconds(sides, options.repeats)


def main() -> None:
    """Measures, prints and writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llamafactory.model import attention
    from llamafactory.model.adapters import lora
    from llamafactory.model.embedded import resolve_model_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes once: does everything run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the .json and the .md")
    parser.add_argument("--threads", type=int, default=2)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.quick:
        for name in SIZES:
            setattr(options, name.replace("-", "_"), {"repeats": 1, "prompt-tokens": 32}.get(name, 2))
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    path = resolve_model_path(MODEL)
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention.NAME)
    found = {"sampling": sampling(model.eval(), AutoTokenizer.from_pretrained(path), options)}
    policy = lora.apply(model, lora.Options(lora_rank=8), adapters=(), trainable=True)
    found["training"] = training(policy.train(), options)
    document = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "config": {name: getattr(options, name.replace("-", "_")) for name in [*SIZES, "threads"]},
        "seconds": round(time.monotonic() - started),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cpu_seconds": found,
        "times_faster": {
            "sampling": found["sampling"]["sequential"] / found["sampling"]["batched"],
            "training": found["training"]["unshared"] / found["training"]["shared"],
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"rollout_cpu{'-quick' if options.quick else ''}-{document['date']}.json"
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    text = as_markdown(document)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\n{target}")


def as_markdown(document: dict[str, Any]) -> str:
    """Both comparisons as a table."""
    config, cpu = document["config"], document["cpu_seconds"]
    asked = f"{config['prompts']} prompts, {config['group']} answers of {config['tokens']} tokens each"
    step = f"{config['prompt-tokens']} prompt tokens, 8 answers of {config['answer-tokens']}, forward and backward"
    lines = [
        f"# Rollouts and their training on a CPU, {document['date']}",
        "",
        f"{MODEL}, float32, the best of {config['repeats']} in turns; {document['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + f". All of it took {document['seconds']} s. Written by `python benchmarks/rollout_cpu.py`.",
        "",
        "| what | other side | CPU s | ours | CPU s | times as fast |",
        "|---|---|---|---|---|---|",
        f"| sampling: {asked} | one `generate` after the other | {cpu['sampling']['sequential']:.2f} | batched | "
        f"{cpu['sampling']['batched']:.2f} | {document['times_faster']['sampling']:.2f} |",
        f"| grpo step, LoRA: {step} | each answer with its prompt | {cpu['training']['unshared']:.2f} "
        f"| prompt shared | {cpu['training']['shared']:.2f} | {document['times_faster']['training']:.2f} |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
