"""BlossomRec: the contract, and the properties of a correct implementation (1-3 and 6-11 of its list; 4, 5 and the rest
of 6 stand in tests/blocks/test_sparse_attention.py)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.base import SequenceEncoder
from llmrec.encoders.blossomrec import BlossomAttention, BlossomRecConfig, BlossomRecEncoder, rotate, rotations
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EncoderContract, same
from tests.held_memory import Peak

PARTS = {"num_items": 50, "hidden_size": 16, "max_history": 16, "num_heads": 2, "num_kv_heads": 1, "block_size": 2}


class TestBlossomRec(EncoderContract):
    """Blocks of two events, so that the contract's short histories have something to select."""

    config = BlossomRecConfig(**PARTS, selected_blocks=2, window=2)
    encoder_class = BlossomRecEncoder


class TestBlossomRecGatherPre(TestBlossomRec):
    config = BlossomRecConfig(**PARTS, selected_blocks=1, window=2, implementation="gather", norm="pre", sink=True)


def small(**options: Any) -> BlossomRecEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 16, "max_history": 5000, "dropout": 0.0, "initializer_range": 0.3}
    return BlossomRecEncoder(BlossomRecConfig(**{**chosen, "num_heads": 2, **options})).eval()


def inputs(rows: int, width: int, items: int = 20) -> SequenceBatch:
    item_ids = torch.randint(1, items + 1, (rows, width), generator=torch.Generator().manual_seed(4))
    return {"item_ids": item_ids, "lengths": torch.full((rows,), width)}


def force_gates(model: nn.Module, long: float, short: float) -> None:
    """The same gates for every head and event."""
    for part in model.modules():
        if isinstance(part, BlossomAttention):
            nn.init.zeros_(part.gate.weight)
            part.gate.bias.data.copy_(torch.logit(torch.tensor([long, short]).double()).repeat(part.config.num_heads))


@pytest.mark.parametrize("implementation", ["dense", "gather"])
@pytest.mark.parametrize("selection", ["straight_through", "literal"])
@pytest.mark.parametrize("gates", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_1_nothing_before_a_changed_event_changes(
    implementation: str, selection: str, gates: tuple[float, float]
) -> None:
    model, batch = small(implementation=implementation, selection=selection, selected_blocks=2), inputs(2, 75)
    force_gates(model, *(min(max(g, 1e-9), 1 - 1e-9) for g in gates))
    before = model(**batch).hidden
    for place in (0, 15, 16, 40, 63, 74):
        item_ids = batch["item_ids"].clone()
        item_ids[:, place] = item_ids[:, place] % 20 + 1
        after = model(item_ids, batch["lengths"]).hidden
        same(after[:, :place], before[:, :place])
        assert (after[:, place] - before[:, place]).abs().max() > 1e-4


def attention(length: int, **options: Any) -> tuple[BlossomAttention, Tensor, Tensor, Tensor]:
    """An attention module, an input, its position turns, and ordinary causal attention with the same projections."""
    model = small(hidden_size=32, num_heads=4, **options).layers[0].attention
    x = torch.randn(3, length, 32, generator=torch.Generator().manual_seed(7))
    turns = rotations(length, 8, x.device)
    query, key, value = model._heads(x, turns)
    plain = F.scaled_dot_product_attention(
        query.flatten(1, 2) * math.sqrt(8),
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        is_causal=True,
    )
    return model, x, turns, model.output(plain.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("implementation", ["dense", "gather"])
@pytest.mark.parametrize(
    ("gates", "window"), [((1.0, 0.0), 1), ((0.0, 1.0), 8), ((0.3, 0.7), 8)], ids=["long", "short", "both"]
)
def test_2_with_everything_visible_it_is_grouped_attention(
    implementation: str, gates: tuple[float, float], window: int
) -> None:
    options = {"implementation": implementation, "block_size": 2, "selected_blocks": 4, "window": window}
    model, x, turns, expected = attention(8, **options)
    force_gates(model, *gates)
    same(model(x, turns), expected)


@pytest.mark.parametrize("implementation", ["dense", "gather"])
def test_3_one_block_is_causal_attention(implementation: str) -> None:
    model, x, turns, expected = attention(16, implementation=implementation)
    force_gates(model, 1.0, 0.0)
    same(model(x, turns), expected)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 33, 200])
@pytest.mark.parametrize("sink", [False, True])
def test_6_dense_and_gather_give_the_same_states(length: int, sink: bool) -> None:
    dense, batch = small(implementation="dense", sink=sink), inputs(3, length)
    gather = small(implementation="gather", sink=sink)
    gather.load_state_dict(dense.state_dict())
    with torch.no_grad():
        same(gather(**batch).hidden, dense(**batch).hidden)


def test_auto_is_dense_up_to_its_length() -> None:
    """Seen in what it computes: a matrix of L x L products, or none."""
    found = []
    for length in (48, 64):
        model = small(dense_until=48, implementation="auto", num_layers=1)
        with Peak(model) as peak, torch.no_grad():
            model(**inputs(40, length))
        alone = small(implementation="dense" if length == 48 else "gather", num_layers=1)
        with Peak(alone) as expected, torch.no_grad():
            alone(**inputs(40, length))
        found.append(peak.bytes == expected.bytes)
    assert found == [True, True]


def test_7_rotated_products_depend_on_distances() -> None:
    query, key = torch.randn(2, 1, 40, 2, 8, generator=torch.Generator().manual_seed(3))
    turns = rotations(140, 8, query.device)

    def products(shift: int) -> Tensor:
        at = turns[shift : shift + 40]
        return torch.einsum("bihd,bjhd->bhij", rotate(query, at), rotate(key, at))

    same(products(0), products(100), atol=1e-4 * 0.1)
    assert (products(0) - torch.einsum("bihd,bjhd->bhij", query, key)).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["dense", "gather"])
def test_8_only_the_trained_selector_has_gradients(implementation: str) -> None:
    for selection in ("straight_through", "literal"):
        model = small(implementation=implementation, selection=selection, selected_blocks=2).train()
        model(**inputs(3, 90)).hidden.pow(3).sum().backward()
        for layer in model.layers:
            selector = [*layer.attention.summary.parameters(), layer.attention.block_positions]
            reached = [p.grad is not None and bool(p.grad.any()) for p in selector]
            # The last bias shifts all scores of a query alike, but for the dummy's: its gradient may vanish.
            assert all(reached[:-2] + reached[-1:]) if selection == "straight_through" else not any(reached)


@pytest.mark.parametrize("implementation", ["dense", "gather"])
@pytest.mark.parametrize("length", [1, 5, 15, 17, 31, 33])
def test_9_short_and_empty_rows_are_finite(implementation: str, length: int) -> None:
    """Histories shorter than a block, of one event, and rows of padding alone."""
    model = small(implementation=implementation).train()
    batch = inputs(4, length)
    batch["lengths"] = torch.tensor([length, 1, 1, 0])
    batch["item_ids"] = batch["item_ids"] * (torch.arange(length) < batch["lengths"][:, None])
    batch["item_ids"][2] = 0
    out = model(**batch)
    assert torch.isfinite(out.hidden).all() and torch.isfinite(out.user_repr).all()
    out.hidden.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    alone = model(batch["item_ids"][1:2, :1], torch.ones(1, dtype=torch.long))
    same(out.hidden[1, :1], alone.hidden[0])


def peak(model: SequenceEncoder, length: int) -> int:
    """Bytes held at most during a forward and a backward pass of one history."""
    with Peak(model) as found:
        model.train()(**inputs(1, length)).hidden.sum().backward()
    return found.bytes


def test_10_memory_is_linear_and_at_most_half_of_dense_attention() -> None:
    """Against written-out attention of the same width and heads, whose forward pass alone is measured."""
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "max_history": 4096}
    gather = {length: peak(small(**sizes, implementation="gather"), length) for length in (512, 4096)}
    assert gather[4096] < 10 * gather[512]
    written_out = SASRecEncoder(SASRecConfig(num_items=20, implementation="math", **sizes)).eval()  # type: ignore[arg-type]
    with Peak(written_out) as dense, torch.no_grad():
        written_out(**inputs(1, 4096))
    assert gather[4096] < 0.5 * dense.bytes


def copy_task(distance: int, rows: int, seed: int, everywhere: bool) -> SequenceBatch:
    """Noise of items 9..40 with one marked item (1..8), the target `distance` steps later, or everywhere until then."""
    generator = torch.Generator().manual_seed(seed)
    item_ids = torch.randint(9, 41, (rows, distance + 12), generator=generator)
    item_ids[:, 11] = torch.randint(1, 9, (rows,), generator=generator)
    targets = torch.zeros_like(item_ids)
    targets[:, 11 if everywhere else -1 :] = item_ids[:, 11:12]
    return {"item_ids": item_ids, "lengths": torch.full((rows,), item_ids.shape[1]), "targets": targets}


def copied(gates: tuple[float, float], distance: int, selection: str = "straight_through") -> float:
    """Share of unseen rows whose last state puts the marked item first, after training one layer.

    With the long pattern every state from the marked item on is supervised: near ones teach what to look for.
    """
    everywhere = gates[0] > gates[1]
    options = {"num_items": 40, "hidden_size": 32, "num_layers": 1, "summary_size": 64, "initializer_range": 0.2}
    model = small(**options, selection=selection).train()
    force_gates(model, *gates)
    optimizer = torch.optim.Adam((p for n, p in model.named_parameters() if ".gate." not in n), lr=1e-2)
    for step in range(150):
        optimizer.zero_grad()
        info = StepInfo(step, 150, 0.0, torch.Generator())
        NextItem(mask_history=False).loss(model, copy_task(distance, 16, step, everywhere), info).total.backward()
        optimizer.step()
    asked = copy_task(distance, 200, 10**6, everywhere)
    with torch.no_grad():
        return float((model.eval().score_items(asked).argmax(1) == asked["targets"][:, -1]).float().mean())


@pytest.mark.slow
def test_11_the_trained_selector_finds_a_marked_item_300_steps_ago() -> None:
    """The untrained one does not; STIS alone finds it only where the distance is a power of two."""
    long, short = (1 - 1e-6, 1e-6), (1e-6, 1 - 1e-6)
    assert copied(long, 300) > 0.9
    assert copied(long, 300, "literal") < 0.4
    assert copied(short, 300) < 0.4
    assert copied(short, 256) > 0.9


def test_literal_selection_chooses_the_same_blocks() -> None:
    """The option changes gradients, not states."""
    trained, batch = small(), inputs(3, 100)
    literal = small(selection="literal")
    literal.load_state_dict(trained.state_dict())
    same(literal(**batch).hidden, trained(**batch).hidden)


def test_the_sink_lets_late_states_see_the_first_event() -> None:
    batch = inputs(1, 300)
    other = copy.deepcopy(batch)
    other["item_ids"][0, 0] = batch["item_ids"][0, 0] % 20 + 1
    for sink in (False, True):
        model = small(sink=sink, num_layers=1)
        force_gates(model, 1e-9, 0.5)
        changed = (model(**other).hidden - model(**batch).hidden)[0, 299].abs().max() > 1e-4
        assert bool(changed) == sink


def test_too_long_batches_are_refused() -> None:
    with pytest.raises(DataError, match="max_history = 12"):
        small(max_history=12)(**inputs(1, 13))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 3}, r"num_heads: found 3, expected .* heads of even width"),
        ({"num_heads": 16}, r"num_heads: found 16, expected .* heads of even width"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads: found 3, expected a divisor of num_heads 4"),
        ({"selection": "sideways"}, "encoder.selection: found 'sideways', expected one of"),
        ({"norm": "sideways"}, "encoder.norm: found 'sideways', expected one of"),
        ({"implementation": "sideways"}, "encoder.implementation: found 'sideways', expected one of"),
        ({"window": 0}, "encoder.window: found 0, expected at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        BlossomRecConfig(num_items=5, hidden_size=16, **options)
