"""Texts written by a language model: requests in, answers out, one failed request never stops the others.

    generator = load_generator("smollm2-135m", max_new_tokens=64)
    answers = generator.generate([Request("Name three colours."), Request("What is shown?", images=(png,))])

Two back-ends share the protocol `Generator`: `TransformersGenerator` computes in this process, with text models and
with image-text-to-text models; `llmrec.llm.endpoint.EndpointGenerator` asks a server.

An answer depends on its own request alone. Greedy decoding (the default) takes the most likely token. Sampling inverts
the cumulative distribution with numbers drawn from a hash of the request and the seed, not from a generator that the
batch shares. So neither the order of requests nor the batch size changes an answer in float32; in bfloat16, rounding
differs with the width of a batch and a near tie may fall the other way. What a model's generation_config.json asks for
beyond its end tokens (sampling, repetition penalties) is not applied: the options here are the whole of the decoding.

Prompts use the chat template where the model has one, with the answer's opening words placed behind the mark of the
assistant. Dates that a template writes are fixed and deliberation ("thinking") is switched off, so that the same
request is the same prompt on any day. Words in a request that would read as control tokens are broken up. A prompt is
never cut, neither its text nor its image: one that is too long is a `Failure`, and `prompt_tokens` tells beforehand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmrec.errors import DataError, RecipeError
from llmrec.llm.continuing import (
    SeededSampling,
    control_words,
    decoding_of,
    end_tokens,
    seeded_draws,
    undated,
    weights_identity,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmrec.llm.loading import Dtype
    from llmrec.llm.quantized import Quantize

_TAIL = 8  # tokens of the prompt decoded together with the answer, for the blank between them
# What processors of transformers raise for an image or a text they cannot take.
_UNREADABLE = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Request:
    """What a model is asked.

    Args:
        text: The whole instruction, without marks of a chat template.
        images: Encoded images (PNG, JPEG, WebP, ...), shown before the text.
        opening: Words the answer must start with.
    """

    text: str
    images: tuple[bytes, ...] = ()
    opening: str = ""

    @property
    def key(self) -> str:
        """SHA-256 of the content, hexadecimal."""
        digest = hashlib.sha256()
        words = (self.text.encode(errors="surrogatepass"), self.opening.encode(errors="surrogatepass"))
        for part in (*words, *self.images):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer.

    Args:
        text: The answer without surrounding blanks; it includes the opening.
        prompt_tokens: Tokens read, with chat template, images and opening.
        new_tokens: Tokens written, without the end token.
        finish: "stop": the model ended its answer; "length": it was cut at the limit of new tokens.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Failure:
    """A request without an answer.

    Args:
        reason: What happened, in one line.
        transient: Whether the same request may succeed later.
    """

    reason: str
    transient: bool


class Generator(Protocol):
    """A back-end that answers requests."""

    @property
    def identity(self) -> str:
        """16 hexadecimal digits: model, weights and decoding parameters; equal ones give comparable answers."""
        ...

    @property
    def max_prompt_tokens(self) -> int | None:
        """The longest prompt, counted as in `Reply.prompt_tokens`; None: not known."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own (a back-end without a tokenizer estimates)."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One answer a request, in their order."""
        ...


class TransformersGenerator:
    """Answers of a model of transformers in this process.

    Args:
        model: A causal language model or an image-text-to-text model, where it is to compute.
        processor: Its tokenizer, or the processor (with `tokenizer` and `image_processor`) of a model for images.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy; above, logits are divided by it and tokens are drawn.
        top_p: Draw from the most likely tokens that hold this share of probability.
        seed: Of the draws; greedy answers do not depend on it.
        batch_size: Requests computed together. Batches hold similar lengths and equal numbers of images.
        max_prompt_tokens: A limit below the model's own.

    Raises:
        RecipeError: An option is out of range, or the model writes no continuation of its prompt.
    """

    def __init__(
        self, model: Any, processor: Any, *, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
        seed: int = 0, batch_size: int = 8, max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        check_decoding(max_new_tokens, temperature, top_p)
        if batch_size < 1:
            raise RecipeError(f"batch_size: found {batch_size}, expected at least 1")
        if getattr(model.config, "is_encoder_decoder", False):
            raise RecipeError(f"{type(model).__name__} is an encoder-decoder; expected a decoder that continues a text")
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, float(temperature), float(top_p)
        self.seed, self.batch_size = seed, batch_size
        self._model, self._processor = model.eval(), processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # masked wherever it stands: no new token is needed
        self.reads_images = self._tokenizer is not processor
        self.max_prompt_tokens = self._room(max_prompt_tokens)
        self._ends = end_tokens(model, processor, self._tokenizer)
        self._control = control_words(processor, self._tokenizer)
        self.identity = self._identify()

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own, without tokens a tokenizer adds."""
        return len(self._tokenizer(self._defused(text), add_special_tokens=False)["input_ids"])

    def prompt_tokens(self, request: Request) -> int:
        """Tokens of a whole prompt: chat template, images, text and opening.

        Raises:
            DataError: An image cannot be read.
            RecipeError: The model reads no images.
        """
        self._check_images([request])
        return int(self._encode([request], [self._images(request)])["attention_mask"].sum())

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One answer a request, in their order; the longest are computed first, which shows a lack of memory early.

        Raises:
            RecipeError: A request holds an image and the model reads none.
        """
        self._check_images(requests)
        answers: dict[int, Reply | Failure] = {}
        for batch in self._batches(requests):
            answers |= zip(batch, self._answer([requests[place] for place in batch]), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Places of requests that are computed together."""
        lengths = [(len(each.images), len(each.text) + len(each.opening)) for each in requests]
        batch: list[int] = []
        for place in sorted(range(len(requests)), key=lambda place: (lengths[place], place), reverse=True):
            if batch and (len(batch) == self.batch_size or lengths[batch[0]][0] != lengths[place][0]):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _answer(self, batch: list[Request]) -> list[Reply | Failure]:
        """Answers of a batch; requests that cannot be prompts leave it before the model runs."""
        answers: dict[int, Reply | Failure] = {}
        images: dict[int, tuple[Any, ...]] = {}
        for row, request in enumerate(batch):
            try:
                images[row] = self._images(request)
            except DataError as error:
                answers[row] = Failure(_one_line(error), transient=False)

        def encoded(rows: list[int]) -> dict[str, Tensor]:
            return self._encode([batch[row] for row in rows], [images[row] for row in rows])

        rows, inputs, refused = _encodable(list(images), encoded)
        answers |= refused
        lengths = dict(zip(rows, inputs["attention_mask"].sum(1).tolist(), strict=True)) if rows else {}
        limit = self.max_prompt_tokens
        fits = [row for row in rows if limit is None or lengths[row] <= limit]
        for row in set(rows) - set(fits):
            answers[row] = Failure(f"the prompt has {lengths[row]} tokens, expected at most {limit}", transient=False)
        if fits:
            inputs = inputs if fits == rows else encoded(fits)
            answers |= zip(fits, self._run(inputs, [batch[row] for row in fits]), strict=True)
        return [answers[row] for row in range(len(batch))]

    def _run(self, inputs: dict[str, Tensor], requests: list[Request]) -> list[Reply | Failure]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        width = inputs["input_ids"].shape[1]
        chosen = LogitsProcessorList()
        if self.temperature > 0:
            draws = seeded_draws([f"{self.seed}/{request.key}" for request in requests], self.max_new_tokens)
            chosen.append(SeededSampling(draws, width, self.temperature, self.top_p))
        decoding = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
            eos_token_id=sorted(self._ends) or None, pad_token_id=self._tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.no_grad(), decoding_of(self._model, decoding):
            whole = self._model.generate(**inputs, generation_config=decoding, logits_processor=chosen)
        masks, ids = inputs["attention_mask"].tolist(), inputs["input_ids"].tolist()
        written = whole[:, width:].tolist()
        return [self._reply(*row) for row in zip(requests, ids, masks, written, strict=True)]

    def _reply(self, request: Request, ids: list[int], mask: list[int], written: list[int]) -> Reply | Failure:
        end = next((at for at, token in enumerate(written) if token in self._ends), None)
        new = written if end is None else written[:end]
        before = [token for token, real in zip(ids, mask, strict=True) if real][-_TAIL:]
        text = self._continuation(before, new).rstrip("\ufffd")  # half a character at the limit
        if not text.strip():
            return Failure(f"the model wrote no words ({len(new)} tokens)", transient=False)
        return Reply((request.opening.strip() + text).strip(), sum(mask), len(new), "length" if end is None else "stop")

    def _continuation(self, before: list[int], new: list[int]) -> str:
        """The new tokens as text; some tokenizers write the blank before a word only when something precedes it."""
        options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        head = self._tokenizer.decode(before, **options)
        whole = self._tokenizer.decode(before + new, **options)
        return whole[len(head) :] if whole.startswith(head) else self._tokenizer.decode(new, **options)

    # Prompts ---------------------------------------------------------------------------------------------------------

    def _prompt(self, request: Request) -> str:
        """A prompt of a text model, up to where the answer starts."""
        text, opening = self._defused(request.text), self._defused(request.opening.strip())
        if self._tokenizer.chat_template is None:
            return text + ("\n" if opening and text and not text[-1].isspace() else "") + opening
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], chat_template=undated(self._tokenizer.get_chat_template()),
            tokenize=False, add_generation_prompt=True, enable_thinking=False,
        )  # fmt: skip
        return rendered + opening

    def _encode(self, requests: list[Request], images: list[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Tensors of prompts where the model computes, padded on the left."""
        from llmrec.llm.vision import VisionPrompt, encode_prompts, to_model

        if self.reads_images:
            prompts = [
                VisionPrompt(request.text, shown, request.opening.strip())
                for request, shown in zip(requests, images, strict=True)
            ]
            return to_model(encode_prompts(self._processor, prompts, padding_side="left"), self._model)
        # A chat template writes the start token itself; a plain text gets what the tokenizer adds.
        made = self._tokenizer(
            [self._prompt(request) for request in requests],
            add_special_tokens=self._tokenizer.chat_template is None, return_token_type_ids=False,
            padding=True, padding_side="left", return_tensors="pt",
        )  # fmt: skip
        return to_model(made, self._model)

    def _images(self, request: Request) -> tuple[Any, ...]:
        from llmrec.data.item_images import decode_image

        return tuple(decode_image(data, name=f"image {place}") for place, data in enumerate(request.images, start=1))

    def _check_images(self, requests: Sequence[Request]) -> None:
        if not self.reads_images and any(request.images for request in requests):
            raise RecipeError(
                f"{type(self._model).__name__} reads text alone, and a request holds an image; expected an "
                "image-text-to-text model"
            )

    def _defused(self, text: str) -> str:
        for word in self._control:
            text = text.replace(word, f"{word[0]} {word[1:]}")
        return text

    def _room(self, wanted: int | None) -> int | None:
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        own = None if context is None else context - self.max_new_tokens
        if own is not None and own < 1:
            raise RecipeError(f"max_new_tokens: found {self.max_new_tokens}, the model has {context} positions in all")
        if wanted is not None and wanted < 1:
            raise RecipeError(f"max_prompt_tokens: found {wanted}, expected at least 1")
        return min((limit for limit in (own, wanted) if limit is not None), default=None)

    def _identify(self) -> str:
        name = str(getattr(self._model, "llmrec_base_name", None) or self._model.config.name_or_path or "")
        looks = getattr(self._processor, "image_processor", None)
        facts = {
            "model": Path(name).name if Path(name).is_dir() else name,
            "revision": getattr(self._model.config, "_commit_hash", None),
            "weights": weights_identity(self._model),
            "words": hashlib.sha256(repr(sorted(self._tokenizer.get_vocab().items())).encode()).hexdigest(),
            "template": getattr(self._processor, "chat_template", None),
            "images": None if looks is None else looks.to_dict(),
            "decoding": [self.max_new_tokens, self.max_prompt_tokens, self.temperature],
            "draws": [self.top_p, self.seed] if self.temperature > 0 else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_generator(
    name: str | Path, *, dtype: Dtype = "auto", quantize: Quantize | None = None, revision: str | None = None,
    device: str | torch.device | None = None, **decoding: Any,
) -> TransformersGenerator:  # fmt: skip
    """A generator by the name of its model, for text or for images and text as the model's configuration says.

    Args:
        name: Local folder, name of `llmrec pull`, or hub id.
        dtype: As for `load_language_model`.
        quantize: As for `load_language_model`.
        revision: Commit, tag or branch of the hub.
        device: Where to compute; None: the accelerator of this process, or the processor.
        **decoding: Options of `TransformersGenerator`.

    Raises:
        CheckpointError: Nothing of that name can be loaded.
        DependencyError: Pillow or bitsandbytes is needed and missing.
        RecipeError: An option is out of range.
    """
    from llmrec.llm.loading import load_language_model, own_device
    from llmrec.llm.vision import is_vision_model, load_vision_model

    home = own_device() if device is None else device
    if is_vision_model(name, revision):
        model, processor = load_vision_model(name, dtype=dtype, quantize=quantize, revision=revision, device=home)
    else:
        model, processor = load_language_model(name, dtype, quantize, revision, device=home)
    return TransformersGenerator(model, processor, **decoding)


def check_decoding(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Check the options of decoding that all back-ends share.

    Raises:
        RecipeError: One is out of range.
    """
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens: found {max_new_tokens}, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise RecipeError(f"temperature: found {temperature}, expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p: found {top_p}, expected a share above 0 and at most 1")


def _encodable(
    rows: list[int], encoded: Callable[[list[int]], dict[str, Tensor]]
) -> tuple[list[int], dict[str, Tensor], dict[int, Failure]]:
    """Rows a processor takes, their tensors, and why the others are refused."""
    if not rows:
        return [], {}, {}
    try:
        return rows, encoded(rows), {}
    except _UNREADABLE:
        refused = {}
        for row in rows:
            try:
                encoded([row])
            except _UNREADABLE as error:
                refused[row] = Failure(f"the model's processor refuses it: {_one_line(error)}", transient=False)
        if not refused:
            raise
    sound = [row for row in rows if row not in refused]
    return sound, encoded(sound) if sound else {}, refused


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
