"""Item images: read and decoded only when asked for, and drawn for synthetic items.

The one module of `llmrec.data` that uses Pillow, and only inside functions. Images are untrusted files: a few common
formats are read and no others, their size is checked before any pixel is decoded, and a path must lie below its folder.
Every image becomes RGB: of an animation the first frame is taken, transparent parts turn white, a photograph is turned
as its camera says. What is wrong with an image is one of `FAULTS`, each with what to do about it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.schema import IMAGE
from llmrec.errors import DataError, DependencyError

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image as Image  # for annotations of other modules too

SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "hexagon", "star", "ring")
COLOURS = (
    ("red", (200, 50, 50)), ("orange", (225, 130, 30)), ("yellow", (225, 195, 40)), ("green", (60, 150, 70)),
    ("teal", (40, 150, 150)), ("blue", (50, 90, 190)), ("purple", (125, 70, 170)), ("brown", (120, 80, 50)),
)  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checked")
MAX_PIXELS, MAX_BYTES = 40_000_000, 64 << 20
IMAGE_PATH, IMAGE_FILE = "image_path", "image_file"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_STARTS = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"BM", b"II*", b"MM\0*")
_AGAIN = "copy or download the picture again"
FAULTS: dict[str, tuple[str, str]] = {
    "zero bytes": ("cannot be decoded: it has no bytes", _AGAIN),
    "not an image": (f"cannot be decoded: it is none of {', '.join(FORMATS)}", "save the picture as PNG or JPEG"),
    "truncated": ("cannot be decoded: its end is missing", _AGAIN),
    "corrupt": ("cannot be decoded: its data are damaged", _AGAIN),
    "pixel type": ("cannot be decoded: its numbers have no meaning as colours", "save the picture as PNG or JPEG"),
    "too many pixels": (f"is too large: more than {MAX_PIXELS:,} pixels", "scale the picture down"),
    "too many bytes": (f"is too large: more than {MAX_BYTES:,} bytes", "scale the picture down, or compress it"),
    "web address": ("cannot be read: it is an address, and nothing is downloaded", "download it and give its path"),
    "outside the folder": ("lies outside its folder", "put pictures below the folder of the items file"),
    "missing file": ("cannot be read: there is no such file", "put the picture there, or mend its path"),
    "not a file": ("cannot be read: it is no ordinary file", "give the path of a picture"),
    "unreadable file": ("cannot be read", "allow reading the file"),
}
"""What can be wrong with an image -> how a message goes on, and the remedy."""


class BrokenImage(DataError):
    """An image that cannot be used.

    Args:
        reason: A key of `FAULTS`.
        name: What the message calls it.
        file: The picture's file, where it has one of its own.
        found: What stands there.
    """

    def __init__(self, reason: str, name: str, *, file: Path | None = None, found: str | None = None) -> None:
        message, remedy = FAULTS[reason]
        super().__init__(f"{name} {message}", file=file, found=found, remedy=remedy)
        self.reason = reason


@dataclass(frozen=True)
class ImageFacts:
    """What a checked image is.

    Args:
        width, height: Pixels.
        traits: What is changed when it is read as one RGB picture: "animated", "greyscale", "palette", "cmyk",
            "transparent", "turned", "other colours".
    """

    width: int
    height: int
    traits: tuple[str, ...]


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
            DataError: The path leaves the root folder or cannot be read; there is no such item.
        """
        if not 1 <= item <= len(self._column):
            raise DataError("no such item", found=item, expected=f"1..{len(self._column)}")
        value = self._column[item - 1].as_py()
        if value is None or isinstance(value, bytes):
            return value
        assert self._root is not None
        return read_image_file(self._root, value, name=f"image of item {item}")

    def __getitem__(self, item: int) -> Image | None:
        """The image of an item as RGB, or None.

        Raises:
            DataError: The image is damaged or too large.
        """
        data = self.data(item)
        return None if data is None else decode_image(data, name=f"image of item {item}")


def read_image_file(root: Path, path: str, *, name: str = "image") -> bytes:
    """The bytes of an image that must lie below a folder.

    Args:
        root: The folder.
        path: Relative to it; links are followed before the check.
        name: What messages call the image.

    Raises:
        BrokenImage: The path leaves the folder or is a web address; the file is missing, too large or not readable.
    """
    if re.match(r"(?i)[a-z][a-z0-9+.-]*://|data:", path):
        raise BrokenImage("web address", name, found=path)
    try:
        root = root.resolve()
        place = (root / path).resolve()
        if not place.is_relative_to(root):
            raise BrokenImage("outside the folder", name, found=path)
        if not place.exists():
            raise BrokenImage("missing file", name, file=place, found=path)
        if not place.is_file():
            raise BrokenImage("not a file", name, file=place, found=path)
        if place.stat().st_size > MAX_BYTES:
            raise BrokenImage("too many bytes", name, file=place, found=f"{place.stat().st_size:,} bytes")
        return place.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # names too long or with a zero byte, circles of links
        raise BrokenImage("unreadable file", name, found=f"{path}: {error}") from error


def decode_image(data: bytes, *, name: str = "image") -> Image:
    """An encoded image as RGB: the first frame, upright, on white where it is transparent.

    Raises:
        BrokenImage: The bytes are no image, are damaged, or hold more than `MAX_PIXELS`.
        DependencyError: Pillow is missing.
    """
    return _decoded(data, name)[0]


def examine_image(data: bytes, *, name: str = "image") -> ImageFacts:
    """Decode an image to the last pixel, so that it can be relied on, and say what it is.

    Raises:
        BrokenImage: As for `decode_image`.
        DependencyError: Pillow is missing.
    """
    image, traits = _decoded(data, name)
    return ImageFacts(image.width, image.height, traits)


def pixels(image: Image, side: int) -> np.ndarray:
    """An RGB image shrunk or stretched to a square, [side, side, 3] uint8."""
    from PIL import Image

    return np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.uint8)


def _decoded(data: bytes, name: str) -> tuple[Image, tuple[str, ...]]:
    """An image as RGB, and its traits."""
    pil = _pillow()
    if not data:
        raise BrokenImage("zero bytes", name)
    if len(data) > MAX_BYTES:
        raise BrokenImage("too many bytes", name, found=f"{len(data):,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, which are refused below, and of broken metadata
            image = pil.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage("too many pixels", name, found=f"{image.width} x {image.height}")
            return _as_rgb(image, name)
    except BrokenImage:
        raise
    except pil.DecompressionBombError as error:
        raise BrokenImage("too many pixels", name, found=str(error)) from error
    except pil.UnidentifiedImageError as error:
        reason = "corrupt" if data.startswith(_STARTS) else "not an image"
        raise BrokenImage(reason, name, found=f"{len(data):,} bytes, the first are {data[:8]!r}") from error
    except Exception as error:  # decoders of untrusted bytes fail in every way there is, and all mean the same
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise BrokenImage("truncated" if cut else "corrupt", name, found=f"{type(error).__name__}: {error}") from error


def _as_rgb(image: Image, name: str) -> tuple[Image, tuple[str, ...]]:
    from PIL import Image as pil
    from PIL import ImageOps

    kinds = {"1": "greyscale", "L": "greyscale", "LA": "greyscale", "P": "palette", "PA": "palette", "CMYK": "cmyk"}
    traits = ["animated"] if getattr(image, "is_animated", False) else []
    image.load()
    mode = image.mode
    if mode in ("I", "F"):
        raise BrokenImage("pixel type", name, found=f"mode {mode}")
    if mode.startswith("I;16"):
        image = pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        traits.append("greyscale")
    elif mode not in ("RGB", "RGBA"):
        traits.append(kinds.get(mode, "other colours"))
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
        traits.append("turned")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        layer = image.convert("RGBA")
        if np.asarray(layer)[..., 3].min() < 255:
            traits.append("transparent")
        image = pil.alpha_composite(pil.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB"), tuple(traits)


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
