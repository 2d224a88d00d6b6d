"""What DeepSpeed itself makes of a few steps: started by torchrun from `test_zero.py`, never imported.

`python deepspeed_reference.py REQUEST.json`, where the request holds `model` (a folder), `config` (DeepSpeed's),
`learning_rate`, `epsilon`, `micro_batches` (of each process in a step), `steps` (for each a list of rows, each
`[input_ids, labels]`) and `out`. Writes `OUT/losses.json` and `OUT/model.safetensors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed  # pyright: ignore[reportMissingImports]
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Trains, and writes what came out."""
    request = json.loads(Path(sys.argv[1]).read_text())
    deepspeed.init_distributed("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=request["learning_rate"], eps=request["epsilon"], weight_decay=0.0
    )
    total = len(request["steps"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (total - step) / total)
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=request["config"]
    )
    losses = []
    micro = request["micro_batches"]
    for rows in request["steps"]:
        targets = sum(label != -100 for _, labels in rows for label in labels[1:])
        mine = rows[rank::world]
        size = len(mine) // micro
        sums = torch.zeros(())
        for at in range(micro):
            loss = sum(loss_of(engine, row) for row in mine[at * size : (at + 1) * size])
            engine.backward(loss * world * micro / targets)  # averaged over processes and micro-batches
            engine.step()
            sums += loss.detach()
        torch.distributed.all_reduce(sums)
        losses.append(float(sums) / targets)
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=request["config"]["zero_optimization"]["stage"] == 3):
        state = {name: parameter.detach().clone().contiguous() for name, parameter in model.named_parameters()}
    if rank == 0:
        out = Path(request["out"])
        out.mkdir(parents=True)
        save_file(state, out / "model.safetensors")
        (out / "losses.json").write_text(json.dumps({"losses": losses, "version": deepspeed.__version__}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def loss_of(engine: torch.nn.Module, row: tuple[list[int], list[int]]) -> torch.Tensor:
    """The sum of the losses of a row's supervised tokens."""
    ids, labels = (torch.tensor([part]) for part in row)
    logits = engine(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


if __name__ == "__main__":
    main()
