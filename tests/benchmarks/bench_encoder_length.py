"""Sequence encoders at histories of 256 to 8,192 events: forward of one user, and one more event.

All have width 64, two blocks and random weights; SASRec attends by the fused kernel. "decode" is one event added to a
history of that length: from the encoder's state where it keeps one, by reading the history again where it does not.
"slope" is that of log time over log length from 1,024 events on, where the fixed cost of a call no longer shows.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from llmrec import discovery
from llmrec.data.schema import SequenceBatch
from llmrec.interfaces import IncrementalEncoder
from tests.benchmarks.timing import best_seconds
from tests.held_memory import Peak

LENGTHS = (256, 1_024, 2_048, 4_096, 8_192)
ITEMS, WIDTH, LAYERS, HEADS, DAY = 2_000, 64, 2, 2, 86_400
ENCODERS = ("sasrec", "hstu", "fuxi_alpha", "fuxi_linear", "blossomrec")
LINEAR, QUADRATIC = ("fuxi_linear",), ("hstu", "fuxi_alpha")
MEMORY_LENGTH = 4_096
MINIMUM = {
    "prefill fuxi_alpha / fuxi_linear at 8192": 5.0,
    "memory dense / gather at 4096 (blossomrec)": 2.0,
    **{f"slope {name}": 1.7 for name in QUADRATIC},
}
MAXIMUM = {"slope fuxi_linear": 1.2, "decode fuxi_linear at 8192 / at 256": 1.3}


def run() -> dict[str, float]:
    """Milliseconds and ratios; `MINIMUM` and `MAXIMUM` hold what the ratios must reach."""
    figures: dict[str, float] = {}
    forward: dict[str, list[float]] = {}
    decode: dict[str, list[float]] = {}
    for name in ENCODERS:
        forward[name], decode[name] = measure(name)
        for length, first, second in zip(LENGTHS, forward[name], decode[name], strict=True):
            figures[f"{name}: forward ms at {length}"] = 1e3 * first
            figures[f"{name}: decode ms at {length}"] = 1e3 * second
        figures[f"slope {name}"] = slope(forward[name])
    last = -1
    for other in ("hstu", "fuxi_alpha"):
        figures[f"prefill {other} / fuxi_linear at 8192"] = forward[other][last] / forward["fuxi_linear"][last]
        figures[f"decode {other} / fuxi_linear at 8192"] = decode[other][last] / decode["fuxi_linear"][last]
    figures["decode fuxi_linear at 8192 / at 256"] = decode["fuxi_linear"][last] / decode["fuxi_linear"][0]
    dense, gather = (peak_bytes(how) for how in ("dense", "gather"))
    figures["blossomrec: peak MB at 4096, dense"], figures["blossomrec: peak MB at 4096, gather"] = dense, gather
    figures["memory dense / gather at 4096 (blossomrec)"] = dense / gather
    return figures


def build(name: str, **options: Any) -> Any:
    """A random encoder for the longest history; heads where the encoder takes their number."""
    encoder: Any = discovery.resolve("encoder", name)
    torch.manual_seed(0)
    fixed = {"num_items": ITEMS, "max_history": LENGTHS[-1] + 1, "hidden_size": WIDTH, "num_layers": LAYERS}
    return encoder(encoder.config_class(**fixed, num_heads=HEADS, **options)).eval()


def history(length: int) -> SequenceBatch:
    """One user with `length` events, half a day apart on average."""
    generator = torch.Generator().manual_seed(length)
    times = 1_500_000_000 + torch.randint(1, DAY, (1, length), generator=generator).cumsum(1)
    return {
        "item_ids": torch.randint(1, ITEMS + 1, (1, length), generator=generator),
        "lengths": torch.tensor([length]),
        "timestamps": times,
        "target_timestamps": times[:, -1] + DAY,
    }


@torch.inference_mode()
def measure(name: str) -> tuple[list[float], list[float]]:
    """Seconds of a forward, and of one more event, at every length."""
    model = build(name)
    forward, decode = [], []
    for length in LENGTHS:
        batch = history(length)
        repeats = 20 if length <= 1_024 else 5 if length <= 4_096 else 3
        seconds = best_seconds(lambda b=batch: model.user_representation(b), repeats=repeats)  # type: ignore[misc]
        forward.append(seconds)
        decode.append(one_event(model, batch) if isinstance(model, IncrementalEncoder) else seconds)
    return forward, decode


def one_event(model: Any, batch: SequenceBatch) -> float:
    """Seconds of `step` and `read` on the state of a whole history."""
    if hasattr(model, "prefill"):
        state = model.prefill(batch)
    else:
        state = model.init_state(1)
        for place in range(batch["item_ids"].shape[1]):
            state = model.step(state, batch["item_ids"][:, place], batch["timestamps"][:, place])
    when = batch["target_timestamps"]
    item = batch["item_ids"][:, 0]
    return best_seconds(lambda: model.read(model.step(state, item, when), when + DAY), repeats=20)


@torch.inference_mode()
def peak_bytes(implementation: str) -> float:
    """Most megabytes BlossomRec's tensors hold at once, weights left out."""
    model = build("blossomrec", implementation=implementation)
    batch = history(MEMORY_LENGTH)
    with Peak(model) as peak:
        model.user_representation(batch)
    return peak.bytes / 2**20


def slope(seconds: list[float]) -> float:
    """Of log time over log length, from 1,024 events on."""
    return float(np.polyfit(np.log(LENGTHS[1:]), np.log(seconds[1:]), 1)[0])


if __name__ == "__main__":
    print(f"threads: {os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())}")
    for name, value in run().items():
        print(f"{name}: {value:.4g}")
