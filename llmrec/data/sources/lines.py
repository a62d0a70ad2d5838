"""Bytes of text files: samples, line counts, and the physical line of a row, needed only once a row is bad."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, cast

import numpy as np

from llmrec.errors import DataError

CHUNK = 1 << 22
SAMPLE_BYTES = 1 << 20
_BINARY_MAGIC = {
    b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "a zstd file", b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file", b"\x89PNG": "an image", b"PAR1": "a Parquet file",
    b"\x80\x04": "a Python pickle", b"SQLite": "a database",
}  # fmt: skip


def is_gzip(path: Path) -> bool:
    """Whether the file starts like a gzip file, whatever its name says."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed if need be.

    Raises:
        DataError: The file cannot be read, or its compressed stream is damaged.
    """
    try:
        with gzip.open(path, "rb") if is_gzip(path) else open(path, "rb") as file:
            yield cast(IO[bytes], file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot be read: {error}", file=path, remedy="check the path and permissions, or fetch the file again"
        ) from error


def chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes in pieces, so that a huge file or line never has to fit in memory."""
    with open_bytes(path) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def text_sample(path: Path, encoding: str = "utf-8") -> tuple[str, bool]:
    """The first megabyte as text (without a byte order mark), and whether that is the whole file.

    Raises:
        DataError: The file is empty, binary, or in an encoding that cannot be read.
    """
    with open_bytes(path) as file:
        head = file.read(SAMPLE_BYTES + 1)
    whole, head = len(head) <= SAMPLE_BYTES, head[:SAMPLE_BYTES]
    if not head.strip():
        raise DataError("the file is empty", file=path, found=f"{len(head)} bytes", expected="at least one row of data")
    utf16 = head[:2] in (b"\xff\xfe", b"\xfe\xff") or min(head[0::2].count(0), len(head)) > len(head) // 4
    if utf16 or head[1::2].count(0) > len(head) // 4:
        raise DataError(
            "the file is UTF-16 or UTF-32 text",
            file=path,
            found=head[:8].hex(" "),
            expected="UTF-8 text",
            remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}",
        )
    for magic, kind in _BINARY_MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"the file is {kind}",
                file=path,
                expected="a CSV, TSV or JSON Lines text",
                remedy="unpack it, or mend its name",
            )
    return head.decode(encoding, errors="replace").removeprefix("\ufeff"), whole


def split_lines(text: str) -> list[str]:
    """Lines with their ends, cut where files have lines (str.splitlines would cut at U+2028 and others as well)."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)


@dataclass(frozen=True)
class TextLines:
    """Physical lines of a text file. A line ends with LF, CR LF, or a CR alone.

    Args:
        path: The file.
        delimiter: One-character separator, or "" when lines are not split into quoted fields.
        header: Number of physical lines before the first row (leading blank lines included).
        skips_blank: Whether blank lines are no rows.
        encoding: Text encoding.
    """

    path: Path
    delimiter: str = ""
    header: int = 0
    skips_blank: bool = False
    encoding: str = "utf-8"

    @cached_property
    def _scan(self) -> tuple[np.ndarray, bool]:
        """Offsets just after each line end [N] int64, and whether a double quote occurs."""
        ends, start, quoted, previous = [], 0, False, 0
        for chunk in chunks(self.path):
            codes = np.frombuffer(chunk, np.uint8)
            quoted = quoted or b'"' in chunk
            before = np.concatenate([[previous], codes[:-1]])
            # An LF after a CR moves the end of the line the CR already closed; a CR closes one of its own.
            is_end = (codes == 10) | (before == 13)
            offset = np.flatnonzero(is_end).astype(np.int64) + start
            ends.append(np.where(codes[offset - start] == 10, offset + 1, offset))
            start, previous = start + len(chunk), int(codes[-1])
        if previous == 13:
            ends.append(np.array([start], dtype=np.int64))
        return (np.concatenate(ends) if ends else np.zeros(0, np.int64)), quoted

    def line_of_offset(self, offset: int) -> int:
        """1-based line that holds the byte at a 0-based offset."""
        return int(np.searchsorted(self._scan[0], offset, side="right")) + 1

    def lines_of_rows(self, rows: np.ndarray, rejected: np.ndarray) -> np.ndarray:
        """1-based lines [n] of 0-based row numbers [n], where rows count only what the reader kept.

        Args:
            rows: Row numbers.
            rejected: 1-based lines of rows the reader did not keep.
        """
        ends, quoted = self._scan
        if quoted and self.delimiter:
            return self._lines_by_parsing(rows, set(rejected.tolist()))
        excluded = [np.arange(1, self.header + 1), rejected]
        if self.skips_blank:
            starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
            short = np.flatnonzero(ends - starts <= 2)
            excluded.append(short[self._are_blank(starts[short], ends[short])] + 1)
        lines = np.unique(np.concatenate(excluded)).astype(np.int64)
        return rows + 1 + np.searchsorted(lines - np.arange(1, len(lines) + 1), rows, side="right")

    def _are_blank(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether lines of at most two bytes hold nothing but their end."""
        blank = ends - starts == 1
        wanted = np.flatnonzero(ends - starts == 2)
        position = 0
        for chunk in chunks(self.path) if len(wanted) else ():
            inside = wanted[(starts[wanted] >= position) & (starts[wanted] < position + len(chunk))]
            first = np.frombuffer(chunk, np.uint8)[starts[inside] - position]
            blank[inside] = first == 13
            position += len(chunk)
        return blank

    def _lines_by_parsing(self, rows: np.ndarray, rejected: set[int]) -> np.ndarray:
        """As `lines_of_rows` for files with quoted fields, whose rows may span lines."""
        wanted, found, row = set(rows.tolist()), {}, -1
        with open_bytes(self.path) as file:
            text = io.TextIOWrapper(file, encoding=self.encoding, errors="replace", newline="")
            for _ in range(self.header):
                text.readline()
            reader, first = csv.reader(text, delimiter=self.delimiter), self.header + 1
            try:
                for record in reader:
                    if record and first not in rejected:
                        row += 1
                        if row in wanted:
                            found[row] = first
                            if len(found) == len(wanted):
                                break
                    first = self.header + reader.line_num + 1
            except csv.Error:  # a field beyond the parser's limit: later rows get the last line known, a lower bound
                found.update(dict.fromkeys(wanted - found.keys(), first))
        return np.array([found.get(int(r), first) for r in rows], dtype=np.int64)


def write_unix_lines(path: Path, target: Path, encoding: str = "utf-8") -> None:
    """A copy with LF line ends only, in UTF-8 when `encoding` is a single-byte one; the number of lines stays."""
    held = b""
    with open(target, "wb") as out:
        for chunk in chunks(path):
            chunk = held + chunk
            held = b"\r" if chunk.endswith(b"\r") else b""
            chunk = chunk[: len(chunk) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            out.write(chunk if encoding == "utf-8" else chunk.decode(encoding).encode())
        out.write(b"\n" if held else b"")
