"""Position-wise feed-forward layers.

Users: `encoders.sasrec`, `encoders.bert4rec`, `encoders.lrurec`, `encoders.mamba4rec`, `encoders.caseq`.
"""

from __future__ import annotations

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear, dropout.

    Args:
        hidden_size: d.
        inner_size: Width between the two maps.
        activation: "relu", "gelu" or "silu".
        dropout: Dropout probability, used twice.

    Raises:
        ValueError: The activation is unknown.
    """

    def __init__(self, hidden_size: int, inner_size: int, *, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: found {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.inner = nn.Linear(hidden_size, inner_size)
        self.activation = ACTIVATIONS[activation]()
        self.output = nn.Linear(inner_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return self.dropout(self.output(self.dropout(self.activation(self.inner(x)))))
