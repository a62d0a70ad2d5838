"""Images of prepared items: each is read and decoded once, broken ones are set aside with item, file and remedy.

An item whose image is broken stays, with a null image: its events and texts are as good as before. Paths become bytes,
so that a prepared folder is complete in itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from llmrec.data.item_images import FAULTS, IMAGE_FILE, IMAGE_PATH, BrokenImage, examine_image, read_image_file
from llmrec.data.schema import IMAGE, KEY

REJECTED_IMAGES_SCHEMA = pa.schema([(name, pa.string()) for name in ("item", "file", "found", "reason", "remedy")])
_Given = tuple[str, bytes | None, str | None, str | None]
_CHUNK_BYTES = 256 << 20
_SECONDS_BETWEEN_REPORTS = 2.0
_EVERY = "read as upright RGB on white, animations as their first frame"


@dataclass(frozen=True)
class CheckedImages:
    """Items after their images were checked.

    Args:
        items: The item table with one binary column `image`, null where there is none or it is broken.
        rejected: Broken images: item (original id), file, found, reason (a key of `item_images.FAULTS`), remedy.
        counts: How many images there are, are missing, were left out (also by reason), and are of each trait.
        note: The same in one line.
    """

    items: pa.Table
    rejected: pa.Table
    counts: dict[str, int]
    note: str


def check_images(items: pa.Table, report: Callable[[str], None]) -> CheckedImages | None:
    """Read and check every image of an item table; None where it has no image column.

    Args:
        items: item, key and `image` (bytes), `image_path` (text) or both; bytes come first. `image_file` is the file
            the image was named in; a path is relative to its folder and must not leave it.
        report: Told every two seconds how far it is and how long it will take.

    Raises:
        DependencyError: Pillow is missing.
    """
    if not {IMAGE, IMAGE_PATH} & set(items.column_names):
        return None
    rows: list[dict[str, str]] = []
    reasons, traits = Counter[str](), Counter[str]()
    column = _Column()
    present = 0
    for key, given, path, file in _told(_given(items), items.num_rows, report):
        data = None
        if given is not None or path is not None:
            present += 1
            try:
                data = given if given is not None else _read(path, file)
                traits.update(examine_image(data).traits)
            except BrokenImage as error:
                data = None
                reasons[error.reason] += 1
                rows.append(_row(key, error, file, path))
        column.add(data)
    kept = present - len(rows)
    counts = {"images": kept, "items_without_image": items.num_rows - present, "images_rejected": len(rows)}
    counts |= {f"images_rejected_{_word(reason)}": count for reason, count in sorted(reasons.items())}
    counts |= {f"images_{_word(trait)}": count for trait, count in sorted(traits.items())}
    rejected = pa.Table.from_pylist(rows, schema=REJECTED_IMAGES_SCHEMA)
    return CheckedImages(_with_images(items, column.finish()), rejected, counts, _note(counts, reasons, traits))


class _Column:
    """A binary column built in pieces, since one piece holds 2 GB at most."""

    def __init__(self) -> None:
        self._chunks, self._values, self._size = list[pa.Array](), list[bytes | None](), 0

    def add(self, value: bytes | None) -> None:
        self._values.append(value)
        self._size += len(value or b"")
        if self._size > _CHUNK_BYTES:
            self._cut()

    def _cut(self) -> None:
        self._chunks.append(pa.array(self._values, pa.binary()))
        self._values, self._size = [], 0

    def finish(self) -> pa.ChunkedArray:
        self._cut()
        return pa.chunked_array(self._chunks, pa.binary())


def _given(items: pa.Table) -> Iterator[_Given]:
    """Original id, bytes, path and file of each item."""
    nothing = pa.nulls(items.num_rows)
    names = (KEY, IMAGE, IMAGE_PATH, IMAGE_FILE)
    columns = [items.column(name) if name in items.column_names else nothing for name in names]
    for key, *values in zip(*columns, strict=True):
        yield str(key.as_py()), *(value.as_py() for value in values)  # type: ignore[misc]


def _read(path: str | None, file: str | None) -> bytes:
    assert path is not None
    if file is None:
        raise BrokenImage("outside the folder", "image", found=f"{path}, of an items file that is not known")
    return read_image_file(Path(file).parent, path)


def _row(key: str, error: BrokenImage, file: str | None, path: str | None) -> dict[str, str]:
    place = error.file or file or ""
    if path is not None and error.reason not in ("outside the folder", "web address"):
        place = error.file or Path(file or "").parent / path
    return {
        "item": key,
        "file": str(place),
        "found": str(error.found or path or "")[:200],
        "reason": error.reason,
        "remedy": FAULTS[error.reason][1],
    }


def _told(rows: Iterator[_Given], total: int, report: Callable[[str], None]) -> Iterator[_Given]:
    began = last = time.monotonic()
    for done, row in enumerate(rows):
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_REPORTS:
            last, left = now, (now - began) / max(done, 1) * (total - done)
            report(f"checking images: {done:,} of {total:,}, about {left:.0f} s left")
        yield row


def _with_images(items: pa.Table, images: pa.ChunkedArray) -> pa.Table:
    """The table with one image column at the place of the first it had."""
    ours = {IMAGE, IMAGE_PATH, IMAGE_FILE}
    place = next(number for number, name in enumerate(items.column_names) if name in ours)
    rest = items.drop_columns([name for name in items.column_names if name in ours])
    return rest.add_column(place, IMAGE, images)


def _word(text: str) -> str:
    return text.replace(" ", "_")


def _note(counts: dict[str, int], reasons: Counter[str], traits: Counter[str]) -> str:
    text = f"images: {counts['images']:,} items have one, {counts['items_without_image']:,} have none"
    if reasons:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        text += f", {counts['images_rejected']:,} were left out ({listed})"
    if traits:
        text += f"; {', '.join(f'{count:,} {trait}' for trait, count in sorted(traits.items()))}: {_EVERY}"
    return text
