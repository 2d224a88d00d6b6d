"""The grid: which rows, which method, how they are batched; and the arms that run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORA_RATE, FULL_RATE = 2e-4, 1e-5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One workload.

    Attributes:
        rows: rows of the data file.
        joined: rows that are joined into one, for longer sequences.
        step_rows: rows of an optimizer step.
        full: full fine-tuning, else LoRA.
        cutoff: longest row, in tokens.
    """

    rows: int = 32
    joined: int = 1
    step_rows: int = 8
    full: bool = False
    cutoff: int = 1024


CELLS: Mapping[str, Cell] = {
    "lora-32": Cell(),
    "lora-64": Cell(rows=64),
    "full-32": Cell(full=True),
    "sequence-x4": Cell(joined=4, step_rows=2, cutoff=4096),
    "batch-x4": Cell(step_rows=32, rows=64),
    "rows-x10": Cell(rows=320),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run a cell.

    Attributes:
        what: for the report.
        trainer: `ours`, `transformers` or `trl`.
        micro: rows of a forward pass (peers).
        checkpointing: recompute activations.
        packing: TRL's best-fit bins of the cutoff's length; other rows share a step, so losses are not compared.
    """

    what: str
    trainer: str
    micro: int = 1
    checkpointing: bool = False
    packing: bool = False


ARMS: Mapping[str, Arm] = {
    "ours": Arm(what="llamafactory-cli train, defaults", trainer="ours"),
    "padded-4-ckpt": Arm(what="Trainer, padded batch 4, checkpointing", trainer="transformers", micro=4,
                         checkpointing=True),
    "padded-4": Arm(what="Trainer, padded batch 4", trainer="transformers", micro=4),
    "batch-1": Arm(what="Trainer, batch 1 (no padding)", trainer="transformers"),
    "trl-1": Arm(what="TRL SFTTrainer, fp32, batch 1, no checkpointing", trainer="trl"),
    "trl-pack": Arm(what="TRL SFTTrainer, fp32, packing, no checkpointing", trainer="trl", packing=True),
}  # fmt: skip


def write_rows(cell: Cell, source: Path, target: Path) -> None:
    """Writes a cell's rows as alpaca JSON."""
    rows = json.loads(source.read_text(encoding="utf-8"))[: cell.rows]
    groups = [rows[start : start + cell.joined] for start in range(0, len(rows), cell.joined)]
    joined = [
        {key: "\n\n".join(str(row.get(key) or "") for row in group) for key in ("instruction", "input", "output")}
        for group in groups
    ]
    target.write_text(json.dumps(joined), encoding="utf-8")


def options(cell: Cell, data_dir: Path, output_dir: Path, model: str) -> dict[str, Any]:
    """Our configuration of a cell; the peers get the same numbers."""
    return {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full" if cell.full else "lora",
        **({} if cell.full else {"lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}),
        "dataset": "rows",
        "dataset_dir": str(data_dir),
        "template": "auto",
        "cutoff_len": cell.cutoff,
        "disable_shuffling": True,
        "per_device_train_batch_size": cell.step_rows,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": FULL_RATE if cell.full else LORA_RATE,
        "lr_scheduler_type": "constant",
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
