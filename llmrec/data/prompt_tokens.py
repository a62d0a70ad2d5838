"""Text pieces to token ids, piece by piece, so that slots and answers sit at known positions.

Prompt and answer are tokenised apart and joined as ids; nothing is inferred from where a tokenizer puts its BOS.
Text of titles never turns into control tokens: only the frame of a chat template may contain those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Written in front of a piece to keep a tokenizer from adding its prefix space; tried in this order.
_GUARDS = ("\n", "|", "#", "x")
_HOLE, _REPLY = "\U000f5102", "\U000f5103"
_CACHE_SIZE = 200_000


class PieceTokenizer:
    """Turns the pieces of one prompt into ids that read like one text.

    Tokenizers of the Llama family put a space before whatever they are given. For a piece in the middle of a prompt
    that space would be wrong, so it is tokenised behind a guard character whose ids are taken off again.

    Args:
        tokenizer: Any tokenizer of transformers.
        chat_template: Whether prompts stand in a user turn of the tokenizer's chat template.
        terminator: "newline" or "eos", what ends an answer.

    Attributes:
        head: Ids before the first piece: BOS where the tokenizer uses one, or the opening of the chat frame.
        tail: Ids after the last piece: the rest of the chat frame, or none.
        filler: Id that stands at slot and padding positions.
        terminator: Ids that end an answer.

    Raises:
        RecipeError: The tokenizer lacks what the options need.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool, terminator: str) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[tuple[bool, str], list[int]] = {}
        self._adds_space = _first_token(tokenizer, "a").startswith(("▁", "Ġ"))
        self.filler = filler_id(tokenizer)
        self._lead, self._answer_lead, self._starts_text = "", " ", not chat_template
        if chat_template:
            self._read_frame()
        else:
            self.head = _bos_ids(tokenizer)
            self.tail: list[int] = []
        self.terminator = self._terminator(terminator)

    def prompt_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of each piece of one prompt, without head and tail."""
        if not pieces:
            return []
        pieces = [self._lead + pieces[0], *pieces[1:]]
        return self._ids_of([(self._starts_text and i == 0, piece) for i, piece in enumerate(pieces)])

    def answers(self, titles: Sequence[str]) -> list[list[int]]:
        """Ids of each title as an answer, terminator left out."""
        wanted = [(False, self._answer_lead + title) for title in titles]
        return self._ids_of(wanted, remember=len(titles) < _CACHE_SIZE)

    def _ids_of(self, wanted: Sequence[tuple[bool, str]], remember: bool = True) -> list[list[int]]:
        missing = [key for key in dict.fromkeys(wanted) if key not in self._cache]
        fresh = dict(zip(missing, self._tokenise(missing), strict=True)) if missing else {}
        found = [fresh[key] if key in fresh else self._cache[key] for key in wanted]
        if remember:
            if len(self._cache) + len(fresh) > _CACHE_SIZE:
                self._cache.clear()
            self._cache.update(fresh)
        return found

    def _tokenise(self, keys: Sequence[tuple[bool, str]]) -> list[list[int]]:
        """Ids of texts that start a prompt (True) or continue one (False)."""
        ids: list[list[int] | None] = [None] * len(keys)
        open_rows = list(range(len(keys)))
        if self._adds_space:
            for guard in _GUARDS:
                rows = [row for row in open_rows if not keys[row][0]]
                if not rows:
                    break
                (prefix,) = self._call([guard])
                for row, tokens in zip(rows, self._call([guard + keys[row][1] for row in rows]), strict=True):
                    if tokens[: len(prefix)] == prefix:
                        ids[row] = tokens[len(prefix) :]
                open_rows = [row for row in open_rows if ids[row] is None]
            if any(not keys[row][0] for row in open_rows):
                text = next(keys[row][1] for row in open_rows if not keys[row][0])
                raise RecipeError(
                    f"tokenizer {self.tokenizer.name_or_path!r} merges every guard character with {text[:40]!r}; "
                    "use a tokenizer without prefix space"
                )
        for row, tokens in zip(open_rows, self._call([keys[row][1] for row in open_rows]), strict=True):
            ids[row] = tokens
        return [tokens for tokens in ids if tokens is not None]

    def _call(self, texts: list[str], control: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not control,
            return_attention_mask=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _read_frame(self) -> None:
        """Ids around the text of a user turn, and what stands before the reply."""
        if not self.tokenizer.chat_template:
            raise RecipeError(
                f"chat_template is on, but tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                "set prompt.chat_template: false, or use an instruction-tuned model"
            )
        turn = [{"role": "user", "content": _HOLE}]
        frame = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        if not isinstance(frame, str) or frame.count(_HOLE) != 1:
            raise RecipeError(
                "the chat template does not show the user's text exactly once; set prompt.chat_template: false"
            )
        before, after = frame.split(_HOLE)
        opening = before.rstrip(" ")
        self._lead = before[len(opening) :]  # a blank belongs to the text behind it, as in running text
        self.head, self.tail = self._call([opening], control=True)[0], self._frame_tail(after)
        whole = self.tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": _REPLY}], tokenize=False)
        lead = whole[len(frame) :].partition(_REPLY)[0] if isinstance(whole, str) and whole.startswith(frame) else ""
        self._answer_lead = lead if not lead.strip() else ""

    def _frame_tail(self, text: str) -> list[int]:
        if not (self._adds_space and text):
            return self._call([text], control=True)[0] if text else []
        guard, guarded = self._call([_GUARDS[1], _GUARDS[1] + text], control=True)
        return guarded[len(guard) :]

    def _terminator(self, name: str) -> list[int]:
        if name == "newline":
            return self._ids_of([(False, "\n")])[0]
        if self.tokenizer.eos_token_id is None:
            raise RecipeError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token; set terminator: newline"
            )
        return [int(self.tokenizer.eos_token_id)]


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    return str(tokenizer.convert_ids_to_tokens(list(ids))[0])


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS if this tokenizer starts texts with one."""
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and list(tokenizer(["a"])["input_ids"][0])[:1] == [bos] else []


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, or the end-of-sequence id of tokenizers without padding.

    Raises:
        RecipeError: The tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise RecipeError(f"tokenizer {tokenizer.name_or_path!r} has neither a padding nor an end-of-sequence token")
