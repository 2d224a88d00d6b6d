"""Tokens that are counted and reported: real ones only, in both layouts; rates only where they are asked for."""

from __future__ import annotations

import json

import pytest

from llamafactory.data.pipeline import prepare_data
from llamafactory.train import text
from llamafactory.train.tuner import run_exp


def num_tokens_of_rows(cfg):
    """Counted from the rows themselves."""
    tokenizer, template = text.load_text(cfg)
    rows = prepare_data(cfg.data, template, tokenizer, view="sft", seed=text.data_seed(cfg), for_training=True).train
    return int(sum(len(rows[index].input_ids) for index in range(len(rows))))


@pytest.mark.parametrize("attention", ["auto", "disabled"])
def test_tokens_seen_and_rates_leave_padding_out(attention, train_config, tmp_path):
    """Rows of a padded batch differ in length, so that padding would show."""
    cfg = train_config(
        num_train_epochs=2, save_strategy="no", flash_attn=attention, include_num_input_tokens_seen=True,
        include_effective_tokens_per_second=attention == "auto",
    )  # fmt: skip
    result = run_exp(cfg)
    lines = (tmp_path / "out" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    seen = [row["total_tokens"] for row in map(json.loads, lines) if "total_tokens" in row]
    assert seen == sorted(set(seen))
    assert seen[-1] == 2 * num_tokens_of_rows(cfg)
    rate = result.metrics.get("effective_tokens_per_sec")
    if attention == "auto":
        assert rate == pytest.approx(seen[-1] / result.metrics["train_runtime"], rel=1e-3)
    else:
        assert rate is None
