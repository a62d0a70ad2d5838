"""Scores over a shared prompt are those of scoring every prompt + answer on its own."""

from __future__ import annotations

import pytest
import torch

from llmrec.errors import DataError
from llmrec.llm.backbone import Backbone
from llmrec.llm.scoring import answer_log_probs, pad_answers, prefill, token_log_probs
from tests.llm.tiny import WIDTH, llama, recommender

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
ANSWERS = [[[20], [21, 22, 23], [24, 25], []], [[30, 31], [32], [33, 34, 35, 36], [37, 38]]]


def naive(backbone: Backbone, gates: dict[str, torch.Tensor]) -> torch.Tensor:
    scores = torch.zeros(2, 4)
    for row, prompt in enumerate(PROMPTS):
        own = {name: value[row : row + 1] for name, value in gates.items()}
        for column, answer in enumerate(ANSWERS[row]):
            ids = torch.tensor([prompt + answer])
            hidden = backbone(backbone.embed(ids), None, own).last_hidden_state
            logs = torch.log_softmax(backbone.logits(hidden)[0], dim=-1)
            scores[row, column] = sum(
                logs[len(prompt) + i - 1, token] for i, token in enumerate(answer)
            ) if answer else 0.0  # fmt: skip
    return scores


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    return ids, mask


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 32])
@torch.no_grad()
def test_equals_scoring_each_answer_alone(gated: bool, at_once: int) -> None:
    backbone = recommender("text", "ilora" if gated else None, trained=gated).backbone
    gates = {"user_repr": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))} if gated else {}
    ids, mask = padded()
    prompts = prefill(backbone, backbone.embed(ids), mask, gates)
    tokens, lengths = pad_answers(ANSWERS, "cpu")
    found = answer_log_probs(backbone, prompts, tokens, lengths, answers_at_once=at_once)
    torch.testing.assert_close(found, naive(backbone, gates), rtol=1e-5, atol=1e-4)
    again = answer_log_probs(backbone, prompts, tokens, lengths, answers_at_once=at_once)
    torch.testing.assert_close(again, found)  # the prompts' cache is left as it was


@torch.no_grad()
def test_gates_stay_with_their_rows() -> None:
    backbone = recommender("text", trained=True).backbone
    ids, mask = padded()
    tokens, lengths = pad_answers(ANSWERS, "cpu")
    gates = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    scores = []
    for other in (gates, torch.stack([gates[0], -gates[1]])):
        prompts = prefill(backbone, backbone.embed(ids), mask, {"user_repr": other})
        scores.append(answer_log_probs(backbone, prompts, tokens, lengths))
    torch.testing.assert_close(scores[0][0], scores[1][0])
    assert (scores[0][1] - scores[1][1]).abs().max() > 1e-4


def test_prompts_padded_on_the_right_are_refused() -> None:
    backbone = Backbone(llama())
    with pytest.raises(DataError, match="padded on the left"):
        prefill(backbone, backbone.embed(torch.ones(1, 3, dtype=torch.long)), torch.tensor([[1, 1, 0]]), {})


@torch.no_grad()
def test_no_tokens_no_scores() -> None:
    backbone = Backbone(llama())
    assert token_log_probs(backbone, torch.zeros(0, 32), torch.zeros(0, dtype=torch.long)).shape == (0,)
    tokens, lengths = pad_answers([[[1, 2], []]], "cpu")
    assert tokens.tolist() == [[[1, 2], [0, 0]]] and lengths.tolist() == [[2, 0]]
