"""Routers that turn a representation into expert weights, and figures that describe such weights.

Users: `tuners.ilora` (router of the instance-wise experts); planned: training callbacks and encoders that report the
weights of their own experts (`encoders.hpserec`, `encoders.caseq`).

The three routers follow iLoRA (NeurIPS 2024). `linear` is the paper's formula, the softmax of a linear map of the
sequence representation. `resnet1d` is what the paper's public release runs: the representation is read as a signal of
one channel by a small residual network. `mlp` is a variant of that release. Normalising the input with a parameter-free
LayerNorm is our choice: it makes the gate independent of the scale of the encoder that provides the representation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUTERS = ("linear", "mlp", "resnet1d")
NORMS = ("layer_norm", "none")


class ResidualBlock1d(nn.Module):
    """Two convolutions of width 3 with batch normalisation and a parameter-free shortcut.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output; extra channels of the shortcut are zeros, half on each side.
        stride: 2 halves the signal, the shortcut then takes every second position.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm1d(channels_out)
        self.conv2 = nn.Conv1d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(channels_out)
        self.stride, self.extra = stride, channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels_in, D] -> [N, channels_out, ceil(D / stride)]."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride]
        if self.extra:
            shortcut = F.pad(shortcut, (0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + shortcut)


class ResNet1dScorer(nn.Module):
    """The residual network of the iLoRA release: three stages of 16, 32, 64 channels, mean over positions, linear.

    Batch normalisation makes a gate depend on the batch in training; prefer `linear` unless parity is the aim.

    Args:
        num_experts: E.
        blocks: Residual blocks per stage (the release has 3, which gives 90,772 parameters for E = 4).
    """

    def __init__(self, num_experts: int, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        layers: list[nn.Module] = []
        channels = 16
        for width in (16, 32, 64):
            for index in range(blocks):
                layers.append(ResidualBlock1d(channels, width, stride=2 if index == 0 and width > 16 else 1))
                channels = width
        self.stages = nn.Sequential(*layers)
        self.out = nn.Linear(channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        signal = x.reshape(-1, 1, x.shape[-1])
        pooled = self.stages(self.stem(signal)).mean(dim=-1)
        return self.out(pooled).view(*x.shape[:-1], -1)


class Router(nn.Module):
    """Softmax gates over E experts, always computed in float32 (iLoRA, gate of section "instance-wise experts").

    Args:
        gate_dim: Width of the representation.
        num_experts: E.
        kind: `linear` (no bias), `mlp` (128 hidden units, GELU) or `resnet1d`.
        norm: `layer_norm` or `none`; by default `layer_norm` for linear and mlp, `none` for resnet1d.
        logit_noise: Standard deviation of Gaussian noise on the logits, in training only.

    Raises:
        ValueError: For an unknown kind or norm, or sizes that are not positive.
    """

    def __init__(
        self,
        gate_dim: int,
        num_experts: int,
        kind: str = "linear",
        norm: str | None = None,
        logit_noise: float = 0.0,
    ) -> None:
        super().__init__()
        check_router_options(gate_dim, num_experts, kind, norm, logit_noise)
        chosen = norm or ("none" if kind == "resnet1d" else "layer_norm")
        self.gate_dim, self.num_experts, self.logit_noise = gate_dim, num_experts, logit_noise
        # Without affine parameters: a learned scale before a linear map would only repeat what the map can do.
        self.norm = nn.LayerNorm(gate_dim, elementwise_affine=False) if chosen == "layer_norm" else nn.Identity()
        self.scorer = _build_scorer(gate_dim, num_experts, kind)

    def logits(self, representation: Tensor) -> Tensor:
        """[..., gate_dim] -> [..., E] in float32, before noise and softmax."""
        weight = next(self.scorer.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            normed = self.norm(representation.to(weight.device, torch.float32))
            return self.scorer(normed.to(weight.dtype)).float()

    def forward(self, representation: Tensor) -> Tensor:
        """Expert weights of each row.

        Args:
            representation: [..., gate_dim], any floating dtype.

        Returns:
            [..., E] float32, rows sum to 1.
        """
        logits = self.logits(representation)
        if self.training and self.logit_noise > 0:
            logits = logits + self.logit_noise * torch.randn_like(logits)
        return torch.softmax(logits, dim=-1)


def _build_scorer(gate_dim: int, num_experts: int, kind: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(gate_dim, num_experts, bias=False)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(gate_dim, 128), nn.GELU(), nn.Linear(128, num_experts))
    return ResNet1dScorer(num_experts)


def check_router_options(
    gate_dim: int | None, num_experts: int, kind: str, norm: str | None = None, logit_noise: float = 0.0
) -> None:
    """Refuse router options that cannot work, naming the wrong one.

    Raises:
        ValueError: With what was found and what is expected.
    """
    if kind not in ROUTERS:
        raise ValueError(f"router: found {kind!r}, expected one of {', '.join(ROUTERS)}")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"router_norm: found {norm!r}, expected one of {', '.join(NORMS)} (or leave it out)")
    if not gate_dim or gate_dim < 1:
        raise ValueError(f"gate_dim: found {gate_dim!r}, expected the width of the gate provider's vectors")
    if num_experts < 1:
        raise ValueError(f"num_experts: found {num_experts}, expected 1 or more")
    if logit_noise < 0:
        raise ValueError(f"logit_noise: found {logit_noise}, expected a standard deviation of 0 or more")


@dataclass(frozen=True)
class GateStatistics:
    """How experts are used over a set of gates.

    Args:
        entropy: Mean entropy of a row divided by ln E: 0 every row picks one expert, 1 every row is uniform.
        usage: Mean weight of each expert, E numbers that sum to 1.
        usage_entropy: Entropy of `usage` divided by ln E: 1 means balanced experts.
        top_share: For each expert, the share of rows where it weighs most.
        rows: Number of rows counted.
    """

    entropy: float
    usage: list[float]
    usage_entropy: float
    top_share: list[float]
    rows: int


def gate_statistics(gates: Tensor, mask: Tensor | None = None) -> GateStatistics:
    """Describe gates for reports and training logs.

    Args:
        gates: [B, E] or [B, S, E], rows sum to 1.
        mask: [B] or [B, S] bool, True where a row counts (False for padding).

    Returns:
        The figures; with one expert both entropies are 0.
    """
    num_experts = gates.shape[-1]
    rows = gates.detach().float().reshape(-1, num_experts)
    if mask is not None:
        rows = rows[mask.reshape(-1).bool()]
    if not len(rows):
        return GateStatistics(0.0, [0.0] * num_experts, 0.0, [0.0] * num_experts, 0)
    usage = rows.mean(dim=0)
    top = torch.bincount(rows.argmax(dim=-1), minlength=num_experts) / len(rows)
    scale = math.log(num_experts) if num_experts > 1 else 1.0
    return GateStatistics(
        entropy=float(torch.special.entr(rows).sum(-1).mean()) / scale,
        usage=usage.tolist(),
        usage_entropy=float(torch.special.entr(usage).sum()) / scale,
        top_share=top.tolist(),
        rows=len(rows),
    )
