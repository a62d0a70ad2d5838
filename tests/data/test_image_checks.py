"""`prepare` with pictures: paths and bytes become sound bytes, broken ones a list, and no item is lost."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.data import image_checks
from llmrec.data.card import write_folder
from llmrec.data.dataset import InteractionDataset
from llmrec.data.image_checks import CheckedImages, check_images
from llmrec.data.item_images import FAULTS, ItemImages, draw_item
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.errors import DependencyError
from tests.data.pictures import BROKEN, SOUND

PICTURE = draw_item(1, 2, 3)


def checked(**columns: Any) -> CheckedImages:
    """The check of an item table with these columns."""
    count = len(next(iter(columns.values())))
    found = check_images(pa.table({"key": [f"i{n}" for n in range(1, count + 1)], **columns}), lambda line: None)
    assert found is not None
    return found


def shop(folder: Path, keys: list[str]) -> Path:
    """Four users who meet every item."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"u{user},{key},{user * 100 + n}" for user in range(4) for n, key in enumerate(keys)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return folder


def prepare(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[dict[str, Any], Path]:
    """The record `llmrec prepare` prints, and the folder it wrote."""
    out = folder.parent / "prepared"
    status = main(["prepare", str(folder), "--out", str(out), "--json", *words])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out), out


def test_every_broken_image_is_listed_and_its_item_stays() -> None:
    found = checked(image=pa.array([data for data, _ in BROKEN.values()] + [PICTURE, None], pa.binary()))
    images, reasons = found.items.column("image").to_pylist(), [reason for _, reason in BROKEN.values()]
    assert images == [None] * len(BROKEN) + [PICTURE, None]
    rows = found.rejected.to_pylist()
    assert [row["item"] for row in rows] == [f"i{n}" for n in range(1, len(BROKEN) + 1)]
    assert [row["reason"] for row in rows] == reasons
    assert all(row["remedy"] == FAULTS[row["reason"]][1] for row in rows)
    counts = found.counts
    assert (counts["images"], counts["items_without_image"], counts["images_rejected"]) == (1, 1, len(BROKEN))
    assert counts["images_rejected_too_many_pixels"] == 3
    assert "3 too many pixels" in found.note and "1 zero bytes" in found.note


def test_unusual_images_are_kept_as_they_are_and_counted() -> None:
    found = checked(image=pa.array([data for data, _ in SOUND.values()], pa.binary()))
    assert found.items.column("image").to_pylist() == [data for data, _ in SOUND.values()]
    assert found.rejected.num_rows == 0 and found.counts["images"] == len(SOUND)
    expected = {"animated": 2, "greyscale": 3, "palette": 2, "cmyk": 1, "transparent": 1, "turned": 1}
    assert {name: found.counts[f"images_{name}"] for name in expected} == expected
    assert "2 animated" in found.note and "first frame" in found.note


def test_paths_become_bytes_and_bad_ones_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "a.png").write_bytes(PICTURE)
    (root / "empty.png").write_bytes(b"")
    (tmp_path / "outside.png").write_bytes(PICTURE)
    paths = ["pictures/a.png", str(root / "pictures" / "a.png"), "gone.png", "../outside.png", "pictures", "empty.png",
             "http://x.org/a.png", None]  # fmt: skip
    found = checked(title=["t"] * 8, image_path=paths, image_file=[str(root / "items.csv")] * 8, other=[1] * 8)
    assert found.items.column_names == ["key", "title", "image", "other"]
    assert found.items.column("image").to_pylist() == [PICTURE, PICTURE, *[None] * 6]
    rows = {row["item"]: row for row in found.rejected.to_pylist()}
    assert {item: row["reason"] for item, row in rows.items()} == {
        "i3": "missing file", "i4": "outside the folder", "i5": "not a file", "i6": "zero bytes", "i7": "web address"
    }  # fmt: skip
    assert rows["i3"]["file"] == str(root / "gone.png") and rows["i3"]["found"] == "gone.png"
    assert rows["i4"]["file"] == str(root / "items.csv") and rows["i4"]["found"] == "../outside.png"
    assert rows["i6"]["found"] == "empty.png" and rows["i6"]["file"] == str(root / "empty.png")


def test_a_path_of_an_unknown_file_is_not_followed() -> None:
    assert checked(image_path=["setup.py"]).rejected["reason"].to_pylist() == ["outside the folder"]


def test_bytes_come_before_a_path(tmp_path: Path) -> None:
    data = pa.array([PICTURE, None], pa.binary())
    found = checked(image=data, image_path=["gone.png"] * 2, image_file=[str(tmp_path / "i.csv")] * 2)
    assert found.items.column("image").to_pylist() == [PICTURE, None]
    assert found.rejected["item"].to_pylist() == ["i2"]


def test_large_columns_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_checks, "_CHUNK_BYTES", 3 * len(PICTURE))
    images = [PICTURE, None] * 10
    column = checked(image=pa.array(images, pa.binary())).items.column("image")
    assert column.num_chunks == 3 and column.to_pylist() == images


def test_items_without_an_image_column_are_left_alone() -> None:
    assert check_images(pa.table({"key": ["a"], "title": ["b"]}), print) is None


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_checks, "_SECONDS_BETWEEN_REPORTS", -1.0)
    lines: list[str] = []
    check_images(pa.table({"key": ["a", "b", "c"], "image": pa.array([PICTURE] * 3, pa.binary())}), lines.append)
    assert any(line.startswith("checking images: 2 of 3, about ") and line.endswith(" s left") for line in lines)


def test_without_pillow_pictures_are_refused_and_addresses_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    found = checked(image_path=["https://example.org/a.jpg"], image_file=["items.csv"])
    assert found.rejected["reason"].to_pylist() == ["web address"]
    with pytest.raises(DependencyError, match=r"llmrec\[vision\]"):
        checked(image=pa.array([PICTURE], pa.binary()))


def test_prepare_writes_pictures_and_the_list_of_broken_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shop(tmp_path / "shop", ["a", "b", "c", "d", "=e"])
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(PICTURE)
    (folder / "pictures" / "b.jpg").write_bytes(BROKEN["half a jpeg"][0])
    rows = ["item_id,title,image", "a,A,pictures/a.png", "b,B,pictures/b.jpg", "c,C,", "d,D,d.png", "=e,E,../x.png"]
    (folder / "items.csv").write_text("\n".join(rows) + "\n")
    record, out = prepare(capsys, folder)
    assert record["items"] == 5 and record["counts"]["images"] == 1 and record["rejected_images"] == 3
    assert any(note.startswith("images: 1 items have one, 1 have none, 3 were left out") for note in record["notes"])
    dataset = InteractionDataset.load(out)
    assert dataset.items.schema.field("image").type == pa.binary() and "image_path" not in dataset.items.column_names
    assert ItemImages(dataset.items).mask.sum() == 1
    with (out / "rejected_images.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert record["rejected_images_file"] == str(out / "rejected_images.csv")
    assert [(row["item"], row["reason"]) for row in listed] == [
        ("'=e", "outside the folder"), ("b", "truncated"), ("d", "missing file")
    ]  # fmt: skip
    assert listed[1]["file"].endswith("pictures/b.jpg") and all(row["remedy"] for row in listed)
    assert "left out" in (out / "README.md").read_text()

    (folder / "items.csv").write_text("item_id,title,image\na,A,pictures/a.png\n")
    again, out = prepare(capsys, folder)
    assert again["fingerprint"] == record["fingerprint"], "pictures are no part of it"
    assert again["rejected_images"] == 0 and not (out / "rejected_images.csv").exists()


def test_each_items_file_has_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path belongs below the folder of the file that names it, also after several files were joined."""
    folder, more = shop(tmp_path / "shop", ["a", "b", "c"]), tmp_path / "more"
    more.mkdir()
    (folder / "p.png").write_bytes(PICTURE)
    (more / "p.png").write_bytes(draw_item(5, 5, 0))
    (folder / "items.csv").write_text("item_id,poster\na,p.png\nb,\n")
    (more / "extra.csv").write_text("item_id,image,title\na,p.png,A\nb,p.png,B\nc,../shop/p.png,C\n")
    record, out = prepare(capsys, folder, "--items", str(more / "extra.csv"))
    images = InteractionDataset.load(out).items.column("image").to_pylist()
    assert images == [PICTURE, draw_item(5, 5, 0), None]
    assert record["counts"]["images_rejected_outside_the_folder"] == 1


def test_records_of_bytes_and_path_are_read_and_items_that_are_gone_are_not(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", ["a", "b", "c"])
    (folder / "b.png").write_bytes(PICTURE)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": PICTURE, "path": "x.png"}, {"bytes": None, "path": "b.png"}, None, {"path": "gone.png"}]
    table = pa.table({"item_id": ["a", "b", "c", "never met"], "image": pa.array(values, kind)})
    pq.write_table(table, folder / "items.parquet")
    prepared = prepare_source(folder, PrepareOptions())
    assert prepared.dataset.items.column("image").to_pylist() == [PICTURE, PICTURE, None]
    assert prepared.rejected_images is not None and prepared.rejected_images.num_rows == 0


def test_generated_pictures_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.prepare.check_images", lambda *_: pytest.fail("checked"))
    options = PrepareOptions(source_options={"users": 20, "items": 12, "events_per_user": 6, "images": True})
    assert "images" not in prepare_source("synthetic", options).dataset.meta.counts


@pytest.mark.slow
def test_real_posters(test_data: Path, tmp_path: Path) -> None:
    posters = test_data / "ml-100k-posters" / "items.parquet"
    prepared = prepare_source(test_data / "ml-100k", PrepareOptions(items=(posters,)))
    counts = prepared.dataset.meta.counts
    assert (counts["images"], counts["items_without_image"], counts["images_rejected"]) == (1_663, 19, 0)
    dataset = InteractionDataset.load(write_folder(prepared, tmp_path / "out"))
    theirs = dict(zip(*pq.read_table(posters, columns=["item_id", "image"]).to_pydict().values(), strict=True))
    ours = dataset.items.column("image").to_pylist()
    assert all(image == theirs[int(key)] for key, image in zip(dataset.item_keys[1:], ours, strict=True))
    assert np.array_equal(ItemImages(dataset.items).mask[1:], [image is not None for image in ours])
