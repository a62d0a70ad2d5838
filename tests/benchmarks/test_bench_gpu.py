"""The GPU benchmark cannot run everywhere; its code can, in a toy size on a processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import bench_gpu
from tests.benchmarks.run import BY_NAME_ONLY


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([]) == 2
    assert "found no CUDA device" in capsys.readouterr().err
    assert bench_gpu.main(["--device", "cpu"]) == 2
    assert "expected cuda, or --tiny" in capsys.readouterr().err
    assert "gpu" in BY_NAME_ONLY  # `make bench` leaves it out


def test_the_whole_benchmark_runs_in_a_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        monkeypatch.setattr(bench_gpu, "TUNERS", {**bench_gpu.TUNERS, "qlora": (bench_gpu.LoraTuner, None)})
    out = tmp_path / "bench.json"
    assert bench_gpu.main(["--tiny", "--device", "cpu", "--peak-tflops", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    runs = {(run["tuner"], run["shape"]): run for run in report["runs"]}
    assert len(runs) == 9 and not report["graded"] and report["missed"] == []
    for run in runs.values():
        assert run["seconds"] > 0 and len(run["all_seconds"]) == 2 and run["peak_gb"] is None
        assert run["mfu"] == pytest.approx(run["operations"] / run["seconds"] / 1e12)
    assert {run["tokens"] for (_, shape), run in runs.items() if shape == "item_slots"} == {4 * 6}
    assert runs["lora", "hybrid"]["operations"] == runs["lora", "hybrid_packed"]["operations"]
    assert {"hybrid_packed: iLoRA step / LoRA step", "hybrid: padded / packed"} <= set(report["figures"])


def test_operations_follow_the_formula() -> None:
    size = bench_gpu.SIZES["tiny"]
    batch = bench_gpu.make_batch("item_slots", size, torch.device("cpu"))
    config = type("Config", (), {**size.llama})()
    adapter = torch.nn.Module()
    adapter.register_module("q", torch.nn.Module())
    base = type("Base", (), {"config": config, "get_decoder": lambda self: adapter})()
    model = type("Model", (), {"backbone": type("Backbone", (), {"base": base})()})()
    # 32 wide, 2 layers: q and o 2 x 1024, k and v 2 x 512, feed-forward 3 x 2048 weights; 24 tokens in rows of 6.
    weights = 2 * (2 * 1024 + 2 * 512 + 3 * 2048)
    assert bench_gpu.operations(model, batch, "item_slots") == 24 * 4 * weights + 12 * 32 * 2 * 4 * 36 / 2


def test_aims_are_graded_and_a_missing_figure_is_a_miss() -> None:
    good = {**dict.fromkeys(bench_gpu.MAXIMUM, 1.04), **dict.fromkeys(bench_gpu.MINIMUM, 0.41)}
    assert bench_gpu.missed(good) == []
    slow = {**good, "item_slots: iLoRA step / LoRA step": 1.06}
    assert bench_gpu.missed(slow) == ["item_slots: iLoRA step / LoRA step: 1.060, aim: at most 1.05"]
    del good["hybrid_packed: LoRA MFU"]
    assert bench_gpu.missed(good) == ["hybrid_packed: LoRA MFU: not measured, aim: at least 0.4"]


def test_known_devices_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert bench_gpu._peak(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert bench_gpu._peak(torch.device("cuda")) is None and bench_gpu._peak(torch.device("cpu")) is None
