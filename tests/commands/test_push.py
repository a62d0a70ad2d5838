"""`llmrec push`, report.push_to, and the promise that a planted token leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrec.cli import main
from tests.hub_server import TOKEN, Hub, environment, hub_server, use_here
from tests.reporting.published import ALLOWED, ALLOWED_MODEL, write_run
from tests.runs import ROOT, words

PLANTED = {
    "HF_TOKEN": TOKEN,
    "OPENAI_API_KEY": "sk-" + "proj-Qwertyuiop1234567890",
    "WANDB_API_KEY": "5f2b7c9d1e3a" + "4b6c8d0e",
    "SHOP_PASSWORD": "korrekt-pferd-7",
}
ARGUMENT = "ghp_" + "Mnbvcxzlkj0987654321" + "mnb"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as server:
        use_here(server, tmp_path / "cache", monkeypatch)
        yield server


def bytes_below(folder: Path) -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_planted_token_leaves_no_trace(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    out, recipe = tmp_path / "run", tmp_path / "planted.yaml"
    recipe.write_text(
        f"name: x\ndataset: {{source: synthetic}}\nencoder: {{type: popularity}}\nreport: {{title: {ARGUMENT}}}\n",
        encoding="utf-8",
    )
    arguments = (
        ["train", str(recipe), "--out", str(out)],
        words("sasrec", out, f"report.title={ARGUMENT}"),
        words("sasrec", out, f"stages.0.hub_token={ARGUMENT}"),
        words("sasrec", out, f"report.title={PLANTED['SHOP_PASSWORD']}"),
        words("sasrec", out, f"stages.9.train={ARGUMENT}"),
        ["push", str(out), "--repo", f"me/{ARGUMENT}", "--token", ARGUMENT],
    )
    for asked in arguments:
        try:
            assert main(asked) == 2
        except SystemExit as end:  # argparse
            assert end.code == 2
        assert not out.exists()
    assert main(words("sasrec", out)) == 0
    assert main(["push", str(out), "--repo", "me/planted"]) == 0
    shown = capfd.readouterr()
    places = {
        "run folder": bytes_below(out),
        "standard output": shown.out.encode(),
        "standard error": shown.err.encode(),
        "bodies of the upload": b"".join(hub.bodies),
        "uploaded files": b"".join([*hub.blobs.values(), *hub.files("me/planted").values()]),
    }
    assert "holds a secret" in shown.err and set(hub.files("me/planted")) >= {"README.md", "encoder/model.safetensors"}
    for place, data in places.items():
        for value in [*PLANTED.values(), ARGUMENT]:
            assert data and value.encode() not in data, f"{value[:3]}... is in the {place}"


def test_a_dry_run_as_json(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", model=True)
    assert main(["push", str(run), "--repo", "me/mine", "--dry-run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["dry_run"] and record["run"] == str(run) and hub.calls == []
    assert {file["path"] for file in record["files"]} == ALLOWED | ALLOWED_MODEL
    assert all(len(file["sha256"]) == 64 and file["bytes"] > 0 for file in record["files"])
    assert record["card"].startswith("---\n")


def test_people_see_files_and_card(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["push", str(run), "--repo", "me/mine", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would be published: me/mine (main)" in shown and "encoder/model.safetensors" in shown
    assert "## What was measured" in shown
    assert main(["push", str(run), "--repo", "me/mine", "--revision", "try", "--titles"]) == 0
    shown = capsys.readouterr().out
    assert f"{hub.url}/me/mine" in shown and "## What" not in shown
    assert set(hub.files("me/mine", "try")) == ALLOWED


def test_a_fresh_process_needs_its_environment_only(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path / "run")
    code = "import sys; from llmrec.cli import main; status = main(); print('torch' in sys.modules); sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(run), "--repo", "me/mine", "--private"],
        cwd=ROOT, env={**os.environ, **environment(hub, tmp_path / "cache"), "HF_TOKEN": TOKEN},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False", "publishing does not load torch"
    assert set(hub.files("me/mine")) == ALLOWED and hub.repos["me/mine"].private
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [("secret", 1, "encoder/config.json, line 1"), ("name", 2, "OWNER/NAME"), ("no run", 2, "is not a run")],
)
def test_what_stops_it(
    tmp_path: Path, hub: Hub, change: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    if change == "secret":
        (run / "encoder" / "config.json").write_text(json.dumps({"x": ARGUMENT}), encoding="utf-8")
    repo = "mine" if change == "name" else "me/mine"
    assert main(["push", str(tmp_path if change == "no run" else run), "--repo", repo]) == status
    shown = capsys.readouterr()
    assert message in shown.err and ARGUMENT not in shown.out + shown.err and hub.calls == []


def test_a_recipe_publishes_at_the_end(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("sasrec", tmp_path / "run", "report.push_to=me/mine")) == 0
    assert "published" in capsys.readouterr().err
    assert "encoder/model.safetensors" in hub.files("me/mine") and hub.repos["me/mine"].private


@pytest.mark.parametrize("reason", ["no token", "malformed"])
def test_what_cannot_be_published_is_not_trained(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    use_here(hub, tmp_path / "cache", monkeypatch, token=reason != "no token")
    name = "me/mine" if reason == "no token" else "me/mine/too"
    assert main(words("sasrec", tmp_path / "run", f"report.push_to={name}")) == 2
    shown = capsys.readouterr().err
    assert ("HF_TOKEN" if reason == "no token" else "report.push_to") in shown
    assert not (tmp_path / "run").exists() and hub.calls == []
