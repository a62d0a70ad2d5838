"""Training on prompts of real lengths: batches padded to their longest, grouped by length, and packed into rows.

Prompts show histories of 1 to 50 items, each titled, without a limit of tokens. The same examples are trained on in all
three ways; times are those of forward and backward of a small random language model, in seconds of the processor, so
that a busy machine does not lengthen them. What can be gained is bounded by what is padding: "cells / tokens".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.data.dataset import InteractionDataset
from llmrec.data.grouping import grouped_order
from llmrec.data.instructions import InstructionCollator
from llmrec.data.item_text import title_texts
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.data.prompt_encoder import PromptOptions
from llmrec.llm.recommender import LLMRecommender
from llmrec.llm.rendering import PromptRenderer
from llmrec.recipe import StageSpec
from llmrec.tuners.lora import LoraTuner
from tests.fixtures.tokenizers import tiny_bpe_tokenizer

ROWS, BATCHES, REPEATS = 8, 8, 2
WIDTH, LAYERS, VOCABULARY = 256, 2, 4_000
REAL = {"amazon-beauty-2014": "next_item/product", "ml-100k": "next_item/movie"}
MINIMUM = {"amazon-beauty-2014: padded / better of both": 2.0}


def run() -> dict[str, float]:
    """Ratios of times, higher is better; `MINIMUM` holds what each must reach where its data set is at hand."""
    figures: dict[str, float] = {}
    for name, template, dataset in datasets():
        figures |= {f"{name}: {figure}": value for figure, value in compare(dataset, template).items()}
    return figures


def datasets() -> Iterator[tuple[str, str, InteractionDataset]]:
    """Name, prompts and data: the real sets that are here, and drawn histories of evenly spread lengths."""
    folder = os.environ.get("LLMREC_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    for name, template in REAL.items():
        if (Path(folder) / name).is_dir():
            yield name, template, prepare_source(str(Path(folder) / name), PrepareOptions()).dataset
    options = {"users": 60, "items": 400, "events_per_user": 52}
    yield "synthetic", "next_item/product", prepare_source("synthetic", PrepareOptions(source_options=options)).dataset


def compare(dataset: InteractionDataset, template: str) -> dict[str, float]:
    """Times of one data set, and how much of its padded batches is padding."""
    titles = title_texts(dataset)
    tokenizer = tiny_bpe_tokenizer(titles, VOCABULARY)
    renderer = PromptRenderer(titles, PromptOptions(template, max_history=50), tokenizer)
    model = small_model(renderer, tokenizer)
    stage = StageSpec(train="tuner", max_examples=ROWS * BATCHES)
    examples, collator = renderer.training_data(dataset, stage, seed=0)
    rng = np.random.default_rng(0)
    shuffled = batches(examples, collator, rng.permutation(len(examples)))
    grouped = batches(examples, collator, grouped_order(examples.lengths, ROWS, rng))
    model.use_packing()
    best = take_turns(
        {
            "padded": lambda: train(model, shuffled, packing=False),
            "grouped": lambda: train(model, grouped, packing=False),
            "packed": lambda: train(model, shuffled, packing=True),
        }
    )
    tokens = sum(int(batch["attention_mask"].sum()) for batch in shuffled)
    ratios = {f"padded / {way}": best["padded"] / best[way] for way in ("grouped", "packed")}
    return {
        "cells / tokens": sum(batch["attention_mask"].numel() for batch in shuffled) / tokens,
        "tokens_per_prompt": tokens / len(examples),
        **ratios,
        "padded / better of both": max(ratios.values()),
    }


def small_model(renderer: PromptRenderer, tokenizer: Any) -> Any:
    """A random language model under LoRA that names the next title."""
    config = LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=3 * WIDTH, vocab_size=len(tokenizer), max_position_embeddings=16_384,
    )  # fmt: skip
    options = LoraTuner.configure({"r": 8, "lora_dropout": 0.0})
    base = LoraTuner.attach(LlamaForCausalLM(config), options)
    return LLMRecommender.build(base, tokenizer=tokenizer, renderer=renderer, style="text", max_history=50).train()


def batches(examples: Any, collator: InstructionCollator, order: np.ndarray) -> list[Any]:
    """One epoch in an order, collated."""
    return [collator([examples[int(i)] for i in order[at : at + ROWS]]) for at in range(0, len(order), ROWS)]


def train(model: Any, epoch: list[Any], packing: bool) -> None:
    """Forward and backward of every batch."""
    model.packing = packing
    for batch in epoch:
        model.answer_loss(batch).backward()
        model.zero_grad()


def take_turns(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Shortest processor time of each call; they take turns, after a round that warms up."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                best[name] = min(best[name], time.process_time() - start)
    return best


if __name__ == "__main__":
    for name, ratio in run().items():
        print(f"{name}: {ratio:.2f}" + (f" (at least {MINIMUM[name]:.1f})" if name in MINIMUM else ""))
