"""Power laws over model size."""

from __future__ import annotations

import numpy as np
import pytest

from llmrec.analysis.scaling import fit_power_law
from llmrec.errors import DataError

SIZES = np.geomspace(1e4, 1e7, 9)


@pytest.mark.parametrize(("a", "b", "c"), [(40.0, 0.3, 2.0), (-3.0, 0.25, 0.2), (900.0, 0.8, 0.1), (2.0, 0.06, -0.5)])
def test_an_exact_law_is_recovered(a: float, b: float, c: float) -> None:
    law = fit_power_law(SIZES, a * SIZES**-b + c)
    assert law.b == pytest.approx(b, rel=1e-4) and law.c == pytest.approx(c, rel=1e-3)
    assert law.a == pytest.approx(a * law.unit**-b, rel=1e-3)
    assert law.r2 > 1 - 1e-9 and law.bounded
    np.testing.assert_allclose(law.predict(SIZES), a * SIZES**-b + c, rtol=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    truth, inside = 0.3, 0
    for seed in range(60):
        noise = 0.02 * np.random.default_rng(seed).standard_normal(len(SIZES))
        law = fit_power_law(SIZES, 40 * SIZES**-truth + 2 + noise, seed=seed)
        low, high = law.intervals["b"]
        inside += low <= truth <= high
    assert 0.65 <= inside / 60 <= 0.97


def test_more_noise_makes_a_wider_band() -> None:
    noise = np.random.default_rng(0).standard_normal(len(SIZES))
    widths = []
    for size in (0.001, 0.05):
        law = fit_power_law(SIZES, 40 * SIZES**-0.3 + 2 + size * noise)
        low, high = law.band(SIZES)
        assert (low <= high).all()
        widths.append(float((high - low).mean()))
    assert widths[0] < widths[1] / 5


def test_the_answer_depends_on_nothing_but_runs_and_seed() -> None:
    y = 40 * SIZES**-0.3 + 2 + 0.01 * np.random.default_rng(1).standard_normal(len(SIZES))
    order = np.random.default_rng(2).permutation(len(SIZES))
    first, again, shuffled = fit_power_law(SIZES, y), fit_power_law(SIZES, y), fit_power_law(SIZES[order], y[order])
    assert first.record() == again.record()
    assert shuffled.b == pytest.approx(first.b, rel=1e-6)


def test_a_straight_line_in_the_logarithm_has_no_bend_to_see() -> None:
    assert not fit_power_law(SIZES, 1.0 - 0.01 * np.log(SIZES)).bounded


def test_a_flat_curve_explains_nothing() -> None:
    law = fit_power_law(SIZES, np.full(len(SIZES), 0.5))
    assert law.r2 == 0.0 and np.allclose(law.predict(SIZES), 0.5)


@pytest.mark.parametrize(
    ("sizes", "values", "words"),
    [
        ([1e4, 1e5, 1e6], [3, 2, 1], "too few sizes"),
        ([1e4, 1e4, 1e5, 1e6], [3, 3, 2, 1], "too few sizes"),
        ([0, 1e4, 1e5, 1e6], [4, 3, 2, 1], "positive sizes"),
        ([1e3, 1e4, 1e5, 1e6], [4, float("nan"), 2, 1], "finite"),
        ([1e3, 1e4, 1e5, 1e6], [4, 3, 2], "one size and one value"),
    ],
)
def test_refusals(sizes: list[float], values: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        fit_power_law(sizes, values)
