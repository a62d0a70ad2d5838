"""Language models that can only write codes of the catalogue: a mask for `generate`, and a faster way of our own.

`TrieLogitsProcessor` puts the prefix trie into transformers' `generate`, whatever the mode. `CausalCodeSpeaker` is the
`CodeSpeaker` of `blocks.beam_search` over a causal language model:

    prompt          read once per user                               keys and values [B, S]
    level h         M beams = M tokens appended to their user's row  keys and values [B, S + M_0 + .. + M_h-1]
    attention       a token sees the prompt, its own ancestors and itself (a tree in one row)
    position        n + h, n the real tokens of the prompt

So a user's prompt is neither repeated nor reordered: beams are queries of one row, a new beam is a line of the mask.
`generate` instead repeats the prompt for each beam before it reads it, and moves the cache at every step. Hidden states
equal those of reading prompt + code on its own. The tree is ours; scores and order are those of exact beam search.

Shapes: B users, S prompt tokens, M beams (may change from level to level), T code tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from llmrec.blocks.trie import PrefixTrie
from llmrec.errors import RecipeError
from llmrec.llm.backbone import Backbone, GateArguments, positions

EmbedCodes = Callable[[int, Tensor], Tensor]
"""(level, codes [B, M]) -> [B, M, d]."""
LevelLogits = Callable[[int, Tensor], Tensor]
"""(level, hidden [..., d]) -> [..., W_level]."""


class TrieLogitsProcessor(LogitsProcessor):
    """Leaves a row of `generate` only the tokens that continue a code of the catalogue; all others become -inf.

    It keeps nothing between calls: where a row stands follows from the tokens behind the prompt. A row with a whole
    code may only end (EOS). So may a row that left the trie, which happens to the surplus beams of a search with more
    beams than codes, and to prompts that are not `prompt_length` tokens long. Without an EOS token such rows are -inf
    throughout: ask for as many new tokens as the code has levels.

    Args:
        trie: The catalogue.
        level_tokens: For each level [W] token ids of its codes; any ids of the vocabulary, each once per level.
        prompt_length: Columns of `input_ids` before the first code: the padded prompt, 0 after `inputs_embeds`, 1 (the
            start token) for an encoder-decoder.
        eos_token_id: What ends an answer, if anything does.

    Raises:
        ValueError: Levels or sizes are not those of the trie, or a token stands for two codes of a level.
    """

    def __init__(
        self, trie: PrefixTrie, level_tokens: Sequence[Tensor], prompt_length: int, eos_token_id: int | None = None
    ) -> None:
        found = tuple(len(tokens) for tokens in level_tokens)
        if found != trie.level_sizes:
            raise ValueError(f"level_tokens: found {found} tokens per level, expected {trie.level_sizes}")
        if any(len(tokens.unique()) < len(tokens) for tokens in level_tokens):
            raise ValueError("level_tokens: found a token twice in one level, expected one token for each code")
        self.trie = trie
        self.prompt_length = prompt_length
        self.eos_token_id = eos_token_id
        self._tokens = [tokens.long() for tokens in level_tokens]
        self._sorted = [tokens.sort() for tokens in self._tokens]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, prompt + m] ids, [rows, V] scores -> [rows, V] scores.

        Raises:
            ValueError: `input_ids` is shorter than the prompt.
        """
        level = input_ids.shape[1] - self.prompt_length
        if level < 0:
            raise ValueError(f"found {input_ids.shape[1]} tokens, expected a prompt of {self.prompt_length}")
        self._move(scores.device)
        masked = torch.full_like(scores, float("-inf"))
        ended = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        if level < self.trie.depth:
            nodes = self.trie.find(self._codes(input_ids[:, self.prompt_length :]))
            _, codes, real = self.trie.children(nodes, level)
            ended = ~real[:, 0]
            tokens = self._tokens[level][codes]
            tokens = torch.where(real, tokens, tokens[:, :1])  # writes the first child again rather than a wrong one
            masked.scatter_(1, tokens, scores.gather(1, tokens).masked_fill(ended[:, None], float("-inf")))
        if self.eos_token_id is not None:
            end = self.eos_token_id
            masked[:, end] = torch.where(ended, scores[:, end], masked[:, end])
        return masked

    def _codes(self, tokens: Tensor) -> Tensor:
        """[rows, m] generated tokens -> codes, -1 for a token that is none of its level."""
        columns = []
        for column, (known, code) in zip(tokens.T.contiguous(), self._sorted, strict=False):
            place = torch.searchsorted(known, column).clamp(max=len(known) - 1)
            columns.append(torch.where(known[place] == column, code[place], -1))
        return torch.stack(columns, 1) if columns else tokens

    def _move(self, device: torch.device) -> None:
        if self.trie.code.device != device or self._tokens[0].device != device:
            self.trie = self.trie.to(device)
            self._tokens = [tokens.to(device) for tokens in self._tokens]
            self._sorted = [tokens.sort() for tokens in self._tokens]


class Run(Protocol):
    """A causal decoder without its output layer that keeps and extends a cache."""

    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, level: int, /
    ) -> tuple[Tensor, Any]:
        """(last_hidden_state [B, Q, d], past_key_values).

        Args:
            inputs_embeds: [B, Q, d].
            attention_mask: [B, S] 1 at real tokens for the prompt, then additive [B, 1, Q, columns of the cache + Q].
            position_ids: [B, Q].
            past_key_values: The cache so far.
            level: The level whose code the states predict, 0 for the prompt.
        """
        ...


class CausalCodeSpeaker:
    """`CodeSpeaker` over a causal language model with the beams of a user as a tree in its row; see the module.

    The attention must follow a four-dimensional additive mask in every layer (sdpa, eager; see `runner`).

    Args:
        run: The decoder.
        prompt_embeds: [B, S, d], padded on either side.
        prompt_mask: [B, S] 1 at real tokens, at least one in each row.
        embed_codes: Codes of a level -> input vectors.
        logits: Hidden states -> scores of the codes of a level: logits for normaliser "level" or "trie",
            log-probabilities over the vocabulary for "given".
    """

    def __init__(
        self, run: Run, prompt_embeds: Tensor, prompt_mask: Tensor, embed_codes: EmbedCodes, logits: LevelLogits
    ) -> None:
        self.run, self.embed_codes, self.logits = run, embed_codes, logits
        self.prompt_embeds, self.prompt_mask = prompt_embeds, prompt_mask.bool()
        self.lengths = self.prompt_mask.sum(1)
        self._cache: Any = None
        self._tree: Tensor = self.prompt_mask[:, None, :0]  # [B, M, T]: code tokens that each beam descends from

    @torch.no_grad()
    def first(self) -> Tensor:
        """[B, W_0]: reads the prompts. Calling it again starts over."""
        mask = self.prompt_mask
        self._tree = mask[:, None, :0]
        hidden, self._cache = self.run(self.prompt_embeds, mask.long(), positions(mask), DynamicCache(), 0)
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = (columns * mask).argmax(1)  # the last real column, whichever side the padding stands on
        return self.logits(0, hidden[torch.arange(len(hidden), device=hidden.device), last])

    @torch.no_grad()
    def following(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """[B, M, W_level]; see `CodeSpeaker.following`."""
        rows, beams = codes.shape
        own = torch.eye(beams, dtype=torch.bool, device=codes.device).expand(rows, -1, -1)
        inherited = self._tree.gather(1, parents[:, :, None].expand(-1, -1, self._tree.shape[2]))
        self._tree = torch.cat([inherited, own], 2)
        visible = torch.cat([self.prompt_mask[:, None].expand(-1, beams, -1), self._tree], 2)
        place = (self.lengths + level - 1)[:, None].expand(-1, beams)
        hidden, self._cache = self.run(
            self.embed_codes(level - 1, codes), additive(visible, self._cache)[:, None], place, self._cache, level
        )
        return self.logits(level, hidden)


def additive(visible: Tensor, cache: Any) -> Tensor:
    """0 where a token may look, else the least number of the type that the cache computes in (sdpa wants that type)."""
    dtype = cache.layers[0].keys.dtype
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def runner(backbone: Backbone, gates: GateArguments | None = None) -> Run:
    """The decoder of a backbone, with its adapter and the users' gates [B, ...], as `CausalCodeSpeaker` calls it.

    Raises:
        RecipeError: The model's attention cannot follow a tree: another implementation than sdpa or eager, layers
            without keys and values, or (while running) a prompt longer than a sliding window.
    """
    config = backbone.base.config
    implementation = config.get_text_config(decoder=True)._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise RecipeError(f"llm.attn_implementation: found {implementation!r}, item codes need sdpa or eager")
    layers = DynamicCache(config=config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    known = ("DynamicLayer", "DynamicSlidingWindowLayer")
    if strange := {type(layer).__name__ for layer in layers} - set(known):
        raise RecipeError(f"llm: found {', '.join(sorted(strange))} as cache; item codes need plain attention layers")
    window = min((size for size in windows if size), default=None)

    def run(
        inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, level: int
    ) -> tuple[Tensor, Any]:
        if window is not None and int(position_ids.max()) >= window:
            raise RecipeError(
                f"llm: found a prompt and code of {int(position_ids.max()) + 1} tokens, expected at most {window}, "
                "the model's attention window; use a shorter history"
            )
        output = backbone(
            inputs_embeds, attention_mask, gates,
            position_ids=position_ids, past_key_values=past_key_values, use_cache=True,
        )  # fmt: skip
        return output.last_hidden_state, output.past_key_values

    return run
