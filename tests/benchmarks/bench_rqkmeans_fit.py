"""RQ-KMeans fit of 50,000 items, 64 dimensions, 3 x 256 codes, against a plain loop of the same method."""

from __future__ import annotations

import time

import numpy as np
import torch

from llmrec.blocks.collisions import collision_groups
from llmrec.item_tokenizers.rqkmeans import RQKMeans

ITEMS, WIDTH, LEVELS, SIZE, ITERATIONS = 50_000, 64, 3, 256, 100
MINIMUM = {"naive collisions / ours": 1.0}
MAXIMUM = {"fit seconds": 60.0}


def catalogue(generator: np.random.Generator) -> np.ndarray:
    """[I, d]: a thousand groups of uneven size, and dimensions of falling variance, as item embeddings have them."""
    sizes = generator.pareto(1.2, size=1000) + 0.1
    centres = generator.normal(size=(1000, WIDTH))
    rows = centres[generator.choice(1000, size=ITEMS, p=sizes / sizes.sum())]
    values = (rows + 0.5 * generator.normal(size=rows.shape)) / np.sqrt(np.arange(1, WIDTH + 1))
    return np.concatenate([np.zeros((1, WIDTH)), values]).astype(np.float32)


def naive(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[I, M] codes: random rows as first centroids, a matrix of all distances, a loop over clusters for the means."""
    rest, columns = values.copy(), []
    for _ in range(LEVELS):
        book = rest[generator.choice(len(rest), SIZE, replace=False)]
        for _ in range(ITERATIONS):
            column = ((book**2).sum(1) - 2 * rest @ book.T).argmin(1)
            for code in range(SIZE):
                if (column == code).any():
                    book[code] = rest[column == code].mean(0)
        rest = rest - book[column]
        columns.append(column)
    return np.stack(columns, axis=1)


def run() -> dict[str, float]:
    """Seconds of both and the ratio of items that share a code before the collision policy."""
    values = catalogue(np.random.default_rng(0))
    mask = np.arange(ITEMS + 1) > 0
    tokenizer = RQKMeans(levels=LEVELS, codebook_size=SIZE)
    start = time.perf_counter()
    report = tokenizer.fit({"title": (values, mask)}, seed=0)
    seconds = time.perf_counter() - start
    standard = (values[1:] - values[1:].mean(0)) / values[1:].std(0)
    start = time.perf_counter()
    codes = naive(standard, np.random.default_rng(0))
    naive_seconds = time.perf_counter() - start
    group = collision_groups(torch.from_numpy(codes))[0]
    collisions = int((torch.bincount(group)[group] > 1).sum())
    return {
        "fit seconds": seconds,
        f"seconds of a plain loop, {ITERATIONS} iterations": naive_seconds,
        "items with a shared code, share": report.collisions / ITEMS,
        "naive collisions / ours": collisions / max(report.collisions, 1),
        "unexplained variance": report.details[f"unexplained_{LEVELS}"],
    }


if __name__ == "__main__":
    for name, value in run().items():
        limit = f" (at most {MAXIMUM[name]:.0f})" if name in MAXIMUM else ""
        limit = f" (at least {MINIMUM[name]:.1f})" if name in MINIMUM else limit
        print(f"{name}: {value:.3g}{limit}")
