"""A vision-language model that learns to describe pictures: examples, labels, training, resuming, measuring."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmrec.assets import find_asset
from llmrec.data.dataset import InteractionDataset
from llmrec.data.prepare import PrepareOptions, prepare
from llmrec.data.sources.looks import look_of
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.llm.vision import IGNORED, load_vision_model
from llmrec.recipe import Recipe, load_recipe, parse_recipe
from llmrec.training import describing
from llmrec.training.describing import (
    PictureCollator,
    PictureDescriber,
    PictureExample,
    PictureExamples,
    judge,
    picture_examples,
    question_of,
    words_named,
)  # fmt: skip
from llmrec.training.stages import open_run, run_recipe
from tests.fixtures.vision import drawn, shared_vlm, tiny_vlm

SOURCE = {"users": 30, "items": 120, "images": True, "visual_taste": 1.0, "seed": 3}
QUESTION = "Describe the picture of this item."


def recipe_of(**changes: Any) -> Recipe:
    stage = {
        "train": "llm", "num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 16,
        "max_examples": 32, "eval_users": 4, "metric": "described", "save_strategy": "steps", "save_steps": 1,
        "eval_strategy": "no",
    }  # fmt: skip
    prompt = {
        "style": "describe", "template": "summarize/item_brief", "answer": "{colour} {shape}", "held_out": 0.3,
        "held_out_by": ["shape", "colour", "pattern"],
    }  # fmt: skip
    raw: dict[str, Any] = {
        "name": "describe-test", "seed": 1, "dataset": {"source": "synthetic", "options": SOURCE},
        "llm": {"model": "tiny-vlm", "dtype": "float32"}, "prompt": {**prompt, **changes.pop("prompt", {})},
        "stages": [{**stage, **changes.pop("stage", {})}], **changes,
    }  # fmt: skip
    return parse_recipe(raw)


@pytest.fixture(scope="module")
def dataset() -> InteractionDataset:
    return prepare("synthetic", PrepareOptions(source_options=SOURCE))


@pytest.fixture
def runs(dataset: InteractionDataset, tmp_path: Path) -> Path:
    """Where runs go; those named here find their data prepared."""
    for name in ("run", "whole", "stopped"):
        dataset.save(tmp_path / name / "dataset")
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _one_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(cache))


# Examples ------------------------------------------------------------------------------------------------------------


def test_an_answer_says_what_the_picture_shows(dataset: InteractionDataset) -> None:
    train, held_out = picture_examples(recipe_of(), dataset)
    assert len(train) + len(held_out) == dataset.num_items
    for row in (train[0], train[len(train) - 1], held_out[0]):
        look = look_of(int(dataset.item_keys[row.item][1:]), SOURCE["seed"])
        assert row.answer == f"{look.colour} {look.shape}" and row.wanted == (look.colour, look.shape)
        assert row.picture == look.draw()


def test_held_out_pictures_show_combinations_never_trained_on(dataset: InteractionDataset) -> None:
    def combinations(examples: PictureExamples) -> set[tuple[str, str, str]]:
        looks = [look_of(int(dataset.item_keys[examples[i].item][1:]), 3) for i in range(len(examples))]
        return {(look.shape, look.colour, look.pattern) for look in looks}

    train, held_out = picture_examples(recipe_of(), dataset)
    assert not combinations(train) & combinations(held_out)
    assert 0.15 < len(held_out) / dataset.num_items < 0.45
    other = picture_examples(recipe_of(seed=2), dataset)[1]
    assert {held_out[i].item for i in range(len(held_out))} != {other[i].item for i in range(len(other))}


def test_equal_pictures_stay_on_one_side(dataset: InteractionDataset) -> None:
    train, held_out = picture_examples(recipe_of(prompt={"held_out_by": []}), dataset)
    sides = [{examples[i].picture for i in range(len(examples))} for examples in (train, held_out)]
    assert not sides[0] & sides[1]


def test_items_without_a_picture_or_an_answer_are_left_out(dataset: InteractionDataset) -> None:
    recipe = recipe_of(prompt={"answer": "{categories}", "held_out_by": []})
    items = dataset.items.to_pydict()
    items["image"][0], items["categories"][1] = None, []
    poorer = dataclasses.replace(dataset, items=pa.table(items, schema=dataset.items.schema))
    recipe.dataset.options.pop("visual_taste")  # a catalogue with its own columns
    kept = {example.item for side in picture_examples(recipe, poorer) for example in side._examples}
    assert kept == set(range(3, dataset.num_items + 1))


def test_a_wrong_column_an_empty_side_and_other_pictures_are_named(dataset: InteractionDataset) -> None:
    with pytest.raises(RecipeError, match="flavour"):
        picture_examples(recipe_of(prompt={"answer": "{flavour}"}), dataset)
    with pytest.raises(RecipeError, match=r"no pictures to hold out"):
        picture_examples(recipe_of(prompt={"held_out": 1e-9}), dataset)
    with pytest.raises(DataError, match=r"not those of dataset.options.seed"):
        picture_examples(recipe_of(dataset={"source": "synthetic", "options": {**SOURCE, "seed": 4}}), dataset)


# Labels, loss and judgement ------------------------------------------------------------------------------------------


def _examples() -> list[PictureExample]:
    return [
        PictureExample(1, drawn("star", "blue"), "blue star", ("blue", "star")),
        PictureExample(2, drawn("ring", "red", "dotted"), "a red ring on dotted", ("red", "ring", "dotted")),
    ]


def test_the_loss_is_that_of_transformers_over_the_answer_alone() -> None:
    model, processor = shared_vlm()
    batch = PictureCollator(processor, QUESTION)(_examples())
    learned = [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["token_labels"]]
    assert learned == ["blue star</s>", "a red ring on dotted</s>"]
    inputs = {("labels" if name == "token_labels" else name): value for name, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(PictureDescriber(model, processor).answer_loss(batch), model(**inputs).loss)


def test_a_description_is_judged_by_the_words_it_names() -> None:
    assert words_named("A Blue star.", ("blue", "star")) == 1
    assert words_named("a bluest star", ("blue", "star")) == 0.5
    assert words_named("", ("blue",)) == 0
    assert words_named("film noir, drama", ("Drama, Film-Noir",)) == 1


def test_judging_asks_for_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    describer = PictureDescriber(*shared_vlm())
    monkeypatch.setattr(describer, "describe", lambda pictures, question, longest: ["blue star", "a red star"])
    told, found = judge(describer, PictureExamples(_examples()), QUESTION, 8)
    assert told[1] == "a red star" and found[0].tolist() == [1, 1] and found[1].tolist() == [0, pytest.approx(1 / 3)]


def test_a_model_learns_two_pictures_by_heart_and_tells_them_apart() -> None:
    model, processor = tiny_vlm()
    describer, rows = PictureDescriber(model, processor), _examples()
    batch = PictureCollator(processor, QUESTION)(rows)
    optimizer = torch.optim.AdamW(describer.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        describer.answer_loss(batch).backward()
        optimizer.step()
    assert describer.eval().describe([row.picture for row in rows], QUESTION, 10) == [row.answer for row in rows]


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_plain_model_descriptions_and_metrics(runs: Path) -> None:
    recipe, run = recipe_of(stage={"eval_strategy": "epoch"}), runs / "run"
    record = run_recipe(recipe, run, say=lambda line: None)
    assert json.loads((run / "metrics.json").read_text()) == record
    told = pq.read_table(run / "evaluations/described/descriptions.parquet").to_pydict()
    assert len(told["item"]) == record["pictures"] and record["metrics"]["named"]["mean"] == pytest.approx(
        np.mean(told["named"])
    )
    names = {path.name for path in (run / "model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    model, processor = load_vision_model(run / "model", "float32")
    dataset = InteractionDataset.load(run / "dataset")
    held_out = picture_examples(recipe, dataset)[1].subset(np.arange(8))
    again = judge(PictureDescriber(model, processor), held_out, record["question"], 10)[0]
    keys = [dataset.item_keys[held_out[i].item] for i in range(8)]
    assert again == [told["description"][told["item"].index(key)] for key in keys]
    with pytest.raises(RecipeError, match="it ranks nothing. Its model writes texts of items: llmrec summarize"):
        open_run(run, say=lambda line: None)
    done = run / "stages/1-llm/done.json"
    before = done.stat().st_mtime_ns
    assert run_recipe(recipe, run, say=lambda line: None) == record  # a finished stage is not trained again
    assert done.stat().st_mtime_ns == before


def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    run_recipe(recipe, runs / "whole", say=lambda line: None)
    steps, loss = [], PictureDescriber.answer_loss

    def stops(self: PictureDescriber, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(describing.PictureDescriber, "answer_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, runs / "stopped", say=lambda line: None)
    assert not (runs / "stopped/model").exists()
    run_recipe(recipe, runs / "stopped", say=lambda line: None)
    assert len(steps) == 3  # step 1, the stop, and step 2 alone
    first, second = (runs / run / "model/model.safetensors" for run in ("whole", "stopped"))
    assert first.read_bytes() == second.read_bytes()


def test_a_processor_that_does_not_fit_is_refused_before_training(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_vlm()
    processor.num_additional_image_tokens = 3
    monkeypatch.setattr(describing, "load_vision_model", lambda *args, **kwargs: (model, processor))
    with pytest.raises(CheckpointError, match="writes 18 placeholders for a picture, the model makes 16 features"):
        run_recipe(recipe_of(), runs / "run", say=lambda line: None)


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "found no stage"),
        ({"stage": {"train": "tuner"}}, "found train: tuner"),
        ({"llm": None}, "expected `llm`"),
        ({"encoder": {"type": "sasrec"}}, "found encoder"),
        ({"prompt": {"template": None}}, "needs prompt.template"),
        ({"prompt": {"answer": "a picture"}}, "needs prompt.template"),
        ({"stage": {"metric": "ndcg@10"}}, "expected metric: described or named"),
        ({"stage": {"strategy": {"type": "next_item", "loss": "bce"}}}, "no strategy"),
    ],
)
def test_a_recipe_that_cannot_describe_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(**changes).resolve()


def test_other_styles_do_not_take_what_belongs_to_describing() -> None:
    recipe = load_recipe(find_asset("recipes", "smoke/lora"), ["prompt.answer='{title}'"])
    with pytest.raises(RecipeError, match="belong to prompt.style: describe"):
        recipe.resolve()
    recipe = load_recipe(find_asset("recipes", "smoke/lora"), ["stages.1.train=llm"])
    with pytest.raises(RecipeError, match="belong to prompt.style: describe"):
        recipe.resolve()


def test_the_question_is_the_one_the_summarizer_asks() -> None:
    from llmrec.summarizers.base import ItemContent
    from llmrec.summarizers.item_vision import ItemVision

    recipe = load_recipe(find_asset("recipes", "vision/drawn_cpu"))
    assert recipe.prompt is not None and recipe.prompt.template is not None
    asked = ItemVision(prompt=recipe.prompt.template)._request(ItemContent(1, image=drawn()), again=False)
    assert asked.text == question_of(recipe) == QUESTION


@pytest.mark.slow
def test_the_drawn_recipe_reaches_its_target(tmp_path: Path) -> None:
    """Shape and colour in at least nine of ten held-out pictures, here after a part of the training."""
    recipe = load_recipe(find_asset("recipes", "vision/drawn_cpu"), ["stages.0.num_train_epochs=5"])
    record = run_recipe(recipe, tmp_path / "run", say=lambda line: None)
    assert record["metrics"]["described"]["mean"] >= 0.9


@pytest.mark.slow
def test_the_poster_recipe_runs_from_raw_pictures_to_genre_words(tmp_path: Path, test_data: Path) -> None:
    posters = test_data / "ml-100k-posters" / "items.parquet"
    source = test_data / "ml-100k"
    changes = [
        f"dataset.source={source}", f"dataset.items=[{posters}]",
        "stages.0.max_examples=64", "stages.0.num_train_epochs=1", "stages.0.eval_users=16",
    ]  # fmt: skip
    recipe = load_recipe(find_asset("recipes", "vision/posters_cpu"), changes)
    record = run_recipe(recipe, tmp_path / "run", say=lambda line: None)
    assert record["pictures"] > 200 and 0 <= record["metrics"]["named"]["mean"] <= 1
    told = pq.read_table(tmp_path / "run/evaluations/described/descriptions.parquet")
    assert "Drama" in " ".join(told["answer"].to_pylist())
