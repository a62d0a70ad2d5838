"""Llama-style backbone over item ids: the block of today's language models as a sequential recommender.

The scaling study of large recommendation models (arXiv 2024) compares HSTU, Llama, GPT and SASRec backbones as they
grow, and finds that the Llama block keeps improving where plain SASRec does not. The block is transformers' own
`LlamaModel`, built from a configuration without pretrained weights and fed with item vectors: RMSNorm before each
branch, rotary positions, SwiGLU, no biases. The state after an event is scored against the tied item table.

Ours, not the study's (its repository holds no code): the width of the feed-forward layer (8/3 d, which gives
the classical parameter count of 12 d^2 a block), dropout behind the embeddings and behind each branch (Llama has none;
small data sets need it), and right padding, which a causal mask keeps out of real states.

Shapes: item_ids [B, L], hidden [B, L, d].
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, check_history, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="Scaling New Frontiers: Insights into Large Recommendation Models",
    venue="arXiv 2024",
    url_id="2412.00714",
    system="Llama",
)
ATTENTION = {"sdpa": "sdpa", "math": "eager"}
"""Our names of the implementations -> those of transformers."""


class LlamaEncoderConfig(SequenceEncoderConfig):
    """Options of the Llama-style backbone.

    Args:
        num_layers: Number of blocks.
        num_heads: Query heads; hidden_size / num_heads must be whole and even (rotary positions turn pairs).
        num_kv_heads: Key and value heads, a divisor of num_heads; None is num_heads.
        inner_size: Width of the SwiGLU layer; None is 8/3 hidden_size, rounded up to a multiple of 8.
        rope_theta: Base of the rotary frequencies.
        implementation: Attention by "sdpa", or "math" where second derivatives are needed.
    """

    model_type = "llmrec_llama"

    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int | None = None
    inner_size: int | None = None
    rope_theta: float = 10000.0
    implementation: Literal["sdpa", "math"] = "sdpa"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.implementation not in ATTENTION:
            raise RecipeError(
                f"encoder.implementation: found {self.implementation!r}, expected one of {', '.join(ATTENTION)}"
            )
        if self.num_heads < 1 or self.hidden_size % (2 * self.num_heads):
            raise RecipeError(
                f"encoder.num_heads: found {self.num_heads}, expected heads of whole, even width "
                f"in hidden_size {self.hidden_size}"
            )
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise RecipeError(
                f"encoder.num_kv_heads: found {self.num_kv_heads}, expected a divisor of num_heads {self.num_heads}"
            )

    def backbone(self) -> LlamaConfig:
        """The same sizes in transformers' words."""
        return LlamaConfig(  # type: ignore[call-arg]  # options of every configuration are taken as keywords
            vocab_size=1,  # its own table is not used
            hidden_size=self.hidden_size,
            intermediate_size=self.inner_size or 8 * math.ceil(self.hidden_size / 3),
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads or self.num_heads,
            max_position_embeddings=self.max_history,
            initializer_range=self.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            attn_implementation=ATTENTION[self.implementation],
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )


def _dropped(branch_end: nn.Module, dropout: float) -> Any:
    return nn.Sequential(branch_end, nn.Dropout(dropout))


class LlamaEncoder(SequenceEncoder):
    """Causal Llama blocks with tied item embeddings and rotary positions."""

    config_class = LlamaEncoderConfig
    config: LlamaEncoderConfig

    def __init__(self, config: LlamaEncoderConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = LlamaModel(config.backbone())
        self.backbone.embed_tokens = None  # type: ignore[assignment]  # it is always given vectors
        rotary = self.backbone.rotary_emb
        for name, values in list(rotary.named_buffers()):
            rotary.register_buffer(name, values)  # saved: loading builds models without values
        for layer in cast("list[LlamaDecoderLayer]", self.backbone.layers):
            layer.self_attn.o_proj = _dropped(layer.self_attn.o_proj, config.dropout)
            layer.mlp.down_proj = _dropped(layer.mlp.down_proj, config.dropout)
        self.post_init()

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch; see the base class.

        Raises:
            DataError: The batch is longer than `max_history`.
        """
        check_history(item_ids, self.config.max_history)
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        # No mask besides the causal one: padding stands right of every real position.
        hidden = self.backbone(inputs_embeds=self.dropout(items), use_cache=False).last_hidden_state
        hidden = hidden.masked_fill(~padding_mask(lengths, item_ids.shape[1]).unsqueeze(-1), 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))


register(LlamaEncoderConfig, LlamaEncoder)
