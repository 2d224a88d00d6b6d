"""What stage rm says of single answers with scores, and of a batch that holds them beside pairs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llamafactory.data.ranked_batch import collate_ranked
from llamafactory.model.valuehead import add_value_head
from llamafactory.train.answers import answer_scores
from llamafactory.train.stage import Models
from llamafactory.train.stages import rm
from llamafactory.train.step import StageModule, evaluation_loss


@pytest.fixture
def mixed(groups):
    """Three single answers and five pairs, by turns."""
    return [
        replace(group, answers=group.answers[:1], value=2.0 * number - 5) if number in (0, 3, 6)
        else replace(group, value=number / 3)
        for number, group in enumerate(groups)
    ]  # fmt: skip


@pytest.fixture
def models(make_model, plan):
    policy = add_value_head(make_model())
    with torch.no_grad():
        policy.v_head.summary.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    return Models(policy=policy, plan=plan)


def test_the_loss_is_the_formula_row_by_row(mixed, models):
    batch = collate_ranked(mixed, "flat", 0)
    with torch.no_grad():
        output = rm.loss(models, batch, rm.Options())
        total, scores = 0.0, iter(answer_scores(models.policy, batch, models.plan).tolist())
        for group in mixed:
            if len(group.answers) == 1:
                total += (next(scores) - group.value) ** 2
            else:
                total += float(np.log1p(np.exp(-(next(scores) - next(scores) - group.value))))
    assert float(output.loss_sum) == pytest.approx(total, rel=1e-5)
    assert output.num_units == 8
    assert [float(output.metrics[name][1]) for name in ("mse", "accuracy")] == [3.0, 5.0]


def test_an_evaluation_gives_mse_and_pearson(mixed, models):
    module = StageModule(rm.STAGE, models, rm.Options())
    batches = [[collate_ranked(mixed[:3], "flat", 0)], [collate_ranked(mixed[3:], "padded", 0)]]
    found, num_targets = evaluation_loss(Accelerator(cpu=True), module, batches)
    whole = collate_ranked(mixed, "flat", 0)
    with torch.no_grad():
        scores = answer_scores(models.policy, whole, models.plan)[whole.singles].numpy()
    labels = whole.labels.numpy()
    assert num_targets == sum(answer.num_supervised for group in mixed for answer in group.answers)
    assert found["mse"] == pytest.approx(float(np.mean((scores - labels) ** 2)), rel=1e-5)
    assert found["pearson"] == pytest.approx(float(np.corrcoef(scores, labels)[0, 1]), abs=1e-5)
    assert not [name for name in found if name.startswith("_")]


def test_numbers_that_never_vary_have_no_correlation(mixed, models):
    module = StageModule(rm.STAGE, models, rm.Options())
    alike = [replace(group, value=1e6 + 1) for group in mixed if len(group.answers) == 1]
    found, _ = evaluation_loss(Accelerator(cpu=True), module, [[collate_ranked(alike, "flat", 0)]])
    assert "mse" in found
    assert "pearson" not in found
    found, _ = evaluation_loss(Accelerator(cpu=True), module, [[collate_ranked(mixed[1:3], "flat", 0)]])
    assert not found.keys() & {"mse", "pearson", "rewards/scored"}  # pairs alone


def test_a_step_has_no_correlation(mixed, models):
    output = rm.loss(models, collate_ranked(mixed, "flat", 0), rm.Options())
    assert not [name for name in output.metrics if name.startswith("_")]


def test_a_batch_that_keeps_ranks_in_step_adds_no_tokens(mixed, models):
    module = StageModule(rm.STAGE, models, rm.Options())
    batches = [[collate_ranked(part, "flat", 0)] for part in (mixed, [replace(mixed[1], counts=False)])]
    once, twice = (evaluation_loss(Accelerator(cpu=True), module, batches[:number]) for number in (1, 2))
    assert once == twice


def test_a_group_that_does_not_count_has_no_loss(mixed, models):
    blank = [replace(group, counts=False) for group in mixed]
    output = rm.loss(models, collate_ranked(blank, "flat", 0), rm.Options())
    assert (float(output.loss_sum.detach()), output.num_units) == (0.0, 0)


def test_a_large_mean_does_not_hide_a_correlation():
    score, label = np.array([0.1, 0.2, 0.15, 0.4]), 1e4 + np.array([1.0, 2.0, 1.0, 3.0])
    averages = dict(
        zip(rm._MOMENTS, (x.mean() for x in (score, label, score**2, label**2, score * label)), strict=True)
    )
    assert rm.summarise(averages)["pearson"] == pytest.approx(np.corrcoef(score, label)[0, 1], abs=1e-6)
    assert rm.summarise({}) == {}
    assert SimpleNamespace(**rm.summarise(averages)).pearson <= 1
