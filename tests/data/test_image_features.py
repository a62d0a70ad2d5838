"""Pictures as vectors without a model: what they tell apart, which items have them, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from llmrec.data.image_features import WIDTH, describe, descriptor_level, image_level
from llmrec.data.item_images import COLOURS, SHAPES, ItemImages, decode_image, draw_item
from llmrec.data.sources.looks import look_of
from llmrec.errors import DataError
from tests.data.pictures import BLUE, RED


def shop(*pictures: bytes | None) -> ItemImages:
    return ItemImages(pa.table({"item": list(range(1, len(pictures) + 1)), "image": pa.array(pictures, pa.binary())}))


class Embedder:
    """The mean colour, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images) -> np.ndarray:
        self.calls += 1
        return np.stack([np.asarray(image, dtype=np.float64).mean((0, 1)) for image in images])


def test_vectors_are_finite_and_of_length_one_whatever_the_picture() -> None:
    extremes = [
        Image.new("RGB", size, colour) for size in ((1, 1), (500, 3)) for colour in ((0, 0, 0), (255,) * 3, RED)
    ]
    vectors = describe(extremes)
    assert vectors.shape == (6, WIDTH) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[3], atol=1e-6)
    assert describe([]).shape == (0, WIDTH)


@pytest.mark.parametrize("same", ["colour", "shape"])
def test_drawn_items_are_nearest_to_those_of_their_look(same: str) -> None:
    """Centres of half of the drawn items name the look of the others: colours nearly always, shapes above chance."""
    looks = [look_of(item, 0) for item in range(1, 321)]
    vectors = describe(decode_image(look.draw()) for look in looks)
    values = np.array([getattr(look, same) for look in looks])
    names = list(SHAPES) if same == "shape" else [name for name, _ in COLOURS]
    known, asked = slice(0, 160), slice(160, 320)
    centres = np.stack([vectors[known][values[known] == name].mean(0) for name in names])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    right = np.array(names)[(vectors[asked] @ centres.T).argmax(1)] == values[asked]
    assert right.mean() > (0.95 if same == "colour" else 0.35)


def test_place_and_direction_matter() -> None:
    left, top = Image.new("RGB", (60, 60), BLUE), Image.new("RGB", (60, 60), BLUE)
    left.paste(RED, (0, 0, 30, 60))
    top.paste(RED, (0, 0, 60, 30))
    first, second = describe([left, top])
    assert first @ first > first @ second + 0.1, "equal colours in other places"


def test_items_without_a_picture_are_masked() -> None:
    values, mask = descriptor_level(shop(draw_item(0, 0, 0), None, draw_item(1, 1, 1)))
    assert values.shape == (4, WIDTH) and mask.tolist() == [False, True, False, True]
    assert not values[~mask].any() and values[1] @ values[3] < 0.9
    with pytest.raises(DataError, match="no item has a picture"):
        descriptor_level(shop(None, None))
    with pytest.raises(DataError, match="image of item 2 cannot be decoded"):
        descriptor_level(shop(draw_item(0, 0, 0), b"broken"))


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda: (shop(draw_item(0, 0, 0), None, draw_item(1, 1, 1)), "a"), 1),
        (lambda: (shop(None, draw_item(0, 0, 0), draw_item(1, 1, 1)), "a"), 1),
        (lambda: (shop(draw_item(1, 1, 1), None, draw_item(0, 0, 0)), "a"), 2),
        (lambda: (shop(draw_item(0, 0, 0), None, draw_item(1, 1, 2)), "a"), 2),
        (lambda: (shop(draw_item(0, 0, 0), None, draw_item(1, 1, 1)), "b"), 2),
    ],
    ids=["same", "same pictures of other items", "order", "content", "model"],
)
def test_pictures_are_embedded_once(change: Callable[[], tuple[ItemImages, str]], calls: int, tmp_path: Path) -> None:
    embed = Embedder()
    image_level(shop(draw_item(0, 0, 0), None, draw_item(1, 1, 1)), embed, identity="a", cache=tmp_path)
    images, identity = change()
    values, mask = image_level(images, embed, identity=identity, cache=tmp_path)
    assert embed.calls == calls
    fresh, _ = image_level(images, Embedder(), identity=identity, cache=None)
    assert np.array_equal(values, fresh) and values.dtype == np.float32 and mask.sum() == 2


def test_one_picture_at_a_time_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    images, read = shop(*[draw_item(n, n, n) for n in range(5)]), list[int]()
    get = ItemImages.__getitem__
    monkeypatch.setattr(ItemImages, "__getitem__", lambda self, item: (read.append(item), get(self, item))[1])

    def embed(pictures) -> np.ndarray:
        for number, _ in enumerate(pictures, start=1):
            assert len(read) == number
        return np.ones((5, 2))

    image_level(images, embed, identity="x", cache=None)
    assert read == [1, 2, 3, 4, 5]
