"""Encoded pictures for tests, sound and broken."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from llmrec.data.item_images import draw_item

RED, BLUE = (200, 30, 30), (30, 30, 200)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """An image in a file format."""
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


def noise(side: int = 40, mode: str = "RGB", format: str = "PNG") -> bytes:
    """A picture that does not compress, so that half of its bytes are half of its pixels."""
    values = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values).convert(mode), format)


def animation(format: str = "GIF") -> bytes:
    """Two frames, red first."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, lossless=True)


def png_of(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size; a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def webp_of(width: int, height: int) -> bytes:
    """A real WebP whose header claims another canvas."""
    data = bytearray(animation("WEBP"))
    assert data[12:16] == b"VP8X"
    data[24:27], data[27:30] = (width - 1).to_bytes(3, "little"), (height - 1).to_bytes(3, "little")
    return bytes(data)


def damaged_png() -> bytes:
    """A PNG with wrong bytes in the middle of its pixels."""
    data = bytearray(noise())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    return bytes(data)


def turned() -> bytes:
    """A red and blue JPEG whose camera says: turn it by a quarter."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif, quality=95, subsampling=0)


def transparent() -> bytes:
    """Red in the middle of hidden black."""
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((*RED, 255), (5, 5, 15, 15))
    return encoded(image)


def sixteen_bits() -> bytes:
    """Grey of half brightness in 16 bits."""
    return encoded(Image.fromarray(np.full((8, 8), 128 << 8, dtype=np.uint16)))


BROKEN: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "zero bytes"),
    "text": (b"<html>not found</html>", "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    "short header": (noise()[:20], "truncated"),
    "half a png": (noise()[: len(noise()) // 2], "truncated"),
    "half a jpeg": (noise(format="JPEG")[: len(noise(format="JPEG")) // 2], "truncated"),
    "damaged png": (damaged_png(), "corrupt"),
    "bomb": (png_of(30_000, 30_000), "too many pixels"),
    "smaller bomb": (png_of(9_000, 9_000), "too many pixels"),
    "webp bomb": (webp_of(16_000, 16_000), "too many pixels"),
    "floats": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "pixel type"),
}
SOUND: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "plain": (draw_item(0, 0, 0), ()),
    "jpeg": (noise(format="JPEG"), ()),
    "webp": (noise(format="WEBP"), ()),
    "bmp": (noise(format="BMP"), ()),
    "animated gif": (animation(), ("animated", "palette")),
    "animated webp": (animation("WEBP"), ("animated",)),
    "grey": (noise(mode="L"), ("greyscale",)),
    "black and white": (noise(mode="1"), ("greyscale",)),
    "grey of 16 bits": (sixteen_bits(), ("greyscale",)),
    "palette": (noise(mode="P"), ("palette",)),
    "cmyk": (noise(mode="CMYK", format="JPEG"), ("cmyk",)),
    "alpha": (transparent(), ("transparent",)),
    "opaque alpha": (noise(mode="RGBA"), ()),
    "turned": (turned(), ("turned",)),
}
