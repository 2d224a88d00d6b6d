"""The command `plan`: tables and JSON without weights, and a refusal with ways out that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamafactory import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A folder that holds the config of an 8B-parameter model, and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json",):
        (folder / name).write_text((ROOT / "examples/plan/llama_8b" / name).read_text())
    return folder


def document(capsys: Any, *words: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["plan", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_large_model_without_weights(config_only, capsys):
    words = [f"model_name_or_path={config_only}", "bf16=true", "cutoff_len=4096", "--device", "h100-80g"]
    code, found = document(capsys, *words)
    assert code == 0
    costs = found["plan"]["costs"]
    assert costs["count"]["base"] == 8_030_261_248
    assert costs["count"]["trained"] == 20_971_520
    assert costs["fits"]
    assert costs["memory"]["weights"] == pytest.approx(16.1e9, rel=0.02)
    assert sum(size for name, size in costs["memory"].items() if name != "total") == costs["memory"]["total"]
    assert "cutoff_len" in costs["source"]
    assert costs["work"]["step_seconds"] > 0


def test_a_doomed_run_is_refused_with_ways_out_that_fit(config_only, capsys):
    words = [f"model_name_or_path={config_only}", "bf16=true", "finetuning_type=full", "--device=rtx4090-24g"]
    code, found = document(capsys, *words)
    assert code == 2
    assert not found["plan"]["costs"]["fits"]
    ways = found["ways_out"]
    assert 1 <= len(ways) <= 3
    assert ways[0]["changes"]["finetuning_type"] == "lora"
    for way in ways:
        assert way["fits"]
        keys = [f"{key}={','.join(x) if isinstance(x, list) else x}" for key, x in way["changes"].items()]
        again, changed = document(capsys, *words, *keys)
        assert again == 0
        assert changed["plan"]["costs"]["memory"]["total"] == pytest.approx(way["total"], rel=0.01)


def test_the_table_is_plain_and_at_most_100_wide(config_only, capsys):
    assert cli.main(["plan", f"model_name_or_path={config_only}", "bf16=true", "--device=l4"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    for word in ("Parameters", "q_proj", "Memory", "activations", "Decisions", "checkpoint_every", "The run fits."):
        assert word in shown


def test_rows_are_read_where_that_is_quick(train_config, capsys):
    cfg = train_config()
    words = [f"{key}={getattr(section, key)}" for section, key in (
        (cfg.model, "model_name_or_path"), (cfg.data, "dataset_dir"), (cfg.data, "cutoff_len"))]  # fmt: skip
    code, found = document(capsys, *words, "dataset=rows", "template=chatml", "--device=cpu-16g")
    assert code == 0
    assert found["plan"]["costs"]["source"].startswith("20 rows, ")
    assert found["plan"]["costs"]["work"]["step_seconds"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device=h1000"], "unknown device"), (["--device"], "has no value"), (["--num-devices=0"], "not a count"),
     (["cutof_len=3"], "cutoff_len")],
)  # fmt: skip
def test_mistakes_are_named(config_only, capsys, words, message):
    assert cli.main(["plan", f"model_name_or_path={config_only}", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_mixture_of_experts_is_planned(capsys):
    folder = ROOT / "examples/plan/qwen3_moe_30b"
    code, found = document(
        capsys, f"model_name_or_path={folder}", "bf16=true", "lora_target=q_proj,v_proj", "--device=h100-80g"
    )
    assert code == 0
    assert found["plan"]["costs"]["count"]["base"] == 30_532_122_624
    dense = 2 * 30.5e9 * 8 * 2048 * 2  # what a step would do if every expert saw every token
    assert found["plan"]["costs"]["work"]["step_flops"] < 0.3 * dense
