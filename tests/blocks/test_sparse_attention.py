"""Sparse attention: both implementations against a query-by-query reference, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmrec.blocks.sparse_attention import SparsePattern, attend_dense, attend_gather, select_blocks

PATTERNS = (SparsePattern(), SparsePattern(block=4, selected=2, window=3), SparsePattern(4, 3, 8, sink=True))
INPUTS = ("query", "key", "value", "gates", "scores")


def sample(length: int, pattern: SparsePattern, dtype: torch.dtype = torch.float32, rows: int = 3) -> list[Tensor]:
    """Query, key, value, gates and block scores: 2 key heads, 2 query heads each, width 4."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((rows, 2, 2, length, 4), (rows, 2, length, 4), (rows, 2, length, 4), (rows, 2, 2, length, 2))
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    tensors[3] = tensors[3].sigmoid()
    tensors.append(torch.randn(rows, 2, length, length // pattern.block, generator=generator, dtype=dtype))
    return [tensor.requires_grad_() for tensor in tensors]


def by_hand(query: Tensor, key: Tensor, value: Tensor, gates: Tensor, scores: Tensor, pattern: SparsePattern) -> Tensor:
    """One query at a time, keys listed one by one, gates of selected blocks multiplied in."""
    out = []
    for b, h, g, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:4])).tolist():
        own = i // pattern.block
        importance = scores[b, h, i, :own].softmax(-1)
        best = importance.topk(min(pattern.selected, own)).indices.tolist()
        allowed = [(j, importance[w]) for w in best for j in range(w * pattern.block, (w + 1) * pattern.block)]
        allowed += [(j, torch.ones(())) for j in range(own * pattern.block, i + 1)]
        keys = torch.tensor([j for j, _ in allowed])
        gate = torch.stack([p - p.detach() + 1 for _, p in allowed]).to(query.dtype)
        weights = (key[b, h, keys] @ query[b, h, g, i]).exp() * gate
        long = weights / weights.sum() @ value[b, h, keys]
        near = [
            j for j in range(i + 1)
            if i - j < pattern.window or (i - j) & (i - j - 1) == 0 or (pattern.sink and j == 0)
        ]  # fmt: skip
        short = (key[b, h, near] @ query[b, h, g, i]).softmax(-1) @ value[b, h, near]
        out.append(gates[b, h, g, i, 0] * long + gates[b, h, g, i, 1] * short)
    return torch.stack(out).view_as(query)


@pytest.mark.parametrize("attend", [attend_dense, attend_gather])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients_are_those_of_the_reference(attend: object, pattern: SparsePattern) -> None:
    tensors = sample(48, pattern, torch.float64, rows=1)
    weight = torch.randn(1, 2, 2, 48, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = by_hand(*tensors, pattern)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    *inputs, scores = tensors
    found = attend(*inputs, select_blocks(scores, pattern, straight_through=True), pattern)  # type: ignore[operator]
    torch.testing.assert_close(found, expected)
    for name, one, other in zip(INPUTS, torch.autograd.grad((found * weight).sum(), tensors), wanted, strict=True):
        # Importances are computed in float32 whatever the dtype.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("length", [16, 64, 208])
@pytest.mark.parametrize("sink", [False, True])
def test_implementations_agree_in_float32(length: int, sink: bool) -> None:
    """To 1e-5, forward and backward, over one piece and over several."""
    pattern = SparsePattern(sink=sink)
    *inputs, scores = sample(length, pattern, rows=4)
    selection = select_blocks(scores, pattern, straight_through=True)
    results = [attend(*inputs, selection, pattern) for attend in (attend_dense, attend_gather)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(r.square().mean(), [*inputs, scores], retain_graph=True) for r in results]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_implementations_agree_in_bfloat16() -> None:
    """Within two roundings of outputs of the sizes trained states have."""
    pattern = SparsePattern()
    *inputs, scores = (tensor.detach().bfloat16() * 0.1 for tensor in sample(64, pattern))
    selection = select_blocks(scores, pattern, straight_through=False)
    dense, gather = (attend(*inputs, selection, pattern) for attend in (attend_dense, attend_gather))
    assert dense.dtype == gather.dtype == torch.bfloat16
    torch.testing.assert_close(dense, gather, rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [1, 6, 8])
def test_short_keys_are_counted(window: int) -> None:
    pattern, length = SparsePattern(window=window), 300
    index, visible = pattern.short_keys(length)
    powers = [1 << m for m in range(10)]
    for i in range(length):
        keys = index[i][visible[i]].tolist()
        assert len(keys) == len(set(keys)) == min(i + 1, window) + sum(window <= p <= i for p in powers)
    assert SparsePattern(window=window, sink=True).short_keys(length)[1].sum(1)[299] == visible.sum(1)[299] + 1


def test_selected_blocks_are_past_and_distinct() -> None:
    pattern = SparsePattern(block=4, selected=3)
    scores = sample(64, pattern)[-1]
    blocks, bias = select_blocks(scores, pattern, straight_through=True)
    live = torch.isfinite(bias)
    own = (torch.arange(64) // 4)[None, None, :, None].expand_as(blocks)
    assert (blocks[live] < own[live]).all() and (bias[live] == 0).all()
    assert (live.sum(-1) == own[..., 0].clamp(max=3)).all()
    assert all(len(set(row)) == 3 for row in blocks.flatten(0, 2).tolist())


@pytest.mark.parametrize("attend", [attend_dense, attend_gather])
def test_void_entries_have_no_weight(attend: object) -> None:
    """Blocks of importance below 1e-10 are not read, though there is room for them."""
    pattern = SparsePattern(block=4, selected=3)
    *inputs, scores = (tensor.detach() for tensor in sample(32, pattern))
    scores[..., 1:] = -100.0
    scores[..., 0] = 100.0
    selection = select_blocks(scores, pattern, straight_through=True)
    assert torch.isfinite(selection.bias).sum(-1)[..., 4:].eq(1).all()
    before = attend(*inputs, selection, pattern)  # type: ignore[operator]
    query, key, value, gates = inputs
    value = value.clone()
    value[:, :, 4:28] += 100.0
    gates = torch.stack([torch.ones_like(gates[..., 0]), torch.zeros_like(gates[..., 0])], -1)
    only_long = attend(query, key, value, gates, selection, pattern)  # type: ignore[operator]
    unchanged = attend(query, key, inputs[2], gates, selection, pattern)  # type: ignore[operator]
    torch.testing.assert_close(only_long[..., 28:, :], unchanged[..., 28:, :])
    assert torch.isfinite(before).all()


def test_literal_selection_has_no_gradient() -> None:
    *_, scores = sample(32, SparsePattern(block=4))
    assert not select_blocks(scores, SparsePattern(block=4), straight_through=False).bias.requires_grad


def test_a_single_block_leaves_nothing_to_select() -> None:
    """Nothing to select: the one entry per query is void."""
    selection = select_blocks(torch.zeros(1, 1, 16, 1), SparsePattern(), straight_through=False)
    assert selection.blocks.shape == (1, 1, 16, 1)
    assert torch.isneginf(selection.bias).all()
