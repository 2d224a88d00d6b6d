"""A prompt that is there once gives the loss and the gradient of sequences that each have their own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llamafactory.data.answer_batch import num_batch_tokens, shared_length
from llamafactory.model.reference import Reference, freeze
from llamafactory.model.valuehead import add_value_head
from llamafactory.train.answers import answer_scores, reference_logps
from llamafactory.train.rows import ROWS
from llamafactory.train.stage import Models
from llamafactory.train.stages import dpo, kto, rm

OPTIONS = {
    "sigmoid": dpo.Options(),
    "ipo": dpo.Options(pref_loss="ipo"),
    "orpo": dpo.Options(pref_loss="orpo"),
    "simpo, ftx": dpo.Options(pref_loss="simpo", pref_ftx=0.3),
    "ld": dpo.Options(ld_alpha=0.4),
    "kto_pair": dpo.Options(pref_loss="kto_pair"),
    "bco": dpo.Options(pref_bco_weight=1.0),
}
MODELS = {"llama": {}, "mistral": {"sliding_window": 6}, "qwen3": {}}


@pytest.fixture(params=[False, True], ids=["own forward", "fused blocks"])
def plan(request):
    """Padded batches never go through the fused blocks: each test compares with sequences that share nothing."""
    return SimpleNamespace(fused_head=True, loss_chunk_rows=7, fused_blocks=request.param)


def measure(stage, models, batch, options):
    """Loss, metrics and the gradient of every parameter."""
    if stage.prepares(options):
        with torch.no_grad():
            sums, batch = stage.prepare(models, batch, options)
        batch = replace(batch, step_sums=sums)
    models.policy.zero_grad()
    output = stage.loss(models, batch, options)
    output.loss_sum.backward()
    gradients = [p.grad.flatten() for p in models.policy.parameters() if p.grad is not None]
    return replace(output, loss_sum=output.loss_sum.detach()), torch.cat(gradients).clone()


def compare(stage, models, groups, options):
    view = ROWS[stage.view]
    shared, gradient = measure(stage, models, view.collate(groups, "flat", 0), options)
    alone, expected = measure(stage, models, view.collate(groups, "padded", 0), options)
    assert float(shared.loss_sum) == pytest.approx(float(alone.loss_sum), rel=1e-5)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    assert shared.num_units == alone.num_units == len(groups)
    for name, values in shared.metrics.items():
        assert values.tolist() == pytest.approx(alone.metrics[name].tolist(), rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize(
    ("name", "model_type"), [*((name, "llama") for name in OPTIONS), ("sigmoid", "mistral"), ("sigmoid", "qwen3")]
)
def test_pairs(name, model_type, groups, make_model, plan):
    policy = make_model(model_type, **MODELS[model_type])
    reference = make_model(model_type, **MODELS[model_type], initializer_range=0.05)
    models = Models(policy=policy, plan=plan, reference=Reference(model=freeze(reference)))
    compare(dpo.STAGE, models, groups, OPTIONS[name])


@pytest.mark.parametrize("model_type", MODELS)
def test_scores(model_type, groups, make_model, plan):
    policy = add_value_head(make_model(model_type, **MODELS[model_type]))
    compare(rm.STAGE, Models(policy=policy, plan=plan), groups, rm.Options())


def test_scores_beside_margins(groups, make_model, plan):
    policy = add_value_head(make_model())
    rows = [
        replace(group, answers=group.answers[: 1 + number % 2], value=number - 3.0)
        for number, group in enumerate(groups)
    ]
    compare(rm.STAGE, Models(policy=policy, plan=plan), rows, rm.Options())


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_whose_reference_is_the_model_without_them(tied, groups, make_model, plan):
    from llamafactory.model.adapters import lora

    model = make_model(tie_word_embeddings=tied)
    policy = lora.apply(model, lora.Options(lora_rank=4), adapters=(), trainable=True).train()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    compare(dpo.STAGE, Models(policy=policy, plan=plan, reference=Reference()), groups, dpo.Options())


def test_judged_answers(groups, make_model, plan):
    reference = make_model(initializer_range=0.05)
    models = Models(policy=make_model(), plan=plan, reference=Reference(model=freeze(reference)))
    compare(kto.STAGE, models, groups, kto.Options(pref_ftx=0.2, kto_rejected_weight=1.5))


def test_the_reference_of_judged_answers_reads_each_prompt_once(groups, make_model, plan):
    reference, seen = freeze(make_model(initializer_range=0.05)), []
    reference.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    models = Models(policy=make_model(), plan=plan, reference=Reference(model=reference))
    batch = ROWS["feedback"].collate(groups, "flat", 0)
    measure(kto.STAGE, models, batch, kto.Options())
    assert seen == [sum(num_batch_tokens(group.answers, "flat") for group in groups)]
    seen.clear()
    known = [reference_logps(models, part) for part in (batch, batch.mismatched)]
    assert seen == [batch.num_tokens, batch.mismatched.num_tokens]
    _, ready = kto.prepare(models, batch, kto.Options())
    torch.testing.assert_close(ready.reference_logps, known[0], rtol=1e-5, atol=1e-5)


def test_each_pair_alone_gives_the_scores_of_the_batch(groups, make_model, plan):
    policy = add_value_head(make_model())
    batch = ROWS["pairs"].collate(groups, "flat", 0)
    together = answer_scores(policy, batch, plan)
    for number, group in enumerate(groups):
        for side, answer in enumerate(group.answers):
            ids = torch.tensor(answer.input_ids.tolist())[None]
            states = policy.pretrained_model.base_model(input_ids=ids).last_hidden_state[0, -1:]
            torch.testing.assert_close(together[2 * number + side], policy.v_head(states)[0], rtol=1e-4, atol=1e-5)


def test_the_prefix_is_counted_once(groups):
    batch = ROWS["pairs"].collate(groups, "flat", 0)
    assert batch.num_tokens == sum(num_batch_tokens(group.answers, "flat") for group in groups)
    assert batch.num_tokens < sum(len(answer) for group in groups for answer in group.answers)
    assert [shared_length(group.answers) for group in groups[:4]] == [12, 15, 0, 15]
    assert sum(sum(tree) for tree in batch.segment_lengths) == batch.num_tokens


def test_a_group_that_does_not_count_changes_nothing(groups, make_model, plan):
    view = ROWS["pairs"]
    models = Models(policy=make_model(), plan=plan)
    options = dpo.Options(pref_loss="orpo")
    whole, gradient = measure(dpo.STAGE, models, view.collate(groups, "flat", 0), options)
    more = [*groups, view.blank(groups[0])]
    found, same = measure(dpo.STAGE, models, view.collate(more, "flat", 0), options)
    assert found.num_units == whole.num_units
    assert float(found.loss_sum) == pytest.approx(float(whole.loss_sum), rel=1e-6)
    assert float((same - gradient).norm() / gradient.norm()) < 1e-5
