"""Runs over odd catalogues, from events to ranked items: one item, equal texts, missing texts, wide beams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.data.dataset import InteractionDataset
from llmrec.llm import embed_text
from llmrec.recipe import parse_recipe
from llmrec.recommender import Recommender
from llmrec.training.stages import run_recipe
from tests.data.tables import dataset_of

STAGE = {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "no"}
TIGER = {"type": "tiger", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32, "beams": 50}
COBRA = {"type": "cobra", "text_encoder": "embedding", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
RQKMEANS = {"type": "rqkmeans", "levels": 2, "codebook_size": 8}
SYSTEMS: dict[str, dict[str, Any]] = {
    "tiger": {"head": TIGER, "item_tokenizer": RQKMEANS},
    "rqvae": {"head": TIGER, "item_tokenizer": {"type": "rqvae", "levels": 2, "codebook_size": 8, "epochs": 2}},
    "fsq": {"head": TIGER, "item_tokenizer": {"type": "fsq", "epochs": 2}},
    "cofirec": {
        "head": {**TIGER, "level_embeddings": True, "item_positions": True},
        "item_tokenizer": {"type": "cofirec", "sizes": 8, "epochs": 2},
    },
    "cobra": {"head": COBRA, "item_tokenizer": {**RQKMEANS, "collisions": "none"}},
    "llm": {
        "llm": {"model": "tiny-llama", "dtype": "float32"},
        "tuner": {"type": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        "prompt": {"style": "item_codes", "beams": 50},
        "item_tokenizer": RQKMEANS,
    },
}


def catalogue(kind: str) -> tuple[InteractionDataset, int]:
    """A data set whose first user has one event, and its number of items."""
    titles = {"one item": ["tea"], "equal texts": ["tea"] * 2 + ["jam"] * 4, "hardly a text": [""] * 5 + ["tea"]}[kind]
    count = len(titles)
    rows = [(1, 1, "train")]
    for user in range(2, 6):
        rows += [(user, 1 + (user + step) % count, "train") for step in range(3)]
        rows += [(user, 1 + user % count, "valid"), (user, 1 + (user + 1) % count, "test")]
    return dataset_of(rows, titles=titles), count


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Texts as counts of letters, with a cache of their own."""

    def embedded(texts: Any, model: str, **options: Any) -> np.ndarray:
        return np.array([[text.count(letter) for letter in "abcdefghijklmnop"] for text in texts], dtype=np.float32)

    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embed_text, "embed_texts", embedded)
    monkeypatch.setattr(embed_text, "embedder_identity", lambda name, revision=None: name)


@pytest.mark.parametrize("kind", ["one item", "equal texts", "hardly a text"])
@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_item_is_found_once(system: str, kind: str, tmp_path: Path, letters: None) -> None:
    """Beams wider than the catalogue, a user of one event; equal and missing texts still name one item each."""
    dataset, count = catalogue(kind)
    dataset.save(tmp_path / "data")
    part = "tuner" if system == "llm" else "head"
    raw = {
        "name": "odd", "dataset": {"source": str(tmp_path / "data"), "max_history": 4},
        "item_features": {
            "text": "letters", "levels": {"text" if system == "cobra" else "title": "{title}"},
            "collaborative": {"type": "als", "factors": 2, "iterations": 2},
        },
        "stages": [{"train": part, **STAGE}],
        "evaluate": {"baselines": ["popularity"]},
        **SYSTEMS[system],
    }  # fmt: skip
    record = run_recipe(parse_recipe(raw), tmp_path / "run", say=lambda line: None)
    assert record["users"] == 4
    recommender = Recommender.from_pretrained(tmp_path / "run")
    history = recommender.history_of(dataset.user_keys[1])
    assert len(history) == 1
    (found,) = recommender.recommend([history], count + 3, allow_seen=True)
    assert sorted(item.item for item in found) == sorted(dataset.item_keys[1:])
    assert all(np.isfinite(item.score) for item in found)
    (rest,) = recommender.recommend([history], count + 3, allow_seen=False)
    assert sorted(item.item for item in rest) == sorted(set(dataset.item_keys[1:]) - set(history))
