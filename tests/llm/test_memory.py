"""Estimates of memory against the bytes of real tensors, and against what a training step really holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.utils import is_bitsandbytes_available

from llmrec.llm.backbone import Backbone
from llmrec.llm.loading import load_language_model
from llmrec.llm.memory import MemoryEstimate, SavedStorage, Setting, estimate
from llmrec.tuners.ilora import ILoraTuner
from llmrec.tuners.lora import LoraTuner
from tests.held_memory import Peak, tensor_bytes
from tests.llm.tiny import llama, tokenizer

GATE, SHAPE = 16, (4, 48)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes (extra quant)")


def attach(model: Any, tuner: str = "ilora", dropout: float = 0.1) -> Any:
    kind: Any = {"lora": LoraTuner, "ilora": ILoraTuner}[tuner]
    return kind.attach(model, kind.configure({"r": 8, "lora_dropout": dropout}, gate_dim=GATE))


def setting(**changes: Any) -> Setting:
    fields: dict[str, Any] = {"batch": SHAPE[0], "length": SHAPE[1], "places": 24, "classes": 330, "gate_dim": GATE}
    return Setting(**{**fields, **changes})


def guess(tuner: str = "ilora", dropout: float = 0.1, **changes: Any) -> MemoryEstimate:
    config = llama(**SIZES).config
    return estimate(config, setting(**changes), lambda model: attach(model, tuner, dropout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama(**SIZES).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def forward(model: Any, dtype: torch.dtype) -> Tensor:
    backbone = Backbone(model)
    embeds = torch.randn(*SHAPE, SIZES["hidden_size"], dtype=dtype).requires_grad_()
    gates = {} if backbone.gate_kind is None else {"user_repr": torch.randn(SHAPE[0], GATE)}
    return backbone(embeds, gates=gates).last_hidden_state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [None, pytest.param("4bit", marks=needs_bitsandbytes),
                                  pytest.param("8bit", marks=needs_bitsandbytes)])  # fmt: skip
def test_weights_adapter_and_optimizer_are_those_of_real_tensors(folder: Path, kind: Any, dtype: Any) -> None:
    """5% is the promise; storages agree to the byte but for scales of padded blocks and steps of the optimizer."""
    guessed = guess(dtype=getattr(torch, dtype), quantize=kind)
    base = load_language_model(folder, dtype=dtype, quantize=kind)[0]
    assert tensor_bytes([*base.parameters(), *base.buffers()]) == pytest.approx(guessed.weights, rel=0.05)
    model = attach(base).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    forward(model, getattr(torch, dtype)).float().pow(2).mean().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert tensor_bytes(trained) == pytest.approx(guessed.adapter, rel=0.05)
    assert tensor_bytes([p.grad for p in trained]) == pytest.approx(guessed.gradients, rel=0.05)
    assert tensor_bytes(states) == pytest.approx(guessed.optimizer, rel=0.05)
    assert guessed.trained == sum(p.numel() for p in trained)


@pytest.mark.parametrize("tuner", ["lora", "ilora"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", None), ("bfloat16", None), pytest.param("bfloat16", "4bit", marks=needs_bitsandbytes)],
)
def test_activations_are_what_a_real_forward_saves(
    folder: Path, tuner: str, dropout: float, dtype: Any, kind: Any
) -> None:
    compute = getattr(torch, dtype)
    model = attach(load_language_model(folder, dtype=dtype, quantize=kind)[0], tuner, dropout).train()
    with SavedStorage(model) as saved:
        forward(model, compute)
    guessed = guess(tuner, dropout, dtype=compute, quantize=kind).activations
    assert saved.bytes / 1.1 < guessed < saved.bytes * 1.1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_real_step(checkpointing: bool, dtype: torch.dtype) -> None:
    """Everything alive at the worst moment of forward, loss and backward, weights and gradients left out."""
    model = attach(llama(dtype=dtype, **SIZES)).train()
    if checkpointing:
        model.base_model.activation_checkpointing_enable()
    backbone = Backbone(model)
    with Peak(model) as peak:
        hidden = forward(model, dtype)
        scores = backbone.logits(hidden[:, -6:].flatten(0, 1))
        loss = nn.functional.cross_entropy(scores, torch.zeros(24, dtype=torch.long))
        del hidden, scores
        loss.backward()
    guessed = guess(dtype=dtype, checkpointing=checkpointing)
    promised = guessed.activations + guessed.logits + guessed.gradients
    assert peak.bytes / 1.5 < promised < peak.bytes * 1.5


def test_8_bit_layers_keep_their_inputs() -> None:
    plain, packed = (guess(dropout=0.1, quantize=kind).activations for kind in ("4bit", "8bit"))
    distinct = 64 + 64 + 160  # inputs of attention and of the two halves of the MLP; attention keeps its output anyway
    assert packed - plain == pytest.approx(SIZES["num_hidden_layers"] * SHAPE[0] * SHAPE[1] * distinct * 4, rel=0.1)


def test_sharding_divides_what_it_should() -> None:
    one = guess()
    parts = {name: guess(processes=4, sharding=name) for name in ("none", "zero1", "zero2", "zero3", "fsdp")}
    every = ("optimizer", "gradients", "adapter", "weights")
    divided = {"none": (), "zero1": every[:1], "zero2": every[:2], "zero3": every, "fsdp": every}
    for name, found in parts.items():
        for part in ("weights", "adapter", "gradients", "optimizer"):
            share = 4 if part in divided[name] else 1
            assert found.parts[part] == one.parts[part] // share, (name, part)
        assert found.activations == one.activations and found.exchange > one.exchange == 0


def test_what_the_numbers_follow() -> None:
    small = guess(batch=2)
    assert 1.9 < guess(batch=4).activations / small.activations < 2.1
    assert guess(checkpointing=True).activations < 0.6 * guess().activations
    found = guess()
    assert guess(optimizer="adamw_bnb_8bit").optimizer == found.optimizer // 4
    assert guess(optimizer="sgd").optimizer == 0
    assert guess(places=48).logits == 2 * found.logits
    assert guess(trained=1000).adapter - found.adapter == 4000 and guess(frozen=77).frozen == 77
    assert found.total == sum(found.parts.values()) and set(found.kinds) == {"float32"}


def test_a_large_model_is_not_made() -> None:
    """8 B parameters from a configuration: the sum of its weights is known, and nothing of them exists."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    found = estimate(config, setting(dtype=torch.bfloat16), lambda model: attach(model, "lora"))
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096
    assert found.parameters == 4 * layer + 2 * 128256 * 4096 + 4096
    assert found.kinds["bfloat16"] == 2 * found.parameters
    quantised = estimate(config, setting(dtype=torch.bfloat16, quantize="4bit"), lambda model: attach(model, "lora"))
    assert quantised.kinds["4bit"] == pytest.approx(4 * (layer - 2 * 4096) * 0.5625, rel=1e-3)
    assert quantised.kinds["float32"] >= 4 * 9 * 4096  # norms
