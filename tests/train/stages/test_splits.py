"""However the rows of a step are split into micro-batches, a stage gives one loss, one gradient, the same metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from llamafactory.data.answer_batch import num_batch_tokens
from llamafactory.model.adapters import lora
from llamafactory.model.reference import Reference
from llamafactory.model.valuehead import add_value_head
from llamafactory.train.feed import Feed
from llamafactory.train.rows import ROWS
from llamafactory.train.stage import Models
from llamafactory.train.stages import dpo, kto, rm
from llamafactory.train.step import StageModule, accumulate, evaluation_loss
from llamafactory.train.windows import Schedule, single_items

STAGES = {
    "dpo sigmoid": (dpo.STAGE, dpo.Options()),
    "dpo kto_pair": (dpo.STAGE, dpo.Options(pref_loss="kto_pair", pref_beta=0.5)),
    "dpo bco": (dpo.STAGE, dpo.Options(pref_bco_weight=0.5)),
    "dpo orpo": (dpo.STAGE, dpo.Options(pref_loss="orpo")),
    "kto": (kto.STAGE, kto.Options(pref_ftx=0.1)),
    "rm": (rm.STAGE, rm.Options()),
    "rm with margins": (rm.STAGE, rm.Options()),
    "rm of scores": (rm.STAGE, rm.Options()),
    "rm of both": (rm.STAGE, rm.Options()),
}
SPLITS = {
    "4x2": {"items_per_device": 4, "accumulation": 2},
    "1x8": {"items_per_device": 1, "accumulation": 8},
    "8x1, padded": {"items_per_device": 8, "accumulation": 1, "layout": "padded"},
    "60 tokens a pass": {"items_per_device": 8, "accumulation": 1, "micro_batch_tokens": 60},
}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def policy_of(make_model, stage):
    policy = lora.apply(make_model(), lora.Options(lora_rank=4), adapters=(), trainable=True)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return add_value_head(policy) if stage.has_value_head else policy


def feed(rows, stage, *, items_per_device, accumulation, layout="flat", micro_batch_tokens=None, num_ranks=1):
    schedule = Schedule(
        items=single_items(len(rows)),
        lengths=[num_batch_tokens(row.answers, layout) for row in rows],
        items_per_device=items_per_device,
        accumulation=accumulation,
        num_ranks=num_ranks,
        micro_batch_tokens=micro_batch_tokens,
        seed=3,
    )
    return Feed(examples=rows, schedule=schedule, layout=layout, pad_id=0, kind=ROWS[stage.view])


def measure(accelerator, module, window):
    module.zero_grad()
    sums = accumulate(accelerator, module, window)
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    return float(sums.loss) / window.num_units, without_ties(sums.averages(accelerator)), gradient.clone()


def without_ties(averages):
    """Without accuracies: rounding decides them where both answers are the same."""
    return {name: value for name, value in averages.items() if "accura" not in name}


def numbered(groups, name):
    """The pairs with margins, or single answers with scores in their place, or both kinds by turns."""
    singles = {"rm of scores": 1, "rm of both": 2}.get(name)
    return [
        replace(group, answers=group.answers[:1], value=number - 2.5)
        if singles and number % singles == 0
        else replace(group, value=number / 4 if name.startswith("rm ") else 0.0)
        for number, group in enumerate(groups)
    ]


@pytest.mark.parametrize("name", STAGES)
def test_every_split_gives_one_step(name, accelerator, groups, make_model, plan):
    stage, options = STAGES[name]
    groups = numbered(groups, name)
    models = Models(policy=policy_of(make_model, stage), plan=plan, reference=Reference())
    module = StageModule(stage, models, options)
    whole = feed(groups, stage, items_per_device=8, accumulation=1)
    loss, averages, gradient = measure(accelerator, module, whole.window(0, 0))
    assert whole.window(0, 0).num_units == 8
    for split, keys in SPLITS.items():
        window = feed(groups, stage, **keys).window(0, 0)
        found = measure(accelerator, module, window)
        assert len(window.batches) > 1 or "8x1, padded" in split
        assert found[0] == pytest.approx(loss, rel=1e-5), split
        assert found[1] == pytest.approx(averages, rel=1e-4, abs=1e-6), split
        assert float((found[2] - gradient).norm() / gradient.norm()) < 1e-5, split
    evaluated, _ = evaluation_loss(accelerator, module, whole.one_pass(0))
    assert evaluated["loss"] == pytest.approx(loss, rel=1e-5)
    assert {key: evaluated[key] for key in averages} == pytest.approx(averages, rel=1e-4, abs=1e-6)
    assert not [key for key in evaluated if key.startswith("_")]


def test_the_metrics_of_pairs_are_those_of_the_paper(accelerator, groups, make_model, plan):
    stage, options = dpo.STAGE, dpo.Options()
    models = Models(policy=policy_of(make_model, stage), plan=plan, reference=Reference())
    module = StageModule(stage, models, options)
    window = feed(groups, stage, items_per_device=8, accumulation=1).window(0, 0)
    _, averages, _ = measure(accelerator, module, window)
    sums = {"chosen": 0.0, "rejected": 0.0}
    for group in groups:
        for side, answer in zip(sums, group.answers, strict=True):
            ids = torch.tensor(answer.input_ids.tolist())[None]
            rows = torch.tensor(answer.labels.tolist())[1:] != -100
            with torch.no_grad():
                logps = [models.policy(input_ids=ids).logits]
                with models.policy.disable_adapter():
                    logps.append(models.policy(input_ids=ids).logits)
            own, base = (
                torch.log_softmax(x[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0][rows].sum().item() for x in logps
            )
            sums[side] += 0.1 * (own - base) / len(groups)
    assert averages["rewards/chosen"] == pytest.approx(sums["chosen"], rel=1e-4, abs=1e-6)
    assert averages["rewards/rejected"] == pytest.approx(sums["rejected"], rel=1e-4, abs=1e-6)
    assert averages["rewards/margins"] == pytest.approx(sums["chosen"] - sums["rejected"], rel=1e-3, abs=1e-6)
