"""Finding and resolving shared codes among 10^6 items, against a loop with a dict."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from llmrec.blocks.collisions import collision_groups, resolve
from tests.benchmarks.timing import best_seconds

ITEMS, SIZES = 1_000_000, (256, 256, 256)
MINIMUM = {"dict loop / numbering": 10.0, "dict loop / policy append": 10.0}


def catalogue(generator: torch.Generator) -> Tensor:
    """[I, 3]: popular and rare codes in every level, so that many items share theirs."""
    columns = [(torch.rand(ITEMS, generator=generator) ** 3 * size).long() for size in SIZES]
    return torch.stack(columns, dim=1)


def by_dict(codes: Tensor) -> list[tuple[int, ...]]:
    """The straightforward way: count the items of a code while walking over the catalogue."""
    seen: dict[tuple[int, ...], int] = {}
    result = []
    for row in codes.tolist():
        key = tuple(row)
        number = seen.get(key, 0)
        seen[key] = number + 1
        result.append((*key, number))
    return result


def nowhere(rows: Tensor) -> Tensor:
    """Policy append asks for no costs."""
    raise AssertionError(f"costs of {len(rows)} rows")


def run() -> dict[str, float]:
    """Ratios of times, higher is better; `MINIMUM` holds what each must reach."""
    codes = catalogue(torch.Generator().manual_seed(0))
    start = time.perf_counter()
    expected = by_dict(codes)
    loop = time.perf_counter() - start
    found, _ = resolve(codes, SIZES, "append", costs=nowhere, seed=0)
    if found.tolist() != [list(row) for row in expected]:
        raise AssertionError("the two ways disagree")
    numbering = best_seconds(lambda: collision_groups(codes), repeats=3)
    append = best_seconds(lambda: resolve(codes, SIZES, "append", costs=nowhere, seed=0), repeats=3)
    return {
        "dict loop / numbering": loop / numbering,
        "dict loop / policy append": loop / append,
        "policy append seconds": append,
    }


if __name__ == "__main__":
    for name, ratio in run().items():
        print(f"{name}: {ratio:.2f}" + (f" (at least {MINIMUM[name]:.1f})" if name in MINIMUM else ""))
