"""The planner: measures a data set, and reads depth and width off a fitted performance law.

The steps follow the two applications of the performance law's paper (choosing parameters, judging what a larger model
would bring); thresholds, the pilot grid and the refusals are ours:

1. entropy and events of the training histories at L = 25, 50, 100, 200, with a warning where histories are redundant;
2. a pilot grid of at least 12 runs (`recipes/performance_law/`), its corners trained with a second seed;
3. the fit, rejected ("undetermined") where sizes that were left out are predicted with R^2 < 0.5, or where the 80%
   interval of the best depth spans more than a factor of 4. The best pilot within the budget is named instead;
4. the best predicted size within the budget: of a fine grid where both terms have a peak, else of the pilot's sizes;
5. what twice the depth and width, and twice the data, would add.

Nothing is trained here and nothing imports torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.analysis.entropy import SequenceEntropy, dataset_entropy
from llmrec.analysis.performance_law import PerformanceFit, fit_performance_law, fit_scaling_law
from llmrec.data.schema import ITEM, SPLITS, USER
from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset

HISTORIES = (25, 50, 100, 200)
REDUNDANT = 0.3
"""Real entropy over ln(items) below which histories are called redundant."""
FEWEST_RUNS, LEAST_R2, WIDEST_INTERVAL = 12, 0.5, 4.0

Source = Literal["fitted law", "pilot sizes", "best pilot"]
Cost = Callable[[int, int], float]


@dataclass(frozen=True)
class HistoryEntropy:
    """The training histories cut to their latest events.

    Args:
        history: L.
        mean_length: Events a user, after cutting.
        entropy: What was measured.
        novelty: Real entropy over ln(items): about 1 for histories without any repetition.
    """

    history: int
    mean_length: float
    entropy: SequenceEntropy
    novelty: float


@dataclass(frozen=True)
class Measured:
    """A data set in numbers; `warnings` are sentences for people."""

    name: str
    users: int
    items: int
    events: int
    rows: tuple[HistoryEntropy, ...]
    warnings: tuple[str, ...]


def measure(dataset: InteractionDataset, histories: Sequence[int] = HISTORIES) -> Measured:
    """Measure the training events of a data set; validation and test events stay unseen."""
    train = dataset.split_codes == SPLITS.index("train")
    users, items = dataset.column(USER)[train], dataset.column(ITEM)[train].astype(np.int64)
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.zeros(0, np.int64)
    sequences = np.split(items, starts[1:])
    rows = []
    for history in histories:
        entropy = dataset_entropy([sequence[-history:] for sequence in sequences])
        novelty = entropy.real / math.log(max(2, dataset.num_items))
        rows.append(HistoryEntropy(history, entropy.tokens / len(sequences), entropy, novelty))
    return Measured(
        dataset.meta.name, len(sequences), dataset.num_items, len(items), tuple(rows), tuple(_warnings(rows))
    )


def _warnings(rows: Sequence[HistoryEntropy]) -> list[str]:
    redundant = [row for row in rows if row.novelty < REDUNDANT]
    found = []
    if redundant:
        worst = min(redundant, key=lambda row: row.novelty)
        shorter = [row.history for row in rows if row.novelty >= REDUNDANT]
        found.append(
            f"histories are redundant at L = {', '.join(str(row.history) for row in redundant)}: real entropy is "
            f"{worst.novelty:.2f} of ln(items), below {REDUNDANT}. Consider repeats: first, to drop repeated events"
            + (f", or max_history {max(shorter)}" if shorter else "")
        )
    same = [before.history for before, row in itertools.pairwise(rows) if before.entropy.tokens == row.entropy.tokens]
    if same:
        found.append(f"no training history is longer than {min(same)} events: a longer max_history changes nothing")
    return found


@dataclass(frozen=True)
class PilotRun:
    """One finished run of a pilot.

    Args:
        depth, width: N and h.
        metric: Best validation metric, as a fraction.
        amount: Events it trained on times real entropy.
        name: Of the run.
        seed: Of the run.
    """

    depth: int
    width: int
    metric: float
    amount: float = 1.0
    name: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Args:
        limit: Largest cost.
        cost: Cost of a depth and width. A larger model is taken to cost no less.
        unit: For sentences, such as "parameters" or "ms".
    """

    limit: float
    cost: Cost
    unit: str


@dataclass(frozen=True)
class Choice:
    """A depth and width.

    Args:
        source: "fitted law" (between and beyond the pilot's sizes), "pilot sizes" (the best predicted of them) or "best
            pilot" (measured; nothing is predicted).
        predicted, low, high: Metric; low and high are None for a measured one.
        cost: In the budget's unit; None without a budget.
    """

    depth: int
    width: int
    source: Source
    predicted: float
    low: float | None
    high: float | None
    cost: float | None


@dataclass(frozen=True)
class Expansion:
    """What more would bring: predicted change of the metric with its interval.

    Args:
        model: Twice the depth and width: change, low, high.
        data: Twice the data; None unless the law was fitted at three or more amounts of data.
    """

    model: tuple[float, float, float]
    data: float | None


@dataclass(frozen=True)
class Plan:
    """What the pilot says.

    Args:
        status: "determined" or "undetermined".
        reasons: Why it is undetermined.
        choice: The recommendation, or the best pilot.
        regimes: Words on depth and width.
        noise: Standard deviation between seeds of one size; None without repeated sizes.
        fit: The law; None where there are too few runs to fit it.
        scaling_r2: R^2 of the law without decay: fitted points, left-out sizes.
        expansion: None where it is undetermined.
        caveats: Sentences for people.
    """

    status: Literal["determined", "undetermined"]
    reasons: tuple[str, ...]
    choice: Choice
    regimes: tuple[str, ...]
    noise: float | None
    fit: PerformanceFit | None
    scaling_r2: tuple[float, float] | None
    expansion: Expansion | None
    caveats: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Plain values for plan.json."""
        names = ("status", "reasons", "regimes", "noise", "scaling_r2", "caveats")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found |= {"choice": asdict(self.choice), "expansion": self.expansion and asdict(self.expansion), "fit": None}
        if self.fit is not None:
            fields = ("w1", "w2", "w3", "w4", "constants", "points", "r2", "left_out_r2", "unidentified")
            found["fit"] = {name: getattr(self.fit, name) for name in fields}
            found["fit"] |= {"depth": asdict(self.fit.depth), "width": asdict(self.fit.width)}
            found["fit"]["residuals"] = self.fit.residuals.tolist()
            data = self.fit.data_term
            found["fit"]["data_term"] = data and {name: getattr(data, name) for name in ("w5", "kappa", "b")}
        return found


def make_plan(
    runs: Sequence[PilotRun], budget: Budget | None = None, allowed: Callable[[int, int], bool] | None = None
) -> Plan:
    """Fit the law to a pilot and choose a size.

    Args:
        runs: Finished runs.
        budget: What the model may cost; None: anything.
        allowed: Whether a depth and width can be built (heads must divide the width); None: all can.

    Raises:
        RecipeError: There are no runs, or not even the smallest pilot is within the budget.
        DataError: The runs cannot be fitted at all (one depth, a metric in per cent); see `fit_performance_law`.
    """
    if not runs:
        raise RecipeError("found no finished run; expected a pilot to fit")
    limits = _Limits(budget, allowed)
    noise = seed_noise(runs)
    if len(runs) < FEWEST_RUNS:
        reason = f"{len(runs)} pilot runs; at least {FEWEST_RUNS} are needed"
        return Plan("undetermined", (reason,), _best_pilot(runs, limits), (), noise, None, None, None, ())
    fit, scaling_r2 = _fit(runs)
    reasons = refusals(fit)
    regimes = tuple(_regime_words(name, axis) for name, axis in (("depth", fit.depth), ("width", fit.width)))
    caveats = _caveats(fit, noise, scaling_r2)
    if reasons:
        return Plan("undetermined", reasons, _best_pilot(runs, limits), regimes, noise, fit, scaling_r2, None, caveats)
    choice = recommend(fit, runs, limits.budget, allowed)
    here = (choice.depth, choice.width)
    doubled = max(run.amount for run in runs)
    law = fit.data_term
    data = None if law is None else law.constant(2 * doubled) - law.constant(doubled)
    expansion = Expansion(fit.change(here, (2 * here[0], 2 * here[1])), data)
    return Plan("determined", (), choice, regimes, noise, fit, scaling_r2, expansion, caveats)


def _fit(runs: Sequence[PilotRun]) -> tuple[PerformanceFit, tuple[float, float]]:
    amounts = sorted({run.amount for run in runs})
    settings = [amounts.index(run.amount) for run in runs]
    columns = ([run.depth for run in runs], [run.width for run in runs], [run.metric for run in runs], settings)
    fit = fit_performance_law(*columns, amounts=dict(enumerate(amounts)) if len(amounts) > 1 else None)
    plain = fit_scaling_law(*columns)
    return fit, (plain.r2, plain.left_out_r2)


def refusals(fit: PerformanceFit) -> tuple[str, ...]:
    """Why nothing should be read off a fit; empty where it can be trusted."""
    found = []
    if fit.left_out_r2 < LEAST_R2:
        found.append(f"sizes left out of the fit are predicted with R^2 {fit.left_out_r2:.2f}, below {LEAST_R2}")
    if fit.depth.spread > WIDEST_INTERVAL:
        found.append(
            f"the 80% interval of the best depth is {fit.depth.low:.3g} to {fit.depth.high:.3g}, "
            f"more than a factor of {WIDEST_INTERVAL:g}"
        )
    return tuple(found)


def seed_noise(runs: Sequence[PilotRun]) -> float | None:
    """Standard deviation of the metric between runs of one size and amount of data; None without repeats."""
    cells: dict[tuple[int, int, float], list[float]] = {}
    for run in runs:
        cells.setdefault((run.depth, run.width, run.amount), []).append(run.metric)
    repeated = [np.array(values) for values in cells.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    return math.sqrt(sum(float(v.var()) * len(v) for v in repeated) / freedom) if freedom else None


def recommend(
    fit: PerformanceFit,
    runs: Sequence[PilotRun],
    budget: Budget | None = None,
    allowed: Callable[[int, int], bool] | None = None,
    *,
    depth: int | None = None,
    width: int | None = None,
) -> Choice:
    """The best predicted size within the budget.

    Where depth and width both have a peak, all sizes from half the smallest to twice the largest pilot are looked at;
    otherwise the pilot's sizes only, since a curve that keeps rising says nothing of where it ends.

    Args:
        fit: The law.
        runs: The pilot.
        budget: See `make_plan`.
        allowed: See `make_plan`.
        depth, width: Keep this one and choose the other: the terms add up, so each has its own optimum.

    Raises:
        RecipeError: Nothing is within the budget.
    """
    peaks = fit.depth.regime == fit.width.regime == "peak"
    depths, widths = sorted({run.depth for run in runs}), sorted({run.width for run in runs})
    if peaks:
        step = max(1, reduce(math.gcd, widths) // 2)
        depths = list(range(max(1, depths[0] // 2), 2 * depths[-1] + 1))
        widths = [h for h in range(step, 2 * widths[-1] + 1, step) if 2 * h >= widths[0]]
    depths, widths = ([depth] if depth else depths), ([width] if width else widths)
    sizes = list(itertools.product(depths, widths))
    predicted = fit.predict(np.array([n for n, _ in sizes]), np.array([h for _, h in sizes]))
    limits = _Limits(budget, allowed)
    # Of equal predictions the smaller model is the better one.
    for place in sorted(range(len(sizes)), key=lambda i: (-round(float(predicted[i]), 12), sizes[i])):
        n, h = sizes[place]
        if limits.admits(n, h):
            return Choice(n, h, "fitted law" if peaks else "pilot sizes", *fit.interval(n, h), cost=limits.cost(n, h))
    raise limits.nothing_fits(sizes)


class _Limits:
    """Budget and buildable sizes; costs are kept, since a latency takes a measurement."""

    def __init__(self, budget: Budget | None, allowed: Callable[[int, int], bool] | None) -> None:
        self.budget, self.allowed = budget, allowed
        self._costs: dict[tuple[int, int], float] = {}
        self._too_large: list[tuple[int, int]] = []

    def cost(self, depth: int, width: int) -> float | None:
        if self.budget is None:
            return None
        if (depth, width) not in self._costs:
            self._costs[depth, width] = float(self.budget.cost(depth, width))
        return self._costs[depth, width]

    def admits(self, depth: int, width: int) -> bool:
        if self.allowed is not None and not self.allowed(depth, width):
            return False
        if any(depth >= n and width >= h for n, h in self._too_large):
            return False  # not cheaper than one that is too large already
        cost = self.cost(depth, width)
        if cost is None or self.budget is None or cost <= self.budget.limit:
            return True
        self._too_large.append((depth, width))
        return False

    def nothing_fits(self, sizes: Sequence[tuple[int, int]]) -> RecipeError:
        smallest = min(sizes)
        if self.budget is None:
            return RecipeError(f"none of the {len(sizes)} sizes can be built; expected heads that divide the widths")
        return RecipeError(
            f"budget: found {self.budget.limit:g} {self.budget.unit}, and even depth {smallest[0]} with width "
            f"{smallest[1]} takes {self.cost(*smallest):g}; raise the budget or add smaller sizes to the pilot"
        )


def _best_pilot(runs: Sequence[PilotRun], limits: _Limits) -> Choice:
    """The size with the best mean of its runs at the most data."""
    most = max(run.amount for run in runs)
    cells: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        if run.amount == most:
            cells.setdefault((run.depth, run.width), []).append(run.metric)
    means = {size: float(np.mean(values)) for size, values in cells.items()}
    for size in sorted(means, key=lambda size: (-means[size], size)):
        if limits.admits(*size):
            return Choice(*size, "best pilot", means[size], None, None, limits.cost(*size))
    raise limits.nothing_fits(list(means))


def _regime_words(name: str, axis: Any) -> str:
    if axis.regime == "peak":
        return f"{name}: rises, then falls; best at {axis.optimum:.3g} (80% interval {axis.low:.3g} to {axis.high:.3g})"
    if axis.regime == "increasing":
        return f"{name}: monotone, still rising at the largest pilot: the largest feasible value is taken"
    if axis.regime == "decreasing":
        return f"{name}: monotone, falling: the smallest value is taken"
    return f"{name}: falls, then rises; no optimum between the ends"


def _caveats(fit: PerformanceFit, noise: float | None, scaling_r2: tuple[float, float]) -> tuple[str, ...]:
    found = []
    if fit.unidentified:
        found.append(f"not identified at these amounts of data: {', '.join(fit.unidentified)}")
    if fit.width.spread > WIDEST_INTERVAL:
        found.append(f"the best width is uncertain: 80% interval {fit.width.low:.3g} to {fit.width.high:.3g}")
    if noise is not None and noise > float(np.std(fit.residuals)) and noise > 0:
        found.append(f"runs of one size differ by {noise:.4f} between seeds, more than the law's own residuals")
    if scaling_r2[1] > fit.left_out_r2:
        found.append("the plain scaling law without decay predicts left-out sizes better")
    found.append("the law holds for this recipe: loss, dropout and learning rate move the peak")
    return tuple(found)
