"""The projector's scale does not depend on that of its inputs."""

from __future__ import annotations

import pytest
import torch

from llmrec.errors import RecipeError
from llmrec.llm.projector import ItemProjector, mean_token_norm


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_outputs_are_as_long_as_tokens_and_differ_by_item(kind: str, scale: float) -> None:
    torch.manual_seed(0)
    items = torch.randn(40, 8) * scale
    items[0] = 0
    projector = ItemProjector(8, 64, kind)  # type: ignore[arg-type]
    projector.calibrate(items, 3.0)
    out = projector(items)
    assert out.dtype == torch.float32
    assert float(out[1:].norm(dim=-1).mean()) == pytest.approx(3.0, rel=1e-4)
    assert float(out[1:].std(dim=0).norm()) > 1.0
    assert not bool(out[0].any())


def test_half_precision_inputs_are_computed_in_float32() -> None:
    projector = ItemProjector(8, 16)
    assert projector(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_nothing_to_calibrate_on_changes_nothing() -> None:
    projector = ItemProjector(4, 8)
    before = projector.out.weight.clone()
    projector.calibrate(torch.zeros(3, 4), 2.0)
    torch.testing.assert_close(projector.out.weight, before)


def test_unknown_kind() -> None:
    with pytest.raises(RecipeError, match="mlp or linear"):
        ItemProjector(4, 8, "deep")  # type: ignore[arg-type]


def test_token_norm_of_a_large_vocabulary_is_sampled() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(20_000, 4)
    assert mean_token_norm(embedding) == pytest.approx(float(embedding.weight.norm(dim=-1).mean()), rel=0.05)
