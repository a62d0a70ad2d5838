"""How item codes use their codebooks, as figures and as PNG drawings.

A healthy level uses most of its codes and no code holds a large part of the catalogue; codes of a level that mean
something lie together where the item features do. Matplotlib draws without a display and without `pyplot`, so nothing
is shared with drawings of the caller.

Shapes: I items, M levels, W codes of a level, d feature dimensions.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.errors import DependencyError

MOST_POINTS = 4000
"""Items a scatter shows; more would hide one another."""
MOST_FITTED = 20_000
"""Items the plane of the scatter is computed from."""
MOST_PANELS = 4
"""Levels the scatter shows."""
_GOLDEN = 0.6180339887498949
_STYLE: Any = {
    "text.parse_math": False,  # a name with a dollar sign is no formula
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class LevelUsage:
    """How one level of codes is used.

    Args:
        level: Its number, from 1.
        name: Its name, where the tokenizer names its levels.
        size: W, codes it has.
        used: Codes at least one item has.
        perplexity: exp of the entropy of its codes: how many codes would be as varied if all were used alike.
        largest: Items in its fullest code.
        largest_share: The same as a share of all items.
    """

    level: int
    name: str | None
    size: int
    used: int
    perplexity: float
    largest: int
    largest_share: float

    @property
    def title(self) -> str:
        """ "level 2 (title)", or "level 2" without a name."""
        return f"level {self.level}" + (f" ({self.name})" if self.name else "")


def level_usage(codes: np.ndarray, sizes: Sequence[int], names: Sequence[str] | None = None) -> list[LevelUsage]:
    """The figures of every level.

    Args:
        codes: [I, M] int64, I >= 1.
        sizes: (M,) codes per level.
        names: (M,) names of the levels.
    """
    found = []
    for level, counts in enumerate(_counts(codes, sizes)):
        share = counts[counts > 0] / len(codes)
        found.append(
            LevelUsage(
                level=level + 1,
                name=names[level] if names else None,
                size=int(sizes[level]),
                used=len(share),
                perplexity=float(np.exp(-(share * np.log(share)).sum())),
                largest=int(counts.max()),
                largest_share=float(share.max()),
            )
        )
    return found


def sharing_items(codes: np.ndarray) -> int:
    """How many of the items with codes [I, M] have the code of another item."""
    _, place, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return int((counts[place.reshape(-1)] > 1).sum())


def draw_usage(codes: np.ndarray, sizes: Sequence[int], names: Sequence[str] | None, path: Path) -> Path:
    """Items of every code, fullest first, a panel per level; a dashed line shows equal use.

    Args:
        codes: [I, M] int64.
        sizes: (M,) codes per level.
        names: (M,) names of the levels.
        path: The PNG file.

    Raises:
        DependencyError: Matplotlib is missing.
    """
    usage, columns = level_usage(codes, sizes, names), min(MOST_PANELS, len(sizes))
    rows = -(-len(sizes) // columns)

    def paint(figure: Any) -> None:
        panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes, counts, level in zip(panels, _counts(codes, sizes), usage, strict=False):
            axes.stairs(np.sort(counts)[::-1], np.arange(level.size + 1), fill=True, color="#3f7fd9")
            axes.axhline(len(codes) / level.size, color="black", linewidth=0.8, linestyle="--")
            axes.set_title(f"{level.title}: {level.used:,} of {level.size:,} used\nperplexity {level.perplexity:,.1f}")
            axes.set_xlabel("codes, fullest first")
            axes.set_xlim(0, level.size)
        panels[0].set_ylabel("items")
        for axes in panels[len(sizes) :]:
            axes.set_axis_off()

    return _save(paint, (3.2 * columns, 2.7 * rows), path)


def draw_levels(features: np.ndarray, codes: np.ndarray, names: Sequence[str] | None, path: Path) -> Path:
    """The items on the two main axes of their features, coloured by their code, a panel per level (the first four).

    Args:
        features: [I, d] one vector per item.
        codes: [I, M] int64.
        names: (M,) names of the levels.
        path: The PNG file.

    Raises:
        DependencyError: Matplotlib is missing.
    """
    shown = _spread(len(codes), MOST_POINTS)
    points, shares = plane(features, shown)
    panels = min(MOST_PANELS, codes.shape[1])

    def paint(figure: Any) -> None:
        for level, axes in enumerate(np.ravel(figure.subplots(1, panels, squeeze=False))):
            _, place, counts = np.unique(codes[shown, level], return_inverse=True, return_counts=True)
            ranks = np.argsort(np.argsort(-counts, kind="stable"))
            colours = np.array([_colour(rank) for rank in range(len(counts))])[ranks[place]]
            axes.scatter(points[:, 0], points[:, 1], c=colours, s=7, linewidths=0)
            name = f" ({names[level]})" if names else ""
            axes.set_title(f"level {level + 1}{name}: {len(counts):,} codes shown")
            axes.set_xlabel(f"component 1 ({shares[0]:.0%} of the variance)")
            axes.set_xticks([])
            axes.set_yticks([])
        figure.axes[0].set_ylabel(f"component 2 ({shares[1]:.0%})")

    return _save(paint, (3.4 * panels, 3.3), path)


def plane(features: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The two main axes of item features (PCA); features of fewer dimensions, or without variance, give zeros there.

    Args:
        features: [I, d].
        shown: [n] rows to place.

    Returns:
        ([n, 2] their places, the shares of the variance of both axes).
    """
    points, shares = np.zeros((len(shown), 2)), np.zeros(2)
    fitted = np.asarray(features[_spread(len(features), MOST_FITTED)], dtype=np.float64)
    if float(fitted.var(axis=0).sum()) > 0:
        from sklearn.decomposition import PCA

        axes = min(2, *fitted.shape)
        model = PCA(axes, random_state=0).fit(fitted)
        points[:, :axes] = model.transform(np.asarray(features[shown], dtype=np.float64))
        shares[:axes] = model.explained_variance_ratio_
    return points, (float(shares[0]), float(shares[1]))


def require_matplotlib() -> None:
    """Raise `DependencyError` where matplotlib is missing; called before a long fit, not after."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise DependencyError(
            "matplotlib", extra="report", purpose="drawing item codes", also="or leave the drawings out: --no-plots"
        ) from error


def _counts(codes: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Items of every code [W], level by level."""
    return [np.bincount(column, minlength=size) for column, size in zip(codes.T, sizes, strict=True)]


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers from 0 to count - 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _colour(rank: int) -> tuple[float, float, float]:
    """Hues a golden section apart, for any number of codes; those of the fullest codes differ most."""
    return colorsys.hsv_to_rgb((0.6 + rank * _GOLDEN) % 1.0, 0.75, (0.85, 0.62)[rank % 2])


def _save(paint: Callable[[Any], None], size: tuple[float, float], path: Path) -> Path:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        figure.savefig(path, dpi=150, metadata={"Software": None})
    return path
