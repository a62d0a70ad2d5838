"""Item images: decoded only when asked for, and drawn for synthetic items.

The one module of `llmrec.data` that uses Pillow, and only inside functions. Images are untrusted files: their size
is checked before any pixel is decoded.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.schema import IMAGE
from llmrec.errors import DataError, DependencyError

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image

SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "hexagon", "star", "ring")
COLOURS = (
    ("red", (200, 50, 50)), ("orange", (225, 130, 30)), ("yellow", (225, 195, 40)), ("green", (60, 150, 70)),
    ("teal", (40, 150, 150)), ("blue", (50, 90, 190)), ("purple", (125, 70, 170)), ("brown", (120, 80, 50)),
)  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checked")
MAX_PIXELS = 40_000_000
IMAGE_PATH = "image_path"


class ItemImages:
    """Images of an item table, index = item id; nothing is decoded before it is asked for.

    Args:
        items: Item table with a binary column `image`, or a text column `image_path`.
        root: Folder below which every `image_path` must lie.

    Raises:
        DataError: The table has no images, or has paths while no root is given.
    """

    def __init__(self, items: pa.Table, root: Path | None = None) -> None:
        name = IMAGE if IMAGE in items.column_names else IMAGE_PATH
        if name not in items.column_names:
            raise DataError(
                "the items have no images",
                found=", ".join(items.column_names),
                expected="a binary column 'image'",
                remedy="prepare the data with --items FILE, a Parquet file with item_id and image",
            )
        if name == IMAGE_PATH and root is None:
            raise DataError("the items have paths of images, but no folder to look in", expected="a root folder")
        self._column, self._root = items.column(name), root.resolve() if root else None

    @property
    def mask(self) -> np.ndarray:
        """[I+1] bool, False where an item has no image; entry 0 is padding."""
        present = pc.is_valid(self._column).to_numpy(zero_copy_only=False)
        return np.concatenate([[False], present])

    def data(self, item: int) -> bytes | None:
        """The encoded image of an item (1..I), or None.

        Raises:
            DataError: The path leaves the root folder or cannot be read.
        """
        if not 1 <= item <= len(self._column):
            raise DataError("no such item", found=item, expected=f"1..{len(self._column)}")
        value = self._column[item - 1].as_py()
        if value is None or isinstance(value, bytes):
            return value
        assert self._root is not None
        path = (self._root / value).resolve()
        if not path.is_relative_to(self._root):
            raise DataError("the image lies outside its folder", found=value, expected=f"a path below {self._root}")
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"the image cannot be read: {error.strerror}", file=path) from error

    def __getitem__(self, item: int) -> Image | None:
        """The image of an item as RGB, or None.

        Raises:
            DataError: The image is damaged or too large.
        """
        data = self.data(item)
        return None if data is None else decode_image(data, name=f"image of item {item}")


def decode_image(data: bytes, *, name: str = "image") -> Image:
    """An encoded image as RGB.

    Raises:
        DataError: The bytes are no image, are damaged, or hold more than `MAX_PIXELS`.
        DependencyError: Pillow is missing.
    """
    pil = _pillow()
    try:
        image = pil.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"{name} is too large", found=f"{image.width} x {image.height}", expected=f"at most {MAX_PIXELS} pixels"
            )
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be decoded", found=str(error), expected="a PNG, JPEG or WebP image") from error


def draw_item(shape: int, colour: int, pattern: int, lettering: str = "", *, size: int = 96) -> bytes:
    """Draw an item; equal arguments give equal bytes.

    Args:
        shape: Index into `SHAPES` (taken modulo its length).
        colour: Index into `COLOURS`.
        pattern: Index into `PATTERNS`, the fill of the background.
        lettering: Short text below the shape.
        size: Pixels of a side.

    Returns:
        A PNG.

    Raises:
        DependencyError: Pillow is missing.
    """
    pil = _pillow()
    from PIL import ImageDraw, ImageFont

    image = pil.new("RGB", (size, size), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    _draw_pattern(draw, PATTERNS[pattern % len(PATTERNS)], size)
    _draw_shape(draw, SHAPES[shape % len(SHAPES)], COLOURS[colour % len(COLOURS)][1], size)
    if lettering:
        font = ImageFont.load_default(size=max(8, size // 7))
        draw.text((size // 2, size - size // 10), lettering[:10], fill=(20, 20, 20), font=font, anchor="mm")
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, size: int) -> None:
    step, ink = max(4, size // 8), (215, 210, 195)
    marks = range(0, size, step)
    if pattern == "striped":
        for x in marks:
            draw.rectangle((x, 0, x + step // 3, size), fill=ink)
    elif pattern == "dotted":
        for x in marks:
            for y in marks:
                draw.ellipse((x, y, x + step // 2, y + step // 2), fill=ink)
    elif pattern == "checked":
        for i, x in enumerate(marks):
            for j, y in enumerate(marks):
                if (i + j) % 2:
                    draw.rectangle((x, y, x + step, y + step), fill=ink)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], size: int) -> None:
    centre, radius = (size / 2, size * 0.42), size * 0.3
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    corners = {"triangle": 3, "diamond": 4, "pentagon": 5, "hexagon": 6, "star": 10}
    edge = (30, 30, 30)
    if shape == "circle":
        draw.ellipse(box, fill=colour, outline=edge, width=2)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(2, size // 9))
    elif shape == "square":
        draw.rectangle(box, fill=colour, outline=edge, width=2)
    else:
        count = corners[shape]
        points = []
        for i in range(count):
            reach = radius * (0.45 if shape == "star" and i % 2 else 1.0)
            angle = -math.pi / 2 + 2 * math.pi * i / count
            points.append((centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle)))
        draw.polygon(points, fill=colour, outline=edge)


def _pillow():  # type: ignore[no-untyped-def]
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError("PIL", extra="vision", purpose="reading and drawing item images") from error
    return Image
