"""Drawing and decoding of item images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data import item_images
from llmrec.data.item_images import COLOURS, PATTERNS, SHAPES, ItemImages, decode_image, draw_item
from llmrec.errors import DataError


def test_drawing_is_deterministic_and_tells_attributes_apart():
    drawn = {
        draw_item(s, c, p, "cup") for s in range(len(SHAPES)) for c in range(len(COLOURS)) for p in range(len(PATTERNS))
    }
    assert len(drawn) == len(SHAPES) * len(COLOURS) * len(PATTERNS)
    assert draw_item(1, 2, 3, "cup") == draw_item(1, 2, 3, "cup") != draw_item(1, 2, 3, "mug")


@pytest.mark.parametrize("shape", [0, 1, 3, 4, 5])
def test_the_middle_has_the_colour(shape):
    image = decode_image(draw_item(shape, 5, 0, size=64))
    assert image.size == (64, 64) and image.mode == "RGB" and image.getpixel((32, 27)) == COLOURS[5][1]


def test_images_are_lazy():
    images = ItemImages(pa.table({"item": [1, 2, 3], "image": [draw_item(0, 0, 0), None, b"not an image"]}))
    np.testing.assert_array_equal(images.mask, [False, True, False, True])
    assert images[1].size == (96, 96) and images[2] is None
    with pytest.raises(DataError, match="image of item 3 cannot be decoded"):
        images[3]
    for outside in (0, 4):
        with pytest.raises(DataError, match="no such item"):
            images[outside]


def test_paths_stay_below_the_root(tmp_path: Path):
    root = tmp_path / "safe"
    root.mkdir()
    (root / "a.png").write_bytes(draw_item(0, 0, 0))
    for folder in ("safe-evil", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.png").write_bytes(draw_item(0, 0, 0))
    paths = ["a.png", "../other/b.png", "../safe-evil/b.png", str(tmp_path / "other" / "b.png"), "missing.png"]
    images = ItemImages(pa.table({"image_path": paths}), root)
    assert images[1] is not None
    for item in (2, 3, 4):
        with pytest.raises(DataError, match="outside"):
            images[item]
    with pytest.raises(DataError, match="cannot be read"):
        images[5]
    with pytest.raises(DataError, match="no folder"):
        ItemImages(pa.table({"image_path": paths}))


def test_size_is_checked_before_decoding():
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(DataError, match="too large|cannot be decoded"):
        decode_image(bomb)
    assert item_images.MAX_PIXELS < 30_000**2


def test_items_without_images():
    with pytest.raises(DataError, match="no images"):
        ItemImages(pa.table({"item": [1], "title": ["x"]}))


def test_real_posters(test_data: Path):
    images = ItemImages(pq.read_table(test_data / "ml-100k-posters" / "items.parquet"))
    assert images.mask.sum() == 1_663 and images[1].width == 92
