"""Recipes with item codes from end to end: fitting, heads, language models, reruns, and everything that is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from llmrec.data.dataset import InteractionDataset
from llmrec.data.image_features import WIDTH
from llmrec.data.item_images import draw_item
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.rqkmeans import RQKMeans
from llmrec.recipe import ItemFeaturesSpec, Recipe, parse_recipe
from llmrec.recommender import Recommender
from llmrec.training.item_codes import load_item_tokenizer, make_item_features, make_text_tokens
from llmrec.training.stages import evaluate_run, open_run, run_recipe
from tests.conftest import ROOT
from tests.contracts.item_tokenizers import item_features
from tests.data.tables import dataset_of

HEAD = {"type": "tiger", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32, "beams": 8}
CODES = {"type": "rqkmeans", "levels": 2, "codebook_size": 16}
FEATURES = {"levels": {}, "collaborative": {"type": "als", "factors": 8, "iterations": 3}}
STAGE = {"train": "head", "max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-2,
         "eval_strategy": "no", "logging_steps": 1}  # fmt: skip
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def raw(**changes: Any) -> dict[str, Any]:
    """A TIGER recipe of four steps on made-up shoppers, its codes from collaborative vectors alone."""
    made: dict[str, Any] = {
        "name": "codes", "seed": 1,
        "dataset": {"source": "synthetic", "max_history": 6,
                    "options": {"users": 40, "items": 30, "events_per_user": 8}},
        "item_features": FEATURES, "item_tokenizer": CODES, "head": HEAD, "stages": [STAGE],
        "evaluate": {"max_users": 8, "baselines": ["popularity"]},
    }  # fmt: skip
    made.update(changes)
    return copy.deepcopy({name: value for name, value in made.items() if value is not None})


def language_model(tuner: dict[str, Any] | None = LORA, **prompt: Any) -> dict[str, Any]:
    """The same with a language model of two random layers in place of the head."""
    stage = {**STAGE, "train": "tuner", "max_steps": 2, "per_device_train_batch_size": 4}
    return raw(
        head=None, llm={"model": "tiny-llama", "dtype": "float32"}, tuner=tuner,
        prompt={"style": "item_codes", "beams": 8, **prompt}, stages=[stage],
    )  # fmt: skip


def run(recipe: dict[str, Any] | Recipe, out: Path) -> tuple[dict[str, Any], list[str]]:
    """The record of a run and what it said."""
    said: list[str] = []
    return run_recipe(recipe if isinstance(recipe, Recipe) else parse_recipe(recipe), out, say=said.append), said


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def replace_codes(out: Path) -> tuple[ItemTokenizer, ItemTokenizer]:
    """Put other codes of the same catalogue into a run; returns those of before and the new ones."""
    before = RQKMeans.from_pretrained(out / "item_tokenizer")
    other = RQKMeans(levels=2, codebook_size=16)
    other.fit(item_features(len(before.codes) - 1, seed=9), seed=9)
    other.save_pretrained(out / "item_tokenizer")
    assert other.fingerprint != before.fingerprint
    return before, other


@pytest.fixture(scope="module")
def tiger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    out = tmp_path_factory.mktemp("tiger") / "run"
    return out, *run(raw(), out)


# A head --------------------------------------------------------------------------------------------------------------


def test_a_head_is_trained_measured_and_loaded(tiger: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, record, said = tiger
    assert set(record["models"]) == {"popularity", "tiger"} and record["users"] == 8
    for name in (
        "item_tokenizer/tokenizer.json", "item_tokenizer/codes.safetensors", "item_tokenizer/fit.json",
        "model/config.json", "model/model.safetensors", "stages/1-head/done.json", "stages/1-head/log.jsonl",
        "metrics.json", "recipe.yaml",
    ):  # fmt: skip
        assert (out / name).is_file(), name
    assert "item features: collaborative" in said and any(line.startswith("item codes: rqkmeans") for line in said)
    fit = json.loads((out / "item_tokenizer" / "fit.json").read_text())
    dataset = InteractionDataset.load(out / "dataset")
    trained = int((dataset.context().train_counts[1:] > 0).sum())
    assert fit["dataset"] == dataset.fingerprint and fit["levels"] == {"collaborative": trained}
    codes = RQKMeans.from_pretrained(out / "item_tokenizer")
    assert codes.unique and len(codes.codes) == dataset.num_items + 1
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["item_index_fingerprint"] == codes.fingerprint
    assert config["dataset_fingerprint"] == dataset.fingerprint
    steps = [json.loads(line) for line in (out / "stages" / "1-head" / "log.jsonl").read_text().splitlines()]
    assert any({"level_1", "level_2"} <= step.keys() for step in steps), "losses per level are logged"


def test_a_loaded_head_recommends_items_of_the_catalogue(tiger: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, record, _ = tiger
    recommender = Recommender.from_pretrained(out)
    history = recommender.history_of(recommender.dataset.user_keys[1])
    answers = recommender.recommend([history, history[:1]], 30)  # more than the beam is wide
    known = set(recommender.dataset.item_keys[1:])
    for answer, given in zip(answers, (history, history[:1]), strict=True):
        found = [item.item for item in answer]
        assert len(set(found)) == len(found) == len(known) - len(set(given)) and set(found) == known - set(given)
    opened = open_run(out, say=lambda line: None)
    again = evaluate_run(opened, opened.recipe.evaluate, primary=False)
    assert again["models"] == record["models"]


def test_a_finished_run_fits_and_trains_nothing_again(tiger: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, record, _ = tiger
    parts = [out / "item_tokenizer", out / "stages"]
    files = [path for part in parts for path in sorted(part.rglob("*")) if path.is_file() and path.name != ".lock"]
    before = [(path, path.stat().st_mtime_ns) for path in files]
    again, said = run(raw(), out)
    assert [(path, path.stat().st_mtime_ns) for path, _ in before] == before
    assert again == record and not any("item codes" in line or "item features" in line for line in said)


def test_another_run_has_the_same_codes_and_weights(
    tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    run(raw(), tmp_path / "again")
    for part in ("item_tokenizer/codes.safetensors", "model/model.safetensors"):
        assert (tmp_path / "again" / part).read_bytes() == (tiger[0] / part).read_bytes(), part


LONG = {**STAGE, "max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 64, "save_strategy": "epoch",
        "save_total_limit": 9}  # fmt: skip
RANDOM = {**HEAD, "dropout": 0.2, "random_crop": True}


def test_a_head_goes_on_from_a_checkpoint_to_the_same_bytes(tmp_path: Path) -> None:
    """With dropout and random crops, which draw from the generator that a checkpoint keeps."""
    recipe = raw(head=RANDOM, stages=[LONG])
    run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    stage = tmp_path / "cut" / "stages" / "1-head"
    steps = sorted(stage.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert len(steps) == 3
    (stage / "done.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "model")
    for folder in (stage / "checkpoints" / "final", *steps[1:]):
        shutil.rmtree(folder)
    _, said = run(recipe, tmp_path / "cut")
    assert hashes(tmp_path / "cut" / "model") == hashes(tmp_path / "whole" / "model")
    assert not any("item codes" in line for line in said)


def test_a_fit_that_was_cut_off_is_done_again(tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    """fit.json is written last; without it there are no codes yet."""
    shutil.copytree(tiger[0], tmp_path / "run")
    (tmp_path / "run" / "item_tokenizer" / "fit.json").unlink()
    record, said = run(raw(), tmp_path / "run")
    assert any(line.startswith("item codes: rqkmeans") for line in said) and record == tiger[1]


@pytest.mark.slow
def test_a_killed_head_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = parse_recipe(raw(head=RANDOM, stages=[{**LONG, "num_train_epochs": 12}]))
    run(recipe, tmp_path / "whole")
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    for number, place in enumerate(["item_tokenizer/fit.json", "stages/1-head/checkpoints/checkpoint-*"]):
        out = tmp_path / f"killed-{number}"
        process = subprocess.Popen(
            [sys.executable, "-m", "llmrec", "train", str(tmp_path / "recipe.yaml"), "--out", str(out)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 300
        while not any(out.glob(place)):
            assert process.poll() is None and time.monotonic() < end, f"the run did not reach {place}"
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not (out / "metrics.json").exists(), f"the run ended before it was killed at {place}"
        run(recipe, out)
        assert hashes(out / "model") == hashes(tmp_path / "whole" / "model"), place


# Codes of others -----------------------------------------------------------------------------------------------------


def test_codes_put_in_place_of_a_heads_own_are_refused(
    tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(tiger[0], out)
    before, other = replace_codes(out)
    with pytest.raises(CheckpointError, match=f"codes {other.fingerprint}, .* the item codes {before.fingerprint}"):
        Recommender.from_pretrained(out)
    with pytest.raises(CheckpointError, match=f"(?s){before.fingerprint}.*{other.fingerprint}|"
                                              f"{other.fingerprint}.*{before.fingerprint}"):  # fmt: skip
        run(raw(), out)


def test_codes_and_fingerprint_that_disagree_are_refused(
    tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(tiger[0], out)
    path = out / "item_tokenizer" / "tokenizer.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "fingerprint": "0" * 16}))
    with pytest.raises(CheckpointError, match=f"{record['fingerprint']}, tokenizer.json says {'0' * 16}"):
        Recommender.from_pretrained(out)
    with pytest.raises(CheckpointError, match=f"{record['fingerprint']}, tokenizer.json says {'0' * 16}"):
        run(raw(), out)


def test_another_data_set_is_refused(tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    """Other items: both hashes of the item index. The same items and other events: both hashes of the data."""
    own = InteractionDataset.load(tiger[0] / "dataset")
    shorter = own.with_interactions(own.interactions.slice(0, own.interactions.num_rows - 1), "one event fewer")
    shorter.save(tmp_path / "shorter")
    assert shorter.fingerprint != own.fingerprint
    with pytest.raises(CheckpointError, match=f"(?s){own.fingerprint}.*{shorter.fingerprint}"):
        Recommender.from_pretrained(tiger[0], dataset=tmp_path / "shorter")
    given = {**CODES, "pretrained": str(tiger[0])}
    recipe = raw(dataset={"source": str(tmp_path / "shorter"), "max_history": 6}, item_tokenizer=given)
    with pytest.raises(CheckpointError, match=f"codes of data set {own.fingerprint}, found {shorter.fingerprint}"):
        run(recipe, tmp_path / "other")
    fewer = raw(item_tokenizer=given)
    fewer["dataset"]["options"]["items"] = 29
    with pytest.raises(CheckpointError, match=r"expected the item index \w{64} of 30 items, found \w{64} of 29"):
        run(fewer, tmp_path / "fewer")


@pytest.mark.parametrize("part", ["", "item_tokenizer"])
def test_codes_are_taken_over(part: str, tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    source, out = tiger[0] / part, tmp_path / "run"
    recipe = raw(
        item_tokenizer={**CODES, "pretrained": str(source)}, item_features=None,
        dataset={"source": str(tiger[0] / "dataset"), "max_history": 6},
    )  # fmt: skip
    _, said = run(recipe, out)
    fingerprint = RQKMeans.from_pretrained(tiger[0] / "item_tokenizer").fingerprint
    assert f"item codes from {source} (fingerprint {fingerprint})" in said
    assert not any(line.startswith("item features") for line in said)
    assert hashes(out / "item_tokenizer") == hashes(tiger[0] / "item_tokenizer")
    assert Recommender.from_pretrained(out).system.config.item_index_fingerprint == fingerprint


def test_codes_without_a_record_of_their_fit_are_refused(tmp_path: Path) -> None:
    tokenizer = RQKMeans(levels=2, codebook_size=8)
    tokenizer.fit(item_features(5), seed=0)
    tokenizer.save_pretrained(tmp_path)
    assert load_item_tokenizer("rqkmeans", tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(CheckpointError, match=r"found no fit.json, which says whose items"):
        load_item_tokenizer("rqkmeans", tmp_path, shop())
    with pytest.raises(CheckpointError, match="asked for FSQ"):
        load_item_tokenizer("fsq", tmp_path)


# Item features -------------------------------------------------------------------------------------------------------


def shop(last: int = 5, titles: list[str] | None = None) -> InteractionDataset:
    """Four users of five items; their last two events are validation and test."""
    events = [
        (user, 1 + (user + step) % 4 if split == "train" else last, split)
        for user in range(1, 5)
        for step, split in enumerate(["train"] * 4 + ["valid", "test"])
    ]
    return dataset_of(events, titles=titles or [f"item {n}" for n in range(1, 6)])


def spec(**options: Any) -> ItemFeaturesSpec:
    return ItemFeaturesSpec.model_validate({"levels": {}, **options})


def test_collaborative_vectors_come_from_the_training_part_alone() -> None:
    """Held-out events must not be in the codes: with others in their place the vectors are the same."""
    given = spec(collaborative={"type": "als", "factors": 4})
    values, mask = make_item_features(given, shop(5), seed=3)["collaborative"]
    again, _ = make_item_features(given, shop(2), seed=3)["collaborative"]
    assert values.shape == (6, 4) and values.dtype == np.float32 and np.array_equal(values, again)
    assert mask.tolist() == [False, True, True, True, True, False], "item 5 has no training event"
    assert values[1:5].any(1).all()


def test_vectors_of_a_trained_encoder_and_no_stranger(tmp_path: Path) -> None:
    dataset, other = shop(), shop(2)
    torch.manual_seed(0)
    encoder = SASRecEncoder(SASRecConfig(num_items=5, hidden_size=8, dataset_fingerprint=dataset.fingerprint))
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\n")
    expected = encoder.eval().item_vectors().detach().numpy()
    for folder in ("run", "run/encoder"):
        given = spec(collaborative={"type": "sasrec", "pretrained": str(tmp_path / folder)})
        values, _ = make_item_features(given, dataset, seed=0)["collaborative"]
        np.testing.assert_array_equal(values, expected)
    with pytest.raises(CheckpointError, match=f"data set {dataset.fingerprint}, this one is {other.fingerprint}"):
        make_item_features(given, other, seed=0)
    nothing = spec(collaborative={"type": "sasrec", "pretrained": str(tmp_path)})
    with pytest.raises(CheckpointError, match="holds no trained encoder"):
        make_item_features(nothing, dataset, seed=0)


def test_texts_are_embedded_by_the_named_model_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.llm import embed_text

    calls = []

    def embedded(texts: Any, model: str, **options: Any) -> np.ndarray:
        calls.append((list(texts), model, options["max_tokens"], options["revision"]))
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    monkeypatch.setattr(embed_text, "embed_texts", embedded)
    monkeypatch.setattr(embed_text, "embedder_identity", lambda name, revision: f"{name}@{revision}")
    monkeypatch.setattr("llmrec.training.item_codes.cache_root", lambda: tmp_path)
    dataset = shop(titles=["tea", "", "cake", "jam", "bread"])
    given = spec(levels={"title": "{title}"}, text="some-model", revision="r1", max_tokens=7)
    for _ in range(2):
        values, mask = make_item_features(given, dataset, seed=0)["title"]
        assert values[:, 0].tolist() == [0, 3, 0, 4, 3, 5] and mask.tolist() == [False, True, False, True, True, True]
    assert calls == [(["tea", "cake", "jam", "bread"], "some-model", 7, "r1")]
    for change in ({"max_tokens": 8}, {"revision": "r2"}, {"text": "another-model"}):
        make_item_features(given.model_copy(update=change), dataset, seed=0)
    assert len(calls) == 4, "vectors of another model, revision or length are others"
    assert len(list((tmp_path / "item-features").glob("*.safetensors"))) == 4


def test_text_tokens_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.llm import embed_text

    monkeypatch.setattr(
        embed_text, "text_tokenizer", lambda name, revision: lambda texts: [[len(w) for w in t.split()] for t in texts]
    )
    given = spec(levels={"title": "{title}", "key": "{key}"}, tokens=3)
    values, mask = make_text_tokens(given, shop(titles=["a cup of tea", "jam", "", "x", "y"]))["text_tokens"]
    assert (
        values[1].tolist() == [1, 3, 2] and values[2].tolist() == [3, 5, 0] and mask.tolist()[:3] == [False, True, True]
    )
    assert make_text_tokens(given.model_copy(update={"tokens": 0}), shop()) == {}


# Language models -----------------------------------------------------------------------------------------------------

MIX = {"history_to_item": 1.0, "title_to_item": 0.5, "item_to_title": 0.5}


@pytest.mark.parametrize("kind", ["lora", "ilora", "tasks"])
def test_a_language_model_learns_to_speak_items(
    kind: str, tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    recipe = language_model(**({"tasks": MIX} if kind == "tasks" else {}))
    recipe["item_tokenizer"] |= {"pretrained": str(tiger[0])}
    recipe["dataset"]["source"] = str(tiger[0] / "dataset")
    recipe["dataset"].pop("options")
    if kind == "ilora":
        recipe["tuner"] |= {"type": "ilora", "num_experts": 2}
        recipe["encoder"] = {"type": "sasrec", "hidden_size": 16, "num_layers": 1, "num_heads": 2}
        recipe["stages"].insert(0, {"train": "encoder", "max_steps": 2, "eval_strategy": "no"})
        recipe["evaluate"]["baselines"].append("encoder")
    out, name = tmp_path / "run", "ilora" if kind == "ilora" else "lora"
    record, _ = run(recipe, out)
    assert set(record["models"]) == {"popularity", name} | ({"sasrec"} if kind == "ilora" else set())
    assert len(list(out.glob("evaluations/*/gates.parquet"))) == (kind == "ilora")
    again, _ = run(recipe, out)
    assert again == record
    recommender = Recommender.from_pretrained(out)
    history = recommender.history_of(recommender.dataset.user_keys[1])
    answers = [item.item for item in recommender.recommend([history], 5)[0]]
    assert len(set(answers)) == 5 and not set(answers) & set(history)
    before, other = replace_codes(out)
    with pytest.raises(CheckpointError, match=f"codes {before.fingerprint}, found the item codes {other.fingerprint}"):
        Recommender.from_pretrained(out)


def test_an_untuned_language_model_is_measured(tiger: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    recipe = language_model(None)
    recipe |= {"stages": [], "dataset": {"source": str(tiger[0] / "dataset"), "max_history": 6}}
    recipe["item_tokenizer"] |= {"pretrained": str(tiger[0])}
    try:
        parse_recipe(recipe).resolve()
    except RecipeError as error:
        assert "nothing to do" in str(error)
        return
    record, _ = run(recipe, tmp_path / "run")
    assert set(record["models"]) == {"popularity", "llm"}


# Recipes -------------------------------------------------------------------------------------------------------------

SASREC = {"type": "sasrec", "hidden_size": 16}
TUNE = {**STAGE, "train": "tuner"}


def worded(**prompt: Any) -> dict[str, Any]:
    return language_model(**prompt)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (raw(llm={"model": "tiny-llama"}), "head and llm exclude each other"),
        (raw(stages=[{"train": "encoder"}], encoder=SASREC), "head 'tiger' would stay untrained: add a stage"),
        (raw(head=None), "a stage trains the head, but there is no `head` section"),
        (raw(stages=[{**STAGE, "strategy": {"type": "cloze"}}]), "stages.0.strategy: .* stand in `head`"),
        (raw(stages=[{**STAGE, "strategy": {"type": "next_item", "negatives": 5}}]), "stages.0.strategy: .* `head`"),
        (
            language_model() | {"stages": [{**TUNE, "strategy": {"type": "next_item", "mask_history": True}}]},
            "stages.0.strategy: .* stand in `prompt`",
        ),
        (
            language_model()
            | {"prompt": {"style": "item_slots", "tasks": {"history_to_item": 1.0}}, "encoder": SASREC},
            "prompt.tasks: only style item_codes trains tasks, found item_slots",
        ),
        (raw(item_tokenizer=None), "head 'tiger' speaks item codes: add an `item_tokenizer` section"),
        (
            language_model() | {"item_tokenizer": None, "item_features": None},
            "prompt.style item_codes speaks item codes: add an `item_tokenizer`",
        ),
        (
            raw(head=None, encoder=SASREC, stages=[{"train": "encoder"}]),
            "nothing reads the item codes: add a `head`, or prompt.style: item_codes",
        ),
        (
            raw(head=None, item_tokenizer=None, encoder=SASREC, stages=[{"train": "encoder"}]),
            "nothing reads `item_features`",
        ),
        (raw(item_features=None), "add `item_features`, or item_tokenizer.pretrained: FOLDER"),
        (
            raw(item_features={"levels": {}, "collaborative": {"type": "sasrec"}}),
            "encoder 'sasrec' has to be trained; expected pretrained: RUN, or a counting encoder such as als",
        ),
        (raw(item_features={"levels": {}, "collaborative": {"type": "als", "factor": 8}}), "factor"),
        (raw(item_tokenizer={"type": "rqkmeans", "level": 2}), "level"),
        (raw(item_tokenizer={"type": "rqkmean"}), "rqkmeans"),
        (raw(head={**HEAD, "beams": 0}), "head.beams: found 0"),
        (raw(head={**HEAD, "beam": 3}), "beams"),
    ],
)
def test_recipes_that_cannot_be_run(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({name: value for name, value in recipe.items() if value is not None}).resolve()


@pytest.mark.parametrize("recipe", [raw(), language_model(), language_model(tasks=MIX), language_model(beams=3)])
def test_recipes_that_can(recipe: dict[str, Any]) -> None:
    parse_recipe(recipe).resolve()


def test_tasks_need_titles() -> None:
    recipe = parse_recipe(language_model(tasks=MIX))
    with pytest.raises(RecipeError, match="prompt.tasks needs item titles, and the data set has none"):
        recipe.check_dataset(frozenset())
    recipe.check_dataset(frozenset({"titles"}))
    parse_recipe(language_model()).check_dataset(frozenset())


# Pictures ------------------------------------------------------------------------------------------------------------


def pictured(*pictures: bytes | None) -> InteractionDataset:
    events = [(user, item, "train") for user in (1, 2) for item in range(1, len(pictures) + 1)]
    return dataset_of(events, item_columns={"image": pa.array(pictures, pa.binary())})


def test_pictures_are_one_more_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.training.item_codes.cache_root", lambda: tmp_path)
    dataset = pictured(draw_item(0, 0, 0), None, draw_item(1, 1, 1))
    found = make_item_features(spec(levels={}, image="descriptors"), dataset, seed=0)
    assert list(found) == ["image"]
    values, mask = found["image"]
    assert values.shape == (4, WIDTH) and mask.tolist() == [False, True, False, True]
    assert len(list((tmp_path / "item-features").glob("*.safetensors"))) == 1
    with pytest.raises(DataError, match="the items have no images"):
        make_item_features(spec(levels={}, image="descriptors"), shop(), seed=0)


def test_pictures_are_embedded_by_the_named_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.llm import embed_image

    asked = []

    def embedded(pictures: Any, model: str, **options: Any) -> np.ndarray:
        asked.append((len(list(pictures)), model, options["revision"]))
        return np.ones((2, 5))

    monkeypatch.setattr(embed_image, "embed_images", embedded)
    monkeypatch.setattr(embed_image, "image_embedder_identity", lambda name, revision: f"{name}@{revision}")
    monkeypatch.setattr("llmrec.training.item_codes.cache_root", lambda: tmp_path)
    dataset = pictured(draw_item(0, 0, 0), None, draw_item(1, 1, 1))
    given = spec(levels={}, image="some/model", image_revision="r1")
    for _ in range(2):
        values, mask = make_item_features(given, dataset, seed=0)["image"]
        assert values.tolist() == [[0] * 5, [1] * 5, [0] * 5, [1] * 5] and mask.tolist() == [False, True, False, True]
    make_item_features(given.model_copy(update={"image_revision": "r2"}), dataset, seed=0)
    assert asked == [(2, "some/model", "r1"), (2, "some/model", "r2")]


def test_the_record_of_a_recipe_without_pictures_stays_what_it_was() -> None:
    record = parse_recipe(raw()).model_dump(mode="json")["item_features"]
    assert not {"image", "image_revision"} & set(record)
    both = {"levels": {}, "image": "some/model", "image_revision": "r1"}
    assert parse_recipe(raw(item_features=both)).model_dump(mode="json")["item_features"].items() >= both.items()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": "descriptors", "levels": {"image": "{title}"}}, "found a text level of that name"),
        ({"image": "descriptors", "image_revision": "r1"}, "expected the hub id of a model"),
        ({"image_revision": "r1"}, "image_revision: found image: null"),
        ({"image": ""}, "item_features.image"),
    ],
)
def test_picture_options_that_mean_nothing(features: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw(item_features=features))


def test_codes_of_pictures_train_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.training.item_codes.cache_root", lambda: tmp_path / "cache")
    recipe = raw(item_features={"levels": {}, "image": "descriptors"})
    recipe["dataset"]["options"] |= {"images": True, "visual_taste": 0.8}
    record, said = run(recipe, tmp_path / "run")
    assert "tiger" in record["models"] and any(line.startswith("item codes: rqkmeans") for line in said)
    fit = json.loads((tmp_path / "run" / "item_tokenizer" / "fit.json").read_text())
    assert list(fit["levels"]) == ["image"]
