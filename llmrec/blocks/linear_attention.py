"""Decayed linear attention: one operator in a quadratic, a chunked, a scanned and a recurrent form.

    S_i = exp(-d_i) S_{i-1} + k_i v_i^T        y_i = q_i S_i        d_i >= 0, the decay between event i - 1 and event i
    y_i = sum_{j <= i} exp(-(d_{j+1} + ... + d_i)) (q_i . k_j) v_j

No softmax, no normaliser, no 1/sqrt(d_k). What decays between the last event and a query time belongs into q.

    form        function                          time                    for
    quadratic   `quadratic_form`                  O(L^2 (d_k + d_v))      short inputs; the reference of the tests
    chunked     `chunked_form`                    O(L (c + d_k) d_v)      training and prefill, matrix products
    scanned     `channel_scan`                    O(L F d)                few features (F = 2) per value channel
    recurrent   `step_state`, `read_state`        O(d_k d_v) an event     decoding; `final_state` starts from a history

Decays enter as differences only, never as exp(+F) exp(-F): that factored form overflows. Padding stands on the right
and reaches no real position; `final_state` leaves it out by its weights.

Users: `encoders.fuxi_linear` (three channels); planned: further encoders with a constant-size state.

Source of the chunked form: FuXi-Linear (arXiv 2602.23671), as in RetNet and other linear attentions. The scanned form
is ours.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def pairwise_decay(log_decay: Tensor) -> Tensor:
    """Weights of all pairs of positions.

    Args:
        log_decay: [..., L], d.

    Returns:
        [..., L, L]: exp(-(d_{j+1} + ... + d_i)) at (i, j) for j <= i, 0 above the diagonal. The sum is taken over the
        steps between two events, so it is exact for neighbours after any total.
    """
    width = log_decay.shape[-1]
    steps = log_decay.unsqueeze(-1).expand(*log_decay.shape, width).tril(-1)
    return steps.cumsum(-2).neg().exp().tril()


def quadratic_form(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The operator as one masked matrix of scores.

    Args:
        query, key: [..., L, d_k].
        value: [..., L, d_v].
        log_decay: d, [..., L], or [..., 1] for the same decay at every step; None is no decay. Leading dimensions of
            all four broadcast.

    Returns:
        [..., L, d_v].
    """
    scores = query @ key.transpose(-1, -2)
    if log_decay is None:
        return scores.tril() @ value
    weights = pairwise_decay(log_decay.expand(*log_decay.shape[:-1], query.shape[-2]))
    return (scores * weights.to(scores.dtype)) @ value


def chunked_form(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None, *, chunk_size: int
) -> Tensor:
    """The operator in chunks: the quadratic form inside each, a state between them.

    Chunks are of equal length, at most `chunk_size`: 200 positions in chunks of 128 become 2 x 100, without padding.

    Args:
        query, key, value, log_decay: As for `quadratic_form`.
        chunk_size: c, the longest chunk. An input that fits into one is the quadratic form.

    Returns:
        [..., L, d_v].
    """
    width = query.shape[-2]
    chunks = -(-width // chunk_size)
    if chunks <= 1:
        return quadratic_form(query, key, value, log_decay)
    size = -(-width // chunks)
    query, key, value = (_chunks(x, chunks, size, -2) for x in (query, key, value))  # [..., n, c, d]
    if log_decay is not None:
        uniform = log_decay.shape[-1] == 1
        shape = (*log_decay.shape[:-1], 1, size)
        log_decay = log_decay.unsqueeze(-1).expand(shape) if uniform else _chunks(log_decay, chunks, size, -1)
    within = quadratic_form(query, key, value, log_decay)
    between = _between_chunks(query[..., 1:, :, :], key[..., :-1, :, :], value[..., :-1, :, :], log_decay)
    first, later = within.split([1, chunks - 1], dim=-3)
    mixed = torch.cat([first, later + between], dim=-3).flatten(-3, -2)
    return mixed[..., :width, :]


def _chunks(x: Tensor, chunks: int, size: int, dim: int) -> Tensor:
    """Split a dimension (-1 or -2) into chunks, with zeros behind the end where needed."""
    missing = chunks * size - x.shape[dim]
    if missing:
        x = F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing))
    return x.unflatten(dim, (chunks, size))


def _between_chunks(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> Tensor:
    """What chunks 1..n-1 read from the chunks before them.

    Args:
        query: [..., n-1, c, d_k] of chunks 1..n-1.
        key, value: [..., n-1, c, d] of chunks 0..n-2.
        log_decay: [..., n or 1, c] of all chunks.

    Returns:
        [..., n-1, c, d_v].
    """
    if log_decay is None:
        return query @ (key.transpose(-1, -2) @ value).cumsum(-3)
    total = log_decay.cumsum(-1)
    # To the end of the chunk, without the event's own step; summed from the end, since a difference of totals is rough.
    after = F.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    several = log_decay.shape[-2] > 1
    before, after = (total[..., 1:, :], after[..., :-1, :]) if several else (total, after)
    after, before = (x.neg().exp().unsqueeze(-1).to(key.dtype) for x in (after, before))
    updates = (key * after).transpose(-1, -2) @ value  # [..., n-1, d_k, d_v]
    kept = (total[..., 1:-1, -1] if several else total[..., -1]).neg().exp()[..., None, None]
    kept = kept.expand(*kept.shape[:-3], updates.shape[-3] - 1, 1, 1)
    states = [updates[..., 0, :, :]]
    for step in range(1, updates.shape[-3]):
        states.append(updates[..., step, :, :] + kept[..., step - 1, :, :].to(updates.dtype) * states[-1])
    return (query * before) @ torch.stack(states, dim=-3)


def final_state(key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """The state after a whole history, in one product.

    Args:
        key: [..., L, d_k].
        value: [..., L, d_v].
        weights: [..., L], what is left of each event at the end, exp(-(d_{j+1} + ... + d_end)); 0 for events (and
            padding) that do not belong to the history.

    Returns:
        [..., d_k, d_v].
    """
    return (key * weights.unsqueeze(-1)).transpose(-1, -2) @ value


def step_state(state: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The state after one more event.

    Args:
        state: [..., d_k, d_v].
        key: [..., d_k].
        value: [..., d_v].
        log_decay: [...], the decay since the event before; None is no decay.

    Returns:
        [..., d_k, d_v], a new tensor.
    """
    kept = state if log_decay is None else state * log_decay.neg().exp()[..., None, None]
    return kept + key.unsqueeze(-1) * value.unsqueeze(-2)


def read_state(state: Tensor, query: Tensor) -> Tensor:
    """[..., d_k, d_v], [..., d_k] -> [..., d_v]."""
    return (query.unsqueeze(-2) @ state).squeeze(-2)


def channel_scan(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, chunk_size: int = 128) -> Tensor:
    """The operator for few features, as a scan along the history: no matrix of pairs, few passes over F d numbers.

    Every value channel has its own features and decay (a head of width d_v repeats them d_v times). A history longer
    than a chunk is scanned in all chunks at once, then the chunks are joined: c + L / c steps one after the other.

    Args:
        query, key: [B, L, F, d], F features of each channel.
        value: [B, L, d].
        kept: [B, L, d], exp(-d_i), what is left of the state since the event before.
        chunk_size: c.

    Returns:
        [B, L, d]. First derivatives only.
    """
    mixed: Tensor = _ChannelScan.apply(query, key, value, kept, chunk_size)  # type: ignore[no-untyped-call]
    return mixed


class _ChannelScan(torch.autograd.Function):
    """S_i = w_i S_{i-1} + k_i v_i per channel and feature, y_i = sum_f q_i S_i; the gradient is the scan backwards."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, chunk_size: int
    ) -> Tensor:
        states = key * value.unsqueeze(-2)  # [B, L, F, d]
        _scan_(states, kept.unsqueeze(-2), chunk_size)
        ctx.save_for_backward(query, key, value, kept, states)
        ctx.chunk_size = chunk_size
        return _dot(query, states)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, kept, states = ctx.saved_tensors
        wants_query, wants_key, wants_value, wants_kept, _ = ctx.needs_input_grad
        grad_states = query * grad.unsqueeze(-2)
        following = torch.cat([kept[:, 1:], kept[:, :1]], dim=1)  # the last one is not used
        _scan_(grad_states, following.unsqueeze(-2), ctx.chunk_size, backwards=True)
        grad_kept = None
        if wants_kept:
            grad_kept = torch.zeros_like(kept)
            grad_kept[:, 1:] = _dot(grad_states[:, 1:], states[:, :-1])
        return (
            states * grad.unsqueeze(-2) if wants_query else None,
            grad_states * value.unsqueeze(-2) if wants_key else None,
            _dot(key, grad_states) if wants_value else None,
            grad_kept,
            None,
        )


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[B, L, F, d] twice -> [B, L, d]: the sum over features, without the product of all of them in memory."""
    total = left[:, :, 0] * right[:, :, 0]
    for feature in range(1, left.shape[2]):
        total.addcmul_(left[:, :, feature], right[:, :, feature])
    return total


def _scan_(x: Tensor, kept: Tensor, chunk_size: int, *, backwards: bool = False) -> None:
    """In place along dimension 1: x[i] += kept[i] * x[i-1], or x[i] += kept[i] * x[i+1] from the end.

    Args:
        x: [B, L, F, d].
        kept: [B, L, 1, d].
        chunk_size: Positions scanned one after the other.
        backwards: From the last position to the first.
    """
    width = x.shape[1]
    chunks = width // chunk_size
    if chunks <= 1:
        _run_(x.unbind(1), kept.unbind(1), backwards)
        return
    # Whole chunks come first in the order of the scan; what is left over is scanned behind them.
    spare = width - chunks * chunk_size
    whole = slice(spare, width) if backwards else slice(0, width - spare)
    blocks, weights = (y[:, whole].unflatten(1, (chunks, chunk_size)) for y in (x, kept))
    _run_(blocks.unbind(2), weights.unbind(2), backwards)
    carried = weights.clone()  # what a position keeps of the state at the end of the chunk before
    for before, here in pairwise(_order(carried.unbind(2), backwards)):
        here.mul_(before)
    edge = 0 if backwards else chunk_size - 1
    joined = zip(_order(blocks.unbind(1), backwards), _order(carried.unbind(1), backwards), strict=True)
    for (before, _), (here, weight) in pairwise(joined):
        here.addcmul_(weight, before[:, edge : edge + 1])
    rest = slice(0, spare + 1) if backwards else slice(width - spare - 1, width)
    _run_(x[:, rest].unbind(1), kept[:, rest].unbind(1), backwards)


def _run_(x: tuple[Tensor, ...], kept: tuple[Tensor, ...], backwards: bool) -> None:
    """One step after the other."""
    steps = zip(_order(x, backwards), _order(kept, backwards), strict=True)
    for (before, _), (here, weight) in pairwise(steps):
        here.addcmul_(weight, before)


def _order(x: tuple[Tensor, ...], backwards: bool) -> tuple[Tensor, ...]:
    return x[::-1] if backwards else x
