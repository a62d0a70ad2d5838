"""Plain LoRA, DoRA, rsLoRA: the mapping of recipe options to peft, and loading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from llmrec.errors import CheckpointError, RecipeError
from llmrec.tuners.base import Tuner, attach, load_tuner, trainable_report
from llmrec.tuners.lora import LoraTuner
from tests.contracts.tuners import TunerContract, tiny_llama


class TestLora(TunerContract):
    tuner = LoraTuner

    def test_merge_keeps_outputs(self) -> None:
        ids = torch.arange(1, 8)[None]
        model = self.model()
        before = self.logits(model, ids)
        torch.testing.assert_close(self.logits(model.merge_and_unload(), ids), before, rtol=1e-5, atol=1e-5)


class TestDora(TunerContract):
    tuner = LoraTuner
    options: ClassVar[dict[str, Any]] = {**TunerContract.options, "use_dora": True}
    adapter_parts = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")

    def test_fresh_adapter_equals_base(self) -> None:
        """DoRA divides by a norm and multiplies it back, so equality holds up to rounding."""
        ids = torch.arange(1, 8)[None]
        expected = self.logits(tiny_llama(), ids)
        torch.testing.assert_close(self.logits(self.model(trained=False), ids), expected, rtol=1e-5, atol=1e-6)


def layer_of(options: dict[str, Any]) -> Any:
    model = attach(tiny_llama(), LoraTuner.configure(options))
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_options_reach_the_configuration() -> None:
    config = LoraTuner.configure(
        {"r": 4, "lora_alpha": 12, "lora_dropout": 0.25, "target_modules": ["q_proj"], "use_dora": True}
    )
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.25)
    assert config.target_modules == {"q_proj"} and config.use_dora and not config.use_rslora


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert layer_of({"r": 4, "lora_alpha": 12}).scaling["default"] == 3.0
    assert layer_of({"r": 4, "lora_alpha": 12, "use_rslora": True}).scaling["default"] == 12 / math.sqrt(4)


def test_default_targets_are_the_seven_projections() -> None:
    model = attach(tiny_llama(), LoraTuner.configure({}))
    adapted = {name.rsplit(".", 2)[-2] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, "rank"),
        ({"num_experts": 4}, "num_experts"),
        ({"r": 0}, "tuner.r"),
        ({"r": 2.5}, "tuner.r"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": []}, "target_modules"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LoraTuner.configure(options)


def test_report_counts_by_part() -> None:
    model = attach(tiny_llama(), LoraTuner.configure({"r": 2, "target_modules": ["q_proj"]}))
    report = trainable_report(model)
    assert report.parts == {"experts": 2 * (2 * 32 + 32 * 2), "router": 0, "other": 0}
    assert report.trainable == 256 and report.total == sum(p.numel() for p in model.parameters())
    assert report.share == report.trainable / report.total


class TestLoading:
    def save(self, folder: Path) -> None:
        attach(tiny_llama(), LoraTuner.configure({"r": 2})).save_pretrained(folder)

    def test_missing_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="adapter_config.json"):
            load_tuner(tiny_llama(), tmp_path)
        self.save(tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
            load_tuner(tiny_llama(), tmp_path)

    def test_damaged_configuration_is_refused(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        (tmp_path / "adapter_config.json").write_text("{", encoding="utf-8")
        with pytest.raises(CheckpointError, match="not JSON"):
            load_tuner(tiny_llama(), tmp_path)

    def test_unknown_method_is_refused(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        for name in ("NOSUCH", "../evil", None):
            (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": name}), encoding="utf-8")
            with pytest.raises(CheckpointError, match="NOSUCH|evil|None"):
                load_tuner(tiny_llama(), tmp_path)

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_missing_weights_are_refused(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        weights = load_file(tmp_path / "adapter_model.safetensors")
        dropped = sorted(weights)[0]
        del weights[dropped]
        save_file(weights, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="missing"):
            load_tuner(tiny_llama(), tmp_path)


def test_every_tuner_says_what_it_needs() -> None:
    assert issubclass(LoraTuner, Tuner) and not LoraTuner.needs_gates and "r" in LoraTuner.options
