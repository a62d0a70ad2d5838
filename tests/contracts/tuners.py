"""What every tuner must satisfy, run on a tiny Llama; a tuner's test class inherits `TunerContract`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.tuners.base import Tuner, attach, load_tuner, trainable_report

VOCAB, WIDTH, GATE_DIM, LENGTH = 100, 32, 6, 7


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """The same two-layer Llama on every call with the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def randomise_adapter(model: nn.Module, scale: float = 0.2) -> None:
    """Give lora_B values, so that the adapter and everything that steers it matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 2) -> Tensor:
    """[rows, length] token ids without padding."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


class TunerContract:
    """Inherit, set `tuner`, and name what the forward needs besides tokens in `extra`."""

    tuner: ClassVar[type[Tuner]]
    options: ClassVar[dict[str, Any]] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    adapter_parts: ClassVar[tuple[str, ...]] = (".lora_A.", ".lora_B.")

    def extra(self, rows: int) -> dict[str, Tensor]:
        """Further forward arguments, one row per sequence; none for plain methods."""
        return {}

    def config(self, task_type: str | None = "CAUSAL_LM") -> PeftConfig:
        return self.tuner.configure(self.options, task_type=task_type, gate_dim=GATE_DIM)

    def model(
        self, dtype: torch.dtype = torch.float32, trained: bool = True, task_type: str | None = "CAUSAL_LM"
    ) -> PeftModel:
        base = tiny_llama(dtype)
        torch.manual_seed(3)
        wrapped = self.tuner.attach(base, self.config(task_type))
        if trained:
            randomise_adapter(wrapped)
        return wrapped.eval()

    def logits(self, model: nn.Module, ids: Tensor, **extra: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, **extra).logits

    def gradients(self, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, **self.extra(len(ids))).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def test_fresh_adapter_equals_base(self) -> None:
        ids = tokens()
        found = self.logits(self.model(trained=False), ids, **self.extra(3))
        torch.testing.assert_close(found, self.logits(tiny_llama(), ids), rtol=0, atol=0)

    def test_trained_adapter_changes_output_and_disabling_restores_base(self) -> None:
        ids, model = tokens(), self.model()
        expected = self.logits(tiny_llama(), ids)
        assert (self.logits(model, ids, **self.extra(3)) - expected).abs().max() > 1e-3
        with model.disable_adapter():
            torch.testing.assert_close(self.logits(model, ids), expected, rtol=0, atol=0)

    def test_save_and_load_give_equal_outputs(self, tmp_path: Path) -> None:
        ids, model = tokens(), self.model()
        model.save_pretrained(tmp_path)
        again = load_tuner(tiny_llama(), tmp_path).eval()
        assert isinstance(again, PeftModel) and type(again.peft_config["default"]) is type(self.config())
        before, after = self.logits(model, ids, **self.extra(3)), self.logits(again, ids, **self.extra(3))
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert not any(p.requires_grad for p in again.parameters())

    def test_loading_trainable_keeps_the_same_trainable_parameters(self, tmp_path: Path) -> None:
        model = self.model()
        model.save_pretrained(tmp_path)
        again = load_tuner(tiny_llama(), tmp_path, is_trainable=True)
        assert trainable_report(again) == trainable_report(model)

    @pytest.mark.parametrize("task_type", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
    def test_task_types_run_and_reload(self, task_type: str | None, tmp_path: Path) -> None:
        ids, model = tokens(), self.model(task_type=task_type)
        before = self.logits(model, ids, **self.extra(3))
        torch.testing.assert_close(before, self.logits(self.model(), ids, **self.extra(3)), rtol=0, atol=0)
        model.save_pretrained(tmp_path)
        after = self.logits(load_tuner(tiny_llama(), tmp_path).eval(), ids, **self.extra(3))
        torch.testing.assert_close(after, before, rtol=0, atol=0)

    def test_only_adapter_parameters_get_gradients(self) -> None:
        model = self.model()
        got = self.gradients(model.train(), tokens())
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(got) == trainable
        assert all(any(part in name for part in self.adapter_parts) for name in got)
        assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in got.values())

    def test_bfloat16_forward(self) -> None:
        ids, model = tokens(), self.model(torch.bfloat16)
        out = self.logits(model, ids, **self.extra(3))
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
        exact = self.logits(self.model(), ids, **self.extra(3))
        assert (out.float() - exact).abs().max() < 0.15

    def test_batch_equals_single_rows(self) -> None:
        ids, model, extra = tokens(4), self.model(), self.extra(4)
        together = self.logits(model, ids, **extra)
        for row in range(4):
            alone = self.logits(model, ids[row : row + 1], **{k: v[row : row + 1] for k, v in extra.items()})
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)

    def test_activation_checkpointing_gives_the_same_gradients(self) -> None:
        ids, model = tokens(), self.model().train()
        plain = self.gradients(model, ids)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        for _ in range(2):
            checked = self.gradients(model, ids)
            assert checked.keys() == plain.keys()
            for name, expected in plain.items():
                torch.testing.assert_close(checked[name], expected, rtol=1e-5, atol=1e-7, msg=name)

    def test_deepcopy_is_independent_and_equal(self) -> None:
        ids, model = tokens(), self.model().train()
        self.gradients(model, ids)
        twin = copy.deepcopy(model).eval()
        model.eval()
        before = self.logits(model, ids, **self.extra(3))
        torch.testing.assert_close(self.logits(twin, ids, **self.extra(3)), before, rtol=0, atol=0)
        randomise_adapter(twin, scale=0.5)
        assert (self.logits(twin, ids, **self.extra(3)) - before).abs().max() > 1e-3
        torch.testing.assert_close(self.logits(model, ids, **self.extra(3)), before, rtol=0, atol=0)

    def test_generation_runs(self) -> None:
        ids, model = tokens(), self.model()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **self.extra(3))
        assert out.shape == (3, LENGTH + 3)

    def test_factory_function_is_the_class_method(self) -> None:
        ids, base = tokens(), tiny_llama()
        torch.manual_seed(3)
        wrapped = attach(base, self.config())
        randomise_adapter(wrapped)
        assert isinstance(wrapped, PeftModel)
        expected = self.logits(self.model(), ids, **self.extra(3))
        torch.testing.assert_close(self.logits(wrapped.eval(), ids, **self.extra(3)), expected, rtol=0, atol=0)
