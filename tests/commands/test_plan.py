"""`llmrec plan`: measuring, sweeps that go on, several processes, budgets and the tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.analysis.performance_law import term
from llmrec.cli import main
from llmrec.commands import plan, sweep_runs
from llmrec.commands.model_cost import encoder_latency, encoder_size
from llmrec.data.dataset import InteractionDataset
from llmrec.errors import CheckFailed, RecipeError
from llmrec.recipe import load_recipe
from llmrec.sweeps import load_sweep

ROOT = Path(__file__).resolve().parents[2]
TINY = """name: tiny
seed: 1
dataset: {source: synthetic, max_history: 12, options: {users: 60, items: 30, events_per_user: 8}}
encoder: {type: sasrec, hidden_size: 8, num_layers: 1, num_heads: 2}
stages:
  - {train: encoder, num_train_epochs: 1, learning_rate: 1e-2, per_device_train_batch_size: 32, eval_strategy: epoch}
evaluate: {metrics: [ndcg@10]}
"""
GRID = (
    "law: performance\nsweep: {encoder.num_layers: [1, 2, 4, 8], encoder.hidden_size: [8, 16, 32]}\ncorner_seeds: [2]\n"
)


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(TINY + text)
    return path


def json_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


FAKE = """
import json, math, os, pathlib, sys, time
import yaml
recipe, out = yaml.safe_load(open(sys.argv[1])), pathlib.Path(sys.argv[2])
term = lambda x, w: -(x ** -w) / 2 - w * math.log(x)
encoder, seed = recipe["encoder"], recipe["seed"]
print("training", out.name, "on", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), flush=True)
(out.parent.parent / f"started-{out.name}-{os.getpid()}").touch()
BODY
metric = 0.3 * term(encoder["num_layers"], -0.4) + 0.3 * term(encoder["hidden_size"], -0.25) + 0.75 + 1e-4 * seed
stage = out / "stages" / "1-encoder"
stage.mkdir(parents=True)
(stage / "done.json").write_text(json.dumps({"best_metric": metric, "seconds": 1.5}))
lines = [{"loss": loss, "epoch": epoch} for loss, epoch in ((9.0, 0.5), (7.0, 1.0), (3.0, 1.5), (2.0, 2.0))]
(stage / "log.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
(out / "recipe.yaml").write_text(open(sys.argv[1]).read())
(out / "metrics.json").write_text(json.dumps({"models": {"sasrec": {"ndcg@10": dict(mean=metric, low=0.0, high=1.0)}}}))
"""


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables keep their words whole, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Replaces the training process by one that writes the files of a finished run after `body` ran."""

    def install(body: str = "") -> None:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.replace("BODY", body))
        words = property(lambda run: [sys.executable, str(script), str(run.file), str(run.folder)])
        monkeypatch.setattr(sweep_runs.SweepRun, "command", words)
        monkeypatch.setattr(sweep_runs, "SECONDS_BETWEEN_LOOKS", 0.02)

    return install


def test_a_sweep_trains_ordinary_runs_and_a_second_call_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path, out = recipe_file(tmp_path, "sweep: {encoder.hidden_size: [8, 16]}\n"), tmp_path / "out"
    assert main(["plan", "--sweep", str(path), "--out", str(out), "--jobs", "2", "--json"]) == 0
    record = json_of(capsys)
    small, large = record["runs"]
    assert small["name"] == "hidden_size-8" and 0 <= small["best"] <= 1 and small["loss"] > 0 and small["seconds"] > 0
    assert small["parameters"] < large["parameters"] and small["inner"] < small["parameters"]
    assert small["parameters"] - small["inner"] == 8 * (31 + 12)  # item and position tables
    run = out / "runs" / "hidden_size-16"
    done = run / "stages" / "1-encoder" / "done.json"
    assert large["best"] == json.loads(done.read_text())["best_metric"]
    measured = json.loads((run / "metrics.json").read_text())["models"]["sasrec"]["ndcg@10"]
    assert large["test"]["ndcg@10"] == {part: measured[part] for part in ("mean", "low", "high")}
    assert large["gates"] == {}
    # Both share one prepared data set, and each folder is what `llmrec train` writes.
    assert len(list(out.glob("data/*/dataset/meta.json"))) == 1 and not (run / "dataset").exists()
    assert load_recipe(run / "recipe.yaml") == load_recipe(out / "recipes" / "hidden_size-16.yaml")
    assert {law["fit"] for law in record["laws"]} == {None}  # two sizes show no power law
    assert all(Path(plot).stat().st_size > 1000 for plot in record["plots"])

    before = done.stat().st_mtime_ns
    assert main(["plan", "--sweep", str(path), "--out", str(out), "--jobs", "2"]) == 0
    shown = capsys.readouterr()
    assert "2 of 2 runs are finished already" in shown.err and done.stat().st_mtime_ns == before
    assert "hidden_size-16" in shown.out and "at least four sizes" in shown.out


def test_the_law_is_fitted_and_a_size_recommended(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake()
    path, out = recipe_file(tmp_path, GRID), tmp_path / "out"
    words = ["plan", "--sweep", str(path), "--out", str(out), "--jobs", "2"]
    assert main([*words, "--json"]) == 0
    record = json_of(capsys)
    assert len(record["runs"]) == 16 and record["plan"]["status"] == "determined"
    assert record["plan"]["choice"]["depth"] == 6  # 2^(1 / 0.4) = 5.7
    assert record["plan"]["choice"]["width"] == 16  # 2^(1 / 0.25) = 16
    assert record["plan"]["noise"] == pytest.approx(1e-4 / np.sqrt(2), rel=1e-3)
    assert record["runs"][0]["loss"] == 2.5  # the last whole epoch
    assert json.loads((out / "plan.json").read_text())["plan"] == record["plan"]
    assert {Path(plot).name for plot in record["plots"]} == {"surface.svg", "surface.png"}

    assert main([*words, "--budget-params", "1500"]) == 0
    shown = capsys.readouterr()
    assert "16 of 16 runs are finished already" in shown.err
    assert "plain scaling law" in shown.out and "twice the depth and width" in shown.out
    chosen = json.loads((out / "plan.json").read_text())["plan"]["choice"]
    assert chosen["cost"] <= 1500 and chosen["cost"] == _parameters(path, chosen)


def _parameters(path: Path, choice: dict[str, Any]) -> int:
    sweep = load_sweep(path, [f"encoder.num_layers={choice['depth']}", f"encoder.hidden_size={choice['width']}"])
    data = next((path.parent / "out").glob("data/*/dataset"))
    recipe = load_recipe(path.parent / "out" / "recipes" / f"{sweep.points[0].name}.yaml")
    encoder = type(recipe.encoder).model_validate(
        {**recipe.encoder.model_dump(), "num_layers": choice["depth"], "hidden_size": choice["width"]}  # type: ignore[union-attr]
    )
    return encoder_size(recipe.model_copy(update={"encoder": encoder}), InteractionDataset.load(data)).total


def test_a_power_law_for_each_series(fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake()
    path = recipe_file(tmp_path, "sweep: {encoder.num_layers: [1, 2, 4, 8], stages.0.max_examples: [20, null]}\n")
    assert main(["plan", "--sweep", str(path), "--out", str(tmp_path / "out"), "--json", "--jobs", "2"]) == 0
    record = json_of(capsys)
    assert [(law["value"], law["series"], law["runs"]) for law in record["laws"]] == [
        ("loss", "max_examples 20", 4),
        ("loss", "max_examples all", 4),
        ("ndcg@10", "max_examples 20", 4),
        ("ndcg@10", "max_examples all", 4),
    ]
    assert all(set(law["fit"]["intervals"]) == {"a", "b", "c"} for law in record["laws"])


def test_each_device_has_one_process(fake: Any, tmp_path: Path) -> None:
    fake("time.sleep(0.3)")
    path, out = recipe_file(tmp_path, "law: none\nsweep: {encoder.hidden_size: [8, 16, 32, 64]}\n"), tmp_path / "out"
    assert main(["plan", "--sweep", str(path), "--out", str(out), "--devices", "0,3"]) == 0
    logs = [log.read_text().split() for log in sorted(out.glob("logs/*.log"))]
    assert [words[3] for words in logs].count("0") == [words[3] for words in logs].count("3") == 2


def test_a_failed_run_stops_no_other_and_is_tried_again(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("if encoder['hidden_size'] == 16: sys.exit('no room on the disk')")
    path, out = recipe_file(tmp_path, "law: none\nsweep: {encoder.hidden_size: [8, 16, 32]}\n"), tmp_path / "out"
    words = ["plan", "--sweep", str(path), "--out", str(out)]
    assert main(words) == CheckFailed.exit_status == 1
    shown = capsys.readouterr().err
    assert "1 of 3 runs failed" in shown and "hidden_size-16" in shown and "no room on the disk" in shown
    assert (out / "runs" / "hidden_size-32" / "metrics.json").is_file()
    fake()
    assert main(words) == 0
    assert "2 of 3 runs are finished already" in capsys.readouterr().err
    assert (
        len(list((out).glob("started-hidden_size-8-*"))) == 1 and len(list(out.glob("started-hidden_size-16-*"))) == 2
    )


DRIVER = """
import sys
from llmrec.commands import sweep_runs
sweep_runs.SweepRun.command = property(lambda run: [sys.executable, sys.argv[1], str(run.file), str(run.folder)])
from llmrec.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_terminated_sweep_stops_its_runs_and_goes_on(fake: Any, tmp_path: Path) -> None:
    fake("if encoder['hidden_size'] == 16: time.sleep(120)")
    path, out = recipe_file(tmp_path, "law: none\nsweep: {encoder.hidden_size: [8, 16]}\n"), tmp_path / "out"
    words = ["plan", "--sweep", str(path), "--out", str(out)]
    driver = [sys.executable, "-c", DRIVER, str(tmp_path / "fake.py"), *words]
    process = subprocess.Popen(driver, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (started := list(out.glob("started-hidden_size-16-*"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    child = int(started[0].name.rsplit("-", 1)[1])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    fake()
    assert main(words) == 0
    assert len(list(out.glob("started-hidden_size-8-*"))) == 1 and len(list(out.glob("started-hidden_size-16-*"))) == 2


def test_a_finished_run_of_another_recipe_is_not_taken(fake: Any, tmp_path: Path) -> None:
    fake()
    out = tmp_path / "out"
    runs = sweep_runs.lay_out(load_sweep(recipe_file(tmp_path, "sweep: {seed: [1]}\n")), out, lambda line: None)
    sweep_runs.run_all(runs, lambda line: None)
    assert runs[0].finished
    other = load_sweep(tmp_path / "sweep.yaml", ["encoder.dropout=0.5"])
    assert not sweep_runs.lay_out(other, out, lambda line: None)[0].finished


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "shoppers"
    assert main(["prepare", "synthetic", "--out", str(folder)]) == 0
    return folder


def test_a_data_set_is_measured_and_the_pilot_announced(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(prepared), "--json", "--budget-params", "60000"]) == 0
    record = json_of(capsys)
    assert [row["history"] for row in record["dataset"]["rows"]] == [25, 50, 100, 200]
    assert len(record["planned"]) == 16  # 4 depths, 3 widths, and the corners again
    within = [row for row in record["planned"] if row["within the budget"]]
    assert within and all(row["parameters"] <= 60_000 for row in within) and len(within) < 16
    assert not Path("runs/plan-shoppers").exists()
    assert main(["plan", str(prepared)]) == 0
    shown = capsys.readouterr().out
    assert "real entropy" in shown and "runs that --run would train" in shown


def test_a_pilot_of_a_data_set_uses_its_folder(fake: Any, prepared: Path, tmp_path: Path) -> None:
    fake()
    path, out = recipe_file(tmp_path, "law: none\nsweep: {encoder.hidden_size: [8]}\n"), tmp_path / "out"
    words = ["plan", str(prepared), "--run", "--sweep", str(path), "--out", str(out), "--jobs", "2"]
    assert main(words) == 0
    recipe = load_recipe(next((out / "recipes").glob("*.yaml")))
    assert Path(recipe.dataset.source).resolve() == prepared.resolve()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither a data set nor a sweep"),
        (["--sweep", "smoke/sasrec"], "holds no sweep"),
        (["--sweep", "performance_law/movielens", "--budget-params", "5", "--budget-ms", "1"], "expected one of them"),
        (["--sweep", "performance_law/movielens", "--budget-ms", "0"], "--budget-ms: found 0"),
        (["--sweep", "scaling/sasrec", "--budget-params", "5"], "a budget is for law: performance"),
        (["--sweep", "scaling/sasrec", "--jobs", "2", "--devices", "0"], "use one of them"),
        (["no-such-folder"], "not a prepared data set"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_budget_below_every_run_is_refused_before_training(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(prepared), "--run", "--out", str(tmp_path / "out"), "--budget-params", "10"]) == 2
    assert "the smallest run takes" in capsys.readouterr().err and not (tmp_path / "out" / "runs").exists()


def test_a_recipe_that_never_validates_is_refused(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "sweep: {seed: [1]}\n")
    sweep = load_sweep(path, ["stages.0.eval_strategy='no'"])
    with pytest.raises(RecipeError, match="eval_strategy"):
        sweep_runs.lay_out(sweep, tmp_path / "out", lambda line: None)


def test_latency_grows_with_the_model(prepared: Path) -> None:
    dataset = InteractionDataset.load(prepared)
    small, large = (
        load_recipe(ROOT / "recipes/smoke/sasrec.yaml", [f"encoder.num_layers={n}", f"encoder.hidden_size={h}"])
        for n, h in ((1, 8), (8, 256))
    )
    assert 0 < encoder_latency(small, dataset) < encoder_latency(large, dataset)


def test_amounts_of_data_are_shares_of_the_windows(prepared: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "sweep: {stages.0.max_examples: [100, null]}\n")
    sweep = load_sweep(path, [f"dataset.source={prepared}"])
    runs = sweep_runs.lay_out(sweep, tmp_path / "out", lambda line: None)
    from llmrec.analysis.planner import measure

    measured = measure(runs[0].dataset, [12])
    few, everything = plan._amounts(runs, measured)
    assert everything == measured.events * measured.rows[0].entropy.real
    assert few / everything == pytest.approx(100 / len(runs[0].dataset.windows(12)))
    assert np.isfinite(term(few, -0.1))


def test_parameters_of_a_language_model_are_read_from_headers(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "adapter").mkdir()
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}, tmp_path / "adapter" / "x.safetensors")
    save_file({"c": np.zeros((), np.float32)}, tmp_path / "y.safetensors")
    assert sweep_runs.stored_parameters(tmp_path) == 18


def test_gates_of_a_run_are_summed_up(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "test-full"
    folder.mkdir(parents=True)
    weights = {"user": [1, 2, 3], "gate_0": [1.0, 1.0, 0.5], "gate_1": [0.0, 0.0, 0.5]}
    pq.write_table(pa.table(weights), folder / "gates.parquet")
    found = sweep_runs.gate_figures(tmp_path)
    assert found["gate entropy"] == pytest.approx(1 / 3)  # one user of three is undecided
    assert found["busiest expert"] == 1.0  # ties count for the first
    assert sweep_runs.gate_figures(tmp_path / "none") == {}
