"""Vector quantisation with a learned codebook and a straight-through gradient.

Users: `item_tokenizers.rqvae`, `item_tokenizers.cofirec`, `item_tokenizers.rqkmeans`, `item_tokenizers.fsq`.

    s = argmin_j ||z - C[j]||^2;   q = C[s];   through = z + sg(q - z)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_CELLS = 2**24  # largest matrix of distances held at once


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Squared Euclidean distances: x [..., d], codebook [W, d] -> [..., W], never below 0."""
    inner = x @ codebook.T
    return ((x * x).sum(-1, keepdim=True) - 2 * inner + (codebook * codebook).sum(-1)).clamp(min=0)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest row of the codebook, the first of equal ones: x [..., d], codebook [W, d] -> codes [...] int64."""
    with torch.no_grad():
        flat = x.reshape(-1, x.shape[-1])
        norms = (codebook * codebook).sum(-1)
        rows = max(1, _CELLS // len(codebook))
        # The norm of x is the same for every code. Left out, it cannot drown small differences either.
        found = [(norms - 2 * (part @ codebook.T)).argmin(-1) for part in flat.split(rows)]
        return torch.cat(found).reshape(x.shape[:-1])


class Quantized(NamedTuple):
    """What a quantiser returns.

    Args:
        codes: [B] int64.
        vectors: [B, d], rows of the codebook; their gradient goes to the codebook.
        through: [B, d], the same values, and a gradient that goes to the input as if nothing had happened.
    """

    codes: Tensor
    vectors: Tensor
    through: Tensor


class VectorQuantizer(nn.Module):
    """One codebook.

    Args:
        size: W, number of codes.
        width: d.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(size, width) * width**-0.5)

    def forward(self, z: Tensor, codes: Tensor | None = None) -> Quantized:
        """z [B, d] -> nearest codes, or those given [B] (assigned otherwise, as by Sinkhorn)."""
        codes = nearest(z, self.codebook) if codes is None else codes
        vectors = self.codebook[codes]
        return Quantized(codes, vectors, z + (vectors - z).detach())

    @torch.no_grad()
    def initialise(self, centroids: Tensor) -> None:
        """Take the codebook from k-means: centroids [W, d]."""
        if centroids.shape != self.codebook.shape:
            raise ValueError(f"centroids are {tuple(centroids.shape)}, the codebook is {tuple(self.codebook.shape)}")
        self.codebook.copy_(centroids)

    @torch.no_grad()
    def reseed(self, dead: Tensor, vectors: Tensor) -> None:
        """Move unused codes: dead [n] int64 takes the places of vectors [n, d]."""
        if len(dead):
            self.codebook[dead] = vectors.to(self.codebook.dtype)
