"""Next-item examples as prompts and answers, index based, and their batches.

Everything random is drawn from a generator keyed by (seed, example id, epoch): phrasing and negatives of an example
do not depend on workers, on the order of access or on a resumed run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.data.item_text import title_texts
from llmrec.data.negatives import TrainingHistories
from llmrec.data.prompt_encoder import IGNORED, EncodedPrompt, PromptEncoder, PromptOptions
from llmrec.data.prompt_tokens import filler_id
from llmrec.data.prompts import PromptTemplate
from llmrec.data.sequences import SequenceCollator, SequenceExamples
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import SequenceBatch

__all__ = ["InstructionCollator", "InstructionExamples", "PromptOptions", "curriculum_is_hybrid", "text_mode"]

_PHRASING, _NEGATIVES = 0, 1
_ENCODED = tuple(field.name for field in fields(EncodedPrompt))


class InstructionExamples:
    """Prompts over `SequenceExamples`; a map-style data set whose memory is O(events).

    In training, candidates are the target and uniform negatives the user has met neither in the training split nor
    in this example's history, shuffled, drawn anew each epoch. In evaluation they are the stored lists of `examples`,
    in their stored order, and the phrasing stays that of epoch 0.

    Args:
        dataset: Supplies titles and training histories.
        examples: One example per target (`dataset.histories`).
        options: What a prompt shows.
        titles: Text of every item, index = item id; by default `title_texts(dataset)`.
        tokenizer: With one, rows carry token ids, ready for `InstructionCollator`.
        seed: Of phrasings and negatives.
        training: False keeps everything fixed and draws no candidates.

    Raises:
        RecipeError: Options and examples do not fit together.
    """

    def __init__(
        self,
        dataset: InteractionDataset,
        examples: SequenceExamples,
        options: PromptOptions,
        *,
        titles: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        training: bool = True,
    ) -> None:
        _check(examples, options, training)
        self.examples, self.options, self.seed, self.training = examples, options, seed, training
        self.titles = list(titles) if titles is not None else title_texts(dataset)
        self.template = PromptTemplate.load(options.template)
        self.variants = options.chosen_variants(self.template)
        self.tokenizer, self.epoch = tokenizer, 0
        self._num_items = dataset.num_items
        self._histories = TrainingHistories(dataset)
        self._encoder: tuple[PreTrainedTokenizerBase, PromptEncoder] | None = None
        self._title_tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row of `examples` with `variant` and, as asked for, `candidates` and the fields of `encode`."""
        row = self.examples[index]
        row["variant"] = self._phrasing(row["example_id"])
        if self.options.candidates is not None and "candidates" not in row:
            row["candidates"] = self._draw_candidates(row)
        if self.tokenizer is not None:
            row |= self.encode(row, self.tokenizer)
        return row

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, tokens of each example's history and answer: what makes one prompt longer than another.

        Each title is tokenised once and nothing is rendered, so that this costs O(events). The text around the titles
        and drawn candidates, which are of similar length everywhere, are left out.

        Raises:
            RecipeError: There is no tokenizer to count with.
        """
        if self.tokenizer is None:
            raise RecipeError("lengths of prompts are counted in tokens; give the tokenizer to InstructionExamples")
        if self._title_tokens is None:
            encoder = self.encoder(self.tokenizer)
            self._title_tokens = np.array([len(ids) for ids in encoder.pieces.answers(encoder.titles)], dtype=np.int64)
        events = self._title_tokens[self.examples.items] + 1 + ("history" in self.options.slot_kinds)  # 1: separator
        before = np.r_[0, np.cumsum(events)]
        end = self.examples.end
        start = np.maximum(self.examples.start, end - self.options.max_history)
        found = before[end] - before[start] + self._title_tokens[self.examples.targets]
        return found if self.options.max_length is None else np.minimum(found, self.options.max_length)

    def subset(self, index: np.ndarray | Sequence[int]) -> InstructionExamples:
        """The prompts at the given positions, in that order; each stays what it was."""
        chosen = copy.copy(self)
        chosen.examples = self.examples.subset(index)
        return chosen

    def set_epoch(self, epoch: int) -> None:
        """Draw other phrasings and negatives from now on; without effect in evaluation."""
        self.epoch = epoch if self.training else 0

    def encode(
        self,
        example: int | dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        hybrid: bool = True,
        with_answer: bool = True,
    ) -> dict[str, Any]:
        """Token ids of one example.

        Args:
            example: Its position, or a row of this data set.
            tokenizer: Any tokenizer of transformers.
            hybrid: False leaves all slots out (the text mode of LLaRA's curriculum).
            with_answer: Whether the target's title follows the prompt.

        Returns:
            The fields of `EncodedPrompt` by name; arrays are int64 [S].
        """
        row = self[example] if isinstance(example, int) else example
        encoded: EncodedPrompt = self.encoder(tokenizer).encode(
            row["item_ids"],
            row.get("candidates", ()),
            variant=row["variant"],
            answer=int(row["targets"][-1]) if with_answer else None,
            hybrid=hybrid,
        )
        return {name: getattr(encoded, name) for name in _ENCODED}

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
        """The encoder of these prompts; it also gives the tokens of any item as an answer."""
        if self._encoder is None or self._encoder[0] is not tokenizer:
            self._encoder = (tokenizer, PromptEncoder(self.titles, self.options, tokenizer, self.template))
        return self._encoder[1]

    def truncation(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> dict[str, int]:
        """How many of the first `limit` examples lose history items to `max_length`, and how many items they lose."""
        count = len(self) if limit is None else min(limit, len(self))
        dropped = [self.encode(index, tokenizer)["dropped_items"] for index in range(count)]
        return {"examples": count, "truncated": sum(n > 0 for n in dropped), "dropped_items": sum(dropped)}

    def _generator(self, example_id: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, example_id, self.epoch, purpose])

    def _phrasing(self, example_id: int) -> int:
        if len(self.variants) == 1:
            return self.variants[0]
        return self.variants[int(self._generator(example_id, _PHRASING).integers(len(self.variants)))]

    def _draw_candidates(self, row: dict[str, Any]) -> np.ndarray:
        size = int(self.options.candidates or 0)
        target = int(row["targets"][-1])
        known = self._histories.met(row)
        free = self._num_items - len(known)
        if free < size - 1:
            raise DataError(
                f"the catalogue is too small for candidate lists of {size}",
                found=f"{free} items that user {row['user_id']} has not met",
                expected=f"at least {size - 1}",
                remedy="lower prompt.candidates",
            )
        generator = self._generator(row["example_id"], _NEGATIVES)
        if free < 4 * size:
            unknown = np.setdiff1d(np.arange(1, self._num_items + 1), np.fromiter(known, np.int64))
            chosen = generator.choice(unknown, size - 1, replace=False).tolist()
        else:
            chosen = []
            while len(chosen) < size - 1:
                item = int(generator.integers(1, self._num_items + 1))
                if item not in known:
                    known.add(item)
                    chosen.append(item)
        return generator.permutation(np.array([target, *chosen], dtype=np.int64))


def _check(examples: SequenceExamples, options: PromptOptions, training: bool) -> None:
    if examples.dense:
        raise RecipeError("prompts need one target per example: use dataset.histories, not dataset.windows")
    if options.candidates is None:
        return
    if examples.candidates is None and not training:
        raise RecipeError(
            f"prompts list {options.candidates} candidates, but the examples carry none; attach the stored lists with "
            "examples.with_candidates(stored_candidates(...))"
        )
    if examples.candidates is not None and examples.candidates.shape[1] != options.candidates:
        raise RecipeError(
            f"prompt.candidates is {options.candidates}, but the candidate lists hold {examples.candidates.shape[1]}; "
            "make both the same"
        )


@dataclass
class InstructionCollator:
    """Pads rows of `InstructionExamples` into a `SequenceBatch`.

    The batch has input_ids, attention_mask, token_labels and item_slots [B, S], and all that `SequenceCollator`
    gives, so encoders and gates work on the same batch.

    Args:
        tokenizer: The one the rows were encoded with; its padding (or else end-of-sequence) id fills up rows.
        padding_side: "left" for generation and scoring; training gives the same loss on either side.
        with_answer: False cuts the answers off.
        with_seen: Add `seen` [B, S'].
        extras: Called with (rows, batch) to add fields, such as precomputed user vectors.
    """

    tokenizer: PreTrainedTokenizerBase
    padding_side: Literal["left", "right"] = "left"
    with_answer: bool = True
    with_seen: bool = False
    extras: Callable[[list[dict[str, Any]], SequenceBatch], None] | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise RecipeError(f"padding_side is {self.padding_side!r}; expected left or right")
        self._filler = filler_id(self.tokenizer)
        self._sequences = SequenceCollator(self.with_seen)

    def __call__(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        if "input_ids" not in rows[0]:
            raise RecipeError("the rows carry no token ids; give the tokenizer to InstructionExamples")
        batch = self._sequences(rows)
        ends = [None if self.with_answer else int(row["prompt_length"]) for row in rows]
        for name, source, fill in (
            ("input_ids", "input_ids", self._filler),
            ("token_labels", "token_labels", IGNORED),
            ("item_slots", "item_slots", 0),
        ):
            batch[name] = self._pad([row[source][:end] for row, end in zip(rows, ends, strict=True)], fill)  # type: ignore[literal-required]
        lengths = [len(row["input_ids"][:end]) for row, end in zip(rows, ends, strict=True)]
        batch["attention_mask"] = self._pad([np.ones(length, dtype=np.int64) for length in lengths], 0)
        if self.extras is not None:
            self.extras(rows, batch)
        return batch

    def text_mode(self, batch: SequenceBatch) -> SequenceBatch:
        """See the function `text_mode`."""
        return text_mode(batch, self.padding_side)

    def _pad(self, rows: Sequence[np.ndarray], fill: int) -> Any:
        import torch

        padded = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=np.int64)
        for i, row in enumerate(rows):
            columns = slice(0, len(row)) if self.padding_side == "right" else slice(padded.shape[1] - len(row), None)
            padded[i, columns] = row
        return torch.from_numpy(padded)


def text_mode(batch: SequenceBatch, padding_side: Literal["left", "right"] = "left") -> SequenceBatch:
    """The batch without its slots: the very tokens that `encode(..., hybrid=False)` gives.

    A curriculum decides per training step; with this it can do so after the workers have encoded the examples.

    Args:
        batch: A hybrid batch of `InstructionCollator`; it stays as it is.
        padding_side: Where its padding stands, and that of the result.
    """
    import torch

    keep = (batch["attention_mask"] == 1) & (batch["item_slots"] == 0)
    side = keep if padding_side == "left" else ~keep
    order = torch.argsort(side.long(), dim=1, stable=True)  # what goes, first (or last); the rest in its order
    longest = int(keep.sum(1).max())
    order = order[:, keep.shape[1] - longest :] if padding_side == "left" else order[:, :longest]
    kept = keep.gather(1, order)
    ids, labels = batch["input_ids"].gather(1, order), batch["token_labels"].gather(1, order)
    result: Any = batch.copy()
    result["input_ids"] = ids  # ids under a zero mask are never read
    result["attention_mask"] = kept.long()
    result["token_labels"] = labels.masked_fill(~kept, IGNORED)
    result["item_slots"] = torch.zeros_like(ids)
    return result


def curriculum_is_hybrid(step: int, total_steps: int, seed: int = 0) -> bool:
    """Whether a training step uses hybrid prompts: with probability step / total_steps (LLaRA's curriculum).

    Decided by (seed, global step) alone, so that workers, processes and a resumed run agree. The published code
    counts batches inside each data worker instead.

    Args:
        step: Global step, from 0.
        total_steps: Steps of the whole training.
        seed: Of the draws.
    """
    if total_steps < 1:
        raise RecipeError(f"a curriculum needs at least one step, found total_steps = {total_steps}")
    return bool(np.random.default_rng([seed, step]).random() < step / total_steps)
