"""Routers and gate statistics."""

from __future__ import annotations

import math

import pytest
import torch

from llmrec.blocks.gating import Router, check_router_options, gate_statistics

KINDS = ("linear", "mlp", "resnet1d")


def router(kind: str, **options: object) -> Router:
    torch.manual_seed(0)
    return Router(16, 4, kind, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryRouter:
    def test_gates_are_float32_weights_for_any_leading_shape(self, kind: str) -> None:
        for shape in ((5, 16), (2, 3, 16)):
            gates = router(kind)(torch.randn(shape))
            assert gates.shape == (*shape[:-1], 4) and gates.dtype == torch.float32
            torch.testing.assert_close(gates.sum(-1), torch.ones(shape[:-1]))

    def test_positions_equal_rows(self, kind: str) -> None:
        x, net = torch.randn(2, 3, 16), router(kind)
        torch.testing.assert_close(net(x).reshape(6, 4), net(x.reshape(6, 16)))

    def test_float32_under_autocast_and_for_half_inputs(self, kind: str) -> None:
        x, net = torch.randn(4, 16), router(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = net(x)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, net(x), rtol=0, atol=0)
        assert net(x.bfloat16()).dtype == torch.float32
        assert net.to(torch.bfloat16)(x).dtype == torch.float32

    def test_every_parameter_gets_a_gradient(self, kind: str) -> None:
        net = router(kind).train()
        net(torch.randn(8, 16))[:, 0].sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())

    def test_noise_acts_in_training_only(self, kind: str) -> None:
        x, noisy = torch.randn(64, 16), router(kind, logit_noise=0.5)
        torch.testing.assert_close(noisy(x), router(kind)(x), rtol=0, atol=0)
        noisy.train()
        noisy.scorer.eval()  # batch normalisation would differ by itself
        shift = (noisy(x).log() - router(kind)(x).log()).detach()
        contrast = shift[:, 0] - shift[:, 1]  # softmax cancels a common shift; differences have std 0.5 sqrt 2
        assert abs(float(contrast.std()) - 0.5 * math.sqrt(2)) < 0.2


def test_linear_is_the_softmax_of_a_linear_map() -> None:
    x, net = torch.randn(5, 16), router("linear", norm="none")
    torch.testing.assert_close(net(x), torch.softmax(x @ net.scorer.weight.T, dim=-1))
    assert [tuple(p.shape) for p in net.parameters()] == [(4, 16)]


def test_layer_norm_ignores_scale_and_is_the_default_of_linear_and_mlp() -> None:
    x = torch.randn(5, 16)
    for kind in ("linear", "mlp"):
        torch.testing.assert_close(router(kind)(1000 * x), router(kind)(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(router("resnet1d")(1000 * x), router("resnet1d")(x), atol=1e-3)
    assert not list(router("linear").norm.parameters())


def test_parameter_counts_are_those_of_the_release() -> None:
    count = {kind: sum(p.numel() for p in Router(64, 4, kind).parameters()) for kind in KINDS}
    assert count == {"linear": 256, "mlp": 64 * 128 + 128 + 128 * 4 + 4, "resnet1d": 90_772}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 4, "conv"), "router: found 'conv'"),
        ((0, 4, "linear"), "gate_dim"),
        ((None, 4, "linear"), "gate_dim"),
        ((16, 0, "linear"), "num_experts"),
        ((16, 4, "linear", "batch"), "router_norm"),
        ((16, 4, "linear", None, -0.1), "logit_noise"),
    ],
)
def test_wrong_options_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_router_options(*arguments)


class TestStatistics:
    def test_uniform_and_one_hot(self) -> None:
        uniform = gate_statistics(torch.full((10, 4), 0.25))
        assert uniform.entropy == pytest.approx(1) and uniform.usage_entropy == pytest.approx(1)
        balanced = gate_statistics(torch.eye(4))
        assert balanced.entropy == 0 and balanced.usage_entropy == pytest.approx(1)
        assert balanced.top_share == [0.25] * 4
        collapsed = gate_statistics(torch.eye(4)[torch.zeros(6, dtype=torch.long)])
        assert collapsed.usage == [1, 0, 0, 0] and collapsed.usage_entropy == 0 and collapsed.rows == 6

    def test_hand_computed_row(self) -> None:
        found = gate_statistics(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
        first, second = math.log(2), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
        assert found.entropy == pytest.approx((first + second) / 2 / math.log(2), rel=1e-5)
        assert found.usage == pytest.approx([0.7, 0.3])

    def test_mask_leaves_out_padding(self) -> None:
        gates = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]]])
        mask = torch.tensor([[True, False], [True, True]])
        found = gate_statistics(gates, mask)
        assert found.rows == 3 and found.usage == pytest.approx([2.5 / 3, 0.5 / 3])
        assert gate_statistics(gates, torch.zeros(2, 2)).rows == 0

    def test_one_expert(self) -> None:
        assert gate_statistics(torch.ones(3, 1)).entropy == 0
