"""Llama-style backbone: the contract, the properties of sequence encoders that apply (numbers 1, 2, 10 and 12), and
what makes the block a Llama block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaModel

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.llama import LlamaEncoder, LlamaEncoderConfig
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EncoderContract, same


class TestLlama(EncoderContract):
    config = LlamaEncoderConfig(num_items=30, hidden_size=16, max_history=16, initializer_range=0.1)
    encoder_class = LlamaEncoder


class TestLlamaSharedHeadsMath(TestLlama):
    config = LlamaEncoderConfig(
        num_items=30, hidden_size=16, max_history=16, num_layers=1, num_heads=4, num_kv_heads=2, inner_size=24,
        implementation="math", initializer_range=0.1,
    )  # fmt: skip


def small(**options: object) -> LlamaEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "initializer_range": 0.3, **options}
    return LlamaEncoder(LlamaEncoderConfig(**chosen)).eval()  # type: ignore[arg-type]


def inputs(rows: int = 3, width: int = 6) -> SequenceBatch:
    items = torch.randint(1, 21, (rows, width), generator=torch.Generator().manual_seed(4))
    return {"item_ids": items, "lengths": torch.full((rows,), width)}


@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_1_state_t_has_no_gradient_from_later_events(implementation: str) -> None:
    model, batch = small(implementation=implementation), inputs(1)
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    hidden = model(**batch, item_embeds=embeds).hidden
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[0, t].pow(3).sum(), embeds, retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert not reach[t + 1 :].any()
        assert (reach[: t + 1] > 0).all()


@pytest.mark.parametrize("pads", [1, 6])
def test_2_padding_leaves_real_states_alone(pads: int) -> None:
    model, batch = small(), inputs()
    padded = {**batch, "item_ids": F.pad(batch["item_ids"], (0, pads))}
    found, expected = model(**padded), model(**batch)
    assert (found.hidden[:, :6] - expected.hidden).abs().max() < 1e-5
    assert (found.user_repr - expected.user_repr).abs().max() < 1e-5
    assert not found.hidden[:, 6:].any()


def test_the_blocks_are_those_of_transformers() -> None:
    """The same weights in a plain LlamaModel, whose token table is the item table, give the same states."""
    model, batch = small(), inputs()
    config = model.config.backbone()
    config.vocab_size = 21
    plain = LlamaModel(config).eval()
    weights = {name.replace("o_proj.0", "o_proj").replace("down_proj.0", "down_proj"): value
               for name, value in model.backbone.state_dict().items() if "rotary" not in name}  # fmt: skip
    plain.load_state_dict({**weights, "embed_tokens.weight": model.item_embedding.weight})
    same(model(**batch).hidden, plain(input_ids=batch["item_ids"]).last_hidden_state)


def test_a_block_written_out() -> None:
    """RMSNorm before each branch, rotary positions, SwiGLU, nothing else: one block against its equations."""
    model, batch = small(num_layers=1, num_heads=1, rope_theta=100.0), inputs()
    layer, final = model.backbone.layers[0], model.backbone.norm
    x = model.item_embedding(batch["item_ids"])

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return weight * values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(values: Tensor) -> Tensor:
        angle = torch.arange(6.0)[:, None] * 100.0 ** (-torch.arange(4.0) / 4)
        first, second = values.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    normed, attention = norm(x, layer.input_layernorm.weight), layer.self_attn
    query, key = turn(attention.q_proj(normed)), turn(attention.k_proj(normed))
    logits = (query @ key.transpose(1, 2) / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    x = x + attention.o_proj(logits.softmax(-1) @ attention.v_proj(normed))
    normed, mlp = norm(x, layer.post_attention_layernorm.weight), layer.mlp
    x = x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    same(model(**batch).hidden, norm(x, final.weight), atol=1e-4)


def test_a_block_has_twelve_squares_of_the_width() -> None:
    model = small(hidden_size=48, num_layers=1)
    matrices = [p for p in model.backbone.layers.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in matrices) == 12 * 48**2
    assert not any("bias" in name or "embed_tokens" in name for name, _ in model.named_parameters())


def test_dropout_acts_on_inputs_and_on_both_branches() -> None:
    model, batch = small(dropout=0.5).train(), inputs()
    assert (model(**batch).hidden - model(**batch).hidden).abs().max() > 1e-3
    model.dropout.eval()
    for layer in model.backbone.layers:
        changed = []
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            x = torch.ones(2, 3, branch[0].in_features)
            changed.append((branch(x) == 0).any())
        assert all(changed)


def test_10_second_order_sequences_need_two_events() -> None:
    """Next = sum of the last two modulo 7: solved with the whole history, not with a history of one event."""
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    walk = list(pairs.unbind(1))
    while len(walk) < 8:
        walk.append((walk[-1] + walk[-2]) % 7)
    ids = torch.stack(walk, dim=1) + 1
    full = torch.full((49,), 7)
    batch: SequenceBatch = {"item_ids": ids[:, :-1], "lengths": full, "targets": ids[:, 1:].clone()}  # type: ignore[typeddict-item]
    batch["targets"][:, 0] = 0  # the second event is free
    model = small(num_items=7, hidden_size=32, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(300):
        optimizer.zero_grad()
        loss = NextItem().loss(model, batch, StepInfo(step, 300, 0.0, torch.Generator())).total
        if loss < 0.1:
            break
        loss.backward()
        optimizer.step()
    model.eval()
    assert (model.score_items(batch).argmax(1) == ids[:, -1]).float().mean() > 0.95
    one: SequenceBatch = {"item_ids": ids[:, -2:-1], "lengths": torch.ones(49, dtype=torch.long)}  # type: ignore[typeddict-item]
    assert (model.score_items(one).argmax(1) == ids[:, -1]).float().mean() < 0.5


def test_12_scores_and_inputs_share_one_table() -> None:
    model, batch = small(), inputs()
    before = model.score_items(batch)
    torch.testing.assert_close(model.item_vectors()[1:], model.item_embedding.weight[1:], rtol=0, atol=0)
    unused = ({*range(1, 21)} - set(batch["item_ids"].flatten().tolist())).pop()
    with torch.no_grad():
        model.item_embedding.weight[unused].neg_()
    same(model.score_items(batch)[:, unused], -before[:, unused])
    assert sum("embed" in name for name in model.state_dict()) == 1


def test_math_attention_gives_the_same_states_and_second_derivatives() -> None:
    fused, written_out, batch = small(), small(implementation="math"), inputs()
    written_out.load_state_dict(fused.state_dict())
    same(written_out(**batch).hidden, fused(**batch).hidden)
    embeds = written_out.item_embedding(batch["item_ids"]).detach().requires_grad_()
    out = written_out(**batch, item_embeds=embeds).user_repr
    (first,) = torch.autograd.grad(out.pow(2).sum(), embeds, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), embeds)
    assert torch.isfinite(second).all() and second.abs().sum() > 0


def test_too_long_batches_are_refused() -> None:
    with pytest.raises(DataError, match="max_history = 12"):
        small()(**inputs(width=13))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"hidden_size": 8, "num_heads": 3}, r"num_heads: found 3"),
        ({"hidden_size": 6, "num_heads": 2}, r"num_heads: found 2, expected heads of whole, even width"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads: found 3, expected a divisor of num_heads 4"),
        ({"implementation": "sideways"}, r"encoder.implementation: found 'sideways', expected one of sdpa, math"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], found: str) -> None:
    with pytest.raises(RecipeError, match=found):
        LlamaEncoderConfig(num_items=5, **options)  # type: ignore[arg-type]
