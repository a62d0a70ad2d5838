"""Power laws over model size: y = a p^-b + c, with b > 0, for the loss (a > 0) and for a metric (a < 0).

c is what an endlessly large model of the family would reach on these data. For a fixed b the law is linear in (a, c),
so b is searched on a grid and refined by a bounded scalar minimiser: no starting point, always the same answer.
Intervals are percentiles over resampled residuals, scaled up by sqrt(n / (n - 3)) for the fitted parameters, with a
fixed seed. The form is the usual one of scaling studies; the fit and its intervals are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize_scalar

from llmrec.errors import DataError

FEWEST_SIZES = 4
RESAMPLES, LEVEL = 500, 0.8
SMALLEST, LARGEST = 0.01, 3.0
"""Bounds of b."""
_GRID = np.geomspace(SMALLEST, LARGEST, 200)


@dataclass(frozen=True)
class PowerLaw:
    """y = a (p / unit)^-b + c.

    Args:
        a, b, c: The fit.
        unit: Geometric mean of the fitted sizes, so that a is the effect at a size of the study.
        r2: On the fitted points.
        intervals: "a", "b", "c" -> low and high end.
        bounded: Whether b stayed inside its bounds; a law at the bound has not been seen to bend.
        draws: [R, 3] a, b and c of the resampled fits.
    """

    a: float
    b: float
    c: float
    unit: float
    r2: float
    intervals: dict[str, tuple[float, float]]
    bounded: bool
    draws: np.ndarray = field(repr=False)

    def predict(self, sizes: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """y at model sizes."""
        return self.a * (np.asarray(sizes, dtype=np.float64) / self.unit) ** -self.b + self.c

    def band(self, sizes: np.ndarray | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Low and high end of the interval of y at model sizes."""
        ratios = np.asarray(sizes, dtype=np.float64)[:, None] / self.unit
        curves = self.draws[:, 0] * ratios ** -self.draws[:, 1] + self.draws[:, 2]
        low, high = np.quantile(curves, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=1)
        return low, high

    def record(self) -> dict[str, object]:
        """The fit as plain values."""
        names = ("a", "b", "c", "unit", "r2", "intervals", "bounded")
        return {name: getattr(self, name) for name in names}


def fit_power_law(
    sizes: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, *, seed: int = 0
) -> PowerLaw:
    """Fit a power law with an offset.

    Args:
        sizes: [n] parameters of the models.
        values: [n] loss or metric.
        seed: Seed of the resampling.

    Raises:
        DataError: Fewer than four different sizes, or values that are no numbers.
    """
    p, y = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (sizes, values))
    if len(p) != len(y):
        raise DataError("runs need one size and one value each", found=f"{len(p)} sizes and {len(y)} values")
    if not (np.isfinite(p) & (p > 0)).all() or not np.isfinite(y).all():
        raise DataError("no power law through these runs", expected="positive sizes and finite values")
    if len(np.unique(p)) < FEWEST_SIZES:
        raise DataError(
            "too few sizes for a power law with an offset",
            found=f"{len(np.unique(p))} sizes",
            expected=f">= {FEWEST_SIZES}",
            remedy="sweep more depths or widths",
        )
    unit = float(np.exp(np.log(p).mean()))
    logs = np.log(p / unit)
    a, b, c = _fit(logs, y)
    residuals = y - a * np.exp(-b * logs) - c
    total = float(((y - y.mean()) ** 2).sum())
    draws = _resample(logs, y - residuals, residuals, seed)
    low, high = np.quantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=0)
    ends = {name: (float(low[i]), float(high[i])) for i, name in enumerate("abc")}
    bounded = SMALLEST * 1.01 < b < LARGEST / 1.01
    r2 = 1.0 - float(residuals @ residuals) / total if total > 0 else 0.0
    return PowerLaw(a, b, c, unit, r2, ends, bounded, draws)


def _fit(logs: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    best = int(_grid_errors(logs, y[:, None])[:, 0].argmin())
    low, high = _GRID[max(0, best - 1)], _GRID[min(len(_GRID) - 1, best + 1)]
    found = minimize_scalar(
        lambda b: float(_linear(logs, y, b)[2]), bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    )
    b = float(found.x)
    a, c, _ = _linear(logs, y, b)
    return a, b, c


def _linear(logs: np.ndarray, y: np.ndarray, b: float) -> tuple[float, float, float]:
    """a, c and the squared error for a given b."""
    column = np.exp(-b * logs)
    centred, left = column - column.mean(), y - y.mean()
    a = float(centred @ left / (centred @ centred))
    residuals = left - a * centred
    return a, float(y.mean() - a * column.mean()), float(residuals @ residuals)


def _columns(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[G, n] unit columns, [G] their lengths and [G] their means, for the grid of b."""
    columns = np.exp(-_GRID[:, None] * logs)
    means = columns.mean(axis=1)
    centred = columns - means[:, None]
    lengths = np.linalg.norm(centred, axis=1)
    return centred / lengths[:, None], lengths, means


def _grid_errors(logs: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[G, R] squared errors for each b of the grid and each column of y [n, R]."""
    unit, _, _ = _columns(logs)
    left = y - y.mean(axis=0)
    return (left**2).sum(axis=0) - (unit @ left) ** 2


def _resample(logs: np.ndarray, fitted: np.ndarray, residuals: np.ndarray, seed: int) -> np.ndarray:
    """[R, 3] a, b and c of fits to the curve plus drawn residuals; b on the grid."""
    n = len(fitted)
    scaled = (residuals - residuals.mean()) * np.sqrt(n / (n - 3))
    drawn = np.random.default_rng(seed).choice(scaled, size=(n, RESAMPLES))
    y = fitted[:, None] + drawn
    best = _grid_errors(logs, y).argmin(axis=0)
    unit, lengths, means = _columns(logs)
    a = (unit[best] * (y - y.mean(axis=0)).T).sum(axis=1) / lengths[best]
    return np.column_stack([a, _GRID[best], y.mean(axis=0) - a * means[best]])
