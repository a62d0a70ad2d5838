"""Pointwise questions, "would this user like this item?", as prompts that are answered with Yes or No.

    what is known of the user (a summary, the latest titles, or both) + the candidate (title, text, picture) -> Yes | No

Training asks about each target and about items drawn for it, which the user has met neither in the training split nor
in the example's history. Everything random is keyed by (seed, example id, epoch). The two answers are told apart by
their first token as it really follows the prompt (`verbaliser`).

A summary belongs to one target, named by its user and the number of events before it, and is made of those events.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.data.negatives import TrainingHistories
from llmrec.data.prompt_encoder import IGNORED
from llmrec.data.prompt_tokens import PieceTokenizer
from llmrec.data.prompts import PromptTemplate, SlotMarks, SlotRef, plain_text
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sequences import SequenceExamples

ANSWERS = ("Yes", "No")
_PHRASING, _NEGATIVES = 2, 3


@dataclass(frozen=True)
class PairOptions:
    """What a question shows.

    Args:
        template: Name or path of a prompt file over preference, history, title, text and image.
        variants: Phrasings in use: "all", or one number.
        show_history: Titles of the latest so many items; 0 leaves them out (the summary stands for them).
        max_title_tokens: Longer titles are cut.
        max_text_tokens: Longer item texts are cut; 0 leaves them out.
        max_preference_tokens: Longer summaries are cut.
        max_length: Most tokens of question and answer; the oldest titles give way, a picture never does.
        chat_template: Put the question in a user turn of the tokenizer's chat template.
        negatives: Items drawn for each target in training.
        negative_kind: "uniform", or "popularity": in proportion to training events.
        loss_on_prompt: Supervise the question as well, as the release of MLLM-MSR does; off by default.
    """

    template: str
    variants: Literal["all"] | int = "all"
    show_history: int = 10
    max_title_tokens: int = 24
    max_text_tokens: int = 64
    max_preference_tokens: int = 128
    max_length: int | None = None
    chat_template: bool = False
    negatives: int = 1
    negative_kind: Literal["uniform", "popularity"] = "uniform"
    loss_on_prompt: bool = False

    def __post_init__(self) -> None:
        least = {"show_history": 0, "max_title_tokens": 1, "max_text_tokens": 0, "max_preference_tokens": 1,
                 "negatives": 0}  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise RecipeError(f"prompt.{name}: found {getattr(self, name)}, expected {smallest} or more")
        if self.negative_kind not in ("uniform", "popularity"):
            raise RecipeError(f"prompt.negative_kind: found {self.negative_kind!r}, expected uniform or popularity")


@dataclass
class CutCounts:
    """How often something did not fit; counted, never silent."""

    titles: int = 0
    texts: int = 0
    preferences: int = 0
    histories: int = 0


@dataclass(frozen=True)
class EncodedPair:
    """One question, with or without its answer.

    Args:
        input_ids: [S] int64.
        token_labels: [S] int64, -100 where nothing is supervised.
        prompt_length: Tokens before the answer.
        image: The item whose picture stands in the question; 0 for none.
    """

    input_ids: np.ndarray
    token_labels: np.ndarray
    prompt_length: int
    image: int


@dataclass
class PairEncoder:
    """Writes questions for one tokenizer.

    Args:
        titles: Text of every item, index = item id.
        options: See `PairOptions`.
        tokenizer: Any tokenizer of transformers.
        texts: More words on every item, index = item id ("" for none), such as plots or descriptions of pictures.
        preferences: (user id, number of events before the target) -> summary of those events.
        image_ids: Tokens that stand for the picture of an item, none where it has no picture.

    Raises:
        RecipeError: The two answers begin with the same token.
    """

    titles: Sequence[str]
    options: PairOptions
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str] | None = None
    preferences: Mapping[tuple[int, int], str] | None = None
    image_ids: Callable[[int], list[int]] | None = None
    cuts: CutCounts = field(default_factory=CutCounts)

    def __post_init__(self) -> None:
        self.template = PromptTemplate.load(self.options.template)
        known = {"preference", "history", "title", "text", "image"}
        strange = self.template.variables - known
        if strange or "title" not in self.template.variables:
            raise RecipeError(
                f"{self.template.path}: found the variables {', '.join(sorted(self.template.variables))}, expected "
                f"title and some of {', '.join(sorted(known - {'title'}))}"
            )
        variants = self.template.variants if self.options.variants == "all" else (self.options.variants,)
        unknown = [variant for variant in variants if variant not in self.template.variants]
        if unknown:
            raise RecipeError(f"prompt.variants: found {unknown[0]}; {self.template.path} has {self.template.variants}")
        self.variants = tuple(variants)
        terminator = "eos" if self.options.chat_template else "newline"
        self.pieces = PieceTokenizer(self.tokenizer, self.options.chat_template, terminator)
        self._answers = self.pieces.answers(ANSWERS)
        self._cut: dict[tuple[str, int], str] = {}
        yes, no = self._answers
        shared = next((place for place, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1]), None)
        if shared is None:
            raise RecipeError(
                f"tokenizer {self.tokenizer.name_or_path!r} writes one of Yes {yes} and No {no} as the beginning of "
                "the other; expected two tokens to compare"
            )
        self._lead = yes[:shared]

    @property
    def verbaliser(self) -> tuple[int, int]:
        """First tokens of Yes and of No that differ, as they follow a question.

        What both begin with (a blank of its own, with some tokenizers) belongs to the question.
        """
        yes, no = self._answers
        return yes[len(self._lead)], no[len(self._lead)]

    def encode(
        self,
        history: Sequence[int],
        candidate: int,
        *,
        preference: str = "",
        variant: int | None = None,
        answer: bool | None = None,
    ) -> EncodedPair:
        """One question, and its answer behind it.

        Args:
            history: Item ids, oldest first.
            candidate: The item asked about.
            preference: Summary of the user, empty for none.
            variant: Number of the phrasing; the first in use by default.
            answer: True for Yes, False for No, None for the question alone.

        Raises:
            DataError: The question does not fit `max_length` even without titles of the history.
        """
        variant = self.variants[0] if variant is None else variant
        room = None
        if self.options.max_length is not None:
            room = self.options.max_length - max(map(len, self._answers)) - len(self.pieces.terminator)
        shown = [int(item) for item in history][-self.options.show_history :] if self.options.show_history else []
        preference = self._shorter(preference, self.options.max_preference_tokens, "preferences")
        ids, image = self._tokens(shown, preference, candidate, variant)
        while room is not None and len(ids) > room:
            if not shown:
                raise DataError(
                    "a question without any title of the history does not fit",
                    found=f"{len(ids)} tokens about item {candidate}",
                    expected=f"at most {room}, prompt.max_length less the answer",
                    remedy="raise prompt.max_length, or lower max_text_tokens and max_preference_tokens",
                )
            shown = shown[max(1, len(shown) // 4) :]
            self.cuts.histories += 1
            ids, image = self._tokens(shown, preference, candidate, variant)
        answer_ids: list[int] = []
        if answer is not None:
            answer_ids = self._answers[0 if answer else 1][len(self._lead) :] + self.pieces.terminator
        before = ids if self.options.loss_on_prompt else [IGNORED] * len(ids)
        return EncodedPair(
            input_ids=np.array(ids + answer_ids, dtype=np.int64),
            token_labels=np.array(before + answer_ids, dtype=np.int64),
            prompt_length=len(ids),
            image=candidate if image else 0,
        )

    def preference_of(self, row: dict[str, Any]) -> str:
        """The summary in front of the target of an example; empty where summaries are not used.

        Raises:
            DataError: There is none for this target.
        """
        if self.preferences is None:
            return ""
        text = self.preferences.get((int(row["user_id"]), len(row["seen"])))
        if text is None:
            raise DataError(
                "there is no summary in front of this target",
                found=f"user {row['user_id']}, {len(row['seen'])} events before the target",
                expected="a target of the users and splits that were summarised",
                remedy="summarise this split and these users, or leave prompt.summaries out",
            )
        return text

    def _tokens(self, history: Sequence[int], preference: str, candidate: int, variant: int) -> tuple[list[int], bool]:
        """Ids of a question, and whether a picture stands in it."""
        marks = SlotMarks()
        picture = self.image_ids(candidate) if self.image_ids is not None else []
        limit = self.options.max_title_tokens
        text = self.texts[candidate] if self.texts is not None and self.options.max_text_tokens else ""
        values: dict[str, Any] = {
            "preference": preference,
            "history": [self._shorter(self.titles[item], limit, "titles") for item in history],
            "title": self._shorter(self.titles[candidate], limit, "titles"),
            "text": self._shorter(text, self.options.max_text_tokens, "texts") if text else "",
            "image": marks.mark(candidate, "candidate") if picture else "",
        }
        shown = {name: value for name, value in values.items() if name in self.template.variables}
        segments = marks.split(self.template.render(variant, **shown))
        encoded = iter(self.pieces.prompt_pieces([part for part in segments if isinstance(part, str)]))
        ids, placed = list(self.pieces.head), False
        for part in segments:
            ids += next(encoded) if isinstance(part, str) else picture
            placed = placed or isinstance(part, SlotRef)
        return ids + self.pieces.tail + self._lead, placed

    def _shorter(self, text: str, limit: int, what: str) -> str:
        text = plain_text(text)
        key = (text, limit)
        if key not in self._cut:
            self._cut[key] = _cut_text(text, self.pieces, limit)
        if self._cut[key] != text:
            setattr(self.cuts, what, getattr(self.cuts, what) + 1)
        return self._cut[key]


def _cut_text(text: str, pieces: PieceTokenizer, limit: int) -> str:
    """The longest head of a text, cut between words, that is no longer than `limit` tokens."""
    words = text.split(" ")
    if len(pieces.answers([text])[0]) <= limit:
        return text
    fits, too_many = 0, len(words)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(pieces.answers([" ".join(words[:middle])])[0]) <= limit:
            fits = middle
        else:
            too_many = middle
    return " ".join(words[:fits])


class PairExamples:
    """Questions over `SequenceExamples`: each target, and the items drawn for it; a map-style data set.

    Question i belongs to target i // (1 + negatives); the first of them has the answer Yes.

    Args:
        dataset: Supplies training histories and counts.
        examples: One example per target (`dataset.histories`); with summaries, those of targets without one are left
            out.
        encoder: Writes the questions.
        seed: Of phrasings and negatives.
    """

    def __init__(
        self, dataset: InteractionDataset, examples: SequenceExamples, encoder: PairEncoder, seed: int = 0
    ) -> None:
        if examples.dense:
            raise RecipeError("questions need one target per example: use dataset.histories, not dataset.windows")
        if encoder.preferences is not None:
            targets = zip(examples.users.tolist(), (examples.end - examples.first).tolist(), strict=True)
            examples = examples.subset(np.flatnonzero([target in encoder.preferences for target in targets]))
        self.examples, self.encoder, self.seed, self.epoch = examples, encoder, seed, 0
        weights = np.ones(dataset.num_items + 1)
        if encoder.options.negative_kind == "popularity":
            weights = dataset.context().train_counts.astype(np.float64)
        weights[0] = 0.0
        self._cumulated = np.cumsum(weights)
        self._histories = TrainingHistories(dataset)
        self._index = np.arange(len(examples) * self._per_target, dtype=np.int64)

    @property
    def _per_target(self) -> int:
        return 1 + self.encoder.options.negatives

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row of the examples with candidate, label and the fields of `EncodedPair`."""
        place, number = divmod(int(self._index[index]), self._per_target)
        row = self.examples[place]
        target = int(row["targets"][-1])
        row["candidate"] = target if number == 0 else int(self._negatives(row, target)[number - 1])
        row["label"] = int(number == 0)
        variants = self.encoder.variants
        drawn = self._generator(row["example_id"], _PHRASING).integers(len(variants))
        pair = self.encoder.encode(
            row["item_ids"].tolist(),
            row["candidate"],
            preference=self.encoder.preference_of(row),
            variant=variants[int(drawn)],
            answer=number == 0,
        )
        return row | {name: getattr(pair, name) for name in ("input_ids", "token_labels", "prompt_length", "image")}

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64: history events, what makes one question longer than another."""
        return self.examples.lengths[self._index // self._per_target]

    def subset(self, index: np.ndarray | Sequence[int]) -> PairExamples:
        """The questions at the given positions, in that order."""
        chosen = copy.copy(self)
        chosen._index = self._index[np.asarray(index)]
        return chosen

    def set_epoch(self, epoch: int) -> None:
        """Draw other phrasings and negatives from now on."""
        self.epoch = epoch

    def _generator(self, example_id: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, example_id, self.epoch, purpose])

    def _negatives(self, row: dict[str, Any], target: int) -> np.ndarray:
        """The items drawn for a target, none twice."""
        user, count = row["user_id"], self.encoder.options.negatives
        known = self._histories.met(row)
        generator, total = self._generator(row["example_id"], _NEGATIVES), self._cumulated[-1]
        chosen: list[int] = []
        for _ in range(1000 * count):
            item = int(np.searchsorted(self._cumulated, generator.random() * total, side="right"))
            if item not in known:
                known.add(item)
                chosen.append(item)
                if len(chosen) == count:
                    return np.array(chosen, dtype=np.int64)
        raise DataError(
            "no negative was found for a target",
            found=f"user {user}, who has met {len(known)} of {len(self._cumulated) - 1} items",
            expected=f"at least {count} items the user has not met",
            remedy="lower prompt.negatives, or choose negative_kind: uniform",
        )
