"""The profiler writes a trace and says in words where the time went."""

from __future__ import annotations

import json
import re

import pytest

from llamafactory.train.profile import OTHER, PARTS, SUMMARY, part_of, summary_lines
from llamafactory.train.tuner import run_exp


@pytest.mark.parametrize(
    ("operator", "part"),
    [("aten::mm", "matrix products"), ("mkldnn::_linear_pointwise", "matrix products"),
     ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::mul", "element-wise and other"),
     ("aten::copy_", "copies"), ("aten::_fused_adamw_", "optimizer"), ("gloo:all_reduce", "between processes"),
     ("aten::item", "waiting for the device")],
)  # fmt: skip
def test_each_operator_has_its_part(operator, part):
    assert part_of(operator).name == part


def test_the_summary_counts_everything_once_and_names_the_largest_first():
    lines = summary_lines({"aten::mm": 6.0, "aten::mul": 3.0, "aten::copy_": 1.0, "aten::item": 0.001}, "CPU")
    assert lines[0] == "where the time went (10.00 s of CPU time):"
    assert [line.split()[0] for line in lines[1:]] == ["60%", "30%", "10%"]
    assert "matrix products (mm)" in lines[1]


def test_a_run_leaves_a_trace_and_the_summary(train_config, tmp_path):
    run_exp(train_config(enable_torch_profiler=True, max_steps=3, save_strategy="no", profiler_with_stack=False))
    folder = tmp_path / "out" / "profiler" / "rank_0"
    trace = json.loads(next(folder.glob("trace_*.json")).read_text(encoding="utf-8"))
    assert trace["traceEvents"]
    head, *parts = (folder / SUMMARY).read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"where the time went \(\d+\.\d\d s of CPU time\):", head)
    shares = [int(part.split("%")[0]) for part in parts]
    assert shares == sorted(shares, reverse=True)
    assert 90 <= sum(shares) <= 105  # parts below 1 % are left out, and shares are rounded
    advice = {part.name: part.advice for part in (*PARTS, OTHER)}
    said = {part.split("%")[1].split(" (")[0].strip(): part for part in parts}
    assert said.keys() <= advice.keys()
    assert "matrix products" in said
    assert all(text.endswith(f": {advice[name]}") for name, text in said.items())


def test_a_run_that_is_too_short_says_so(train_config, tmp_path, caplog, capsys):
    run_exp(train_config(enable_torch_profiler=True, max_steps=1, save_strategy="no"))
    assert not (tmp_path / "out" / "profiler" / "rank_0" / SUMMARY).exists()
    assert "there is no profile" in capsys.readouterr().err + caplog.text
