"""Losses: against the formulas, and against each other where they must meet."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.blocks.losses import (
    accidental_hits,
    binary_cross_entropy,
    calibrated_cross_entropy,
    draw_negatives,
    full_softmax,
    gbce_beta,
    mean_scores,
    sampled_softmax,
)

N, ITEMS, K = 6, 9, 4


def scores(seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(N, ITEMS + 1, generator=torch.Generator().manual_seed(seed))


def targets() -> Tensor:
    return torch.tensor([1, 9, 3, 3, 5, 7])


def pairs(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Positive [N] and negative [N, K] scores in float64."""
    generator = torch.Generator().manual_seed(1)
    return (scale * torch.randn(N, generator=generator, dtype=torch.float64),
            scale * torch.randn(N, K, generator=generator, dtype=torch.float64))  # fmt: skip


def test_full_softmax_is_the_formula_without_padding() -> None:
    s = scores()
    s[:, 0] = 100.0  # would win if it were a class
    expected = (torch.logsumexp(s[:, 1:], 1) - s.gather(1, targets()[:, None])[:, 0]).mean()
    torch.testing.assert_close(full_softmax(s, targets()), expected)


def test_full_softmax_gives_padding_no_gradient() -> None:
    s = scores().requires_grad_()
    full_softmax(s, targets(), label_smoothing=0.1).backward()
    assert s.grad is not None and not s.grad[:, 0].any() and s.grad[:, 1:].abs().min() > 0


def test_label_smoothing_mixes_with_the_uniform_loss() -> None:
    logs = scores()[:, 1:].log_softmax(1)
    expected = 0.8 * full_softmax(scores(), targets()) - 0.2 * logs.mean()
    torch.testing.assert_close(full_softmax(scores(), targets(), label_smoothing=0.2), expected)


def test_excluded_items_are_no_classes_but_the_target_stays() -> None:
    s, excluded = scores(), torch.zeros(N, ITEMS + 1, dtype=torch.bool)
    excluded[:, [1, 2, 3]] = True
    total = 0.0
    for row, target in enumerate(targets().tolist()):
        classes = [i for i in range(1, ITEMS + 1) if i not in (1, 2, 3) or i == target]
        total += float(torch.logsumexp(s[row, classes], 0) - s[row, target])
    torch.testing.assert_close(full_softmax(s, targets(), excluded=excluded), torch.tensor(total / N))
    with pytest.raises(ValueError, match="label_smoothing"):
        full_softmax(s, targets(), excluded=excluded, label_smoothing=0.1)


def test_5_all_other_items_as_negatives_equal_full_softmax() -> None:
    s = scores()
    others = torch.tensor([[i for i in range(1, ITEMS + 1) if i != t] for t in targets().tolist()])
    positive = s.gather(1, targets()[:, None])[:, 0]
    torch.testing.assert_close(sampled_softmax(positive, s.gather(1, others)), full_softmax(s, targets()))
    everything = torch.arange(1, ITEMS + 1)
    hits = accidental_hits(everything, targets())
    torch.testing.assert_close(sampled_softmax(positive, s[:, 1:], hits=hits), full_softmax(s, targets()))


def test_log_q_turns_skewed_draws_into_the_full_softmax() -> None:
    """Items drawn in proportion to q and corrected by ln(K q) estimate the full sum without bias."""
    s, q = scores(scale=1.0).double(), torch.arange(1, ITEMS + 1).double()
    q /= q.sum()
    draws = torch.multinomial(q, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    log_q = (len(draws) * q).log()
    positive = s.gather(1, targets()[:, None])[:, 0]
    hits = accidental_hits(draws + 1, targets())
    found = sampled_softmax(positive, s[:, 1:][:, draws], hits=hits, log_q_negatives=log_q[draws])
    torch.testing.assert_close(found.float(), full_softmax(s, targets()), rtol=5e-3, atol=5e-3)


def test_log_q_shifts_cancel() -> None:
    positive, negatives = pairs()
    shifted = sampled_softmax(
        positive, negatives, log_q_positive=torch.full((N,), 2.0), log_q_negatives=torch.full((K,), 2.0)
    )
    torch.testing.assert_close(shifted, sampled_softmax(positive, negatives))


def test_bce_with_one_negative_is_the_published_loss_over_two() -> None:
    positive, negatives = pairs()
    negatives = negatives[:, :1]
    expected = (-F.logsigmoid(positive) - torch.log(1 - negatives[:, 0].sigmoid())).mean() / 2
    torch.testing.assert_close(binary_cross_entropy(positive, negatives).double(), expected, rtol=1e-5, atol=1e-6)


def test_4_gbce_without_calibration_is_bce_and_beta_has_its_ends() -> None:
    positive, negatives = pairs()
    assert gbce_beta(256, 1000, 0.0) == 1.0
    assert gbce_beta(256, 1000, 1.0) == pytest.approx(256 / 999)
    alpha, t = 256 / 999, 0.75
    assert gbce_beta(256, 1000, t) == pytest.approx(alpha * (t * (1 - 1 / alpha) + 1 / alpha))
    assert gbce_beta(5000, 1000, 0.9) == 1.0
    plain = calibrated_cross_entropy(positive, negatives, gbce_beta(K, ITEMS, 0.0))
    torch.testing.assert_close(plain, binary_cross_entropy(positive, negatives), rtol=0, atol=0)
    with pytest.raises(ValueError, match="gbce_t: found 1.5"):
        gbce_beta(256, 1000, 1.5)


def test_4_direct_form_equals_the_transformed_logit() -> None:
    """The paper's reference moves the positive logit to ln(1 / (sig(s)^-beta - 1)) and applies plain BCE."""
    s = torch.linspace(-15, 15, 301, dtype=torch.float64)
    for beta in (0.05, 0.3, 0.8, 1.0):
        transformed = torch.log(1 / (s.sigmoid().pow(-beta) - 1))
        torch.testing.assert_close(beta * F.logsigmoid(s), F.logsigmoid(transformed), rtol=0, atol=1e-6)
        none = torch.zeros(1, 0)
        for value in s[::60]:
            direct = calibrated_cross_entropy(value[None], none, beta)
            assert float(direct) == pytest.approx(-beta * float(F.logsigmoid(value)), rel=1e-5, abs=1e-6)


def test_gbce_is_the_formula() -> None:
    positive, negatives = pairs()
    expected = -(0.4 * F.logsigmoid(positive) + torch.log(1 - negatives.sigmoid()).sum(1)).mean() / (K + 1)
    found = calibrated_cross_entropy(positive, negatives, 0.4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "bce"])
def test_hits_count_as_if_never_drawn(name: str) -> None:
    positive, negatives = pairs()
    loss = sampled_softmax if name == "softmax" else binary_cross_entropy
    hits = torch.zeros(N, K, dtype=torch.bool)
    hits[:, 2] = True
    torch.testing.assert_close(loss(positive, negatives, hits=hits), loss(positive, negatives[:, [0, 1, 3]]))


@pytest.mark.parametrize("size", [50.0, 1e4])
def test_extreme_scores_stay_finite(size: float) -> None:
    positive = torch.tensor([-size, size], requires_grad=True)
    negatives = torch.tensor([[size, -size], [-size, size]], requires_grad=True)
    everything = torch.tensor([[0.0, -size, size], [0.0, size, -size]], requires_grad=True)
    total = (
        calibrated_cross_entropy(positive, negatives, 0.3)
        + sampled_softmax(positive, negatives)
        + full_softmax(everything, torch.tensor([1, 2]))
    )
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(x.grad).all() for x in (positive, negatives, everything))  # type: ignore[union-attr]


def test_draws_cover_items_evenly_and_never_padding() -> None:
    drawn = draw_negatives(ITEMS, (90_000,), torch.Generator().manual_seed(0), torch.device("cpu"))
    counts = torch.bincount(drawn, minlength=ITEMS + 1)
    assert counts[0] == 0 and len(counts) == ITEMS + 1
    assert (counts[1:] / 10_000 - 1).abs().max() < 0.05
    again = draw_negatives(ITEMS, (90_000,), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(drawn, again)


def test_accidental_hits_by_comparing_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    histories = torch.randint(0, 30, (N, 7), generator=generator)
    for shape in ((K,), (N, K)):
        negatives = torch.randint(1, 30, shape, generator=generator)
        wide = negatives.expand(N, K)
        known = (wide[:, :, None] == histories[:, None, :]).any(-1)
        assert torch.equal(accidental_hits(negatives, targets()), wide == targets()[:, None])
        assert torch.equal(accidental_hits(negatives, targets(), histories), known | (wide == targets()[:, None]))


def test_mean_scores_leave_hits_out() -> None:
    negatives, hits = torch.tensor([[1.0, 9.0], [3.0, 2.0]]), torch.tensor([[False, True], [False, False]])
    parts = mean_scores(torch.tensor([1.0, 3.0]), negatives, hits)
    assert parts["positive_score"] == 2 and parts["negative_score"] == 2
    nothing_counts = mean_scores(torch.ones(1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert math.isfinite(nothing_counts["negative_score"])
