"""Recipes of style yes_no from end to end: summaries and pictures in, judged candidates out, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from llmrec.cli import main
from llmrec.data.dataset import InteractionDataset
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.data.summaries import read_summaries
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.recipe import parse_recipe
from llmrec.recommender import question_parts
from llmrec.training.stages import evaluate_run, open_run, run_recipe
from tests.fixtures.vision import tiny_vlm

STAGE = {"train": "tuner", "max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "no", "logging_steps": 1}
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up shoppers with pictures, and summaries of 20 of them."""
    folder = tmp_path_factory.mktemp("shop")
    options = {"users": 30, "items": 40, "events_per_user": 8, "images": True, "visual_taste": 1.0}
    prepare_source("synthetic", PrepareOptions(source_options=options)).dataset.save(folder / "data")
    words = ["summarize", folder / "data", "--items", "attributes", "--users", "attributes", "--limit", "20"]
    assert main([*map(str, words), "--split", "train", "valid", "test", "--out", str(folder / "texts")]) == 0
    return folder


def raw(shop: Path, pairs: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "judge", "seed": 1, "dataset": {"source": str(shop / "data"), "max_history": 6},
        "llm": {"model": "tiny-llama", "dtype": "float32"}, "tuner": LORA,
        "prompt": {"style": "yes_no", "template": "pairwise/product", "variants": 1, "pairs": pairs or {}},
        "stages": [STAGE],
        "evaluate": {"protocol": "candidates-6", "ks": [1, 5], "metrics": ["auc", "hr@5"], "baselines": ["popularity"]},
    }  # fmt: skip
    made.update(changes)
    return copy.deepcopy({name: value for name, value in made.items() if value is not None})


def run(recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    return run_recipe(parse_recipe(recipe), out, say=lambda line: None)


def measured_again(out: Path) -> dict[str, Any]:
    opened = open_run(out, say=lambda line: None)
    return evaluate_run(opened, opened.recipe.evaluate, primary=False)["models"]


def test_summaries_stand_in_the_questions_of_those_who_have_one(shop: Path, tmp_path: Path) -> None:
    pairs = {"summaries": str(shop / "texts"), "item_text": "summary", "show_history": 0}
    record = run(raw(shop, pairs), tmp_path / "run")
    assert record["users"] == 20, "of 30, the others were not summarised"
    assert {"auc", "pooled_auc", "hr@5", "mrr@5"} <= set(record["models"]["lora"])
    for name in record["models"]:
        assert 0 <= record["models"][name]["auc"]["mean"] <= 1
    assert measured_again(tmp_path / "run") == record["models"]


def test_titles_alone_are_enough(shop: Path, tmp_path: Path) -> None:
    record = run(raw(shop, {"item_text": "{description}", "show_history": 3}, tuner=None, stages=[]), tmp_path / "run")
    assert record["users"] == 30 and "auc" in record["models"][next(n for n in record["models"] if n != "popularity")]


def test_6_pictures_are_shown_and_the_vision_tower_is_left_alone(shop: Path, tmp_path: Path) -> None:
    recipe = raw(shop, {"pictures": True, "show_history": 2}, llm={"model": "tiny-vlm", "dtype": "float32"})
    recipe["evaluate"]["max_users"] = 4
    record = run(recipe, tmp_path / "run")
    with safe_open(tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and all("language_model" in name and "vision" not in name for name in names)
    assert measured_again(tmp_path / "run") == record["models"]
    recipe["prompt"]["pairs"]["tune_vision"] = True
    run(recipe, tmp_path / "tuned")
    with safe_open(tmp_path / "tuned" / "model" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any("vision" in name for name in file.keys()), "where it is asked for"  # noqa: SIM118


def test_11_each_switch_changes_its_own_part(shop: Path) -> None:
    """Summaries on or off, texts of items on or off, the candidate's picture on or off."""
    dataset = InteractionDataset.load(shop / "data")
    _, processor = tiny_vlm()
    known = read_summaries(shop / "texts", dataset).by_target(dataset)
    rows = dataset.histories("test", 6)
    row = next(row for row in map(rows.__getitem__, range(30)) if (row["user_id"], len(row["seen"])) in known)
    words = {}
    for name, pairs in {
        "plain": {}, "summary": {"summaries": str(shop / "texts")}, "text": {"item_text": "{description}"},
        "picture": {"pictures": True},
    }.items():  # fmt: skip
        recipe = parse_recipe(raw(shop, pairs, llm={"model": "tiny-vlm"}))
        writer = question_parts(recipe, dataset, processor.tokenizer, processor)["renderer"]
        pair = writer.encode(row["item_ids"].tolist(), 3, preference=writer.preference_of(row))
        words[name] = processor.tokenizer.decode(pair.input_ids).splitlines()
    plain = words.pop("plain")
    for name, lines in words.items():
        assert [line for line in lines if line in plain] == plain, f"{name}: everything else stays"
        assert len(lines) == len(plain) + 1, f"{name}: one line more"


def test_validation_takes_summaries_only_where_it_is_asked_for(shop: Path, tmp_path: Path) -> None:
    words = ["summarize", shop / "data", "--users", "attributes", "--out", tmp_path / "texts"]
    assert main([*map(str, words), "--split", "train", "test"]) == 0
    pairs = {"summaries": str(tmp_path / "texts")}
    with pytest.raises(DataError, match="(?s)'valid'.*--split valid"):
        run(raw(shop, pairs, stages=[{**STAGE, "eval_strategy": "epoch"}]), tmp_path / "validated")
    assert "auc" in run(raw(shop, pairs, stages=[{**STAGE, "eval_strategy": "no"}]), tmp_path / "run")["models"]["lora"]


def test_items_are_named_as_the_recipe_says(shop: Path) -> None:
    """In the history and as candidates; all else stays."""
    dataset = InteractionDataset.load(shop / "data")
    _, processor = tiny_vlm()

    def writer(**pairs: Any) -> Any:
        recipe = raw(shop, {"show_history": 2, **pairs})
        recipe["prompt"]["max_title_tokens"] = 500
        return question_parts(parse_recipe(recipe), dataset, processor.tokenizer)["renderer"]

    plain, named = writer(), writer(item_title="{title}[, {title}]")
    question, longer = (processor.tokenizer.decode(each.encode([5, 2], 3).input_ids) for each in (plain, named))
    for item in (5, 2, 3):
        question = question.replace(plain.titles[item], f"{plain.titles[item]}, {plain.titles[item]}")
    assert longer == question
    with pytest.raises(RecipeError, match="nowhere"):
        writer(item_title="{nowhere}")


def test_summaries_of_other_data_and_pictures_that_are_not_there(shop: Path, tmp_path: Path) -> None:
    other = prepare_source("synthetic", PrepareOptions(source_options={"users": 12, "items": 20})).dataset
    other.save(tmp_path / "other")
    moved = {"dataset": {"source": str(tmp_path / "other"), "max_history": 6}}
    found = InteractionDataset.load(shop / "data").fingerprint
    with pytest.raises(CheckpointError, match=f"(?s){found}.*{other.fingerprint}"):
        run(raw(shop, {"summaries": str(shop / "texts")}, **moved), tmp_path / "run")
    with pytest.raises(DataError, match="no images"):
        run(raw(shop, {"pictures": True}, llm={"model": "tiny-vlm", "dtype": "float32"}, **moved), tmp_path / "second")


def test_runs_say_what_they_cannot_be_asked(shop: Path, tmp_path: Path, capsys: Any) -> None:
    run(raw(shop, {"show_history": 2}), tmp_path / "run")
    key = InteractionDataset.load(shop / "data").item_keys[1]
    assert main(["recommend", str(tmp_path / "run"), "--history", key]) == 2
    assert "judges given items" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"protocol": "full"}}, "expected protocol: candidates-21"),
        ({"prompt": {"style": "yes_no"}}, "needs prompt.template, such as pairwise/movie"),
        (
            {"prompt": {"style": "text", "template": "next_item/product", "pairs": {}}},
            "prompt.pairs: only style yes_no asks about pairs, found text",
        ),
        (
            {"prompt": {"style": "yes_no", "template": "pairwise/product", "pairs": {"item_text": "summary"}}},
            "stands in prompt.pairs.summaries",
        ),
        (
            {"prompt": {"style": "yes_no", "template": "pairwise/product", "pairs": {"tune_vision": True}}},
            "no question shows a picture",
        ),
    ],
)
def test_recipes_that_cannot_be_run(changes: dict[str, Any], message: str, shop: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw(shop, **changes)).resolve()


def test_check_says_what_a_real_vision_model_needs(shop: Path, tmp_path: Path, capsys: Any) -> None:
    """The same recipe with the configuration of a 7B LLaVA-NeXT: accepted, with its memory."""
    from transformers import LlavaNextConfig

    LlavaNextConfig().save_pretrained(tmp_path / "llava")
    recipe = raw(shop, {"pictures": True}, llm={"model": str(tmp_path / "llava"), "dtype": "bfloat16"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["check", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["llm parameters"] > 6e9 and record["memory"]["bytes"]["weights"] > 12 * 2**30, "7B in bfloat16"
    assert record["trainable in the LLM"] == 32 * 2 * 4 * (4096 + 4096), "32 layers, two matrices each, none elsewhere"
    assert "[picture]" in record["prompt"]
    assert main(["check", str(tmp_path / "recipe.yaml"), "--set", "prompt.max_length=320"]) == 2
    assert "found 320, expected more than the 576 tokens that a picture takes" in capsys.readouterr().err
