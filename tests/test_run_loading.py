"""A run by folder and by Hub id gives the same answers, and parts that do not belong together are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.dataset import InteractionDataset
from llmrec.errors import CheckpointError, DataError, HubError, RecipeError
from llmrec.recommender import Recommender
from llmrec.reporting.hub import push
from llmrec.run_loading import find_run
from llmrec.training.stages import run_recipe
from tests.hub_server import Hub, hub_server, use_here
from tests.runs import prompted_recipe, train


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    """A run of sasrec and one of iLoRA over item slots, published without and with titles."""
    folder = tmp_path_factory.mktemp("published")
    train("sasrec", folder / "sasrec", "seed=7")
    train("ilora", folder / "ilora")
    monkeypatch = pytest.MonkeyPatch()
    with hub_server() as hub:
        use_here(hub, folder / "unused", monkeypatch)
        push(folder / "sasrec", "me/sasrec", titles=True)
        push(folder / "ilora", "me/ilora")
        monkeypatch.undo()
        yield hub, folder


@pytest.fixture
def hub(published: tuple[Hub, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, asked by somebody else: an empty cache and no token."""
    use_here(published[0], tmp_path / "cache", monkeypatch, token=False)
    return published[0]


@pytest.mark.parametrize("system", ["sasrec", "ilora"])
def test_a_published_run_answers_like_the_folder(hub: Hub, published: tuple[Hub, Path], system: str) -> None:
    here, there = Recommender.from_pretrained(published[1] / system), Recommender.from_pretrained(f"me/{system}")
    assert here.name == there.name == system and here.max_history == there.max_history
    histories = [here.history_of(user) for user in here.dataset.user_keys[1:6]]
    ours, theirs = here.recommend(histories, 7, reasons=2), there.recommend(histories, 7, reasons=2)
    assert [[(i.item, i.score) for i in row] for row in ours] == [[(i.item, i.score) for i in row] for row in theirs]
    assert there.dataset.fingerprint == here.dataset.fingerprint
    first, second = ours[0][0], theirs[0][0]
    assert [(r.item, r.similarity) for r in first.reasons] == [(r.item, r.similarity) for r in second.reasons]
    assert {r.shared_users for r in second.reasons} == {None} and "users share" not in str(second.reasons[0])
    assert second.title == (first.title if system == "sasrec" else first.item), "titles went with sasrec only"
    for question in (lambda: there.history_of("u1"), lambda: there.popular(3)):
        with pytest.raises(DataError, match=f"(?s)interactions.*not at hand.*{here.dataset.fingerprint}"):
            question()
    with pytest.raises(DataError, match="not at hand"):
        there.recommend([[]], 3, on_empty="popular")


def test_the_data_set_brings_everything_back(hub: Hub, published: tuple[Hub, Path]) -> None:
    folder = published[1] / "sasrec"
    here = Recommender.from_pretrained(folder)
    there = Recommender.from_pretrained("me/sasrec", dataset=folder / "dataset")
    history = here.history_of(here.dataset.user_keys[2])
    assert there.history_of(here.dataset.user_keys[2]) == history and there.popular(3) == here.popular(3)
    assert there.recommend([history], 3, reasons=2) == here.recommend([history], 3, reasons=2)


def test_revisions(hub: Hub, published: tuple[Hub, Path]) -> None:
    commit = hub.repos["me/sasrec"].branches["main"]
    assert find_run("me/sasrec", commit) == find_run("me/sasrec")
    with pytest.raises(HubError, match="'no-such-branch'"):
        find_run("me/sasrec", "no-such-branch")
    with pytest.raises(CheckpointError, match="is a folder"):
        find_run(published[1] / "sasrec", "main")


def test_only_files_of_a_run_are_fetched(hub: Hub) -> None:
    repo = hub.repos["me/sasrec"]
    repo.commit("extra", {**hub.files("me/sasrec"), "encoder/model.bin": b"\x80\x04.", "code.py": b"raise SystemExit"})
    found = find_run("me/sasrec", "extra")
    names = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert names == set(hub.files("me/sasrec"))


def test_names_that_are_neither_folder_nor_id(hub: Hub, tmp_path: Path) -> None:
    for name in ("no-such-folder", "a/b/c", "../a", tmp_path / "none"):
        with pytest.raises(CheckpointError, match="no folder"):
            find_run(name)
    with pytest.raises(HubError, match=r"(?s)no folder me/none.*llmrec push"):
        find_run("me/none")


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_run("me/sasrec")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_run("me/sasrec") == first, "what was fetched before is found again"
    with pytest.raises(HubError, match="me/ilora"):
        find_run("me/ilora")


def damaged(hub: Hub, repo: str, name: str, content: bytes) -> None:
    hub.repos[repo].commit("damaged", {**hub.files(repo), name: content})


def test_items_of_another_run_are_refused(hub: Hub, published: tuple[Hub, Path], tmp_path: Path) -> None:
    items = pq.read_table(published[1] / "sasrec" / "dataset" / "items.parquet").select(["item", "key", "title"])
    keys = items.column("key").to_pylist()
    pq.write_table(items.set_column(1, "key", pa.array(keys[::-1])), tmp_path / "items.parquet")
    damaged(hub, "me/sasrec", "dataset/items.parquet", (tmp_path / "items.parquet").read_bytes())
    with pytest.raises(CheckpointError, match=r"(?s)item index [0-9a-f]{64} .* found [0-9a-f]{64}"):
        Recommender.from_pretrained("me/sasrec", revision="damaged")


@pytest.mark.parametrize("field", ["dataset", "item_index"])
def test_a_catalogue_of_another_data_set_is_refused(hub: Hub, field: str) -> None:
    record = json.loads(hub.files("me/sasrec")["dataset/catalogue.json"])
    if field == "dataset":
        record["dataset"] = "0123456789abcdef"
    else:
        record["item_index"]["keys"] = "0" * 64
    damaged(hub, "me/sasrec", "dataset/catalogue.json", json.dumps(record).encode())
    with pytest.raises(CheckpointError, match="0123456789abcdef" if field == "dataset" else "0{64}"):
        Recommender.from_pretrained("me/sasrec", revision="damaged")


def test_another_encoder_is_refused(hub: Hub) -> None:
    damaged(hub, "me/ilora", "encoder/model.safetensors", hub.files("me/sasrec")["encoder/model.safetensors"])
    with pytest.raises(CheckpointError, match=r"with the encoder [0-9a-f]{64}, found the encoder [0-9a-f]{64}"):
        Recommender.from_pretrained("me/ilora", revision="damaged")


def test_another_base_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    import torch

    from llmrec.llm.loading import load_language_model

    model, tokenizer = load_language_model("tiny-llama", dtype="float32")
    tokenizer.save_pretrained(tmp_path / "same")
    model.save_pretrained(tmp_path / "same")
    assert Recommender.from_pretrained("me/ilora", base_model=str(tmp_path / "same")).name == "ilora"
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    model.save_pretrained(tmp_path / "same")
    with pytest.raises(CheckpointError, match=r"(?s)trained on the base model tiny-llama .*, found "):
        Recommender.from_pretrained("me/ilora", base_model=str(tmp_path / "same"))


def test_a_published_recipe_starts_no_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('the file was run')\n", encoding="utf-8")
    text = hub.files("me/sasrec")["recipe.yaml"].decode().replace("type: sasrec", 'type: "mine.py:Mine"')
    damaged(hub, "me/sasrec", "recipe.yaml", text.encode())
    with pytest.raises(CheckpointError, match=r"mine\.py:Mine.*not run"):
        Recommender.from_pretrained("me/sasrec", revision="damaged")


def test_a_run_over_a_swapped_data_set_is_refused(published: tuple[Hub, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(published[1] / "sasrec", folder)
    data = InteractionDataset.load(folder / "dataset")
    fewer = data.with_interactions(data.interactions.slice(0, data.interactions.num_rows - 1), "without the last event")
    fewer.save(folder / "dataset")
    with pytest.raises(CheckpointError, match=rf"{data.fingerprint}, found {fewer.fingerprint}"):
        Recommender.from_pretrained(folder)


def test_a_run_in_words_needs_its_titles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = prompted_recipe("text", encoder=False)
    run_recipe(recipe, tmp_path / "run", say=lambda line: None)
    with hub_server() as hub:
        use_here(hub, tmp_path / "cache", monkeypatch)
        assert any("--titles" in notice for notice in push(tmp_path / "run", "me/bare")["notices"])
        push(tmp_path / "run", "me/titled", titles=True)
        with pytest.raises(DataError, match=r"(?s)reads item titles.*--titles"):
            Recommender.from_pretrained("me/bare")
        here = Recommender.from_pretrained(tmp_path / "run")
        history = here.history_of(here.dataset.user_keys[1])
        pool = [here.dataset.item_keys[1:7]]
        for there in (
            Recommender.from_pretrained("me/titled"),
            Recommender.from_pretrained("me/bare", dataset=tmp_path / "run" / "dataset"),
        ):
            assert there.rank([history], pool) == here.rank([history], pool)


def test_publishing_from_python_is_refused_before_training(tmp_path: Path) -> None:
    recipe = prompted_recipe("text", encoder=False)
    recipe.report.push_to = "me/mine"
    with pytest.raises(RecipeError, match=r"report\.push_to"):
        run_recipe(recipe, tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()
