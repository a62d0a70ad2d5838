"""LightGCN over identities and content: signals are averaged over neighbourhoods, nothing else (SIGIR 2020).

    Z = 1/(K+1) sum_{k=0..K} S^k X        S = D^-1/2 A D^-1/2        score(u, i) = <Z_u, Z_i>

The paper has one signal, a free vector for each user and item. The fusion with content is ours, as a plain baseline for
SSR in the manner of VBPR and MMGCN: each feature level is one more signal, projected linearly; signals stand side by
side (`fusion: concat`) or are added up (`sum`). An item without a level has a zero row there and receives what its
neighbours carry. Users have no content of their own. A linear map commutes with S, so the content of all nodes is
averaged once and kept, and only identities are propagated in every step.

Departures besides: layers weigh the same, as in the paper's experiments; trained by the strategy `edges` (BCE) instead
of BPR, so that it is compared with SSR on one objective; evaluated as an inductive model: a history is a new user node
linked to its items (`encoders.graph_base.GraphEncoder`).

Shapes: N = U + I nodes, M signals, D = M d (concat) or d (sum).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.encoders.base import SequenceEncoder, register
from llmrec.encoders.graph_base import EdgeScores, GraphEncoder, GraphEncoderConfig
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
    venue="SIGIR 2020",
    url_id="2002.02126",
    system="LightGCN",
)


class LightGCNConfig(GraphEncoderConfig):
    """Options of LightGCN with content; `hidden_size` is d, the width of one signal.

    Args:
        num_layers: K, products with S.
        fusion: How identity and feature levels come together: "concat" or "sum".
    """

    model_type = "llmrec_lightgcn"

    num_layers: int = 3
    fusion: Literal["concat", "sum"] = "concat"
    initializer_range: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.fusion not in ("concat", "sum"):
            raise RecipeError(f"encoder.fusion: found {self.fusion!r}, expected concat or sum")
        if self.num_layers < 1:
            raise RecipeError(f"encoder.num_layers: found {self.num_layers}, expected a whole number from 1")


class LightGCNEncoder(GraphEncoder, SequenceEncoder):
    """Averaged neighbourhoods of identity vectors and projected content."""

    config_class = LightGCNConfig
    config: LightGCNConfig

    def __init__(self, config: LightGCNConfig) -> None:
        super().__init__(config)
        widths = list((config.levels or {}).values())
        self.projections = nn.ModuleList(nn.Linear(width, config.hidden_size, bias=False) for width in widths)
        self.post_init()

    @property
    def gate_dim(self) -> int:
        """D."""
        return self.config.hidden_size * (self.config.num_signals if self.config.fusion == "concat" else 1)

    def node_states(self) -> Tensor:
        """Z [N, D], users first."""
        identity = self._average(self.identities())
        content = self._kept_content.get([*self.content(), *self.graph.buffers()], self._content)
        signals = [identity, *(project(values) for project, values in zip(self.projections, content, strict=True))]
        if self.config.fusion == "sum":
            return torch.stack(signals).sum(0)
        return torch.cat(signals, dim=1)

    def item_states(self) -> tuple[Tensor, ...]:
        """Item vectors [I+1, D]."""
        return (F.pad(self.node_states()[self.config.num_users :], (0, 0, 1, 0)),)

    def score_edges(self, users: Tensor, positives: Tensor, negatives: Tensor) -> EdgeScores:
        """Scores of pairs; `auxiliary` is the weight penalty of the identities that took part."""
        states = self.node_states()
        items = F.pad(states[self.config.num_users :], (0, 0, 1, 0))
        alone = self.config.train_user == "node"
        user = states[users - 1] if alone else self.other_links(items, users, positives)
        positive = (user * items[positives]).sum(-1) / self.config.temperature
        others = torch.einsum("nd,nkd->nk", user, items[negatives]) / self.config.temperature
        penalty = self.weight_penalty(users, torch.cat([positives, negatives.flatten()]))
        return EdgeScores(positive, others, self.config.l2_weight * penalty, {"l2": penalty.detach()})

    def _average(self, signal: Tensor) -> Tensor:
        """1/(K+1) sum_k S^k X."""
        total = layer = signal
        for _ in range(self.config.num_layers):
            layer = self.graph(layer)
            total = total + layer
        return total / (self.config.num_layers + 1)

    def _content(self) -> list[Tensor]:
        return [self._average(F.pad(values[1:], (0, 0, self.config.num_users, 0))) for values in self.content()]


register(LightGCNConfig, LightGCNEncoder)
