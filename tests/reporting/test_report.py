"""The page is read back with an HTML parser: what it shows, what it escapes, and that it loads nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.data.dataset import InteractionDataset
from llmrec.errors import DataError, DependencyError, RecipeError
from llmrec.evaluation.protocol import SAMPLED_NOTE, EvalProtocol
from llmrec.evaluation.results import EvalResult, results_record, summarise
from llmrec.evaluation.tables import prediction_table
from llmrec.reporting import plots
from llmrec.reporting.report import write_report
from llmrec.reporting.sections import default_metric, holm, paired_tests, read_sections
from llmrec.run_dir import RunDir, write_json
from tests.evaluation.small import make_dataset

EVIL = "<script>alert('x')</script> & \"quoted\""
ITEMS, USERS = 30, 40


def small_dataset() -> InteractionDataset:
    rng = np.random.default_rng(0)
    histories = [rng.permutation(np.arange(1, ITEMS + 1))[:8].tolist() for _ in range(USERS)]
    data = make_dataset(histories, ITEMS, titles=[EVIL, *(f"Film number {n}" for n in range(2, ITEMS + 1))])
    return replace(data, meta=replace(data.meta, notes=(f"dropped 3 rows {EVIL}",), counts={"rows read": 320}))


DATA = small_dataset()


def measured(name: str, protocol: EvalProtocol, skill: float) -> EvalResult:
    """A system that places the target first for a share of the users; no model is involved."""
    protocol = protocol.resolve(DATA)
    examples, rng = DATA.histories("test", 50), np.random.default_rng(int(skill * 100))
    ranks = np.where(rng.random(len(examples)) < skill, 1.0, rng.integers(2, 9, len(examples)).astype(float))
    items = np.stack([rng.permutation(np.arange(1, ITEMS + 1))[:10] for _ in range(len(examples))])
    items[ranks == 1, 0] = examples.targets[ranks == 1]
    table = prediction_table(
        DATA,
        users=examples.users,
        example_ids=examples.example_ids,
        targets=examples.targets,
        ranks=ranks,
        num_ranked=np.full(len(examples), 23),
        items=items,
        scores=-np.cumsum(np.ones_like(items, dtype=float), axis=1),
        texts=None,
        seed=42,
    )
    metrics = summarise(table, protocol, train_counts=DATA.context().train_counts)
    return EvalResult(name, table, metrics, protocol, protocol.fingerprint(DATA), DATA.fingerprint, USERS)


def make_run(
    folder: Path, skills: dict[str, float], *protocols: EvalProtocol, gates: bool = False, name: str = "tiny"
) -> Path:
    run = RunDir(folder)
    folder.mkdir(parents=True)
    recipe = f"name: {name}\nseed: 7\ndataset: {{source: synthetic}} # {EVIL}\nencoder: {{type: sasrec}}\n"
    run.recipe.write_text(recipe, encoding="utf-8")
    run.write_environment({"remark": EVIL})
    DATA.save(folder / "dataset")
    log = run.stage(1, "encoder") / "log.jsonl"
    log.parent.mkdir(parents=True)
    lines = [{"step": n, "loss": 3 / n, "learning_rate": 1e-3 / n} for n in range(1, 40)]
    lines += [{"step": 39, "eval_ndcg@10": 0.25, "eval_runtime": 1.0}, {"step": 39, "train_runtime": 2.0}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for protocol in protocols:
        target = run.evaluation(protocol.slug)
        results = {system: measured(system, protocol, skill) for system, skill in skills.items()}
        for result in results.values():
            result.save(target)
        write_json(target / "metrics.json", results_record(results))
        if gates:
            weights = np.random.default_rng(1).dirichlet(np.ones(3), USERS)
            columns = {"user": np.arange(1, USERS + 1), **{f"gate_{e}": weights[:, e] for e in range(3)}}
            pq.write_table(pa.table(columns), target / "gates.parquet")
    return folder


FULL, SAMPLED = EvalProtocol(ks=(1, 5, 10)), EvalProtocol(candidates="candidates-20", ks=(1, 5, 10))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "run", {"good": 0.8, "poor": 0.1}, FULL, SAMPLED, gates=True)
    record = write_report([run], folder / "page.html", title=f"Report {EVIL}")
    return record, (folder / "page.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, tables as lists of rows, and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        elif tag == "small":
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


def test_the_page_loads_nothing_and_stays_small(written: tuple[dict, str]) -> None:
    record, text = written
    page = Page(text)
    assert record["bytes"] == len(text.encode()) < 3_000_000
    assert text.startswith("<!doctype html>") and "Slices" not in text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert "src" not in attributes
        if "href" in attributes and tag != "a":
            assert str(attributes["href"]).startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text and "default-src 'none'" in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= {a["href"] for tag, a in page.tags if tag == "use"}


def test_texts_are_escaped(written: tuple[dict, str]) -> None:
    text = written[1]
    assert "<script" not in text and "alert('x')" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 4  # headline, note, environment, recipe


def test_table_shows_means_and_intervals(written: tuple[dict, str]) -> None:
    record, text = written
    table = next(t for t in Page(text).tables if t[0][0] == "system")
    column = table[0].index("ndcg@10")
    metrics = record["sections"][0]["metrics"]
    assert [row[0] for row in table[1:]] == ["good", "poor"]
    for row in table[1:]:
        value = metrics[row[0]]["ndcg@10"]
        assert row[column] == f"{value['mean']:.4f} {value['low']:.4f} … {value['high']:.4f}"
    assert "coverage@10" in table[0] and "…" not in table[1][table[0].index("coverage@10")]


def test_sampled_candidates_stand_apart(written: tuple[dict, str]) -> None:
    record, text = written
    full, sampled = record["sections"]
    assert full["protocol"].startswith("full ranking") and sampled["protocol"].startswith("candidates-20")
    assert full["fingerprint"] != sampled["fingerprint"]
    tables = [t for t in Page(text).tables if t[0][0] == "system"]
    assert len(tables) == 2 and all(len(t) == 3 for t in tables)
    assert text.count(SAMPLED_NOTE) == 1
    for section in record["sections"]:
        assert f"fingerprint <code>{section['fingerprint']}</code>" in text


def test_paired_test_finds_the_better_system(written: tuple[dict, str]) -> None:
    test = written[0]["sections"][0]["tests"]
    assert [(t["a"], t["b"]) for t in test] == [("good", "poor")]
    assert test[0]["difference"]["low"] > 0 and test[0]["p_value"] < 0.001 and test[0]["users"] == USERS
    assert "good − poor" in written[1]


def test_the_rest_of_the_page(written: tuple[dict, str]) -> None:
    text = written[1]
    assert "seed 7" in text and "prefers-color-scheme: dark" in text
    assert f"{USERS}</b><span>users" in text and "rows read" in text
    assert "Stage 1-encoder" in text and "3.0000 → 0.0769" in text
    assert "Training curves: loss, validation, learning rate" in text
    assert "Gate weights of tiny" in text and "Gate weights of 3 experts over 40 users" in text
    assert "<details><summary>Recipe</summary>" in text
    assert "Self-Attentive Sequential Recommendation" in text and "https://arxiv.org/abs/1808.09781" in text
    assert 'class="hit">Film number' in text and "✓" in text and "target at rank" in text
    assert "python" in text and "environment variables" not in text


def test_sample_marks_exactly_the_target(written: tuple[dict, str]) -> None:
    for card in written[1].split('<div class="card">')[1:]:
        target = re.search(r'Next: <span class="hit">(.*?)</span>', card)
        assert target is not None
        hits = re.findall(r'<li class="hit">(.*?) ✓</li>', card.partition('<div class="card">')[0])
        assert all(hit == target[1] for hit in hits)
        assert f"<li>{target[1]}</li>" not in card


def test_slices_have_tables_of_their_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / n, {"model": skill}, FULL) for n, skill in (("a", 0.7), ("b", 0.2))]
    path = RunDir(runs[1]).evaluation(FULL.slug) / "metrics.json"
    value = {"mean": 0.25, "low": 0.125, "high": 0.5}
    slices = {
        "history<=5": {"examples": 12, "users": 11, "models": {"model": {"ndcg@10": value}}},
        "history>900": {"examples": 0, "users": 0, "models": {}},
    }
    write_json(path, {**json.loads(path.read_text()), "slices": slices})
    (section,) = write_report(runs, tmp_path / "page.html")["sections"]
    assert [part["slice"] for part in section["slices"]] == list(slices)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>history&lt;=5</b>" in text and "11 users, 12 examples" in text and "no example lies in it" in text
    tables = [table for table in Page(text).tables if table[0][0] == "system"]
    assert tables[1:] == [[["system", "ndcg@10"], ["tiny (2) / model", "0.2500 0.1250 … 0.5000"]]]


def test_runs_of_one_question_share_a_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / n, {"model": skill}, FULL) for n, skill in (("a", 0.7), ("b", 0.2))]
    record = write_report(runs, tmp_path / "page.html")
    (section,) = record["sections"]
    assert list(section["metrics"]) == ["tiny / model", "tiny (2) / model"]
    assert len(section["tests"]) == 1 and record["title"] == "tiny, tiny (2)"


def test_a_record_that_contradicts_the_predictions_is_pointed_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"model": 0.5}, FULL)
    path = RunDir(run).evaluation(FULL.slug) / "metrics.json"
    record = json.loads(path.read_text())
    honest = record["models"]["model"]["hr@10"]["mean"]
    record["models"]["model"]["hr@10"]["mean"] = 0.123
    path.write_text(json.dumps(record))
    section = write_report([run], tmp_path / "page.html")["sections"][0]
    assert section["metrics"]["model"]["hr@10"]["mean"] == honest != 0.123
    assert any("hr@10" in note for note in section["notes"])


def test_a_missing_data_set_is_said_aloud(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"model": 0.5}, FULL)
    (run / "dataset" / "meta.json").unlink()
    record = write_report([run], tmp_path / "page.html")
    assert "data set not shown" in record["notices"]["tiny"][0]
    assert "data set not shown" in (tmp_path / "page.html").read_text()


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run"):
        write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(RecipeError, match="at least one"):
        write_report([], tmp_path / "page.html")
    run = make_run(tmp_path / "run", {})
    with pytest.raises(DataError, match="llmrec evaluate"):
        write_report([run], tmp_path / "page.html")
    (run / "stages/1-encoder/log.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(DataError, match=r"log\.jsonl:2"):
        write_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_gate_table_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"model": 0.5}, FULL)
    pq.write_table(pa.table({"user": [1], "weight": [0.5]}), RunDir(run).evaluation(FULL.slug) / "gates.parquet")
    with pytest.raises(DataError, match="gate weights"):
        write_report([run], tmp_path / "page.html")


def test_spectral_bands_are_drawn_and_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"ssr": 0.5}, FULL)
    rows = [
        {"signal": signal, "band": band, "from": band - 1.0, "to": float(band), "energy": 0.5, "gate": 0.25 * band,
         "margin": 0.125 if signal == EVIL else 0.375}
        for signal in ("identity", EVIL) for band in (1, 2)
    ]  # fmt: skip
    path = RunDir(run).evaluation(FULL.slug) / "bands.json"
    write_json(path, {"bands": rows})
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Spectral bands of" in page and page.count("<td>0.375</td>") + page.count("<td>0.3750</td>") == 2
    assert EVIL not in page, "names from files are shown, never run"
    write_json(path, {"bands": [{"signal": "identity"}]})
    with pytest.raises(DataError, match="not a record of bands"):
        write_report([run], tmp_path / "page.html")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"llmrec\[report\]"):
        write_report([tmp_path], tmp_path / "page.html")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", {"model": 0.5}, FULL)
    assert main(["report", str(run), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert Path(record["report"]) == run / "report.html" and (run / "report.html").is_file()
    assert main(["report", str(run), str(run)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "x.html"), "--title", "Mine"]) == 0
    assert "Mine" in capsys.readouterr().out and "<title>Mine</title>" in (tmp_path / "x.html").read_text()


def test_reporting_does_not_load_torch() -> None:
    code = "import sys, llmrec.reporting.report; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_many_systems_are_tested_against_the_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {f"s{n}": 0.1 * n for n in range(1, 9)}, FULL)
    (section,) = read_sections({"run": run})
    tests = paired_tests(section, default_metric(section))
    assert len(tests) == 7 and len({test["a"] for test in tests}) == 1


def test_drawings_keep_names_as_text() -> None:
    value = {"mean": 0.1, "low": 0.05, "high": 0.2}
    svg = plots.metric_bars({"a$x$ <b>&amp;": {"ndcg@10": value}}, ["ndcg@10", "hr@10"])
    assert "a$x$ &lt;b&gt;&amp;amp;" in svg and "<b>" not in svg and "http" not in svg and "currentColor" in svg
    assert plots.training_curves([{"step": 1, "train_runtime": 3.0}, {"step": 2, "loss": float("nan")}]) is None
    long = plots.training_curves([{"step": n, "loss": 1.0 / (n + 1)} for n in range(20_000)])
    assert long is not None and len(long) < 60_000


def test_entropy_by_hand() -> None:
    found = plots.row_entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert found == pytest.approx([0.0, np.log(2)])
