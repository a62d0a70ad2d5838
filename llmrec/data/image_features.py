"""Pictures of items as vectors: one more feature level, "image".

`describe` is ours and needs no model: what colours stand where, and which way edges run. It tells red things from
blue ones and round ones from square ones, and knows nothing of what is shown; for that take a vision model
(`llmrec.llm.embed_image`), which is given to `image_level` as a function.

A picture is shrunk to 48 x 48 pixels. The whole of it gives the shares of hue x saturation x brightness (12 x 2 x 3,
and three bins of nearly grey pixels by brightness). Each cell of a 3 x 3 grid gives how much of every hue it holds
(12), its brightness (4) and its edges by direction (8, weighted by strength: histograms of oriented gradients, Dalal
and Triggs 2005, in their simplest form). Shares are under a square root, so that dot products compare distributions
(Hellinger), and the vector, 291 numbers, has length 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrec.data.item_features import cached_vectors, spread
from llmrec.data.item_images import pixels
from llmrec.errors import DataError

if TYPE_CHECKING:
    from llmrec.data.item_images import Image, ItemImages

DESCRIPTORS = "descriptors"
"""Value of the recipe option `item_features.image` for the vectors of this module."""
SIDE, GRID = 48, 3
HUES, DIRECTIONS, SHADES = 12, 8, 4
COLOUR_BINS = HUES * 2 * 3 + 3
CELL_BINS = HUES + SHADES + DIRECTIONS
WIDTH = COLOUR_BINS + GRID * GRID * CELL_BINS
_IDENTITY = f"llmrec-image-descriptors/1/{SIDE}/{GRID}/{HUES}/{DIRECTIONS}/{SHADES}"
_GREY = 0.12
_NO_EDGE = 0.02

EmbedImages = Callable[[Iterable["Image"]], np.ndarray]
"""RGB images, read one after another, -> vectors [n, d] float32."""


def image_level(
    images: ItemImages, embed: EmbedImages, *, identity: str, cache: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """The level "image": values [I+1, d] float32 and mask [I+1], False where an item has no picture.

    Args:
        images: Pictures of the items; only those that are there are read, and one at a time.
        embed: The image model.
        identity: What tells this model from others: name, weights, sizes.
        cache: Folder of the cache, keyed by identity and content of the pictures; None computes anew.

    Raises:
        DataError: No item has a picture, or one is broken (`llmrec prepare` sets broken ones aside).
    """
    mask = images.mask
    if not mask.any():
        raise DataError(
            "no item has a picture",
            found=f"an image column that is empty for all {len(mask) - 1:,} items",
            expected="pictures, or no level of them",
            remedy="look into rejected_images.csv of the prepared data set",
        )
    items = np.flatnonzero(mask).tolist()
    digests = (hashlib.sha256(images.data(item) or b"").digest() for item in items)
    vectors = cached_vectors(digests, lambda: embed(_each(images, items)), identity=identity, cache=cache)
    return spread(vectors, mask), mask


def descriptor_level(images: ItemImages, *, cache: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`image_level` by colours and textures, [I+1, WIDTH]."""
    return image_level(images, describe, identity=_IDENTITY, cache=cache)


def describe(images: Iterable[Image]) -> np.ndarray:
    """Colour and texture of RGB images, [n, WIDTH] float32 of length 1 each; see the module."""
    rows = [_describe(pixels(image, SIDE)) for image in images]
    return np.stack(rows) if rows else np.zeros((0, WIDTH), dtype=np.float32)


def _each(images: ItemImages, items: list[int]) -> Iterator[Image]:
    for item in items:
        image = images[item]
        assert image is not None
        yield image


def _describe(rgb: np.ndarray) -> np.ndarray:
    """[SIDE, SIDE, 3] uint8 -> [WIDTH]."""
    hue, saturation, value = _hsv(rgb)
    cell = _cells()
    edges, direction = _gradients(rgb.astype(np.float32).mean(axis=2) / 255)
    # A hue weighs as much as there is of it to see.
    parts = [
        _colour_shares(hue, saturation, value),
        _per_cell(cell, hue, HUES, saturation * value),
        _per_cell(cell, np.minimum((value * SHADES).astype(int), SHADES - 1), SHADES, np.ones_like(value)),
        _per_cell(cell, direction, DIRECTIONS, edges, floor=_NO_EDGE),
    ]
    vector = np.concatenate([part.ravel() for part in parts])
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def _colour_shares(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[COLOUR_BINS] roots of shares of the whole picture, three times as heavy as a cell's."""
    shade = np.minimum((value * 3).astype(int), 2)
    strong = (saturation > 0.65).astype(int)
    bins = np.where(saturation * value < _GREY, HUES * 6 + shade, (hue * 2 + strong) * 3 + shade)
    shares = np.bincount(bins.ravel(), minlength=COLOUR_BINS) / bins.size
    return GRID * np.sqrt(shares)


def _per_cell(cell: np.ndarray, bins: np.ndarray, count: int, weight: np.ndarray, floor: float = 0.05) -> np.ndarray:
    """[GRID * GRID, count] roots of shares; a cell with less than `floor` a pixel in all stays faint."""
    total = np.bincount((cell * count + bins).ravel(), weight.ravel(), minlength=GRID * GRID * count)
    total = total.reshape(GRID * GRID, count)
    return np.sqrt(total / np.maximum(total.sum(axis=1, keepdims=True), floor * (SIDE // GRID) ** 2))


def _cells() -> np.ndarray:
    """[SIDE, SIDE] number of the grid cell of each pixel."""
    place = np.arange(SIDE) * GRID // SIDE
    return place[:, None] * GRID + place


def _hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue bin (0 is around red), saturation and value, the last two in 0..1; each [SIDE, SIDE]."""
    red, green, blue = np.moveaxis(rgb.astype(np.float32) / 255, 2, 0)
    value = np.maximum(np.maximum(red, green), blue)
    span = value - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(span, 1e-6)
    turn = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    bins = np.floor(turn / 6 * HUES + 0.5).astype(int) % HUES
    return bins, span / np.maximum(value, 1e-6), value


def _gradients(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strength and direction bin of edges (opposite directions are one), each [SIDE, SIDE]."""
    down, right = np.gradient(grey)
    angle = np.arctan2(down, right) / np.pi * DIRECTIONS
    return np.hypot(down, right), np.floor(angle + 0.5).astype(int) % DIRECTIONS
