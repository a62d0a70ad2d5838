"""Signals on a graph: products with a sparse symmetric matrix, spectral bands of its polynomials, new nodes.

Spectra are those of S = D^-1/2 A D^-1/2 in [-1, 1]; with the Laplacian L = I - S, x = lambda - 1 is an eigenvalue of
-S, so small x is low frequency, smooth over edges. The formulas are standard (Chebyshev series of an indicator, Jackson
damping); equal-energy bands are SSR's, finding their edges from moments is ours.

Used by: encoders.ssr (all), encoders.lightgcn (products, new nodes, kept results).

Shapes: signals [N, d], bands [B, N, d], coefficients [B, K+1] float64, moments [K+1] float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GRID = 4096


class SparseSymmetric(nn.Module):
    """A symmetric sparse matrix S [N, N] as persistent buffers; a product is differentiable in the signal.

    Args:
        size: N.
        entries: Stored numbers.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, size: int, entries: int) -> None:
        super().__init__()
        self.register_buffer("starts", torch.zeros(size + 1, dtype=torch.int32))
        self.register_buffer("columns", torch.zeros(entries, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(entries))

    def fill(self, starts: Any, columns: Any, values: Any) -> None:
        """Copy the three arrays of a CSR matrix."""
        for name, given in (("starts", starts), ("columns", columns), ("values", values)):
            getattr(self, name).copy_(torch.from_numpy(given))

    def forward(self, signal: Tensor) -> Tensor:
        """S X: [N, d] -> [N, d]."""
        found: Tensor = _Product.apply(signal, self.starts, self.columns, self.values)  # type: ignore[no-untyped-call]
        return found

    def bands(self, signal: Tensor, coefficients: Tensor) -> Tensor:
        """[N, d] -> [B, N, d]: sum_k c_bk T_k(-S) X for each band; the last band is what the others leave.

        Args:
            signal: X.
            coefficients: [B, K+1]; columns must sum to those of the whole spectrum (1, 0, 0, ...).
        """
        weights = coefficients.tolist()
        found: Tensor = _Bands.apply(signal, weights, self.starts, self.columns, self.values)  # type: ignore[no-untyped-call]
        return found

    def moments(self, signals: Iterable[Tensor], order: int) -> Tensor:
        """mu_k = sum over signals of tr(X^T T_k(-S) X) / |X|^2, k = 0..order (even), by order / 2 products.

        T_2k = 2 T_k^2 - 1 and T_2k-1 = 2 T_k T_k-1 - x give two moments for each product.
        """
        total = torch.zeros(order + 1, dtype=torch.float64)
        for signal in signals:
            now, before = -self(signal), signal
            mass, slope = _inner(signal, signal), _inner(signal, now)
            found = [mass, slope]
            for _ in range(1, order // 2 + 1):
                found += [2 * _inner(now, now) - mass]
                now, before = -2 * self(now) - before, now
                found += [2 * _inner(now, before) - slope]
            total += torch.stack(found)[: order + 1] / mass.clamp(min=1e-30)
        return total


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).sum().cpu()


def _multiply(signal: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    # A weighted sum of rows for each row: three times the speed of a sparse CSR product on a processor.
    return F.embedding_bag(
        columns, signal, starts, mode="sum", per_sample_weights=values.to(signal.dtype), include_last_offset=True
    )


class _Product(torch.autograd.Function):
    """S X; the gradient is S G, since S is symmetric."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, *matrix: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _multiply(signal, *matrix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _multiply(gradient.contiguous(), *ctx.matrix), None, None, None


class _Bands(torch.autograd.Function):
    """All bands by one recursion T_k+1 = 2 (-S) T_k - T_k-1; the gradient by Clenshaw's recursion, K products too."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, weights: list[list[float]], *matrix: Tensor) -> Tensor:
        ctx.weights, ctx.matrix = weights, matrix
        bands = torch.empty(len(weights), *signal.shape, dtype=signal.dtype, device=signal.device)
        for band, row in zip(bands[:-1], weights, strict=False):
            torch.mul(signal, row[0], out=band)
        before, now = signal, signal
        for k in range(1, len(weights[0]) if len(weights) > 1 else 0):
            product = _multiply(now, *matrix)
            after = product.neg_() if k == 1 else torch.add(before, product, alpha=2.0).neg_()
            before, now = now, after
            for band, row in zip(bands[:-1], weights, strict=False):
                band.add_(now, alpha=row[k])
        torch.sub(signal, bands[:-1].sum(0), out=bands[-1])
        return bands

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        last, others = gradient[-1], ctx.weights[:-1]
        differences = [part - last for part in gradient[:-1]]
        older = newer = torch.zeros_like(last)
        order = len(ctx.weights[0]) - 1 if others else 0
        for k in range(order, 0, -1):
            # Nothing stands above the highest order, so its product is zero.
            current = torch.add(older, _multiply(newer, *ctx.matrix), alpha=2.0).neg_() if k < order else older.clone()
            for part, row in zip(differences, others, strict=True):
                current.add_(part, alpha=row[k])
            older, newer = newer, current
        total = last - older - _multiply(newer, *ctx.matrix) if others else last
        for part, row in zip(differences, others, strict=True):
            total = total + row[0] * part
        return (total, None, None, None, None)


def band_coefficients(edges: Sequence[float], order: int, damped: bool = True) -> Tensor:
    """Chebyshev coefficients of the indicators of bands.

    c_0 = (th_lo - th_hi) / pi, c_k = 2 (sin k th_lo - sin k th_hi) / (pi k), th = arccos x; times Jackson's factors
    g_k. Neighbouring bands telescope, so all bands sum to (1, 0, 0, ...) for every K.

    Args:
        edges: [B+1] rising, from -1 to 1.
        order: K.
        damped: Multiply by g_k, which takes the ripples out.

    Returns:
        [B, K+1] float64.
    """
    # On the processor even where a model is laid out on the meta device: the numbers are needed one by one.
    angles = torch.arccos(torch.tensor(edges, dtype=torch.float64, device="cpu").clamp(-1, 1))
    k = torch.arange(1, order + 1, dtype=torch.float64, device="cpu")
    series = torch.cat([angles[:, None] / 2, torch.sin(k * angles[:, None]) / k], dim=1) * 2 / math.pi  # [B+1, K+1]
    found = series[:-1] - series[1:]
    return found * jackson(order) if damped else found


def jackson(order: int) -> Tensor:
    """[K+1] float64 damping factors; g_0 = 1."""
    size, k = order + 1, torch.arange(order + 1, dtype=torch.float64, device="cpu")
    angle = math.pi / (size + 1)
    return ((size - k + 1) * torch.cos(k * angle) + torch.sin(k * angle) / math.tan(angle)) / (size + 1)


def equal_energy_edges(moments: Tensor, bands: int) -> list[float]:
    """Edges [B+1] in [-1, 1] between which a signal has equal energy, from its moments.

    The share of energy below a is F(a) = sum_k g_k c_k([-1, a]) mu_k / mu_0, made rising and solved on a grid that is
    fine at both ends, where graphs have most of their energy.
    """
    grid = -torch.cos(torch.linspace(0, math.pi, _GRID + 1, dtype=torch.float64))
    steps = band_coefficients(grid.tolist(), len(moments) - 1) @ moments / moments[0]  # [_GRID]
    share = F.pad(steps.cumsum(0), (1, 0)).cummax(0).values
    wanted = torch.arange(1, bands, dtype=torch.float64) / bands
    after = torch.searchsorted(share, wanted).clamp(1, _GRID)
    low, high = share[after - 1], share[after]
    part = ((wanted - low) / (high - low).clamp(min=1e-15)).clamp(0, 1)
    inner = torch.lerp(grid[after - 1], grid[after], part)
    return [-1.0, *inner.tolist(), 1.0]


def assign_modes(eigenvalues: Tensor, energies: Tensor, bands: int) -> Tensor:
    """Band of each mode, so that bands have about equal energy; equal eigenvalues share a band.

    Args:
        eigenvalues: [N] rising, float64.
        energies: [N] energy of the signal in each mode.
        bands: B.

    Returns:
        [N] int64, rising from 0 to B-1, every band present.

    Raises:
        ValueError: There are fewer different eigenvalues than bands.
    """
    new = torch.ones(len(eigenvalues), dtype=torch.bool)
    new[1:] = eigenvalues.diff() > 1e-8
    group = new.cumsum(0) - 1
    groups = int(group[-1]) + 1
    if groups < bands:
        raise ValueError(f"{bands} bands of {groups} different eigenvalues")
    energy = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, energies.double())
    reached = energy.cumsum(0) / energy.sum()
    band = (torch.ceil(reached * bands - 1e-9) - 1).clamp(0, bands - 1)
    starts = torch.searchsorted(band, torch.arange(bands, dtype=torch.float64))
    for b in range(1, bands):
        starts[b] = max(int(starts[b]), int(starts[b - 1]) + 1)
    for b in range(bands - 1, 0, -1):
        starts[b] = min(int(starts[b]), groups - (bands - b))
    return torch.searchsorted(starts, group, right=True) - 1


def first_occurrences(item_ids: Tensor) -> Tensor:
    """[B, S] -> [B, S] bool: an item's first place in its row; False at repeats and padding."""
    ordered, order = item_ids.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(new).scatter_(1, order, new) & (item_ids > 0)


def new_nodes(item_ids: Tensor, table: Tensor, recency: float = 1.0) -> Tensor:
    """A user who is not in the graph, as a node linked to the items of a history: sum_i w_i v_i / sqrt(|S|).

    Args:
        item_ids: [B, S] padded on the right with 0, oldest first; repeats are one link.
        table: [I+1, D] item vectors, already divided by the root of their degrees.
        recency: w falls by this factor with each place an item lies further back, and has mean 1; 1 forgets the order.

    Returns:
        [B, D] in the table's type.
    """
    links = first_occurrences(item_ids)
    places = torch.arange(item_ids.shape[1], device=item_ids.device)
    age = ((item_ids > 0).sum(1, keepdim=True) - 1 - places).clamp(min=0)
    weights = _mean_one(links * recency ** age.float(), links)
    return F.embedding_bag(item_ids, table, mode="sum", per_sample_weights=weights.to(table.dtype))


def running_nodes(item_ids: Tensor, table: Tensor, recency: float = 1.0) -> Tensor:
    """`new_nodes` after each event: [B, L] -> [B, L, D]; state t depends on items <= t only."""
    links = first_occurrences(item_ids)
    places = torch.arange(item_ids.shape[1], device=item_ids.device)
    age = places[:, None] - places
    seen = (age >= 0) & links[:, None, :]  # [B, L, L]
    weights = _mean_one(seen * recency ** age.clamp(min=0).float(), seen)
    return weights.to(table.dtype) @ table[item_ids]


def _mean_one(weights: Tensor, links: Tensor) -> Tensor:
    """Weights scaled to sum to sqrt(number of links) in each row: mean 1, divided by the root of the degree."""
    count = links.sum(-1, keepdim=True)
    return weights * count.clamp(min=1).sqrt() / weights.sum(-1, keepdim=True).clamp(min=1e-30)


class Kept:
    """The result of a pure function of some tensors, until one of them is changed or replaced.

    A plain attribute, never saved: a loaded or copied model computes it anew. Changes are seen by a tensor's version,
    which fused optimizer kernels and writes through `.data` leave as it is: call `drop` around those.
    """

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, int]] = []
        self._value: Any = None

    def drop(self) -> None:
        """Forget what is kept."""
        self._sources, self._value = [], None

    def get(self, sources: Iterable[Tensor], compute: Callable[[], Any]) -> Any:
        """`compute()` without gradients, or what it gave for the same tensors before."""
        sources = list(sources)
        if any(source.is_inference() for source in sources):  # they do not count their changes
            with torch.no_grad():
                return compute()
        if not self._fresh(sources):
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            # Held on to, so that no new tensor can take over the address of an old one.
            self._sources = [(source.detach(), source._version) for source in sources]
        return self._value

    def _fresh(self, sources: list[Tensor]) -> bool:
        if len(sources) != len(self._sources):
            return False
        return all(
            now.device == old.device and now.dtype == old.dtype and now.data_ptr() == old.data_ptr()
            and now._version == version
            for now, (old, version) in zip(sources, self._sources, strict=True)
        )  # fmt: skip
