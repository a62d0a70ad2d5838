"""Tokens per second, MFU and peak memory of LoRA, iLoRA and QLoRA on one GPU (`make bench-gpu`).

A Llama of 1 or 3 billion weights is built from its configuration with random weights, so nothing is downloaded. Each
tuner trains three shapes: `item_slots` (one vector per item, every position supervised), `hybrid` (prompts with item
slots and a short answer, padded) and `hybrid_packed` (the same prompts in shared rows). A step is forward, backward and
AdamW over adapter and projector; the loss looks at supervised tokens only; the sequence encoder that gives the gates
runs inside the step. Figures are medians after warm-up.

Operations counted per real token, padding not counted (P decoder weights, A adapter weights, S tokens before it that it
may attend to on average, V vocabulary):

    forward   2 P + 2 A + 4 width S layers        backward   2 P + 4 A + 8 width S layers

The base is frozen, so its weights get no gradient: 2 P backward, not 4 P. Each supervised token of a prompt adds
4 width V for the output layer. MFU is that over the peak of the device's tensor cores (dense, bfloat16).

`--tiny --device cpu` runs all of it in seconds on a processor and grades nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.llm.loading import load_language_model
from llmrec.llm.recommender import LLMRecommender
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from llmrec.tuners.ilora import ILoraTuner
from llmrec.tuners.lora import LoraTuner
from tests.benchmarks.run import OUT, machine
from tests.fixtures.tokenizers import tiny_bpe_tokenizer

TUNERS = {"lora": (LoraTuner, None), "ilora": (ILoraTuner, None), "qlora": (LoraTuner, "4bit")}
SHAPES = ("item_slots", "hybrid", "hybrid_packed")
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 operations per second, by part of the device's name."""

MAXIMUM = {"item_slots: iLoRA step / LoRA step": 1.05, "hybrid_packed: iLoRA step / LoRA step": 1.05}
MINIMUM = {"hybrid_packed: LoRA MFU": 0.40}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Args:
        llama: Sizes of the language model.
        rows: Examples of a batch of prompts; batches of item slots hold `slot_rows`.
        history: Items of a history.
        typical, longest: Tokens of prompts: median and limit of their log-normal lengths.
    """

    llama: dict[str, int]
    rows: int = 32
    slot_rows: int = 256
    history: int = 50
    typical: int = 300
    longest: int = 1024
    answer: int = 12
    items: int = 10_000
    warm_up: int = 3
    repeats: int = 5


def _llama(width: int, layers: int, heads: int, shared: int, inner: int, vocabulary: int = 128_256) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": shared,
        "intermediate_size": inner, "vocab_size": vocabulary,
    }  # fmt: skip


SIZES = {
    "1b": Size(_llama(2048, 16, 32, 8, 8192)),
    "3b": Size(_llama(3072, 28, 24, 8, 8192)),
    "tiny": Size(_llama(32, 2, 4, 2, 64, 400), 4, 4, 6, 20, 40, 3, 50, 1, 2),
}


def run(size: str = "1b", device: str = "cuda") -> dict[str, float]:
    """The figures of `measure` in one table."""
    return measure(SIZES[size], torch.device(device), None)["figures"]


def measure(size: Size, device: torch.device, peak: float | None) -> dict[str, Any]:
    """Every tuner on every shape.

    Args:
        size: What to build.
        device: Where it runs.
        peak: Operations per second of the device; None looks its name up.

    Returns:
        `runs` (one record per tuner and shape) and `figures` (ratios and MFU by name).
    """
    peak = peak or _peak(device)
    records = []
    with tempfile.TemporaryDirectory(prefix="llmrec-bench-") as folder:
        _save_base(size, device, Path(folder))
        for tuner in TUNERS:
            for shape in SHAPES:
                print(f"{tuner} {shape} ...", file=sys.stderr, flush=True)
                found = _measure_one(tuner, shape, size, Path(folder), device)
                records.append({"tuner": tuner, "shape": shape, **found})
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    for record in records:
        done = record["seconds"] is not None and peak
        record["mfu"] = record["operations"] / record["seconds"] / peak if done else None
    return {"runs": records, "figures": _figures(records), "peak_operations_per_second": peak}


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _save_base(size: Size, device: torch.device, folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_bpe_tokenizer(["a viewer has watched these films"], 300)
    with torch.device(device):
        config = LlamaConfig(**size.llama, max_position_embeddings=8192, tie_word_embeddings=True)  # type: ignore[arg-type]
        model: Any = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _measure_one(tuner: str, shape: str, size: Size, folder: Path, device: torch.device) -> dict[str, Any]:
    """One record; a device that is too small is a finding, not a failure."""
    model = build(tuner, shape, size, folder, device)
    batch = make_batch(shape, size, device)
    work = {"tokens": _tokens(batch), "operations": operations(model, batch, shape)}
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        times = _times(step_of(model, batch), size, device)
    except torch.OutOfMemoryError:
        return {**work, "seconds": None, "tokens_per_second": None, "peak_gb": None, "note": "out of memory"}
    seconds = statistics.median(times)
    return {
        **work,
        "seconds": seconds,
        "all_seconds": times,
        "tokens_per_second": work["tokens"] / seconds,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
    }


def build(tuner: str, shape: str, size: Size, folder: Path, device: torch.device) -> Any:
    """A recommender of the package: quantised where asked for, adapter on all linear layers, random encoder."""
    kind, quantize = TUNERS[tuner]
    base, tokenizer = load_language_model(folder, "bfloat16", quantize, device=device)  # type: ignore[arg-type]
    torch.manual_seed(1)
    encoder: Any = SASRecEncoder(SASRecConfig(num_items=size.items, hidden_size=64, max_history=size.history))
    options = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    adapted = kind.attach(base, kind.configure(options, gate_dim=int(encoder.gate_dim)))
    style: Any = "item_slots" if shape == "item_slots" else "hybrid"
    model: Any = LLMRecommender.build(
        adapted, encoder=encoder.to(device), tokenizer=tokenizer, style=style, max_history=size.history
    ).to(device)
    if shape == "hybrid_packed":
        model.use_packing()
    return model.train()


def make_batch(shape: str, size: Size, device: torch.device) -> Any:
    """Random histories; for hybrid also random prompts of log-normal lengths with slots and answers."""
    rng = torch.Generator().manual_seed(2)
    rows = size.slot_rows if shape == "item_slots" else size.rows
    items = torch.randint(1, size.items + 1, (rows, size.history), generator=rng)
    batch: dict[str, Any] = {"item_ids": items, "lengths": torch.full((rows,), size.history)}
    if shape == "item_slots":
        batch["targets"] = torch.randint(1, size.items + 1, items.shape, generator=rng)
    else:
        spread = torch.empty(rows).normal_(0, 0.6, generator=rng).exp() * size.typical
        lengths = spread.long().clamp(size.history + 2 * size.answer, size.longest)
        places = torch.arange(int(lengths.max())).expand(rows, -1)
        answer = (places >= lengths[:, None] - size.answer) & (places < lengths[:, None])
        ids = torch.randint(3, 300, places.shape, generator=rng)
        batch["input_ids"] = ids
        batch["attention_mask"] = (places < lengths[:, None]).long()
        batch["token_labels"] = ids.masked_fill(~answer, -100)
        batch["item_slots"] = torch.zeros_like(ids)
        batch["item_slots"][:, 2 : 2 + size.history] = items
    return {name: value.to(device) for name, value in batch.items()}


def _tokens(batch: Any) -> int:
    mask = batch.get("attention_mask")
    return int(batch["item_ids"].numel() if mask is None else mask.sum())


def operations(model: Any, batch: Any, shape: str) -> float:
    """Useful operations of a step; see the module."""
    config = model.backbone.base.config
    decoder = model.backbone.base.get_decoder()
    adapter = sum(p.numel() for n, p in decoder.named_parameters() if ".lora_" in n)
    heads = config.hidden_size // config.num_attention_heads
    width, inner, shared = config.hidden_size, config.intermediate_size, config.num_key_value_heads * heads
    layer = 2 * width * width + 2 * width * shared + 3 * width * inner
    mask = batch.get("attention_mask")
    lengths = batch["lengths"] if mask is None else mask.sum(1)
    tokens, squares = float(lengths.sum()), float((lengths.double() ** 2).sum())
    attention = 12 * width * config.num_hidden_layers * squares / 2  # a token attends to half of its example
    answers = 0 if shape == "item_slots" else int((batch["token_labels"] != -100).sum())
    linear = tokens * (4 * layer * config.num_hidden_layers + 6 * adapter)
    return linear + attention + 4 * width * config.vocab_size * answers


def step_of(model: Any, batch: Any) -> Callable[[], float]:
    """One whole training step: the loss of the recipe's strategy, backward, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=batch["item_ids"].device.type == "cuda")
    strategy = NextItem()
    info = StepInfo(0, 1, 0.0, torch.Generator())

    def step() -> float:
        loss = strategy.loss(model, batch, info).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for the device

    return step


def _times(step: Callable[[], float], size: Size, device: torch.device) -> list[float]:
    times = []
    for turn in range(size.warm_up + size.repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= size.warm_up:
            times.append(time.perf_counter() - start)
        if loss != loss:
            raise ArithmeticError(f"the loss became {loss} in step {turn}; the figures would mean nothing")
    return times


def _figures(records: list[dict[str, Any]]) -> dict[str, float]:
    found = {(record["tuner"], record["shape"]): record for record in records}
    figures: dict[str, float] = {}
    for shape in SHAPES:
        plain = found["lora", shape]
        if plain["mfu"] is not None:
            figures[f"{shape}: LoRA MFU"] = plain["mfu"]
        for tuner, name in (("ilora", "iLoRA"), ("qlora", "QLoRA")):
            other = found[tuner, shape]
            if plain["seconds"] and other["seconds"]:
                figures[f"{shape}: {name} step / LoRA step"] = other["seconds"] / plain["seconds"]
            if plain["peak_gb"] and other["peak_gb"]:
                figures[f"{shape}: {name} memory / LoRA memory"] = other["peak_gb"] / plain["peak_gb"]
    padded, packed = found["lora", "hybrid"]["seconds"], found["lora", "hybrid_packed"]["seconds"]
    if padded and packed:
        figures["hybrid: padded / packed"] = padded / packed
    return figures


def missed(figures: dict[str, float]) -> list[str]:
    """What does not reach its aim, in words; a figure that could not be taken counts as missed."""
    found = []
    for aims, word, sign in ((MAXIMUM, "at most", 1.0), (MINIMUM, "at least", -1.0)):
        for name, aim in aims.items():
            value = figures.get(name)
            if value is None or sign * value > sign * aim:
                found.append(f"{name}: {'not measured' if value is None else f'{value:.3f}'}, aim: {word} {aim}")
    return found


def main(argv: list[str]) -> int:
    """Measure, write one JSON file, print the figures; exit status 1 when an aim is missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_gpu", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", choices=["1b", "3b"], default="1b")
    parser.add_argument("--tiny", action="store_true", help="a toy model: exercises the code, grades nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak, for a device not known by name")
    parser.add_argument("--out", type=Path, default=OUT.with_name("bench-gpu.json"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "bench-gpu: found no CUDA device; run it on a machine with one, or try its code with --tiny --device cpu",
            file=sys.stderr,
        )
        return 2
    if device.type != "cuda" and not args.tiny:
        print(f"bench-gpu: {device} cannot run a model of this size; expected cuda, or --tiny", file=sys.stderr)
        return 2
    size = "tiny" if args.tiny else args.size
    peak = args.peak_tflops * 1e12 if args.peak_tflops else None
    found = measure(SIZES[size], device, peak)
    graded = device.type == "cuda" and not args.tiny
    short = missed(found["figures"]) if graded else []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    setting = {"size": size, **asdict(SIZES[size])}
    report = {"device": name, "machine": machine(), "setting": setting, **found, "graded": graded, "missed": short}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for figure, value in found["figures"].items():
        print(f"{figure}: {value:.3f}")
    for line in short:
        print(line, file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
