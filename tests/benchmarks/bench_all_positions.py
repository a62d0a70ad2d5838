"""SASRec on ml-100k: one epoch over windows (every position supervised) against one row per prefix.

Both epochs take the same optimizer steps: the prefixes of a batch are those of the same windows, so without dropout the
two losses have the same gradient, and the two models rank alike. The figures say so beside the times.
"""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmrec.blocks.losses import full_softmax
from llmrec.data.dataset import InteractionDataset
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.data.schema import SequenceBatch
from llmrec.data.sequences import SequenceCollator
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.evaluation.evaluator import Evaluator
from llmrec.evaluation.protocol import EvalProtocol
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem

LENGTH, BATCH, LEARNING_RATE = 50, 64, 5e-3
MINIMUM = {"epoch of prefixes / epoch of windows": 5.0}


def run() -> dict[str, float]:
    """Ratio of the times of one epoch, higher is better, and NDCG@10 on the test events after it."""
    dataset = small_movielens()
    torch.manual_seed(0)
    config = SASRecConfig(num_items=dataset.num_items, max_history=LENGTH, hidden_size=64, dropout=0.0)
    by_windows = SASRecEncoder(config)
    by_prefixes = copy.deepcopy(by_windows)
    windows = window_batches(dataset)
    fast, window_losses = epoch(by_windows, windows, window_loss)
    slow, prefix_losses = epoch(by_prefixes, windows, prefix_loss)
    return {
        "epoch of prefixes / epoch of windows": slow / fast,
        "largest difference of a step's loss": float(np.abs(np.subtract(window_losses, prefix_losses)).max()),
        "ndcg@10 of windows": ndcg(by_windows, dataset),
        "ndcg@10 of prefixes": ndcg(by_prefixes, dataset),
    }


def small_movielens() -> InteractionDataset:
    """ml-100k where the test data are at hand, the named download otherwise."""
    folder = Path(os.environ.get("LLMREC_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    source = str(folder / "ml-100k") if (folder / "ml-100k").is_dir() else "movielens-100k"
    return prepare_source(source, PrepareOptions()).dataset


def window_batches(dataset: InteractionDataset) -> list[SequenceBatch]:
    """The batches of one epoch, shuffled once."""
    examples, collate = dataset.windows(LENGTH), SequenceCollator()
    order = np.random.default_rng(0).permutation(len(examples))
    return [collate([examples[int(i)] for i in order[start : start + BATCH]]) for start in range(0, len(order), BATCH)]


def epoch(model: SASRecEncoder, batches: list[SequenceBatch], loss: object) -> tuple[float, list[float]]:
    """Seconds of one epoch, and the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    losses = []
    start = time.perf_counter()
    for batch in batches:
        total = loss(model, batch)  # type: ignore[operator]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return time.perf_counter() - start, losses


def window_loss(model: SASRecEncoder, batch: SequenceBatch) -> Tensor:
    """The suite's own objective."""
    return NextItem().loss(model, batch, StepInfo(0, 1, 0.0, torch.Generator())).total


def prefix_loss(model: SASRecEncoder, batch: SequenceBatch) -> Tensor:
    """The straightforward way: every prefix of every window is a row of its own, read at its last event."""
    rows, places = (batch["targets"] > 0).nonzero(as_tuple=True)
    width = batch["item_ids"].shape[1]
    prefixes = batch["item_ids"][rows].masked_fill(torch.arange(width) > places[:, None], 0)
    states = model(prefixes, places + 1).user_repr
    return full_softmax(model.score(states), batch["targets"][rows, places])


def ndcg(model: SASRecEncoder, dataset: InteractionDataset) -> float:
    """NDCG@10 over all items on the test events."""
    protocol = EvalProtocol(split="test", max_history=LENGTH)
    result = Evaluator(protocol, 256, torch.device("cpu"), progress=False).run(model.eval(), dataset)
    return float(result.metrics["ndcg@10"]["mean"])


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name}: {value:.6g}")
