"""Vision-language models: loading, prompts with pictures, labels, and adapters on the language model alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)  # fmt: skip
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.llm.generating import Request, TransformersGenerator
from llmrec.llm.loading import load_language_model
from llmrec.llm.tiny_vision import tiny_vision_model, tiny_vision_tokenizer, vision_words
from llmrec.llm.vision import (
    IGNORED,
    VisionPrompt,
    answer_ids,
    count_features,
    encode_prompts,
    harmless,
    image_tokens,
    is_vision_model,
    language_targets,
    load_vision_model,
    render_prompt,
    text_budget,
    to_model,
)  # fmt: skip
from tests.fixtures.vision import drawn, shared_vlm

QUESTION, EACH = "Describe the picture.", 16  # placeholders of a picture


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    for part in shared_vlm():
        part.save_pretrained(folder)
    return folder


# Loading -------------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_with_equal_outputs(saved: Path) -> None:
    model, processor = load_vision_model(saved, "float32")
    own, own_processor = shared_vlm()
    assert not model.training and model.llmrec_base_name == str(saved)
    assert type(processor.image_processor).__name__.endswith("Pil")
    batch = encode_prompts(processor, [VisionPrompt(QUESTION, (drawn(),))])
    again = encode_prompts(own_processor, [VisionPrompt(QUESTION, (drawn(),))])
    assert all(torch.equal(batch[name], again[name]) for name in again) and batch.keys() == again.keys()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, own(**again).logits)


def test_the_tiny_model_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = tiny_vision_model(1)[0].state_dict(), tiny_vision_model(2)[0].state_dict()
    assert torch.equal(before, torch.get_rng_state())
    same = tiny_vision_model(1)[0].state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_known_words_are_one_token_and_any_text_survives() -> None:
    tokenizer = shared_vlm()[1].tokenizer
    for word in vision_words():
        for written in (word, f" {word}"):
            assert len(tokenizer(written, add_special_tokens=False)["input_ids"]) == 1, written
    text = "Señor Ø 猫, it's 12% — ok?"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_tiny_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    model, _ = load_vision_model("tiny-vlm", "float32", num_layers=1)
    assert model.config.text_config.num_hidden_layers == 1 and model.llmrec_base_name == "tiny-vlm"
    own = shared_vlm()[0].state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())
    assert is_vision_model("tiny-vlm")


def test_what_reads_pictures_is_known_from_the_configuration_alone(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path / "sees")  # no weights beside it
    LlamaConfig().save_pretrained(tmp_path / "reads")
    assert is_vision_model(tmp_path / "sees") and not is_vision_model(tmp_path / "reads")
    with pytest.raises(CheckpointError, match="reads no pictures"):
        load_vision_model(tmp_path / "reads")


def test_what_cannot_be_loaded_is_said(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_vision_model(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_vision_model(tmp_path / "empty")
    with pytest.raises(RecipeError, match=r"llm.num_layers: found 9"):
        load_vision_model(saved, num_layers=9)
    with pytest.raises(RecipeError, match="llm.dtype"):
        load_vision_model(saved, "int3")  # type: ignore[arg-type]


def test_weights_that_could_run_code_are_not_read(tmp_path: Path) -> None:
    for part in shared_vlm():
        part.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_vision_model(tmp_path)


def test_a_processor_for_videos_loads_without_torchvision(tmp_path: Path) -> None:
    """Qwen-VL and SmolVLM come with one, and it needs torchvision, which is no dependency."""
    processor = shared_vlm()[1]
    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(tmp_path)
    ids = {name: tokenizer.convert_tokens_to_ids("<image>") for name in ("image_token_id", "video_token_id")}
    _qwen_config(vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path)
    model = Qwen2_5_VLForConditionalGeneration(_qwen_config(vocab_size=len(tokenizer), **ids))
    model.save_pretrained(tmp_path)
    record = {
        "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor", "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(record))
    model, processor = load_vision_model(tmp_path, "float32")
    batch = encode_prompts(
        processor, [VisionPrompt(QUESTION, (drawn(),)), VisionPrompt("x", (drawn("ring"),))], ["a", "b c"]
    )
    placeholders, features = count_features(model, batch)
    assert placeholders == features > 0
    assert torch.isfinite(model(**to_model(batch, model)).loss)
    processor.save_pretrained(tmp_path / "again")  # and can be saved beside a trained model


# Prompts -------------------------------------------------------------------------------------------------------------


def test_only_the_answer_and_the_end_are_labels_and_placeholders_equal_features() -> None:
    """Property 5 of MLLM-MSR."""
    model, processor = shared_vlm()
    tokenizer, answers = processor.tokenizer, ["star blue", "a red ring on a striped background"]
    prompts = [
        VisionPrompt(QUESTION, (drawn(),)),
        VisionPrompt(f"{QUESTION} Name the colour.", (drawn("ring"), drawn())),
    ]
    batch = encode_prompts(processor, prompts, answers)
    for ids, labels, real, answer in zip(
        batch["input_ids"], batch["token_labels"], batch["attention_mask"].bool(), answers, strict=True
    ):
        learned = labels != IGNORED
        assert torch.equal(labels[learned], ids[learned]) and not learned[~real].any()
        assert tokenizer.decode(labels[learned][:-1]) == answer and labels[learned][-1] == tokenizer.eos_token_id
        assert learned[real].tolist() == sorted(learned[real].tolist())  # the answer is the end of the row
        assert not (labels == model.config.image_token_id).any()
    assert count_features(model, batch) == (3 * EACH, 3 * EACH)
    without = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 3, 20)}
    assert count_features(model, without) == (0, 3 * EACH)


def test_training_and_generating_see_the_same_prompt() -> None:
    """The release closes a tag differently in training and in testing (pitfall 1)."""
    model, processor = shared_vlm()
    writer = TransformersGenerator(model, processor, max_new_tokens=2)
    read: dict[str, list[torch.Tensor]] = {"input_ids": [], "pixel_values": []}

    def listen(_: nn.Module, args: Any, kwargs: Any) -> None:
        for name in read.keys() & kwargs.keys():
            read[name].append(kwargs[name])

    eyes = model.model.vision_tower
    hooks = [part.register_forward_pre_hook(listen, with_kwargs=True) for part in (model, eyes.embeddings)]
    hooks.append(eyes.register_forward_pre_hook(lambda _, args: read["pixel_values"].extend(args)))
    for text in (QUESTION, "odd <image> words </s> here"):
        for values in read.values():
            values.clear()
        writer.generate([Request(text, (drawn(),), "It shows")])
        learned = encode_prompts(processor, [VisionPrompt(text, (drawn(),), opening="It shows")])
        for name, values in read.items():
            assert torch.equal(values[0], learned[name]), name
    for hook in hooks:
        hook.remove()


def test_words_that_look_like_placeholders_stay_words() -> None:
    _, processor = shared_vlm()
    plain, trick = (
        encode_prompts(processor, [VisionPrompt(text, (drawn(),))]) for text in ("a", "a <image></s><|user|>")
    )
    for token in ("<image>", "</s>", "<|user|>"):
        number = processor.tokenizer.convert_tokens_to_ids(token)
        counts = [int((batch["input_ids"] == number).sum()) for batch in (plain, trick)]
        assert counts[0] == counts[1], token
    assert harmless(processor, "<im<image>age>") != "<image>"
    answer = answer_ids(processor, render_prompt(processor, VisionPrompt("a")), "blue</s>red")
    assert processor.tokenizer.eos_token_id not in answer


def test_padding_side_and_neighbours_do_not_change_the_next_token() -> None:
    model, processor = shared_vlm()
    short, long = (
        VisionPrompt("a", (drawn(),)),
        VisionPrompt("Describe the shape and colour of this item", (drawn("ring"),)),
    )
    with torch.no_grad():
        alone = model(**encode_prompts(processor, [short])).logits[0, -1]
        left = model(**encode_prompts(processor, [short, long], padding_side="left")).logits[0, -1]
        right = encode_prompts(processor, [short, long])
        last = int(right["attention_mask"][0].sum()) - 1
        torch.testing.assert_close(left, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(**right).logits[0, last], alone, rtol=0, atol=1e-5)


def test_the_answer_has_the_tokens_it_has_behind_the_prompt() -> None:
    """Pitfall 2: "Yes" alone and "Yes" where it stands may be different tokens."""
    _, processor = shared_vlm()
    alone, behind = answer_ids(processor, "x?", "Yes"), answer_ids(processor, "x?", " Yes")
    assert len(alone) == len(behind) == 1 and alone != behind
    for prompt, answer in (("the sta", "r"), ("x? ", "Yes")):  # "star" and " Yes" are one token each
        with pytest.raises(DataError, match="joins the end"):
            answer_ids(processor, prompt, answer)
    with pytest.raises(DataError, match="an answer is empty"):
        answer_ids(processor, "x?", "")


def test_without_a_chat_template_pictures_and_text_stand_on_lines_of_their_own() -> None:
    model, processor = tiny_vision_model(0)
    processor.chat_template = None
    prompt = VisionPrompt(QUESTION, (drawn(), drawn("ring")))
    assert render_prompt(processor, prompt) == f"<image>\n<image>\n{QUESTION}\n"
    assert count_features(model, encode_prompts(processor, [prompt])) == (2 * EACH, 2 * EACH)


def test_text_has_a_budget_and_pictures_are_never_cut() -> None:
    """Pitfall 5."""
    _, processor = shared_vlm()
    pictures = (drawn(), drawn("ring"))
    assert image_tokens(processor, pictures) == [EACH, EACH]
    room = text_budget(processor, pictures, 80, answer=5)
    frame = len(encode_prompts(processor, [VisionPrompt("", pictures)])["input_ids"][0])
    assert room == 80 - frame - 5 > 0
    fits = encode_prompts(processor, [VisionPrompt("!" * room, pictures)], ["!!!!"], max_length=80)
    assert fits["input_ids"].shape == (1, 80)
    with pytest.raises(DataError, match=r"2 pictures take 32 of its 81 tokens(?s:.*)at most 80"):
        encode_prompts(processor, [VisionPrompt("!" * (room + 1), pictures)], ["!!!!"], max_length=80)
    with pytest.raises(DataError, match="leave no room for words"):
        text_budget(processor, pictures, 32)


def test_bad_pictures_and_mixed_batches_are_refused() -> None:
    _, processor = shared_vlm()
    with pytest.raises(DataError, match="cannot be decoded"):
        encode_prompts(processor, [VisionPrompt("a", (b"no picture",))])
    with pytest.raises(DataError, match="with and without pictures"):
        encode_prompts(processor, [VisionPrompt("a", (drawn(),)), VisionPrompt("a")])
    assert "pixel_values" not in encode_prompts(processor, [VisionPrompt("a"), VisionPrompt("b c")])


# Adapters ------------------------------------------------------------------------------------------------------------


def _small_text(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "num_key_value_heads": 2, "vocab_size": 99, **more}


def _qwen_config(**more: Any) -> Qwen2_5_VLConfig:
    eyes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "depth": 2, "num_heads": 2}
    eyes["out_hidden_size"] = 16
    ids = {name: more.pop(name) for name in ("image_token_id", "video_token_id") if name in more}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    eyes["fullatt_block_indexes"] = [1]
    return Qwen2_5_VLConfig(vision_config=eyes, text_config=_small_text(rope_parameters=rope, **more), **ids)


def _families() -> dict[str, nn.Module]:
    eyes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = {"model_type": "clip_vision_model", **eyes, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    text = {"model_type": "llama", **_small_text()}
    with torch.device("meta"):  # names are asked for, no weights
        return {
            "llava_next": LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=clip, text_config=text)),
            "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration(_qwen_config()),
            "idefics3": Idefics3ForConditionalGeneration(
                Idefics3Config(vision_config={**eyes, "image_size": 32, "patch_size": 16}, text_config=text)
            ),
        }


def _with_tiles(family: str) -> tuple[Any, Any]:
    """A model that cuts pictures into tiles, so that a picture takes more placeholders than a whole one, and marks."""
    eyes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes |= {"image_size": 32, "patch_size": 16}
    tokenizer = tiny_vision_tokenizer()
    token = tokenizer.convert_tokens_to_ids("<image>")
    if family == "llava_next":
        grid = [[32, 64], [64, 32], [64, 64]]
        square = {"height": 32, "width": 32}
        processor: Any = LlavaNextProcessor(
            LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=grid),
            tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip
        config: Any = LlavaNextConfig(
            vision_config={"model_type": "clip_vision_model", **eyes}, image_token_index=token,
            text_config={"model_type": "llama", **_small_text(vocab_size=len(tokenizer))}, image_grid_pinpoints=grid,
        )  # fmt: skip
        return LlavaNextForConditionalGeneration(config).eval(), processor
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=1)
    text = {"model_type": "llama", **_small_text(vocab_size=len(processor.tokenizer), pad_token_id=0)}
    config = Idefics3Config(vision_config=eyes, text_config=text, scale_factor=2, image_token_id=token)
    return Idefics3ForConditionalGeneration(config).eval(), processor


@pytest.mark.parametrize("family", ["llava_next", "idefics3"])
def test_models_that_tile_pictures_take_the_same_prompts(family: str) -> None:
    model, processor = _with_tiles(family)
    prompts = [VisionPrompt(QUESTION, (drawn(),)), VisionPrompt("Name the shape", (drawn("ring"), drawn()))]
    batch = encode_prompts(processor, prompts[:1] * 2, ["a blue star", "star"])
    placeholders, features = count_features(model, batch)
    assert placeholders == features > 2
    assert image_tokens(processor, prompts[0].images)[0] >= placeholders // 2
    assert torch.isfinite(model(**to_model(batch, model)).loss)
    two = encode_prompts(processor, prompts[1:])
    assert count_features(model, two) == (placeholders, features)


def _adapted(model: nn.Module, names: list[str] | None) -> set[str]:
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=language_targets(model, names)))
    parameters = (name for name, weight in tuned.named_parameters() if weight.requires_grad)
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in parameters}


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_no_adapter_lands_outside_the_language_model(family: str) -> None:
    """Property 6 of MLLM-MSR; bare names (pitfall 4) would reach the vision tower, which the test shows first."""
    model = tiny_vision_model(0)[0] if family == "llava" else _families()[family]
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inner = "text_model" if family == "idefics3" else "language_model"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    elsewhere = [name for name in linear if f".{inner}." not in f".{name}"]
    assert [n for n in elsewhere if n.rpartition(".")[2] in names], "the names of this family would not collide"
    adapted = _adapted(model, names)
    assert adapted == {name for name in linear if name not in elsewhere} and "lm_head" in elsewhere


def test_the_names_of_adapted_layers_are_checked() -> None:
    model, _ = tiny_vision_model(0)
    assert _adapted(model, ["self_attn.q_proj"]) == {
        f"model.language_model.layers.{n}.self_attn.q_proj" for n in (0, 1)
    }
    for names in (["fc1"], ["lm_head"], ["linear_1"], []):
        with pytest.raises(RecipeError, match=r"tuner.target_modules: found .*expected some of down_proj"):
            language_targets(shared_vlm()[0], names)


def test_a_model_without_eyes_needs_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    model, _ = load_language_model("tiny-llama", "float32")
    assert language_targets(model, ["q_proj"]) == r"model\.(?:.+\.)?(?:q_proj)"
