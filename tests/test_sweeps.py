"""Sweep recipes: what they stand for, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.errors import RecipeError
from llmrec.recipe import load_recipe
from llmrec.sweeps import is_sweep, load_sweep

BASE = """name: tiny
seed: 1
dataset: {source: synthetic, max_history: 12}
encoder: {type: sasrec, hidden_size: 8, num_layers: 1, num_heads: 2}
stages:
  - {train: encoder, num_train_epochs: 1, eval_strategy: epoch}
"""


def sweep_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(BASE + text)
    return path


def test_each_combination_is_an_ordinary_recipe(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, "sweep: {encoder.hidden_size: [8, 16], stages.0.max_examples: [50, null]}\n")
    sweep = load_sweep(path, ["encoder.dropout=0.3"])
    assert (sweep.name, sweep.law) == ("tiny", "power")
    assert [point.name for point in sweep.points] == [
        "hidden_size-8.max_examples-50",
        "hidden_size-8.max_examples-all",
        "hidden_size-16.max_examples-50",
        "hidden_size-16.max_examples-all",
    ]
    last = sweep.points[-1].recipe
    assert last.name == "tiny-hidden_size-16.max_examples-all"
    assert last.encoder is not None and last.encoder.options["hidden_size"] == 16
    assert last.encoder.options["dropout"] == 0.3 and last.stages[0].max_examples is None
    assert sweep.points[0].recipe.stages[0].max_examples == 50
    assert [point.series for point in sweep.points] == ["max_examples 50", "max_examples all"] * 2


def test_corners_get_a_second_seed(tmp_path: Path) -> None:
    text = "law: performance\nsweep: {encoder.num_layers: [1, 2, 4], encoder.hidden_size: [8, 16, 32]}\n"
    sweep = load_sweep(sweep_file(tmp_path, text + "corner_seeds: [7]\n"))
    again = [point for point in sweep.points if "seed" in point.values]
    assert len(sweep.points) == 9 + 4
    assert [tuple(point.values.values()) for point in again] == [(1, 8, 7), (1, 32, 7), (4, 8, 7), (4, 32, 7)]
    assert all(point.recipe.seed == 7 for point in again) and sweep.points[0].recipe.seed == 1
    assert {point.series for point in sweep.points} == {"all runs"}


def test_an_ordinary_recipe_is_no_sweep_and_a_sweep_no_recipe(tmp_path: Path) -> None:
    plain = sweep_file(tmp_path, "")
    assert not is_sweep(plain)
    with pytest.raises(RecipeError, match="holds no sweep"):
        load_sweep(plain)
    swept = sweep_file(tmp_path, "sweep: {seed: [1, 2]}\n")
    assert is_sweep(swept)
    with pytest.raises(RecipeError, match="llmrec plan --sweep"):
        load_recipe(swept)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sweep: [1]\n", r"sweep.yaml:7: sweep: found \[1\]"),
        ("sweep: {}\n", "expected option paths"),
        ("sweep: {encoder.hidden_size: 8}\n", "sweep.encoder.hidden_size: found 8, expected a list"),
        ("sweep: {encoder.hidden_size: []}\n", "expected a list of values"),
        ("sweep: {encoder.hidden_size: [8, 8]}\n", "two runs would be called 'hidden_size-8'"),
        ("sweep: {encoder.hidden_sise: [8]}\n", "hidden_sise"),
        ("sweep: {encoder.hidden_size: [9]}\n", None),
        ("sweep: {stages.3.max_examples: [9]}\n", "sweep: stages.3.max_examples"),
        ("sweep: {dataset.max_history: [0]}\n", "sweep.yaml:7: sweep: dataset.max_history"),
        ("sweep: {name: [a, b]}\n", "changes no result"),
        ("law: linear\nsweep: {seed: [1]}\n", "sweep.yaml:7: law: found 'linear'"),
        ("corner_seeds: 3\nsweep: {seed: [1]}\n", "expected a list of whole numbers"),
        ("law: performance\nsweep: {encoder.num_layers: [1]}\n", "needs a list of encoder.hidden_size"),
        (
            "law: performance\nsweep: {encoder.num_layers: [1], encoder.hidden_size: [8], dataset.max_history: [5]}\n",
            "sweep.dataset.max_history: law: performance takes depth",
        ),
    ],
)
def test_refusals(tmp_path: Path, text: str, words: str | None) -> None:
    path = sweep_file(tmp_path, text)
    if words is None:  # heads and width are compared by the encoder itself, when it is built
        assert load_sweep(path).points[0].values == {"encoder.hidden_size": 9}
        return
    with pytest.raises(RecipeError, match=words):
        load_sweep(path)
