"""SSR: structured spectral reasoning over the user-item graph with identities, pictures and texts (NeurIPS 2025).

    decompose   X_b = P_b X            B spectral bands of every signal, by eigenvectors or Chebyshev polynomials
    modulate    whole bands hidden at random in training; both passes should agree
    fuse        H' = RMS(H + s CP(H)), z[m] = sum_b a[b, m] H'[b, m], Z = z[1] | ... | z[M], score = <Z_u, Z_i>
    align       in each band, an item's picture and text are closer than those of other items and of other bands

The paper's: the four stages, bands of about equal energy, masking of whole bands in training only, a low-rank operator
over bands and signals with node-dependent gates and scale normalisation, contrast within bands against other items and
other bands, BCE + masking + contrast + L2. Its code and the operator's exact form were not at hand, so these are ours:
the CP form, rank, rates, weights, temperatures, how a gate is computed, band edges from moments of the polynomials, and
`mask_target` with both published consistencies (representation: version 3; prediction: version 1).

Content is ours in the default `content: linear`: a level's principal directions are decomposed once and only the
projection learns, since it commutes with the bands; users carry the sum of their items' content. `content: mlp` (as in
a companion model of the authors) has a two-layer map and free user rows, decomposed anew in every step.

An item without a level has a zero row in that signal, so that what stands in its place plays no part; its bands hold
what the graph brings, and it is left out of the contrast. With one content level, that level is aligned with the
identity (ours). As a sequence encoder, a history is a new user node (`encoders.graph_base.GraphEncoder`); `gates` are
the mean band gates of its items (ours).

Shapes: N = U + I nodes, M signals (identity first), bands [n, B, M, d], Z [n, M d], gates [n, B, M].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.blocks.graph_signals import (
    assign_modes,
    band_coefficients,
    equal_energy_edges,
    first_occurrences,
    new_nodes,
    running_nodes,
)
from llmrec.encoders.base import SequenceEncoder, SequenceEncoderConfig, register
from llmrec.encoders.graph_base import EdgeScores, GraphEncoder, GraphEncoderConfig
from llmrec.errors import RecipeError
from llmrec.paper import Paper

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.graph import UserItemGraph
    from llmrec.data.schema import DataContext, SequenceBatch

PAPER = Paper(
    title="Structured Spectral Reasoning for Frequency-Adaptive Multimodal Recommendation",
    venue="NeurIPS 2025",
    url_id="2512.01372",
    system="SSR",
)
MOMENTS = 64
"""Moments of the content that band edges are found from."""
_CHUNK = 1 << 14
_CHOICES = {
    "mask_target": ("representation", "prediction"),
    "gate": ("node", "uniform"),
    "align_on": ("mixed", "bands"),
    "content": ("linear", "mlp"),
}


class SSRConfig(GraphEncoderConfig):
    """Options of SSR; `hidden_size` is d, the width of one signal.

    Args:
        num_bands: B.
        order: K, degree of the polynomials.
        eig_max: Graphs of at most this many nodes are decomposed by eigenvectors; 0 always uses polynomials.
        content: "linear" or "mlp": how feature levels become signals.
        mask_rate: p, probability that a band is hidden in a step; 0 switches masking off.
        mask_weight: Weight of the consistency of the two passes.
        mask_target: What must agree: "representation" or "prediction".
        stop_grad_full: The full pass is a fixed target of the masked one.
        cross_band: Mix bands and signals by the low-rank operator.
        rank: r of the operator.
        gate: "node" (learned per node) or "uniform" (1 / B).
        align_weight: Weight of the contrast; 0 switches it off.
        align_temperature: Its temperature.
        align_items: Most items of a batch in the contrast (a draw of them); its cost is their square.
        align_on: Bands after mixing ("mixed") or before ("bands").
        temperature: Scores are divided by it.
        levels, graph_entries, exact, band_edges: Set from the data set.
    """

    model_type = "llmrec_ssr"

    num_bands: int = 3
    order: int = 16
    eig_max: int = 3000
    content: Literal["linear", "mlp"] = "linear"
    mask_rate: float = 0.2
    mask_weight: float = 0.1
    mask_target: Literal["representation", "prediction"] = "representation"
    stop_grad_full: bool = False
    cross_band: bool = True
    rank: int = 4
    gate: Literal["node", "uniform"] = "node"
    align_weight: float = 0.01
    align_temperature: float = 0.2
    align_items: int = 512
    align_on: Literal["mixed", "bands"] = "mixed"
    temperature: float = 4.0
    exact: bool = False
    band_edges: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("num_bands", "order", "rank"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected a whole number from 1")
        for name in ("eig_max", "mask_weight", "align_weight"):
            if getattr(self, name) < 0:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.mask_rate < 1:
            raise RecipeError(f"encoder.mask_rate: found {self.mask_rate}, expected from 0 to below 1")
        for name in ("align_temperature", "temperature"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected a number above 0")
        if self.align_items < 2:
            raise RecipeError(f"encoder.align_items: found {self.align_items}, expected 2 or more")

    @property
    def num_gates(self) -> int:
        """B, the width of `SSREncoder.gates`."""
        return self.num_bands


class CrossBandOperator(nn.Module):
    """G-HSNO as a CP kernel of rank r over (band out, band in, signal out, signal in, channel); r(2B + 2M + d) numbers.

    Y[n, b', m', :] = sum_q P[b', q] S[m', q] (C[:, q] . sum_{b, m} Q[b, q] T[m, q] H[n, b, m, :])
    """

    def __init__(self, bands: int, signals: int, width: int, rank: int) -> None:
        super().__init__()
        self.band_out = nn.Parameter(torch.empty(bands, rank))
        self.band_in = nn.Parameter(torch.empty(bands, rank))
        self.signal_out = nn.Parameter(torch.empty(signals, rank))
        self.signal_in = nn.Parameter(torch.empty(signals, rank))
        self.channel = nn.Parameter(torch.empty(width, rank))

    def forward(self, bands: Tensor) -> Tensor:
        """[n, B, M, d] -> [n, B, M, d]."""
        inner = torch.einsum("bq,mq->bmq", self.band_in, self.signal_in).flatten(0, 1)  # [BM, r]
        outer = torch.einsum("bq,mq->bmq", self.band_out, self.signal_out).flatten(0, 1)
        mixed = (bands.flatten(1, 2).mT @ inner) * self.channel  # [n, d, r]
        return (mixed @ outer.T).mT.unflatten(1, bands.shape[1:3])

    def reset(self) -> None:
        """Normal factors with variance 1 / size of their side, channels 1."""
        for factor in (self.band_out, self.band_in, self.signal_out, self.signal_in):
            nn.init.normal_(factor, std=1 / math.sqrt(len(factor)))
        nn.init.ones_(self.channel)


class BandFusion(nn.Module):
    """Mixes bands and signals, normalises their scale and weighs the bands of each node."""

    def __init__(self, config: SSRConfig) -> None:
        super().__init__()
        bands, signals = config.num_bands, config.num_signals
        self.gain = nn.Parameter(torch.empty(bands, signals, 1))
        self.operator = self.scale = self.gate = None
        if config.cross_band:
            self.operator = CrossBandOperator(bands, signals, config.hidden_size, config.rank)
            self.scale = nn.Parameter(torch.empty(()))
        if config.gate == "node":
            self.gate = nn.Linear(bands * config.hidden_size, bands * signals)

    def forward(self, bands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, B, M, d] -> Z [n, M d], mixed bands H' [n, B, M, d], gates [n, B, M]."""
        if self.operator is not None:
            bands = bands + self.scale * self.operator(bands)
        mixed = F.rms_norm(bands, bands.shape[-1:], eps=1e-6) * self.gain
        gates = mixed.new_full(mixed.shape[:3], 1 / mixed.shape[1])
        if self.gate is not None:
            gates = self.gate(mixed.mean(2).flatten(1)).unflatten(-1, mixed.shape[1:3]).softmax(1)
        return (gates.unsqueeze(-1) * mixed).sum(1).flatten(1), mixed, gates

    def reset(self) -> None:
        """Gain 1; the operator starts switched off (scale 0), so that H' is the normalised H."""
        nn.init.ones_(self.gain)
        if self.scale is not None:
            nn.init.zeros_(self.scale)


class _Pairs(NamedTuple):
    """Training pairs of a batch as places in the list of nodes that take part.

    Args:
        nodes: [n'] distinct node numbers.
        users: [n] places of the users; user ids where their histories stand for them.
        positives: [n] places of the items.
        negatives: [n, K] places of the sampled items.
    """

    nodes: Tensor
    users: Tensor
    positives: Tensor
    negatives: Tensor


class SSREncoder(GraphEncoder, SequenceEncoder):
    """Spectral bands of identities and content, fused per node; a history is a new user node."""

    config_class = SSRConfig
    config: SSRConfig
    modes: Tensor
    mode_bands: Tensor

    def __init__(self, config: SSRConfig) -> None:
        super().__init__(config)
        width, widths = config.hidden_size, list((config.levels or {}).values())
        if config.content == "linear":
            self.maps = nn.ModuleList(nn.Linear(found, width, bias=False) for found in widths)
        else:
            self.maps = nn.ModuleList(
                nn.Sequential(nn.Linear(found, 4 * width), nn.LeakyReLU(), nn.Linear(4 * width, width))
                for found in widths
            )
            self.user_content = nn.ModuleList(nn.Embedding(config.num_users + 1, width, padding_idx=0) for _ in widths)
        self.fusion = BandFusion(config)
        nodes = (config.num_users + config.num_items) if config.exact else 0
        self.register_buffer("modes", torch.zeros(nodes, nodes))
        self.register_buffer("mode_bands", torch.zeros(nodes, dtype=torch.long))
        self.post_init()

    @classmethod
    def settle(cls, config: Any, graph: UserItemGraph) -> None:
        """Small graphs are decomposed by eigenvectors."""
        config.exact = graph.num_nodes <= config.eig_max

    @classmethod
    def from_context(cls, config: SequenceEncoderConfig, context: DataContext) -> Self:
        """An untrained model whose bands are laid by the energy of the content (of identities where there is none)."""
        model = super().from_context(config, context)
        with torch.no_grad():
            signals = model._signals()
            signals = signals[1:] or signals
            if model.config.exact:
                model._solve(signals)
            else:
                moments = model.graph.moments(signals, MOMENTS)
                model.config.band_edges = equal_energy_edges(moments, model.config.num_bands)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-normal tables and maps, as in the companion model; gates start near uniform."""
        super()._init_weights(module)
        if isinstance(module, BandFusion | CrossBandOperator):
            module.reset()
        elif isinstance(module, nn.Linear) and module is not self.fusion.gate:
            nn.init.xavier_normal_(module.weight)

    @property
    def gate_dim(self) -> int:
        """D = M d."""
        return self.config.hidden_size * self.config.num_signals

    # Decompose -------------------------------------------------------------------------------------------------------

    def _solve(self, signals: list[Tensor]) -> None:
        """Eigenvectors in float64 (float32 loses their orthogonality), and the band of each."""
        dense = torch.eye(len(self.modes), dtype=torch.float64)
        dense -= self.graph(dense)
        eigenvalues, modes = torch.linalg.eigh((dense + dense.T) / 2)
        energies = torch.zeros_like(eigenvalues)
        for signal in signals:
            energies += (modes.T @ signal.double()).pow(2).sum(1) / signal.double().pow(2).sum().clamp(min=1e-30)
        try:
            self.mode_bands.copy_(assign_modes(eigenvalues, energies, self.config.num_bands))
        except ValueError as error:
            raise RecipeError(f"encoder.num_bands: found {error} of the graph; expected fewer bands") from error
        self.modes.copy_(modes)
        starts = torch.searchsorted(self.mode_bands, torch.arange(1, self.config.num_bands))
        middles = (eigenvalues[starts] + eigenvalues[starts - 1]) / 2 - 1
        self.config.band_edges = [-1.0, *middles.tolist(), 1.0]

    def decompose(self, signal: Tensor) -> Tensor:
        """Bands of a signal: [N, F] -> [B, N, F], which sum to it."""
        if self.config.exact:
            spectrum = self.modes.to(signal.dtype).T @ signal
            sizes = torch.bincount(self.mode_bands, minlength=self.config.num_bands).tolist()
            parts = zip(self.modes.to(signal.dtype).split(sizes, 1), spectrum.split(sizes), strict=True)
            return torch.stack([modes @ part for modes, part in parts])
        edges = self.config.band_edges or [-1.0, *[1.0] * self.config.num_bands]
        return self.graph.bands(signal, band_coefficients(edges, self.config.order))

    def _signals(self) -> list[Tensor]:
        """Identity [N, d], then each level: [N, F_m] (linear) or [N, d] (mlp); rows of length 1 or 0."""
        return [F.normalize(self.identities(), dim=-1), *self._content_signals()]

    def _content_signals(self) -> list[Tensor]:
        users, found = self.config.num_users, []
        for number, values in enumerate(self.content()):
            if self.config.content == "linear":
                signal = F.pad(values[1:], (0, 0, users, 0))
                signal = torch.cat([self.graph(signal)[:users], values[1:]])
            else:
                items = self.maps[number](values[1:]) * self.present[number, 1:, None]
                rows: Tensor = self.user_content[number].weight  # type: ignore[assignment]
                signal = torch.cat([rows[1:], items])
            found.append(F.normalize(signal, dim=-1))
        return found

    def node_bands(self, nodes: Tensor) -> Tensor:
        """[n] node numbers -> H [n, B, M, d]."""
        found = [self.decompose(F.normalize(self.identities(), dim=-1))[:, nodes]]
        if self.config.content == "linear":
            for kept, project in zip(self._content_bands(), self.maps, strict=True):
                found.append(project(kept[:, nodes]))
        else:
            found += [self.decompose(signal)[:, nodes] for signal in self._content_signals()]
        return torch.stack(found, dim=2).transpose(0, 1)  # [B, n, M, d] -> [n, B, M, d]

    def _content_bands(self) -> list[Tensor]:
        """[B, N, F_m] per level, decomposed once."""
        fixed = [*self.content(), *self.graph.buffers(), self.modes, self.mode_bands]
        kept: list[Tensor] = self._kept_content.get(fixed, lambda: [self.decompose(s) for s in self._content_signals()])
        return kept

    # States and scores -----------------------------------------------------------------------------------------------

    def item_states(self) -> tuple[Tensor, ...]:
        """Item vectors [I+1, D] and gates [I+1, B, M]; rows 0 are zero."""
        nodes = torch.arange(self.config.num_items, device=self.item_scale.device) + self.config.num_users
        fused = [self.fusion(part) for part in self.node_bands(nodes).split(_CHUNK)]
        states, gates = torch.cat([part[0] for part in fused]), torch.cat([part[2] for part in fused])
        return F.pad(states, (0, 0, 1, 0)), F.pad(gates, (0, 0, 0, 0, 1, 0))

    def score_edges(self, users: Tensor, positives: Tensor, negatives: Tensor) -> EdgeScores:
        """Scores of pairs; `auxiliary` is masking + contrast + L2, each with its weight."""
        pairs = self._places(users, positives, negatives)
        bands = self.node_bands(pairs.nodes)
        states, mixed, gates = self.fusion(bands)
        scores = self._pair_scores(states, pairs)
        penalty = self.weight_penalty(users, torch.cat([positives, negatives.flatten()]))
        parts, auxiliary = {"l2": penalty}, self.config.l2_weight * penalty
        if self.training and self.config.mask_rate > 0:
            parts["masking"] = self._consistency(bands, states, scores, pairs)
            auxiliary = auxiliary + self.config.mask_weight * parts["masking"]
        if self.config.align_weight > 0 and self.config.num_signals > 1:
            chosen = mixed if self.config.align_on == "mixed" else bands
            parts["alignment"] = self._alignment(chosen, pairs)
            auxiliary = auxiliary + self.config.align_weight * parts["alignment"]
        for band, share in enumerate(gates.detach().mean((0, 2))):
            parts[f"gate_{band + 1}"] = share
        return EdgeScores(*scores, auxiliary, {name: value.detach() for name, value in parts.items()})

    def _places(self, users: Tensor, positives: Tensor, negatives: Tensor) -> _Pairs:
        """The nodes whose states a batch needs: all items and no users where histories stand for users."""
        count = self.config.num_users
        if self.config.train_user == "history":
            nodes = torch.arange(self.config.num_items, device=users.device) + count
            return _Pairs(nodes, users, positives - 1, negatives - 1)
        asked = torch.cat([users - 1, positives + count - 1, negatives.flatten() + count - 1])
        nodes, places = asked.unique(return_inverse=True)
        user, positive, others = places.split([len(users), len(positives), negatives.numel()])
        return _Pairs(nodes, user, positive, others.view_as(negatives))

    def _pair_scores(self, states: Tensor, pairs: _Pairs) -> tuple[Tensor, Tensor]:
        """[n] and [n, K] scores from the states of `pairs.nodes`."""
        if self.config.train_user == "history":
            user = self.other_links(F.pad(states, (0, 0, 1, 0)), pairs.users, pairs.positives + 1)
        else:
            user = states[pairs.users]
        positive = (user * states[pairs.positives]).sum(-1)
        others = torch.einsum("nd,nkd->nk", user, states[pairs.negatives])
        return positive / self.config.temperature, others / self.config.temperature

    def _consistency(self, bands: Tensor, states: Tensor, scores: tuple[Tensor, Tensor], pairs: _Pairs) -> Tensor:
        """L_SBM: how far the pass with hidden bands is from the full one; 0 where no band was hidden."""
        keep = draw_bands(self.config.num_bands, self.config.mask_rate, bands.device)
        if bool(keep.all()):
            return states.new_zeros(())
        masked = self.fusion(bands * keep[:, None, None].to(bands.dtype))[0]
        full, again = [states], [masked]
        if self.config.mask_target == "prediction":
            full, again = list(scores), list(self._pair_scores(masked, pairs))
        flat = torch.cat([part.flatten() for part in full])
        flat = flat.detach() if self.config.stop_grad_full else flat
        return (flat - torch.cat([part.flatten() for part in again])).pow(2).mean()

    def _alignment(self, mixed: Tensor, pairs: _Pairs) -> Tensor:
        """L_SCR, averaged over pairs of content levels; over distinct items of the batch that have both."""
        levels = list(range(1, self.config.num_signals))
        compared = [(a, b) for a in levels for b in levels if a < b] or [(0, 1)]
        rows = pairs.positives.unique()
        rows = rows[torch.randperm(len(rows), device=rows.device)[: self.config.align_items]]
        items, losses = pairs.nodes[rows] - self.config.num_users + 1, []
        for first, second in compared:
            has = self.present[second - 1, items] & (self.present[first - 1, items] if first else True)
            losses.append(
                band_alignment(mixed[rows[has], :, first], mixed[rows[has], :, second], self.config.align_temperature)
            )
        return torch.stack(losses).mean()

    # Gates and diagnostics -------------------------------------------------------------------------------------------

    @property
    def num_gates(self) -> int:
        """B, the number of experts `gates` weighs."""
        return self.config.num_bands

    def gates(self, batch: SequenceBatch) -> Tensor:
        """[n, B] float32: gates of the history's distinct items, averaged over items and signals; rows sum to 1."""
        items = batch.get("seen", batch["item_ids"])
        found = new_nodes(items, self.items()[1].mean(2), self.config.recency)
        return (found / first_occurrences(items).sum(1, keepdim=True).clamp(min=1).sqrt()).float()

    def position_gates(self, batch: SequenceBatch) -> Tensor:
        """[n, L, B] float32: `gates` of the history up to each event."""
        items = batch["item_ids"]
        found = running_nodes(items, self.items()[1].mean(2), self.config.recency)
        return (found / first_occurrences(items).cumsum(1).clamp(min=1).sqrt().unsqueeze(-1)).float()

    @torch.no_grad()
    def band_diagnostics(self, most_pairs: int = 20_000) -> list[dict[str, Any]]:
        """How much each band of each signal contributes, one record for each.

        `from`, `to`: eigenvalues of the Laplacian, 0 (smooth) to 2. `energy`: the band's share of the signal. `gate`:
        mean gate over items. `margin`: the part of <Z_u, Z_i> of training pairs, less that of the same users with other
        items, that comes through the band; all margins add up to the mean margin of scores.

        Args:
            most_pairs: Training pairs looked at, evenly spaced.
        """
        energy = torch.stack([self.decompose(s).pow(2).sum((1, 2)) for s in self._signals()], dim=1)  # [B, M]
        energy = energy / energy.sum(0).clamp(min=1e-30)
        users, items = self._training_pairs(most_pairs)
        bands = self.node_bands(torch.arange(self.config.num_users + self.config.num_items, device=users.device))
        states, mixed, gates = self.fusion(bands)
        weighted = gates.unsqueeze(-1) * mixed
        difference = weighted[items] - weighted[items.roll(len(items) // 2)]
        margin = (states[users].unflatten(-1, (1, *mixed.shape[2:])) * difference).sum(-1).mean(0)
        margin = margin / self.config.temperature
        gate, edges = gates[self.config.num_users :].mean(0), self.config.band_edges or []
        names = ["identity", *(self.config.levels or {})]
        return [
            {
                "signal": name, "band": b + 1, "from": edges[b] + 1, "to": edges[b + 1] + 1,
                "energy": float(energy[b, m]), "gate": float(gate[b, m]), "margin": float(margin[b, m]),
            }
            for m, name in enumerate(names) for b in range(self.config.num_bands)
        ]  # fmt: skip

    def _training_pairs(self, most: int) -> tuple[Tensor, Tensor]:
        """Node numbers of users and items of training pairs, evenly spaced."""
        starts = self.graph.starts.long()
        links = int(starts[self.config.num_users])
        chosen = torch.linspace(0, links - 1, min(most, links), device=starts.device).long()
        return torch.searchsorted(starts, chosen, right=True) - 1, self.graph.columns[chosen].long()


def draw_bands(bands: int, rate: float, device: torch.device) -> Tensor:
    """[B] bool: which bands stay; each is hidden with probability `rate`, at least one stays."""
    while True:
        keep = torch.rand(bands, device=device) >= rate
        if bool(keep.any()):
            return keep


def band_alignment(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """L_SCR between two signals of the same items: each band of an item against other items and other bands.

    l_ib = -log exp(s(v_ib, t_ib) / tau) / [sum_j exp(s(v_ib, t_jb) / tau) + sum_b'!=b exp(s(v_ib, t_ib') / tau)]

    plus the same with v and t exchanged, s the cosine, averaged over items and bands.

    Args:
        first, second: [n, B, d], v and t; each item once.
        temperature: tau.
    """
    if not len(first):
        return first.sum() * 0.0
    first, second = (F.normalize(x.float(), dim=-1).transpose(0, 1) for x in (first, second))  # [B, n, d]
    items = first @ second.mT / temperature  # [B, n, n]
    across = torch.einsum("bnd,cnd->nbc", first, second) / temperature  # [n, B, B]
    own = torch.eye(len(first), dtype=torch.bool, device=first.device)
    across = across.masked_fill(own, float("-inf"))  # the item itself stands in `items` already
    total = first.new_zeros(())
    for rows, columns in ((items, across), (items.mT, across.mT)):
        every = torch.cat([rows, columns.transpose(0, 1)], dim=-1)  # [B, n, n + B]
        total = total + (every.logsumexp(-1) - rows.diagonal(dim1=1, dim2=2)).mean()
    return total


register(SSRConfig, SSREncoder)
