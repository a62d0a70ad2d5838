"""Scoring 20 titles a user: each prompt + title on its own against one shared prompt, prompts of 200 tokens."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.llm.backbone import Backbone
from llmrec.llm.scoring import answer_log_probs, prefill, token_log_probs
from tests.benchmarks.timing import best_seconds

USERS, CANDIDATES, PROMPT, ANSWER = 2, 20, 200, 6
MINIMUM = {"each prompt + title / shared prompt": 4.0}


def model() -> Backbone:
    """A random language model, large enough that matrix products and not calls take the time."""
    torch.manual_seed(0)
    return Backbone(
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=512, vocab_size=8_000,
            )
        ).eval()
    )  # fmt: skip


@torch.no_grad()
def naive(backbone: Backbone, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """[B, C]: one sequence per prompt and title, logits at the title only."""
    ids = torch.cat([prompts.repeat_interleave(CANDIDATES, 0), answers.flatten(0, 1)], dim=1)
    hidden = backbone(backbone.embed(ids)).last_hidden_state[:, PROMPT - 1 : -1]
    scores = token_log_probs(backbone, hidden.flatten(0, 1), ids[:, PROMPT:].flatten())
    return scores.view(USERS, CANDIDATES, ANSWER).sum(-1)


@torch.no_grad()
def shared(backbone: Backbone, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """[B, C]: the way of `llmrec.llm.scoring`."""
    read = prefill(backbone, backbone.embed(prompts), torch.ones_like(prompts), {})
    return answer_log_probs(backbone, read, answers, torch.full(answers.shape[:2], ANSWER))


def run() -> dict[str, float]:
    """Ratio of times, higher is better; `MINIMUM` holds what it must reach. Results are compared first."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 8_000, (USERS, PROMPT), generator=generator)
    answers = torch.randint(0, 8_000, (USERS, CANDIDATES, ANSWER), generator=generator)
    backbone = model()
    torch.testing.assert_close(
        shared(backbone, prompts, answers), naive(backbone, prompts, answers), rtol=1e-4, atol=1e-3
    )
    slow = best_seconds(lambda: naive(backbone, prompts, answers))
    fast = best_seconds(lambda: shared(backbone, prompts, answers))
    return {"each prompt + title / shared prompt": slow / fast}


if __name__ == "__main__":
    for name, ratio in run().items():
        print(f"{name}: {ratio:.1f} (at least {MINIMUM[name]:.1f})")
