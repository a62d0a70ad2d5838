"""`llmrec tokenize`: codes of a synthetic data set, a folder that appears at once, refusals, reuse by recipes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.commands.tokenize import CODES, WRITTEN, level_letters
from llmrec.data.dataset import InteractionDataset
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.item_tokenizers.rqkmeans import RQKMeans
from llmrec.llm import embed_text
from llmrec.recipe import parse_recipe
from llmrec.training.item_codes import load_item_tokenizer
from llmrec.training.stages import run_recipe

ALS = "{type: als, factors: 8, iterations: 3}"
KMEANS = ["--type", "rqkmeans", "--set", "codebook_size=8", "--set", "levels=2", "--text", "none"]
TIGER: dict[str, Any] = {
    "type": "tiger", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32, "beams": 5,
}  # fmt: skip


def words_as_vectors(texts: Any, model: str, **options: Any) -> np.ndarray:
    """A text model without weights: counts of letters."""
    assert model == "letters"
    return np.array([[text.lower().count(letter) for letter in "abcdefghijklmnop"] for text in texts], dtype=np.float32)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--text letters`, with a cache of its own."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embed_text, "embed_texts", words_as_vectors)
    monkeypatch.setattr(embed_text, "embedder_identity", lambda name, revision=None: name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    options = PrepareOptions(source_options={"users": 60, "items": 40, "events_per_user": 8})
    prepare_source("synthetic", options).dataset.save(folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[dict[str, Any], str]:
    status = main([*map(str, words), "--json"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out), shown.err


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    status = main([str(word) for word in words])
    shown = capsys.readouterr()
    assert status == 2 and shown.out == "", shown
    return shown.err


class TestCodes:
    def test_files_table_and_figures_agree(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        out = tmp_path / "new" / "codes"
        record, told = said(capsys, "tokenize", data, *KMEANS, "--collaborative", ALS, "--out", out)
        assert sorted(path.name for path in out.iterdir()) == sorted(WRITTEN) == record["files"]
        assert [path.name for path in out.parent.iterdir()] == ["codes"], "nothing else is left beside it"
        assert told.startswith("data set synthetic: 40 items")
        dataset, tokenizer = InteractionDataset.load(data), RQKMeans.from_pretrained(out)
        table = pq.read_table(out / CODES)
        assert table.column_names == ["item", "title", "code_1", "code_2", "tokens"]
        assert table.column("item").to_pylist() == dataset.item_keys[1:]
        assert table.column("title").to_pylist() == dataset.item_titles[1:]
        codes = np.stack([table.column(f"code_{level}").to_numpy() for level in (1, 2)], axis=1)
        assert np.array_equal(codes, tokenizer.codes[1:].numpy())
        for row, text in zip(codes, table.column("tokens").to_pylist(), strict=True):
            assert [int(n) for n in re.fullmatch(r"<a_(\d+)><b_(\d+)>", text).groups()] == row.tolist()
        for number, level in enumerate(record["levels"]):
            counts = np.bincount(codes[:, number], minlength=8)
            assert (level["size"], level["used"], level["largest"]) == (8, (counts > 0).sum(), counts.max())
            assert level["perplexity"] == pytest.approx(tokenizer.report.details[f"perplexity_{number + 1}"])
        assert record["collisions"] == {"before": tokenizer.report.collisions, "after": 0, "policy": "nearest_free"}
        assert record["fingerprint"] == tokenizer.fingerprint
        assert record["dataset"]["fingerprint"] == dataset.fingerprint
        made = json.loads((out / "fit.json").read_text())
        assert made["seed"] == 42 and made["features"]["collaborative"]["factors"] == 8
        assert made["features"]["text"] is None and made["dataset"] == dataset.fingerprint

    def test_cofirec_takes_the_levels_the_items_have(
        self, data: Path, tmp_path: Path, capsys: Any, letters: None
    ) -> None:
        words = ["--type", "cofirec", "--set", "epochs=2", "--set", "sizes=16", "--text", "letters", "--no-plots"]
        record, told = said(capsys, "tokenize", data, *words, "--out", tmp_path / "codes")
        assert [level["name"] for level in record["levels"]] == ["category", "title", "description"]
        assert record["levels"][0]["used"] <= 8, "the synthetic catalogue has at most 8 categories"
        assert "level category: '{categories}' by letters" in told
        assert not [name for name in record["files"] if name.endswith(".png")]
        record, _ = said(
            capsys,
            "tokenize",
            data,
            *words,
            "--level",
            "title={title}",
            "--collaborative",
            ALS,
            "--out",
            tmp_path / "two",
        )
        assert [level["name"] for level in record["levels"]] == ["title", "collaborative"]
        made = json.loads((tmp_path / "two" / "fit.json").read_text())["features"]
        assert (made["text"], made["levels"]) == ("letters", {"title": "{title}"})

    def test_others_read_one_text_of_all_columns(self, data: Path, tmp_path: Path, capsys: Any, letters: None) -> None:
        words = ["--type", "fsq", "--set", "epochs=1", "--set", "collisions=append", "--text", "letters", "--no-plots"]
        assert main(["tokenize", str(data), *words, "--out", str(tmp_path / "codes")]) == 0
        shown = capsys.readouterr()
        assert "level text: '{title}[, {categories}][, {brand}][. {description}]' by letters" in shown.err
        for text in ("perplexity", "largest bucket", "items that share a code", "fsq codes of 40 items",
                     f"item_tokenizer: {{type: fsq, pretrained: {tmp_path / 'codes'}}}"):  # fmt: skip
            assert text in shown.out.replace("\n", "")

    def test_a_part_from_outside(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        part = tmp_path / "mine.py"
        part.write_text("from llmrec.item_tokenizers.rqkmeans import RQKMeans\nclass Mine(RQKMeans):\n    pass\n")
        words = ["--type", f"{part}:Mine", *KMEANS[2:], "--collaborative", ALS, "--no-plots"]
        record, _ = said(capsys, "tokenize", data, *words, "--out", tmp_path / "codes")
        assert json.loads((tmp_path / "codes" / "tokenizer.json").read_text())["class"].endswith(".Mine")
        assert record["recipe"]["item_tokenizer"]["type"] == f"{part}:Mine"

    def test_letters_of_levels(self) -> None:
        assert [level_letters(level) for level in (1, 2, 26, 27, 52, 53)] == ["a", "b", "z", "aa", "az", "ba"]


class TestRecipes:
    def test_a_recipe_takes_the_codes_over_and_would_have_fitted_the_same(
        self, data: Path, tmp_path: Path, capsys: Any, letters: None
    ) -> None:
        codes = tmp_path / "codes"
        words = ["--type", "rqkmeans", "--set", "codebook_size=8", "--set", "levels=2", "--text", "letters"]
        words += ["--level", "text={title}", "--collaborative", ALS, "--seed", "7", "--no-plots"]
        record, _ = said(capsys, "tokenize", data, *words, "--out", codes)

        def trained(name: str, **sections: Any) -> Path:
            raw = {
                "name": name, "seed": 7, "dataset": {"source": str(data), "max_history": 6}, **sections, "head": TIGER,
                "stages": [{"train": "head", "max_steps": 2, "eval_strategy": "no"}],
                "evaluate": {"protocol": "full", "max_users": 10, "baselines": []},
            }  # fmt: skip
            measured = run_recipe(parse_recipe(raw), tmp_path / name, say=lambda line: None)
            assert measured["models"]["tiger"]
            return tmp_path / name / "item_tokenizer"

        taken = trained("taken", item_tokenizer={"type": "rqkmeans", "pretrained": str(codes)})
        assert RQKMeans.from_pretrained(taken).fingerprint == record["fingerprint"]
        fitted = trained(
            "fitted",
            item_features={"text": "letters", "levels": {"text": "{title}"},
                           "collaborative": {"type": "als", "factors": 8, "iterations": 3}},
            item_tokenizer={"type": "rqkmeans", "codebook_size": 8, "levels": 2},
        )  # fmt: skip
        assert RQKMeans.from_pretrained(fitted).fingerprint == record["fingerprint"]
        # A run is a data set, too; its own codes are of the same catalogue.
        again, _ = said(capsys, "tokenize", tmp_path / "taken", *words, "--out", tmp_path / "again")
        assert again["fingerprint"] == record["fingerprint"]
        assert load_item_tokenizer("rqkmeans", tmp_path / "taken", InteractionDataset.load(data)).unique

    def test_item_vectors_of_a_run(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        raw = {
            "name": "run", "dataset": {"source": str(data), "max_history": 6},
            "encoder": {"type": "sasrec", "hidden_size": 8, "num_layers": 1, "num_heads": 1},
            "stages": [{"train": "encoder", "max_steps": 1, "eval_strategy": "no"}],
            "evaluate": {"protocol": "full", "max_users": 5, "baselines": []},
        }  # fmt: skip
        run_recipe(parse_recipe(raw), tmp_path / "run", say=lambda line: None)
        even = ["--set", "balanced=true"]  # vectors of one step of training crowd into few codes
        words = [*KMEANS, *even, "--collaborative", tmp_path / "run", "--no-plots", "--out", tmp_path / "codes"]
        record, told = said(capsys, "tokenize", data, *words)
        assert record["features"]["collaborative"]["width"] == 8 and "item vectors of sasrec" in told
        made = (tmp_path / "codes" / "fit.json").read_text()
        assert json.loads(made)["features"]["collaborative"] == {"type": "sasrec", "pretrained": "run"}
        assert str(tmp_path) not in made, "the folder may be published with a run"


class TestRefusals:
    def test_an_occupied_folder(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        out = tmp_path / "codes"
        words = ["tokenize", data, *KMEANS, "--collaborative", ALS, "--no-plots", "--out", out]
        out.mkdir()
        first, _ = said(capsys, *words)  # an empty folder is fine
        assert "--force" in refused(capsys, *words)
        second, _ = said(capsys, *words, "--set", "levels=3", "--force")
        assert len(second["levels"]) == 3 and len(RQKMeans.from_pretrained(out).level_sizes) == 3
        (out / "thesis.txt").write_text("mine")
        assert "thesis.txt" in refused(capsys, *words, "--force")
        assert (out / "thesis.txt").read_text() == "mine" and (out / CODES).is_file()
        assert "a folder" in refused(capsys, *words[:-1], out / "thesis.txt", "--force")

    def test_a_failure_leaves_the_earlier_result_and_nothing_else(
        self, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "codes"
        words = ["tokenize", data, *KMEANS, "--collaborative", ALS, "--out", out]
        record, _ = said(capsys, *words, "--no-plots")

        def broken(*args: Any) -> None:
            raise OSError("the disk is full")

        monkeypatch.setattr("llmrec.reporting.code_plots.draw_levels", broken)
        assert "the disk is full" in refused(capsys, *words, "--set", "levels=3", "--force")
        assert [path.name for path in tmp_path.iterdir()] == ["codes"]
        assert RQKMeans.from_pretrained(out).fingerprint == record["fingerprint"]

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--type", "rqkmean", "--text", "none", "--collaborative", "als"], "rqkmeans"),
            (["--type", "rqkmeans", "--set", "codebok=8", "--text", "none", "--collaborative", "als"], "codebook_size"),
            (["--type", "rqkmeans", "--set", "levels=0", "--text", "none", "--collaborative", "als"], "levels"),
            (
                ["--type", "rqkmeans", "--set", "levels", "--text", "none", "--collaborative", "als"],
                "expected a.b=value",
            ),
            (["--type", "rqkmeans", "--set", "pretrained=x", "--text", "none", "--collaborative", "als"], "pretrained"),
            (["--type", "rqkmeans", "--text", "none"], "--collaborative als or RUN"),
            (["--type", "rqkmeans", "--text", "none", "--level", "a={title}"], "--text none"),
            (["--type", "rqkmeans", "--level", "{title}"], "NAME=TEMPLATE"),
            (["--type", "rqkmeans", "--level", "a={title}", "--level", "a={brand}"], "twice"),
            (["--type", "rqkmeans", "--level", "a={colour}"], "colour"),
            (["--type", "rqkmeans", "--level", "collaborative={title}"], "--collaborative"),
            (["--type", "cofirec", "--level", "brand={brand}"], "category, title, description"),
            (["--type", "rqkmeans", "--text", "none", "--collaborative", "sasrec"], "has to be trained"),
            (["--type", "rqkmeans", "--text", "none", "--collaborative", "nowhere/run"], "no run"),
            (["--type", "rqkmeans", "--text", "none", "--collaborative", "{type: als, factor: 3}"], "factors"),
            (["--type", "rqkmeans", "--text", "none", "--collaborative", "{factors: 3}"], "{type: als, factors: 32}"),
        ],
    )
    def test_flags_that_mean_nothing(
        self, data: Path, tmp_path: Path, capsys: Any, words: list[str], expected: str
    ) -> None:
        assert expected in refused(capsys, "tokenize", data, *words, "--out", tmp_path / "codes")
        assert not list(tmp_path.iterdir())

    def test_what_is_no_data_set(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "empty").mkdir()
        words = [*KMEANS, "--collaborative", "als", "--out", tmp_path / "codes"]
        assert "llmrec prepare" in refused(capsys, "tokenize", tmp_path / "empty", *words)

    def test_a_missing_matplotlib_is_said_before_the_fit(
        self, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        words = ["tokenize", data, *KMEANS, "--collaborative", ALS, "--out", tmp_path / "codes"]
        told = refused(capsys, *words)
        assert "llmrec[report]" in told and "--no-plots" in told and "data set" not in told
        record, _ = said(capsys, *words, "--no-plots")
        assert record["files"] == sorted(set(WRITTEN) - {"usage.png", "levels.png"})
