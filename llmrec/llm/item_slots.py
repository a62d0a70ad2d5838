"""The dense style: projected item vectors in, scores over the item table out, every position supervised.

    input   [instruction tokens] p(i_1) ... p(i_L)           p: projector of item vector, encoder state, or both
    output  r_t = W norm(h_t) (+ s_t)      h_t last hidden state at slot t, s_t encoder state (option residual)
    score   scale * r_t . v_j + b_j                           v_j frozen item vector (dot or cosine), b_j optional

E4SRec feeds linearly projected item vectors between an instruction and a response text and scores the catalogue once,
from the last position. Ours: every position is supervised (a sequence of L items trains L predictions in one pass), the
output is compared with the frozen item table instead of a free matrix of I rows, there is no text after the slots, and
h_t is brought to unit size first, so that learning rates do not depend on the base model.

Gates are per position and causal: the gate of slot t comes from the encoder's state after event t. Instruction tokens
stand before every event and get a constant: the zero vector (finished gates: uniform weights), the same for all users.
Batches are right padded, so causal attention alone keeps padding out of real positions and no mask is passed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.blocks.readout import gather_last, top_items
from llmrec.data.schema import Ranking
from llmrec.errors import DataError, RecipeError
from llmrec.llm.backbone import GateArguments
from llmrec.llm.recommender import LLMRecommender, RecommenderOptions, expect_dims, latest

if TYPE_CHECKING:
    from llmrec.data.schema import SequenceBatch

COSINE_SCALE = 14.0
"""Initial factor of cosine scores without a residual: a temperature of about 0.07."""


class ItemSlotRecommender(LLMRecommender):
    """See the module; a `CatalogueScorer` and a `DenseScorer`. Arguments are those of the base class.

    Raises:
        RecipeError: States, residual or an instruction are asked for and the encoder or tokenizer is missing.
    """

    prefix_ids: Tensor

    def __init__(
        self,
        model: nn.Module,
        item_table: Tensor,
        options: RecommenderOptions,
        encoder: nn.Module | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(model, item_table, options, encoder, tokenizer)
        self._check_parts()
        device = self.item_table.device
        prefix = list(tokenizer(options.instruction)["input_ids"]) if options.instruction else []
        self.register_buffer("prefix_ids", torch.tensor(prefix, dtype=torch.long, device=device))
        self._item_unit = float(self.item_table[1:].pow(2).mean().clamp(min=1e-12).rsqrt())
        vectors = self._probe_vectors()
        self.projector = self._new_projector(vectors.shape[1], vectors)
        self.output_head = nn.Linear(self.backbone.width, self.d_item, device=device)
        nn.init.zeros_(self.output_head.bias)
        if options.residual:
            nn.init.zeros_(self.output_head.weight)
        self.similarity = options.similarity or (self.encoder.config.similarity if options.residual else "dot")
        self.scale = nn.Parameter(torch.tensor(self._first_scale(), device=device), requires_grad=options.learn_scale)
        self.item_bias = nn.Parameter(torch.zeros(len(item_table), device=device)) if options.item_bias else None

    def _check_parts(self) -> None:
        options = self.options
        if self.encoder is None and (options.residual or options.slot_content != "item"):
            raise RecipeError("prompt: residual and slot_content state or both need an encoder, found none")
        if options.instruction and self.tokenizer is None:
            raise RecipeError("prompt.instruction: found a text but no tokenizer; expected the base model's tokenizer")
        if options.residual and int(self.encoder.gate_dim) != self.d_item:
            raise RecipeError(
                f"prompt.residual: found encoder states of width {self.encoder.gate_dim} and item vectors of width "
                f"{self.d_item}, expected equal widths"
            )

    def _probe_vectors(self) -> Tensor:
        """[I+1, d_in] vectors like those the projector will see: its scales are set on them."""
        parts = []
        if self.options.slot_content != "state":
            parts.append(self.item_table * self._item_unit)
        if self.options.slot_content != "item":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(len(self.item_table), int(self.encoder.gate_dim), generator=generator)
            parts.append(noise.to(self.item_table.device))
        return torch.cat(parts, dim=-1)

    def _first_scale(self) -> float:
        if self.options.residual:
            return 1.0 / float(self.encoder.config.temperature)
        if self.similarity == "cosine":
            return COSINE_SCALE
        return 1.0 / float(self.item_table[1:].norm(dim=-1).mean().clamp(min=1e-12))

    # Forward ---------------------------------------------------------------------------------------------------------

    def represent(self, batch: SequenceBatch) -> Tensor:
        """[B, L, d_item] float32 outputs, ready for `score`; places of padding hold no meaning."""
        if batch["item_ids"].shape[1] > self.options.max_history:
            raise DataError(
                "the batch is longer than the recommender's histories",
                found=f"{batch['item_ids'].shape[1]} events",
                expected=f"at most max_history = {self.options.max_history}",
                remedy="make the batch with `collate`, or raise max_history",
            )
        states = self._states(batch)
        slots = self._slots(batch["item_ids"], states)
        prefix = self.backbone.embed(self.prefix_ids).expand(len(slots), -1, -1)
        embeds = torch.cat([prefix, slots.to(prefix.dtype)], dim=1)
        hidden = self.backbone(embeds, gates=self._gates(batch, states)).last_hidden_state[:, len(self.prefix_ids) :]
        with torch.autocast(hidden.device.type, enabled=False):
            output = self.output_head(F.rms_norm(hidden.float(), hidden.shape[-1:]))
        if self.options.residual:
            assert states is not None
            output = output + states
        return output

    @torch.no_grad()
    def _states(self, batch: SequenceBatch) -> Tensor | None:
        """[B, L, d] causal encoder states, when anything here reads them."""
        if self.options.residual or self.options.slot_content != "item":
            return self.encoder.position_representations(batch).float()
        if self.backbone.gate_kind == "user_repr" and "user_repr" not in batch:
            return self.encoder.position_representations(batch).float()
        return None

    def _slots(self, item_ids: Tensor, states: Tensor | None) -> Tensor:
        parts = []
        if self.options.slot_content != "state":
            parts.append(self.item_table[item_ids] * self._item_unit)
        if self.options.slot_content != "item":
            assert states is not None
            parts.append(F.rms_norm(states, states.shape[-1:]))
        with torch.autocast(self.item_table.device.type, enabled=False):
            return self.projector(torch.cat(parts, dim=-1))

    def _gates(self, batch: SequenceBatch, states: Tensor | None) -> GateArguments:
        """Gates for every input token: {"user_repr": [B, S, gate_dim]} or {"gates": [B, S, E]}."""
        kind = self.backbone.gate_kind
        if kind is None:
            return {}
        expected = "one gate per position, [B, L, width]: a gate per sequence would show later items to earlier places"
        if kind == "gates":
            # An encoder with one answer per sequence in `gates` has its causal ones beside it.
            source = getattr(self.encoder, "position_gates", self.encoder.gates)
            with torch.no_grad():
                value = expect_dims(source(batch), 3, expected)
            before = value.new_full((len(value), len(self.prefix_ids), value.shape[-1]), 1.0 / value.shape[-1])
        else:
            given = batch.get("user_repr")
            value = expect_dims(states if given is None else given, 3, expected)  # type: ignore[arg-type]
            before = value.new_zeros(len(value), len(self.prefix_ids), value.shape[-1])
        return {kind: torch.cat([before, value], dim=1)}

    # Scoring ---------------------------------------------------------------------------------------------------------

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """[..., d_item] -> [..., I+1] float32; with item_ids [..., C] or [C] -> [..., C]. Padding is not masked."""
        table = self.item_table if item_ids is None else self.item_table[item_ids]
        user_repr = user_repr.float()
        if self.similarity == "cosine":
            user_repr, table = F.normalize(user_repr, dim=-1), F.normalize(table, dim=-1)
        with torch.autocast(table.device.type, enabled=False):
            shared = table.dim() == 2
            scores = user_repr @ table.T if shared else (table * user_repr.unsqueeze(-2)).sum(-1)
        scores = scores * self.scale
        if self.item_bias is not None:
            scores = scores + (self.item_bias if item_ids is None else self.item_bias[item_ids])
        return scores

    def _last(self, batch: SequenceBatch) -> Tensor:
        return gather_last(self.represent(batch), batch["lengths"])

    def score_items(self, batch: SequenceBatch) -> Tensor:
        """[B, I+1] float32, column 0 -inf; seen items are not masked here."""
        scores = self.score(self._last(batch))
        return scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), float("-inf"))

    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32, -inf at padding candidates."""
        scores = self.score(self._last(batch), batch["candidates"])
        return scores.masked_fill(batch["candidates"] == 0, float("-inf"))

    def recommend(self, batch: SequenceBatch, k: int) -> Ranking:
        """The k best items per row; honours `seen` and `candidates`."""
        candidates = batch.get("candidates")
        scores = self.score_items(batch) if candidates is None else self.score_candidates(batch)
        return Ranking(*top_items(scores, k, seen=batch.get("seen"), candidates=candidates))  # type: ignore[arg-type]

    def collate(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        """A right padded batch of the latest `max_history` events of each row."""
        from llmrec.data.sequences import SequenceCollator

        return SequenceCollator(with_seen=True)(latest(rows, self.options.max_history))
