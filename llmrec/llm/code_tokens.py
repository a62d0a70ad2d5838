"""Item codes as ordinary tokens of a plain language model: their names and ids, and an exported folder read back.

    <a_0> <a_1> .. <b_0> ..     letter of the level, code; token V + offset_h + c is code c of level h

A model may have more rows than its tokenizer has tokens (V is then a round number): ids in between get names that no
text has (<|unused_N|>), so that both number the codes alike.

    codes = ExportedCodes.read(folder)                       original item ids in and out
    ids = torch.tensor([codes.prompt(["12", "7"])])
    found = model.generate(ids, logits_processor=LogitsProcessorList([codes.processor(ids.shape[1])]), do_sample=False,
                           max_new_tokens=codes.max_new_tokens, num_beams=20, num_return_sequences=10)
    for answer in found: codes.items_of(answer[ids.shape[1]:])

Such answers come best first, as llmrec's own beams do; length_penalty=0.0 makes `sequences_scores` the
log-probabilities of the codes, which generate otherwise divides by their number.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import AddedToken
from torch import Tensor

from llmrec.blocks.trie import PrefixTrie
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.llm.constrained import TrieLogitsProcessor

ITEM_CODES = "item_codes.json"
FORMAT = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class CodeTokens:
    """Numbers and names of the added tokens.

    Args:
        first: V, the id of code 0 of the first level.
        level_sizes: (M,) codes per level.

    Raises:
        RecipeError: More levels than letters.
    """

    first: int
    level_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.level_sizes) > len(LETTERS):
            raise RecipeError(f"found {len(self.level_sizes)} levels of item codes, expected at most {len(LETTERS)}")

    @property
    def starts(self) -> list[int]:
        """Id of code 0 of each level."""
        return [self.first + sum(self.level_sizes[:level]) for level in range(len(self.level_sizes))]

    @property
    def end(self) -> int:
        """The id behind the last code."""
        return self.first + sum(self.level_sizes)

    @property
    def names(self) -> list[str]:
        """Names of all tokens in the order of their ids."""
        return [f"<{LETTERS[level]}_{code}>" for level, size in enumerate(self.level_sizes) for code in range(size)]

    def ids(self, codes: Tensor) -> Tensor:
        """Codes [..., M] -> token ids [..., M]."""
        return codes + torch.tensor(self.starts, device=codes.device)


def with_codes(tokenizer: Any, tokens: CodeTokens) -> tuple[Any, int]:
    """A copy of a tokenizer that knows the codes under their ids, and how many filler tokens that took.

    Code tokens are no special tokens: servers leave those out of answers.

    Raises:
        RecipeError: The tokenizer has ids of V and above, or names its tokens like ours, or numbers them otherwise.
    """
    known = tokenizer.get_vocab()
    free = max(known.values()) + 1
    if free > tokens.first:
        raise RecipeError(
            f"the tokenizer has ids up to {free - 1}, but the base model has {tokens.first} token embeddings, behind "
            "which item codes are numbered: the same ids would mean two things; use the tokenizer of the base model"
        )
    fillers = [f"<|unused_{number}|>" for number in range(free, tokens.first)]
    taken = [name for name in (*fillers, *tokens.names) if name in known]
    if taken:
        raise RecipeError(
            f"the base model's tokenizer already has tokens called {', '.join(taken[:3])}; exported codes need these "
            "names for themselves. Serve the run itself with llmrec"
        )
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([AddedToken(name, special=True, normalized=False) for name in fillers])
    grown.add_tokens([AddedToken(name, special=False, normalized=False) for name in tokens.names])
    wrong = misnumbered(grown, tokens)
    if wrong is not None:
        raise RecipeError(
            f"the base model's tokenizer numbers added tokens its own way ({wrong}), so that model and tokenizer would "
            "disagree about item codes. Serve the run itself with llmrec"
        )
    return grown, len(fillers)


def misnumbered(tokenizer: Any, tokens: CodeTokens) -> str | None:
    """Where ids that a tokenizer gives the codes, by name and in text, first differ from theirs; None if nowhere."""
    names, expected = tokens.names, list(range(tokens.first, tokens.end))
    for name, found, wanted in zip(names, tokenizer.convert_tokens_to_ids(names), expected, strict=True):
        if found != wanted:
            return f"{name} is token {found}, expected {wanted}"
    read = list(tokenizer("".join(names), add_special_tokens=False)["input_ids"])
    if read != expected:
        place = next((n for n, pair in enumerate(zip(read, expected, strict=False)) if pair[0] != pair[1]), len(read))
        return f"a text of all codes reads as {len(read)} tokens and differs at {names[min(place, len(names) - 1)]}"
    return None


@dataclass(frozen=True)
class PromptFrame:
    """What stands around the items of a prompt.

    Args:
        before: Token ids in front of the first item.
        between: Behind every item but the last.
        after: Behind the last item.
        max_items: Most items of a prompt.
        max_length: Most tokens of prompt and answer together; None for no limit.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    max_items: int
    max_length: int | None


class CodeLogitsProcessor(TrieLogitsProcessor):
    """The mask over log-probabilities that llmrec's own beams add up: as trained, without the end of the answer.

    Args:
        by_level: Codes compete within their level (windows), not with the whole vocabulary (tasks).
        *args: See `TrieLogitsProcessor`.
    """

    def __init__(self, by_level: bool, *args: Any) -> None:
        super().__init__(*args)
        self.by_level = by_level

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, prompt + m] ids, [rows, V] logits (log-probabilities in a beam search) -> [rows, V] scores."""
        level = input_ids.shape[1] - self.prompt_length
        self._move(scores.device)
        if self.by_level and 0 <= level < self.trie.depth:
            tokens, scores = self._tokens[level], scores.clone()
            scores[:, tokens] = scores[:, tokens].log_softmax(-1)
        masked = super().__call__(input_ids, scores)
        if self.eos_token_id is not None and level >= self.trie.depth:
            masked[:, self.eos_token_id] = 0.0  # a whole code can only end
        return masked


class ExportedCodes:
    """item_codes.json of an exported folder: prompts from original ids, the mask of the catalogue, items of answers.

    Args:
        record: The content of the file.

    Attributes:
        tokens: Where the codes stand.
        fingerprint: Of the item tokenizer.
        max_new_tokens: Tokens of an answer.
        trie: The prefix trie of the catalogue.

    Raises:
        ValueError: The items are not written in codes of these levels.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.tokens = CodeTokens(record["first_token_id"], tuple(record["level_sizes"]))
        self.fingerprint: str = record["item_tokenizer"]
        self.max_new_tokens: int = record["answer"]["max_new_tokens"]
        self._stop: list[int] = record["answer"]["stop_token_ids"]
        self._frame = PromptFrame(**record["prompt"])
        self._by_level = {"level": True, "vocabulary": False}[record["normalised"]]
        place = {name: number for number, name in enumerate(self.tokens.names, start=self.tokens.first)}
        self._ids = {key: [place[name] for name in names] for key, names in record["items"].items()}
        self._keys: dict[tuple[int, ...], list[str]] = {}
        for key, row in self._ids.items():
            self._keys.setdefault(tuple(row), []).append(key)
        ids, starts = torch.tensor(list(self._ids.values()), dtype=torch.long), torch.tensor(self.tokens.starts)
        if ids.dim() != 2 or ids.shape[1] != len(starts):
            raise ValueError(f"items: found a table of shape {tuple(ids.shape)}, expected {len(starts)} codes per item")
        codes = ids - starts
        self.trie = PrefixTrie.build(torch.cat([codes[:1], codes]), self.tokens.level_sizes)  # the first is padding

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the file of a folder.

        Raises:
            CheckpointError: Missing, damaged, or of a newer format.
        """
        path = Path(folder) / ITEM_CODES
        if not path.is_file():
            raise CheckpointError(f"{folder}: found no {ITEM_CODES}; expected an export of the style item_codes")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise CheckpointError(f"{path}: found format {record['format']!r}, this version reads format {FORMAT}")
            return cls(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); export the run again") from error

    def prompt(self, history: Sequence[str]) -> list[int]:
        """Token ids that ask for the item after a history of original ids, oldest first; the oldest give way.

        Raises:
            DataError: An unknown item, or none.
        """
        strange = [key for key in history if key not in self._ids]
        if strange or not history:
            wanted = "original ids of the data set"
            raise DataError("items without codes", found=strange[:8] or "no item", expected=wanted)
        frame, room = self._frame, len(history)
        if frame.max_length is not None:
            free = frame.max_length - self.max_new_tokens - len(frame.before) - len(frame.after)
            room = (free + len(frame.between)) // (len(self.tokens.level_sizes) + len(frame.between))
        shown = history[-min(frame.max_items, room) :]
        ids = [token for key in shown for token in (*self._ids[key], *frame.between)]
        return [*frame.before, *ids[: len(ids) - len(frame.between)], *frame.after]

    def processor(self, prompt_length: int) -> TrieLogitsProcessor:
        """The mask for `generate` after prompts of so many columns."""
        sizes = zip(self.tokens.starts, self.tokens.level_sizes, strict=True)
        levels = [torch.arange(start, start + size) for start, size in sizes]
        stop = self._stop[0] if self._stop else None
        return CodeLogitsProcessor(self._by_level, self.trie, levels, prompt_length, stop)

    def items_of(self, tokens: Sequence[int] | Tensor) -> list[str]:
        """Original ids of the items an answer names, by its first M tokens; none where it names none."""
        written = tuple(int(token) for token in tokens[: len(self.tokens.level_sizes)])
        return self._keys.get(written, [])
