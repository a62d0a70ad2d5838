"""The performance law: its formula, the robust fit, optima with intervals, several amounts of data, refusals."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.optimize import OptimizeWarning, curve_fit

from llmrec.analysis.performance_law import (
    Parameters,
    fit_data_term,
    fit_performance_law,
    fit_scaling_law,
    shape_of,
    term,
)
from llmrec.errors import DataError

DEPTH, WIDTH = (grid.ravel() for grid in np.meshgrid([4, 8, 12, 16, 24, 32], [25, 50, 75, 100], indexing="ij"))


def surface(w1: float, w2: float, w3: float, w4: float, c: float) -> np.ndarray:
    return w1 * term(DEPTH, w3) + w2 * term(WIDTH, w4) + c


def random_surface(seed: int) -> tuple[np.ndarray, float, float]:
    """A surface with values from 0.1 to 0.3 in any regime, and its exponents; every other one has 1% noise."""
    rng = np.random.default_rng(seed)
    w3, w4 = rng.choice([-1, 1], 2) * rng.uniform(0.05, 1.0, 2)
    w1, w2 = rng.uniform(0.005, 0.05, 2) * rng.choice([1, -1], 2)
    y = surface(w1, w2, w3, w4, 0.0)
    y = 0.1 + 0.2 * (y - y.min()) / np.ptp(y)
    return y * (1 + (0.01 * rng.standard_normal(len(y)) if seed % 2 else 0.0)), w3, w4


def test_the_term_has_its_maximum_where_two_x_to_the_w_is_one() -> None:
    x = np.geomspace(1, 1e4, 200_001)
    for w in (-0.2, -0.3, -0.7):
        assert x[term(x, w).argmax()] == pytest.approx(2 ** (-1 / w), rel=1e-4)
    assert (np.diff(term(x, 0.3)) < 0).all()
    assert term(8.0, 0.5) == pytest.approx(-1 / (2 * math.sqrt(8)) - 0.5 * math.log(8))


@pytest.mark.parametrize(
    ("weight", "exponent", "regime"),
    [(1.0, -0.3, "peak"), (-1.0, 0.3, "increasing"), (1.0, 0.3, "decreasing"), (-1.0, -0.3, "valley")],
)
def test_regimes(weight: float, exponent: float, regime: str) -> None:
    found, optimum = shape_of(weight, exponent)
    assert found == regime
    if regime == "peak":
        assert optimum == pytest.approx(10.079, abs=1e-3)
    else:
        assert optimum is None
    curve = weight * term(np.arange(1, 300), exponent)
    rises = np.diff(curve) > 0
    expected = {
        "peak": (True, False),
        "increasing": (True, True),
        "decreasing": (False, False),
        "valley": (False, True),
    }
    assert (rises[0], rises[-1]) == expected[regime]


@pytest.mark.parametrize(("w3", "w4"), [(-0.3, -0.2), (-0.25, -0.16), (-0.45, -0.17)])
def test_a_surface_without_noise_is_recovered(w3: float, w4: float) -> None:
    y = surface(0.02, 0.03, w3, w4, 0.3)
    fit = fit_performance_law(DEPTH, WIDTH, y)
    np.testing.assert_allclose(fit.predict(DEPTH, WIDTH), y, atol=1e-8)
    np.testing.assert_allclose(fit.predict(64, 200), 0.02 * term(64, w3) + 0.03 * term(200, w4) + 0.3, atol=1e-8)
    assert fit.depth.optimum == pytest.approx(2 ** (-1 / w3), rel=0.01)
    assert fit.width.optimum == pytest.approx(2 ** (-1 / w4), rel=0.01)
    assert fit.left_out_r2 > 0.999999 and fit.r2 > 0.999999


@pytest.mark.parametrize("seed", range(5))
def test_one_per_cent_of_noise_leaves_the_depth_within_a_fifth(seed: int) -> None:
    y = surface(0.4, 0.4, -0.3, -0.2, 1.0)
    noise = 1 + 0.01 * np.random.default_rng(seed).standard_normal(len(y))
    fit = fit_performance_law(DEPTH, WIDTH, y * noise, leave_out=False)
    assert fit.depth.optimum == pytest.approx(2 ** (1 / 0.3), rel=0.2)
    assert fit.depth.low <= fit.depth.optimum <= fit.depth.high


def compare_with_generic(seed: int) -> None:
    """Property 6: at least the R^2 of non-linear least squares started at all ones."""

    def law(sizes: np.ndarray, *parameters: float) -> np.ndarray:
        w1, w2, data, b, w3, w4, w5 = parameters
        return Parameters(w1, w2, w3, w4, w5, abs(data) + 1e-12, b).predict(*sizes)

    y, _, _ = random_surface(seed)
    fit = fit_performance_law(DEPTH, WIDTH, y, leave_out=False)
    if not seed % 2:
        np.testing.assert_allclose(fit.predict(DEPTH, WIDTH), y, atol=1e-8)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", OptimizeWarning)
            found, _ = curve_fit(law, np.stack([DEPTH, WIDTH]).astype(float), y, p0=np.ones(7), maxfev=2000)
            error = float(((y - law(np.stack([DEPTH, WIDTH]).astype(float), *found)) ** 2).sum())
    except RuntimeError:
        return  # the generic optimiser gave up
    generic = 1 - error / float(((y - y.mean()) ** 2).sum())
    assert fit.r2 >= generic - 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_the_fit_is_at_least_as_good_as_a_generic_optimiser(seed: int) -> None:
    compare_with_generic(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 100))
def test_the_fit_is_at_least_as_good_on_a_hundred_surfaces(seed: int) -> None:
    compare_with_generic(seed)


def test_the_optimum_is_the_arg_max_of_the_fitted_curve() -> None:
    rng = np.random.default_rng(3)
    fit = fit_performance_law(DEPTH, WIDTH, surface(0.4, 0.4, -0.28, -0.18, 1.0) + 0.003 * rng.standard_normal(24))
    fine = np.linspace(1, 200, 400_001)
    assert fit.depth.optimum == pytest.approx(fine[fit.predict(fine, 50).argmax()], abs=1e-3)
    assert fit.width.optimum == pytest.approx(fine[fit.predict(8, fine).argmax()], abs=1e-3)


def test_a_depth_without_effect_has_no_known_optimum() -> None:
    y = 0.2 + 0.05 * np.log(WIDTH) / 5 + 0.002 * np.random.default_rng(0).standard_normal(24)
    fit = fit_performance_law(DEPTH, WIDTH, y)
    assert fit.depth.optimum is None or fit.depth.spread > 4


def test_intervals_of_predictions_cover_new_measurements_of_the_mean() -> None:
    truth, inside = surface(0.4, 0.4, -0.3, -0.2, 1.0), 0
    for seed in range(40):
        noise = 0.005 * np.random.default_rng(seed).standard_normal(24)
        fit = fit_performance_law(DEPTH, WIDTH, truth + noise, leave_out=False)
        _, low, high = fit.interval(12, 50)
        inside += low <= 0.4 * float(term(12, -0.3)) + 0.4 * float(term(50, -0.2)) + 1.0 <= high
    assert 0.6 <= inside / 40 <= 0.97


def test_data_w5_and_b_are_one_number_on_one_grid() -> None:
    fit = fit_performance_law(DEPTH, WIDTH, surface(0.02, 0.03, -0.3, -0.2, 0.3), leave_out=False)
    first, second = fit.parameters(data=3.0, w5=0.5), fit.parameters(data=4e6, w5=-0.01)
    assert first.b != second.b
    np.testing.assert_allclose(first.predict(DEPTH, WIDTH), second.predict(DEPTH, WIDTH), atol=1e-12)
    np.testing.assert_allclose(first.predict(DEPTH, WIDTH), fit.predict(DEPTH, WIDTH), atol=1e-12)
    assert fit.unidentified == ("D", "w5", "b") and fit.data_term is None


def test_left_out_r2_leaves_out_both_runs_of_a_size() -> None:
    """A second run of a size would give its own value away."""
    noise = np.random.default_rng(1).standard_normal(24)  # nothing but noise: there is nothing to predict
    y = 0.3 + 0.01 * noise
    twice = fit_performance_law(np.tile(DEPTH, 2), np.tile(WIDTH, 2), np.tile(y, 2))
    assert twice.left_out_r2 == pytest.approx(fit_performance_law(DEPTH, WIDTH, y).left_out_r2, abs=1e-6)
    assert twice.left_out_r2 < 0.3


AMOUNTS = {0: 2e4, 1: 1e5, 2: 4e5, 3: 2e6}
B = {-0.05: 0.7, 0.03: 0.85}  # metrics from 0 to 1


def several(w5: float, kappa: float, keys: list[int], noise: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    depth, width = np.tile(DEPTH, len(keys)), np.tile(WIDTH, len(keys))
    settings = np.repeat(keys, len(DEPTH))
    constants = {key: float(term(kappa * AMOUNTS[key], w5)) + B[w5] for key in keys}
    metric = np.concatenate([surface(0.02, 0.03, -0.3, -0.2, 0.0) + constants[key] for key in keys])
    return {
        "depth": depth,
        "width": width,
        "settings": settings,
        "metric": metric + noise * rng.standard_normal(len(metric)),
    }


@pytest.mark.parametrize(
    ("w5", "kappa", "keys"), [(-0.05, 0.01, [0, 1, 2]), (-0.05, 0.01, [0, 1, 2, 3]), (0.03, 1e-4, [0, 1, 2, 3])]
)
def test_several_amounts_of_data_identify_w5_and_kappa(w5: float, kappa: float, keys: list[int]) -> None:
    runs = several(w5, kappa, keys)
    fit = fit_performance_law(**runs, amounts={key: AMOUNTS[key] for key in keys}, leave_out=False)
    assert fit.data_term is not None
    assert fit.unidentified == (() if len(keys) > 3 else ("sign of w5",))
    assert fit.data_term.w5 == pytest.approx(w5, rel=1e-3)
    assert fit.data_term.kappa == pytest.approx(kappa, rel=0.02)
    assert fit.data_term.b == pytest.approx(B[w5], abs=1e-3)
    gain = float(term(kappa * 4e6, w5)) - float(term(kappa * 2e6, w5))
    assert fit.data_term.constant(4e6) - fit.data_term.constant(2e6) == pytest.approx(gain, abs=1e-6)
    np.testing.assert_allclose(fit.predict(8, 50, setting=keys[0]), runs["metric"][5], atol=1e-8)


def test_noise_moves_the_gain_of_more_data_by_little() -> None:
    keys = [0, 1, 2, 3]
    fit = fit_performance_law(**several(-0.05, 0.01, keys, noise=5e-4), amounts=AMOUNTS, leave_out=False)
    assert fit.data_term is not None
    gain = fit.data_term.constant(4e6) - fit.data_term.constant(2e6)
    truth = float(term(0.01 * 4e6, -0.05)) - float(term(0.01 * 2e6, -0.05))
    assert gain == pytest.approx(truth, abs=2e-3)


def test_fewer_than_three_amounts_fail_loudly() -> None:
    with pytest.raises(DataError, match="cannot be told apart"):
        fit_performance_law(**several(-0.05, 0.01, [0, 1]), amounts={0: 2e4, 1: 1e5})
    with pytest.raises(DataError, match="cannot be told apart"):
        fit_data_term([1e4, 1e4, 1e5], [0.1, 0.1, 0.2])
    with pytest.raises(DataError, match="missing"):
        fit_performance_law(**several(-0.05, 0.01, [0, 1, 2]), amounts={0: 2e4, 1: 1e5}, leave_out=False)


def test_without_a_decaying_part_kappa_is_named_unidentified() -> None:
    x = [1e4, 1e5, 1e6, 1e7]
    # The constant curves the other way than any decay would.
    found = fit_data_term(x, [0.02 * math.log(v) + 1e-3 * (math.log(v) - 12) ** 2 for v in x])
    assert found.unidentified[-2:] == ("kappa", "b") and math.isinf(found.kappa)
    assert np.isfinite([found.constant(v) for v in x]).all()


def test_the_plain_scaling_law_is_linear_in_logarithms_and_cannot_bend() -> None:
    straight = fit_scaling_law(DEPTH, WIDTH, 0.1 + 0.02 * np.log(DEPTH) + 0.01 * np.log(WIDTH))
    assert straight.depth_slope == pytest.approx(0.02) and straight.width_slope == pytest.approx(0.01)
    assert straight.left_out_r2 == pytest.approx(1.0)
    y = surface(0.4, 0.4, -0.3, -0.2, 1.0)
    assert fit_performance_law(DEPTH, WIDTH, y).left_out_r2 > fit_scaling_law(DEPTH, WIDTH, y).left_out_r2 + 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": np.full(24, 12.0)}, "divide percentages by 100"),
        ({"metric": np.full(24, np.nan)}, "metric outside"),
        ({"depth": np.where(DEPTH == 4, 0, DEPTH)}, "depth outside"),
        ({"depth": np.full(24, 4)}, "too few sizes"),
        ({"width": np.where(WIDTH > 50, 50, WIDTH)}, "too few sizes"),
        ({"metric": np.full(23, 0.1)}, "one depth, width and metric each"),
    ],
)
def test_refusals(change: dict[str, np.ndarray], words: str) -> None:
    runs = {"depth": DEPTH, "width": WIDTH, "metric": np.linspace(0.1, 0.2, 24)}
    with pytest.raises(DataError, match=words):
        fit_performance_law(**(runs | change))


def test_five_runs_are_too_few() -> None:
    with pytest.raises(DataError, match="too few runs"):
        fit_performance_law([1, 2, 4, 1, 2], [8, 16, 32, 16, 8], [0.1, 0.2, 0.3, 0.2, 0.1])
