"""The decoder called without its output layer is the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from llmrec.errors import DataError, RecipeError
from llmrec.llm.backbone import Backbone, positions
from tests.llm.tiny import WIDTH, llama, recommender

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    vocab_size=60, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def models() -> list[Any]:
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0, initializer_range=0.3))
    cohere = CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.1, initializer_range=0.3))
    return [llama(), gemma.eval(), cohere.eval()]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["llama", "softcap", "scale"])
@torch.no_grad()
def test_logits_are_the_models_own(kind: int) -> None:
    model = models()[kind]
    backbone = Backbone(model)
    hidden = backbone(backbone.embed(IDS)).last_hidden_state
    torch.testing.assert_close(backbone.logits(hidden), model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adapters_and_gates_take_part() -> None:
    backbone = recommender("text", trained=True).backbone
    gates = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden = backbone(backbone.embed(IDS), None, {"user_repr": gates}).last_hidden_state
    expected = backbone.model(input_ids=IDS, user_repr=gates).logits
    torch.testing.assert_close(backbone.logits(hidden), expected, rtol=1e-5, atol=1e-5)
    assert backbone.gate_kind == "user_repr"
    with pytest.raises(DataError, match="needs gates"):
        backbone(backbone.embed(IDS))


@torch.no_grad()
def test_bfloat16_base_computes_in_bfloat16_with_float32_adapters() -> None:
    exact, rough = (
        recommender("text", trained=True).backbone,
        recommender("text", trained=True, dtype=torch.bfloat16).backbone,
    )
    experts = [p for name, p in rough.named_parameters() if "lora_" in name]
    assert experts and all(p.dtype == torch.float32 for p in experts)
    gates = {"user_repr": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))}
    hidden = rough(rough.embed(IDS), None, gates).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    close = exact(exact.embed(IDS), None, gates).last_hidden_state
    assert float((hidden.float() - close).abs().max()) < 0.1
    steps = rough.generate(rough.embed(IDS), torch.ones_like(IDS), gates, max_new_tokens=2)
    assert steps.sequences.shape == (2, 2)


def test_positions_have_no_holes() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]


def test_plain_models_are_frozen_and_other_modules_refused() -> None:
    assert not any(p.requires_grad for p in Backbone(llama()).parameters())
    with pytest.raises(RecipeError, match="found Linear"):
        Backbone(torch.nn.Linear(2, 2))
