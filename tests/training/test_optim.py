"""Parameter groups: each trainable parameter once, in the group its name and owner say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import CheckpointError, RecipeError
from llmrec.training.optim import group_of, parameter_groups
from llmrec.training.states import load_optimizer, optimizer_files, pack, pack_json, unpack, unpack_json
from llmrec.tuners.ilora import ILoraTuner


class TinyRecommender(nn.Module):
    """The parts an LLM recommender has: adapted LLM with router, projector, output head, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        options = {"r": 4, "num_experts": 2, "target_modules": ["q_proj"]}
        self.llm = ILoraTuner.attach(LlamaForCausalLM(config), ILoraTuner.configure(options, gate_dim=8))
        self.projector = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
        self.item_head = nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.encoder = SASRecEncoder(SASRecConfig(num_items=9, hidden_size=8, num_layers=1, num_heads=1))


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    values = {"learning_rate": 1.0, "weight_decay": 0.1, "factors": {}, **options}
    return parameter_groups(model, model, **values)


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = TinyRecommender()
    for parameter in model.encoder.item_embedding.parameters():
        parameter.requires_grad = False
    listed = [id(parameter) for group in groups_of(model) for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_parts_get_their_own_learning_rate() -> None:
    model = TinyRecommender()
    factors = {"router": 0.3, "projector": 2.0, "head": 0.5, "tuner": 4.0}
    rate = {id(p): group["lr"] for group in groups_of(model, factors=factors) for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = (
            0.3 if ".ilora_router." in name
            else 4.0 if "lora_" in name
            else 2.0 if "projector" in name
            else 0.5 if name.startswith(("item_head", "scale"))
            else 1.0
        )  # fmt: skip
        assert rate[id(parameter)] == expected, name


def test_weight_decay_spares_biases_norms_embeddings_and_adapters() -> None:
    model = TinyRecommender()
    decay = {id(p): group["weight_decay"] for group in groups_of(model) for p in group["params"]}
    decayed = {n for n, p in model.named_parameters() if p.requires_grad and decay[id(p)]}
    assert {"projector.0.weight", "item_head.weight"} < decayed
    assert any(".ilora_router." in name for name in decayed)
    for name in decayed:
        assert not any(part in name for part in ("bias", "norm", "embedding", "lora_A", "lora_B", "projector.1"))


def test_the_kind_of_model_decides_where_names_do_not() -> None:
    encoder = SASRecEncoder(SASRecConfig(num_items=9, hidden_size=8, num_layers=1, num_heads=1))
    assert {group["name"].split(",")[0] for group in groups_of(encoder)} == {"encoder"}
    assert group_of("model.decoder.layers.0.weight", "head") == "head"
    assert group_of("model.encoder.layers.0.weight", "head") == "head"
    assert group_of("model.layers.0.attention.scale", "encoder") == "encoder"


def test_a_factor_for_nothing_is_an_error() -> None:
    encoder = SASRecEncoder(SASRecConfig(num_items=9, hidden_size=8, num_layers=1, num_heads=1))
    with pytest.raises(RecipeError, match="found router, but nothing trains there; groups of this stage: encoder"):
        groups_of(encoder, factors={"router": 0.3})


def test_a_frozen_model_is_an_error() -> None:
    with pytest.raises(RecipeError, match="every parameter of the model is frozen"):
        groups_of(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_optimizer_state_survives_the_files(kind: Any, fused: bool, tmp_path: Path) -> None:
    if fused and kind is torch.optim.Adafactor:
        pytest.skip("there is no fused Adafactor")
    options: dict[str, Any] = {"fused": True} if fused else {}
    options |= {"momentum": 0.9} if kind is torch.optim.SGD else {}
    inputs = torch.randn(20, 4, 6)

    def steps(layer: nn.Module, optimizer: Any, rows: Any) -> None:
        for row in rows:
            optimizer.zero_grad()
            layer(row).square().sum().backward()
            optimizer.step()

    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        layer = nn.Linear(6, 3)
        return layer, kind(groups_of(layer, learning_rate=0.01), lr=0.01, **options)

    layer, optimizer = build()
    steps(layer, optimizer, inputs[:10])
    tensors, rest = optimizer_files(optimizer)
    (tmp_path / "t").write_bytes(pack(tensors))
    (tmp_path / "r").write_bytes(pack_json(rest))
    other, again = build()
    other.load_state_dict(layer.state_dict())
    load_optimizer(again, unpack(tmp_path / "t"), unpack_json(tmp_path / "r"))
    steps(layer, optimizer, inputs[10:])
    steps(other, again, inputs[10:])
    assert torch.equal(layer.weight, other.weight)


def test_state_of_other_groups_is_refused() -> None:
    optimizer = torch.optim.AdamW(groups_of(nn.Linear(6, 3)))
    other = torch.optim.AdamW(groups_of(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))))
    with pytest.raises(CheckpointError, match="found groups"):
        load_optimizer(other, *optimizer_files(optimizer))
