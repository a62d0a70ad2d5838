"""Figures of item codes against counting by hand, and drawings of catalogues of every size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from llmrec.errors import DependencyError
from llmrec.reporting.code_plots import draw_levels, draw_usage, level_usage, plane, require_matplotlib, sharing_items

PNG = b"\x89PNG\r\n"


def test_figures_are_those_of_counting_by_hand() -> None:
    codes = np.array([[0, 2], [0, 0], [0, 2], [1, 1]])
    first, second = level_usage(codes, (4, 3), ("category", "title"))
    assert (first.level, first.name, first.size, first.used, first.largest, first.largest_share) == (
        1, "category", 4, 2, 3, 0.75,
    )  # fmt: skip
    assert first.perplexity == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert (second.used, second.largest) == (3, 2) and second.perplexity == pytest.approx(2 * np.sqrt(2))
    assert sharing_items(codes) == 2
    assert first.title == "level 1 (category)" and level_usage(codes, (4, 3))[0].title == "level 1"


def test_perplexity_of_equal_use_is_the_size_and_of_one_code_is_1() -> None:
    even, one = level_usage(np.stack([np.arange(60) % 12, np.full(60, 3)], axis=1), (12, 12))
    assert even.perplexity == pytest.approx(12) and one.perplexity == pytest.approx(1)
    assert sharing_items(np.arange(5)[:, None]) == 0


def test_the_plane_has_the_shares_of_the_singular_values() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(80, 5)) * np.array([5, 3, 1, 1, 0.1])
    points, shares = plane(features, np.arange(80))
    power = np.linalg.svd(features - features.mean(0), compute_uv=False) ** 2
    assert shares == pytest.approx(tuple(power[:2] / power.sum()))
    assert (points**2).sum(0) == pytest.approx(power[:2])


@pytest.mark.parametrize(("items", "width"), [(1, 3), (2, 1), (5, 1), (6, 4)])
def test_small_and_equal_features_have_a_plane(items: int, width: int) -> None:
    for features in (np.ones((items, width)), np.random.default_rng(0).normal(size=(items, width))):
        points, shares = plane(features, np.arange(items))
        assert points.shape == (items, 2) and np.isfinite(points).all() and np.isfinite(shares).all()


def test_drawings_are_png_files_and_equal_for_equal_codes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    generator = np.random.default_rng(0)
    codes, features = generator.integers(9, size=(300, 5)), generator.normal(size=(300, 4))
    sizes = (9, 9, 9, 9, 300)
    for name in ("a", "b"):
        draw_usage(codes, sizes, ["x$", "b", "c", "d", "e"], tmp_path / name / "usage.png")
        draw_levels(features, codes, None, tmp_path / name / "levels.png")
    for name in ("usage.png", "levels.png"):
        drawn = (tmp_path / "a" / name).read_bytes()
        assert drawn.startswith(PNG) and len(drawn) > 5000
        assert drawn == (tmp_path / "b" / name).read_bytes()
    other = draw_levels(features, codes[::-1], None, tmp_path / "other.png")
    assert other.read_bytes() != (tmp_path / "a" / "levels.png").read_bytes()


def test_a_catalogue_of_one_item_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    codes = np.zeros((1, 2), dtype=np.int64)
    assert draw_usage(codes, (4, 1), None, tmp_path / "usage.png").read_bytes().startswith(PNG)
    assert draw_levels(np.ones((1, 3)), codes, None, tmp_path / "levels.png").read_bytes().startswith(PNG)


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"llmrec\[report\].*--no-plots"):
        require_matplotlib()
    with pytest.raises(DependencyError):
        draw_usage(np.zeros((1, 1), dtype=np.int64), (1,), None, tmp_path / "usage.png")
    assert not list(tmp_path.iterdir())
