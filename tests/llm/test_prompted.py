"""Text and hybrid styles: slots, losses, gates, candidate scores and generated answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmrec.errors import DataError, RecipeError
from llmrec.llm.recommender import LLMRecommender
from tests.llm.tiny import ITEMS, TITLES, encoder, llama, recommender, rows, tokenizer, with_answers

HISTORIES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
CANDIDATES = [[10, 11, 12, 0], [13, 14, 15, 16], [17, 18, 19, 20]]
ANSWERS = [10, 14, 18]


def made(model: LLMRecommender, **options: Any) -> Any:
    return with_answers(model, model.collate(rows(HISTORIES, CANDIDATES)), ANSWERS, **options)


@pytest.mark.parametrize("style", ["text", "hybrid"])
def test_loss_is_the_full_models_loss(style: str) -> None:
    model = recommender(style, trained=True)
    given = made(model, left=False)
    wrapped = model.model(
        inputs_embeds=model.embed(given),  # type: ignore[operator, attr-defined]
        attention_mask=given["attention_mask"],
        user_repr=model.encoder.user_representation(given),
    )
    expected = F.cross_entropy(wrapped.logits[:, :-1].flatten(0, 1), given["token_labels"][:, 1:].flatten())
    torch.testing.assert_close(model.answer_loss(given), expected)  # type: ignore[operator, attr-defined]


@pytest.mark.parametrize("style", ["text", "hybrid"])
def test_padding_side_and_batching_do_not_matter(style: str) -> None:
    model = recommender(style, trained=True)
    left = model.answer_loss(made(model))  # type: ignore[operator, attr-defined]
    right = model.answer_loss(made(model, left=False))  # type: ignore[operator, attr-defined]
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    whole = model.score_candidates(model.collate(rows(HISTORIES, CANDIDATES)))
    for row in range(3):
        alone = model.score_candidates(model.collate(rows([HISTORIES[row]], [CANDIDATES[row]])))
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_slot_k_holds_item_k_and_only_slots_follow_the_table() -> None:
    model = recommender("hybrid")
    given = model.collate(rows(HISTORIES, CANDIDATES))
    before = model.embed(given)  # type: ignore[operator, attr-defined]
    slots = given["item_slots"]
    for row, history in enumerate(HISTORIES):
        places = slots[row].nonzero()[:, 0]
        assert slots[row, places].tolist() == history
        expected = model.projector(model.item_table[torch.tensor(history)])  # type: ignore[operator, attr-defined]
        torch.testing.assert_close(before[row, places], expected)
    model.item_table[1:] += 1.0
    changed = (model.embed(given) - before).abs().sum(-1) > 0  # type: ignore[operator, attr-defined]
    assert torch.equal(changed, slots > 0)


def test_text_only_batches_give_the_projector_a_zero_gradient() -> None:
    model = recommender("hybrid", trained=True).train()
    given = made(model)
    plain = {**given, "item_slots": torch.zeros_like(given["item_slots"])}
    model.answer_loss(plain).backward()  # type: ignore[operator, attr-defined]
    for name, parameter in model.projector.named_parameters():  # type: ignore[union-attr]
        assert parameter.grad is not None and not bool(parameter.grad.any()), name
    model.answer_loss(given).backward()  # type: ignore[operator, attr-defined]
    assert all(bool(p.grad.any()) for p in model.projector.parameters())  # type: ignore[union-attr]


def test_frozen_parts_stay_frozen() -> None:
    model = recommender("hybrid", trained=True, user_slot=True).train()
    assert model.training and not any(module.training for module in model.encoder.modules())
    given = made(model)
    first = model.sequence_gates(given)["user_repr"]
    torch.testing.assert_close(model.sequence_gates(given)["user_repr"], first)  # no dropout in the gates
    model.answer_loss(given).backward()  # type: ignore[operator, attr-defined]
    assert all(p.grad is None for p in model.encoder.parameters())
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"backbone", "projector", "user_projector"}


def test_user_slot_holds_the_projected_state() -> None:
    model = recommender("hybrid", user_slot=True)
    given = model.collate(rows(HISTORIES))
    place = given["item_slots"] == -1
    assert place.sum(1).tolist() == [1, 1, 1]
    state = model.encoder.user_representation(given)
    expected = model.user_projector(F.rms_norm(state, state.shape[-1:]))  # type: ignore[operator, attr-defined]
    torch.testing.assert_close(model.embed(given)[place], expected)  # type: ignore[operator, attr-defined]


def test_a_slot_can_hold_the_encoders_score_beside_the_vector() -> None:
    model = recommender("hybrid", slot_content="score")
    given = model.collate(rows(HISTORIES))
    scores = model.encoder.score_items(given)[:, 1:]
    for row, history in enumerate(HISTORIES):
        z = (scores[row] - scores[row].mean()) / scores[row].std()
        items = torch.tensor(history)
        vectors = model.item_table[items] * model.item_table[1:].pow(2).mean().rsqrt()
        weight = model.d_item**0.5 / 2
        expected = model.projector(torch.cat([vectors, weight * z[items - 1, None]], dim=-1))  # type: ignore[operator, attr-defined]
        found = model.embed(given)[row][given["item_slots"][row] > 0]  # type: ignore[operator, attr-defined]
        torch.testing.assert_close(found, expected)
    with pytest.raises(RecipeError, match="expected item or score for hybrid"):
        recommender("hybrid", slot_content="state")
    with pytest.raises(RecipeError, match="expected item or state or both for item_slots"):
        recommender("item_slots", slot_content="score")


def test_precomputed_gates_win() -> None:
    model = recommender("text", trained=True)
    given = made(model)
    states = model.encoder.user_representation(given)
    same = model.answer_loss({**given, "user_repr": states})  # type: ignore[operator, attr-defined]
    torch.testing.assert_close(same, model.answer_loss(given))  # type: ignore[operator, attr-defined]
    other = model.answer_loss({**given, "user_repr": -states})  # type: ignore[operator, attr-defined]
    assert float((other - same).detach().abs()) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_fit_the_pool(dtype: torch.dtype) -> None:
    model = recommender("hybrid", trained=True, dtype=dtype)
    scores = model.score_candidates(model.collate(rows(HISTORIES, CANDIDATES)))
    assert scores.shape == (3, 4) and scores.dtype == torch.float32
    assert bool(torch.isinf(scores[0, 3])) and bool((scores[torch.isfinite(scores)] < 0).all())
    per_token = recommender("hybrid", trained=True, dtype=dtype, length_normalise=True)
    lengths = torch.tensor([[len(per_token.renderer.answer_ids(i)) for i in row] for row in CANDIDATES[1:]])  # type: ignore[union-attr, attr-defined]
    normed = per_token.score_candidates(per_token.collate(rows(HISTORIES, CANDIDATES)))
    torch.testing.assert_close(normed[1:], scores[1:] / lengths)
    assert not hasattr(model, "score_items")  # the evaluator would take it for exact ranks


@pytest.mark.parametrize("style", ["text", "hybrid"])
def test_learns_to_write_the_answer_and_decodes_it(style: str) -> None:
    model = recommender(style).train()
    given = made(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        model.answer_loss(given).backward()  # type: ignore[operator, attr-defined]
        optimizer.step()
        optimizer.zero_grad()
    asked = model.eval().collate(rows(HISTORIES, CANDIDATES))
    ranking = model.recommend(asked, 1)
    assert ranking.item_ids[:, 0].tolist() == ANSWERS and bool(ranking.valid.all())
    assert [text.strip() for text in ranking.texts or []] == [TITLES[item] for item in ANSWERS]
    assert model.score_candidates(asked).argmax(1).tolist() == [0, 1, 1]
    beams = model.recommend(asked, 3)
    assert beams.item_ids[:, 0].tolist() == ANSWERS
    alone = model.recommend(model.collate(rows(HISTORIES[:1], CANDIDATES[:1])), 1)
    assert alone.texts == (ranking.texts or [])[:1]


def test_generated_answers_outside_the_pool_or_seen_are_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    model = recommender("text")
    given = model.collate(rows(HISTORIES, CANDIDATES))
    texts = [[TITLES[10], TITLES[10]], [TITLES[1], "no such title"], [TITLES[6], TITLES[17]]]
    monkeypatch.setattr(model, "generate", lambda batch, k: (texts, torch.tensor([[-1.0, -2.0]] * 3)))
    ranking = model.recommend(given, 2)
    assert ranking.item_ids.tolist() == [[10, 0], [0, 0], [17, 0]]
    assert ranking.valid.tolist() == [[True, False], [False, False], [True, False]]
    assert float(ranking.scores[2, 0]) == -2.0


def test_errors_name_what_is_missing() -> None:
    with pytest.raises(RecipeError, match="no tokenizer"):
        LLMRecommender.build(llama(), encoder=encoder(), style="text")
    model = LLMRecommender.build(llama(), encoder=encoder(), style="text", tokenizer=tokenizer())
    with pytest.raises(RecipeError, match="needs a renderer"):
        model.collate(rows(HISTORIES))
    text, hybrid = recommender("text"), recommender("hybrid")
    slots = hybrid.collate(rows(HISTORIES))
    with pytest.raises(DataError, match="no projector"):
        text.embed(slots)  # type: ignore[operator, attr-defined]
    with pytest.raises(DataError, match="part of an answer"):
        hybrid.answer_loss({**slots, "token_labels": torch.full_like(slots["input_ids"], -100)})  # type: ignore[operator, attr-defined]
    assert ITEMS == len(TITLES) - 1


def test_curriculum_goes_from_text_to_hybrid() -> None:
    model = recommender("hybrid", trained=True, curriculum=True).train()
    given = made(model)
    hybrid_steps = []
    for step in range(40):
        model.begin_step(step, 40)  # type: ignore[operator, attr-defined]
        model.zero_grad()
        model.answer_loss(given).backward()  # type: ignore[operator, attr-defined]
        hybrid_steps.append(bool(model.projector.out.weight.grad.any()))  # type: ignore[union-attr, operator]
    assert sum(hybrid_steps[:10]) < 5 < sum(hybrid_steps[30:]) and 10 < sum(hybrid_steps) < 30
    model.begin_step(0, 40)  # type: ignore[operator, attr-defined]
    text = model.answer_loss(given)  # type: ignore[operator, attr-defined]
    without = with_answers(recommender("text", trained=True), recommender("text").collate(rows(HISTORIES)), ANSWERS)
    torch.testing.assert_close(text, model.answer_loss(without))  # type: ignore[operator, attr-defined]
    assert torch.equal(
        model.collate(rows(HISTORIES))["item_slots"] > 0,
        recommender("hybrid").collate(rows(HISTORIES))["item_slots"] > 0,
    )
