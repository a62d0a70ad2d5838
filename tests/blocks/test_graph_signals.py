"""Signals on graphs: products, bands by polynomials, equal energy, new nodes, kept results."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from llmrec.blocks.graph_signals import (
    Kept,
    SparseSymmetric,
    assign_modes,
    band_coefficients,
    equal_energy_edges,
    jackson,
    new_nodes,
    running_nodes,
)

USERS, ITEMS = 80, 120


def bipartite(seed: int = 0, density: float = 0.06) -> sparse.csr_matrix:
    """Normalised adjacency of a random bipartite graph with 200 nodes, float64."""
    rng = np.random.default_rng(seed)
    rows = (rng.random((USERS, ITEMS)) < density).astype(float)
    adjacency = np.block([[np.zeros((USERS, USERS)), rows], [rows.T, np.zeros((ITEMS, ITEMS))]])
    degrees = adjacency.sum(1)
    scale = np.where(degrees > 0, 1 / np.sqrt(np.maximum(degrees, 1)), 0)
    return sparse.csr_matrix(scale[:, None] * adjacency * scale)


def module(matrix: sparse.csr_matrix, dtype: torch.dtype = torch.float64) -> SparseSymmetric:
    graph = SparseSymmetric(matrix.shape[0], matrix.nnz).to(dtype)
    graph.fill(matrix.indptr, matrix.indices, matrix.data)
    return graph


def signal(width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(USERS + ITEMS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectrum() -> tuple[Tensor, Tensor]:
    """Eigenvalues x = lambda - 1 of -S, rising, and eigenvectors."""
    return torch.linalg.eigh(-torch.from_numpy(bipartite().toarray()))


def edges_of(bands: int) -> list[float]:
    return torch.linspace(-1, 1, bands + 1).tolist()


def test_products_and_their_gradient() -> None:
    matrix, x = bipartite(), signal().requires_grad_()
    graph = module(matrix)
    torch.testing.assert_close(graph(x), torch.from_numpy(matrix @ x.detach().numpy()))
    assert torch.autograd.gradcheck(graph, x[:, :1].detach().requires_grad_())


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
@pytest.mark.parametrize("order", [2, 8, 32])
def test_bands_sum_to_the_signal(bands: int, order: int) -> None:
    """Property 1 on the polynomial path, in float32."""
    x = signal().float()
    found = module(bipartite(), torch.float32).bands(x, band_coefficients(edges_of(bands), order))
    assert found.shape == (bands, *x.shape)
    assert (found.sum(0) - x).abs().max() < 1e-5
    whole = band_coefficients(edges_of(bands), order).sum(0)
    torch.testing.assert_close(whole, torch.eye(order + 1, dtype=torch.float64)[0], atol=1e-12, rtol=0)


def test_every_band_is_its_polynomial_and_has_its_gradient() -> None:
    """The last band is computed as a remainder; it must be its own polynomial all the same."""
    x, (values, vectors) = signal(2), spectrum()
    weights = band_coefficients([-1.0, -0.3, 0.2, 1.0], 9)
    chebyshev = torch.cos(torch.arange(10, dtype=torch.float64)[:, None] * torch.arccos(values.clamp(-1, 1)))
    expected = torch.stack([(vectors * (row @ chebyshev)) @ (vectors.T @ x) for row in weights])
    graph = module(bipartite())
    torch.testing.assert_close(graph.bands(x, weights), expected)
    assert torch.autograd.gradcheck(lambda y: graph.bands(y, weights), signal(1, 3).requires_grad_())


def test_jackson_factors_start_at_one_and_fall() -> None:
    factors = jackson(20)
    assert factors[0] == pytest.approx(1.0) and (factors.diff() < 0).all() and factors[-1] > 0


def test_polynomials_approach_the_exact_bands() -> None:
    """Property 3: the relative error of a band falls with K and is below 0.12 at 256."""
    x, (values, vectors) = signal(8), spectrum()
    edges = [-1.0, float(values[60:62].mean()), float(values[139:141].mean()), 1.0]
    exact = torch.stack(
        [
            (vectors * ((values > low) & (values <= high))) @ (vectors.T @ x)
            for low, high in zip([-2.0, *edges[1:-1]], [*edges[1:-1], 2.0], strict=True)
        ]
    )
    graph, errors = module(bipartite()), []
    for order in (8, 32, 64, 256):
        found = graph.bands(x, band_coefficients(edges, order))
        errors.append(((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max().item())
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.12, errors


def test_moments_are_those_of_the_spectrum() -> None:
    values, vectors = spectrum()
    first, second = signal(4), signal(3, 1)
    chebyshev = torch.cos(torch.arange(9, dtype=torch.float64)[:, None] * torch.arccos(values.clamp(-1, 1)))
    expected = torch.zeros(9, dtype=torch.float64)
    for x in (first, second):
        energy = (vectors.T @ x).pow(2).sum(1)
        expected += chebyshev @ energy / energy.sum()
    torch.testing.assert_close(module(bipartite()).moments([first, second], 8), expected)


def test_edges_from_moments_are_near_those_of_the_spectrum() -> None:
    """Property 3: within 0.02 of the points where the energy of the modes reaches 1/3 and 2/3."""
    values, vectors = spectrum()
    x = signal(64)
    reached = (vectors.T @ x).pow(2).sum(1).cumsum(0)
    reached = reached / reached[-1]
    found = equal_energy_edges(module(bipartite()).moments([x], 64), 3)
    assert found[0] == -1 and found[-1] == 1
    for share, edge in zip((1 / 3, 2 / 3), found[1:-1], strict=True):
        place = int(torch.searchsorted(reached, torch.tensor(share, dtype=torch.float64)))
        if values[place].abs() < 1e-8:
            assert abs(edge) < 0.02, "the edge lies in the null space"
        else:
            assert abs(edge - float(values[place])) < 0.02


def test_modes_share_energy_evenly() -> None:
    """Property 4: shares within 1/B plus or minus the largest share of one eigenvalue; equal ones stay together."""
    values, vectors = spectrum()
    energy = (vectors.T @ signal(3)).pow(2).sum(1)
    for bands in (2, 3, 5):
        found = assign_modes(values, energy, bands)
        assert (found.diff() >= 0).all() and found.unique().tolist() == list(range(bands))
        assert not (found.diff().bool() & (values.diff() < 1e-8)).any()
        shares = torch.zeros(bands, dtype=torch.float64).index_add_(0, found, energy) / energy.sum()
        group = torch.cat([torch.zeros(1), (values.diff() > 1e-8).cumsum(0).float()]).long()
        largest = float(torch.zeros(int(group[-1]) + 1, dtype=torch.float64).index_add_(0, group, energy).max())
        assert (shares - 1 / bands).abs().max() <= largest / energy.sum() + 1e-9


def test_no_band_is_empty() -> None:
    values = torch.tensor([0.0, 0.5, 0.5, 1.0, 2.0], dtype=torch.float64)
    found = assign_modes(values, torch.tensor([0.0, 50.0, 49.0, 1.0, 0.0]), 3)
    assert found.unique().tolist() == [0, 1, 2] and found[1] == found[2]
    with pytest.raises(ValueError, match="5 bands of 4"):
        assign_modes(values, torch.ones(5), 5)


TABLE = torch.randn(9, 4, generator=torch.Generator().manual_seed(4)) * (torch.arange(9) > 0)[:, None]
HISTORY = torch.tensor([[3, 5, 3, 7, 0], [1, 0, 0, 0, 0]])


def test_a_new_node_is_the_mean_times_the_root_of_its_degree() -> None:
    expected = torch.stack([(TABLE[3] + TABLE[5] + TABLE[7]) / 3**0.5, TABLE[1]])
    torch.testing.assert_close(new_nodes(HISTORY, TABLE), expected)


def test_order_and_padding_do_not_matter() -> None:
    moved = torch.tensor([[7, 3, 5, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(new_nodes(moved, TABLE), new_nodes(HISTORY, TABLE))


@pytest.mark.parametrize("recency", [1.0, 0.5])
def test_running_nodes_are_the_new_nodes_of_every_prefix(recency: float) -> None:
    found = running_nodes(HISTORY, TABLE, recency)
    for length in range(1, 5):
        torch.testing.assert_close(found[0, length - 1], new_nodes(HISTORY[:1, :length], TABLE, recency)[0])


def test_links_fade() -> None:
    weights = torch.tensor([0.125, 0.25, 1.0])  # 3 at its first place, 5, 7
    weights = weights * 3 / weights.sum()
    expected = (weights[:, None] * TABLE[[3, 5, 7]]).sum(0) / 3**0.5
    torch.testing.assert_close(new_nodes(HISTORY[:1], TABLE, 0.5)[0], expected)


def test_kept_results_follow_their_sources() -> None:
    source, calls, kept = torch.ones(3), [0], Kept()

    def compute() -> Tensor:
        calls[0] += 1
        return source * 2

    assert kept.get([source], compute).tolist() == [2, 2, 2] and kept.get([source], compute) is not None
    assert calls == [1]
    source.add_(1)
    assert kept.get([source], compute).tolist() == [4, 4, 4] and calls == [2]
    source = source + 1
    assert kept.get([source], compute).tolist() == [6, 6, 6]
    again = copy.deepcopy(kept)
    again.get([source.clone()], compute)
    assert calls == [4], "a copy of a model does not trust what the first one kept"


def test_what_is_kept_in_inference_mode_serves_outside_of_it() -> None:
    weight, kept = torch.ones(2, requires_grad=True), Kept()
    with torch.inference_mode():
        kept.get([weight], lambda: weight * 2)
    found = kept.get([weight], lambda: weight * 3)
    (found * weight).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2, 2]
