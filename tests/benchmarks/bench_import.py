"""Time of `import llmrec` and `llmrec --help`, beyond the start of the interpreter (aims: 0.3 s and 0.5 s)."""

from __future__ import annotations

import subprocess
import sys
import time

REPEATS = 5


def run() -> dict[str, float]:
    """Best of several fresh interpreters, and the ratio to `import torch`."""
    empty = best(["-c", "pass"])
    package = best(["-c", "import llmrec"]) - empty
    torch = best(["-c", "import torch"]) - empty
    return {
        "import_llmrec_seconds": package,
        "help_seconds": best(["-m", "llmrec", "--help"]) - empty,
        "import_llmrec_over_import_torch": package / torch,
    }


def best(words: list[str]) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)
