"""A reference of 4 or 8 bits: near the plain one, on its own in the cache, and the run goes on after a stop.

These tests need bitsandbytes, which the development environment is without: peft imports it wherever it is installed,
which costs every process seconds. CI installs it for them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamafactory.model.patches.bitsandbytes_cpu import import_bitsandbytes
from llamafactory.model.quantised import quantised_bytes

if import_bitsandbytes() is None:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

from llamafactory.model.reference import Reference
from llamafactory.train import companions
from llamafactory.train.tuner import run_exp

TOLERANCE = {4: 0.05, 8: 0.002}
"""Nats a token, on average, that the tiny model's log-probabilities may move by; measured: 0.015 and 0.0003."""


@pytest.fixture
def options(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("LLAMAFACTORY_REFERENCE_CACHE", str(tmp_path / "kept"))
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [
        {"conversations": [{"from": "human", "value": f"Say {number}."}],
         "chosen": {"from": "gpt", "value": f"number {number} " * (1 + number % 3)},
         "rejected": {"from": "gpt", "value": "no"}}
        for number in range(8)
    ]  # fmt: skip
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": entry}))
    return {
        "stage": "dpo", "dataset_dir": str(folder), "dataset": "pairs", "ref_model": str(tiny_model_dir),
        "learning_rate": 1e-3, "overwrite_output_dir": True,
    }  # fmt: skip


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> list[Reference]:
    """Every reference that was loaded."""
    found: list[Reference] = []
    original = companions._own_model, companions._quantised_model
    for place, name in enumerate(("_own_model", "_quantised_model")):

        def load(*args: Any, place: int = place) -> Reference:
            found.append(original[place](*args))
            return found[-1]

        monkeypatch.setattr(companions, name, load)
    return found


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]


def kept(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "kept").glob("*.logps"))


def logps_of(reference: Reference) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    with reference.of(torch.nn.Identity()) as model:
        logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_is_near_the_plain_one_and_has_its_own_file(
    train_config: Callable[..., Any], options: dict[str, Any], references: list[Reference], tmp_path: Path, bits: int
) -> None:
    run_exp(train_config(**options))
    plain = kept(tmp_path)
    run_exp(train_config(**options, ref_model_quantization_bit=bits))
    rows = log_of(tmp_path / "out")
    assert len(kept(tmp_path)) == 2 * len(plain) == 2
    own, quantised = references
    assert (own.bits, quantised.bits) == (None, bits)
    assert next(row["loss"] for row in rows if "loss" in row) > 0
    gap = (logps_of(quantised) - logps_of(own)).abs()
    assert 0 < gap.mean() < TOLERANCE[bits]
    names = [digest(quantised) for _ in range(2)]
    assert names[0] == names[1] != digest(own)  # also after forward passes
    run_exp(train_config(**options, ref_model_quantization_bit=bits))  # finds its numbers, and compares them
    assert len(kept(tmp_path)) == 2
    again = log_of(tmp_path / "out")
    assert [row.get("loss") for row in again] == [row.get("loss") for row in rows]


def digest(reference: Reference) -> str:
    return reference.digest(torch.nn.Identity())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_plan_counts_its_bytes(
    train_config: Callable[..., Any], options: dict[str, Any], references: list[Reference], bits: int
) -> None:
    from transformers import AutoConfig

    run_exp(train_config(**options, ref_model_quantization_bit=bits, max_steps=1))
    model: Any = references[0].model
    tied = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    forecast = quantised_bytes(AutoConfig.from_pretrained(options["ref_model"]), bits=bits, element=4)
    assert forecast == pytest.approx(sum(tied.values()), rel=0.01)


def test_a_run_goes_on_with_the_same_numbers(
    train_config: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"ref_model_quantization_bit": 4, "cache_reference": False, "max_steps": 4, "save_steps": 2,
                "lr_scheduler_type": "constant"}  # fmt: skip
    run_exp(train_config(**options, output_dir=str(tmp_path / "whole")))
    whole = [row["loss"] for row in log_of(tmp_path / "whole") if "loss" in row]
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    run_exp(train_config(**options, output_dir=str(tmp_path / "parts"), resume_from_checkpoint=checkpoint))
    rows = [row["loss"] for row in log_of(tmp_path / "parts") if "loss" in row]
    assert len(whole) == 4
    assert rows[-2:] == whole[-2:]


def test_an_adapter_lies_beside_the_quantised_weights_and_names_another_reference(
    train_config: Callable[..., Any], options: dict[str, Any], references: list[Reference], tmp_path: Path
) -> None:
    run_exp(train_config(**(options | {"learning_rate": 0.02}), output_dir=str(tmp_path / "adapter")))
    options |= {"ref_model_adapters": str(tmp_path / "adapter"), "max_steps": 1}
    run_exp(train_config(**options))
    run_exp(train_config(**options, ref_model_quantization_bit=4))
    del options["ref_model_adapters"]
    run_exp(train_config(**options, ref_model_quantization_bit=4))
    _, own, adapted, bare = references
    assert digest(adapted) != digest(bare)
    near, far = ((logps_of(one) - logps_of(own)).abs().mean() for one in (adapted, bare))
    assert near < far


def test_four_bits_compute_in_the_dtype_asked_for(
    train_config: Callable[..., Any], options: dict[str, Any], references: list[Reference]
) -> None:
    run_exp(train_config(**options, ref_model_quantization_bit=4, max_steps=1))
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model: Any = copy.deepcopy(references[0].model)
    layer = model.model.layers[0].mlp.up_proj
    states = torch.randn(7, layer.in_features)
    torch.testing.assert_close(layer(states), states @ dequantize_bnb_weight(layer.weight).T, atol=1e-5, rtol=1e-5)
