"""Next-item losses over scores: full and sampled softmax, binary cross-entropy and its calibrated form.

Users: `strategies.next_item`; planned: the other strategies, generative heads.

All functions take scores of N supervised places, not of a whole padded batch: picking the places first keeps the
[N, I+1] scores as small as they can be. Padding (item 0) is never a class. Everything is computed in float32.

Sources: full softmax and shared negatives as in "Turning Dross Into Gold Loss" (RecSys 2023); gBCE, "gSASRec" (RecSys
2023); the sampling correction logQ is that of sampled softmax. Leaving negatives out of the mean when they hit the
target, instead of drawing them again, is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def full_softmax(
    scores: Tensor, targets: Tensor, *, excluded: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy over the whole catalogue, -s+ + logsumexp(s).

    Args:
        scores: [N, I+1]; column 0 is left out.
        targets: [N] item ids >= 1.
        excluded: [N, I+1] bool, True at items that are no class of that row; the target always stays one.
        label_smoothing: Share of the probability mass spread evenly over the catalogue; not with `excluded`.

    Returns:
        Scalar.

    Raises:
        ValueError: Both `excluded` and `label_smoothing` are used.
    """
    logits, classes = scores[:, 1:].float(), targets - 1
    if excluded is not None:
        if label_smoothing:
            raise ValueError("label_smoothing spreads mass over every item and cannot be used with excluded items")
        mask = excluded[:, 1:].scatter(1, classes[:, None], False)
        logits = logits.masked_fill(mask, float("-inf"))
    return F.cross_entropy(logits, classes, label_smoothing=label_smoothing)


def sampled_softmax(
    positive: Tensor,
    negatives: Tensor,
    *,
    hits: Tensor | None = None,
    log_q_positive: Tensor | None = None,
    log_q_negatives: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the target against K sampled items.

    Args:
        positive: [N] scores of the targets.
        negatives: [N, K] scores of the sampled items.
        hits: [N, K] bool, True where a sampled item must not count as negative.
        log_q_positive, log_q_negatives: [N] and [N, K] (or [K]), log of the expected number of draws of each item;
            subtracted from the scores (the logQ correction). Needed only when items are not drawn uniformly.

    Returns:
        Scalar.
    """
    positive, negatives = positive.float(), negatives.float()
    if log_q_positive is not None:
        positive = positive - log_q_positive
    if log_q_negatives is not None:
        negatives = negatives - log_q_negatives
    if hits is not None:
        negatives = negatives.masked_fill(hits, float("-inf"))
    return (torch.cat([positive[:, None], negatives], dim=1).logsumexp(1) - positive).mean()


def binary_cross_entropy(positive: Tensor, negatives: Tensor, *, hits: Tensor | None = None) -> Tensor:
    """Mean over places of -(ln sig(s+) + sum_k ln(1 - sig(s-_k))) / (K + 1); arguments as in `sampled_softmax`."""
    return calibrated_cross_entropy(positive, negatives, 1.0, hits=hits)


def calibrated_cross_entropy(positive: Tensor, negatives: Tensor, beta: float, *, hits: Tensor | None = None) -> Tensor:
    """gBCE: -(beta ln sig(s+) + sum_k ln(1 - sig(s-_k))) / (K + 1), averaged over places.

    The power of the paper, sig(s+)^beta, is taken as a factor of the log: equal to its transformed logit, and finite
    for every score.

    Args:
        positive: [N] scores of the targets.
        negatives: [N, K] scores of the sampled items.
        beta: See `gbce_beta`.
        hits: [N, K] bool, True where a sampled item must not count as negative (K shrinks for that row).

    Returns:
        Scalar.
    """
    positive, negatives = positive.float(), negatives.float()
    terms = F.logsigmoid(-negatives)
    count = torch.full_like(positive, float(negatives.shape[1]))
    if hits is not None:
        terms = terms.masked_fill(hits, 0.0)
        count = (~hits).sum(1).to(positive.dtype)
    return -((beta * F.logsigmoid(positive) + terms.sum(1)) / (count + 1)).mean()


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """beta = 1 - t (1 - alpha) with the sampling rate alpha = K / (I - 1): 1 for t = 0 (plain BCE), alpha for t = 1.

    Raises:
        ValueError: t is outside 0..1.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"gbce_t: found {t}, expected a number from 0 (plain) to 1 (fully calibrated)")
    alpha = min(1.0, num_negatives / max(1, num_items - 1))
    return 1 - t * (1 - alpha)


def draw_negatives(num_items: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Items 1..I drawn uniformly with replacement, where the generator lives, then moved to `device`."""
    drawn = torch.randint(1, num_items + 1, shape, generator=generator, device=generator.device)
    return drawn.to(device)


def accidental_hits(negatives: Tensor, targets: Tensor, histories: Tensor | None = None) -> Tensor:
    """Which sampled items are the target itself, or (optionally) already in the history.

    Args:
        negatives: [K], shared by all places, or [N, K].
        targets: [N].
        histories: [N, S] item ids, 0 = nothing.

    Returns:
        [N, K] bool.
    """
    wide = negatives.expand(len(targets), -1) if negatives.dim() == 1 else negatives
    hits = wide == targets[:, None]
    if histories is None or not histories.shape[1]:
        return hits
    # A sorted search needs N K log S steps where comparing all pairs needs N K S.
    ordered = histories.sort(dim=1).values
    place = torch.searchsorted(ordered, wide.contiguous()).clamp(max=ordered.shape[1] - 1)
    return hits | (ordered.gather(1, place) == wide)


def mean_scores(positive: Tensor, negatives: Tensor, hits: Tensor | None = None) -> dict[str, Tensor]:
    """For the log: mean score of targets and of counted negatives, detached."""
    negatives = negatives.detach().float()
    counted = torch.ones_like(negatives) if hits is None else (~hits).float()
    mean = (negatives * counted).sum() / counted.sum().clamp(min=1)
    return {"positive_score": positive.detach().float().mean(), "negative_score": mean}
