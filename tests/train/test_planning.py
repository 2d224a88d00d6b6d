"""What a stage asks of the machine is in its plan: real batches are the oracle for its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamafactory.compose import load_config
from llamafactory.data.mix import Mix, mix_rows
from llamafactory.data.table import ExampleTable, ShardBuilder, table_of
from llamafactory.data.types import IGNORE_INDEX, Example
from llamafactory.extras.errors import ConfigError
from llamafactory.extras.hardware import Hardware
from llamafactory.model.workload import tokens_of
from llamafactory.train.build import build_feed, build_schedule_of_rows
from llamafactory.train.demands import demands_of
from llamafactory.train.experience import micro_batches
from llamafactory.train.planning import planner
from llamafactory.train.stage import load_stage
from llamafactory.train.workload import RowSizes, assumed_rows, workload_of_rows

GIB = 2**30


def machine(device: str = "cpu") -> Hardware:
    return Hardware(
        device=device, name=device, num_devices=1, memory_bytes=64 * GIB, cpu_threads=2, ram_bytes=64 * GIB,
        ram_available_bytes=64 * GIB, has_bf16=True,
    )  # fmt: skip


def settings(tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    options: dict[str, Any] = {
        "model_name_or_path": str(tmp_path), "dataset": "rows", "dataset_dir": str(tmp_path), "template": "chatml",
        "do_train": True, "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "cutoff_len": 64,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    if changes.get("stage") in ("ppo", "grpo"):
        options |= {"reward_functions": "length:8", "max_new_tokens": 16}
    return load_config(options | changes, command="train")


def groups_of(count: int, answers: int, seed: int = 0) -> ExampleTable:
    """Groups of sequences that begin with the same 3 to 20 tokens."""
    rng, builder = np.random.default_rng(seed), ShardBuilder()
    for _ in range(count):
        prompt = rng.integers(1, 90, size=rng.integers(3, 21))
        group: list[Example] = []
        for number in range(answers):
            own = np.concatenate([[90 + number], rng.integers(1, 90, size=rng.integers(2, 30))])
            ids = np.concatenate([prompt, own]).astype(np.int32)
            labels = np.where(np.arange(len(ids)) < len(prompt), IGNORE_INDEX, ids).astype(np.int32)
            group.append(Example(input_ids=ids, labels=labels))
        builder.add(group, flag=1)
    return table_of([builder.build()])


@pytest.mark.parametrize(("stage", "answers"), [("dpo", 2), ("rm", 2), ("kto", 1), ("sft", 1)])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_planned_batch_is_the_largest_that_the_feed_makes(tmp_path, tiny_config, stage, answers, layout):
    cfg = settings(tmp_path, stage=stage, flash_attn="auto" if layout == "flat" else "disabled")
    table, view = groups_of(41, answers), load_stage(stage).view
    plan = planner(tiny_config(), machine(), table, num_devices=1)(cfg)
    assert plan.layout == layout
    plan = replace(plan, micro_batch_tokens=150 if layout == "flat" else None)
    feed = build_feed(cfg, plan, table, view=view, pad_id=0, num_ranks=1, training=True, is_quiet=True)
    windows = [feed.window(step, 0) for step in range(feed.schedule.windows_per_epoch)]
    batches = [batch for window in windows for batch in window.batches]
    rows = RowSizes.of(table, view).cut(cfg.data.cutoff_len)
    schedule = build_schedule_of_rows(cfg, rows, is_whole=stage != "sft", num_ranks=1, training=True)
    workload = workload_of_rows(rows, replace(schedule, is_padded=layout == "padded"), cfg.train)
    found = workload.largest(plan.micro_batch_tokens)
    assert found.num_micro_batches == max(len(window.batches) for window in windows)
    assert workload.tokens == pytest.approx(sum(batch.num_tokens for batch in batches) / len(windows))
    if layout == "flat":
        most = max(batch.num_tokens for batch in batches)
        # a pass over judged answers is filled by those and by mismatched ones, whose lengths the plan does not look up
        assert sum(map(tokens_of, found.lengths)) == (pytest.approx(most, rel=0.15) if stage == "kto" else most)
        shapes = [batch.segment_lengths for batch in batches if batch.num_tokens == sum(map(tokens_of, found.lengths))]
        if stage != "kto":  # whose single answers share a prefix with nobody, whatever its length
            assert tuple(found.lengths) in [tuple(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"stage": "sft"}, ("none", False, True, 0)), ({"stage": "dpo"}, ("base", False, True, 1)),
     ({"stage": "dpo", "finetuning_type": "full"}, ("copy", False, True, 1)),
     ({"stage": "dpo", "pref_loss": "orpo"}, ("none", False, True, 0)),
     ({"stage": "dpo", "pref_loss": "kto_pair"}, ("base", False, True, 2)),
     ({"stage": "kto"}, ("base", False, True, 3)), ({"stage": "rm"}, ("none", True, False, 0)),
     ({"stage": "grpo"}, ("base", False, True, 1)),
     ({"stage": "grpo", "grpo_variant": "dapo"}, ("none", False, True, 0)),
     ({"stage": "ppo", "ppo_epochs": 3}, ("base", True, True, 1))],
)  # fmt: skip
def test_demands_of_the_stages(tmp_path, options, expected):
    cfg = settings(tmp_path, **options)
    found = demands_of(cfg, assumed_rows(cfg, load_stage(cfg.train.stage).view, 1))
    assert (found.reference, found.has_value_head, found.makes_logits, found.passes) == expected


def test_a_second_model_a_value_head_and_a_missing_head_are_in_the_memory(tmp_path, tiny_config):
    config = tiny_config(vocab_size=3000, tie_word_embeddings=True)

    def costs(**options: Any) -> Any:
        table = groups_of(24, 2)
        found = planner(config, machine(), table, num_devices=1)(settings(tmp_path, **options)).costs
        assert found is not None
        return found

    lora, full = costs(stage="dpo"), costs(stage="dpo", finetuning_type="full")
    assert lora.memory.reference == 0
    assert full.memory.reference == 4 * full.count.base == full.memory.weights - full.count.buffer_bytes
    scored = costs(stage="rm")
    assert scored.memory.logits == 0 < lora.memory.logits
    assert scored.count.trained == lora.count.trained + config.hidden_size + 1
    alone = costs(stage="dpo", pref_loss="simpo")
    assert alone.work.step_flops < 0.8 * lora.work.step_flops  # no forward pass of the reference


@pytest.mark.parametrize("packs", [True, False])
def test_a_row_that_only_later_epochs_draw_bounds_a_pass_too(tmp_path, tiny_config, packs):
    builder = ShardBuilder()
    for size in [10] * 4 + [10] * 39 + [52]:
        ids = np.ones(size, dtype=np.int32)
        builder.add([Example(input_ids=ids, labels=ids)], flag=1)
    table = table_of([builder.build()])
    mix = Mix(names=("a", "b"), sizes=(4, 40), probs=None, seed=1, strategy="interleave_under")
    assert 43 not in mix_rows(mix, 0)  # the first epoch leaves the long row out
    plan = planner(tiny_config(), machine(), table, num_devices=1, mix=mix)
    options = {"micro_batch_tokens": 51, "packing": packs, "cutoff_len": 59}
    assert plan(settings(tmp_path, **options, num_train_epochs=1)).micro_batch_tokens == 51
    with pytest.raises(ConfigError, match=f"the longest {'packed bin' if packs else 'row'} has 52 tokens"):
        plan(settings(tmp_path, **options, num_train_epochs=2))
    assert plan(settings(tmp_path, **options | {"micro_batch_tokens": 52})).micro_batch_tokens == 52


def test_sampled_answers_have_their_cache_tokens_and_time(tmp_path, tiny_config):
    table = groups_of(12, 1)

    def costs(**options: Any) -> Any:
        cfg = settings(tmp_path, stage="grpo", num_generations=4, **options)
        found = planner(tiny_config(), machine(), table, num_devices=1, rate=1e9)(cfg).costs
        assert found is not None
        return found

    short, long = costs(), costs(max_new_tokens=4000, rollout_batch_size=32)
    prompt = max(len(example) for example in table)
    assert long.memory.cache == 2 * 2 * 2 * 8 * 4 * 32 * (prompt + 4000 + 128)  # k, v; layers, heads, size, bytes
    assert short.memory.cache < long.memory.cache
    assert 0 < short.work.sampling_flops < short.work.step_flops
    assert long.work.step_seconds > short.work.step_seconds
    assert long.disk.checkpoint > short.disk.checkpoint
    assert "every answer is assumed to reach max_new_tokens (4,000)" in long.source


@pytest.mark.parametrize("limit", [None, 60, 150, 1000])
def test_the_planned_pass_over_answers_is_the_trainers_own(tmp_path, tiny_config, limit):
    from llamafactory.train.workload import workload_of_prompts

    cfg = settings(tmp_path, stage="grpo", num_generations=4, rollout_batch_size=6)
    rows = RowSizes(tokens=[20] * 16, offsets=list(range(17)), supervised=0.0, shared={})
    stage = load_stage("grpo")
    assert stage.rollout is not None
    sampling = demands_of(cfg, rows).sampling
    assert sampling is not None
    schedule = build_schedule_of_rows(cfg, rows, is_whole=True, num_ranks=1, training=True)
    found = workload_of_prompts(rows, schedule, cfg.train, stage.rollout(cfg.stage_options), sampling).largest(limit)
    plan: Any = replace(
        planner(tiny_config(), machine(), groups_of(4, 1), num_devices=1)(cfg), micro_batch_tokens=limit
    )
    sizes: Sequence[Any] = [(20, [16] * 4)] * 8  # every prompt and answer as long as it may be
    real = [sum(20 + 16 * (last - first) for _, first, last in batch) for batch in micro_batches(sizes, plan, 6)]
    assert sum(map(tokens_of, found.lengths)) == pytest.approx(max(real), rel=0.25)
    assert abs(found.num_micro_batches - len(real)) <= 2


def test_without_rows_pairs_are_two_answers_of_cutoff_len(tmp_path, tiny_config):
    cfg = settings(tmp_path, stage="dpo", max_steps=7)
    costs = planner(tiny_config(), machine("cuda"), None, num_devices=1)(cfg).costs
    assert costs is not None
    assert sum(map(tokens_of, costs.largest_rows)) == 4 * 2 * 64
    assert "every answer, with its prompt, is assumed to have 64 tokens (cutoff_len)" in costs.source
    assert costs.disk.cache is None


def test_a_continued_adapter_is_planned_from_its_own_config(tmp_path, tiny_config, tiny_model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamafactory.model.loader import load_model_config
    from llamafactory.model.patches.peft_future_warning import without_future_warning

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapter = tmp_path / "adapter"
    with without_future_warning():
        made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=["q_proj", "down_proj"]))
    expected = sum(p.numel() for p in made.parameters() if p.requires_grad)
    made.save_pretrained(str(adapter))
    cfg = settings(tmp_path, model_name_or_path=str(tiny_model_dir), adapter_name_or_path=str(adapter))
    plan = planner(load_model_config(cfg.model), machine(), None, num_devices=1)
    continued, fresh = plan(cfg).costs, plan(settings(tmp_path, model_name_or_path=str(tiny_model_dir))).costs
    assert continued is not None
    assert fresh is not None
    assert continued.count.trained == expected != fresh.count.trained
    assert {kind.kind for kind in continued.count.kinds} == {"q_proj", "down_proj"}
    compared = settings(
        tmp_path, model_name_or_path=str(tiny_model_dir), adapter_name_or_path=str(adapter), stage="dpo"
    )
    assert plan(compared).costs.memory.reference == 4 * expected  # a frozen copy of the adapter
