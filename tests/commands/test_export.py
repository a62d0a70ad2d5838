"""`llmrec export`: what is refused before weights are read, and a run from training to a plain model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from llmrec.cli import main
from llmrec.recipe import Recipe
from llmrec.training.stages import run_recipe
from tests.runs import prompted_recipe, small_recipe


def written(folder: Path, recipe: Recipe, adapter: dict[str, object] | None = None) -> Path:
    """A run of which only the small files exist."""
    (folder / "model" / "adapter").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.dump())
    (folder / "model" / "recommender.json").write_text("{}")
    (folder / "model" / "adapter" / "adapter_config.json").write_text(json.dumps(adapter or {}))
    return folder


def test_refusals_come_before_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, slots = prompted_recipe("text", encoder=False), small_recipe("ilora")
    quantised = slots.model_copy(deep=True)
    assert quantised.llm is not None
    quantised.llm.quantize = "4bit"
    gated = {"num_experts": 4, "router": "linear"}
    cases = [
        (small_recipe("sasrec"), "merged", [], None, "has no language model"),
        (slots, "vllm", [], gated, "style item_slots"),
        (slots, "merged", [], gated, "--gate with 4 weights"),
        (slots, "merged", ["--gate", "even"], gated, "--gate: found 'even'"),
        (quantised, "merged", [], gated, "--unquantised"),
        (text, "merged", ["--unquantised"], None, "is not quantised"),
        (text, "merged", ["--gate", "uniform"], None, "has no gates"),
        (text, "merged", ["--histories", "0"], None, "--histories is 0"),
    ]
    for number, (recipe, target, more, adapter, message) in enumerate(cases):
        run, out = written(tmp_path / str(number), recipe, adapter), tmp_path / "out"
        assert main(["export", str(run), "--for", target, "--out", str(out), *more]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run", prompted_recipe("text", encoder=False))
    (run / "model" / "recommender.json").unlink()
    assert main(["export", str(run), "--for", "vllm", "--out", str(tmp_path / "out")]) == 2
    assert "no trained model" in capsys.readouterr().err


def test_from_training_to_a_plain_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = prompted_recipe("text", encoder=False)
    assert recipe.llm is not None
    recipe.llm.num_layers = 1
    run_recipe(recipe, tmp_path / "run", say=lambda line: None)
    words = ["export", str(tmp_path / "run"), "--for", "vllm", "--out", str(tmp_path / "out"), "--histories", "4"]
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    assert record["parity"]["max_abs_diff"] <= 1e-4 and record["scores"]["histories"] == 4
    assert record["scores"]["max_abs_diff"] < 1e-3 and record["base_model"] == "tiny-llama"
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers) == 1 and len(record["example"]["prompt_token_ids"]) > 10
    assert main(words) == 2 and "not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_over_quantised_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    recipe = prompted_recipe("text", encoder=False)
    assert recipe.llm is not None
    recipe.llm.quantize = "4bit"
    run_recipe(recipe, tmp_path / "run", say=lambda line: None)
    words = ["export", str(tmp_path / "run"), "--for", "merged", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 2 and "rounded away" in capsys.readouterr().err
    assert main([*words, "--unquantised"]) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    assert record["parity"]["max_abs_diff"] <= 1e-4, "against the adapter on the same unquantised weights"
    assert record["scores"]["max_abs_diff"] > 1e-4, "the run itself computes with 4-bit weights"
    assert "quantised run" in record["quantised"] and "Differs" in (tmp_path / "out" / "README.md").read_text()
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "out"), "quantization_config")
