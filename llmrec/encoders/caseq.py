"""CaseQ: context-specific experts under a backdoor-adjusted objective (NeurIPS 2022).

Histories and next events share a hidden context (a season, a trend) that differs between training and test times, so
plain maximum likelihood learns a confounded P(Y|S). CaseQ maximises a bound of log P(Y|do(S)) over K^D contexts c:

    log P(Y|do(S)) >= E_{c ~ Q(C|S)} log P(Y|S,c) - KL(Q(C|S) || P_hat(C))
    P_hat(C) = 1/R sum_j Q(C|S'_j)          S'_j: pseudo-sequences of uniformly drawn items, fresh every step

Each of D layers has K experts (one layer of the backbone each) and a branching unit that weighs them by position,
q_c = softmax_c(a_c . tanh(W_c x)); the posterior of the K^D paths is the product of the gates along a path.

`hierarchy: mix` is what the public release computes: a layer hands on the weighted mean of its experts. (It copies the
state into K slots, but these start equal and stay equal; one slot is kept here.) `hierarchy: path` is ours: experts of
a layer read each expert output of the layer before separately, so deeper gates know the path, and the K^D outputs are
averaged at the end; layer l costs K^l expert calls.

From the release: mixing features instead of K^D losses, R = 5, weight 0.5 of the KL term, xavier-normal matrices, the
attention block (residual from the normalised input), the bare GRU, a prior that receives gradient and is read after
the last pseudo-event without embedding dropout. Departures: batches are right padded, so the GRU needs no roll and
padding gets no attention; LayerNorm has PyTorch's eps; the KL term joins whatever objective the stage has, where the
release has a binary cross-entropy; the gates have no temperature and no Gumbel noise, which its code never uses. The
user-aware backbone `ssept` is left out: the release cannot train it.

The posterior is a set of expert weights, so the encoder is also a `GateSource`: `tuner: {type: ilora, router: none}`
with num_experts = K^D uses it instead of a learned router (ours).

Shapes: item_ids [B, L], hidden [B, L, d], contexts [B, L, K^D]; path c_1 .. c_D has the number with these digits in
base K.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llmrec.blocks.attention import MultiHeadAttention
from llmrec.blocks.feedforward import FeedForward
from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import (
    EncoderOutput,
    SequenceEncoder,
    SequenceEncoderConfig,
    check_history,
    register,
)
from llmrec.errors import RecipeError
from llmrec.paper import Paper

if TYPE_CHECKING:
    from llmrec.data.schema import SequenceBatch

PAPER = Paper(
    title="Towards Out-of-Distribution Sequential Event Prediction: A Causal Treatment",
    venue="NeurIPS 2022",
    system="CaseQ",
)
BACKBONES = ("attention", "gru")
HIERARCHIES = ("mix", "path")
MOST_PATHS = 4096
"""Largest K^D: the posterior has a column for each path."""


class CaseQConfig(SequenceEncoderConfig):
    """Options of CaseQ.

    Args:
        backbone: "attention" or "gru": what an expert is.
        hierarchy: "mix" (experts of a layer are averaged before the next) or "path" (paths stay apart to the end).
        num_layers: D.
        num_contexts: K, experts per layer; K^D contexts in all.
        num_heads: Attention heads of an expert; must divide hidden_size.
        pseudo_sequences: R, pseudo-sequences of max_history items the prior is averaged over.
        kl_weight: Weight of the KL term in the training loss; 0 leaves a plain mixture of experts, without a prior.
    """

    model_type = "llmrec_caseq"

    backbone: Literal["attention", "gru"] = "attention"
    hierarchy: Literal["mix", "path"] = "mix"
    num_layers: int = 2
    num_contexts: int = 3
    num_heads: int = 1
    pseudo_sequences: int = 5
    kl_weight: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, known in (("backbone", BACKBONES), ("hierarchy", HIERARCHIES)):
            if getattr(self, name) not in known:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("num_layers", "num_contexts", "pseudo_sequences"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected 1 or more")
        if self.kl_weight < 0:
            raise RecipeError(f"encoder.kl_weight: found {self.kl_weight}, expected 0 or more")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise RecipeError(
                f"encoder.num_heads: found {self.num_heads}, expected a divisor of hidden_size {self.hidden_size}"
            )
        if self.num_gates > MOST_PATHS:
            raise RecipeError(
                f"encoder.num_contexts: found {self.num_contexts} over {self.num_layers} layers, which is "
                f"{self.num_gates:,} contexts; expected at most {MOST_PATHS:,} (num_contexts ** num_layers)"
            )

    @property
    def num_gates(self) -> int:
        """K^D, the width of `CaseQEncoder.gates`."""
        return int(self.num_contexts**self.num_layers)


class Branching(nn.Module):
    """Weighs the K experts of a layer by the state they read: q_c = softmax_c(a_c . tanh(W_c x)).

    Args:
        hidden_size: d.
        num_contexts: K.
    """

    def __init__(self, hidden_size: int, num_contexts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, num_contexts * hidden_size))
        self.direction = nn.Parameter(torch.empty(num_contexts, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> log q [..., K] float32."""
        maps = torch.tanh(x @ self.weight).unflatten(-1, self.direction.shape)
        return (maps * self.direction).sum(-1).float().log_softmax(-1)

    def reset(self) -> None:
        """Xavier-normal, each W_c as a matrix of its own: unequal gates are what sets the experts apart."""
        contexts, width = self.direction.shape
        nn.init.normal_(self.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.direction, std=math.sqrt(2 / (contexts + width)))


class AttentionExpert(nn.Module):
    """The release's attention block: q = LN(x); y = LN(q + attention(q, x)); y + feed_forward(y)."""

    def __init__(self, config: CaseQConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, config.num_heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, width, dropout=config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, d] -> [N, L, d]."""
        query = self.attention_norm(x)
        x = self.feed_forward_norm(query + self.attention(query, x))
        return x + self.feed_forward(x)


class GRUExpert(nn.Module):
    """One recurrent layer."""

    def __init__(self, config: CaseQConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, d] -> [N, L, d]."""
        return self.gru(x)[0]


class CaseQLayer(nn.Module):
    """K experts and the branching unit that weighs them."""

    def __init__(self, config: CaseQConfig) -> None:
        super().__init__()
        self.branching = Branching(config.hidden_size, config.num_contexts)
        kind = AttentionExpert if config.backbone == "attention" else GRUExpert
        self.experts = nn.ModuleList(kind(config) for _ in range(config.num_contexts))

    def mixed(self, x: Tensor, log_gates: Tensor) -> Tensor:
        """[1, B, L, d], [1, B, L, K] -> [1, B, L, d]: the gated mean of the experts."""
        gates = log_gates.exp().to(x.dtype)
        parts = (expert(x[0]) * gates[0, ..., c, None] for c, expert in enumerate(self.experts))
        return torch.stack(list(parts)).sum(0, keepdim=True)

    def apart(self, slots: Tensor) -> Tensor:
        """[S, B, L, d] -> [S * K, B, L, d]: every expert on every slot."""
        rows = slots.flatten(0, 1)
        outputs = torch.stack([expert(rows).unflatten(0, slots.shape[:2]) for expert in self.experts], dim=1)
        return outputs.flatten(0, 1)


class CaseQEncoder(SequenceEncoder):
    """Experts per context, weighed by a variational posterior that `gates` hands to expert-mixing tuners."""

    config_class = CaseQConfig
    config: CaseQConfig

    def __init__(self, config: CaseQConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_history, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(CaseQLayer(config) for _ in range(config.num_layers))
        self.outer_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-normal matrices, as released: with tiny ones all experts start alike and gates get no gradient."""
        super()._init_weights(module)
        if isinstance(module, Branching):
            module.reset()
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                (nn.init.zeros_ if "bias" in name else nn.init.xavier_normal_)(parameter)

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch; see the base class.

        `parts` has `contexts` [B, L, K^D] (float32, the posterior after each event, 0 at padding), `gate_entropy` (its
        mean entropy in nats), `mutual_information` (entropy of its mean less its mean entropy, 0 when it is the same
        everywhere) and, in training, `kl`.

        Raises:
            DataError: The batch is longer than `max_history`.
        """
        check_history(item_ids, self.config.max_history)
        real = padding_mask(lengths, item_ids.shape[1])
        hidden, log_contexts = self._walk(self.dropout(self._embed(item_ids, item_embeds)))
        hidden = self.outer_norm(hidden).masked_fill(~real.unsqueeze(-1), 0.0)
        contexts = log_contexts.exp()
        parts = {"contexts": contexts.masked_fill(~real.unsqueeze(-1), 0.0), **_spread(contexts.detach()[real])}
        auxiliary = None
        if self.training and self.config.kl_weight > 0:
            parts["kl"] = divergence(log_contexts[real], self.log_prior()).mean()
            auxiliary = self.config.kl_weight * parts["kl"]
        return EncoderOutput(
            hidden=hidden, user_repr=self.last_state(hidden, lengths), auxiliary=auxiliary, parts=parts
        )

    def log_prior(self) -> Tensor:
        """[K^D] float32, log P_hat(C): the mean posterior after R pseudo-sequences of uniformly drawn items."""
        shape = (self.config.pseudo_sequences, self.config.max_history)
        pseudo = torch.randint(1, self.config.num_items + 1, shape, device=self.device)
        _, log_contexts = self._walk(self._embed(pseudo, None), last_context_only=True)
        return log_contexts[:, -1].logsumexp(0) - math.log(len(pseudo))

    def _embed(self, item_ids: Tensor, item_embeds: Tensor | None) -> Tensor:
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        positions = self.position_embedding(torch.arange(item_ids.shape[1], device=item_ids.device))
        return items * math.sqrt(self.config.hidden_size) + positions

    def _walk(self, x: Tensor, last_context_only: bool = False) -> tuple[Tensor, Tensor]:
        """Through all layers.

        Args:
            x: [B, L, d] embedded events. Padding stands right of every real one and both backbones are causal, so it
                needs no mask.
            last_context_only: Stop at the gates of the last layer, and give those of the last position.

        Returns:
            States [B, L, d] before the last norm, and the log posterior of paths [B, L or 1, K^D] in float32.
        """
        slots = x.unsqueeze(0)  # [S, B, L, d]: S = 1 for "mix", one slot per path so far for "path"
        log_contexts = torch.zeros(*x.shape[:2], 1, device=x.device)
        for number, layer in enumerate(self.layers, start=1):
            if last_context_only and number == len(self.layers):
                slots, log_contexts = slots[:, :, -1:], log_contexts[:, -1:]
            log_gates: Tensor = layer.branching(slots)  # type: ignore[operator]  # [S, B, L, K]
            # Explicit axes: [B, L, paths so far, 1] with [B, L, S, K], where S is 1 or the number of paths so far.
            log_contexts = (log_contexts.unsqueeze(-1) + log_gates.permute(1, 2, 0, 3)).flatten(-2)
            if last_context_only and number == len(self.layers):
                break
            mix = self.config.hierarchy == "mix"
            slots = layer.mixed(slots, log_gates) if mix else layer.apart(slots)  # type: ignore[operator]
        if self.config.hierarchy == "mix" or last_context_only:
            return slots[0], log_contexts
        weights = log_contexts.exp().permute(2, 0, 1).unsqueeze(-1).to(slots.dtype)  # [K^D, B, L, 1]
        return (weights * slots).sum(0), log_contexts

    # Gates ---------------------------------------------------------------------------------------------------------

    @property
    def num_gates(self) -> int:
        """K^D, the number of experts `gates` weighs."""
        return self.config.num_gates

    def gates(self, batch: SequenceBatch) -> Tensor:
        """[B, K^D] float32: the context posterior after the last event, rows sum to 1."""
        return self.last_state(self._contexts(batch), batch["lengths"])

    def position_gates(self, batch: SequenceBatch) -> Tensor:
        """[B, L, K^D] float32: the posterior after each event, from events up to it; uniform at padding."""
        contexts = self._contexts(batch)
        real = padding_mask(batch["lengths"], contexts.shape[1]).unsqueeze(-1)
        return contexts.masked_fill(~real, 1.0 / self.num_gates)

    def _contexts(self, batch: SequenceBatch) -> Tensor:
        parts = self.encode(batch).parts
        assert parts is not None
        return parts["contexts"]


def divergence(log_posterior: Tensor, log_prior: Tensor) -> Tensor:
    """KL(Q || P) = sum_c q_c (log q_c - log p_c), with the posterior first.

    Args:
        log_posterior: [..., C] log q.
        log_prior: [C] or [..., C] log p.

    Returns:
        [...].
    """
    return (log_posterior.exp() * (log_posterior - log_prior)).sum(-1)


def _spread(contexts: Tensor) -> dict[str, Tensor]:
    """Mean entropy of posteriors [N, C] and the mutual information H(mean q) - mean H(q)."""
    entropy = torch.special.entr(contexts).sum(-1).mean()
    return {
        "gate_entropy": entropy,
        "mutual_information": torch.special.entr(contexts.mean(0)).sum() - entropy,
    }


register(CaseQConfig, CaseQEncoder)
