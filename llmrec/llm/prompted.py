"""The styles in words: a prompt in, the title of the next item out.

    text     titles only
    hybrid   beside each title stands a slot that holds the item's projected vector (LLaRA, iLoRA: behind it)

Training takes the cross-entropy of the answer's tokens; logits are made at those places only. Recommending either
scores candidates by the likelihood of their titles (`score_candidates`; every language model can, and nothing is lost
to invalid answers), or lets the model write (`recommend`) and looks the title up.

Gates are one per sequence, from the encoder's state after the last event: a prompt has one answer, which stands behind
everything the gate has seen. A slot of the user (`USER_SLOT`) holds the projection of that same state.

Two options are ours. A slot may stand in front of its title: the token behind the slot is then the first one to write,
and a model that picks an item by its slot only has to copy what follows. And a slot may hold the encoder's score of the
item for this history beside its vector (`slot_content: score`), in standard deviations over the catalogue.

LLaRA's curriculum (option) starts with text-only batches; hybrid ones become likelier from step to step (`begin_step`).
A text-only batch gives the projector a gradient of zero rather than none, so that data-parallel
training finds every parameter used; LLaRA freezes the projector on such batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.data.instructions import curriculum_is_hybrid, text_mode
from llmrec.data.prompt_encoder import IGNORED
from llmrec.data.prompts import USER_SLOT
from llmrec.data.schema import Ranking
from llmrec.errors import DataError, RecipeError
from llmrec.llm.decoding import TitleIndex
from llmrec.llm.packing import check_isolation, packed_states
from llmrec.llm.projector import ItemProjector
from llmrec.llm.recommender import LLMRecommender, RecommenderOptions, latest
from llmrec.llm.rendering import PromptRenderer
from llmrec.llm.scoring import Prefilled, answer_log_probs, pad_answers, prefill

if TYPE_CHECKING:
    import numpy as np

    from llmrec.data.schema import SequenceBatch

__all__ = ["PromptRecommender", "PromptRenderer", "Renderer"]


class EncodedText(Protocol):
    """A prompt as tokens."""

    input_ids: np.ndarray
    item_slots: np.ndarray


class Renderer(Protocol):
    """What writes prompts: `PromptRenderer`, or any `PromptEncoder`."""

    titles: Sequence[str]

    def encode(self, history: Sequence[int], candidates: Sequence[int] = ()) -> EncodedText:
        """The prompt for a history, without answer; candidates are given when `options.candidates` says so."""
        ...

    def answer_ids(self, item: int) -> list[int]:
        """Tokens of an item's title with the terminator."""
        ...


class PromptRecommender(LLMRecommender):
    """See the module; an `AnswerModel` and a `CandidateScorer`.

    Args:
        renderer: Writes prompts and answers.
        model, item_table, options, encoder, tokenizer: See the base class.

    Raises:
        RecipeError: The tokenizer is missing, or a user slot is asked for without an encoder.
    """

    def __init__(
        self,
        model: nn.Module,
        item_table: Tensor,
        options: RecommenderOptions,
        encoder: nn.Module | None = None,
        tokenizer: Any = None,
        renderer: Renderer | None = None,
    ) -> None:
        super().__init__(model, item_table, options, encoder, tokenizer)
        if tokenizer is None:
            raise RecipeError(f"prompt.style {options.style}: found no tokenizer; expected the base model's")
        self.renderer = renderer
        hybrid = options.style == "hybrid"
        self._item_unit = float(self.item_table[1:].pow(2).mean().clamp(min=1e-12).rsqrt()) if hybrid else 1.0
        self.projector = self._new_item_projector() if hybrid else None
        self.user_projector = self._new_user_projector() if hybrid and options.user_slot else None
        self._titles: TitleIndex | None = None
        self._text_now = False

    def _new_item_projector(self) -> ItemProjector:
        if self.options.slot_content == "item":
            return self._new_projector(self.d_item, self.item_table)
        if self.encoder is None:
            raise RecipeError("prompt.slot_content score: found no encoder; expected the one whose scores fill slots")
        scores = torch.randn(len(self.item_table), 1, generator=torch.Generator().manual_seed(0))
        probe = self._with_scores(self.item_table, scores.to(self.item_table.device))
        return self._new_projector(self.d_item + 1, probe)

    def _new_user_projector(self) -> ItemProjector:
        if self.encoder is None:
            raise RecipeError(
                "prompt.slots: found user but no encoder; expected the encoder whose state fills the slot"
            )
        width = int(self.encoder.gate_dim)
        probe = torch.randn(512, width, generator=torch.Generator().manual_seed(0))
        return self._new_projector(width, probe.to(self.item_table.device))

    # Training --------------------------------------------------------------------------------------------------------

    packing = False

    def use_packing(self) -> None:
        """From now on several prompts share a row in `answer_loss`; see `llmrec.llm.packing`.

        Raises:
            RecipeError: Examples of one row would see each other in this model.
        """
        check_isolation(self.backbone)
        self.packing = True

    def begin_step(self, step: int, total_steps: int) -> None:
        """Tell the recommender where training stands; with `curriculum` it decides whether this step sees slots.

        Args:
            step: Optimizer steps done so far, the same in every process and after a resume.
            total_steps: Optimizer steps of the stage.
        """
        self._text_now = self.options.curriculum and not curriculum_is_hybrid(step, total_steps)

    def answer_loss(self, batch: SequenceBatch) -> Tensor:
        """Mean cross-entropy over the answer tokens of the batch, a scalar.

        Raises:
            DataError: No token of the batch is supervised.
        """
        if self._text_now and self.training:
            on_left = bool((batch["attention_mask"][:, -1] == 1).all())
            batch = text_mode(batch, "left" if on_left else "right")
        labels = batch["token_labels"][:, 1:]
        wanted = labels != IGNORED
        if not bool(wanted.any()):
            raise DataError("no token of the batch is part of an answer", remedy="raise prompt.max_length")
        hidden = self._hidden(batch)[:, :-1]
        loss = F.cross_entropy(self.backbone.logits(hidden[wanted]), labels[wanted])
        return loss + self._unused(batch)

    def _hidden(self, batch: SequenceBatch) -> Tensor:
        mask: Tensor | None = batch["attention_mask"]
        assert mask is not None
        if self.packing:
            return packed_states(self.backbone, self.embed(batch), mask, self.sequence_gates(batch))
        if bool((mask[:, 1:] <= mask[:, :-1]).all()):
            mask = None  # padding on the right: causal attention keeps it out, and without a mask it is faster
        return self.backbone(self.embed(batch), mask, self.sequence_gates(batch)).last_hidden_state

    def embed(self, batch: SequenceBatch) -> Tensor:
        """[B, S, d_llm] token embeddings with the vectors of items and users in their slots."""
        embeds = self.backbone.embed(batch["input_ids"])
        slots = batch.get("item_slots")
        if slots is None or not bool((slots != 0).any()):
            return embeds
        embeds = self._fill(embeds, slots > 0, self._item_vectors(batch, slots))
        of_user = slots == USER_SLOT
        if bool(of_user.any()):
            embeds = self._fill(embeds, of_user, self._user_vectors(batch, of_user))
        return embeds

    @staticmethod
    def _fill(embeds: Tensor, places: Tensor, vectors: Tensor) -> Tensor:
        return embeds.masked_scatter(places.unsqueeze(-1), vectors.to(embeds.dtype))

    def _item_vectors(self, batch: SequenceBatch, slots: Tensor) -> Tensor:
        """[N, d_llm] for the N item slots of the batch, row by row."""
        if self.projector is None:
            raise DataError(
                "the batch has item slots, the recommender has no projector",
                found="style text",
                expected="prompts without slots",
                remedy="set prompt.style: hybrid",
            )
        with torch.autocast(slots.device.type, enabled=False):
            vectors = self.item_table[slots[slots > 0]]
            if self.options.slot_content == "score":
                vectors = self._with_scores(vectors, self._scores(batch, slots))
            return self.projector(vectors)

    @torch.no_grad()
    def _scores(self, batch: SequenceBatch, slots: Tensor) -> Tensor:
        """[N, 1] the encoder's scores of the items in slots, in standard deviations over the catalogue."""
        scores = self.encoder.score_items(batch).float()
        real = scores[:, 1:]
        scores = (scores - real.mean(1, keepdim=True)) / real.std(1, keepdim=True).clamp(min=1e-12)
        return scores[(slots > 0).nonzero()[:, 0], slots[slots > 0]].unsqueeze(-1)

    def _with_scores(self, vectors: Tensor, scores: Tensor) -> Tensor:
        """[N, d_item + 1]: one number beside d_item others would drown, so it gets a fifth of the whole power."""
        return torch.cat([vectors * self._item_unit, scores * (self.d_item**0.5 / 2)], dim=-1)

    def _user_vectors(self, batch: SequenceBatch, places: Tensor) -> Tensor:
        if self.user_projector is None:
            raise DataError("the batch has user slots, which were not announced", remedy="build with user_slot=True")
        with torch.no_grad():
            given = batch.get("user_repr")
            state = self.encoder.user_representation(batch) if given is None else given
        state = F.rms_norm(state.float(), state.shape[-1:])
        with torch.autocast(state.device.type, enabled=False):
            return self.user_projector(state)[places.nonzero()[:, 0]]

    def _unused(self, batch: SequenceBatch) -> Tensor | float:
        """Zero, with a gradient of zero for projectors the batch has no slot for. They are called, not read: a launcher
        may have divided their weights."""
        slots = batch.get("item_slots")
        idle: Tensor | float = 0.0
        for projector, used in (
            (self.projector, slots is not None and bool((slots > 0).any())),
            (self.user_projector, slots is not None and bool((slots == USER_SLOT).any())),
        ):
            if projector is not None and not used:
                idle = idle + 0.0 * projector(self.item_table.new_zeros(1, projector.d_item)).sum()
        return idle

    # Recommending ----------------------------------------------------------------------------------------------------

    def collate(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        """Left padded prompts without answers, with the encoder's own fields beside them."""
        from llmrec.data.sequences import SequenceCollator

        rows = latest(rows, self.options.max_history)
        batch = SequenceCollator(with_seen=True)(rows)
        prompts = [self._renderer.encode(row["item_ids"], self._shown(row)) for row in rows]
        width = max(len(prompt.input_ids) for prompt in prompts)
        shape = (len(prompts), width)
        ids = torch.full(shape, int(self.tokenizer.pad_token_id or 0), dtype=torch.long)
        mask, slots = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            start = width - len(prompt.input_ids)
            ids[row, start:] = torch.from_numpy(prompt.input_ids)
            slots[row, start:] = torch.from_numpy(prompt.item_slots)
            mask[row, start:] = 1
        batch["input_ids"], batch["attention_mask"], batch["item_slots"] = ids, mask, slots  # type: ignore[typeddict-item]
        return batch

    def _shown(self, row: dict[str, Any]) -> Sequence[int]:
        """Candidates that stand in the prompt: those of the row, when prompts list candidates at all."""
        wanted = getattr(getattr(self._renderer, "options", None), "candidates", None)
        if wanted is not None and "candidates" not in row:
            raise DataError(
                f"prompts list {wanted} candidates, the question has none",
                expected=f"a candidate list, as in the protocol candidates-{wanted}",
                remedy="evaluate with candidates, or train with prompt.candidates: null",
            )
        return row["candidates"] if wanted is not None else ()

    @property
    def _renderer(self) -> Renderer:
        if self.renderer is None:
            raise RecipeError(f"style {self.options.style} needs a renderer of prompts to recommend; build it with one")
        return self.renderer

    @torch.no_grad()
    def prefill(self, batch: SequenceBatch) -> Prefilled:
        """Read the prompts of a left padded batch once."""
        return prefill(self.backbone, self.embed(batch), batch["attention_mask"], self.sequence_gates(batch))

    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32: log-likelihood of each candidate's title, per token with `length_normalise`; -inf at padding.

        Args:
            batch: From `collate`, with `candidates` [B, C].
        """
        pool = batch["candidates"]
        answers = [[self._renderer.answer_ids(item) if item else [] for item in row] for row in pool.tolist()]
        tokens, lengths = pad_answers(answers, pool.device)
        scores = answer_log_probs(self.backbone, self.prefill(batch), tokens, lengths)
        if self.options.length_normalise:
            scores = scores / lengths.clamp(min=1)
        return scores.masked_fill(pool == 0, float("-inf"))

    def generate(self, batch: SequenceBatch, answers: int = 1) -> tuple[list[list[str]], Tensor]:
        """What the model writes.

        Args:
            batch: From `collate`.
            answers: Answers per row: greedy for 1, the best beams for more.

        Returns:
            Texts [B][answers], best first, and their scores [B, answers] (0 for greedy answers).
        """
        sample = self._renderer.answer_ids(1)
        ends = sorted({int(i) for i in (sample[-1], self.tokenizer.eos_token_id) if i is not None})
        output = self.backbone.generate(
            self.embed(batch),
            batch["attention_mask"],
            self.sequence_gates(batch),
            max_new_tokens=self.options.max_new_tokens,
            num_beams=answers,
            num_return_sequences=answers,
            eos_token_id=ends,
            pad_token_id=int(self.tokenizer.pad_token_id or 0),
        )
        rows = len(batch["input_ids"])
        texts = self.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        scores = getattr(output, "sequences_scores", None)
        values = output.sequences.new_zeros((rows, answers), dtype=torch.float32) if scores is None else scores.float()
        return [texts[row * answers : (row + 1) * answers] for row in range(rows)], values.view(rows, answers)

    def recommend(self, batch: SequenceBatch, k: int) -> Ranking:
        """Let the model write k answers per row and look them up; an answer that names no allowed item is invalid.

        Greedy for k = 1, beam search beyond. Rank a whole list of candidates with `score_candidates` instead.
        """
        if self._titles is None:
            self._titles = TitleIndex(self._renderer.titles)
        texts, beams = self.generate(batch, k)
        rows = len(texts)
        items = torch.zeros(rows, k, dtype=torch.long)
        scores = torch.full((rows, k), float("-inf"))
        for row in range(rows):
            allowed, seen = self._allowed(batch, row)
            place = 0
            for text, score in zip(texts[row], beams[row].tolist(), strict=True):
                item = self._titles.item(text, allowed)
                if item and item not in seen:
                    items[row, place], scores[row, place] = item, score
                    seen.add(item)
                    place += 1
        device = batch["input_ids"].device
        items = items.to(device)
        return Ranking(items, scores.to(device), items > 0, [answer[0] for answer in texts])  # type: ignore[arg-type]

    @staticmethod
    def _allowed(batch: SequenceBatch, row: int) -> tuple[set[int] | None, set[int]]:
        """Items that may be named (None: all), and those that may not (again)."""
        seen = set(batch["seen"][row].tolist()) if "seen" in batch else set()
        return (set(batch["candidates"][row].tolist()) if "candidates" in batch else None), seen - {0}
