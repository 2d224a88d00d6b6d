"""One run of one arm in a process of its own: `python worker.py SPEC.json`. Writes the figures where SPEC says."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Moment = tuple[float, float]


def now() -> Moment:
    """Wall-clock and CPU seconds."""
    return time.perf_counter(), time.process_time()


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """The real command's function; a probe around the loop's step reads the clocks."""
    from llamafactory import run_exp
    from llamafactory.train import loop

    spans: list[tuple[Moment, Moment]] = []
    step = loop._Run.train_step

    def timed(self: Any) -> None:
        begin = now()
        step(self)
        spans.append((begin, now()))

    loop._Run.train_step = timed  # type: ignore[method-assign]
    run_exp(spec["options"])
    folder = Path(spec["options"]["output_dir"])
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    return {"spans": spans, "losses": [row["loss"] for row in rows], "supervised": rows[-1]["supervised_tokens"]}


def run_peer(spec: dict[str, Any]) -> dict[str, Any]:
    """`transformers.Trainer` or TRL's `SFTTrainer` on the ids that our pipeline made."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

    from llamafactory.model.embedded import resolve_model_path

    config, arm, rows = spec["options"], spec["arm"], spec["rows"]
    path = resolve_model_path(config["model_name_or_path"])
    set_seed(42)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation="sdpa")
    if config["finetuning_type"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0,
                                                 target_modules="all-linear"))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(path)
    spans: list[tuple[Moment, Moment]] = []
    losses: list[float] = []

    class Probe(TrainerCallback):
        """Reads the clocks around each optimizer step, and the logged loss."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begin = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spans.append((self.begin, now()))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    bin_rows = max(1, round(config["cutoff_len"] / (sum(len(row["input_ids"]) for row in rows) / len(rows))))
    micro = bin_rows if arm["packing"] else arm["micro"]
    common = {
        "output_dir": config["output_dir"],
        "per_device_train_batch_size": 1 if arm["packing"] else min(micro, config["per_device_train_batch_size"]),
        "gradient_accumulation_steps": max(1, config["per_device_train_batch_size"] // micro),
        "num_train_epochs": 1,
        "learning_rate": config["learning_rate"],
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": arm["checkpointing"],
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    from datasets import Dataset

    data = Dataset.from_list(rows)
    if arm["trainer"] == "trl":
        from trl import SFTConfig, SFTTrainer

        args: Any = SFTConfig(**common, packing=arm["packing"], max_length=config["cutoff_len"])
        trainer: Any = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer,
                                  callbacks=[Probe()])  # fmt: skip
    else:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        args = TrainingArguments(**common, remove_unused_columns=True)
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[Probe()])
    trainer.train()
    return {"spans": spans, "losses": losses, "supervised": None}


def main() -> int:
    """Runs the arm of the given spec."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(spec["threads"])
    found = run_ours(spec) if spec["arm"]["trainer"] == "ours" else run_peer(spec)
    from sft.peak import gemm_peak

    found["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["gemm_peak"] = gemm_peak()
    found["load"] = os.getloadavg()[0]
    Path(spec["result"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
