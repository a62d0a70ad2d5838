"""Loss and gradient over all logits against those of supervised tokens only: 1 token in 10, vocabulary 49,152."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.llm.backbone import Backbone
from tests.benchmarks.timing import best_seconds

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 256, 192, 49_152
MINIMUM = {"logits everywhere / at labels": 4.0}


def run() -> dict[str, float]:
    """Ratio of times of output layer, loss and backward, higher is better; both losses are compared first."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    backbone = Backbone(LlamaForCausalLM(LlamaConfig(hidden_size=WIDTH, vocab_size=VOCABULARY, **sizes)))  # type: ignore[arg-type]
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    labels = torch.full((ROWS, LENGTH), -100)
    labels[:, -LENGTH // 10 :] = torch.randint(0, VOCABULARY, (ROWS, LENGTH // 10 + 1))

    def everywhere() -> torch.Tensor:
        return F.cross_entropy(backbone.logits(hidden).flatten(0, 1), labels.flatten())

    def at_labels() -> torch.Tensor:
        wanted = labels != -100
        return F.cross_entropy(backbone.logits(hidden[wanted]), labels[wanted])

    torch.testing.assert_close(everywhere(), at_labels())
    slow, fast = best_seconds(lambda: everywhere().backward()), best_seconds(lambda: at_labels().backward())
    return {"logits everywhere / at labels": slow / fast}


if __name__ == "__main__":
    for name, ratio in run().items():
        print(f"{name}: {ratio:.1f} (at least {MINIMUM[name]:.1f})")
