"""MovieLens as its provider packs it: 100K (u.data), 1M and 10M (ratings.dat), latest, 20M, 25M and 32M (ratings.csv).

A folder, its ratings file, or the zip archive. Films and users are read from the files beside the ratings. Zip codes
of users are left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ibis

from llmrec.data.sources.archives import extract_zip
from llmrec.data.sources.assembly import assemble
from llmrec.data.sources.base import RawTables, ReadOptions, Source
from llmrec.data.sources.lines import chunks
from llmrec.data.sources.reading import Layout, RawFile, read_delimited, read_file, sniff_layout
from llmrec.errors import DataError

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_FLAGS = tuple(f"genre_{i}" for i in range(len(GENRES_100K)))
LAYOUTS: dict[str, Layout] = {
    "u.data": Layout("\t", ("user_id", "item_id", "rating", "timestamp"), quoted=False),
    "u.item": Layout(
        "|", ("item_id", "title", "release_date", "video_release_date", "imdb_url", *_FLAGS), quoted=False
    ),
    "u.user": Layout("|", ("user_id", "age", "gender", "occupation", "zip_code"), quoted=False),
    "ratings.dat": Layout("::", ("user_id", "item_id", "rating", "timestamp"), quoted=False),
    "movies.dat": Layout("::", ("item_id", "title", "genres"), quoted=False),
    "users.dat": Layout("::", ("user_id", "gender", "age", "occupation", "zip_code"), quoted=False),
}
VARIANTS = (
    ("u.data", "u.item", "u.user"),
    ("ratings.dat", "movies.dat", "users.dat"),
    ("ratings.csv", "movies.csv", "users.csv"),
)
_NAMES = {name for variant in VARIANTS for name in variant}


class MovieLensSource(Source):
    """Reads every edition of MovieLens."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        """A folder or file with the provider's names, or an archive called ml-*.zip."""
        if path.is_dir():
            return any((path / variant[0]).is_file() for variant in VARIANTS)
        return path.name in {variant[0] for variant in VARIANTS} or (
            path.name.startswith("ml-") and path.suffix == ".zip"
        )

    def read(self, connection: Any, path: Path, options: ReadOptions) -> RawTables:
        """Lazy tables of ratings, films and users.

        Raises:
            DataError: No ratings file, an unsafe archive, or a row that is not what was expected.
        """
        path = Path(path)
        if path.is_dir():
            return self._read_files(connection, {p.name: p for p in sorted(path.iterdir())}, path, options)
        if path.suffix == ".zip":
            with TemporaryDirectory(prefix="llmrec-") as folder:
                files = extract_zip(path, Path(folder), lambda name: name in _NAMES)
                return self._read_files(connection, files, path, options)
        siblings = (
            {p.name: p for p in sorted(path.parent.iterdir()) if p.name in _NAMES} if path.parent.is_dir() else {}
        )
        mine = {path.name: path, **{name: p for name, p in siblings.items() if name not in {v[0] for v in VARIANTS}}}
        return self._read_files(connection, mine, path, options)

    def _read_files(self, connection: Any, files: dict[str, Path], origin: Path, options: ReadOptions) -> RawTables:
        variant = next((variant for variant in VARIANTS if variant[0] in files), None)
        if variant is None:
            raise DataError(
                "no ratings file",
                file=origin,
                found=f"files: {', '.join(sorted(files)[:12]) or 'none'}",
                expected="u.data, ratings.dat or ratings.csv",
                remedy="name the folder or archive of a MovieLens edition",
            )
        tables = {}
        for name in variant:
            if name in files:
                shown = origin / name if origin.suffix == ".zip" else files[name]
                tables[name] = _read_one(connection, files[name], shown)
        ratings, films, users = (tables.get(name) for name in variant)
        assert ratings is not None
        extra = [read_file(connection, Path(item)) for item in options.items]
        return assemble(connection, ratings, [*([films] if films else []), *extra], users, options)


def _read_one(connection: Any, path: Path, shown: Path) -> RawFile:
    layout = LAYOUTS.get(path.name)
    if layout is None:
        return read_delimited(connection, path, sniff_layout(path), shown=shown)
    encoding = "utf-8" if path.name in ("u.data", "ratings.dat") or _is_utf8(path) else "latin-1"
    raw = read_delimited(connection, path, replace(layout, encoding=encoding), shown=shown)
    if path.name == "u.item":
        return _with_genres(raw)
    # The zip code stands last, so that leaving out its name leaves out the column.
    return replace(raw, names=raw.names[:-1]) if raw.names[-1] == "zip_code" else raw


def _is_utf8(path: Path) -> bool:
    try:
        b"".join(chunks(path)).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _with_genres(raw: RawFile) -> RawFile:
    """The 19 flag columns as one list of names."""
    words = [ibis.cases((raw.column(flag) == "1", genre)) for flag, genre in zip(_FLAGS, GENRES_100K, strict=True)]
    names = ("item_id", "title", "release_date", "genres")
    genres = ibis.array(words).filter(lambda word: word.notnull() & (word != "unknown"))
    columns = {f"c{i}": raw.column(name) for i, name in enumerate(names[:3])}
    return replace(raw, table=raw.table.select("file_row", **columns, c3=genres), names=names)
