"""The style yes_no: would this user like this item? The first token of the answer decides.

    score(user, item) = l(Yes) - l(No),     p_yes = sigmoid(score)        (MLLM-MSR, 6: softmax over the two logits)

The question shows what is known of the user (the summary of a history, titles, or both) and the candidate (title, text,
picture); see `llmrec.data.pairs`. One forward pass per question is enough: nothing is generated. Candidates of one user
share the beginning of their questions, which is read once; questions with a picture are read whole.

From the paper's pipeline: the task, the two logits, plain LoRA on the language model. Ours: labels on the answer alone
(the release also trains on the question; `loss_on_prompt`), the answer's end is supervised, the tokens of Yes and No
are those that really follow a question, the vision tower stays untouched, any gated tuner may stand in for LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.data.instructions import InstructionCollator
from llmrec.data.pairs import EncodedPair, PairEncoder, PairExamples
from llmrec.data.prompt_encoder import IGNORED
from llmrec.data.schema import Ranking
from llmrec.errors import DataError, RecipeError
from llmrec.llm.backbone import GateArguments
from llmrec.llm.recommender import LLMRecommender, RecommenderOptions, latest
from llmrec.llm.scoring import last_states, pad_answers, prefill
from llmrec.paper import Paper

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import SequenceBatch
    from llmrec.recipe import StageSpec

PAPER = Paper(
    title="Harnessing Multimodal Large Language Models for Multimodal Sequential Recommendation",
    venue="AAAI 2025",
    url_id="2408.09698",
    system="MLLM-MSR",
)
USERS_AT_ONCE = 8
"""Users whose candidates are scored together: bounds the memory of the repeated cache."""


class Pictures(Protocol):
    """Pictures of items as a vision-language model takes them."""

    def ids(self, item: int) -> list[int]:
        """Tokens that stand for the picture of an item, none where it has no picture."""
        ...

    def inputs(self, items: Sequence[int]) -> dict[str, Tensor]:
        """What the model reads besides tokens (pixel_values, ...) for the pictures of items, in that order."""
        ...


class PairCollator:
    """Rows of `PairExamples` -> batch: tokens and labels padded on the right, `pictured` [B], `pixels`.

    Args:
        tokenizer: The one the rows were encoded with.
        pictures: Of the items, where questions show them.
    """

    def __init__(self, tokenizer: Any, pictures: Pictures | None = None) -> None:
        self._pad, self._pictures = InstructionCollator(tokenizer, padding_side="right"), pictures

    def __call__(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        nothing = [{**row, "item_slots": row["input_ids"] * 0} for row in rows]
        batch: Any = self._pad(nothing)
        add_pictures(batch, [int(row["image"]) for row in rows], self._pictures)
        return batch


def add_pictures(batch: Any, items: Sequence[int], pictures: Pictures | None) -> None:
    """Add `pictured` [B] bool and `pixels` for the pictured rows, in their order."""
    shown = [item for item in items if item]
    if shown and pictures is not None:
        batch["pictured"] = torch.tensor([item > 0 for item in items])
        batch["pixels"] = pictures.inputs(shown)


class YesNoRecommender(LLMRecommender):
    """See the module; an `AnswerModel` and a `CandidateScorer`. It ranks given candidates, not whole catalogues.

    Args:
        renderer: `PairEncoder`, writes the questions.
        pictures: Of the items, where questions show them.
        model, item_table, options, encoder, tokenizer: See the base class; the table is not read.

    Raises:
        RecipeError: Nothing writes the questions.
    """

    def __init__(
        self,
        model: nn.Module,
        item_table: Tensor,
        options: RecommenderOptions,
        encoder: nn.Module | None = None,
        tokenizer: Any = None,
        renderer: PairEncoder | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        super().__init__(model, item_table, options, encoder, tokenizer)
        self.renderer, self.pictures = renderer, pictures

    @property
    def _renderer(self) -> PairEncoder:
        if self.renderer is None:
            raise RecipeError("style yes_no needs what writes its questions; build it with renderer=PairEncoder(...)")
        return self.renderer

    # Training --------------------------------------------------------------------------------------------------------

    def training_data(self, dataset: InteractionDataset, stage: StageSpec, seed: int) -> tuple[Any, Any]:
        """Questions about every training target and its negatives, and their collator."""
        histories = dataset.histories("train", self.options.max_history)
        return PairExamples(dataset, histories, self._renderer, seed), PairCollator(self.tokenizer, self.pictures)

    def answer_loss(self, batch: SequenceBatch) -> Tensor:
        """Mean cross-entropy over the supervised tokens of the batch, a scalar."""
        labels = batch["token_labels"][:, 1:]
        wanted = labels != IGNORED
        hidden = self._states(batch, self.sequence_gates(batch))[:, :-1]
        return F.cross_entropy(self.backbone.logits(hidden[wanted]), labels[wanted])

    def _states(self, batch: Any, gates: GateArguments) -> Tensor:
        """[B, S, d_llm] of right padded rows; rows with and without pictures are read apart."""
        ids, pictured = batch["input_ids"], batch.get("pictured")
        if pictured is None:
            return self.backbone(self.backbone.embed(ids), None, gates).last_hidden_state
        seen = self._read(ids[pictured], batch["attention_mask"][pictured], batch["pixels"], _rows(gates, pictured))
        if bool(pictured.all()):
            return seen
        unseen = self.backbone(self.backbone.embed(ids[~pictured]), None, _rows(gates, ~pictured)).last_hidden_state
        states = seen.new_zeros((*ids.shape, seen.shape[-1]))
        states = states.masked_scatter(pictured[:, None, None], seen)
        return states.masked_scatter(~pictured[:, None, None], unseen)

    def _read(self, ids: Tensor, mask: Tensor, pixels: dict[str, Tensor], gates: GateArguments) -> Tensor:
        """[B, S, d_llm] by the vision-language model itself, which puts its pictures where they belong."""
        pixels = {k: v.to(self.backbone.dtype) if v.is_floating_point() else v for k, v in pixels.items()}
        with self.backbone.adapted(gates):
            return self.backbone.base.model(
                input_ids=ids, attention_mask=mask, use_cache=False, **pixels
            ).last_hidden_state

    # Recommending ----------------------------------------------------------------------------------------------------

    def collate(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        """Questions about every candidate of every row, beside the encoder's own fields.

        Adds `questions`: a list of B lists of C `EncodedPair`, None at padding of the candidates.
        """
        from llmrec.data.sequences import SequenceCollator

        if any("candidates" not in row for row in rows):
            raise DataError(
                "style yes_no judges given items, the question has none",
                expected="a candidate list, as in the protocol candidates-21",
                remedy="evaluate with candidates",
            )
        rows = latest(rows, self.options.max_history)
        batch: Any = SequenceCollator(with_seen=True)(rows)
        batch["questions"] = [self._questions(row) for row in rows]
        return batch

    def _questions(self, row: dict[str, Any]) -> list[EncodedPair | None]:
        history, preference = row["item_ids"].tolist(), self._renderer.preference_of(row)
        encode = self._renderer.encode
        return [encode(history, int(item), preference=preference) if item else None for item in row["candidates"]]

    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32: l(Yes) - l(No) for each candidate; -inf at padding.

        Args:
            batch: From `collate`, with `candidates` [B, C].
        """
        pool, questions, gates = batch["candidates"], batch["questions"], self.sequence_gates(batch)  # type: ignore[typeddict-item]
        scores = torch.full(pool.shape, float("-inf"), device=pool.device)
        for first in range(0, len(pool), USERS_AT_ONCE):
            part = slice(first, first + USERS_AT_ONCE)
            rows = torch.arange(len(pool), device=pool.device)[part]
            scores[part] = self._score(questions[part], pool[part], _rows(gates, rows))
        return scores.masked_fill(pool == 0, float("-inf"))

    def p_yes(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32, softmax of the two logits (card 6); 0 at padding."""
        return torch.sigmoid(self.score_candidates(batch))

    def _score(self, questions: list[list[EncodedPair | None]], pool: Tensor, gates: GateArguments) -> Tensor:
        if any(pair is not None and pair.image for row in questions for pair in row):
            return self._score_whole(questions, pool, gates)
        beginnings = [_common([pair.input_ids.tolist() for pair in row if pair is not None]) for row in questions]
        rests = [
            [[0] if pair is None else pair.input_ids[len(start) :].tolist() for pair in row]
            for start, row in zip(beginnings, questions, strict=True)
        ]
        width = max(map(len, beginnings))
        ids = torch.zeros(len(beginnings), width, dtype=torch.long, device=pool.device)
        mask = torch.zeros_like(ids)
        for row, start in enumerate(beginnings):
            ids[row, width - len(start) :] = torch.tensor(start, dtype=torch.long)
            mask[row, width - len(start) :] = 1
        prompts = prefill(self.backbone, self.backbone.embed(ids), mask, gates)
        tokens, lengths = pad_answers(rests, pool.device)
        return self._difference(last_states(self.backbone, prompts, tokens, lengths))

    def _score_whole(self, questions: list[list[EncodedPair | None]], pool: Tensor, gates: GateArguments) -> Tensor:
        scores = torch.zeros(pool.shape, device=pool.device)
        for number, row in enumerate(questions):
            asked = [(place, pair) for place, pair in enumerate(row) if pair is not None]
            rows = [{"input_ids": pair.input_ids, "image": pair.image} for _, pair in asked]
            batch = self._padded(rows, pool.device)
            own = {name: value[number : number + 1].expand(len(rows), -1) for name, value in gates.items()}
            hidden = self._states(batch, own)
            ends = batch["attention_mask"].sum(1) - 1
            scores[number, [place for place, _ in asked]] = self._difference(
                hidden[torch.arange(len(rows), device=pool.device), ends]
            )
        return scores

    def _padded(self, rows: list[dict[str, Any]], device: Any) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row["input_ids"])] = torch.from_numpy(row["input_ids"])
            mask[number, : len(row["input_ids"])] = 1
        batch: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        add_pictures(batch, [int(row["image"]) for row in rows], self.pictures)
        if "pixels" in batch:
            batch["pictured"] = batch["pictured"].to(device)
            batch["pixels"] = {name: value.to(device) for name, value in batch["pixels"].items()}
        return batch

    def _difference(self, states: Tensor) -> Tensor:
        """[...] l(Yes) - l(No) after states [..., d_llm], float32."""
        yes, no = self._renderer.verbaliser
        logits = self.backbone.logits(states)
        return logits[..., yes] - logits[..., no]

    def recommend(self, batch: SequenceBatch, k: int) -> Ranking:
        """The k best of the given candidates; honours `seen`."""
        scores, pool = self.score_candidates(batch), batch["candidates"]
        if "seen" in batch:
            scores = scores.masked_fill((pool[:, :, None] == batch["seen"][:, None]).any(-1), float("-inf"))
        best, place = scores.topk(min(k, pool.shape[1]), dim=1)
        valid = torch.isfinite(best)
        return Ranking(pool.gather(1, place).masked_fill(~valid, 0), best, valid)


def _rows(gates: GateArguments, rows: Tensor) -> GateArguments:
    return {name: value[rows] for name, value in gates.items()}


def _common(rows: list[list[int]]) -> list[int]:
    """The longest common beginning that leaves every row at least one token."""
    shortest = min(map(len, rows)) - 1
    first = rows[0]
    length = 0
    while length < shortest and all(row[length] == first[length] for row in rows):
        length += 1
    return first[:length]
