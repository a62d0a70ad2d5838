"""MovieLens editions in the provider's layouts, as folders, files and archives."""

from __future__ import annotations

import zipfile

import pytest

from llmrec.errors import DataError

FLAGS = lambda *on: "|".join("1" if i in on else "0" for i in range(19))  # noqa: E731
HUNDRED_K = {
    "u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
    "u.item": (
        f"242|Kolya, \"the\" film (1996)|24-Jan-1997||http://x/a?b|{FLAGS(5)}\n"
        f"302|Misérables, Les (1995)|||u|{FLAGS(1, 8)}\n"
        f"9|unknown||||{FLAGS(0)}\n"
    ).encode("latin-1"),
    "u.user": "196|49|M|writer|55105\n186|39|F|executive|00000\n",
}  # fmt: skip
MILLION = {
    "ratings.dat": "1::1193::5::978300760\n2::661::3.5::978302109\n",
    "movies.dat": "1193::One Flew: Over (1975)::Drama\n661::James et la pêche (1996)::Animation|Children's\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
}
LATEST = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n",
    "movies.csv": 'movieId,title,genres\n31,"Dangerous Minds, The (1995)",Drama|War\n32,Other,(no genres listed)\n',
    "links.csv": "movieId,imdbId\n31,1\n",
}


def _write(reader, files: dict, folder: str = "ml") -> None:
    for name, content in files.items():
        reader.write(f"{folder}/{name}", content)


def _zip(reader, files: dict, name: str = "ml-x.zip", prefix: str = "ml-x/"):
    path = reader.folder / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            archive.writestr(prefix + member, content)
    return path


class TestEditions:
    def test_100k(self, reader):
        _write(reader, HUNDRED_K)
        raw = reader.read(reader.folder / "ml")
        assert reader.rows(raw.interactions, "user_key", "item_key", "rating", "timestamp", "source_row") == [
            ("196", "242", 3.0, 881250949, 0), ("186", "302", 3.0, 891717742, 1),
        ]  # fmt: skip
        items = {key: rest for key, *rest in reader.rows(raw.items, "item_key", "title", "categories")}
        assert items["242"] == ['Kolya, "the" film (1996)', ["Comedy"]]
        assert items["302"] == ["Misérables, Les (1995)", ["Action", "Drama"]] and items["9"] == ["unknown", []]
        assert reader.rows(raw.users, "user_key", "occupation") == [("186", "executive"), ("196", "writer")]
        assert not any("zip" in name for name in raw.users.columns)

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
    def test_1m(self, reader, encoding):
        _write(reader, {name: text.encode(encoding) for name, text in MILLION.items()})
        raw = reader.read(reader.folder / "ml")
        assert reader.rows(raw.interactions, "item_key", "rating") == [("1193", 5.0), ("661", 3.5)]
        assert reader.rows(raw.items, "title", "categories") == [
            ("One Flew: Over (1975)", ["Drama"]), ("James et la pêche (1996)", ["Animation", "Children's"]),
        ]  # fmt: skip
        assert raw.users.columns == ("user_key", "gender", "age", "occupation")

    def test_latest(self, reader):
        _write(reader, LATEST)
        raw = reader.read(reader.folder / "ml")
        assert reader.rows(raw.interactions, "user_key", "item_key", "rating") == [("1", "31", 2.5)]
        assert reader.rows(raw.items, "title", "categories") == [
            ("Dangerous Minds, The (1995)", ["Drama", "War"]), ("Other", []),
        ]  # fmt: skip

    @pytest.mark.parametrize("files", [HUNDRED_K, MILLION, LATEST])
    def test_archive_equals_folder(self, reader, files):
        _write(reader, files)
        unpacked, packed = reader.read(reader.folder / "ml"), reader.read(_zip(reader, files))
        for ours, theirs in ((unpacked.interactions, packed.interactions), (unpacked.items, packed.items)):
            assert reader.rows(ours, *ours.columns) == reader.rows(theirs, *theirs.columns)

    def test_single_file_finds_its_neighbours(self, reader):
        _write(reader, HUNDRED_K)
        raw = reader.read(reader.folder / "ml" / "u.data")
        assert raw.items is not None and raw.users is not None


class TestRefused:
    def test_bad_row_names_the_member(self, reader):
        path = _zip(reader, {**HUNDRED_K, "u.data": "196\t242\t3\t881250949\n186\t302\tthree\t891717742\n"})
        with pytest.raises(DataError, match="finite") as caught:
            reader.read(path)
        assert caught.value.line == 2 and str(caught.value.file).endswith("ml-x.zip/u.data")

    def test_bad_row_of_a_latin_1_file(self, reader):
        text = "1::é::Drama\n2::x\n3::y::War\n".encode("latin-1")
        _write(reader, {**MILLION, "movies.dat": text, "ratings.dat": "1::1::5::9\n"})
        raw = reader.read(reader.folder / "ml", on_bad_rows="quarantine")
        assert raw.rejected.select(["line", "reason"]).to_pylist() == [{"line": 2, "reason": "fewer than 3 columns"}]

    def test_no_ratings(self, reader):
        with pytest.raises(DataError, match="no ratings file"):
            reader.read(_zip(reader, {"readme.txt": "hello"}))
        with pytest.raises(DataError, match="archive"):
            reader.read(reader.write("ml-broken.zip", b"PK\x03\x04 nothing"))
