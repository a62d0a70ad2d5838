"""Item vector -> token slot: what lets a language model read items it has no words for.

LLaRA projects rows of a frozen recommender's item table with Linear - GELU - Linear, E4SRec with one Linear map. Ours:
inputs are brought to unit size and outputs to the size of the language model's token embeddings when the projector is
made, so that slots look like tokens from the first step on, whatever the scale of the item table; biases start at zero,
so that slots differ by item and not by a common offset.

Shapes: item vectors [..., d_item] -> slots [..., d_llm], always computed in float32.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from llmrec.errors import RecipeError

ProjectorKind = Literal["mlp", "linear"]


class ItemProjector(nn.Module):
    """Maps item vectors into the embedding space of a language model.

    Args:
        d_item: Width of item vectors.
        d_llm: Width of token embeddings.
        kind: "mlp" (LLaRA) or "linear" (E4SRec).

    Raises:
        RecipeError: For another kind.
    """

    input_scale: Tensor

    def __init__(self, d_item: int, d_llm: int, kind: ProjectorKind = "mlp") -> None:
        super().__init__()
        if kind not in get_args(ProjectorKind):
            raise RecipeError(f"projector: found {kind!r}, expected {' or '.join(get_args(ProjectorKind))}")
        self.d_item = d_item
        self.register_buffer("input_scale", torch.ones(()))
        self.out = nn.Linear(d_llm if kind == "mlp" else d_item, d_llm)
        self.inner = nn.Sequential(nn.Linear(d_item, d_llm), nn.GELU()) if kind == "mlp" else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def calibrate(self, vectors: Tensor, token_norm: float) -> None:
        """Fit the scales of input and output, before training.

        Args:
            vectors: [N, d_item] typical inputs; rows of zeros (padding) are left out.
            token_norm: Mean length of a token embedding.
        """
        vectors = vectors.float()
        vectors = vectors[vectors.abs().sum(-1) > 0]
        if not len(vectors):
            return
        self.input_scale.fill_(float(vectors.pow(2).mean().rsqrt()))
        self.out.weight.mul_(token_norm / float(self(vectors).norm(dim=-1).mean().clamp(min=1e-12)))

    def forward(self, vectors: Tensor) -> Tensor:
        """[..., d_item] -> [..., d_llm], float32."""
        return self.out(self.inner(vectors.float() * self.input_scale))


def mean_token_norm(embedding: nn.Module) -> float:
    """Mean length of the token embeddings; a sample of rows is enough for large vocabularies."""
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach()[:: max(1, len(weight) // 4096)].float()
    return float(rows.norm(dim=-1).mean())
