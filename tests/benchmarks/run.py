"""`make bench`: runs every `bench_*.py` beside this file, prints a table and writes one JSON file.

A benchmark is a module with `run() -> dict[str, float]`: ratios against a baseline measured in the same process and
minute (so that they mean something on another machine), or figures with their unit in the name. Its docstring's first
line says what is compared. Arguments name the benchmarks to run; without any, all run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
OUT = FOLDER.parent.parent / "runs" / "bench.json"
BY_NAME_ONLY = {"gpu"}
"""Needs what most machines lack; `make bench-gpu` runs it."""


def main(names: list[str]) -> int:
    """Run benchmarks; exit status 1 when one of them fails, after the others have run."""
    from llmrec.commands.output import console_for, tabulate, to_json

    found = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    if unknown := [name for name in names if name not in found]:
        print(f"found no benchmark {', '.join(unknown)}; expected: {', '.join(found)}", file=sys.stderr)
        return 2
    results, failed, rows = {}, [], []
    for name in names or [name for name in found if name not in BY_NAME_ONLY]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        module = load(found[name])
        try:
            figures = module.run()
        except Exception as error:
            failed.append(name)
            figures, rows = {}, [*rows, [name, f"failed: {error}", None, None]]
        seconds = time.perf_counter() - start
        about = (module.__doc__ or "").strip().splitlines()[:1]
        results[name] = {"about": "".join(about), "seconds": seconds, "figures": figures}
        rows += [[name, figure, value, round(seconds, 1)] for figure, value in figures.items()]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "benchmarks": results, "failed": failed}
    OUT.write_text(json.dumps(to_json(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console_for(sys.stdout).print(tabulate(["benchmark", "figure", "value", "seconds"], rows))
    print(f"written to {os.path.relpath(OUT)}", file=sys.stderr)
    return 1 if failed else 0


def load(path: Path) -> ModuleType:
    """Import a benchmark by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine() -> dict[str, object]:
    """What the figures depend on."""
    libraries = ("torch", "transformers", "peft", "duckdb")
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
