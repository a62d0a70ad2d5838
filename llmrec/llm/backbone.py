"""The language model as a function from embeddings to hidden states, with or without an adapter.

Recommenders call the decoder without its output layer: logits over a vocabulary are made only where a token is asked
for. The call goes through peft's own hooks, so gates (`user_repr`, `gates`) reach the adapter as in a plain forward.

On a bfloat16 base the adapter's float32 weights are rounded to bfloat16 for each product (autocast), while the
optimizer keeps them in float32: the speed of a bfloat16 adapter with the small updates of a float32 one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig

from llmrec.errors import RecipeError

GateArguments = dict[str, Tensor]


class Backbone(nn.Module):
    """A causal language model, plain or wrapped by peft.

    Args:
        model: A transformers model or a PeftModel around one. A plain model is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self._compiled = False
        if not isinstance(model, PeftModel):
            model.requires_grad_(False)
        parts = ("get_decoder", "get_input_embeddings", "get_output_embeddings")
        if any(getattr(self.base, part, lambda: None)() is None for part in parts):
            raise RecipeError(
                f"llm: found {type(self.base).__name__}, expected a causal language model of transformers"
            )
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and self.dtype in (torch.bfloat16, torch.float16):
                layer.cast_input_dtype_enabled = False

    @property
    def base(self) -> Any:
        """The transformers model inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def embedding(self) -> Any:
        """The token embedding layer."""
        return self.base.get_input_embeddings()

    @property
    def width(self) -> int:
        """d_llm."""
        return int(self.embedding.weight.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Compute type: that of the token embeddings."""
        return self.embedding.weight.dtype

    @property
    def adapter_config(self) -> Any:
        """Configuration of the active adapter, or None."""
        return self.model.active_peft_config if isinstance(self.model, PeftModel) else None

    @property
    def gate_kind(self) -> str | None:
        """What the adapter asks for with every call: "user_repr", "gates", or None."""
        config = self.adapter_config
        if getattr(config, "num_experts", None) is None or not hasattr(config, "router"):
            return None
        return "gates" if config.router == "none" else "user_repr"

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, S] token ids -> [B, S, d_llm]."""
        return self.embedding(input_ids)

    @contextmanager
    def adapted(self, gates: GateArguments, **call: Any) -> Iterator[None]:
        """Make the adapter read `gates`, and compute in the base model's type, while the context is open."""
        hooks: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.model, PeftModel):
            hooks = self.model._enable_peft_forward_hooks(**gates, **call)
        with self._conditions(), hooks:
            yield

    def finished_gates(self, gates: GateArguments) -> Tensor | None:
        """[B, E] (or [B, S, E]) expert weights of the active adapter: the router runs once per row of `gates`."""
        if not gates:
            return None
        with self._precision():
            return self.model.base_model.compute_gates(self.model.active_adapter, **gates)

    def compile_layers(self) -> None:
        """Compile the decoder layers for training; reading and writing prompts afterwards runs as before.

        Layers, not the whole model: one compilation serves all of them, and hooks between them stay where they are.
        Gates are inputs of the compiled code, so that other users need no other code.

        Raises:
            RecipeError: The decoder is not made of layers.
        """
        layers = getattr(self.base.get_decoder(), "layers", None)
        if layers is None:
            raise RecipeError(f"torch_compile: {type(self.base).__name__} has no list of decoder layers to compile")
        for layer in layers:
            layer.compile(dynamic=True)
        self._compiled = True

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        """Precision, and compiled layers in training only: caches of other lengths would be compiled over and over."""
        eager = self._compiled and not (self.training and torch.is_grad_enabled())
        with self._precision(), torch.compiler.set_stance("force_eager") if eager else nullcontext():
            yield

    def _precision(self) -> AbstractContextManager[Any]:
        if not isinstance(self.model, PeftModel) or self.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self.embedding.weight.device.type, dtype=self.dtype)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        gates: GateArguments | None = None,
        **call: Any,
    ) -> Any:
        """Run the decoder without its output layer.

        Args:
            inputs_embeds: [B, S, d_llm].
            attention_mask: [B, S] or [B, past + S]; None when every column is real or padding stands on the right.
            gates: {"user_repr": ...} or {"gates": ...} for adapters that ask for them.
            **call: position_ids, past_key_values, use_cache.

        Returns:
            The decoder's output: last_hidden_state [B, S, d_llm] (after the final norm), past_key_values.
        """
        call.setdefault("use_cache", False)
        if attention_mask is not None and "position_ids" not in call:
            call["position_ids"] = positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        with self.adapted(gates or {}):
            return self.base.get_decoder()(
                inputs_embeds=inputs_embeds.to(self.dtype), attention_mask=attention_mask, **call
            )

    @torch.no_grad()
    def generate(self, inputs_embeds: Tensor, attention_mask: Tensor, gates: GateArguments, **options: Any) -> Any:
        """Greedy or beam search after left padded prompts; see transformers' generate. Only new tokens come back."""
        config = GenerationConfig(do_sample=False, use_cache=True, return_dict_in_generate=True, **options)
        if options.get("num_beams", 1) > 1:
            config.output_scores = True
        with self._conditions():
            return self.model.generate(
                inputs_embeds=inputs_embeds.to(self.dtype),
                attention_mask=attention_mask,
                generation_config=config,
                **gates,
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d_llm] final hidden states -> [..., V] float32, with the soft cap or scale some models apply."""
        scores = self.base.get_output_embeddings()(hidden.to(self.dtype)).float()
        config = self.base.config
        if getattr(config, "logits_scaling", None):
            scores = scores / config.logits_scaling
        if getattr(config, "logit_scale", None):
            scores = scores * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return scores if not cap else cap * torch.tanh(scores / cap)


def positions(attention_mask: Tensor) -> Tensor:
    """[B, S] position ids without holes, whichever side the padding stands on."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
