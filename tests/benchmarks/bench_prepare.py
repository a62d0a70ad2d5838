"""Preparing ten million synthetic interactions: wall seconds and peak memory of one process.

Events are drawn once into a Parquet file (not counted), then a fresh process reads, filters, numbers, orders, splits
and saves them, so that its peak resident memory is that of preparation alone.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
EVENTS, USERS, ITEMS = 10_000_000, 500_000, 100_000
LIMIT_SECONDS, LIMIT_GB = 120.0, 3.0


def write_events(path: Path, events: int = EVENTS, seed: int = 0) -> None:
    """Shuffled events with heavy-tailed users and items; ids are numbers, times are seconds of one year."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    user = (USERS * rng.random(events) ** 1.5).astype(np.int64) + 1
    item = (ITEMS * rng.random(events) ** 2.5).astype(np.int64) + 1
    table = pa.table(
        {
            "user_id": user,
            "item_id": item,
            "rating": rng.integers(1, 6, events).astype(np.float32),
            "timestamp": 1_600_000_000 + rng.integers(0, 31_536_000, events),
        }
    )
    pq.write_table(table, path, compression="zstd")


def prepare_once(source: Path, out: Path) -> dict[str, float]:
    """Prepare and save in this process."""
    from llmrec.data.prepare import PrepareOptions, prepare

    start = time.perf_counter()
    dataset = prepare(source, PrepareOptions(min_user=5, min_item=5, split="leave_one_out"))
    prepared = time.perf_counter() - start
    dataset.save(out)
    return {
        "events_kept": float(dataset.interactions.num_rows),
        "prepare_seconds": prepared,
        "wall_seconds": time.perf_counter() - start,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
    }


def run() -> dict[str, float]:
    """Measure; `within_limits` is 1 when both stay under their limit."""
    with tempfile.TemporaryDirectory(prefix="llmrec-bench-") as folder:
        source = Path(folder) / "events.parquet"
        write_events(source)
        command = [sys.executable, __file__, str(source), str(Path(folder) / "prepared")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, float] = {"events": float(EVENTS), **json.loads(output.splitlines()[-1])}
    result["within_limits"] = float(result["wall_seconds"] <= LIMIT_SECONDS and result["peak_rss_gb"] <= LIMIT_GB)
    return result


if __name__ == "__main__":
    print(json.dumps(prepare_once(Path(sys.argv[1]), Path(sys.argv[2])) if len(sys.argv) == 3 else run()))
