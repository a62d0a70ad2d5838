"""Archives that attack: nothing is ever written outside the folder, and nothing fills the disk."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from llmrec.data.sources import archives
from llmrec.data.sources.archives import extract_zip
from llmrec.errors import DataError


def _pack(path: Path, members: dict[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content, compress_type=zipfile.ZIP_DEFLATED)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\evil", "ev\nil", "ev\u202eil", "\x07"]
)
def test_member_names(tmp_path, out, name):
    with pytest.raises(DataError, match="not safe"):
        extract_zip(_pack(tmp_path / "a.zip", {"good": b"1", name: b"2"}), out, lambda _: True)
    assert not list(out.iterdir()) and not (tmp_path / "evil").exists() and not (tmp_path / "deep" / "evil").exists()


def test_links(tmp_path, out):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(DataError, match="link"):
        extract_zip(_pack(tmp_path / "a.zip", {link: b"/etc/passwd"}), out, lambda _: True)


def test_bomb(tmp_path, out):
    with pytest.raises(DataError, match="100:1"):
        extract_zip(_pack(tmp_path / "a.zip", {"zeros": bytes(50_000_000)}), out, lambda _: True)
    assert not list(out.iterdir())


def test_header_that_lies_about_the_size(tmp_path, out):
    path = _pack(tmp_path / "a.zip", {"data": b"abcdefgh" * 1000})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<L", 8000), struct.pack("<L", 10)))
    with pytest.raises(DataError):
        extract_zip(path, out, lambda _: True)
    assert sum(p.stat().st_size for p in out.iterdir()) <= 10


def test_limits(tmp_path, out, monkeypatch):
    path = _pack(tmp_path / "a.zip", {f"m{i}": b"x" * 100 for i in range(6)})
    monkeypatch.setattr(archives, "MAX_BYTES", 250)
    with pytest.raises(DataError, match="not safe"):
        extract_zip(path, out, lambda _: True)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    with pytest.raises(DataError, match="6 members"):
        extract_zip(path, out, lambda _: True)


def test_wanted_members_come_out_flat(tmp_path, out):
    path = _pack(tmp_path / "a.zip", {"x/one.csv": b"1", "y/one.csv": b"2", "x/two.bin": b"3", "x/": b""})
    found = extract_zip(path, out, lambda name: name.endswith(".csv"))
    assert found == {"one.csv": out / "one.csv"} and (out / "one.csv").read_bytes() == b"1"


def test_damage(tmp_path, out):
    path = _pack(tmp_path / "a.zip", {"data": bytes(range(256)) * 50})
    raw = bytearray(path.read_bytes())
    raw[60] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(DataError, match="cannot be read"):
        extract_zip(path, out, lambda _: True)
