"""A recipe's prompt section becomes training batches and questions that agree, and the evaluator can ask them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrec.data.dataset import InteractionDataset
from llmrec.errors import DataError, RecipeError
from llmrec.evaluation.evaluator import Evaluator
from llmrec.evaluation.protocol import EvalProtocol
from llmrec.llm.prompted import PromptRenderer
from llmrec.llm.recommender import LLMRecommender
from llmrec.recipe import PromptSpec
from llmrec.tuners.lora import LoraTuner
from tests.data.tables import dataset_of
from tests.llm.tiny import ITEMS, TITLES, encoder, llama, tokenizer


def films() -> InteractionDataset:
    splits = ["train"] * 5 + ["test"]
    events = [(user, (3 * user + 2 * n) % ITEMS + 1, split) for user in range(1, 5) for n, split in enumerate(splits)]
    return dataset_of(events, titles=TITLES[1:])


def recipe(tmp_path: Path, **prompt: Any) -> Any:
    path = tmp_path / "films.jinja"
    path.write_text("{# variables: history; source: ours #}Watched: {{ history | join(', ') }}. Next:")
    settings: dict[str, Any] = {"template": str(path), "style": "hybrid", "slots": ["history"], **prompt}
    return SimpleNamespace(prompt=PromptSpec(**settings), dataset=SimpleNamespace(max_history=4))


def stage(max_examples: int | None = None) -> Any:
    return SimpleNamespace(max_examples=max_examples)


def built(renderer: PromptRenderer, **options: Any) -> LLMRecommender:
    base = LoraTuner.attach(llama(), LoraTuner.configure({"r": 4, "lora_dropout": 0.0}))
    return LLMRecommender.build(
        base, encoder=encoder(), tokenizer=tokenizer(), renderer=renderer, max_history=4, **options
    )


def test_training_batches_hold_prompt_and_answer(tmp_path: Path) -> None:
    data = films()
    renderer = PromptRenderer.from_recipe(recipe(tmp_path), data, tokenizer())
    examples, collator = renderer.training_data(data, stage(), seed=1)
    assert len(examples) == len(data.histories("train", 4))
    batch = collator([examples[i] for i in range(4)])
    model = built(renderer, style="hybrid")
    loss = model.train().answer_loss(batch)  # type: ignore[operator, attr-defined]
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool((batch["attention_mask"][:, 0] == 1).all())
    answer = batch["input_ids"][0][batch["token_labels"][0] != -100].tolist()
    target = int(examples[0]["targets"][-1])
    assert answer == renderer.answer_ids(target)


def test_questions_are_the_training_prompts(tmp_path: Path) -> None:
    data = films()
    renderer = PromptRenderer.from_recipe(recipe(tmp_path), data, tokenizer())
    examples, _ = renderer.training_data(data, stage(), seed=1)
    row = examples[2]
    asked = built(renderer, style="hybrid").collate([{**row, "targets": row["targets"] * 0}])
    length = int(row["prompt_length"])
    assert asked["input_ids"][0].tolist() == row["input_ids"][:length].tolist()
    assert asked["item_slots"][0].tolist() == row["item_slots"][:length].tolist()


def test_stages_may_use_some_examples(tmp_path: Path) -> None:
    data = films()
    renderer = PromptRenderer.from_recipe(recipe(tmp_path), data, tokenizer())
    some = [renderer.training_data(data, stage(3), seed=seed)[0] for seed in (1, 1, 2)]
    assert [len(examples) for examples in some] == [3, 3, 3]
    chosen = [examples.examples.example_ids.tolist() for examples in some]
    assert chosen[0] == chosen[1]


def test_user_slots_follow_the_renderer(tmp_path: Path) -> None:
    path = tmp_path / "user.jinja"
    path.write_text("{# variables: history, user; source: ours #}{{ user }} watched: {{ history | join(', ') }}. Next:")
    renderer = PromptRenderer.from_recipe(recipe(tmp_path, template=str(path), slots=["user"]), films(), tokenizer())
    model = built(renderer, style="hybrid")
    assert model.options.user_slot and model.user_projector is not None


def test_the_evaluator_scores_candidates_and_reads_answers(tmp_path: Path) -> None:
    data = films()
    renderer = PromptRenderer.from_recipe(recipe(tmp_path, style="text"), data, tokenizer())
    model = built(renderer, style="text")
    for mode in ("score", "generate"):
        protocol = EvalProtocol(split="test", candidates="candidates-5", mode=mode, max_history=4)  # type: ignore[arg-type]
        result = Evaluator(protocol, batch_size=2, progress=False).run(model, data)
        assert result.users == 4 and result.metrics


def test_the_evaluator_ranks_the_catalogue_of_the_dense_style() -> None:
    model = LLMRecommender.build(llama(), encoder=encoder(), max_history=4)
    protocol = EvalProtocol(split="test", ks=(1, 5), max_history=6)
    result = Evaluator(protocol, batch_size=2, progress=False).run(model, films())
    assert result.measured == "exact ranks" and result.users == 4


def test_candidates_stand_in_the_prompt_when_the_recipe_lists_them(tmp_path: Path) -> None:
    path = tmp_path / "listed.jinja"
    path.write_text(
        "{# variables: history, candidates; source: ours #}{{ history | join(', ') }}: {{ candidates | join(', ') }}"
    )
    renderer = PromptRenderer.from_recipe(
        recipe(tmp_path, template=str(path), style="text", candidates=3), films(), tokenizer()
    )
    model = built(renderer, style="text")
    row = {**films().histories("test", 4)[0], "candidates": torch.tensor([1, 2, 3]).numpy()}
    text = tokenizer().decode(model.collate([row])["input_ids"][0])
    assert all(TITLES[item] in text for item in (1, 2, 3))
    del row["candidates"]
    with pytest.raises(DataError, match="candidates-3"):
        model.collate([row])


def test_a_template_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="need a template"):
        PromptRenderer.from_recipe(recipe(tmp_path, template=None), films(), tokenizer())
