"""Batch work divided over the processes of a launcher: who takes which part, and how all come to know the results.

`accelerate launch` and `torchrun` start the same command several times. Work is cut into the same parts as in one
process, so the numbers do not depend on how many processes there are: part n goes to process n mod W, every part is
done by exactly one process, and the rows are then sent to all. Only the first process writes files.

Every process takes the same number of turns (one without a part left repeats the last one), so models whose weights
are divided over the processes can be measured as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from llmrec.evaluation.found import Found

Part = TypeVar("Part")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others: parts take different times, and the launcher ends all when one dies."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among the processes of a launcher.

    Args:
        index: Number of this process, from 0.
        count: W, how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.index == 0

    def own(self, parts: Sequence[Part]) -> list[Part]:
        """The parts this process owns; none when there are more processes than parts."""
        return list(parts[self.index :: self.count])

    def turns(self, parts: Sequence[Part]) -> list[Part]:
        """The parts this process computes: its own, and the last part again where others have one more."""
        rounds = -(-len(parts) // self.count)
        return [parts[min(number * self.count + self.index, len(parts) - 1)] for number in range(rounds)]


def ranks() -> Ranks:
    """Where this process stands; one of one outside a group of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of the launcher, when there are any, and leave them at the end.

    A group that exists already is used and left as it is. Each process takes the accelerator of its local number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        yield ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=PATIENCE)  # only rows and signals travel, from host memory
    try:
        yield ranks()
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Go on once every process is here."""
    if ranks().count > 1:
        dist.barrier()


def exchange(found: Found, parts: Sequence[np.ndarray]) -> None:
    """Fill `found` with the rows that other processes measured; nothing to do for one process.

    Args:
        found: Rows of this process are filled; afterwards all are.
        parts: Row numbers of every part, in the order `Ranks.own` was given.
    """
    here = ranks()
    if here.count == 1:
        return
    for source in range(here.count):
        own = Ranks(source, here.count).own(parts)
        if not own:
            continue
        rows = np.concatenate(own)
        for values in (found.ranks, found.num_ranked, found.items, found.scores):
            values[rows] = _sent(values[rows], source)
        if found.texts is not None:
            texts = _sent_texts([found.texts[row] for row in rows], source)
            for row, text in zip(rows, texts, strict=True):
                found.texts[row] = text


def _sent(values: np.ndarray, source: int) -> np.ndarray:
    """The array as process `source` has it; shape and type are the same everywhere."""
    buffer: Tensor = torch.from_numpy(np.ascontiguousarray(values))
    if dist.get_backend() == "nccl":
        buffer = buffer.cuda()
    dist.broadcast(buffer, source)
    return buffer.cpu().numpy()


def _sent_texts(texts: Sequence[str], source: int) -> list[str]:
    encoded = [text.encode() for text in texts]
    sizes = _sent(np.array([len(one) for one in encoded], dtype=np.int64), source)
    content = np.zeros(int(sizes.sum()), dtype=np.uint8)
    if ranks().index == source:
        content = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    joint = _sent(content, source).tobytes()
    ends = np.cumsum(sizes)
    return [joint[end - size : end].decode() for end, size in zip(ends, sizes, strict=True)]
