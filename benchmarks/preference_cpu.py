"""Preference training on a CPU, this project beside others: CPU seconds a step and peak memory.

`python benchmarks/preference_cpu.py [--quick] [--shapes heavy,balanced] [--arms ...] [--pairs 2] [--steps 2]
[--repeats 2]` writes `results/preference_cpu-DATE.json` and `.md`. It takes about ten minutes on two free cores;
`--quick` takes one.

DPO with LoRA (rank 8 on all linear layers) on SmolLM2-135M-Instruct against TRL's DPOTrainer (no gradient
checkpointing, no dropout, one pair a pass, padding to the longest), and a reward model against a value head on a full
causal model. Each arm runs in a process of its own; arms take turns; the first step is not counted. `dpo-own` and
`rm-own` are ours through the model's own forward (`fused_kernels: false`), and run only where `--arms` names them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

SHAPES = {"heavy": (384, 96, 64), "balanced": (128, 128, 96), "light": (64, 256, 200), "smoke": (24, 8, 8)}
"""Tokens of prompt, chosen and rejected answer."""
ARMS = ("dpo-ours", "dpo-trl", "rm-ours", "rm-causal")
WORDS = (" the", " cat", " dog")
MODEL = "SmolLM2-135M-Instruct"


RATIOS = {"dpo": ("dpo-trl", "dpo-ours"), "rm": ("rm-causal", "rm-ours")}
"""What is compared: the other side, and ours."""


def main() -> int:
    """Runs the arms in turn, prints a table and writes it with all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes once: does everything run?")
    parser.add_argument("--shapes", default="heavy,balanced")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--pairs", type=int, default=2, help="pairs of an optimizer step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the .json and the .md")
    parser.add_argument("--arm", help="run this arm alone, in this process")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.pairs, options.steps, options.repeats = "smoke", 1, 1, 1
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.shapes, options.pairs, options.steps, options.threads)))
        return 0
    started = time.monotonic()
    shapes = [measure_shape(shape, options) for shape in options.shapes.split(",")]
    document = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        "config": {"model": MODEL, "pairs": options.pairs, "steps": options.steps, "repeats": options.repeats,
                   "threads": options.threads, "lora_rank": 8, "dtype": "float32"},
        "seconds": round(time.monotonic() - started),
        "shapes": shapes,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"preference_cpu{'-quick' if options.quick else ''}-{document['date']}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    text = as_markdown(document)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\n{path}")
    return 0


def measure_shape(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All arms on pairs of one shape, in turns."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms.split(",")}
    for _ in range(options.repeats):
        for arm in found:
            found[arm].append(run_child(arm, shape, options))
    arms: dict[str, dict[str, Any]] = {
        arm: {
            "cpu_s": min(value["cpu"] for value in values),
            "cpu_s_all": [value["cpu"] for value in values],
            "wall_s": min(value["wall"] for value in values),
            "peak_mib": statistics.median(value["peak"] for value in values),
            "loss": values[0]["loss"],
        }
        for arm, values in found.items()
    }
    ratios = {
        name: {
            "times_faster": arms[other]["cpu_s"] / arms[ours]["cpu_s"],
            "memory": arms[ours]["peak_mib"] / arms[other]["peak_mib"],
        }
        for name, (other, ours) in RATIOS.items()
        if other in arms and ours in arms
    }
    return {"shape": shape, "tokens": SHAPES[shape], "arms": arms, "ratios": ratios}


def as_markdown(document: dict[str, Any]) -> str:
    """A table of each shape."""
    config = document["config"]
    lines = [
        f"# Preference training on a CPU, {document['date']}",
        "",
        f"{MODEL}, LoRA rank 8, float32, {config['pairs']} pairs a step, {config['steps']} steps after the first, "
        f"the best of {config['repeats']}; {document['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + f". All of it took {document['seconds']} s. Written by `python benchmarks/preference_cpu.py`.",
    ]
    for one in document["shapes"]:
        prompt, chosen, rejected = one["tokens"]
        lines += [
            "", f"## {one['shape']}: {prompt} prompt tokens, {chosen} chosen, {rejected} rejected", "",
            "| side | CPU s a step | wall s a step | peak MiB | loss |", "|---|---|---|---|---|",
            *(
                f"| {arm} | {value['cpu_s']:.2f} | {value['wall_s']:.2f} | {value['peak_mib']:.0f} "
                f"| {value['loss']:.4f} |"
                for arm, value in one["arms"].items()
            ),
            "",
            *(
                f"{name}: {value['times_faster']:.2f} times as fast, {value['memory']:.2f} of the peak memory."
                for name, value in one["ratios"].items()
            ),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def run_child(arm: str, shape: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs one arm in a process of its own."""
    words = ["--arm", arm, "--shapes", shape, "--pairs", str(options.pairs), "--steps", str(options.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words, "--threads", str(options.threads)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_arm(arm: str, shape: str, pairs: int, steps: int, threads: int) -> dict[str, float]:
    """Measures one arm: CPU and wall seconds of a step, peak MiB of the process, and the last loss."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = Clock(steps)
    runs = {
        "dpo-ours": dpo_ours, "dpo-trl": dpo_trl, "rm-ours": rm_ours, "rm-causal": rm_causal,
        "dpo-own": partial(dpo_ours, is_fused=False), "rm-own": partial(rm_ours, is_fused=False),
    }  # fmt: skip
    loss = runs[arm](SHAPES[shape], pairs, steps, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu": clock.cpu / steps, "wall": clock.wall / steps, "peak": peak, "loss": loss}


class Clock:
    """Seconds between the end of the first step and the end of the last one."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done = steps, 0
        self.cpu = self.wall = 0.0

    def tick(self) -> None:
        """One step is done."""
        if self._done == 0:
            self._start = time.process_time(), time.monotonic()
        self._done += 1
        if self._done == self._steps + 1:
            self.cpu, self.wall = time.process_time() - self._start[0], time.monotonic() - self._start[1]


def texts(sizes: tuple[int, int, int]) -> tuple[str, str, str]:
    """A prompt and two answers, one token a word."""
    prompt, chosen, rejected = (word * size for word, size in zip(WORDS, sizes, strict=True))
    return prompt, chosen, rejected


def groups(sizes: tuple[int, int, int], pairs: int, tokenizer: Any) -> list[Any]:
    """The same pairs as rows of this project, with the end token that TRL adds."""
    import numpy as np

    from llamafactory.data.answer_batch import AnswerGroup
    from llamafactory.data.types import IGNORE_INDEX, Example

    prompt, *answers = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts(sizes))
    examples = []
    for answer in answers:
        own = [*answer, tokenizer.eos_token_id]
        ids = np.array([*prompt, *own], dtype=np.int32)
        labels = np.array([*[IGNORE_INDEX] * len(prompt), *own], dtype=np.int32)
        examples.append(Example(input_ids=ids, labels=labels))
    return [AnswerGroup(answers=tuple(examples))] * pairs


def ours(
    stage: Any, options: Any, sizes: tuple[int, int, int], pairs: int, steps: int, clock: Clock, is_fused: bool
) -> float:
    """A stage of this project, one pair a pass as its plan on a CPU has it."""
    from types import SimpleNamespace

    from llamafactory.hparams.model import ModelConfig
    from llamafactory.model.adapters import lora
    from llamafactory.model.loader import load_model, load_tokenizer
    from llamafactory.model.reference import Reference
    from llamafactory.model.valuehead import add_value_head
    from llamafactory.train.rows import ROWS
    from llamafactory.train.stage import Models

    config = ModelConfig(model_name_or_path=MODEL)
    tokenizer = load_tokenizer(config)
    base = load_model(config, dtype="float32", attention="segments")
    policy = lora.apply(base, lora.Options(lora_rank=8), adapters=(), trainable=True).train()
    if stage.has_value_head:
        policy = add_value_head(policy)
    plan: Any = SimpleNamespace(fused_head=True, loss_chunk_rows=256, fused_blocks=is_fused)
    models = Models(policy=policy, plan=plan, reference=Reference())
    batches = [ROWS[stage.view].collate([row], "flat", 0) for row in groups(sizes, pairs, tokenizer)]

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = stage.loss(models, batch, options).loss_sum / pairs
            loss.backward()
            total += float(loss.detach())
        return total

    return loop(policy, step, steps, clock)


def loop(policy: Any, step: Callable[[], float], steps: int, clock: Clock) -> float:
    """Optimizer steps over the trainable parameters."""
    import torch

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=True)
    loss = 0.0
    for _ in range(steps + 1):
        loss = step()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick()
    return loss


def dpo_ours(sizes: tuple[int, int, int], pairs: int, steps: int, clock: Clock, is_fused: bool = True) -> float:
    """Prompt shared, reference by adapter-off, head on supervised rows."""
    from llamafactory.train.stages import dpo

    return ours(dpo.STAGE, dpo.Options(), sizes, pairs, steps, clock, is_fused)


def rm_ours(sizes: tuple[int, int, int], pairs: int, steps: int, clock: Clock, is_fused: bool = True) -> float:
    """Prompt shared, no language-model head."""
    from llamafactory.train.stages import rm

    return ours(rm.STAGE, rm.Options(), sizes, pairs, steps, clock, is_fused)


def dpo_trl(sizes: tuple[int, int, int], pairs: int, steps: int, clock: Clock) -> float:
    """TRL's trainer at its best settings for a CPU."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from llamafactory.model.embedded import resolve_model_path

    path = resolve_model_path(MODEL)
    prompt, chosen, rejected = texts(sizes)
    count = pairs * (steps + 1)
    rows = Dataset.from_dict({"prompt": [prompt] * count, "chosen": [chosen] * count, "rejected": [rejected] * count})

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=pairs, max_steps=steps + 1,
            learning_rate=5e-5, gradient_checkpointing=False, use_cpu=True, bf16=False, logging_steps=steps + 1,
            save_strategy="no", report_to="none", max_length=None, disable_dropout=True, dataloader_pin_memory=False,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"), args=settings, train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(path), callbacks=[Tick()],
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        return float(trainer.train().training_loss)


def rm_causal(sizes: tuple[int, int, int], pairs: int, steps: int, clock: Clock) -> float:
    """A padded pair through the whole causal model, its logits unused, and a value head on its last hidden states."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llamafactory.data.answer_batch import collate_answers
    from llamafactory.model.embedded import resolve_model_path

    path = resolve_model_path(MODEL)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    policy = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    policy.add_module("value_head", torch.nn.Linear(model.config.hidden_size, 1))
    rows = groups(sizes, pairs, AutoTokenizer.from_pretrained(path))
    batches = [collate_answers([row], "padded", 0) for row in rows]

    def step() -> float:
        total = 0.0
        for batch in batches:
            output = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
            states = output.hidden_states[-1].flatten(0, 1).index_select(0, batch.last_rows)
            chosen, rejected = policy.value_head(states).squeeze(-1)
            loss = -F.logsigmoid(chosen - rejected) / pairs
            loss.backward()
            total += float(loss.detach())
        return total

    return loop(policy, step, steps, clock)


if __name__ == "__main__":
    sys.exit(main())
