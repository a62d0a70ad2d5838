"""Memory of a training step of SmolLM2-135M's shape with iLoRA, 4 x 128 tokens in bfloat16: held against estimated."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_bitsandbytes_available

from llmrec.llm.backbone import Backbone
from llmrec.llm.loading import load_language_model
from llmrec.llm.memory import Setting, estimate
from llmrec.tuners.ilora import ILoraTuner
from tests.fixtures.tokenizers import tiny_bpe_tokenizer
from tests.held_memory import Peak, tensor_bytes

BATCH, LENGTH, PLACES, GATE, MIB = 4, 128, 20, 64, 2**20
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {"r": 8, "num_experts": 4, "lora_dropout": 0.0, "target_modules": TARGETS}
SETTINGS: dict[str, tuple[Any, bool]] = {
    "plain": (None, False),
    "checkpointing": (None, True),
    "8-bit": ("8bit", False),
    "4-bit": ("4bit", False),
    "4-bit, checkpointing": ("4bit", True),
}


def attach(model: Any) -> Any:
    """The quick start's adapter."""
    return ILoraTuner.attach(model, ILoraTuner.configure(OPTIONS, gate_dim=GATE))


def run() -> dict[str, float]:
    """MiB by setting: base weights, all that is held at the worst moment of a step, and what `llmrec check` says."""
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tiny_bpe_tokenizer(["a"], vocab_size=260).save_pretrained(folder)
        for name, (quantize, checkpointing) in SETTINGS.items():
            if quantize is None or is_bitsandbytes_available():
                weights, held = measure(Path(folder), quantize, checkpointing)
                setting = Setting(
                    BATCH, LENGTH, PLACES, config.vocab_size, gate_dim=GATE, dtype=torch.bfloat16, quantize=quantize,
                    checkpointing=checkpointing,
                )  # fmt: skip
                figures[f"{name}: base weights, MiB"] = weights / MIB
                figures[f"{name}: held, MiB"] = held / MIB
                figures[f"{name}: estimated, MiB"] = estimate(config, setting, attach).total / MIB
    return figures


def measure(folder: Path, quantize: Any, checkpointing: bool) -> tuple[int, int]:
    """Bytes of the base model, and the most that is held at once from the optimizer's state to the second backward."""
    base = load_language_model(folder, dtype="bfloat16", quantize=quantize)[0]
    weights = tensor_bytes([*base.parameters(), *base.buffers()])
    model = attach(base).train()
    if checkpointing:
        model.base_model.activation_checkpointing_enable()
    backbone = Backbone(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    step = partial(_backward, backbone)
    step()
    optimizer.step()
    optimizer.zero_grad()
    kept = [*trained, *(value for state in optimizer.state.values() for value in state.values())]
    with Peak(model) as peak:
        step()
    return weights, weights + tensor_bytes(kept) + peak.bytes


def _backward(backbone: Backbone) -> None:
    embeds = torch.randn(BATCH, LENGTH, backbone.width, dtype=torch.bfloat16).requires_grad_()
    hidden = backbone(embeds, gates={"user_repr": torch.randn(BATCH, GATE)}).last_hidden_state
    scores = backbone.logits(hidden[:, -PLACES // BATCH :].flatten(0, 1))
    loss = cross_entropy(scores.float(), torch.zeros(PLACES, dtype=torch.long))
    del hidden, scores
    loss.backward()


if __name__ == "__main__":
    for figure, value in run().items():
        print(f"{figure}: {value:.0f}")
