"""A training step against 100,000 items: full softmax against 256 shared negatives (sampled softmax)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrec.blocks.losses import accidental_hits, draw_negatives, full_softmax, sampled_softmax
from tests.benchmarks.timing import best_seconds

ITEMS, PLACES, WIDTH, NEGATIVES = 100_000, 1_024, 64, 256
MINIMUM = {"full softmax / sampled softmax": 5.0}


def run() -> dict[str, float]:
    """Ratio of the times of loss and gradient, higher is better."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(PLACES, WIDTH, generator=generator)
    table = nn.Embedding(ITEMS + 1, WIDTH)
    targets = torch.randint(1, ITEMS + 1, (PLACES,), generator=generator)

    def full() -> Tensor:
        return full_softmax(states @ table.weight.T, targets)

    def sampled() -> Tensor:
        drawn = draw_negatives(ITEMS, (NEGATIVES,), generator, states.device)
        positive = (states * table(targets)).sum(1)
        return sampled_softmax(positive, states @ table(drawn).T, hits=accidental_hits(drawn, targets))

    times = {}
    for loss in (full, sampled):

        def step(loss: object = loss) -> None:
            table.zero_grad()
            loss().backward()  # type: ignore[operator]

        times[loss.__name__] = best_seconds(step, repeats=3)
    return {"full softmax / sampled softmax": times["full"] / times["sampled"]}


if __name__ == "__main__":
    for name, ratio in run().items():
        print(f"{name}: {ratio:.1f} (at least {MINIMUM[name]:.1f})")
