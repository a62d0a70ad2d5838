"""Feature levels: which items have them, what the cache keeps, and token ids for text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.data.dataset import InteractionDataset
from llmrec.data.item_features import collaborative_level, text_levels, token_level
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of

TITLES = ["red kettle", "", "blue pan", "old map"]
BRANDS = ["Alder", "Corvane", None, "Alder"]


def shop(titles: Sequence[str] = TITLES) -> InteractionDataset:
    events = [(user, item, "train") for user in (1, 2) for item in (1, 2, 3, 4)]
    return dataset_of(events, titles=titles, item_columns={"brand": BRANDS})


class Embedder:
    """Counts letters, and remembers what it was asked."""

    def __init__(self, width: int = 3) -> None:
        self.width, self.calls = width, list[list[str]]()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return np.array([[len(text) + column for column in range(self.width)] for text in texts], dtype=np.float64)


def levels(
    dataset: InteractionDataset, embed: Any, cache: Path | None, identity: str = "model/128", **more: str
) -> Any:
    return text_levels(dataset, more or {"title": "{title}"}, embed, identity=identity, cache=cache)


def test_items_without_a_text_lack_the_level() -> None:
    embed = Embedder()
    found = levels(shop(), embed, None, title="{title}", both="{title}[ by {brand}]", brand="{brand}")
    values, mask = found["title"]
    assert list(found) == ["title", "both", "brand"]
    assert mask.tolist() == [False, True, False, True, True] and mask.dtype == bool
    assert values.dtype == np.float32 and values[:, 0].tolist() == [0, 10, 0, 8, 7]
    assert not values[~mask].any(), "row 0 and items without text are zero"
    assert embed.calls[0] == ["red kettle", "blue pan", "old map"], "only real texts are embedded"
    assert embed.calls[1][0] == "red kettle by Alder" and found["brand"][1].tolist() == [False, True, True, False, True]


def test_two_items_with_one_text_have_one_vector() -> None:
    values, mask = levels(shop(["tea", "tea", "jam", "tea"]), Embedder(), None)["title"]
    assert mask[1:].all() and np.array_equal(values[1], values[2]) and np.array_equal(values[1], values[4])


def test_a_level_nobody_has_is_an_error() -> None:
    with pytest.raises(DataError, match="no item of 'hand made' has a text at level 'title'"):
        levels(shop(["", "", "", ""]), Embedder(), None)
    with pytest.raises(RecipeError, match="names the column 'colour'"):
        levels(shop(), Embedder(), None, colour="{colour}")


def test_texts_are_embedded_once(tmp_path: Path) -> None:
    embed = Embedder()
    first = levels(shop(), embed, tmp_path / "cache")
    again = levels(shop(), embed, tmp_path / "cache")
    assert len(embed.calls) == 1 and np.array_equal(first["title"][0], again["title"][0])
    assert again["title"][0].dtype == np.float32
    # The vectors belong to model and texts, whatever the level is called.
    levels(shop(), embed, tmp_path / "cache", name="{title}")
    assert len(embed.calls) == 1
    levels(shop(), embed, None)
    assert len(embed.calls) == 2, "without a cache everything is made anew"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"], "nothing half written is left"


@pytest.mark.parametrize("change", ["model", "text", "order", "boundary"])
def test_other_models_and_other_texts_are_embedded_anew(change: str, tmp_path: Path) -> None:
    embed = Embedder()
    levels(shop(["ab", "c", "d", "e"]), embed, tmp_path)
    identity = "model/64" if change == "model" else "model/128"
    titles = {"text": ["ab", "c", "d", "f"], "order": ["c", "ab", "d", "e"], "boundary": ["a", "bc", "d", "e"]}
    found = levels(shop(titles.get(change, ["ab", "c", "d", "e"])), embed, tmp_path, identity)
    assert len(embed.calls) == 2
    assert found["title"][0][1:, 0].tolist() == [len(text) for text in embed.calls[1]]


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_cache_is_made_anew(damage: bytes | None, tmp_path: Path) -> None:
    embed = Embedder()
    expected = levels(shop(), embed, tmp_path)["title"][0]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] if damage is None else damage)
    found = levels(shop(), embed, tmp_path)["title"][0]
    assert len(embed.calls) == 2 and np.array_equal(found, expected) and path.read_bytes() == whole


def test_collaborative_vectors_belong_to_items_with_training_events() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3))
    values, mask = collaborative_level(vectors, np.array([7, 2, 0, 1, 0]))
    assert values.dtype == np.float32 and values.shape == (5, 3)
    assert mask.tolist() == [False, True, False, True, False], "row 0 is padding whatever its count"


def test_token_ids_are_cut_and_padded_on_the_right() -> None:
    def tokenise(texts: Sequence[str]) -> list[list[int]]:
        return [[len(word) for word in text.split()] for text in texts]

    values, mask = token_level(shop(["one two three four", "", "a bb", "ccc"]), "{title}", tokenise, 3)
    assert values.tolist() == [[0, 0, 0], [3, 3, 5], [0, 0, 0], [1, 2, 0], [3, 0, 0]] and values.dtype == np.int64
    assert mask.tolist() == [False, True, False, True, True]
