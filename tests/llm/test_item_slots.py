"""The dense style: causal, frozen where it must be, padding-proof, able to learn, and blind to the future."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.errors import DataError, RecipeError
from llmrec.llm.recommender import LLMRecommender
from llmrec.tuners.ilora import ILoraTuner
from tests.llm.tiny import ITEMS, LENGTH, WIDTH, encoder, llama, recommender, rows, tokenizer

VARIANTS: list[dict[str, Any]] = [
    {},
    {"slot_content": "state", "projector": "linear"},
    {"slot_content": "both", "similarity": "cosine", "item_bias": True, "learn_scale": True},
    {"residual": True, "instruction": "The user watched these films"},
]


def batch(items: Tensor, lengths: Tensor | None = None) -> Any:
    return {"item_ids": items, "lengths": torch.full((len(items),), items.shape[1]) if lengths is None else lengths}


def histories(count: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, ITEMS + 1, (count, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: LLMRecommender, sequences: Tensor) -> Tensor:
    scores = model.score(model.represent(batch(sequences[:, :-1])))  # type: ignore[attr-defined, operator]
    return F.cross_entropy(scores[..., 1:].flatten(0, 1), sequences[:, 1:].flatten() - 1)


def train(model: LLMRecommender, draw: Any, steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = loss_of(model.train(), draw(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_types(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = recommender(dtype=dtype, **options)
    given = batch(histories(), torch.tensor([LENGTH, 3, 1]))
    given["candidates"] = torch.tensor([[1, 2, 0]] * 3)
    hidden = model.represent(given)  # type: ignore[operator, attr-defined]
    assert hidden.shape == (3, LENGTH, WIDTH) and hidden.dtype == torch.float32
    scores = model.score_items(given)  # type: ignore[operator, attr-defined]
    assert scores.shape == (3, ITEMS + 1) and bool(torch.isinf(scores[:, 0]).all())
    assert bool(torch.isfinite(scores[:, 1:]).all())
    some = model.score_candidates(given)
    torch.testing.assert_close(some[:, :2], scores[:, 1:3])
    assert bool(torch.isinf(some[:, 2]).all())


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("tuner", ["ilora", "lora", None])
def test_causal_and_padding_proof(options: dict[str, Any], tuner: str | None) -> None:
    model = recommender(tuner=tuner, trained=True, **options)
    for parameter in model.output_head.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter, std=0.1)
    items = histories()
    whole = model.represent(batch(items))  # type: ignore[operator, attr-defined]
    changed = items.clone()
    changed[:, 5:] = changed[:, 5:] % ITEMS + 1
    other = model.represent(batch(changed))  # type: ignore[operator, attr-defined]
    torch.testing.assert_close(other[:, :5], whole[:, :5])
    assert (other[:, 5:] - whole[:, 5:]).abs().max() > 1e-4
    # A shorter row inside the batch is what it is alone, whatever its padding holds.
    padded = items.clone()
    padded[1, 4:] = 0
    lengths = torch.tensor([LENGTH, 4, LENGTH])
    scores = model.score_items(batch(padded, lengths))  # type: ignore[operator, attr-defined]
    alone = model.score_items(batch(items[1:2, :4]))  # type: ignore[operator, attr-defined]
    torch.testing.assert_close(scores[1:2], alone, rtol=1e-4, atol=1e-5)


def test_order_of_the_history_matters() -> None:
    model = recommender(trained=True)
    items = histories()
    turned = items.clone()
    turned[:, :-1] = items[:, :-1].flip(1)
    difference = model.score_items(batch(items)) - model.score_items(batch(turned))  # type: ignore[operator, attr-defined]
    assert difference[:, 1:].abs().max() > 1e-4


def test_residual_starts_at_the_encoder() -> None:
    model = recommender(residual=True)
    given = batch(histories())
    expected = encoder().score_items(given)
    torch.testing.assert_close(model.score_items(given)[:, 1:], expected[:, 1:])  # type: ignore[operator, attr-defined]


def test_slots_are_as_long_as_tokens() -> None:
    model = recommender()
    slots = model.projector(model.item_table[1:] * model._item_unit)  # type: ignore[operator, attr-defined]
    tokens = model.backbone.embedding.weight
    assert float(slots.detach().norm(dim=-1).mean()) == pytest.approx(float(tokens.norm(dim=-1).mean()), rel=0.05)


def test_gradients_reach_everything_trainable_and_nothing_frozen() -> None:
    model = recommender(trained=True, item_bias=True, learn_scale=True)
    loss_of(model.train(), histories(4)).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("encoder.") or (name.startswith("backbone.") and "lora_" not in name)
        if frozen:
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    assert not model.item_table.requires_grad
    assert model.training and not model.encoder.training


def test_instruction_stands_before_the_slots() -> None:
    text = "The user watched these films"
    plain, prefixed = recommender(trained=True), recommender(trained=True, instruction=text)
    assert prefixed.prefix_ids.tolist() == tokenizer()(text)["input_ids"]  # type: ignore[union-attr, operator]
    given = batch(histories())
    a, b = plain.represent(given), prefixed.represent(given)  # type: ignore[operator, attr-defined]
    assert a.shape == b.shape and (a - b).abs().max() > 1e-4


def test_precomputed_gates_are_used_and_one_per_sequence_is_refused() -> None:
    model, given = recommender(trained=True), batch(histories())
    states = model.encoder.position_representations(given)
    expected = model.represent(given)  # type: ignore[operator, attr-defined]
    same = model.represent({**given, "user_repr": states})  # type: ignore[operator, attr-defined]
    torch.testing.assert_close(same, expected)
    with pytest.raises(DataError, match="show later items"):
        model.represent({**given, "user_repr": states[:, -1]})  # type: ignore[operator, attr-defined]


def test_finished_gates_come_from_the_encoder_and_leave_the_instruction_neutral() -> None:
    class Contexts(type(encoder())):  # type: ignore[misc]
        """An encoder with expert weights of its own: one-hot by parity of the item."""

        def gates(self, given: Any) -> Tensor:
            return F.one_hot(given["item_ids"] % 2, 4).float()

    source = encoder()
    source.__class__ = Contexts
    base = ILoraTuner.attach(llama(), ILoraTuner.configure({"r": 8, "router": "none", "lora_dropout": 0.0}))
    model = LLMRecommender.build(
        base, encoder=source, tokenizer=tokenizer(), max_history=LENGTH, instruction="The user watched"
    )
    given = batch(histories())
    gates = model._gates(given, None)["gates"]  # type: ignore[attr-defined, operator]
    prefix = len(model.prefix_ids)  # type: ignore[arg-type]
    assert gates.shape == (3, prefix + LENGTH, 4)
    torch.testing.assert_close(gates[:, :prefix], torch.full((3, prefix, 4), 0.25))
    torch.testing.assert_close(gates[:, prefix:], source.gates(given))  # type: ignore[operator]
    assert model.score_items(given).shape == (3, ITEMS + 1)  # type: ignore[operator, attr-defined]


def test_collate_keeps_the_latest_events() -> None:
    model = recommender()
    long = list(range(1, LENGTH + 4))
    made = model.collate(rows([long, [5, 6]]))
    assert made["item_ids"][0].tolist() == long[-LENGTH:]
    assert made["seen"][0].tolist() == long and made["lengths"].tolist() == [LENGTH, 2]
    ranking = model.recommend(made, 3)
    assert not set(ranking.item_ids[0].tolist()) & set(long)
    with pytest.raises(DataError, match="longer than"):
        model.represent(batch(histories(2, LENGTH + 1)))  # type: ignore[operator, attr-defined]


def test_missing_parts_are_named() -> None:
    table = encoder().item_vectors()
    with pytest.raises(RecipeError, match="need an encoder"):
        LLMRecommender.build(llama(), item_table=table, residual=True)
    with pytest.raises(RecipeError, match="no tokenizer"):
        LLMRecommender.build(llama(), item_table=table, instruction="films")
    with pytest.raises(RecipeError, match="unknown option colour"):
        LLMRecommender.build(llama(), item_table=table, colour="red")
    with pytest.raises(RecipeError, match="not an option of style item_slots"):
        LLMRecommender.build(llama(), item_table=table, length_normalise=True)


def test_learns_a_cycle() -> None:
    """The next item is the present one plus one: only the last item counts, and training has to find it."""
    model = recommender()
    generator = torch.Generator().manual_seed(0)

    def draw(step: int) -> Tensor:
        starts = torch.randint(0, ITEMS, (16, 1), generator=generator)
        return (starts + torch.arange(LENGTH + 1)) % ITEMS + 1

    train(model, draw, steps=60, rate=5e-3)
    sequences = draw(0)
    best = model.eval().score_items(batch(sequences[:, :-1])).argmax(-1)  # type: ignore[operator, attr-defined]
    assert float((best == sequences[:, -1]).float().mean()) > 0.9


def uniform(step: int) -> Tensor:
    """Short sequences: the fewer the places, the plainer what one gate for all of them gives away."""
    return torch.randint(1, ITEMS + 1, (64, 4), generator=torch.Generator().manual_seed(1000 + step))


def test_gates_per_position_learn_nothing_from_noise_and_gates_per_sequence_would() -> None:
    """Fresh uniform items each step cannot be predicted below ln I, unless the gate has seen them."""
    floor = math.log(ITEMS)
    honest = recommender()
    losses = train(honest, uniform, steps=150, rate=5e-3)
    assert sum(losses[-40:]) / 40 >= floor - 0.01

    leaky = recommender()
    per_position = leaky._gates  # type: ignore[attr-defined]

    def last_state_everywhere(given: Any, states: Tensor | None) -> Any:
        gates = per_position(given, states)["user_repr"]
        return {"user_repr": gates[:, -1:].expand_as(gates)}

    leaky._gates = last_state_everywhere  # type: ignore[attr-defined, assignment]
    losses = train(leaky, uniform, steps=150, rate=5e-3)
    assert sum(losses[-40:]) / 40 < floor - 0.1
