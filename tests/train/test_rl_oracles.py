"""Losses of grpo and ppo against TRL on the same batch and against plain transcriptions of the papers, in float32.

`WRITE_LOSS_ORACLES=1 pytest tests/train/test_rl_oracles.py` writes the differences to docs/reference/rl_oracles.md.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamafactory.train import rl
from llamafactory.train.group_loss import GroupRules, group_loss_terms

TABLE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "rl_oracles.md"
PROMPTS, GROUP, LIMIT = 3, 4, 12
ROWS: dict[tuple[str, str], tuple[float | None, float]] = {}
pytestmark = pytest.mark.filterwarnings("ignore")  # of importing TRL


class Case:
    """Random answers of 1 to 12 tokens; policy, sampler and reference differ by enough to reach every clip."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, LIMIT + 1, (PROMPTS * GROUP,), generator=draw)
        self.owners = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        self.places = torch.cat([torch.arange(int(length)) for length in self.lengths])
        total = len(self.owners)
        self.policy = (-3 * torch.rand(total, generator=draw) - 0.05).requires_grad_()
        self.old = self.policy.detach() + 0.3 * torch.randn(total, generator=draw)
        self.reference = self.policy.detach() + 0.3 * torch.randn(total, generator=draw)
        self.sampler = self.old + 0.5 * torch.randn(total, generator=draw)
        self.rewards = torch.randn(PROMPTS, GROUP, generator=draw)
        self.advantages = torch.randn(PROMPTS * GROUP, generator=draw)

    def table(self, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(self.lengths), LIMIT).index_put((self.owners, self.places), values)

    def mask(self) -> torch.Tensor:
        return self.table(torch.ones(len(self.owners)))

    def measured(self, loss: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss, self.policy)
        return torch.cat([loss.detach().reshape(1), gradient])


CASES: list[tuple[str, str, GroupRules, dict[str, Any] | None]] = [
    ("grpo", "grpo", GroupRules(), {}),
    ("grpo", "grpo, clip 0.1 and 0.4", GroupRules(low=0.1, high=0.4), {"epsilon_low": 0.1, "epsilon_high": 0.4}),
    ("grpo", "grpo, beta 0.04", GroupRules(beta=0.04), {"beta": 0.04}),
    (
        "grpo",
        "grpo, rollout_correction 2",
        GroupRules(correction=2.0),
        {"use_vllm": True, "vllm_importance_sampling_correction": True},
    ),
    ("grpo", "dr_grpo", GroupRules(average="limit"), {"loss_type": "dr_grpo"}),
    ("grpo", "dapo", GroupRules(average="token", high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
    (
        "grpo",
        "gspo",
        GroupRules(ratio="mean", low=3e-4, high=4e-4),
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    ("grpo", "gspo, wide clip", GroupRules(ratio="mean"), {"importance_sampling_level": "sequence"}),
    ("grpo", "rloo", GroupRules(ratio="sum"), {"rloo": True}),
]  # fmt: skip


def ours(case: Case, rules: GroupRules) -> torch.Tensor:
    terms = group_loss_terms(
        case.policy, case.old, owners=case.owners, num_answers=PROMPTS * GROUP, advantages=case.advantages,
        reference=case.reference, sampler=case.sampler, rules=rules,
    )  # fmt: skip
    units = {"answer": PROMPTS * GROUP, "token": len(case.owners), "limit": PROMPTS * GROUP * LIMIT}
    return terms.losses.sum() / units[rules.average]


def by_trl(case: Case, changes: dict[str, Any]) -> torch.Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, device=torch.device("cpu")
    )
    options: dict[str, Any] = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "beta": 0.0, "use_vllm": False, "vllm_importance_sampling_correction": False, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "_entropy_bonus_enabled": False, "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1, "max_completion_length": LIMIT, "accelerator": accelerator,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True), "_metrics": {"train": defaultdict(list)},
    }  # fmt: skip
    is_rloo = changes.get("rloo", False)
    trainer = SimpleNamespace(**(options | {key: value for key, value in changes.items() if key != "rloo"}))
    policy = case.table(case.policy)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (policy, torch.zeros_like(policy), None)
    prompt = torch.zeros(len(case.lengths), 1, dtype=torch.long)
    ratio = torch.exp(case.table(case.old) - case.table(case.sampler)).clamp(max=2.0)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt + 1, "completion_mask": case.mask(),
        "completion_ids": torch.zeros(len(case.lengths), LIMIT).long(), "advantages": case.advantages,
        "old_per_token_logps": case.table(case.old), "old_logps": case.table(case.old).sum(1),
        "ref_per_token_logps": case.table(case.reference), "num_items_in_batch": case.mask().sum(),
        "importance_sampling_ratio": ratio,
    }  # fmt: skip
    return (RLOOTrainer if is_rloo else GRPOTrainer)._compute_loss(trainer, None, inputs)


def by_formula(case: Case, rules: GroupRules) -> torch.Tensor:
    """The papers' formulas, one answer and one token at a time."""
    per_answer, total = [], torch.zeros(())
    for answer, length in enumerate(case.lengths.tolist()):
        at = case.owners == answer
        new, old, ref, sampler = case.policy[at], case.old[at], case.reference[at], case.sampler[at]
        advantage = case.advantages[answer]
        shared = {"mean": (new - old).sum() / length, "sum": (new - old).sum()}.get(rules.ratio)
        if rules.ratio == "sum":
            ratio = torch.exp(shared)
            per_answer.append(-min(ratio * advantage, torch.clamp(ratio, 1 - rules.low, 1 + rules.high) * advantage))
            continue
        tokens = []
        for place in range(length):
            ratio = torch.exp(new[place] - old[place] if shared is None else shared)
            clipped = torch.clamp(ratio, 1 - rules.low, 1 + rules.high)
            token = -min(ratio * advantage, clipped * advantage)
            if rules.correction:
                token = token * min(torch.exp(old[place] - sampler[place]), torch.tensor(rules.correction))
            log_ref = ref[place] - new[place]
            tokens.append(token + rules.beta * (torch.exp(log_ref) - log_ref - 1))
        total = total + sum(tokens)
        per_answer.append(sum(tokens) / length)
    if rules.average == "token":
        return total / len(case.owners)
    if rules.average == "limit":
        return total / (LIMIT * len(case.lengths))
    return sum(per_answer) / len(case.lengths)


@pytest.mark.parametrize(("stage", "name", "rules", "changes"), CASES, ids=[case[1] for case in CASES])
def test_group_losses_equal_trl_and_the_papers(
    stage: str, name: str, rules: GroupRules, changes: dict[str, Any] | None
) -> None:
    case = Case()
    found = case.measured(ours(case, rules))
    formula = float((found - case.measured(by_formula(case, rules))).abs().max())
    trl = None if changes is None else float((found - case.measured(by_trl(case, changes))).abs().max())
    ROWS[stage, name] = (trl, formula)
    assert found.abs().max() > 1e-3
    assert formula <= 1e-6
    assert trl is None or trl <= 1e-6


def test_masked_answers_carry_no_loss_and_no_gradient() -> None:
    case = Case()
    weights = torch.ones(PROMPTS * GROUP)
    weights[3] = 0
    terms = group_loss_terms(
        case.policy, case.old, owners=case.owners, num_answers=PROMPTS * GROUP, advantages=case.advantages,
        reference=None, sampler=case.sampler, rules=GroupRules(), weights=weights,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(terms.losses.sum(), case.policy)
    assert not gradient[case.owners == 3].any()
    assert gradient[case.owners != 3].any()


@pytest.mark.parametrize(
    ("name", "baseline", "spread"),
    [
        ("advantages grpo", "group", "group"),
        ("advantages dr_grpo", "group", "none"),
        ("advantages rloo", "others", "none"),
        ("advantages by step", "group", "step"),
    ],
)
def test_group_advantages_equal_trl_and_the_papers(name: str, baseline: Any, spread: Any) -> None:
    rewards = Case().rewards
    found = rl.group_advantages(rewards, baseline=baseline, spread=spread, step_moments=rl.moments(rewards))
    plain = torch.zeros_like(rewards)
    for prompt in range(PROMPTS):
        for place in range(GROUP):
            row = rewards[prompt]
            others = torch.cat([row[:place], row[place + 1 :]])
            plain[prompt, place] = row[place] - (others.mean() if baseline == "others" else row.mean())
            if spread != "none":
                plain[prompt, place] /= (row if spread == "group" else rewards).std() + 1e-4
    trl = rewards - (  # the lines of trl's _generate_and_score_completions, which is no function of its own
        (rewards.sum(1, keepdim=True) - rewards) / (GROUP - 1)
        if baseline == "others"
        else rewards.mean(1, keepdim=True)
    )
    assert torch.allclose(found, plain, atol=1e-6)
    if spread == "none":
        assert torch.allclose(found, trl, atol=1e-6)
    ROWS["grpo", name] = (None, float((found - plain).abs().max()))


def test_equal_rewards_give_zero_advantages_and_are_called_flat() -> None:
    rewards = torch.tensor([[0.3, 0.3, 0.3], [0.0, 1.0, 0.0]])
    found = rl.group_advantages(rewards, baseline="group", spread="group", step_moments=rl.moments(rewards))
    assert found[0].abs().max() < 1e-3
    assert rl.is_flat(rewards).tolist() == [True, False]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_sum_of_discounted_deltas(gamma: float, lam: float) -> None:
    case = Case(1)
    rewards, values = case.old, case.reference
    found = rl.discounted_advantages(rewards, values, case.owners, gamma=gamma, lam=lam)
    plain = torch.zeros_like(found)
    for answer in range(len(case.lengths)):
        at = torch.nonzero(case.owners == answer).flatten().tolist()
        later = [*at[1:], None]
        deltas = [
            rewards[t] + (gamma * values[n] if n is not None else 0) - values[t]
            for t, n in zip(at, later, strict=True)
        ]
        for start, t in enumerate(at):
            plain[t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[start:]))
    ROWS["ppo", f"GAE, gamma {gamma:g}, lambda {lam:g}"] = (None, float((found - plain).abs().max()))
    assert torch.allclose(found, plain, atol=2e-6)


def test_gae_of_nothing() -> None:
    empty = torch.zeros(0)
    assert rl.discounted_advantages(empty, empty, torch.zeros(0, dtype=torch.long), gamma=1, lam=1).shape == (0,)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_ranks_equals_whitening_at_once(shift_mean: bool) -> None:
    values = Case(2).old
    sums = rl.moments(values[:7]) + rl.moments(values[7:])
    found = torch.cat([rl.whiten(part, sums, shift_mean=shift_mean) for part in (values[:7], values[7:])])
    plain = (values - values.mean()) / torch.sqrt(values.var() + 1e-8) + (0 if shift_mean else values.mean())
    ROWS["ppo", "whitening" if shift_mean else "whitening, mean kept"] = (None, float((found - plain).abs().max()))
    assert torch.allclose(found, plain, atol=1e-6)


def test_clipped_losses_equal_the_paper() -> None:
    case = Case(3)
    advantages, returns, old_values = case.sampler, case.reference, case.old
    policy = rl.clipped_policy_losses(torch.exp(case.policy - case.old), advantages, low=0.2, high=0.2).mean()
    value = rl.clipped_value_losses(case.policy, old_values, returns, clip=0.2).mean()
    plain_policy, plain_value = torch.zeros(()), torch.zeros(())
    for t in range(len(case.owners)):
        ratio = torch.exp(case.policy[t] - case.old[t])
        plain_policy = plain_policy + max(-advantages[t] * ratio, -advantages[t] * torch.clamp(ratio, 0.8, 1.2))
        near = torch.clamp(case.policy[t], old_values[t] - 0.2, old_values[t] + 0.2)
        plain_value = plain_value + 0.5 * max((case.policy[t] - returns[t]) ** 2, (near - returns[t]) ** 2)
    for name, found, plain in (("policy loss", policy, plain_policy), ("value loss", value, plain_value)):
        gap = float((case.measured(found) - case.measured(plain / len(case.owners))).abs().max())
        ROWS["ppo", name] = (None, gap)
        assert gap <= 1e-6


def test_kl_estimates() -> None:
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(50, generator=draw).log_softmax(0) for _ in range(2))
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):  # unbiased: their expectation under the policy is the KL
        expected = float((policy.exp() * rl.kl_estimates(policy, reference, estimator=estimator)).sum())
        assert expected == pytest.approx(exact, rel=1e-5)
    assert (rl.kl_estimates(policy, reference, estimator="k3") >= 0).all()
    assert torch.equal(rl.kl_estimates(policy, reference, estimator="k2"), 0.5 * (policy - reference) ** 2)


def test_overlong_penalty_follows_the_paper() -> None:
    lengths = torch.tensor([1.0, 80.0, 90.0, 95.0, 100.0])
    assert rl.overlong_penalty(lengths, limit=100, buffer=20).tolist() == pytest.approx([0, 0, -0.5, -0.75, -1])


def test_kl_control_follows_the_paper() -> None:
    control = rl.KLControl(coefficient=0.2, target=6.0)
    assert control.after(6.0, 64) == pytest.approx(0.2)
    assert control.after(60.0, 100) == pytest.approx(0.2 * (1 + 0.2 * 100 / 10_000))
    assert control.after(5.4, 100) == pytest.approx(0.2 * (1 - 0.1 * 100 / 10_000))


def test_table_is_written() -> None:
    """Runs last in this file."""
    assert len(ROWS) >= len(CASES)
    if os.environ.get("WRITE_LOSS_ORACLES") != "1":
        pytest.skip("WRITE_LOSS_ORACLES=1 writes the table")
    lines = [
        "# How exact the losses of reinforcement learning are",
        "",
        "Each loss is computed in float32 on the same random batch by this project, by the installed TRL (1.16) and",
        "by a plain transcription of the paper's formula. The numbers are the largest absolute difference over the",
        'loss and its gradient by every token\'s log-probability; the tests allow 1e-6 (GAE 2e-6). "none": TRL has',
        "no such function.",
        "",
        "Written by `WRITE_LOSS_ORACLES=1 pytest tests/train/test_rl_oracles.py`.",
        "",
        "| stage | option | to TRL | to the formula |",
        "|---|---|---|---|",
    ]
    for (stage, name), (trl, formula) in sorted(ROWS.items()):
        lines.append(f"| {stage} | {name} | {'none' if trl is None else f'{trl:.1e}'} | {formula:.1e} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
