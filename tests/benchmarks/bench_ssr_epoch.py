"""SSR on a graph of 200,000 interactions, 25,000 users and 12,000 items: seconds of one epoch, and its parts.

Two feature levels of random content (384 numbers, 2% of the items without them), default options of the encoder (three
bands, polynomials of degree 16, 64 numbers a signal), windows of at most 50 events, 512 of them in a step; forward,
backward and Adam. "products" are the sparse products alone that one step needs. Processor seconds are
summed over threads; with one thread they tell what an epoch costs on a machine that other programs use as well.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from llmrec.data.schema import DataContext, SequenceBatch
from llmrec.encoders.ssr import SSRConfig, SSREncoder
from llmrec.strategies.base import StepInfo, TrainContext
from llmrec.strategies.edges import Edges
from tests.benchmarks.timing import best_seconds

USERS, ITEMS, EVENTS, FEATURES, WINDOWS = 25_000, 12_000, 200_000, 384, 512
STEPS = 6
"""Steps that are timed; an epoch is their mean times its steps."""
MAXIMUM = {"seconds of an epoch": 120.0}


def context() -> DataContext:
    """Events whose items follow a power law; every user has eight."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(1, USERS + 1), EVENTS // USERS)
    items = 1 + (ITEMS * rng.random(EVENTS) ** 2.5).astype(np.int64)
    features = {}
    for name in ("text", "image"):
        mask = rng.random(ITEMS + 1) > 0.02
        features[name] = (rng.standard_normal((ITEMS + 1, FEATURES)).astype(np.float32), mask)
    counts = np.bincount(items, minlength=ITEMS + 1)
    return DataContext(ITEMS, USERS, counts, np.stack([users, items]), item_features=features)


def batches(data: DataContext) -> list[SequenceBatch]:
    """One window a user; every event but the first is supervised."""
    per_user = EVENTS // USERS
    items = torch.from_numpy(data.train_edges[1]).view(USERS, per_user)
    order = torch.randperm(USERS, generator=torch.Generator().manual_seed(0))
    found: list[SequenceBatch] = []
    for rows in order.split(WINDOWS):
        windows = items[rows]
        found.append(
            {
                "item_ids": windows[:, :-1],
                "lengths": torch.full((len(rows),), per_user - 1),
                "targets": windows[:, 1:],
                "user_ids": rows + 1,
            }
        )
    return found


def run() -> dict[str, float]:
    """Seconds; `MAXIMUM` holds what an epoch may take on two cores."""
    data = context()
    torch.manual_seed(0)
    began = time.perf_counter()
    model = SSREncoder.from_context(SSRConfig(num_items=ITEMS, num_users=USERS), data).train()
    built = time.perf_counter() - began
    strategy, everything = Edges(), batches(data)
    strategy.prepare(TrainContext(data, len(everything), 1, 0), model, torch.Generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def step(batch: SequenceBatch) -> Any:
        optimizer.zero_grad()
        strategy.loss(model, batch, StepInfo(0, 1, 0.0, generator)).total.backward()
        optimizer.step()

    began = time.perf_counter()
    step(everything[0])
    first = time.perf_counter() - began
    began, used = time.perf_counter(), time.process_time()
    for batch in everything[1 : 1 + STEPS]:
        step(batch)
    seconds, used = (time.perf_counter() - began) / STEPS, (time.process_time() - used) / STEPS
    signal = torch.randn(USERS + ITEMS, model.config.hidden_size)
    product = best_seconds(lambda: model.graph(signal))
    model.eval()
    with torch.no_grad():
        began = time.perf_counter()
        model.item_vectors()
        table = time.perf_counter() - began
    return {
        "seconds to build": built,
        "seconds of the first step (content decomposed once)": first,
        "seconds of a step": seconds,
        "seconds of a step in products": 2 * model.config.order * product,
        "processor seconds of an epoch, first step left out": used * (len(everything) - 1),
        "seconds of an epoch": first + seconds * (len(everything) - 1),
        "seconds of the item table": table,
    }


if __name__ == "__main__":
    print(f"threads: {os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())}")
    for name, value in run().items():
        print(f"{name}: {value:.4g}")
