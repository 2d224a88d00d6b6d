"""The losses of sft, rm, dpo and kto against TRL on one batch and against plain transcriptions of papers, in float32.

`WRITE_LOSS_ORACLES=1 pytest tests/train/test_loss_oracles.py` writes docs/reference/loss_oracles.md.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamafactory.train import preference
from llamafactory.train.preference import Answers
from llamafactory.train.stages import dpo, rm, sft

TABLE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "loss_oracles.md"
PAIRS, LENGTHS = 5, ((7, 4), (3, 9), (6, 6), (1, 2), (12, 5))
ROWS: dict[tuple[str, str], tuple[float | None, float]] = {}
pytestmark = pytest.mark.filterwarnings("ignore")  # of importing TRL


class Case:
    """Random token log-probabilities of pairs, in the shapes of this project and of TRL."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.counts = [count for pair in LENGTHS for count in pair]  # chosen, rejected, chosen, ...
        self.policy = (-3 * torch.rand(sum(self.counts), generator=generator) - 0.05).requires_grad_()
        self.reference = -3 * torch.rand(sum(self.counts), generator=generator) - 0.05
        self.owners = torch.repeat_interleave(torch.arange(2 * PAIRS), torch.tensor(self.counts))
        self.places = torch.cat([torch.arange(count) for count in self.counts])
        self.batch = SimpleNamespace(
            owners=self.owners, places=self.places, lengths=torch.tensor(self.counts, dtype=torch.float32),
            num_answers=2 * PAIRS, reference_logps=self.reference, group_weights=torch.ones(PAIRS),
        )  # fmt: skip

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2 * PAIRS).index_add(0, self.owners, values)

    def trl_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """`[chosen and then rejected answers, 1 + longest]`: one prompt token, then the answer, then padding."""
        table = torch.zeros(2 * PAIRS, max(self.counts) + 1)
        return table.index_put((self._trl_rows(), self.places + 1), values)

    def trl_mask(self) -> torch.Tensor:
        table = torch.zeros(2 * PAIRS, max(self.counts) + 2, dtype=torch.long)
        return table.index_put((self._trl_rows(), self.places + 2), torch.ones(len(self.owners), dtype=torch.long))

    def _trl_rows(self) -> torch.Tensor:
        return (self.owners % 2) * PAIRS + self.owners // 2

    def pairs(self, alpha: float | None = None) -> tuple[Answers, Answers]:
        options = dpo.Options(ld_alpha=alpha)
        return replaced_sides(self, options)


def replaced_sides(case: Case, options: dpo.Options) -> tuple[Answers, Answers]:
    batch = Batch(**vars(case.batch))
    chosen, rejected, _ = dpo._sides(case.policy, batch, options)
    return chosen, rejected


def Batch(**values: object) -> object:  # noqa: N802  a dataclass with these fields, so that `replace` works on it
    from dataclasses import make_dataclass

    return make_dataclass("Batch", values)(**values)


class Trainer(SimpleNamespace):
    """What TRL's loss methods read of their trainer; a metric never changes a loss."""

    def __init__(self, **values: object) -> None:
        accelerator = SimpleNamespace(
            gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"), num_processes=1,
            parallelism_config=None,
        )  # fmt: skip
        super().__init__(
            accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None,
            precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False,
            _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, label_smoothing=0.0, alpha=0.0,
            calculate_KL=True, simpo_gamma=0.5,
        )  # fmt: skip
        vars(self).update(values)


def trl_outputs(tokens: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(tokens)
    return SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_dpo(case: Case, loss: str, options: dpo.Options) -> torch.Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    alpha = options.ld_alpha
    weights = preference.shorten_tails(
        torch.ones_like(case.reference), case.owners, case.places, case.batch.lengths,
        alpha=1.0 if alpha is None else alpha,
    )  # fmt: skip
    known = case.sums(case.reference * weights)
    trainer = Trainer(loss_types=[loss], beta=options.pref_beta, ld_alpha=alpha)
    inputs = {
        "completion_mask": case.trl_mask(), "input_ids": case.trl_mask(), "attention_mask": case.trl_mask(),
        "ref_chosen_logps": known[::2], "ref_rejected_logps": known[1::2],
    }  # fmt: skip
    tokens = case.trl_tokens(case.policy)
    return DPOTrainer._compute_loss(trainer, lambda **_: trl_outputs(tokens), inputs, False)


def trl_cpo(case: Case, loss: str, options: dpo.Options) -> torch.Tensor:
    from trl.experimental.cpo import CPOTrainer

    trainer = Trainer(
        loss_type=loss, beta=options.pref_beta, label_smoothing=options.dpo_label_smoothing,
        simpo_gamma=options.simpo_gamma,
    )  # fmt: skip
    lengths = case.batch.lengths if loss == "simpo" else torch.ones_like(case.batch.lengths)
    values = case.policy if loss == "simpo" else case.policy - case.reference
    sums = case.sums(values) / lengths
    return CPOTrainer.cpo_loss(trainer, sums[::2], sums[1::2])[0].mean()


def trl_orpo(case: Case, loss: str, options: dpo.Options) -> torch.Tensor:
    from trl.experimental.orpo import ORPOTrainer

    means = case.sums(case.policy) / case.batch.lengths
    odds = ORPOTrainer.odds_ratio_loss(Trainer(beta=options.pref_beta), means[::2], means[1::2])[0]
    return (-means[::2] - odds).mean()


def paper(case: Case, options: dpo.Options) -> torch.Tensor:
    """The formulas, pair by pair, in Python's own arithmetic on scalars."""
    total = torch.zeros(())
    policy, known = case.policy.split(case.counts), case.reference.split(case.counts)
    alpha = options.ld_alpha
    ratios = []
    for k in range(PAIRS):
        sides = []
        short = min(LENGTHS[k])
        for side in (2 * k, 2 * k + 1):
            tail = 1.0 if alpha is None else alpha
            p, r = (x[side][:short].sum() + tail * x[side][short:].sum() for x in (policy, known))
            sides.append((p, p - r, case.counts[side]))
        ratios.append(sides)
    mean = [torch.stack([sides[i][1] for sides in ratios]).mean().detach() for i in (0, 1)]
    for k, (chosen, rejected) in enumerate(ratios):
        value = paper_pair(chosen, rejected, mean, options)
        total = total + value - options.pref_ftx * policy[2 * k].sum() / chosen[2]
    return total / PAIRS


def paper_pair(chosen, rejected, mean, options: dpo.Options) -> torch.Tensor:
    """One pair; a side is its log-probability, its log ratio and its number of tokens."""
    (pc, rc, nc), (pr, rr, nr) = chosen, rejected
    beta, smoothing, weight = options.pref_beta, options.dpo_label_smoothing, options.pref_bco_weight
    margin = beta * (rc - rr)
    odds = [torch.exp(p / n) / (1 - torch.exp(p / n)) for p, n in ((pc, nc), (pr, nr))]
    kto = (1 - sigma(beta * (rc - mean[1].clamp(min=0)))) + (1 - sigma(beta * (mean[0].clamp(min=0) - rr)))
    value = {
        "sigmoid": -(1 - smoothing) * torch.log(sigma(margin)) - smoothing * torch.log(sigma(-margin)),
        "hinge": torch.clamp(1 - margin, min=0),
        "ipo": (rc / nc - rr / nr - 1 / (2 * beta)) ** 2,
        "orpo": -pc / nc - beta * torch.log(sigma(torch.log(odds[0] / odds[1]))),
        "simpo": -torch.log(sigma(beta * pc / nc - beta * pr / nr - options.simpo_gamma)),
        "kto_pair": kto / 2,
    }[options.pref_loss]
    delta = beta * (mean[0] + mean[1]) / 2
    bco = -torch.log(sigma(beta * rc - delta)) - torch.log(sigma(-(beta * rr - delta)))
    return (value + weight * bco) / (1 + weight)


def sigma(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def ours(case: Case, options: dpo.Options) -> torch.Tensor:
    batch = Batch(**vars(case.batch))
    chosen, rejected, plain = dpo._sides(case.policy, batch, options)
    sums = torch.stack([chosen.ratios.sum(), rejected.ratios.sum(), torch.tensor(float(PAIRS))])
    losses = dpo.pair_losses(chosen, rejected, options, sums) - options.pref_ftx * plain[0].mean_logps
    return losses.mean()


def difference(first, second) -> float:
    """Largest difference of two losses and of their gradients; each function gets a case of its own."""
    found = []
    for compute in (first, second):
        case = Case()
        value = compute(case)
        value.backward()
        found.append(torch.cat([value.detach()[None], case.policy.grad]))
    return float((found[0] - found[1]).abs().max())


DPO = {
    "sigmoid": (trl_dpo, "sigmoid", {}),
    "sigmoid, pref_beta 0.7": (trl_dpo, "sigmoid", {"pref_beta": 0.7}),
    "sigmoid, dpo_label_smoothing 0.2": (trl_cpo, "sigmoid", {"dpo_label_smoothing": 0.2}),
    "sigmoid, ld_alpha 0.3": (trl_dpo, "sigmoid", {"ld_alpha": 0.3}),
    "sigmoid, ld_alpha 0": (trl_dpo, "sigmoid", {"ld_alpha": 0.0}),
    "sigmoid, pref_ftx 0.5": (None, "", {"pref_ftx": 0.5}),
    "sigmoid, pref_bco_weight 0.5": (None, "", {"pref_bco_weight": 0.5}),
    "hinge": (trl_dpo, "hinge", {"pref_loss": "hinge"}),
    "ipo": (trl_dpo, "ipo", {"pref_loss": "ipo"}),
    "kto_pair": (None, "", {"pref_loss": "kto_pair"}),
    "orpo": (trl_orpo, "", {"pref_loss": "orpo"}),
    "simpo": (trl_cpo, "simpo", {"pref_loss": "simpo", "pref_beta": 2.0}),
    "simpo, simpo_gamma 1.5": (trl_cpo, "simpo", {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.5}),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo(name):
    trl, loss, keys = DPO[name]
    options = dpo.Options(**keys)
    to_trl = None if trl is None else difference(lambda c: ours(c, options), lambda c: trl(c, loss, options))
    record("dpo", name, to_trl, difference(lambda c: ours(c, options), lambda c: paper(c, options)))


def test_bco_without_shift_is_trls():
    def ours_alone(case):
        chosen, rejected = case.pairs()
        return preference.bco_losses(chosen, rejected, beta=0.1, delta=torch.zeros(())).mean()

    options = dpo.Options()
    record("dpo", "BCO alone, shift 0", difference(ours_alone, lambda c: trl_dpo(c, "bco_pair", options)), 0.0)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("kl", [0.8, -0.3])
def test_kto(weights, kl):
    liked = torch.tensor([True, False, True, True, False, False, True, False, True, False])

    def of_ours(case):
        ratios = case.sums(case.policy - case.reference)
        point = torch.tensor(kl).clamp(min=0)
        return preference.kto_losses(ratios, liked, beta=0.3, kl=point, weights=weights).mean()

    def of_trl(case):
        from trl.trainer.kto_trainer import KTOTrainer

        trainer = Trainer(loss_type="kto", beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1],
                          _compute_kl_logps=lambda model, batch: torch.full((10,), kl))  # fmt: skip
        order = case._trl_rows()[torch.cumsum(torch.tensor([0, *case.counts[:-1]]), 0)]
        flags = torch.zeros(10, dtype=torch.bool).index_put((order,), liked)
        known = torch.zeros(10).index_put((order,), case.sums(case.reference))
        inputs = {
            "completion_mask": case.trl_mask(), "input_ids": case.trl_mask(), "attention_mask": case.trl_mask(),
            "label": flags, "ref_logps": known, "ref_KL_logps": torch.zeros(10),
        }  # fmt: skip
        tokens = case.trl_tokens(case.policy)
        return KTOTrainer._compute_loss(trainer, lambda **_: trl_outputs(tokens), inputs, False)

    def of_paper(case):
        point, total = max(0.0, kl), torch.zeros(())
        for ratio, is_liked in zip(case.sums(case.policy - case.reference), liked.tolist(), strict=True):
            value = sigma(0.3 * (ratio - point)) if is_liked else sigma(0.3 * (point - ratio))
            total = total + weights[0 if is_liked else 1] * (1 - value)
        return total / 10

    name = f"weights {weights[0]:g} and {weights[1]:g}, mean mismatched ratio {kl:g}"
    record("kto", name, difference(of_ours, of_trl), difference(of_ours, of_paper))


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_rm(margin):
    def of_ours(case):
        scores = case.sums(case.policy)
        return rm.ranking_losses(scores[::2], scores[1::2], margin).mean()

    def of_trl(case):
        from trl.trainer.reward_trainer import RewardTrainer

        trainer = Trainer(args=SimpleNamespace(center_rewards_coefficient=None))
        scores = case.sums(case.policy)
        logits = torch.cat([scores[::2], scores[1::2]])[:, None]
        inputs = {"attention_mask": torch.ones(10, 1), "margin": torch.full((PAIRS,), margin)}
        return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)

    def of_paper(case):
        scores = case.sums(case.policy)
        return torch.stack(
            [-torch.log(sigma(scores[2 * k] - scores[2 * k + 1] - margin)) for k in range(PAIRS)]
        ).mean()

    record("rm", f"margin {margin:g}", difference(of_ours, of_trl), difference(of_ours, of_paper))


def test_rm_margins_of_rows():
    margins = torch.tensor([0.0, 0.3, 1.0, 3.0, -0.5])

    def of_ours(case):
        scores = case.sums(case.policy)
        return rm.ranking_losses(scores[::2], scores[1::2], margins).mean()

    def of_trl(case):
        from trl.trainer.reward_trainer import RewardTrainer

        trainer = Trainer(args=SimpleNamespace(center_rewards_coefficient=None))
        scores = case.sums(case.policy)
        inputs = {"attention_mask": torch.ones(10, 1), "margin": margins}
        logits = torch.cat([scores[::2], scores[1::2]])[:, None]
        return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)

    def of_paper(case):
        scores, total = case.sums(case.policy), torch.zeros(())
        for place, margin in enumerate(margins.tolist()):
            total = total - torch.log(sigma(scores[2 * place] - scores[2 * place + 1] - margin))
        return total / PAIRS

    record("rm", "a margin in each row", difference(of_ours, of_trl), difference(of_ours, of_paper))


def test_rm_scores_of_rows():
    labels = torch.linspace(-20, 4, 2 * PAIRS)

    def of_ours(case):
        return rm.score_losses(case.sums(case.policy), labels).mean() / 100

    def of_formula(case):
        pairs = zip(case.sums(case.policy), labels.tolist(), strict=True)
        return sum((score - label) ** 2 for score, label in pairs) / (2 * PAIRS) / 100

    record("rm", "a score in each row", None, difference(of_ours, of_formula))


VOCAB, TARGETS = 40, torch.tensor([3, 0, 39, 17, 3, 21])


def tokens_of(seed: int, spread: float = 3.0) -> torch.Tensor:
    """Random logits of supervised tokens, `[targets, vocab]`."""
    return spread * torch.randn(len(TARGETS), VOCAB, generator=torch.Generator().manual_seed(seed))


def difference_of_tokens(first, second) -> float:
    """As `difference`, with the gradient by every logit."""
    found = []
    for compute in (first, second):
        logits = tokens_of(1).requires_grad_()
        value = compute(logits).mean()
        value.backward()
        found.append(torch.cat([value.detach()[None], logits.grad.flatten()]))
    return float((found[0] - found[1]).abs().max())


def logps_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(dim=-1).gather(1, TARGETS[:, None]).squeeze(1)


def trl_dft(logits: torch.Tensor) -> torch.Tensor:
    from trl.trainer.sft_trainer import SFTTrainer

    logps = torch.cat([torch.zeros(2), logps_of(logits)])[None]  # two tokens of a prompt
    is_target = torch.tensor([[False, False, *[True] * len(TARGETS)]])
    outputs = SimpleNamespace(
        log_probs=logps, label_mask=is_target, entropy=torch.zeros_like(logps), is_top1=is_target
    )
    args = SimpleNamespace(loss_type="dft", average_tokens_across_devices=False)
    trainer = Trainer(args=args, compute_loss_func=None, label_smoother=None)
    return SFTTrainer.compute_loss(trainer, lambda **_: outputs, {"attention_mask": torch.ones_like(is_target)})


def formula_of_tokens(logits: torch.Tensor, weigh, extra=lambda probs, place: 0.0) -> torch.Tensor:
    """Token by token: cross-entropy times a constant, and what is added to it."""
    total = torch.zeros(())
    for place, (row, target) in enumerate(zip(logits, TARGETS.tolist(), strict=True)):
        probs = torch.exp(row) / torch.exp(row).sum()
        weight = weigh(probs.detach(), target)
        total = total - weight * torch.log(probs[target]) + extra(probs, place)
    return total / len(TARGETS)


def entropy_weight(alpha: float):
    def weigh(probs: torch.Tensor, target: int) -> torch.Tensor:
        top = torch.sort(probs, descending=True).values[:20]
        top = top / top.sum()
        return (-(top * torch.log(top)).sum() / 3) ** alpha

    return weigh


def test_sft_dft():
    ours = lambda logits: sft.dft_losses(logps_of(logits))  # noqa: E731
    paper = lambda logits: formula_of_tokens(logits, lambda probs, target: probs[target])  # noqa: E731
    record("sft", "use_dft_loss", difference_of_tokens(ours, trl_dft), difference_of_tokens(ours, paper))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_sft_asft(alpha):
    anchor = tokens_of(2)

    def kl(probs: torch.Tensor, place: int) -> torch.Tensor:
        known = torch.exp(anchor[place]) / torch.exp(anchor[place]).sum()
        return alpha * (known * torch.log(known / probs)).sum()

    found = difference_of_tokens(
        lambda logits: sft.asft_losses(logits, TARGETS, anchor, alpha),
        lambda logits: formula_of_tokens(logits, lambda probs, target: probs[target], kl),
    )
    record("sft", f"use_asft_loss, asft_alpha {alpha:g}", None, found)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.7])
def test_sft_eaft(alpha):
    found = difference_of_tokens(
        lambda logits: sft.eaft_losses(logits, TARGETS, alpha),
        lambda logits: formula_of_tokens(logits, entropy_weight(alpha)),
    )
    record("sft", f"use_eaft_loss, eaft_alpha {alpha:g}", None, found)


def test_the_gradient_of_orpo_is_finite_at_the_ends():
    for value in (-1e-9, 0.0, -200.0):
        logps = torch.tensor([value], requires_grad=True)
        answers = Answers(logps=logps, lengths=torch.ones(1))
        other = Answers(logps=torch.tensor([-1.0]), lengths=torch.ones(1))
        loss = preference.orpo_losses(answers, other, beta=0.1).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logps.grad).all()


def record(stage: str, option: str, to_trl: float | None, to_paper: float) -> None:
    ROWS[stage, option] = (to_trl, to_paper)
    assert to_paper <= 1e-6
    assert to_trl is None or to_trl <= 1e-6


@pytest.fixture(scope="module", autouse=True)
def _table():
    yield
    if os.environ.get("WRITE_LOSS_ORACLES"):
        lines = [f"| {stage} | {name} | {'none' if trl is None else f'{trl:.1e}'} | {formula:.1e} |"
                 for (stage, name), (trl, formula) in ROWS.items()]  # fmt: skip
        head = TABLE.read_text(encoding="utf-8").split("| stage |")[0] if TABLE.exists() else ""
        table = ["| stage | option | to TRL | to the formula |", "|---|---|---|---|", *lines, ""]
        TABLE.write_text(head + "\n".join(table), encoding="utf-8")


def test_the_page_lists_every_case():
    text = TABLE.read_text(encoding="utf-8")
    missing = [f"{stage}: {name}" for stage, name in ROWS if f"| {stage} | {name} |" not in text]
    assert not missing or os.environ.get("WRITE_LOSS_ORACLES")
