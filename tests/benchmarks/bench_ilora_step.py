"""A training step of iLoRA (4 experts, gates per position) against plain LoRA of equal rank, and against no adapter."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.llm.backbone import Backbone
from llmrec.tuners.base import Tuner
from llmrec.tuners.ilora import ILoraTuner
from llmrec.tuners.lora import LoraTuner

ROWS, LENGTH, WIDTH, GATE = 8, 50, 288, 64
MAXIMUM = {"iLoRA step / LoRA step": 1.35}
OPTIONS = {"r": 8, "lora_dropout": 0.0}


def model(tuner: type[Tuner] | None, dtype: torch.dtype) -> Backbone:
    """A random language model with all linear layers adapted."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=768, vocab_size=1_000,
        )
    ).to(dtype)  # fmt: skip
    if tuner is None:
        return Backbone(base).train()
    return Backbone(tuner.attach(base, tuner.configure(OPTIONS, gate_dim=GATE))).train()


def run() -> dict[str, float]:
    """Ratios of times of forward, backward and optimizer, lower is better; `MAXIMUM` holds what they may reach.

    The kinds take turns, so that a busy moment of the machine hits all of them.
    """
    tuners = {"base": None, "LoRA": LoraTuner, "iLoRA": ILoraTuner}
    backbones = {name: model(tuner, torch.float32) for name, tuner in tuners.items()}
    steps = {name: _step(backbone) for name, backbone in backbones.items()}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(7):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
    return {
        "iLoRA step / LoRA step": best["iLoRA"] / best["LoRA"],
        "LoRA step / step of the bare model's inputs": best["LoRA"] / best["base"],
    }


def _step(backbone: Backbone) -> Callable[[], None]:
    inputs = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    states = torch.randn(ROWS, LENGTH, GATE)
    gates = {"user_repr": states} if backbone.gate_kind else {}
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, inputs], lr=1e-4)

    def step() -> None:
        backbone(inputs, None, gates).last_hidden_state.float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    for name, ratio in run().items():
        print(f"{name}: {ratio:.2f}" + (f" (at most {MAXIMUM[name]:.2f})" if name in MAXIMUM else ""))
