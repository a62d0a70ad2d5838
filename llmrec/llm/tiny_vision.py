"""A vision-language model small enough to learn to see on one processor core, made from a configuration.

`tiny_vision_model(seed)` is LLaVA in small: a CLIP vision transformer over pictures of 64 x 64 pixels, a projector of
two layers and a Llama, 128 wide, with drawn weights. It knows nothing; `recipes/vision/` teaches it to describe
pictures. `llm.model: tiny-vlm` stands for it. Its tokenizer is byte-level BPE, so it can read any text; the words of
drawn pictures, film genres and yes/no questions are single tokens. Ours, from no paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrec.data.item_images import COLOURS, PATTERNS, SHAPES

SIDE, PATCH = 64, 16
"""Pixels of a side, and of a patch's side: 16 placeholders a picture."""
GENRES = (
    "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci", "Fi", "Thriller", "War", "Western", "Film",
)  # fmt: skip
_WORDS = (
    "Yes", "No", "yes", "no", "a", "an", "and", "or", "the", "of", "on", "in", "with", "is", "are", "it", "this",
    "Describe", "picture", "pictures", "image", "shows", "shown", "shape", "colour", "pattern", "background",
    "lettering", "film", "poster", "genre", "genres", "item", "items", "title", "titled", "user", "likes", "liked",
    "prefers", "preference", "would", "next", "answer", "only", "Answer", "one", "words", "name", "Name", "first",
    "Which", "does", "show", "what", "What", "The", "This", "A",
)  # fmt: skip
IMAGE, USER, ASSISTANT = "<image>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def vision_words() -> tuple[str, ...]:
    """Words that are one token each, with or without a blank in front."""
    drawn = (*SHAPES, *(name for name, _ in COLOURS), *PATTERNS)
    return tuple(dict.fromkeys((*drawn, *GENRES, *_WORDS)))


def tiny_vision_tokenizer() -> Any:
    """Byte-level BPE of bytes and `vision_words`; the same on every machine."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", IMAGE, USER, ASSISTANT, "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    for word in vision_words():
        for written in (word, f"\u0120{word}"):  # byte-level BPE writes a blank as this letter
            vocabulary.setdefault(written, len(vocabulary))
    # Whole words are looked up, everything else is bytes: no merges, so nothing depends on how they are learned.
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
    )  # fmt: skip


def tiny_vision_model(seed: int = 0) -> tuple[Any, Any]:
    """The model and its processor.

    Args:
        seed: Of the weights; the global random numbers are left as they were.

    Returns:
        `LlavaForConditionalGeneration` in evaluation mode, and `LlavaProcessor`.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = tiny_vision_processor()
    tokenizer = processor.tokenizer
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
            patch_size=PATCH, projection_dim=128,
        ),
        text_config=LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=len(tokenizer), max_position_embeddings=2048, **ends,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True, **ends,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    return model.eval(), processor


def tiny_vision_processor() -> Any:
    """Its processor: the whole picture, stretched to a square."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(
        size=square, crop_size=square, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tiny_vision_tokenizer(), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def save_tiny_vision_model(folder: Path) -> None:
    """Write the model of seed 0 and its processor, as `llmrec pull tiny-vlm` keeps them."""
    model, processor = tiny_vision_model(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
