"""Pictures of a plan and of a sweep, as SVG and PNG files.

Matplotlib draws without a display and without `pyplot`, so nothing is shared with drawings of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.errors import DependencyError

if TYPE_CHECKING:
    from llmrec.analysis.performance_law import PerformanceFit
    from llmrec.analysis.planner import Choice, PilotRun
    from llmrec.analysis.scaling import PowerLaw

COLOURS = ("#3f7fd9", "#d9812b", "#2a9d7f", "#b5539b", "#b8941f", "#7a6fd0", "#d1495b", "#6b8e9f")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmrec",  # clip paths get the same ids in every writing
    "text.parse_math": False,  # a name with a dollar sign is no formula
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def require_matplotlib() -> None:
    """Raise `DependencyError` where matplotlib is missing; called before hours of training, not after."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise DependencyError("matplotlib", extra="report", purpose="drawing the plan") from error


def draw_surface(fit: PerformanceFit, runs: Sequence[PilotRun], choice: Choice, metric: str, stem: Path) -> list[Path]:
    """The fitted metric over depth and width, the pilot's runs and the chosen size.

    Args:
        fit: The law.
        runs: The pilot; larger dots are better runs.
        choice: Marked with a star.
        metric: Name of the metric.
        stem: Path of the files without suffix.

    Returns:
        The written files.
    """
    depths, widths = (np.array([getattr(run, name) for run in runs], float) for name in ("depth", "width"))
    values = np.array([run.metric for run in runs])
    across = np.geomspace(max(1, widths.min() / 2), widths.max() * 2, 120)
    down = np.geomspace(max(1, depths.min() / 2), depths.max() * 2, 120)
    surface = fit.predict(down[:, None], across[None, :])

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        filled = axes.contourf(across, down, surface, levels=18, cmap="viridis")
        figure.colorbar(filled, ax=axes, label=f"fitted {metric}")
        spread = max(float(np.ptp(values)), 1e-12)
        axes.scatter(widths, depths, s=25 + 75 * (values - values.min()) / spread, c="white", edgecolors="black")
        label = f"{choice.source}: depth {choice.depth}, width {choice.width}"
        axes.plot(choice.width, choice.depth, marker="*", markersize=17, color="#d1495b", linestyle="", label=label)
        _log_axis(axes.xaxis, axes.set_xscale, np.unique(widths))
        _log_axis(axes.yaxis, axes.set_yscale, np.unique(depths))
        axes.set(xlabel="width", ylabel="depth", title=f"performance law, R^2 on left-out sizes {fit.left_out_r2:.2f}")
        axes.legend(loc="upper left", fontsize=8.5)

    return _save(paint, (6.0, 4.4), stem)


def draw_power_laws(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float], PowerLaw | None]]],
    across: str,
    stem: Path,
) -> list[Path]:
    """Values against model size with the fitted curve and its interval, a panel each.

    Args:
        panels: Title ("loss", "ndcg@10") -> series -> sizes, values and the fit (None where there was nothing to fit).
        across: What a size is, for the axis.
        stem: Path of the files without suffix.

    Returns:
        The written files.
    """

    def paint(figure: Any) -> None:
        for axes, (title, series) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for number, (name, (sizes, values, law)) in enumerate(series.items()):
                colour = COLOURS[number % len(COLOURS)]
                label = name if law is None else f"{name}: exponent {law.b:.2f}, R^2 {law.r2:.2f}"
                axes.plot(sizes, values, marker="o", linestyle="", color=colour, label=label)
                if law is not None:
                    line = np.geomspace(min(sizes), max(sizes), 100)
                    axes.plot(line, law.predict(line), color=colour, linewidth=1.4)
                    axes.fill_between(line, *law.band(line), color=colour, alpha=0.18, linewidth=0)
            axes.set_xscale("log")
            axes.set(title=title, xlabel=across)
            axes.legend(frameon=False, fontsize=8)

    return _save(paint, (4.6 * len(panels), 3.6), stem)


def _log_axis(axis: Any, set_scale: Callable[..., None], ticks: np.ndarray) -> None:
    from matplotlib.ticker import NullFormatter

    set_scale("log")
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter(NullFormatter())


def _save(paint: Callable[[Any], None], size: tuple[float, float], stem: Path) -> list[Path]:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stem.parent.mkdir(parents=True, exist_ok=True)
    written = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=150)
    return written
