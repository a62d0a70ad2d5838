"""How likely are given answers? Each prompt is read once, and all its answers continue from the same cache.

    log p(a | prompt) = sum_t log p(a_t | prompt, a_<t)             optionally divided by the number of tokens of a

The first token of every answer is scored by the prompt's last state, so answers of one token cost no further pass. It
gives what scoring every prompt + answer on its own gives, at the cost of one prompt per user instead of one per answer.

Shapes: B prompts, C answers a prompt, T tokens of the longest answer, P tokens of the longest prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmrec.errors import DataError
from llmrec.llm.backbone import Backbone, GateArguments

LOGIT_ROWS = 1024
"""Rows of logits made at a time: 1,024 x 50,000 tokens are 200 MB in float32."""


@dataclass
class Prefilled:
    """Prompts the model has read.

    Args:
        cache: Keys and values of the prompts.
        mask: [B, P] 1 at real tokens, padding on the left.
        last: [B, d_llm] hidden state that predicts the first token of an answer.
        gates: Gates of the prompts, one per sequence.
    """

    cache: Any
    mask: Tensor
    last: Tensor
    gates: GateArguments


@torch.no_grad()
def prefill(backbone: Backbone, embeds: Tensor, mask: Tensor, gates: GateArguments) -> Prefilled:
    """Read left padded prompts.

    Args:
        backbone: The language model.
        embeds: [B, P, d_llm].
        mask: [B, P].
        gates: One gate per sequence, or {}.

    Raises:
        DataError: A prompt does not end in the last column.
    """
    if not bool(mask[:, -1].all()):
        raise DataError("prompts must be padded on the left to be continued", remedy="make the batch with `collate`")
    output = backbone(embeds, mask, gates, use_cache=True)
    return Prefilled(output.past_key_values, mask, output.last_hidden_state[:, -1], gates)


@torch.no_grad()
def answer_log_probs(
    backbone: Backbone, prompts: Prefilled, tokens: Tensor, lengths: Tensor, *, answers_at_once: int = 32
) -> Tensor:
    """Sum of the log-probabilities of each answer's tokens.

    Args:
        backbone: The language model.
        prompts: From `prefill`.
        tokens: [B, C, T] answers, right padded.
        lengths: [B, C] number of tokens; 0 gives a score of 0.
        answers_at_once: Answers per prompt that are run together; bounds the memory of the repeated cache.

    Returns:
        [B, C] float32.
    """
    first = torch.log_softmax(backbone.logits(prompts.last), dim=-1)
    total = first.gather(1, tokens[:, :, 0]) * (lengths > 0)
    for start in range(0, tokens.shape[1], answers_at_once):
        part = slice(start, start + answers_at_once)
        if int(lengths[:, part].max()) > 1:
            total[:, part] += _rest(backbone, prompts, tokens[:, part], lengths[:, part])
    return total


def _rest(backbone: Backbone, prompts: Prefilled, tokens: Tensor, lengths: Tensor) -> Tensor:
    """[B, C]: log-probabilities of the tokens after the first."""
    rows, answers, _ = tokens.shape
    width = int(lengths.max())
    asked = tokens[:, :, 1:width].flatten(0, 1)
    hidden = _continue(backbone, prompts, tokens[:, :, : width - 1])
    wanted = torch.arange(1, width, device=tokens.device) < lengths.flatten()[:, None]
    scores = hidden.new_zeros(asked.shape, dtype=torch.float32)
    scores[wanted] = token_log_probs(backbone, hidden[wanted], asked[wanted])
    return scores.sum(-1).view(rows, answers)


def _continue(backbone: Backbone, prompts: Prefilled, tokens: Tensor) -> Tensor:
    """[B * C, T, d_llm]: states after tokens [B, C, T] that stand behind the prompts."""
    answers, given = tokens.shape[1], tokens.flatten(0, 1)
    cache = copy.deepcopy(prompts.cache)
    cache.batch_repeat_interleave(answers)
    past = prompts.mask.repeat_interleave(answers, dim=0)
    mask = torch.cat([past, past.new_ones(given.shape)], dim=1)
    call = {"past_key_values": cache, "use_cache": True}
    return backbone(backbone.embed(given), mask, prompts.gates, **call).last_hidden_state


@torch.no_grad()
def last_states(backbone: Backbone, prompts: Prefilled, tokens: Tensor, lengths: Tensor) -> Tensor:
    """States after the last token of each continuation.

    Args:
        backbone: The language model.
        prompts: From `prefill`.
        tokens: [B, C, T] continuations, right padded.
        lengths: [B, C] number of tokens, at least 1.

    Returns:
        [B, C, d_llm].
    """
    hidden = _continue(backbone, prompts, tokens)
    ends = (lengths.flatten() - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
    return hidden.gather(1, ends).view(*lengths.shape, -1)


def token_log_probs(backbone: Backbone, hidden: Tensor, tokens: Tensor) -> Tensor:
    """[N] log-probability of tokens [N] after states [N, d_llm]; logits are made in parts."""
    parts = [
        torch.log_softmax(backbone.logits(states), dim=-1).gather(1, ids[:, None])[:, 0]
        for states, ids in zip(hidden.split(LOGIT_ROWS), tokens.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def pad_answers(answers: Sequence[Sequence[Sequence[int]]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token lists [B][C] -> tokens [B, C, T] padded with 0, and lengths [B, C]."""
    longest = max((len(answer) for row in answers for answer in row), default=0)
    columns = max((len(row) for row in answers), default=0)
    tokens = torch.zeros(len(answers), columns, max(1, longest), dtype=torch.long)
    lengths = torch.zeros(len(answers), columns, dtype=torch.long)
    for i, row in enumerate(answers):
        for j, answer in enumerate(row):
            tokens[i, j, : len(answer)] = torch.tensor(list(answer), dtype=torch.long)
            lengths[i, j] = len(answer)
    return tokens.to(device), lengths.to(device)
