"""The drawings of the report as inline SVG: bars with intervals, training curves, gate weights.

Matplotlib draws them without a display and without `pyplot`, so nothing is shared with drawings of the caller. Ink is
`currentColor`, so that a drawing follows the light or dark page, and the SVG carries no link to anywhere.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.errors import DependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#3f7fd9", "#d9812b", "#2a9d7f", "#b5539b", "#b8941f", "#7a6fd0", "#d1495b", "#6b8e9f")
"""Fill colours, readable on white and on near-black."""
MAX_POINTS = 400
"""Points a curve keeps; more would only make the page heavy."""
_INK = "#010203"  # stands for currentColor while matplotlib draws
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmrec",  # clip paths get the same ids in every writing
    "text.parse_math": False,  # a name with a dollar sign is no formula
    "font.size": 9.5,
    "font.family": "sans-serif",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def metric_bars(metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]], names: Sequence[str]) -> str:
    """Horizontal bars, one panel a metric, with the 95% interval as a whisker.

    Args:
        metrics: System -> metric -> {"mean", "low", "high"}; low and high may be None.
        names: Metrics to draw; a system without one has no bar in its panel.

    Returns:
        An `<svg>` element.
    """
    systems = list(metrics)
    places = np.arange(len(systems))[::-1]  # the first system on top
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with _style():
        figure = _figure(3.3 * columns + 0.6, rows * (0.75 + 0.3 * len(systems)))
        panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for number, axes in enumerate(panels):
            if number >= len(names):
                axes.set_axis_off()
                continue
            for place, system, colour in zip(places, systems, _colours(len(systems)), strict=True):
                _bar_with_interval(axes, float(place), metrics[system].get(names[number]), colour)
            axes.set_title(names[number], loc="left")
            axes.set_yticks(places, systems if number % columns == 0 else [""] * len(systems))
            axes.set_xlim(left=0)
            axes.set_ylim(-0.6, len(systems) - 0.4)
            axes.xaxis.set_major_locator(_few_ticks())
            axes.tick_params(axis="y", length=0)
        return _svg(figure, f"Bars of {', '.join(names)} for {', '.join(systems)}")


def _bar_with_interval(axes: Axes, place: float, value: Mapping[str, float | None] | None, colour: str) -> None:
    if value is None or value["mean"] is None:
        return
    mean, low, high = value["mean"], value.get("low"), value.get("high")
    axes.barh(place, mean, height=0.62, color=colour, alpha=0.85)
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], color=_INK, linewidth=1.4)
        for end in (low, high):
            axes.plot([end, end], [place - 0.14, place + 0.14], color=_INK, linewidth=1.4)


def training_curves(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss, validation metrics and learning rate over the steps of one stage, a panel each.

    Args:
        lines: Records of log.jsonl: `step` and any of `loss`, `learning_rate`, `eval_...`.

    Returns:
        An `<svg>` element, or None where there is nothing to draw.
    """
    quality = [n for n in _names(lines) if n.startswith("eval_") and "@" in n]
    panels = [
        ("loss", [n for n in ("loss", "eval_loss") if _points(lines, n) is not None]),
        ("validation", [n for n in quality if _points(lines, n) is not None]),
        ("learning rate", [n for n in ("learning_rate",) if _points(lines, n) is not None]),
    ]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return None
    with _style():
        figure = _figure(3.5 * len(panels), 2.5)
        for axes, (title, names) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
            for name, colour in zip(names, _colours(len(names)), strict=True):
                points = _points(lines, name)
                assert points is not None
                marker = "o" if len(points[0]) < 30 else None
                label = {"loss": "training", "eval_loss": "validation"}.get(name, name.removeprefix("eval_"))
                axes.plot(*points, color=colour, linewidth=1.5, marker=marker, markersize=3, label=label)
            axes.set_title(title, loc="left")
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(_few_ticks())
            if title != "learning rate":
                axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
        return _svg(figure, "Training curves: " + ", ".join(title for title, _ in panels))


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and finite values of one field, thinned to `MAX_POINTS` by means of neighbours; None without any."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return None
    parts = np.array_split(points, min(MAX_POINTS, len(points)))
    means = np.stack([part.mean(axis=0) for part in parts])
    return means[:, 0], means[:, 1]


def gate_plots(weights: np.ndarray) -> str:
    """Four views of expert weights: mean use, shares per user, their spread, and the entropy per user.

    Args:
        weights: [U, E], rows sum to 1.
    """
    users, experts = weights.shape
    colours = _colours(experts)
    with _style():
        figure = _figure(10.2, 5.0)
        use, stack, spread, entropy = np.ravel(figure.subplots(2, 2))
        favourite = np.bincount(weights.argmax(axis=1), minlength=experts) / users
        use.bar(np.arange(experts) - 0.2, weights.mean(axis=0), width=0.38, color=colours, alpha=0.9)
        use.bar(np.arange(experts) + 0.2, favourite, width=0.38, color=colours, alpha=0.4)
        _label(use, "expert use: mean weight (solid), share of users it leads (pale)", "expert")
        shown = _ordered_sample(weights)
        bottom = np.zeros(len(shown))
        for expert in range(experts):
            stack.fill_between(
                np.arange(len(shown)), bottom, bottom + shown[:, expert], color=colours[expert], step="mid", linewidth=0
            )
            bottom = bottom + shown[:, expert]
        _label(stack, f"weights of {len(shown)} users, ordered by leading expert", "user")
        bins = np.linspace(0, max(1e-6, float(weights.max())), 31)
        for expert in range(experts):
            spread.hist(weights[:, expert], bins=bins, histtype="step", color=colours[expert], label=f"gate_{expert}")
        spread.legend(frameon=False, fontsize=7.5, ncols=2, labelcolor=_INK)
        _label(spread, "distribution of each expert's weight", "weight")
        entropy.hist(row_entropy(weights), bins=30, color=PALETTE[0], alpha=0.85)
        entropy.axvline(np.log(experts), color=_INK, linewidth=1, linestyle="--")
        _label(entropy, f"entropy per user (dashed: uniform, ln {experts})", "nats")
        for axes in (use, stack, spread, entropy):
            axes.xaxis.set_major_locator(_few_ticks(integer=axes in (use, stack)))
        return _svg(figure, f"Gate weights of {experts} experts over {users} users")


def band_plots(rows: Sequence[Mapping[str, Any]]) -> str:
    """Three views of spectral bands, one group of bars per signal: energy, gate weight, share in the score.

    Args:
        rows: signal, band (from 1), energy, gate and margin of every band.
    """
    signals = list(dict.fromkeys(str(row["signal"]) for row in rows))
    bands = sorted({int(row["band"]) for row in rows})
    colours, width = _colours(len(bands)), 0.8 / len(bands)
    with _style():
        figure = _figure(10.2, 2.9)
        views = (("energy", "share of the signal's energy"), ("gate", "mean gate weight"),
                 ("margin", "what the band adds to a true item's lead"))  # fmt: skip
        for axes, (name, title) in zip(np.ravel(figure.subplots(1, 3)), views, strict=True):
            for row in rows:
                place = signals.index(str(row["signal"])) + (bands.index(int(row["band"])) + 0.5) * width - 0.4
                axes.bar(place, float(row[name]), width=width * 0.92, color=colours[bands.index(int(row["band"]))])
            axes.set_xticks(range(len(signals)), signals)
            _label(axes, title, f"bands 1 to {len(bands)}, low frequencies first")
        return _svg(figure, f"Spectral bands of {', '.join(signals)}")


def row_entropy(weights: np.ndarray) -> np.ndarray:
    """[U] entropy -sum_e w_e ln w_e of each row of [U, E], in nats."""
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=1)


def _ordered_sample(weights: np.ndarray, most: int = 200) -> np.ndarray:
    rows = weights[np.linspace(0, len(weights) - 1, min(most, len(weights))).astype(int)]
    return rows[np.lexsort((-rows.max(axis=1), rows.argmax(axis=1)))]


def _label(axes: Axes, title: str, bottom: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set_xlabel(bottom)


def _colours(count: int) -> list[str]:
    return [PALETTE[number % len(PALETTE)] for number in range(count)]


def _few_ticks(integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, integer=integer)


def check_matplotlib() -> None:
    """Raise `DependencyError` where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise DependencyError("matplotlib", extra="report", purpose="drawing the report") from error


def _style() -> Any:
    check_matplotlib()
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# The style element would reach the whole page, and the rest names addresses that nothing needs.
_drop = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>"
    r"|\sxmlns(?::\w+)?=\"[^\"]*\"",
    re.DOTALL,
)
_numbers = itertools.count(1)
_ids = re.compile(r"(\bid=\"|href=\"#|url\(#)")


def _svg(figure: Figure, description: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = _drop.sub("", buffer.getvalue()).replace("xlink:href", "href").replace(_INK, "currentColor").strip()
    # Ids are counted from one in every drawing; on a page with several they must differ.
    prefix = f"p{next(_numbers)}-"
    text = _ids.sub(lambda found: found[1] + prefix, text)
    return re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", _root(description), text, count=1)


def _root(description: str) -> Any:
    label = escape(description, quote=True)

    def make(found: re.Match[str]) -> str:
        width = float(found[1].split()[2])
        # Never wider than drawn: blown-up letters read worse than white space.
        style = f"width:100%;max-width:{width * 1.15:.0f}px"
        return f'<svg viewBox="{found[1]}" role="img" aria-label="{label}" style="{style}">'

    return make
