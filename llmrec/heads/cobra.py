"""COBRA: a cascade of a short sparse code and a dense vector; beams of codes, nearest items inside each, one score.

    sequence    E_1(c_1^1) .. E_C(c_1^C) P(v_1)  E_1(c_2^1) ..  P(v_T)   + E_pos[token] + E_type[sparse | dense]
    P(ID_{t+1}, v_{t+1} | S_{1:t}) = P(ID_{t+1} | S_{1:t}) P(v_{t+1} | ID_{t+1}, S_{1:t})
    loss        L_sparse + L_dense: cross-entropy of the codes, in-batch softmax of cos(v^, v) / temperature
    BeamFusion  Phi(k, a) = softmax_k(tau phi_k) softmax_a(psi cos(v^_k, a)),  a: the N items of code k nearest to v^_k

The paper's: the alternating sequence, one causal decoder, a text encoder trained with it, the two losses in equal
weight, targets that are not detached, decoding from code to vector to neighbours, and BeamFusion. A code is a bucket
of items, not a key: it need not be unique, and results are always items.

Ours, where the paper says nothing or was not followed:
- pre-norm GELU blocks; E_c, one table per level; P = Linear, LayerNorm that starts as small as the embeddings;
- `dense_temperature` 0.1 (1 is the printed formula, which is almost flat); negatives are the distinct targets of the
  micro-batch, so an item is never its own negative; `sparse_only_share` trains the codes alone at first;
- encoder "light" reads token ids with one random layer, [CLS] being row 0 of its table; encoder "embedding" is an MLP
  over a frozen sentence encoder's vectors, trained end to end from there on. Items without text share one vector;
- `dense_softmax` "cluster" takes the second softmax over the neighbours of one code, so that Phi is P(ID) P(item | ID)
  and an item alone in its code always weighs 1; with "global", over all neighbours of all codes, a full code gives
  every one of its items the code's whole weight (it found fewer targets on Beauty, see README). Codes without
  an item the row may get take no beam;
- at least k beams are searched, so that k items are found where the row may get k. Neighbours beyond N come behind the
  fused ones if fewer than k were found;
- `mode`: "sparse" (the paper's w/o Dense) has no text, "dense" (w/o ID) no codes: other networks, to be trained as
  such. "no_fusion" (w/o BeamFusion) differs in ranking alone: the best code first, inside it by cosine.

Histories are right padded; in a causal decoder padding that comes later needs no mask, and generated tokens stand at
each row's own end. Similarities and softmaxes are float32. Vectors of the catalogue are cached until weights change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.blocks.attention import attend
from llmrec.blocks.beam_search import alive_nodes, allowed_items, beam_search, recommend_codes
from llmrec.blocks.feedforward import FeedForward
from llmrec.blocks.readout import gather_last, padding_mask, top_items
from llmrec.data.schema import Ranking
from llmrec.errors import DataError, RecipeError
from llmrec.heads.base import (
    CodeHead,
    CodeHeadConfig,
    GenerativeHead,
    GenerativeHeadConfig,
    HeadOutput,
    check_codes,
    register,
)
from llmrec.paper import Paper

if TYPE_CHECKING:
    from llmrec.data.schema import DataContext, SequenceBatch
    from llmrec.item_tokenizers.base import ItemTokenizer

PAPER = Paper(
    title="Sparse Meets Dense: Unified Generative Recommendations with Cascaded Sparse-Dense Representations",
    venue="NeurIPS 2025",
    url_id="2503.02453",
    system="COBRA",
)

Mode = Literal["full", "dense", "sparse", "no_fusion"]
Domain = Literal["global", "cluster"]
TextEncoder = Literal["light", "embedding"]

TOKENS, VECTORS = "text_tokens", "text"
"""Feature levels the two text encoders read."""
_PAIRS = 1 << 14  # pairs of vectors compared at once
_ITEMS = 1 << 10  # texts encoded at once


class COBRAConfig(CodeHeadConfig):
    """Options of the head.

    Args:
        hidden_size: D, of the decoder and of item vectors.
        num_layers: Layers of the decoder.
        num_heads: Attention heads of decoder and text encoder.
        d_ff: Width of the feed-forward layers.
        dropout: Dropout rate.
        text_encoder: "light" (feature level text_tokens) or "embedding" (level text); null = the first there is.
        text_layers: Layers of the light encoder.
        dense_temperature: What cosines of the dense loss are divided by.
        detach_dense_target: Whether item vectors learn from being histories alone, not from being targets.
        sparse_only_share: First share of the steps in which only the codes are trained.
        mode: "full", "dense" (no codes), "sparse" (no vectors) or "no_fusion" (ranked by the best code first).
        tau: Sharpness of BeamFusion over codes.
        psi: Sharpness of BeamFusion over the items of a code.
        dense_softmax: The second softmax is over the neighbours of one code ("cluster") or of all ("global").
        beams: M, codes to look into; at least as many as items are asked for.
        neighbours: N, items fused per code.
        initializer_range: Standard deviation of fresh embeddings.
        level_sizes: Codes per level; set from the item tokenizer.
        text_vocab: Rows of the light encoder's table; set from the feature level.
        text_length: Longest text in tokens; set from the feature level.
        text_width: Width of the frozen vectors; set from the feature level.
    """

    model_type = "llmrec_cobra"

    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 8
    d_ff: int = 1024
    dropout: float = 0.1
    text_encoder: TextEncoder | None = None
    text_layers: int = 1
    dense_temperature: float = 0.1
    detach_dense_target: bool = False
    sparse_only_share: float = 0.0
    mode: Mode = "full"
    tau: float = 0.9
    psi: float = 16.0
    dense_softmax: Domain = "cluster"
    beams: int = 50
    neighbours: int = 50
    initializer_range: float = 0.02
    text_vocab: int = 1
    text_length: int = 1
    text_width: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        choices = {"mode": Mode, "dense_softmax": Domain, "text_encoder": TextEncoder}
        for name, kind in choices.items():
            found = getattr(self, name)
            if found not in get_args(kind) and not (name == "text_encoder" and found is None):
                raise RecipeError(f"head.{name}: found {found!r}, expected {' or '.join(get_args(kind))}")
        for name in ("beams", "neighbours", "num_layers", "text_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise RecipeError(f"head.{name}: found {getattr(self, name)}, expected a number from 1")
        for name in ("tau", "psi"):
            if getattr(self, name) < 0:
                raise RecipeError(f"head.{name}: found {getattr(self, name)}, expected a number from 0")
        if self.hidden_size % self.num_heads:
            raise RecipeError(f"head.num_heads: found {self.num_heads}, expected a divisor of {self.hidden_size}")
        if self.dense_temperature <= 0:
            raise RecipeError(f"head.dense_temperature: found {self.dense_temperature}, expected a number above 0")
        if not 0 <= self.sparse_only_share <= 1 or (self.sparse_only_share and self.mode in ("dense", "sparse")):
            raise RecipeError(
                f"head.sparse_only_share: found {self.sparse_only_share} with mode {self.mode}, expected a share from "
                "0 to 1, and 0 where the mode has one loss only"
            )

    @property
    def depth(self) -> int:
        """C, levels of a code; 0 in mode "dense"."""
        return 0 if self.mode == "dense" else len(self.level_sizes or [1])

    @property
    def has_vectors(self) -> bool:
        """Whether items are vectors as well."""
        return self.mode != "sparse"

    @property
    def width(self) -> int:
        """Tokens of one item."""
        return self.depth + self.has_vectors


class COBRAHead(CodeHead, GenerativeHead):
    """See the module; a `Recommender` and a `CandidateScorer`."""

    config_class = COBRAConfig
    config: COBRAConfig
    reads_item_features: ClassVar[bool] = True
    supervises: ClassVar[str] = "all"

    text_ids: Tensor
    text_vectors: Tensor

    def __init__(self, config: COBRAConfig) -> None:
        super().__init__(config)
        rows, width, depth = config.num_items + 1, config.hidden_size, config.depth
        sizes = (config.level_sizes or [1])[:depth]
        self.code_embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.code_outputs = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        if config.has_vectors:
            self.encoder = _EmbeddingEncoder(config) if config.text_encoder == "embedding" else _LightEncoder(config)
            self.item_input, self.item_norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.dense_output = nn.Linear(width, width)
            if config.text_encoder == "embedding":
                self.register_buffer("text_vectors", torch.zeros(rows, config.text_width))
            else:
                self.register_buffer("text_ids", torch.zeros(rows, config.text_length, dtype=torch.int32))
        self.position_embedding = nn.Embedding((config.max_history + 1) * config.width, width)
        self.type_embedding = nn.Embedding(2, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width)
        self._catalogue: tuple[Any, Tensor, Tensor] | None = None
        self._dense_weight = 1.0
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            # A vector as large as the codes' embeddings: otherwise its position and type could not be told.
            small = self.config.has_vectors and module is self.item_norm
            nn.init.constant_(module.weight, self.config.initializer_range if small else 1.0)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_context(
        cls, config: GenerativeHeadConfig, context: DataContext, tokenizer: ItemTokenizer | None = None
    ) -> COBRAHead:
        """A fresh head that speaks a tokenizer's codes and reads the texts among the context's feature levels.

        Raises:
            RecipeError: No tokenizer, or no level the text encoder could read.
        """
        assert isinstance(config, COBRAConfig)
        tokenizer = check_codes(config, tokenizer)
        config.level_sizes = list(tokenizer.level_sizes)
        texts = _item_texts(config, context) if config.has_vectors else None
        head = cls(config)
        head.take_codes(tokenizer, context)
        if texts is not None:
            (head.text_vectors if config.text_encoder == "embedding" else head.text_ids).copy_(texts)
        return head

    # Items -----------------------------------------------------------------------------------------------------------

    def encode(self, item_ids: Tensor) -> Tensor:
        """Item vectors v: [n] -> [n, D]."""
        texts = self.text_vectors if self.config.text_encoder == "embedding" else self.text_ids
        return self.encoder(texts[item_ids])

    def train(self, mode: bool = True) -> COBRAHead:
        """As ever; vectors of the catalogue are forgotten when training begins."""
        if mode:
            self._catalogue = None
        return super().train(mode)

    @torch.no_grad()
    def catalogue(self) -> tuple[Tensor, Tensor]:
        """Vectors [I+1, D] of all items without dropout, as they are and in float32 with length 1.

        They are kept as long as the encoder's parameters stay the same tensors in the same version.
        """
        weights = list(self.encoder.parameters())
        state = (self.codes.device, tuple((p.data_ptr(), p._version) for p in weights))
        if self._catalogue is None or self._catalogue[0] != state:
            training = self.encoder.training
            self.encoder.eval()
            items = torch.arange(self.config.num_items + 1, device=self.codes.device)
            vectors = torch.cat([self.encode(part) for part in items.split(_ITEMS)])
            self.encoder.train(training)
            self._catalogue = (state, vectors, F.normalize(vectors.float(), dim=-1))
        return self._catalogue[1], self._catalogue[2]

    # The decoder -----------------------------------------------------------------------------------------------------

    def embed(self, items: Tensor, vectors: Tensor | None) -> Tensor:
        """Decoder input [B, n * width, D] of items [B, n] with vectors [B, n, D]; padding gives some token."""
        codes = self.codes[items].clamp(min=0)
        sparse, dense = self.type_embedding.weight
        tokens = [table(codes[..., level]) + sparse for level, table in enumerate(self.code_embeddings)]
        if vectors is not None:
            tokens.append(self.item_norm(self.item_input(vectors)) + dense)
        x = torch.stack(tokens, 2).flatten(1, 2)
        return self.dropout(x + self.position_embedding.weight[: x.shape[1]])

    def decode(self, x: Tensor) -> Tensor:
        """Causal states [B, S, D] of tokens [B, S, D]."""
        for block in self.blocks:
            x = block(x, causal=True)
        return self.final_norm(x)

    def predictions(self, hidden: Tensor) -> Tensor:
        """States [B, n * width - 1, D] of n items without the last token -> [B, n - 1, width, D].

        Entry (t, j) has read items up to t and j tokens of item t + 1, and predicts token j of that item.
        """
        return hidden[:, self.config.width - 1 :].unflatten(1, (-1, self.config.width))

    def code_logits(self, states: Tensor, level: int) -> Tensor:
        """[..., D] -> [..., W_level] float32."""
        return self.code_outputs[level](states).float()

    def dense_vectors(self, states: Tensor) -> Tensor:
        """v^: [..., D] -> [..., D] float32 of length 1."""
        return F.normalize(self.dense_output(states).float(), dim=-1)

    # Training --------------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, total_steps: int) -> None:
        """Told before every optimizer step (0-based); the first `sparse_only_share` of them train the codes alone."""
        self._dense_weight = float(step >= self.config.sparse_only_share * total_steps)

    def forward(self, batch: SequenceBatch) -> HeadOutput:
        """L_sparse + L_dense, means over the supervised places."""
        items, wanted = self._with_targets(batch)
        distinct, place = items.unique(return_inverse=True)
        vectors = self.encode(distinct) if self.config.has_vectors else None
        hidden = self.decode(self.embed(items, None if vectors is None else vectors[place])[:, :-1])
        states = self.predictions(hidden)[wanted]  # [n, width, D]
        parts = {}
        if self.config.depth:
            parts["sparse"] = self.sparse_loss(states, items[:, 1:][wanted])
        if vectors is not None:
            parts["dense"] = self.dense_loss(states[:, -1], vectors, place[:, 1:][wanted])
        # Weighed, not left out: every step reaches the same parameters.
        loss = sum((self._dense_weight if name == "dense" else 1.0) * part for name, part in parts.items())
        return HeadOutput(
            loss=cast(Tensor, loss),
            parts={name: part.detach() for name, part in parts.items()},
            user_repr=gather_last(hidden, batch["lengths"] * self.config.width),
            count=len(states),
        )

    def _with_targets(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Histories with the target after the last item [B, L+1], and which of items 1.. are supervised [B, L]."""
        history = self._history(batch)
        targets, lengths = batch["targets"][:, : history.shape[1]], batch["lengths"]
        last = targets.gather(1, lengths[:, None] - 1)
        items = F.pad(history, (0, 1)).scatter(1, lengths[:, None], last)
        wanted = targets > 0
        if bool((wanted & (items[:, 1:] != targets)).any()):
            raise DataError(
                "a target is not the next item of its history",
                expected="windows: targets[:, t] == item_ids[:, t + 1], or 0 where nothing is supervised",
            )
        return items, wanted

    def _history(self, batch: SequenceBatch) -> Tensor:
        """Item ids without columns that are padding in every row."""
        longest = int(batch["lengths"].max())
        if longest > self.config.max_history:
            raise DataError(
                "a history is longer than the head was built for",
                found=f"{longest} items",
                expected=f"at most max_history = {self.config.max_history}",
            )
        return batch["item_ids"][:, :longest]

    def sparse_loss(self, states: Tensor, items: Tensor) -> Tensor:
        """Mean cross-entropy over places and levels: states [n, width, D] before the codes of items [n]."""
        codes, depth = self.codes[items], self.config.depth
        losses = [
            F.cross_entropy(self.code_logits(states[:, level], level), codes[:, level], reduction="sum")
            for level in range(depth)
        ]
        return torch.stack(losses).sum() / max(1, len(items) * depth)

    def dense_loss(self, states: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
        """In-batch softmax over the distinct targets.

        Args:
            states: [n, D] states that predict the vectors.
            vectors: [m, D] of distinct items.
            rows: [n] row of `vectors` that each place should predict.
        """
        pool, label = rows.unique(return_inverse=True)
        targets = vectors[pool].detach() if self.config.detach_dense_target else vectors[pool]
        logits = self.dense_vectors(states) @ F.normalize(targets.float(), dim=-1).T / self.config.dense_temperature
        return F.cross_entropy(logits, label, reduction="sum") / max(1, len(rows))

    # Recommending ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def recommend(
        self,
        batch: SequenceBatch,
        k: int,
        *,
        beams: int | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Ranking:
        """The k best items with log Phi as score (cosines in mode "dense", log-probabilities in mode "sparse").

        With `candidates`, beams and neighbours are so many that every candidate is scored.
        """
        prefix, seen, candidates = self._read(batch), batch.get("seen"), batch.get("candidates")
        if self.config.mode == "dense":
            cosines = self.dense_vectors(prefix.last) @ self.catalogue()[1].T
            if candidates is not None:
                cosines = cosines.gather(1, candidates)
            return Ranking(*top_items(cosines, k, seen=seen, candidates=candidates))
        pool = 0 if candidates is None else candidates.shape[1]
        width = max(beams if beams is not None else self.config.beams, k, pool)
        speaker = _Speaker(self, prefix)
        if self.config.mode == "sparse":
            return Ranking(*recommend_codes(self.trie, speaker, k, width, seen=seen, candidates=candidates))
        alive = alive_nodes(self.trie, seen, candidates)
        found = beam_search(self.trie, speaker, width, alive=alive)
        allowed = allowed_items(self.config.num_items, seen, candidates)
        items, cosines = self._neighbours(speaker, found.leaves, allowed)
        scores = self._fused(found.scores, cosines, k, max(self.config.neighbours, pool))
        return Ranking(*top_items(scores.flatten(1), k, candidates=items.flatten(1)))

    @torch.no_grad()
    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32 scores of the candidates, as in `recommend`; -inf at padding."""
        candidates = batch["candidates"]
        given = cast("SequenceBatch", {name: value for name, value in batch.items() if name != "seen"})
        found = self.recommend(given, candidates.shape[1])
        scores = found.scores.new_full((len(candidates), self.config.num_items + 1), float("-inf"))
        return scores.scatter(1, found.item_ids, found.scores).gather(1, candidates)

    def _read(self, batch: SequenceBatch) -> _Prefix:
        """The decoder's state after the histories."""
        items, lengths = self._history(batch), batch["lengths"]
        x = self.embed(items, self.catalogue()[0][items] if self.config.has_vectors else None)
        mask = padding_mask(lengths * self.config.width, x.shape[1])
        memories = []
        for block in cast("list[_Block]", self.blocks):
            memories.append(block.memory(x))
            x = block(x, memories[-1], causal=True)
        last = gather_last(self.final_norm(x), lengths * self.config.width)
        return _Prefix(memories, mask, last, lengths * self.config.width)

    def _neighbours(self, speaker: _Speaker, leaves: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """All items of the leaves [B, M] a row may get, nearest first: ids and cosines [B, M, w], 0 and -inf beyond."""
        items, real = self.trie.items(leaves)
        wanted = speaker.vectors(self.codes[items[..., 0]].clamp(min=0))
        if allowed is not None:
            real = real & allowed.gather(1, items.flatten(1)).view_as(real)
        unit = self.catalogue()[1]
        cosines = torch.full(items.shape, float("-inf"), device=items.device)
        # Only real pairs are compared: the width of the table is that of the fullest code.
        for pairs in real.nonzero().split(_PAIRS):
            row, beam, place = pairs.unbind(1)
            cosines[row, beam, place] = (wanted[row, beam] * unit[items[row, beam, place]]).sum(-1)
        cosines, order = cosines.sort(dim=-1, descending=True, stable=True)
        return items.masked_fill(~real, 0).gather(2, order), cosines

    def _fused(self, codes: Tensor, cosines: Tensor, k: int, neighbours: int) -> Tensor:
        """Scores [B, M, w] of neighbours that stand nearest first; see `beam_fusion`."""
        if self.config.mode == "no_fusion":  # cosines differ by 2 at most, codes by 3
            dead = torch.isneginf(codes)[..., None] | torch.isneginf(cosines)
            rank = torch.arange(codes.shape[1], device=codes.device)[None, :, None]
            return (cosines - 3.0 * rank).masked_fill(dead, float("-inf"))
        fuse = partial(beam_fusion, codes, tau=self.config.tau, psi=self.config.psi, domain=self.config.dense_softmax)
        fused = fuse(cosines[..., :neighbours])
        if neighbours >= k or neighbours >= cosines.shape[2]:
            return torch.cat([fused, torch.full_like(cosines[..., neighbours:], float("-inf"))], 2)
        # log Phi is 0 at most, so that added to the lowest fused score it stays behind all of them.
        spare = fuse(cosines[..., neighbours:])
        lowest = fused.masked_fill(torch.isneginf(fused), float("inf")).flatten(1).amin(1)
        return torch.cat([fused, spare + lowest.masked_fill(torch.isposinf(lowest), 0.0)[:, None, None]], 2)


def beam_fusion(codes: Tensor, cosines: Tensor, *, tau: float, psi: float, domain: Domain) -> Tensor:
    """log Phi(k, a) = log softmax_k(tau phi_k) + log softmax_a(psi cos(v^_k, a)); source: COBRA, BeamFusion.

    Args:
        codes: [B, M] phi, -inf where a beam is dead.
        cosines: [B, M, N], -inf where a code has fewer neighbours.
        tau: Sharpness over codes.
        psi: Sharpness over items.
        domain: The second softmax is over all M x N ("global") or over the N of each code ("cluster").

    Returns:
        [B, M, N] float32, -inf where there is nothing.
    """
    nothing = float("-inf")
    dead, missing = torch.isneginf(codes), torch.isneginf(cosines)
    missing = missing | dead[..., None]
    across = (tau * codes.masked_fill(dead, 0.0)).masked_fill(dead, nothing).log_softmax(-1)
    inside = (psi * cosines.masked_fill(missing, 0.0)).masked_fill(missing, nothing)
    inside = inside - inside.logsumexp((1, 2) if domain == "global" else 2, keepdim=True)
    return (across[..., None] + inside).masked_fill(missing, nothing)  # also where a softmax was over nothing


# Layers --------------------------------------------------------------------------------------------------------------

Memory = tuple[Tensor, Tensor]
"""Keys and values [B, H, S, d_h]."""


class _Block(nn.Module):
    """Pre-norm attention and feed-forward layer of decoder and light text encoder."""

    def __init__(self, config: COBRAConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.rate = config.num_heads, config.dropout
        self.attention_norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.inner = FeedForward(width, config.d_ff, activation="gelu", dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def memory(self, x: Tensor) -> Memory:
        """Keys and values of tokens [B, S, D]."""
        keys, values = self.key_value(self.attention_norm(x)).chunk(2, -1)
        return self._split(keys), self._split(values)

    def forward(
        self, x: Tensor, memory: Memory | None = None, *, causal: bool = False, key_mask: Tensor | None = None
    ) -> Tensor:
        """[B, L, D] over a memory (their own where none is given) -> [B, L, D]."""
        keys, values = self.memory(x) if memory is None else memory
        query, rate = self._split(self.query(self.attention_norm(x))), self.rate if self.training else 0.0
        return self._finish(x, attend(query, keys, values, causal=causal, key_mask=key_mask, dropout=rate))

    def step(self, x: Tensor, prefix: Memory, mask: Tensor, own: Memory) -> tuple[Tensor, Memory]:
        """One token for each of M beams that share a prefix, which is not copied.

        Args:
            x: [B, M, D].
            prefix: Of the history, [B, H, S, d_h].
            mask: [B, S] bool, True at real tokens of the history.
            own: Of the beams' tokens so far, [B, H, M, j, d_h].

        Returns:
            [B, M, D], and the beams' memory with this token, [B, H, M, j + 1, d_h].
        """
        query = self._split(self.query(self.attention_norm(x)))  # [B, H, M, d_h]
        new = self.memory(x)
        keys, values = (torch.cat([old, token.unsqueeze(3)], 3) for old, token in zip(own, new, strict=True))
        before = (query @ prefix[0].transpose(-1, -2)).masked_fill(~mask[:, None, None], float("-inf"))
        logits = torch.cat([before, (keys @ query.unsqueeze(-1)).squeeze(-1)], -1)
        weights = (logits * query.shape[-1] ** -0.5).softmax(-1)
        length = mask.shape[1]
        mixed = weights[..., :length] @ prefix[1] + (weights[..., None, length:] @ values).squeeze(-2)
        return self._finish(x, mixed), (keys, values)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return x + self.inner(self.inner_norm(x))

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, H, S, d_h]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _LightEncoder(nn.Module):
    """Token ids [n, L_txt] (0 = padding) -> state [n, D] of a [CLS] token in front of them."""

    def __init__(self, config: COBRAConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.text_vocab, config.hidden_size)
        self.places = nn.Embedding(config.text_length + 1, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.text_layers))
        self.norm, self.dropout = nn.LayerNorm(config.hidden_size), nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        used = (ids > 0).any(0).nonzero()
        ids = F.pad(ids[:, : int(used.max()) + 1 if len(used) else 0], (1, 0))
        mask = ids > 0
        mask[:, 0] = True
        x = self.dropout(self.tokens(ids) + self.places.weight[: ids.shape[1]])
        for block in self.blocks[:-1]:
            x = block(x, key_mask=mask)
        last = cast(_Block, self.blocks[-1])
        return self.norm(last(x[:, :1], last.memory(x), key_mask=mask).squeeze(1))


class _EmbeddingEncoder(nn.Module):
    """Frozen vectors [n, d_text] of a sentence encoder -> [n, D]."""

    def __init__(self, config: COBRAConfig) -> None:
        super().__init__()
        self.input_norm, self.norm = nn.LayerNorm(config.text_width), nn.LayerNorm(config.hidden_size)
        self.inner = nn.Linear(config.text_width, config.d_ff)
        self.output = nn.Linear(config.d_ff, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.norm(self.output(self.dropout(F.gelu(self.inner(self.input_norm(vectors))))))


def _item_texts(config: COBRAConfig, context: DataContext) -> Tensor:
    """What the text encoder reads, and its sizes noted in the config.

    Token ids are numbered anew by those that occur: a catalogue uses a small part of a tokenizer's vocabulary.
    """
    levels = context.item_features
    kind = config.text_encoder or ("light" if TOKENS in levels else "embedding")
    name = TOKENS if kind == "light" else VECTORS
    if name not in levels:
        raise RecipeError(
            f"head cobra reads the texts of items: found the feature levels {', '.join(sorted(levels)) or '(none)'}, "
            f"expected {TOKENS!r} (text_encoder: light) or {VECTORS!r} (text_encoder: embedding); add it to "
            "item_features"
        )
    values, mask = levels[name]
    if len(values) != config.num_items + 1:
        raise RecipeError(
            f"item feature level {name!r}: found {len(values) - 1:,} items, expected {config.num_items:,}"
        )
    config.text_encoder = kind
    values = np.where(np.asarray(mask)[:, None], values, 0)
    if kind == "embedding":
        config.text_width = values.shape[1]
        return torch.from_numpy(values.astype(np.float32))
    if (values < 0).any() or (values != np.rint(values)).any():
        raise RecipeError(f"item feature level {name!r}: expected token ids, whole numbers from 0 (padding)")
    known, numbers = np.unique(np.append(values.ravel(), 0), return_inverse=True)
    config.text_vocab, config.text_length = len(known), values.shape[1]
    return torch.from_numpy(numbers[:-1].reshape(values.shape).astype(np.int32))


# Decoding ------------------------------------------------------------------------------------------------------------


@dataclass
class _Prefix:
    """Histories the decoder has read: memory per layer, mask [B, S], last state [B, D], tokens [B] of each row."""

    memories: list[Memory]
    mask: Tensor
    last: Tensor
    length: Tensor


class _Speaker:
    """`CodeSpeaker` over the decoder: histories are read once, each beam keeps only its own tokens.

    Args:
        head: The head.
        prefix: The histories.
    """

    def __init__(self, head: COBRAHead, prefix: _Prefix) -> None:
        self.head, self.prefix = head, prefix
        self.path = torch.zeros(len(prefix.last), 1, dtype=torch.long, device=prefix.last.device)
        self.own: list[Memory] = [
            (keys.new_zeros(*keys.shape[:2], 1, 0, keys.shape[3]),) * 2 for keys, _ in prefix.memories
        ]

    def first(self) -> Tensor:
        """[B, W_0]."""
        return self.head.code_logits(self.prefix.last, 0)

    def following(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """[B, M, W_level]."""
        return self.head.code_logits(self._step(level - 1, codes, parents), level)

    def vectors(self, codes: Tensor) -> Tensor:
        """v^ [B, M, D] of finished codes [B, M, C] whose last token was not read yet; call it once, at the end.

        Which beam a code continues is found by its path, the number its earlier codes spell.
        """
        path = torch.zeros_like(codes[..., 0])
        for level in range(codes.shape[-1] - 1):
            path = self._spelled(path, codes[..., level], level)
        known, order = self.path.sort(dim=1)
        place = torch.searchsorted(known, path.contiguous()).clamp(max=known.shape[1] - 1)
        states = self._step(codes.shape[-1] - 1, codes[..., -1], order.gather(1, place))
        return self.head.dense_vectors(states)

    def _spelled(self, path: Tensor, codes: Tensor, level: int) -> Tensor:
        return path * (self.head.config.level_sizes or [1])[level] + codes

    def _step(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """States [B, M, D] after the token of `level`: codes [B, M] of beams that continue `parents` [B, M]."""
        head, prefix = self.head, self.prefix
        place = head.position_embedding(prefix.length + level)[:, None]
        x = head.code_embeddings[level](codes) + head.type_embedding.weight[0] + place
        rows = torch.arange(len(codes), device=codes.device)[:, None]
        for number, block in enumerate(cast("list[_Block]", head.blocks)):
            keys, values = (old.transpose(1, 2)[rows, parents].transpose(1, 2) for old in self.own[number])
            x, self.own[number] = block.step(x, prefix.memories[number], prefix.mask, (keys, values))
        self.path = self._spelled(self.path.gather(1, parents), codes, level)
        return head.final_norm(x)


register(COBRAConfig, COBRAHead)
