"""Nearest codes, the straight-through gradient, and the training loop that codebooks are fitted in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmrec.blocks.autoencoder import fit, mlp, seeded
from llmrec.blocks.quantize import VectorQuantizer, distances, nearest


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_the_row_of_least_distance() -> None:
    x, codebook = draws(4, 50, 6), draws(17, 6, seed=1)
    exact = ((x.double()[..., None, :] - codebook.double()) ** 2).sum(-1)
    assert torch.equal(nearest(x, codebook), exact.argmin(-1))
    assert torch.allclose(distances(x, codebook).double(), exact, atol=1e-4) and (distances(x, codebook) >= 0).all()


def test_nearest_takes_the_first_of_equal_rows_and_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = torch.cat([draws(5, 3), draws(5, 3)])
    assert torch.equal(nearest(draws(5, 3), codebook), torch.arange(5))
    assert nearest(draws(0, 3), codebook).shape == (0,) and nearest(draws(3), codebook).shape == ()
    whole = nearest(draws(40, 3, seed=2), codebook)
    monkeypatch.setattr("llmrec.blocks.quantize._CELLS", 30)
    assert torch.equal(nearest(draws(40, 3, seed=2), codebook), whole)


def test_gradients_go_straight_through_to_the_input_and_by_vectors_to_the_codebook() -> None:
    quantizer, z = VectorQuantizer(8, 4), draws(5, 4).requires_grad_()
    found = quantizer(z)
    assert torch.allclose(found.through, found.vectors, atol=1e-6)
    assert torch.equal(found.vectors, quantizer.codebook[found.codes])
    weights = draws(5, 4, seed=1)
    (found.through * weights).sum().backward()
    assert quantizer.codebook.grad is None and z.grad is not None and torch.equal(z.grad, weights)
    (quantizer(z.detach()).vectors * weights).sum().backward()
    expected = torch.zeros(8, 4).index_add_(0, found.codes, weights)
    gradient: torch.Tensor | None = quantizer.codebook.grad
    assert gradient is not None and torch.allclose(gradient, expected)


def test_given_codes_are_used() -> None:
    quantizer = VectorQuantizer(8, 4)
    codes = torch.tensor([7, 7, 0])
    found = quantizer(draws(3, 4), codes)
    assert torch.equal(found.codes, codes) and torch.equal(found.vectors, quantizer.codebook[codes])


def test_initialise_and_reseed_write_rows() -> None:
    quantizer = VectorQuantizer(6, 2)
    quantizer.initialise(draws(6, 2))
    quantizer.reseed(torch.tensor([1, 4]), torch.ones(2, 2))
    expected = draws(6, 2)
    expected[[1, 4]] = 1.0
    assert torch.equal(quantizer.codebook.detach(), expected)
    quantizer.reseed(torch.zeros(0, dtype=torch.long), torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"centroids are \(5, 2\), the codebook is \(6, 2\)"):
        quantizer.initialise(draws(5, 2))


def test_mlp_has_relu_between_and_nothing_after() -> None:
    layers = mlp((5, 4, 3, 2), dropout=0.1)
    assert [type(layer).__name__ for layer in layers] == ["Linear", *["ReLU", "Dropout", "Linear"] * 2]
    assert all((layer.bias == 0).all() for layer in layers if isinstance(layer, nn.Linear))
    assert [type(layer).__name__ for layer in mlp((5, 2))] == ["Linear"]
    with pytest.raises(ValueError, match="input and an output width"):
        mlp((5,))


def test_seeded_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(ZeroDivisionError), seeded(7):
        assert torch.equal(torch.rand(3), first)
        _ = 1 / 0
    state = torch.get_rng_state()
    with seeded(8):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_learns_visits_every_row_and_stops_when_told() -> None:
    x = draws(50, 3)
    y = x @ draws(3, 2, seed=1)
    with seeded(0):
        module = mlp((3, 2))
    seen: list[int] = []

    def loss(index: torch.Tensor) -> torch.Tensor:
        assert module.training
        seen.extend(index.tolist())
        return (module(x[index]) - y[index]).square().mean()

    options: dict[str, Any] = {"batch_size": 16, "learning_rate": 0.05, "weight_decay": 0.0}
    means = fit(
        module, 50, loss, epochs=200, generator=torch.Generator().manual_seed(0), on_epoch=lambda e: e == 90, **options
    )
    assert len(means) == 90 and means[-1] < 1e-3 * means[0]
    assert sorted(seen[:50]) == list(range(50)) and seen[:50] != seen[50:100]
    assert fit(module, 50, loss, epochs=0, generator=torch.Generator(), **options) == []
