"""Attention: the two implementations agree, masks hide what they say, dropout works in training only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmrec.blocks.attention import MultiHeadAttention, attend
from llmrec.blocks.feedforward import FeedForward


def sample(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, 2, 5, 4, generator=generator)
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """One query at a time; visible [B, 5, 5]."""
    out = torch.zeros_like(query)
    for b in range(2):
        for h in range(2):
            for t in range(5):
                keep = visible[b, t].nonzero()[:, 0]
                weights = torch.softmax(key[b, h, keep] @ query[b, h, t] / math.sqrt(4), 0)
                out[b, h, t] = weights @ value[b, h, keep]
    return out


@pytest.mark.parametrize("implementation", ["sdpa", "math"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_the_formula(implementation: str, causal: bool, masked: bool) -> None:
    query, key, value = sample()
    key_mask = torch.tensor([[True] * 5, [True, True, True, False, False]]) if masked else None
    visible = torch.ones(2, 5, 5, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    visible = visible & key_mask[:, None, :] if key_mask is not None else visible
    found = attend(query, key, value, causal=causal, key_mask=key_mask, implementation=implementation)
    torch.testing.assert_close(found, by_hand(query, key, value, visible), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_dropout_keeps_the_mean_and_is_off_in_evaluation(implementation: str) -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, dropout=0.5, implementation=implementation)
    x = torch.randn(1, 5, 8)
    assert (layer(x) - layer(x)).abs().max() > 1e-3
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    assert (mean - layer(x)).abs().max() < 0.05


def test_keys_and_values_may_come_from_elsewhere() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2).eval()
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x, x), layer(x), rtol=0, atol=0)
    first = layer(x, memory)
    expected = layer.output(layer.value(memory[:, 0]))  # position 0 sees one key, so its weights are 1
    torch.testing.assert_close(first[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_math_has_second_derivatives() -> None:
    query, key, value = (x.double().requires_grad_() for x in sample())
    assert torch.autograd.gradgradcheck(
        lambda *args: attend(*args, causal=True, implementation="math"), (query, key, value)
    )


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads: found 3"):
        MultiHeadAttention(8, 3)
    with pytest.raises(ValueError, match="implementation: found 'fast'"):
        MultiHeadAttention(8, 2, implementation="fast")
    with pytest.raises(ValueError, match="activation: found 'step'"):
        FeedForward(8, 8, activation="step")


def test_feed_forward_is_two_maps_around_the_activation() -> None:
    torch.manual_seed(0)
    layer = FeedForward(4, 6, activation="relu", dropout=0.5).eval()
    x = torch.randn(3, 4)
    inner = (x @ layer.inner.weight.T + layer.inner.bias).clamp(min=0)
    torch.testing.assert_close(layer(x), inner @ layer.output.weight.T + layer.output.bias)
    assert (layer.train()(x) - layer(x)).abs().max() > 0
