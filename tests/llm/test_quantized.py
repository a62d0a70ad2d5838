"""Adapters over 4-bit and 8-bit base weights, on a processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import is_bitsandbytes_available

from llmrec.downloads import cache_root
from llmrec.errors import DependencyError, RecipeError
from llmrec.llm import quantized
from llmrec.llm.backbone import Backbone
from llmrec.llm.loading import base_identity, load_language_model
from llmrec.tuners.base import load_tuner
from llmrec.tuners.ilora import ILoraTuner
from llmrec.tuners.lora import LoraTuner
from tests.llm.tiny import WIDTH, llama, tokenizer
from tests.runs import train

needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes (extra quant)")
TUNERS: dict[str, Any] = {"lora": LoraTuner, "ilora": ILoraTuner}
KINDS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are multiples of 32 and whose columns fill whole blocks of 64: real layouts apply to it."""
    path = tmp_path_factory.mktemp("model")
    llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def base(folder: Path, kind: Any, dtype: Any = "float32", **options: Any) -> Any:
    return load_language_model(folder, dtype=dtype, quantize=kind, device="cpu", **options)[0]


def adapted(model: Any, tuner: str, *, trained: bool = False, **options: Any) -> Any:
    torch.manual_seed(1)
    kind = TUNERS[tuner]
    wrapped = kind.attach(model, kind.configure({"r": 8, "lora_dropout": 0.0, **options}, gate_dim=WIDTH))
    if trained:
        torch.manual_seed(2)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def question() -> tuple[Tensor, Tensor]:
    """Input vectors [3, 10, 64] and a user vector per row."""
    drawn = torch.Generator().manual_seed(3)
    return torch.randn(3, 10, 64, generator=drawn), torch.randn(3, WIDTH, generator=drawn)


def states(model: Any, gates: dict[str, Tensor] | None = None) -> Tensor:
    return Backbone(model)(question()[0], gates=gates or {}).last_hidden_state


def learn(model: Any, tuner: str, steps: int = 8, width: int = 64) -> list[float]:
    """Losses of a few steps on next-token prediction of two fixed rows."""
    backbone = Backbone(model.train())
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(4))
    gates = {"user_repr": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))} if tuner == "ilora" else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        hidden = backbone(backbone.embed(ids), gates=gates).last_hidden_state[:, :-1]
        loss = torch.nn.functional.cross_entropy(backbone.logits(hidden).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_they_need_their_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"llmrec\[quant\]"):
        base(folder, "4bit")
    with pytest.raises(RecipeError, match="4bit, 8bit or nothing"):
        base(folder, "2bit")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3.*zero2.*zero3 without"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP.*multi_gpu.*fsdp2 without"),
    ],
)
def test_divided_weights_are_refused_before_loading(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=message):
        base(tmp_path, "4bit")


def test_zero2_keeps_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert quantized._launched_sharding() == "zero2"
    quantized.refuse_divided("4bit", "zero2")
    quantized.refuse_divided(None, "zero3")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_a_prepared_base(folder: Path, kind: str, dtype: str) -> None:
    """Norms and adapter are float32, the output layer and the activations are not widened, and nothing else trains."""
    model = base(folder, kind, dtype)
    compute = getattr(torch, dtype)
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == model.get_input_embeddings().weight.dtype == compute
    packed = {p.dtype for n, p in model.named_parameters() if "_proj" in n}
    assert packed == {torch.uint8 if kind == "4bit" else torch.int8}
    assert not any(p.requires_grad for p in model.parameters())
    wrapped = adapted(model, "ilora")
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert all("lora_" in n or "ilora_router" in n for n, p in wrapped.named_parameters() if p.requires_grad)
    assert states(wrapped, {"user_repr": question()[1]}).dtype == compute


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_norms_compute_in_float32(folder: Path, kind: str) -> None:
    model = base(folder, kind, "bfloat16")
    norm, value = model.model.norm, question()[0].bfloat16()
    exact = torch.nn.functional.rms_norm(value.float(), (64,), norm.weight, model.config.rms_norm_eps)
    torch.testing.assert_close(norm(value), exact.bfloat16(), rtol=0, atol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuner", ["lora", "ilora"])
def test_adapters_learn(folder: Path, kind: str, tuner: str) -> None:
    losses = learn(adapted(base(folder, kind), tuner), tuner)
    assert losses[-1] < 0.8 * losses[0]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuner", ["lora", "ilora"])
def test_evaluating_in_between_changes_no_gradient(folder: Path, kind: str, tuner: str) -> None:
    """A forward in evaluation must not repack weights into a form that has no backward."""
    gates = {"user_repr": question()[1]} if tuner == "ilora" else {}

    def gradients(evaluates: bool) -> dict[str, Tensor]:
        model = adapted(base(folder, kind), tuner, trained=True)
        if evaluates:
            with torch.no_grad():
                states(model.eval(), gates)
        states(model.train(), gates).pow(2).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, after = gradients(False), gradients(True)
    first = [name for name in plain if "layers.0.self_attn.q_proj.lora_B" in name]
    assert first and float(plain[first[0]].abs().sum()) > 0
    for name, value in plain.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuner", ["lora", "ilora"])
def test_activation_checkpointing_changes_no_gradient(folder: Path, kind: str, tuner: str) -> None:
    gates = {"user_repr": question()[1]} if tuner == "ilora" else {}
    found = []
    for checkpointing in (False, True):
        model = adapted(base(folder, kind), tuner, trained=True).train()
        if checkpointing:
            options = {"activation_checkpointing_kwargs": {"use_reentrant": False}}
            model.base_model.activation_checkpointing_enable(**options)
        states(model, gates).pow(2).mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(value is not None and bool(value.isfinite().all()) for value in found[1].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_uniform_gates_are_lora_on_the_same_base(folder: Path, kind: str) -> None:
    lora, ilora = (adapted(base(folder, kind), name, trained=True, lora_alpha=16) for name in ("lora", "ilora"))
    weights = {n: p for n, p in lora.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in ilora.named_parameters():
            if ".lora_" in name:
                parameter.copy_(weights[name])
        uniform = torch.full((3, 4), 0.25)
        torch.testing.assert_close(states(ilora, {"gates": uniform}), states(lora), rtol=1e-5, atol=1e-5)
        sharp = torch.eye(4)[:3]
        assert not torch.allclose(states(ilora, {"gates": sharp}), states(lora), atol=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuner", ["lora", "ilora"])
def test_a_saved_adapter_comes_back_onto_a_fresh_base(folder: Path, kind: str, tuner: str, tmp_path: Path) -> None:
    gates = {"user_repr": question()[1]} if tuner == "ilora" else {}
    model = adapted(base(folder, kind), tuner)
    learn(model, tuner, steps=2)
    model.save_pretrained(tmp_path / "adapter")
    again = load_tuner(base(folder, kind), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(states(again.eval(), gates), states(model.eval(), gates), rtol=0, atol=0)
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 200_000


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_identity_and_layer_cut(folder: Path, kind: str) -> None:
    """The first layers of a quantised model are those of the whole one, and both know their base."""
    whole, cut = base(folder, kind), base(folder, kind, num_layers=1)
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 1
    value = question()[0]
    place = (torch.ones(1, 10, 16), torch.zeros(1, 10, 16))
    with torch.no_grad():
        first, same = (m.model.layers[0](value, position_embeddings=place) for m in (whole, cut))
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    plain = load_language_model(folder, num_layers=1)[0]
    assert base_identity(plain).same_weights(base_identity(cut)) and base_identity(cut).linears is None
    assert not base_identity(plain).same_weights(base_identity(whole))


@needs_bitsandbytes
def test_a_recipe_trains_evaluates_and_loads_over_4_bit(tmp_path: Path) -> None:
    from llmrec.recommender import Recommender

    record = train("ilora", tmp_path / "run", "llm.quantize=4bit", "stages.1.max_steps=3")
    assert 0.0 <= record["models"]["ilora"]["ndcg@10"]["mean"] <= 1.0
    recommender = Recommender.from_pretrained(tmp_path / "run")
    assert recommender.system.backbone.base.is_loaded_in_4bit
    assert len(recommender.recommend([recommender.dataset.item_keys[1:4]], k=3)[0]) == 3


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "ilora"])
def test_a_real_model_in_nf4(tuner: str, tmp_path: Path) -> None:
    folder = cache_root() / "smollm2-135m"
    if not (folder / "config.json").is_file():
        pytest.skip("smollm2-135m is not cached; fetch it with `llmrec pull smollm2-135m`")
    model = base(folder, "4bit", "auto")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size < 0.42 * 2 * 134_515_008  # of the same weights in bfloat16; the embeddings are a fifth of the model
    losses = learn(adapted(model, tuner), tuner, steps=5)
    assert losses[-1] < 0.9 * losses[0]
