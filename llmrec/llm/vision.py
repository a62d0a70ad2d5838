"""Vision-language models of transformers: loading, prompts with pictures, and adapters that leave the eyes alone.

    model, processor = load_vision_model("HuggingFaceTB/SmolVLM-256M-Instruct", dtype="auto")
    batch = encode_prompts(processor, [VisionPrompt("What is shown?", (png,))], answers=["a red ring"])
    loss = model(**to_model(batch, model)).loss

Any image-text-to-text model works (LLaVA, LLaVA-NeXT, Qwen-VL, Idefics3, SmolVLM, ...). Pictures are prepared by
Pillow, since torchvision is no dependency. Three faults of published code for such models are ruled out here:

- A picture becomes hundreds or thousands of placeholder tokens, so a cut at the maximum length cuts pictures, and the
  forward fails. Nothing is ever cut here: `text_budget` says how many tokens are left for words, and a prompt that is
  too long is an error.
- The tokens of an answer are those it has behind its prompt, not those it has alone ("Yes" with or without a blank).
- Layers of the vision tower have the same names as those of the language model (q_proj, ...), so bare names put
  adapters into both. `language_targets` names the language model's layers alone.

Words in a text that would read as placeholders or control tokens are broken up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import util
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrec.errors import CheckpointError, DataError, DependencyError, RecipeError
from llmrec.llm.continuing import control_words, undated
from llmrec.llm.loading import (
    Dtype,
    add_padding,
    choose_dtype,
    keep_layers,
    locate,
    name_processor_to_deepspeed,
    own_device,
    quiet,
)
from llmrec.llm.quantized import Quantize, prepare_quantised, quantised_arguments

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED = -100
"""Label of a token that is not learned."""


# Loading -------------------------------------------------------------------------------------------------------------


def load_vision_model(
    name_or_path: str | Path,
    dtype: Dtype = "auto",
    quantize: Quantize | None = None,
    revision: str | None = None,
    *,
    num_layers: int | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """An image-text-to-text model of transformers with its processor (tokenizer and image processor).

    Args:
        name_or_path: Local folder, name of `llmrec pull`, or hub id.
        dtype: As for `load_language_model`.
        quantize: "4bit" or "8bit" weights by bitsandbytes.
        revision: Commit, tag or branch of the hub.
        num_layers: Keep only the first decoder layers of the language model.
        device: As for `load_language_model`.

    Returns:
        The model, in evaluation mode, and the processor, whose tokenizer has a padding token.

    Raises:
        CheckpointError: Nothing of that name can be loaded, or it reads no pictures.
        DependencyError: Pillow or bitsandbytes is missing.
        RecipeError: An option is out of range.
    """
    name_processor_to_deepspeed()
    if util.find_spec("PIL") is None:
        raise DependencyError("PIL", extra="vision", purpose="preparing pictures for a vision-language model")
    from transformers import AutoModelForImageTextToText

    target = locate(name_or_path)
    home = own_device() if device is None else torch.device(device)
    compute = choose_dtype(dtype, home)
    extra = quantised_arguments(quantize, compute, home)
    config = _read_config(name_or_path, target, revision)
    if not reads_pictures(config):
        raise CheckpointError(
            f"{str(name_or_path)!r} is a {config.model_type}, which reads no pictures; expected an image-text-to-text "
            "model such as LLaVA, Qwen-VL or SmolVLM"
        )
    try:
        processor = _load_processor(target, config, revision)
        keep_layers(config.get_text_config(), num_layers)
        with quiet(num_layers is not None):
            model: Any = AutoModelForImageTextToText.from_pretrained(
                target, config=config, revision=revision, dtype=compute, attn_implementation="sdpa",
                trust_remote_code=False, use_safetensors=True, **extra,
            )  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(name_or_path, error) from error
    if quantize is not None:
        prepare_quantised(model, compute)
    elif device is not None:
        model = model.to(device)
    add_padding(model, processor.tokenizer)
    model.llmrec_base_name = str(name_or_path)
    return model.eval(), processor


def is_vision_model(name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether a model reads pictures beside text, by its configuration alone; no weights are read.

    Raises:
        CheckpointError: There is no configuration of that name.
    """
    return reads_pictures(_read_config(name_or_path, locate(name_or_path), revision))


def _read_config(name_or_path: str | Path, target: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(target, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loaded(name_or_path, error) from error


def reads_pictures(config: Any) -> bool:
    """Whether a configuration is that of an image-text-to-text model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: Any) -> Any:
    """The auto class that makes a model of a configuration: with or without eyes."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if reads_pictures(config) else AutoModelForCausalLM


def _not_loaded(name_or_path: str | Path, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(
        f"the vision-language model {str(name_or_path)!r} could not be loaded: {lines[0]}\n"
        "  expected: a folder with config.json, safetensors weights, tokenizer and image processor, a name of "
        "`llmrec pull`, or a hub id that is reachable or cached"
    )


def _load_processor(target: str, config: Any, revision: str | None) -> Any:
    """The processor; where torchvision is missing, without the part for videos that needs it."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    options: dict[str, Any] = {"revision": revision}
    parts = () if kind is None else tuple(kind.get_attributes())
    if "video_processor" not in parts or util.find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(target, backend="pil", trust_remote_code=False, **options)
    known = {
        "tokenizer": AutoTokenizer,
        "image_processor": AutoImageProcessor,
        "video_processor": _without_videos(),
    }
    if unknown := sorted(set(parts) - set(known)):
        raise ValueError(f"its processor needs {', '.join(unknown)}, which this release does not make")
    record, _ = kind.get_processor_dict(target, revision=revision)
    made = [
        known[part].from_pretrained(
            target, trust_remote_code=False, **options, **({"backend": "pil"} if part == "image_processor" else {})
        )
        for part in parts
    ]
    # The check of the parts' classes looks through video processors, none of which can be imported.
    unchecked: Any = type(
        kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, part: type(part)}
    )
    return unchecked.from_args_and_dict(made, record)


@cache
def _without_videos() -> Any:
    """What stands for the video part of a processor: it keeps the settings for saving, and refuses videos."""
    from transformers.video_processing_utils import VideoProcessorMixin

    class PicturesOnly(VideoProcessorMixin):  # type: ignore[misc]
        def __call__(self, videos: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            raise DependencyError("torchvision", extra="vision", purpose="reading videos")

        def to_dict(self) -> dict[str, Any]:
            record: dict[str, Any] = super().to_dict()
            return {**record, "video_processor_type": getattr(self, "video_processor_type", None)}

    return PicturesOnly


# Prompts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionPrompt:
    """What a model is shown and asked.

    Args:
        text: The question or instruction, behind the pictures.
        images: Encoded pictures, or pictures of Pillow, in the order they are shown.
        opening: First words of the answer, given in advance.
    """

    text: str
    images: tuple[bytes | Image, ...] = ()
    opening: str = ""


def render_prompt(processor: Any, prompt: VisionPrompt) -> str:
    """A prompt as text with one placeholder per picture, up to where the answer starts.

    By the chat template of the model, or, where it has none, the placeholders and the text on lines of their own.
    """
    text, opening = harmless(processor, prompt.text), harmless(processor, prompt.opening)
    if getattr(processor, "chat_template", None) is None:
        token = getattr(processor, "image_token", None)
        if token is None and prompt.images:
            raise CheckpointError(
                f"{type(processor).__name__} has neither a chat template nor an image token; expected one of them"
            )
        return "".join(f"{token}\n" for _ in prompt.images) + f"{text}\n{opening}"
    template = processor.chat_template
    template = undated(template["default"] if isinstance(template, dict) else template)
    thinking = {"enable_thinking": False} if "enable_thinking" in template else {}
    content = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": text}]
    rendered: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True,
        **thinking,
    )  # fmt: skip
    return rendered + opening


def harmless(processor: Any, text: str) -> str:
    """A text in which no word reads as a placeholder or control token: a blank stands behind its first letter."""
    for word in control_words(processor, processor.tokenizer):
        text = text.replace(word, f"{word[0]} {word[1:]}")
    return text


def answer_ids(processor: Any, rendered: str, answer: str) -> list[int]:
    """Tokens of an answer where it stands: those of prompt and answer without those of the prompt.

    Raises:
        DataError: The answer is empty, or the tokenizer joins its start with the end of the prompt.
    """
    tokenizer = processor.tokenizer
    before = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    whole = tokenizer(rendered + harmless(processor, answer), add_special_tokens=False)["input_ids"]
    if whole[: len(before)] != before:
        raise DataError(
            "the tokenizer joins the end of the prompt with the answer, so the answer has no tokens of its own",
            found=f"{rendered[-20:]!r} + {answer[:20]!r}",
            expected="a prompt that ends with a line break or a control token",
        )
    if len(whole) == len(before):
        raise DataError("an answer is empty", found=repr(answer), expected="words to learn")
    return list(whole[len(before) :])


def encode_prompts(
    processor: Any,
    prompts: Sequence[VisionPrompt],
    answers: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
    padding_side: str = "right",
) -> dict[str, Tensor]:
    """Prompts, and answers where they are known, as one batch for the model.

    Args:
        processor: Of the model.
        prompts: Each with any number of pictures.
        answers: What is to be learned: its tokens and the end-of-text token are the only labels.
        max_length: Longest row in tokens, answer included.
        padding_side: "right" for training, "left" for generating.

    Returns:
        `input_ids`, `attention_mask` [B, S], with answers `token_labels` [B, S], and whatever pixel tensors the model
        reads.

    Raises:
        DataError: A picture is damaged, or a row is too long; pictures are never cut.
    """
    texts = [render_prompt(processor, prompt) for prompt in prompts]
    encoded = _processed(processor, texts, [prompt.images for prompt in prompts])
    shape, real = encoded["input_ids"].shape, encoded["attention_mask"].bool()
    tokens = {name: value for name, value in encoded.items() if value.shape == shape and name != "attention_mask"}
    rows = {name: [list(row[keep].tolist()) for row, keep in zip(value, real, strict=True)]
            for name, value in tokens.items()}  # fmt: skip
    labels = [[IGNORED] * len(ids) for ids in rows["input_ids"]]
    if answers is not None:
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            ids = [*answer_ids(processor, text, answer), processor.tokenizer.eos_token_id]
            labels[number] += ids
            for name, row in rows.items():
                row[number] += ids if name == "input_ids" else [0] * len(ids)
    if max_length is not None:
        _check_lengths(processor, prompts, rows["input_ids"], max_length)
    left, pad = padding_side == "left", processor.tokenizer.pad_token_id
    batch = {name: value for name, value in encoded.items() if value.shape != shape}
    batch |= {name: _padded(row, pad if name == "input_ids" else 0, left) for name, row in rows.items()}
    batch["attention_mask"] = _padded([[1] * len(ids) for ids in rows["input_ids"]], 0, left)
    return batch if answers is None else {**batch, "token_labels": _padded(labels, IGNORED, left)}


def _processed(processor: Any, texts: list[str], images: Sequence[Sequence[bytes | Image]]) -> dict[str, Tensor]:
    """What the processor makes of rendered prompts: placeholders repeated, pixels prepared, nothing cut."""
    shown = [[_opened(image) for image in row] for row in images]
    if any(shown) and not all(shown):
        raise DataError(
            "prompts with and without pictures in one batch",
            expected="either each prompt with a picture or none",
            remedy="batch them apart",
        )
    start = processor.tokenizer.bos_token
    made = processor(
        text=texts, images=shown if any(shown) else None, padding=True, return_tensors="pt",
        add_special_tokens=not (start and texts[0].startswith(start)),
    )  # fmt: skip
    return {name: value for name, value in made.items() if torch.is_tensor(value)}


def _opened(image: bytes | Image) -> Image:
    from llmrec.data.item_images import decode_image

    return decode_image(image) if isinstance(image, bytes) else image.convert("RGB")


def _padded(rows: Sequence[list[int]], value: int, left: bool) -> Tensor:
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for number, row in enumerate(rows):
        out[number, width - len(row) if left else 0 : width if left else len(row)] = torch.tensor(row)
    return out


def _check_lengths(processor: Any, prompts: Sequence[VisionPrompt], rows: Sequence[list[int]], max_length: int) -> None:
    for number, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
        if len(ids) > max_length:
            pictures = sum(image_tokens(processor, prompt.images))
            raise DataError(
                f"prompt {number} is too long: {len(prompt.images)} pictures take {pictures} of its {len(ids)} tokens",
                found=f"{len(ids)} tokens",
                expected=f"at most {max_length}, and pictures are never cut",
                remedy="shorten the text (`text_budget` says to what), show fewer pictures, or raise the maximum",
            )


def image_tokens(processor: Any, images: Sequence[bytes | Image]) -> list[int]:
    """Tokens each picture takes in a prompt: its placeholders, and the marks some models put around them."""
    empty = len(_processed(processor, [render_prompt(processor, VisionPrompt(""))], [()])["input_ids"][0])
    counts = []
    for image in images:
        shown = VisionPrompt("", (image,))
        ids = _processed(processor, [render_prompt(processor, shown)], [shown.images])["input_ids"][0]
        counts.append(len(ids) - empty)
    return counts


def text_budget(processor: Any, images: Sequence[bytes | Image], max_length: int, answer: int = 0) -> int:
    """Tokens that are left for the words of a prompt.

    Args:
        processor: Of the model.
        images: Pictures of the prompt, which come first.
        max_length: Longest row in tokens.
        answer: Tokens kept for the answer.

    Raises:
        DataError: The pictures alone fill it.
    """
    frame = VisionPrompt("", tuple(images))
    used = len(_processed(processor, [render_prompt(processor, frame)], [frame.images])["input_ids"][0])
    if used + answer >= max_length:
        raise DataError(
            f"{len(images)} pictures leave no room for words",
            found=f"{used} tokens of pictures and template, {answer} kept for the answer",
            expected=f"less than {max_length}",
            remedy="show fewer or smaller pictures, or raise the maximum length",
        )
    return max_length - used - answer


def to_model(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A batch where the model computes, pixels in its type, `token_labels` under the name transformers knows."""
    names = {"token_labels": "labels"}
    return {
        names.get(name, name): value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


@torch.no_grad()
def count_features(model: Any, batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """(placeholders in the token ids, feature vectors the vision tower makes) of a batch; they must be equal.

    Raises:
        CheckpointError: The model does not say which token is its placeholder.
    """
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        raise CheckpointError(f"{type(model).__name__} has no image_token_id; its placeholders cannot be counted")
    inputs = to_model(batch, model)
    placeholders = int((inputs["input_ids"] == token).sum())
    taken = set(signature(model.get_image_features).parameters)
    pixels = {name: value for name, value in inputs.items() if name in taken and name != "input_ids"}
    if "pixel_values" not in pixels:
        return placeholders, 0
    found = model.get_image_features(**pixels)
    features = getattr(found, "pooler_output", found)
    parts = features if isinstance(features, list | tuple) else [features]
    return placeholders, sum(part.numel() // part.shape[-1] for part in parts)


# Adapters ------------------------------------------------------------------------------------------------------------


def language_targets(model: Any, names: Sequence[str] | None = None) -> str:
    """A pattern for peft's `target_modules` that matches linear layers of the language model and nothing else.

    Args:
        model: A vision-language model.
        names: Last parts of layer names, such as q_proj or self_attn.q_proj; None: every linear layer of the decoder.

    Returns:
        A regular expression over whole names. Vision tower, projector and output layer do not match.

    Raises:
        RecipeError: A name is no linear layer of the language model.
        CheckpointError: The language model inside cannot be told from the rest.
    """
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    eyes = [name for name, _ in decoder.named_modules() if re.search(r"vision|visual|projector|connector", name)]
    if not path or eyes:
        raise CheckpointError(
            f"{type(model).__name__} does not keep its language model apart from its vision tower; expected a model "
            "with a decoder of its own, or full names in tuner.target_modules"
        )
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    wanted = sorted({name.rpartition(".")[2] for name in linear} if names is None else set(names))
    unknown = [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in linear)]
    if unknown or not wanted:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise RecipeError(
            f"tuner.target_modules: found {', '.join(unknown) or 'no name'}, which the language model does not have; "
            f"expected some of {known}"
        )
    return rf"{re.escape(path)}\.(?:.+\.)?(?:{'|'.join(map(re.escape, wanted))})"
