"""Multi-stage feed-forward network (MFFN) of the FuXi family: merge what attention gathered, then transform it.

    stage 1:   r = W0 dropout(g) + x                                    g: gated output of the attention channels
    stage 2:   y = W2(SiLU(W1 n) * W3 n) + r,   n = dropout(RMSNorm(r))

Source: FuXi-alpha (WWW 2025, arXiv 2502.03036), section on the multi-stage FFN and its released code. RMSNorm has no
learnable scale; W1, W2 and W3 have no bias. Initial weights are the encoder's to draw (FuXi-alpha: Xavier uniform).

Users: `encoders.fuxi_alpha` (W0 with bias) and `encoders.fuxi_linear`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6


class MultiStageFeedForward(nn.Module):
    """Both stages.

    Args:
        inner_size: Width of the gated channels g.
        hidden_size: d.
        multiplier: m; the second stage works at width m d.
        dropout: Dropout probability, before W0 and after the norm.
        bias: Whether W0 has a bias.
        two_stages: False leaves out the second stage and its 3 m d^2 parameters.

    Raises:
        ValueError: The multiplier is below 1.
    """

    def __init__(
        self,
        inner_size: int,
        hidden_size: int,
        *,
        multiplier: int = 1,
        dropout: float,
        bias: bool,
        two_stages: bool = True,
    ) -> None:
        super().__init__()
        if multiplier < 1:
            raise ValueError(f"multiplier: found {multiplier}, expected a whole number from 1")
        self.two_stages = two_stages
        self.dropout = nn.Dropout(dropout)
        self.merge = nn.Linear(inner_size, hidden_size, bias=bias)  # W0
        if two_stages:
            self.gate = nn.Linear(hidden_size, multiplier * hidden_size, bias=False)  # W1
            self.value = nn.Linear(hidden_size, multiplier * hidden_size, bias=False)  # W3
            self.output = nn.Linear(multiplier * hidden_size, hidden_size, bias=False)  # W2

    def forward(self, gated: Tensor, residual: Tensor) -> Tensor:
        """Merge the gated channels into the residual stream and transform it.

        Args:
            gated: [..., inner_size], g.
            residual: [..., d], x.

        Returns:
            [..., d].
        """
        merged = self.merge(self.dropout(gated)) + residual
        if not self.two_stages:
            return merged
        normed = self.dropout(F.rms_norm(merged, merged.shape[-1:], eps=NORM_EPS))
        transformed: Tensor = self.output(F.silu(self.gate(normed)) * self.value(normed))
        return transformed + merged
