"""`llmrec check` finds what is wrong before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from llmrec.cli import main
from llmrec.commands import footprint, launch
from llmrec.commands.footprint import show_bytes


def check(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["check", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_parameters_of_a_smoke_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    record = check(capsys, "smoke/sasrec")
    assert record["name"] == "smoke-sasrec"
    larger = check(capsys, "smoke/sasrec", "--set", "encoder.hidden_size=64")
    assert 0 < record["encoder parameters"] < larger["encoder parameters"]  # type: ignore[operator]


def test_a_prompt_in_words_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    record = check(capsys, "smoke/lora", "--set", "prompt={style: text, template: next_item/movie, candidates: 3}")
    prompt = str(record["prompt"])
    assert all(f"title {number}" in prompt for number in range(1, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.0.learning_rat=1", "learning_rate"),
        ("stages.0.output_dir=x", "the run folder decides it"),
        ("stages.1.lr_scheduler_type=wavy", "stages.1"),
        ("tuner.rank=8", "rank"),
        ("encoder.type=sasrek", "sasrec"),
        ("sed=1", "seed"),
        ("prompt={style: text}", "prompt.template"),
        ("llm=null", "llm"),
    ],
)
def test_what_cannot_be_ends_with_2(change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "smoke/ilora", "--set", change]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_recipe_has_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "smoke/ilorra"]) == 2
    assert "smoke/ilora" in capsys.readouterr().err


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A language model of which only the configuration exists."""
    LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=500,
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    return f"llm.model={tmp_path / 'base'}"


def memory(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    found: Any = check(capsys, "smoke/ilora", *words)["memory"]
    return found


def test_memory_needs_no_weights(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = check(capsys, "smoke/ilora", "--set", base)
    found: Any = record["memory"]
    assert found["stage"] == "2-tuner" and found["total"] == sum(found["bytes"].values())
    assert found["batch"] == 32 and found["length"] == 20 and found["supervised_places"] == 640
    assert found["bytes"]["weights"] >= 4 * int(record["llm parameters"])  # type: ignore[call-overload]
    # What trains: the adapter, and projector and output layer beside it; Adam keeps two numbers for each.
    assert found["bytes"]["adapter"] > 4 * int(record["trainable in the LLM"])  # type: ignore[call-overload]
    assert found["bytes"]["optimizer"] == 2 * found["bytes"]["adapter"] == 2 * found["bytes"]["gradients"]
    assert found["bytes"]["logits"] == 640 * 101 * 12 and found["notes"] == []


def test_memory_follows_the_recipe(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = memory(capsys, "--set", base)["bytes"]
    checkpointing = "stages.1.activation_checkpointing=true"
    cheaper = memory(capsys, "--set", base, "--set", checkpointing, "--set", "llm.num_layers=2")["bytes"]
    assert cheaper["activations"] < 0.6 * plain["activations"] and cheaper["weights"] < plain["weights"]
    sampled = "stages.1.strategy={type: next_item, loss: sampled_softmax, negatives: 9}"
    assert memory(capsys, "--set", base, "--set", sampled)["bytes"]["logits"] == plain["logits"] * 10 // 101
    unready = memory(capsys, "--set", base, "--set", "dataset={source: movielens-100k}")
    assert "not prepared" in unready["notes"][0] and unready["bytes"]["logits"] < plain["logits"]


def test_memory_of_quantised_weights(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = [memory(capsys, "--set", base, "--set", f"llm.quantize={kind}") for kind in ("null", "8bit", "4bit")]
    whole, eight, four = (found["bytes"]["weights"] for found in sizes)
    assert four < eight < whole and set(sizes[2]["weights_by_kind"]) == {"4bit", "float32"}


def test_memory_of_a_prompt_in_words(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "prompt={style: text, template: next_item/movie, candidates: 3, max_title_tokens: 5%s}"
    assumed = memory(capsys, "--set", base, "--set", words % "")
    assert "max_length" in assumed["notes"][0]
    said = memory(capsys, "--set", base, "--set", words % ", max_length: 50")
    assert said["length"] == 50 < assumed["length"] and said["notes"] == []
    assert said["supervised_places"] == 32 * 6 and said["bytes"]["logits"] == 32 * 6 * 500 * 8


def test_memory_under_a_launcher(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "count_accelerators", lambda: 3)
    whole = memory(capsys, "--set", base)["bytes"]
    assert main(["check", "smoke/ilora", "--set", base, "--launcher", "fsdp2", "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    divided = record["memory"]
    assert divided["processes"] == 8 and divided["sharding"] == "fsdp" and divided["dtype"] == "float32"
    for part in ("weights", "adapter", "gradients", "optimizer"):
        assert divided["bytes"][part] == whole[part] // 8
    assert "hold the whole weights" in divided["notes"][0]
    assert "found 3, expected 8" in err and "found 3, expected 8" in record["launcher"]["problems"][0]
    assert memory(capsys, "--set", base, "--set", "llm.dtype=auto", "--launcher", "fsdp2")["dtype"] == "bfloat16"


def test_a_table_for_people(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "smoke/ilora", "--set", base]) == 0
    shown = capsys.readouterr().out
    assert "memory per device, stage 2-tuner" in shown and "640 supervised places" in shown
    assert show_bytes(3 << 29) == "1.5 GiB" and show_bytes(1023) == "1023 B" and show_bytes(1 << 20) == "1.0 MiB"


def test_too_large_a_model_is_noted(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "device_memory", lambda profile: 1 << 20)
    assert memory(capsys, "--set", base)["notes"] == ["more than the 1.0 MiB a process has here"]


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no-such-folder", "smollm2-135m"])
def test_without_a_configuration_it_says_so(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    record = check(capsys, "smoke/ilora", "--set", f"llm.model={name}")
    expected = "llmrec pull" if name == "smollm2-135m" else "neither in a folder nor in the cache"
    assert expected in str(record["memory"]) and "unknown" in str(record["llm parameters"])


def test_a_damaged_configuration_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    assert main(["check", "smoke/ilora", "--set", f"llm.model={tmp_path}"]) == 2
    assert "cannot be read" in capsys.readouterr().err
