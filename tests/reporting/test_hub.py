"""Publishing over HTTP against a server on this machine: what goes, what never goes, and what stops it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmrec.errors import CheckFailed, CheckpointError, HubError, LlmrecError, RecipeError
from llmrec.reporting import hub as publishing
from llmrec.run_dir import write_json
from tests.hub_server import TOKEN, Hub, hub_server, use_here
from tests.reporting.published import ALLOWED, ALLOWED_MODEL, HOME, weights, write_run

SECRET = "hf_" + "Zyxwvutsrq9876543210" + "zyx"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as server:
        use_here(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", model=True)


def test_exactly_the_allowed_files_arrive(hub: Hub, run: Path) -> None:
    record = publishing.push(run, "me/mine")
    files = hub.files("me/mine")
    assert set(files) == ALLOWED | ALLOWED_MODEL == {file["path"] for file in record["files"]}
    assert {file["path"]: file["sha256"] for file in record["files"]} == {
        path: hashlib.sha256(data).hexdigest() for path, data in files.items()
    }
    assert files["model/projector.safetensors"] == (run / "model" / "projector.safetensors").read_bytes()
    assert files["README.md"].decode() == record["card"] and record["url"].endswith("me/mine")
    sent = b"".join([*hub.bodies, *hub.blobs.values()])
    assert b"user-1" not in sent and b"Alpha" not in sent, "no user and no title leaves"
    items = pq.read_table(io.BytesIO(files["dataset/items.parquet"]))
    assert items.column_names == ["item", "key"]


def test_titles_go_when_they_are_asked_for(hub: Hub, run: Path) -> None:
    publishing.push(run, "me/mine", titles=True)
    items = pq.read_table(io.BytesIO(hub.files("me/mine")["dataset/items.parquet"]))
    assert items.column("title").to_pylist()[0] == "Alpha" and items.column_names == ["item", "key", "title"]


def test_a_dry_run_sends_nothing_and_needs_no_token(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_here(hub, tmp_path / "cache", monkeypatch, token=False)
    record = publishing.push(run, "me/mine", dry_run=True)
    assert hub.calls == [] and record["url"] is None and record["card"].startswith("---\n")
    assert {file["path"] for file in record["files"]} == ALLOWED | ALLOWED_MODEL
    with pytest.raises(HubError, match="HF_TOKEN"):
        publishing.push(run, "me/mine")
    assert hub.calls == []


def test_a_later_push_replaces_its_files_and_leaves_those_of_others(hub: Hub, run: Path, tmp_path: Path) -> None:
    publishing.push(run, "me/mine")
    repo = hub.repos["me/mine"]
    repo.commit("main", {**hub.files("me/mine"), "LICENSE": b"mine", "docs/encoder.md": b"mine"})
    record = publishing.push(write_run(tmp_path / "encoder"), "me/mine")
    assert set(record["removed"]) == ALLOWED_MODEL
    assert set(hub.files("me/mine")) == ALLOWED | {"LICENSE", "docs/encoder.md"}
    commits = len(repo.commits)
    publishing.push(tmp_path / "encoder", "me/mine")
    assert set(hub.files("me/mine")) == ALLOWED | {"LICENSE", "docs/encoder.md"} and len(repo.commits) <= commits + 1


def test_a_branch_is_made_and_main_stays(hub: Hub, run: Path) -> None:
    for _ in range(2):
        assert publishing.push(run, "me/mine", revision="try-2")["revision"] == "try-2"
    assert set(hub.files("me/mine", "try-2")) == ALLOWED | ALLOWED_MODEL and hub.files("me/mine") == {}


def test_private_means_private(hub: Hub, run: Path) -> None:
    publishing.push(run, "me/secret", private=True)
    assert hub.repos["me/secret"].private
    publishing.push(run, "me/open")
    before = dict(hub.files("me/open"))
    assert not hub.repos["me/open"].private
    with pytest.raises(HubError, match="exists and is public"):
        publishing.push(run, "me/open", private=True)
    assert hub.files("me/open") == before
    publishing.push(run, "me/open", private=None)
    assert not hub.repos["me/open"].private


@pytest.mark.parametrize("broken", ["/commit/", "/lfs/", "/preupload/", "/api/repos/create"])
def test_a_failing_hub_keeps_what_it_had(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    publishing.push(write_run(tmp_path / "encoder"), "me/mine")
    before, hub.broken = dict(hub.files("me/mine")), broken
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(HubError, match="publishing to me/mine failed") as error:
        publishing.push(run, "me/mine")
    assert hub.files("me/mine") == before and TOKEN not in str(error.value)


def test_a_wrong_token_is_refused_without_showing_it(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(HubError, match="401|Invalid") as error:
        publishing.push(run, "me/mine")
    assert SECRET not in str(error.value) and hub.repos == {}


@pytest.mark.parametrize("name", ["mine", "me/", "/mine", "a/b/c", "me/mi ne", "me/..", "me/a--b", "../me/mine", ""])
def test_malformed_names(run: Path, name: str) -> None:
    with pytest.raises(HubError, match="OWNER/NAME"):
        publishing.collect(run, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model/tokenizer/tokenizer_config.json", json.dumps({"a": 1, "x": [SECRET]}, indent=1)),
        ("model/tokenizer/merges.txt", f"a b\nc d\n{SECRET}\n"),
        ("encoder/config.json", json.dumps({"name": f"{HOME}/encoder"}, indent=1)),
        ("evaluations/test-full/metrics.json", json.dumps({"notes": {"a": [SECRET]}}, indent=1)),
    ],
)
def test_a_secret_in_a_file_stops_everything(hub: Hub, run: Path, name: str, text: str) -> None:
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckFailed, match=rf"{name}, line \d+: ") as error:
        publishing.push(run, "me/mine")
    assert error.value.exit_status == 1
    assert SECRET not in str(error.value) and HOME not in str(error.value) and hub.calls == []


def test_secrets_in_weights_titles_and_the_recipe(hub: Hub, run: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(2, np.float32)}, run / "encoder" / "model.safetensors", metadata={"by": SECRET})
    with pytest.raises(CheckFailed, match=r"encoder/model\.safetensors, byte \d+: Hugging Face token"):
        publishing.push(run, "me/mine")
    weights(run / "encoder" / "model.safetensors")
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text.replace("title: null", f"title: {SECRET}"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"report\.title holds a secret") as error:
        publishing.push(run, "me/mine")
    assert SECRET not in str(error.value) and hub.calls == []


def test_home_folders_in_own_records_are_shortened(hub: Hub, tmp_path: Path) -> None:
    data = {"source": f"{HOME}/ratings.csv", "max_history": 5}
    run = write_run(tmp_path / "run", model=True, base=f"{HOME}/models/base", dataset=data)
    record = publishing.push(run, "me/mine")
    files = hub.files("me/mine")
    assert b"~/ratings.csv" in files["recipe.yaml"] and any("recipe.yaml" in notice for notice in record["notices"])
    assert json.loads(files["model/adapter/adapter_config.json"])["base_model_name_or_path"] == "~/models/base"
    assert any("base_model=" in notice for notice in record["notices"])
    assert HOME.encode() not in b"".join(files.values())
    assert f"{HOME}/ratings.csv" in (run / "recipe.yaml").read_text(encoding="utf-8"), "the run itself is unchanged"


def test_the_adapter_names_the_base_model_by_its_id(run: Path) -> None:
    files = {file.path: file.content for file in publishing.collect(run, "me/mine").files}
    config = files["model/adapter/adapter_config.json"]
    assert isinstance(config, bytes) and json.loads(config)["base_model_name_or_path"] == "owner/base-model"


@pytest.mark.parametrize("name", ["encoder/model.safetensors", "model/tokenizer/vocab.json", "metrics.json"])
def test_links_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("{}", encoding="utf-8")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link"):
        publishing.collect(run, "me/mine")


def test_a_linked_folder_is_not_followed(run: Path, tmp_path: Path) -> None:
    os.replace(run / "encoder", tmp_path / "elsewhere")
    (run / "encoder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        publishing.collect(run, "me/mine")


def test_another_format_behind_the_name_of_weights(run: Path) -> None:
    (run / "model" / "projector.safetensors").write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os.")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        publishing.collect(run, "me/mine")


@pytest.mark.parametrize("missing", ["metrics.json", "encoder/config.json", "model/recommender.json", "recipe.yaml"])
def test_an_unfinished_run_is_refused(run: Path, missing: str) -> None:
    (run / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        publishing.collect(run, "me/mine")


def test_a_run_over_other_data_is_refused(run: Path) -> None:
    record = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    write_json(run / "environment.json", {**record, "dataset_fingerprint": "0" * 16})
    with pytest.raises(LlmrecError, match="0{16}.*found"):
        publishing.collect(run, "me/mine")


def test_code_is_not_published(run: Path) -> None:
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text.replace("type: sasrec", 'type: "mine.py:Mine"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"mine\.py:Mine"):
        publishing.collect(run, "me/mine")
