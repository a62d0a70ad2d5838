"""Reading a sequence of states, and turning scores into ranked items.

Users: every encoder, every generative head, LLM recommenders.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_last(hidden: Tensor, lengths: Tensor) -> Tensor:
    """State of the last real position: [B, L, d], [B] -> [B, d] (right padded input)."""
    return hidden[torch.arange(len(lengths), device=hidden.device), lengths.to(hidden.device) - 1]


def padding_mask(lengths: Tensor, width: int) -> Tensor:
    """[B, width] bool, True at real positions of right padded rows."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def left_align(values: Tensor, lengths: Tensor) -> Tensor:
    """Right padded [B, L, ...] -> left padded, for models whose last column must be the latest event."""
    width = values.shape[1]
    source = torch.arange(width, device=values.device)[None, :] - (width - lengths[:, None])
    index = source.clamp(min=0)
    shape = (*index.shape, *([1] * (values.dim() - 2)))
    moved = values.gather(1, index.reshape(shape).expand(*index.shape, *values.shape[2:]))
    return moved * (source >= 0).reshape(shape).to(values.dtype)


def right_align(values: Tensor, lengths: Tensor) -> Tensor:
    """Left padded [B, L, ...] -> right padded: the inverse of `left_align`."""
    width = values.shape[1]
    source = torch.arange(width, device=values.device)[None, :] + (width - lengths[:, None])
    index = source.clamp(max=width - 1)
    shape = (*index.shape, *([1] * (values.dim() - 2)))
    moved = values.gather(1, index.reshape(shape).expand(*index.shape, *values.shape[2:]))
    return moved * (source < width).reshape(shape).to(values.dtype)


def mask_items(scores: Tensor, *, seen: Tensor | None = None) -> Tensor:
    """A copy of [B, I+1] float scores with padding (column 0) and `seen` [B, S] at -inf."""
    scores = scores.float().clone()
    if seen is not None:
        scores.scatter_(1, seen, float("-inf"))
    scores[:, 0] = float("-inf")
    return scores


def top_items(
    scores: Tensor, k: int, *, seen: Tensor | None = None, candidates: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best items per row, never a seen item, never padding, only candidates where those are given.

    Args:
        scores: [B, I+1], or [B, C] aligned with `candidates`.
        k: How many; fewer are valid when fewer items remain.
        seen: [B, S] item ids never to recommend, padded with 0.
        candidates: [B, C] item ids, padded with 0.

    Returns:
        item ids [B, k] (0 where invalid), scores [B, k] (-inf where invalid), valid [B, k].
    """
    if candidates is not None:
        masked = scores.float().masked_fill(candidates == 0, float("-inf"))
        if seen is not None:
            masked = masked.masked_fill((candidates[:, :, None] == seen[:, None, :]).any(-1), float("-inf"))
    else:
        masked = mask_items(scores, seen=seen)
    width = min(k, masked.shape[1])
    best, index = masked.topk(width, dim=1)
    item_ids = index if candidates is None else candidates.gather(1, index)
    valid = torch.isfinite(best)
    item_ids = item_ids.masked_fill(~valid, 0)
    if width < k:
        pad = (0, k - width)
        item_ids = torch.nn.functional.pad(item_ids, pad)
        best = torch.nn.functional.pad(best, pad, value=float("-inf"))
        valid = torch.nn.functional.pad(valid, pad)
    return item_ids, best, valid


@torch.inference_mode()
def ranked_rows(system: object, batch: object, k: int) -> list[list[tuple[int, float]]]:
    """`system.recommend(batch, k)` in evaluation mode as plain (item id, score) lists, valid entries only."""
    if isinstance(system, torch.nn.Module):
        system.eval()
    ranking = system.recommend(batch, k)  # type: ignore[attr-defined]
    rows = zip(ranking.item_ids.tolist(), ranking.scores.tolist(), ranking.valid.tolist(), strict=True)
    return [[(item, score) for item, score, good in zip(*row, strict=True) if good] for row in rows]


@torch.inference_mode()
def ranked_candidates(system: object, batch: object) -> list[list[tuple[int, float]]]:
    """`batch["candidates"]` by `system.score_candidates` as plain (item id, score) lists, best first, no padding."""
    if isinstance(system, torch.nn.Module):
        system.eval()
    scores = system.score_candidates(batch).float()  # type: ignore[attr-defined]
    pool = batch["candidates"].to(scores.device)  # type: ignore[index]
    best, order = scores.sort(dim=1, descending=True, stable=True)
    rows = zip(pool.gather(1, order).tolist(), best.tolist(), strict=True)
    return [[(item, score) for item, score in zip(*row, strict=True) if item] for row in rows]
