"""A tiny language model, encoder and prompts that the tests of this folder share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.llm.recommender import LLMRecommender
from llmrec.tuners.ilora import ILoraTuner
from llmrec.tuners.lora import LoraTuner
from tests.fixtures.tokenizers import tiny_bpe_tokenizer

ITEMS, WIDTH, LENGTH = 20, 16, 8
WORDS = ["red", "blue", "green", "old", "new", "river", "stone", "night", "paper", "glass"]
TITLES = ["", *[f"{WORDS[i % 10]} {WORDS[(3 * i + i // 10) % 10]} {i}" for i in range(1, ITEMS + 1)]]


@cache
def tokenizer() -> Any:
    return tiny_bpe_tokenizer([*TITLES, "watched: next:", "The user watched these films"], vocab_size=330)


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=len(tokenizer()), max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def encoder(seed: int = 0, dropout: float = 0.2, items: int = ITEMS) -> SASRecEncoder:
    torch.manual_seed(seed)
    model = SASRecEncoder(SASRecConfig(num_items=items, hidden_size=WIDTH, max_history=16, dropout=dropout))
    with torch.no_grad():
        model.item_embedding.weight[1:].mul_(15)
    return model.eval()


class Renderer:
    """Prompts of the form "watched: title[slot], ... next:"; slots as in the hybrid style."""

    titles = TITLES

    def __init__(self, hybrid: bool = False, user: bool = False) -> None:
        self.hybrid, self.user = hybrid, user

    def _ids(self, text: str) -> list[int]:
        return list(tokenizer()(text)["input_ids"])

    def encode(self, history: Any, candidates: Any = ()) -> Any:
        ids, slots = self._ids("watched:"), []
        slots = [0] * len(ids)
        for item in [int(i) for i in history]:
            piece = self._ids(f" {TITLES[item]}")
            ids, slots = ids + piece, slots + [0] * len(piece)
            if self.hybrid:
                ids, slots = [*ids, 0], [*slots, item]
        if self.user:
            ids, slots = [*ids, 0], [*slots, -1]
        end = self._ids(" next:")
        ids, slots = ids + end, slots + [0] * len(end)
        return type("Encoded", (), {"input_ids": np.array(ids), "item_slots": np.array(slots)})()

    def answer_ids(self, item: int) -> list[int]:
        return self._ids(f" {TITLES[item]}") + [0]


def recommender(
    style: str = "item_slots", tuner: str | None = "ilora", *, dtype: torch.dtype = torch.float32, seed: int = 0,
    trained: bool = False, **options: Any,
) -> LLMRecommender:  # fmt: skip
    """A recommender; with `trained` its adapter differs from a fresh one."""
    base: Any = llama(seed, dtype)
    torch.manual_seed(seed + 1)
    if tuner is not None:
        kind: Any = {"ilora": ILoraTuner, "lora": LoraTuner}[tuner]
        base = kind.attach(base, kind.configure({"r": 8, "lora_dropout": 0.0}, gate_dim=WIDTH))
    if trained:
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    words = style != "item_slots"
    return LLMRecommender.build(
        base, encoder=encoder(), tokenizer=tokenizer() if words or options.get("instruction") else None,
        renderer=Renderer(style == "hybrid", bool(options.get("user_slot"))) if words else None,
        style=style, max_history=LENGTH, **options,
    ).eval()  # fmt: skip


def rows(histories: list[list[int]], candidates: list[list[int]] | None = None) -> list[dict[str, Any]]:
    """Rows as `SequenceExamples` gives them in evaluation (targets blanked)."""
    found = []
    for number, history in enumerate(histories):
        items = np.array(history, dtype=np.int64)
        row = {"user_id": 0, "example_id": number, "item_ids": items, "targets": np.zeros_like(items), "seen": items}
        if candidates is not None:
            row["candidates"] = np.array(candidates[number], dtype=np.int64)
        found.append(row)
    return found


def with_answers(model: LLMRecommender, batch: SequenceBatch, answers: list[int], left: bool = True) -> SequenceBatch:
    """A training batch: the prompts of `batch` with answers behind them, padded on either side."""
    texts = []
    for row, answer in enumerate(answers):
        real = batch["attention_mask"][row].bool()
        reply = model.renderer.answer_ids(answer)  # type: ignore[union-attr, attr-defined]
        ids, slots = batch["input_ids"][row][real].tolist(), batch["item_slots"][row][real].tolist()
        texts.append((ids + reply, slots + [0] * len(reply), [-100] * len(ids) + reply))
    width = max(len(ids) for ids, _, _ in texts)

    def padded(values: list[int], fill: int) -> list[int]:
        pad = [fill] * (width - len(values))
        return pad + values if left else values + pad

    made: dict[str, Tensor] = dict(batch)  # type: ignore[arg-type]
    made["input_ids"] = torch.tensor([padded(ids, 0) for ids, _, _ in texts])
    made["item_slots"] = torch.tensor([padded(slots, 0) for _, slots, _ in texts])
    made["token_labels"] = torch.tensor([padded(labels, -100) for _, _, labels in texts])
    made["attention_mask"] = torch.tensor([padded([1] * len(ids), 0) for ids, _, _ in texts])
    return made  # type: ignore[return-value]
