"""What continuing a prompt with transformers needs: seeded draws, end tokens, control words, identity of weights.

Used by `llmrec.llm.generating`. Four defaults of the library are replaced: draws that depend on the other rows of a
batch, decoding options filled in from a model's generation_config.json, end tokens that leave out what the chat
template puts behind an answer, and templates that write today's date.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLED_ROWS = 64
_DAY = datetime.datetime(2025, 1, 1)


def seeded_draws(names: Sequence[str], count: int) -> np.ndarray:
    """[B, count] numbers in [0, 1); each row depends on its own name alone."""
    seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:16]) for name in names]
    return np.stack([np.random.default_rng(seed).random(count) for seed in seeds])


class SeededSampling:
    """Leaves one token a row, drawn by a number of that row; the greedy loop of transformers then takes it.

    The cumulative distribution runs in the order of the vocabulary, so tokens of nearly equal probability cannot
    change places by rounding.

    Args:
        uniforms: [B, N] numbers in [0, 1), one for each step of each row.
        width: Columns of the prompt; they tell the step.
        temperature: Divides the logits.
        top_p: Share of probability that is kept.
    """

    def __init__(self, uniforms: np.ndarray, width: int, temperature: float, top_p: float) -> None:
        self._uniforms, self._width, self._temperature, self._top_p = uniforms, width, temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores with -inf everywhere but at the drawn token."""
        import torch

        weights = torch.softmax(scores.double() / self._temperature, dim=-1)
        if self._top_p < 1:
            ranked = weights.sort(dim=-1, descending=True).values
            kept = (ranked.cumsum(-1) - ranked < self._top_p).sum(-1, keepdim=True)
            weights = weights * (weights >= ranked.gather(-1, kept - 1))
        total = weights.cumsum(-1)
        step = input_ids.shape[1] - self._width
        drawn = torch.as_tensor(self._uniforms[:, step, None], dtype=total.dtype, device=total.device)
        token = torch.searchsorted(total, drawn * total[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def end_tokens(model: Any, processor: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: of the model, of its tokenizer, and what the chat template puts behind an answer."""
    asked = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(asked if isinstance(asked, list) else [asked])} - {None}
    if getattr(processor, "chat_template", None) is not None:
        words = [("user", "a"), ("assistant", "zqz")]
        turns = [{"role": role, "content": text if processor is tokenizer else [{"type": "text", "text": text}]}
                 for role, text in words]  # fmt: skip
        from jinja2 import TemplateError

        try:
            behind = processor.apply_chat_template(turns, tokenize=False).rpartition("zqz")[2]
        except (TemplateError, TypeError):
            return ends  # a template for questions alone says nothing of what follows an answer
        first = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
        ends |= {token for token in first if token in tokenizer.added_tokens_decoder}
    return ends


def undated(template: str) -> str:
    """A chat template in which every day is the first of January 2025, so that a request stays the same prompt.

    Values handed to a template reach it as plain data, so the function it asks for the date is replaced by a macro.
    """
    if "strftime_now" not in template:
        return template
    parts = {letter: _DAY.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSuwxXyY"}
    filters = "".join(f" | replace('%{letter}', '{text}')" for letter, text in parts.items())
    return f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}{template}"


def control_words(processor: Any, tokenizer: Any) -> list[str]:
    """Words a tokenizer reads as control tokens, longest first."""
    words = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    words |= {str(token) for token in tokenizer.all_special_tokens}
    words |= {str(getattr(processor, "image_token", None) or "")}
    return sorted((word for word in words if len(word) > 1), key=lambda word: (-len(word), word))


@contextmanager
def decoding_of(model: Any, decoding: Any) -> Iterator[None]:
    # `generate` fills whatever a given configuration leaves open from the model's own: penalties, minimal lengths.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = [(owner, owner.generation_config) for owner in dict.fromkeys((inner, model))]
    for owner, _ in before:
        owner.generation_config = decoding
    try:
        yield
    finally:
        for owner, own in before:
            owner.generation_config = own


def weights_identity(model: Any) -> str:
    """Hash of configuration-free facts: names, types and the first rows of all weights, adapters included."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        rows = weight.detach()[:_SAMPLED_ROWS] if weight.dim() > 1 else weight.detach()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
