"""The performance law (P-Law): a ranking metric as a function of depth N, width h and the amount of data D.

    y(N, h; D) = w1 g(N; w3) + w2 g(h; w4) + g(D; w5) + b,        g(x; w) = -1 / (2 x^w) - w ln x

The formula is the published code's (pf1 = pf2 = 2). With u = 2 x^w the term is -1/u - ln u + const and has its single
maximum at u = 1. So w1 > 0 with w3 < 0 rises and falls, with the peak N* = 2^(-1 / w3); w1 < 0 with w3 > 0 only rises;
near w3 = 0 the term is flat and w1 cannot be known.

Ours: the fit. For fixed (w3, w4) the law is linear in (w1, w2, c), c the whole data term, so a grid over (w3, w4) with
a small least-squares problem each, refined by a bounded optimiser in each of the four sign quadrants, finds the best
parameters from no starting point and always the same ones. Intervals of N* and h* come from the profile of the squared
error; R^2 is also given on sizes that were left out, since the fitted points flatter.

On one grid D, w5 and b describe one number, c. They are only separated when the same law is fitted at three or more
amounts of data, D_k = kappa x_k (x_k events times entropy): see `fit_data_term`. `scaling_law` is the baseline without
the decaying part: y = a ln N + b ln h + c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from llmrec.errors import DataError
from llmrec.paper import Paper

PAPER = Paper(
    title="Predicting Quantitative Scaling Law with Entropy Guidance in Large Recommendation Models",
    venue="NeurIPS 2025",
    url_id="2412.00430",
    system="Performance Law",
)
PF = 2.0
SMALLEST, LARGEST, WIDEST = 0.02, 1.5, 3.0
"""Grid of |w3| and |w4|, and the bound of the refinement."""
GRID, PROFILE = 240, 120
LEVEL = 0.8
"""Of all intervals here."""
FEWEST_POINTS, FEWEST_LEVELS = 6, 3
Regime = Literal["peak", "increasing", "decreasing", "valley"]


def term(x: np.ndarray | float, w: np.ndarray | float) -> np.ndarray:
    """g(x; w) = -1 / (2 x^w) - w ln x, for x > 0; shapes broadcast."""
    logs = np.log(np.asarray(x, dtype=np.float64))
    return -np.exp(-np.asarray(w) * logs) / PF - np.asarray(w) * logs


@dataclass(frozen=True)
class Parameters:
    """The seven numbers of the published formula. On one grid `data`, `w5` and `b` cannot be told apart."""

    w1: float
    w2: float
    w3: float
    w4: float
    w5: float
    data: float
    b: float

    def predict(self, depth: np.ndarray | float, width: np.ndarray | float) -> np.ndarray:
        """y at depths N >= 1 and widths h >= 1."""
        shape = self.w1 * term(depth, self.w3) + self.w2 * term(width, self.w4)
        return shape + float(term(self.data, self.w5)) + self.b


@dataclass(frozen=True)
class Axis:
    """What the law says about depth, or about width.

    Args:
        regime: "peak" (rises, then falls), "increasing", "decreasing" or "valley" (falls, then rises), for sizes >= 1.
        optimum: Where the peak is; None in the other regimes.
        low, high: Interval of the optimum; infinity where shapes that never fall fit as well.
    """

    regime: Regime
    optimum: float | None
    low: float | None
    high: float | None

    @property
    def spread(self) -> float:
        """High over low; 1.0 without an optimum."""
        return 1.0 if self.low is None or self.high is None else self.high / max(self.low, 1e-12)


@dataclass(frozen=True)
class DataTerm:
    """c(x) = -1 / (2 (kappa x)^w5) - w5 ln(kappa x) + b, from the constants of several amounts of data.

    Args:
        kappa: Factor from x to D; infinite where the decaying part vanished.
        unidentified: Names of parameters that the amounts at hand do not determine.
    """

    w5: float
    kappa: float
    b: float
    unidentified: tuple[str, ...]
    scale: float = field(repr=False)  # of x^-w5, below or at 0
    offset: float = field(repr=False)

    def constant(self, amount: float) -> float:
        """c at an amount x of data."""
        return self.scale * amount**-self.w5 - self.w5 * math.log(amount) + self.offset


@dataclass(frozen=True)
class PerformanceFit:
    """A fitted law.

    Args:
        w1, w2, w3, w4: Shared by all settings.
        constants: c of each data setting, by its key.
        points: Number of fitted points.
        r2, left_out_r2: On fitted points, and on sizes that were left out.
        residuals: [n] measured minus fitted.
        depth, width: Where the optimum is.
        data_term: Of the multi-data fit; None for one grid or two.
        unidentified: Parameters that the points do not determine.
    """

    w1: float
    w2: float
    w3: float
    w4: float
    constants: dict[int, float]
    points: int
    r2: float
    left_out_r2: float
    residuals: np.ndarray
    depth: Axis
    width: Axis
    data_term: DataTerm | None
    unidentified: tuple[str, ...]
    covariance: np.ndarray = field(repr=False)
    freedom: int = field(repr=False)

    def predict(self, depth: np.ndarray | float, width: np.ndarray | float, setting: int | None = None) -> np.ndarray:
        """y at depths N >= 1 and widths h >= 1 of a data setting (the last one by default)."""
        constant = self.constants[max(self.constants) if setting is None else setting]
        return self.w1 * term(depth, self.w3) + self.w2 * term(width, self.w4) + constant

    def change(self, start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float, float]:
        """Predicted y(end) - y(start) for (depth, width) pairs, with the low and high end of its interval."""
        gain = float(self.predict(*end) - self.predict(*start))
        return self._interval(gain, self._gradient(*end) - self._gradient(*start))

    def interval(self, depth: float, width: float) -> tuple[float, float, float]:
        """Predicted y with the low and high end of the interval of its mean."""
        return self._interval(float(self.predict(depth, width)), self._gradient(depth, width))

    def parameters(self, data: float, w5: float, setting: int | None = None) -> Parameters:
        """The published form for a chosen (data, w5): b takes up what is left, and predictions stay the same."""
        constant = self.constants[max(self.constants) if setting is None else setting]
        return Parameters(self.w1, self.w2, self.w3, self.w4, w5, data, constant - float(term(data, w5)))

    def _gradient(self, depth: float, width: float) -> np.ndarray:
        last = np.zeros(len(self.constants))
        last[-1] = 1.0
        found = _gradient(np.array([depth]), np.array([width]), (self.w1, self.w2, self.w3, self.w4), last[None, :])
        return found[0]

    def _interval(self, value: float, gradient: np.ndarray) -> tuple[float, float, float]:
        deviation = math.sqrt(max(0.0, float(gradient @ self.covariance @ gradient)))
        reach = float(t_distribution.ppf(0.5 + LEVEL / 2, self.freedom)) * deviation
        return value, value - reach, value + reach


def fit_performance_law(
    depth: Sequence[float] | np.ndarray,
    width: Sequence[float] | np.ndarray,
    metric: Sequence[float] | np.ndarray,
    settings: Sequence[int] | np.ndarray | None = None,
    amounts: dict[int, float] | None = None,
    *,
    leave_out: bool = True,
) -> PerformanceFit:
    """Fit the law to runs.

    Args:
        depth: [n] numbers of blocks, at least 1.
        width: [n] embedding widths, at least 1.
        metric: [n] metric as a fraction of 1.
        settings: [n] key of each run's amount of data; None: all the same.
        amounts: Key -> x, events times entropy; asks for the multi-data fit.
        leave_out: Also fit without each size in turn; `left_out_r2` is NaN otherwise.

    Raises:
        DataError: Too few runs or sizes, values no law is for, or fewer than three amounts of data in `amounts`.
    """
    runs = _checked(depth, width, metric, settings)
    fitted = _solve(runs)
    data_term = None
    if amounts is not None:
        missing = [key for key in runs.keys if key not in amounts]
        if missing:
            raise DataError("an amount of data is missing", found=f"no amount of {missing}", expected="one a setting")
        data_term = fit_data_term([amounts[key] for key in runs.keys], fitted.constants.tolist())
    left_out_r2 = _r2(runs.metric, _leave_one_size_out(runs)) if leave_out else math.nan
    error = float(fitted.residuals @ fitted.residuals)
    freedom = max(1, len(runs.metric) - 4 - len(runs.keys))
    jacobian = _gradient(runs.depth, runs.width, fitted.weights, runs.members)
    return PerformanceFit(
        w1=fitted.weights[0],
        w2=fitted.weights[1],
        w3=fitted.weights[2],
        w4=fitted.weights[3],
        constants=dict(zip(runs.keys, map(float, fitted.constants), strict=True)),
        points=len(runs.metric),
        r2=_r2(runs.metric, fitted.residuals),
        left_out_r2=left_out_r2,
        residuals=fitted.residuals,
        depth=_axis(runs, fitted, 0, freedom),
        width=_axis(runs, fitted, 1, freedom),
        data_term=data_term,
        unidentified=("D", "w5", "b") if data_term is None else data_term.unidentified,
        covariance=_covariance(jacobian, error / freedom),
        freedom=freedom,
    )


@dataclass(frozen=True)
class _Runs:
    depth: np.ndarray
    width: np.ndarray
    metric: np.ndarray
    members: np.ndarray  # [n, K] one-hot data settings
    keys: tuple[int, ...]

    def without(self, rows: np.ndarray) -> _Runs:
        keep = ~rows
        return _Runs(self.depth[keep], self.width[keep], self.metric[keep], self.members[keep], self.keys)


@dataclass(frozen=True)
class _Solution:
    weights: tuple[float, float, float, float]
    constants: np.ndarray
    residuals: np.ndarray


def _checked(depth: object, width: object, metric: object, settings: object) -> _Runs:
    n, h, y = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (depth, width, metric))
    codes = np.zeros(len(y), dtype=np.int64) if settings is None else np.asarray(settings, dtype=np.int64).reshape(-1)
    if not len(n) == len(h) == len(y) == len(codes):
        raise DataError("runs need one depth, width and metric each", found=f"{len(n)}, {len(h)} and {len(y)} values")
    for name, values, low, high, expected, remedy in (
        ("depth", n, 1, math.inf, "numbers of blocks from 1", None),
        ("width", h, 1, math.inf, "widths from 1", None),
        ("metric", y, 0, 1, "fractions from 0 to 1", "divide percentages by 100"),
    ):
        wrong = ~(np.isfinite(values) & (values >= low) & (values <= high))
        if wrong.any():
            raise DataError(
                f"{name} outside the law", column=name, found=str(values[wrong][0]), expected=expected, remedy=remedy
            )
    remedy = "add runs of other sizes"
    if len(y) < FEWEST_POINTS:
        raise DataError("too few runs for five parameters", found=len(y), expected=f">= {FEWEST_POINTS}", remedy=remedy)
    for name, values in (("depth", n), ("width", h)):
        if len(np.unique(values)) < FEWEST_LEVELS:
            found = f"{len(np.unique(values))} value(s) of {name}"
            raise DataError(
                "too few sizes to see a curve", column=name, found=found, expected=f">= {FEWEST_LEVELS}", remedy=remedy
            )
    keys = tuple(int(key) for key in np.unique(codes))
    return _Runs(n, h, y, (codes[:, None] == np.array(keys)).astype(np.float64), keys)


def _centred(runs: _Runs, values: np.ndarray) -> np.ndarray:
    """Values [n] or [n, G] minus the mean of each data setting: the constants are solved for."""
    return values - runs.members @ ((runs.members.T @ values).T / runs.members.sum(axis=0)).T


def _signed_grid(count: int) -> np.ndarray:
    half = np.geomspace(SMALLEST, LARGEST, count // 2)
    return np.concatenate([-half[::-1], half])


def _columns(runs: _Runs, sizes: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[n, G] terms, centred and of length 1."""
    columns = _centred(runs, term(sizes[:, None], w[None, :]))
    return columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)


def _errors(runs: _Runs, w3: np.ndarray, w4: np.ndarray) -> np.ndarray:
    """[G3, G4] squared errors of the best linear parameters, y centred; two unknowns, so solved in closed form."""
    y = _centred(runs, runs.metric)
    a, b = _columns(runs, runs.depth, w3), _columns(runs, runs.width, w4)
    cross, ay, by = a.T @ b, (a.T @ y)[:, None], (b.T @ y)[None, :]
    determinant = np.maximum(1 - cross**2, 1e-15)
    explained = (ay**2 + by**2 - 2 * cross * ay * by) / determinant
    return np.maximum(y @ y - explained, 0.0)


def _solve(runs: _Runs) -> _Solution:
    """Grid, then refinement from the lowest cells of each quadrant of the signs of (w3, w4); the best of them."""
    grid = _signed_grid(GRID)
    errors = _errors(runs, grid, grid)
    scale = float(np.std(runs.metric)) or 1.0
    y = _centred(runs, runs.metric) / scale

    logs = (np.log(runs.depth), np.log(runs.width))
    averaging = runs.members / runs.members.sum(axis=0) @ runs.members.T

    def residuals(w: np.ndarray) -> np.ndarray:
        a, b = (-np.exp(-e * x) / PF - e * x for e, x in zip(w, logs, strict=True))
        a, b = a - averaging @ a, b - averaging @ b
        a = a / math.sqrt(a @ a)
        b = b - (a @ b) * a
        return y - (a @ y) * a - (b @ y) / max(b @ b, 1e-300) * b

    def of_angle(signs: np.ndarray, angles: np.ndarray) -> np.ndarray:
        """Exponents with SMALLEST / 4 <= |w| <= WIDEST, smooth in unbounded angles."""
        reach = math.log(WIDEST / SMALLEST * 4)
        return signs * SMALLEST / 4 * np.exp(reach * (1 + np.sin(angles)) / 2)

    def refined(signs: np.ndarray, angles: np.ndarray, evaluations: int) -> tuple[float, np.ndarray, np.ndarray]:
        found = least_squares(
            lambda at: residuals(of_angle(signs, at)),
            angles,
            method="lm",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-15,
            max_nfev=evaluations,
        )
        return float(found.cost), signs, found.x

    tried = []
    for row, column in _starts(errors):
        signs, size = np.sign([grid[row], grid[column]]), np.abs([grid[row], grid[column]])
        angles = np.arcsin(2 * np.log(size / SMALLEST * 4) / math.log(WIDEST / SMALLEST * 4) - 1)
        tried.append(refined(signs, angles, 40))
    tried.sort(key=lambda entry: entry[0])
    # A start that creeps along a flat valley rarely wins; the two best go on to the end.
    _, signs, angles = min((refined(*entry[1:], 200) for entry in tried[:2]), key=lambda entry: entry[0])
    w3, w4 = of_angle(signs, _down_the_valley(lambda at: residuals(of_angle(signs, at)), angles))
    return _linear(runs, float(w3), float(w4))


def _down_the_valley(residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Where Gauss-Newton steps creep (a long flat valley with noise), a simplex still gets to the lowest point."""

    def error(at: np.ndarray) -> float:
        found = residuals(at)
        return float(found @ found)

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxfev": 400}
    lower = minimize(error, start, method="Nelder-Mead", options=options)
    return lower.x if lower.fun < error(start) else start


def _starts(errors: np.ndarray, most: int = 5) -> list[tuple[int, int]]:
    """The best cells that are lower than their neighbours of the same quadrant of signs, at most three a quadrant."""
    half, found = len(errors) // 2, []
    for rows in (0, half):
        for columns in (0, half):
            part = np.pad(errors[rows : rows + half, columns : columns + half], 1, constant_values=np.inf)
            lowest = np.min(np.lib.stride_tricks.sliding_window_view(part, (3, 3)), axis=(2, 3))
            inner = part[1:-1, 1:-1]
            places = np.argwhere(inner <= lowest)
            order = np.argsort(inner[places[:, 0], places[:, 1]], kind="stable")[:3]
            found += [(rows + int(i), columns + int(j)) for i, j in places[order]]
    return sorted(found, key=lambda cell: float(errors[cell]))[:most]


def _linear(runs: _Runs, w3: float, w4: float) -> _Solution:
    """w1, w2 and the constants for given (w3, w4)."""
    terms = np.column_stack([term(runs.depth, w3), term(runs.width, w4)])
    centred = _centred(runs, terms)
    lengths = np.maximum(np.linalg.norm(centred, axis=0), 1e-300)
    w = np.linalg.lstsq(centred / lengths, _centred(runs, runs.metric), rcond=None)[0] / lengths
    constants = runs.members.T @ (runs.metric - terms @ w) / runs.members.sum(axis=0)
    residuals = runs.metric - terms @ w - runs.members @ constants
    return _Solution((float(w[0]), float(w[1]), w3, w4), constants, residuals)


def _leave_one_size_out(runs: _Runs) -> np.ndarray:
    """[n] errors of predictions from fits without the runs of the same sizes and data (repeats would give it away)."""
    cells = np.column_stack([runs.depth, runs.width, runs.members])
    errors = np.full(len(runs.metric), np.nan)
    for cell in np.unique(cells, axis=0):
        rows = (cells == cell).all(axis=1)
        rest = runs.without(rows)
        if (rest.members.sum(axis=0) == 0).any():
            raise DataError("an amount of data has a single size", expected="at least two sizes for each")
        found = _solve(rest)
        w1, w2, w3, w4 = found.weights
        predicted = w1 * term(runs.depth[rows], w3) + w2 * term(runs.width[rows], w4)
        errors[rows] = runs.metric[rows] - predicted - runs.members[rows] @ found.constants
    return errors


def _r2(metric: np.ndarray, residuals: np.ndarray) -> float:
    total = float(((metric - metric.mean()) ** 2).sum())
    return 1.0 - float(residuals @ residuals) / total if total > 0 else 0.0


def shape_of(weight: float, exponent: float) -> tuple[Regime, float | None]:
    """Regime of weight * g(x; exponent) over x >= 1, and its peak where it has one."""
    if exponent > 0:
        return ("increasing" if weight < 0 else "decreasing"), None
    if weight <= 0:
        return "valley", None
    power = -math.log(PF) / exponent
    return "peak", math.exp(power) if power < 700 else math.inf


def _axis(runs: _Runs, fitted: _Solution, number: int, freedom: int) -> Axis:
    """Regime and optimum, with the interval of all exponents whose error is not significantly worse."""
    weights = fitted.weights
    regime, optimum = shape_of(weights[number], weights[2 + number])
    if optimum is None:
        return Axis(regime, None, None, None)
    own = np.unique(np.append(_signed_grid(2 * PROFILE), weights[2 + number]))
    other = np.unique(np.append(_signed_grid(PROFILE), weights[3 - number]))
    errors = _errors(runs, own, other) if number == 0 else _errors(runs, other, own).T
    smallest = float(fitted.residuals @ fitted.residuals)
    limit = smallest * (1 + float(f_distribution.ppf(LEVEL, 1, freedom)) / freedom)
    optima = [optimum]
    for row in np.flatnonzero(errors.min(axis=1) <= limit):
        w, free = float(own[row]), float(other[errors[row].argmin()])
        found = _linear(runs, *((w, free) if number == 0 else (free, w)))
        shape, place = shape_of(found.weights[number], w)
        optima += {"peak": [place or 0.0], "increasing": [math.inf], "decreasing": [1.0]}.get(shape, [1.0, math.inf])
    return Axis(regime, optimum, min(optima), max(optima))


def _gradient(
    depth: np.ndarray, width: np.ndarray, weights: tuple[float, float, float, float], members: np.ndarray
) -> np.ndarray:
    """[n, 4 + K] derivatives of y by w1, w2, w3, w4 and the constants."""
    w1, w2, w3, w4 = weights
    slopes = [w * np.log(x) * (x**-e / PF - 1) for w, x, e in ((w1, depth, w3), (w2, width, w4))]
    return np.column_stack([term(depth, w3), term(width, w4), *slopes, members])


def _covariance(jacobian: np.ndarray, variance: float) -> np.ndarray:
    lengths = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    scaled = jacobian / lengths
    return np.linalg.pinv(scaled.T @ scaled, rcond=1e-12, hermitian=True) * variance / np.outer(lengths, lengths)


def fit_data_term(amounts: Sequence[float], constants: Sequence[float]) -> DataTerm:
    """Separate w5, kappa and b from the constants of several amounts of data.

    For fixed w5 the term is linear in the factor of x^-w5 (at most 0) and an offset; w5 is searched on a grid of either
    sign and refined. Three amounts fit two laws, of opposite sign, equally well; then, and where noise leaves the
    question open, w5 < 0 is taken (a logarithmic gain and a growing decay, as for depth and width) and the sign is
    named in `unidentified`.

    Args:
        amounts: [K] x_k, events times entropy.
        constants: [K] c_k of the law at each amount.

    Raises:
        DataError: Fewer than three different amounts, or an amount that is not positive.
    """
    x, c = np.asarray(amounts, dtype=np.float64), np.asarray(constants, dtype=np.float64)
    if len(np.unique(x)) < 3:
        raise DataError(
            "D, w5 and b cannot be told apart",
            found=f"{len(np.unique(x))} amounts of data",
            expected=">= 3",
            remedy="train the grid on at least three shares of the examples (stages.0.max_examples)",
        )
    if not (np.isfinite(x) & (x > 0)).all():
        raise DataError("amounts of data must be positive", found=str(x.min()))
    centre = float(np.log(x).mean())
    z = np.log(x) - centre
    falling, rising = _data_exponent(-1, z, c), _data_exponent(1, z, c)
    # Slope and bend of c fix |w5| only up to two solutions of opposite sign; a third derivative tells them apart.
    best = min(falling, rising, key=lambda found: found[1])
    freedom = len(np.unique(x)) - 3
    slack = 1 + float(f_distribution.ppf(LEVEL, 1, freedom)) / freedom if freedom else math.inf
    known = max(falling[1], rising[1]) > best[1] * slack + 1e-20 * float(np.var(c)) and freedom > 0
    w5 = best[0] if known else falling[0]
    _, scale, mean = _data_residuals(w5, z, c)
    scale_of_x = scale * math.exp(w5 * centre)
    offset = mean + w5 * centre
    unknown = () if known else ("sign of w5",)
    if scale_of_x >= 0:
        return DataTerm(w5, math.inf, math.inf, (*unknown, "kappa", "b"), 0.0, offset)
    kappa = math.exp(-math.log(-PF * scale_of_x) / w5)
    return DataTerm(w5, kappa, offset + w5 * math.log(kappa), unknown, scale_of_x, offset)


def _data_exponent(sign: int, z: np.ndarray, c: np.ndarray) -> tuple[float, float]:
    """The best w5 of a sign, and its squared error."""
    grid = sign * np.geomspace(1e-3, LARGEST, 400)
    start = float(grid[int(np.argmin([float(np.square(_data_residuals(w, z, c)[0]).sum()) for w in grid]))])
    size = float(np.std(c)) or 1.0
    found = least_squares(
        lambda w: _data_residuals(float(w[0]), z, c)[0] / size,
        [start],
        bounds=sorted((sign * 1e-3 / 4, sign * 2 * LARGEST)),
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    return float(found.x[0]), 2 * float(found.cost) * size**2


def _data_residuals(w5: float, z: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Residuals [K], factor (<= 0) of exp(-w5 z) and offset for a given w5."""
    column, left = np.exp(-w5 * z), c + w5 * z
    centred = column - column.mean()
    factor = min(0.0, float(centred @ left / (centred @ centred)))
    offset = float((left - factor * column).mean())
    return left - factor * column - offset, factor, offset


@dataclass(frozen=True)
class ScalingLaw:
    """y = depth_slope ln N + width_slope ln h + c, the law without its decaying part; R^2 as in `PerformanceFit`."""

    depth_slope: float
    width_slope: float
    constants: dict[int, float]
    r2: float
    left_out_r2: float


def fit_scaling_law(
    depth: Sequence[float] | np.ndarray,
    width: Sequence[float] | np.ndarray,
    metric: Sequence[float] | np.ndarray,
    settings: Sequence[int] | np.ndarray | None = None,
) -> ScalingLaw:
    """Fit the baseline; arguments and errors as in `fit_performance_law`."""
    runs = _checked(depth, width, metric, settings)
    columns = np.column_stack([np.log(runs.depth), np.log(runs.width), runs.members])
    found = np.linalg.lstsq(columns, runs.metric, rcond=None)[0]
    cells = np.column_stack([runs.depth, runs.width, runs.members])
    errors = np.empty(len(runs.metric))
    for cell in np.unique(cells, axis=0):
        rows = (cells == cell).all(axis=1)
        rest = np.linalg.lstsq(columns[~rows], runs.metric[~rows], rcond=None)[0]
        errors[rows] = runs.metric[rows] - columns[rows] @ rest
    return ScalingLaw(
        float(found[0]),
        float(found[1]),
        dict(zip(runs.keys, map(float, found[2:]), strict=True)),
        _r2(runs.metric, runs.metric - columns @ found),
        _r2(runs.metric, errors),
    )
