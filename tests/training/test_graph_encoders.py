"""Runs of graph encoders: item features reach the encoder, edges are those of training, a run can be opened again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.data.dataset import InteractionDataset
from llmrec.data.schema import ItemFeatures
from llmrec.errors import RecipeError
from llmrec.recipe import parse_recipe
from llmrec.training.stages import evaluate_run, open_run, run_recipe


def raw(kind: str = "ssr", **changes: Any) -> dict[str, Any]:
    return {
        "name": "graph",
        "dataset": {"source": "synthetic", "max_history": 20, "options": {"users": 60, "items": 30}},
        "item_features": {"levels": {"text": "{title}"}},
        "encoder": {"type": kind, "hidden_size": 8},
        "stages": [
            {
                "train": "encoder", "strategy": {"type": "edges"}, "num_train_epochs": 2, "learning_rate": 1e-2,
                "per_device_train_batch_size": 32, "eval_strategy": "epoch", "save_strategy": "epoch",
            }
        ],
        "evaluate": {"baselines": ["popularity"]},
        **changes,
    }  # fmt: skip


@pytest.fixture()
def features(monkeypatch: pytest.MonkeyPatch) -> list[InteractionDataset]:
    """Random vectors instead of a text model; the data sets it was asked for."""
    asked: list[InteractionDataset] = []

    def make(spec: Any, dataset: InteractionDataset, **_: Any) -> ItemFeatures:
        asked.append(dataset)
        values = np.random.default_rng(0).standard_normal((dataset.num_items + 1, 5)).astype(np.float32)
        return {"text": (values, np.arange(dataset.num_items + 1) > 0)}

    monkeypatch.setattr("llmrec.training.stages.make_item_features", make)
    return asked


@pytest.mark.parametrize("kind", ["ssr", "lightgcn"])
def test_a_recipe_trains_measures_and_opens_again(
    kind: str, features: list[InteractionDataset], tmp_path: Path
) -> None:
    record = run_recipe(parse_recipe(raw(kind)), tmp_path / "run", say=lambda _: None)
    assert len(features) == 1
    run = open_run(tmp_path / "run", say=lambda _: None)
    assert run.encoder.config.levels == {"text": 5} and run.encoder.content_0.any()
    users, items = run.dataset.context().train_edges
    assert run.encoder.graph.starts[run.encoder.config.num_users] == len(set(zip(users, items, strict=True)))
    again = evaluate_run(run, run.recipe.evaluate)
    assert again["models"] == record["models"], "a loaded run measures the same"
    bands = tmp_path / "run" / "evaluations" / record["evaluation"] / "bands.json"
    assert bands.is_file() == (kind == "ssr")
    if kind == "ssr":
        found = json.loads(bands.read_text())["bands"]
        assert [(e["signal"], e["band"]) for e in found] == [(s, b) for s in ("identity", "text") for b in (1, 2, 3)]


def test_an_encoder_without_features_is_not_given_any(features: list[InteractionDataset], tmp_path: Path) -> None:
    recipe = raw("ssr", item_features=None)
    run_recipe(parse_recipe(recipe), tmp_path / "run", say=lambda _: None)
    assert not features
    assert open_run(tmp_path / "run", say=lambda _: None).encoder.config.levels == {}


def test_who_may_read_item_features() -> None:
    parse_recipe(raw("ssr")).resolve()
    for encoder in ({"type": "sasrec"}, {"type": "ssr", "pretrained": "runs/other"}):
        stages = [] if "pretrained" in encoder else [{"train": "encoder"}]
        with pytest.raises(RecipeError, match="nothing reads `item_features`"):
            parse_recipe(raw(encoder=encoder, stages=stages)).resolve()


def test_edges_take_a_graph(features: list[InteractionDataset], tmp_path: Path) -> None:
    recipe = raw(encoder={"type": "sasrec", "hidden_size": 8}, item_features=None)
    with pytest.raises(RecipeError, match="SASRecEncoder"):
        run_recipe(parse_recipe(recipe), tmp_path / "run", say=lambda _: None)
