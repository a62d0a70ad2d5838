"""Drawing and decoding of item images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data import item_images
from llmrec.data.item_images import (
    COLOURS,
    FAULTS,
    PATTERNS,
    SHAPES,
    BrokenImage,
    ItemImages,
    decode_image,
    draw_item,
    examine_image,
    pixels,
    read_image_file,
)
from llmrec.errors import DataError
from tests.conftest import ROOT
from tests.data.pictures import BLUE, BROKEN, RED, SOUND, animation, sixteen_bits, transparent, turned


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


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_refused_with_a_reason_and_a_remedy(kind):
    data, reason = BROKEN[kind]
    for read in (decode_image, examine_image):
        with pytest.raises(BrokenImage, match="poster (cannot be decoded|is too large)") as caught:
            read(data, name="poster")
        assert caught.value.reason == reason and caught.value.remedy == FAULTS[reason][1]


@pytest.mark.parametrize("kind", SOUND)
def test_every_kind_of_image_becomes_rgb(kind):
    data, traits = SOUND[kind]
    image, facts = decode_image(data), examine_image(data)
    assert image.mode == "RGB" and image.size == (facts.width, facts.height) and facts.traits == traits


def test_size_is_checked_before_decoding():
    """Neither memory nor time goes into the pixels of a bomb; the process stays below what they would take."""
    assert item_images.MAX_PIXELS < 9_000**2
    code = (
        "import resource\nfrom llmrec.data.item_images import examine_image, BrokenImage\n"
        "from tests.data.pictures import BROKEN, draw_item\nexamine_image(draw_item(0, 0, 0))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for kind in ('bomb', 'smaller bomb', 'webp bomb'):\n"
        "    try:\n        examine_image(BROKEN[kind][0])\n"
        "    except BrokenImage as error:\n        assert error.reason == 'too many pixels'\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000, "kilobytes; the smallest of the three would take 240,000"


def test_an_animation_is_its_first_frame():
    for format in ("GIF", "WEBP"):
        assert decode_image(animation(format)).getpixel((10, 10)) == pytest.approx(RED, abs=3)


def test_transparent_parts_are_white_and_hidden_colours_stay_hidden():
    image = decode_image(transparent())
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((10, 10)) == RED


def test_a_photograph_is_turned_as_its_camera_says():
    image = decode_image(turned())
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == pytest.approx(RED, abs=6) and image.getpixel((10, 35)) == pytest.approx(
        BLUE, abs=6
    )


def test_sixteen_bits_keep_their_brightness():
    assert decode_image(sixteen_bits()).getpixel((4, 4)) == (128, 128, 128)


@pytest.mark.parametrize("kind", ["jpeg", "animated gif", "webp", "palette", "turned"])
def test_changed_bytes_give_an_image_or_a_reason(kind):
    """Whatever a decoder makes of damaged bytes, nothing but BrokenImage comes out."""
    chance, whole = np.random.default_rng(1), SOUND[kind][0]
    for _ in range(60):
        data = bytearray(whole)
        for place in chance.integers(0, len(data), 6):
            data[place] = chance.integers(256)
        try:
            assert examine_image(bytes(data)).width > 0
        except BrokenImage as error:
            assert error.reason in FAULTS


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "safe"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(draw_item(0, 0, 0))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "big.png").write_bytes(b"x" * 100)
    monkeypatch.setattr(item_images, "MAX_BYTES", 99)
    for path, reason in (
        ("missing.png", "missing file"), ("folder", "not a file"), ("../secret.png", "outside the folder"),
        (str(tmp_path / "secret.png"), "outside the folder"), ("link.png", "outside the folder"),
        ("big.png", "too many bytes"), ("https://example.org/a.png", "web address"), ("data:,x", "web address"),
        ("zero\0byte.png", "unreadable file"), ("x" * 5_000, "unreadable file"),
    ):  # fmt: skip
        with pytest.raises(BrokenImage) as caught:
            read_image_file(root, path)
        assert caught.value.reason == reason, path
    with pytest.raises(BrokenImage):
        read_image_file(root, "loop.png")
    with pytest.raises(BrokenImage, match="too large"):
        examine_image(b"x" * 100)


def test_pixels_are_a_square():
    assert pixels(decode_image(turned()), 12).shape == (12, 12, 3)


def test_items_without_images():
    with pytest.raises(DataError, match="no images"):
        ItemImages(pa.table({"item": [1], "title": ["x"]}))


def test_real_posters(test_data: Path):
    images = ItemImages(pq.read_table(test_data / "ml-100k-posters" / "items.parquet"))
    assert images.mask.sum() == 1_663 and images[1].width == 92
