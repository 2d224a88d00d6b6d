"""The variants of the supervised loss against their formulas on full logits, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.model.reference import Reference, freeze
from llamafactory.train.stage import Models
from llamafactory.train.stages import sft


def formula(name, logits, targets, reference, options):
    """Token by token, as the papers write them."""
    total = torch.zeros(())
    for row, target, anchor in zip(logits, targets, reference, strict=True):
        probs = torch.softmax(row, -1)
        p = probs[target]
        if name == "eaft":
            top = probs.topk(20).values
            top = (top / top.sum()).detach()
            total = total - torch.log(p) * (-(top * torch.log(top)).sum() / 3) ** options.eaft_alpha
            continue
        total = total - p.detach() * torch.log(p)
        if name == "asft":
            base = torch.softmax(anchor, -1)
            total = total + options.asft_alpha * (base * torch.log(base / probs)).sum()
    return total


VARIANTS = {
    "dft": sft.Options(use_dft_loss=True),
    "asft": sft.Options(use_asft_loss=True, asft_alpha=0.3),
    "eaft": sft.Options(use_eaft_loss=True, eaft_alpha=0.7),
}


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_formula(name, layout, make_model, make_examples, plan):
    policy, anchor = make_model(initializer_range=0.3), freeze(make_model(initializer_range=0.2))
    examples = make_examples((9, 22, 5))
    batch = collate_flat(examples) if layout == "flat" else collate_padded(examples, pad_id=0)
    found = sft.loss(
        Models(policy=policy, plan=plan, reference=Reference(model=anchor)), batch, VARIANTS[name]
    ).loss_sum
    found.backward()
    ours = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    rows = [[], [], []]
    for example in examples:
        ids = torch.tensor(example.input_ids.tolist())[None]
        wanted = torch.tensor(example.labels.tolist())[1:] != -100
        rows[0].append(policy(input_ids=ids).logits[0, :-1][wanted])
        rows[1].append(ids[0, 1:][wanted])
        with torch.no_grad():
            rows[2].append(anchor(input_ids=ids).logits[0, :-1][wanted])
    expected = formula(name, *(torch.cat(part) for part in rows), VARIANTS[name])
    expected.backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_asft_with_the_policy_as_reference_is_dft(make_model, make_examples, plan):
    batch = collate_flat(make_examples((9, 22, 5)))
    policy = make_model()
    models = Models(policy=policy, plan=plan, reference=Reference(model=freeze(make_model())))
    found = [sft.loss(models, batch, VARIANTS[name]).loss_sum.item() for name in ("dft", "asft")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_accuracy_is_the_share_of_right_tokens_in_evaluation_alone(make_model, make_examples, plan):
    policy, options = make_model(initializer_range=0.3), sft.Options(compute_accuracy=True)
    batch = collate_flat(make_examples((60, 80)))
    models = Models(policy=policy.train(), plan=plan)
    assert sft.loss(models, batch, options).metrics == {}
    policy.eval()
    right, count = sft.loss(models, batch, options).metrics["accuracy"].tolist()
    logits = policy(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[0]
    alone = collate_flat(make_examples((60,)))
    best = logits[alone.target_rows].argmax(-1) == alone.target_ids  # the first row sees nothing of the second
    one = sft.loss(models, alone, options).metrics["accuracy"].tolist()
    assert one == [float(best.sum()), float(len(best))]
    assert count == batch.num_targets
    assert right >= one[0]


def test_the_weight_of_eaft_is_at_most_about_one():
    logits = torch.zeros(2, 50)
    losses = sft.eaft_losses(logits, torch.tensor([0, 1]), 1.0)
    assert losses.tolist() == pytest.approx([math.log(50) * math.log(20) / 3] * 2, rel=1e-6)
