"""4-bit (NF4) and 8-bit base weights by bitsandbytes, ready for training an adapter over them.

Only transformers imports the library. Ours, in place of peft's `prepare_model_for_kbit_training`: only norms become
float32, and what they return has the compute dtype again. peft's also turns token embeddings, output layer and with
them the whole stream of activations into float32: twice the activations, and another 57 MB for 49,152 tokens of width
576. Activation checkpointing needs no hook that gives inputs a gradient, since the recompute is not reentrant. The
adapter is float32 by peft's own rule. A model is prepared the same way for training and for a loaded run, so that both
compute the same.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import util
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmrec.errors import DependencyError, RecipeError

Quantize = Literal["4bit", "8bit"]


def quantised_arguments(quantize: str | None, compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise weights while loading them; nothing for None.

    Args:
        quantize: "4bit" (NF4, a float32 scale for 64 weights), "8bit" (a scale for each row), or None.
        compute: Dtype of activations.
        device: Where the weights are made: their layout belongs to one kind of device.

    Raises:
        RecipeError: Another word, or the launcher divides weights.
        DependencyError: bitsandbytes is missing.
    """
    if quantize is None:
        return {}
    if quantize not in ("4bit", "8bit"):
        raise RecipeError(f"llm.quantize: found {quantize!r}, expected 4bit, 8bit or nothing")
    refuse_divided(quantize, _launched_sharding())
    if util.find_spec("bitsandbytes") is None:
        raise DependencyError("bitsandbytes", extra="quant", purpose=f"llm.quantize: {quantize}")
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
        if quantize == "4bit"
        else {"load_in_8bit": True}
    )
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": device}}


def refuse_divided(quantize: str | None, sharding: str) -> None:
    """Refuse quantised weights under a launcher that divides weights over processes.

    Args:
        quantize: "4bit", "8bit" or None.
        sharding: "none", "zero0" to "zero3", or "fsdp".

    Raises:
        RecipeError: The pair cannot work; what can is said.
    """
    if quantize is not None and sharding in ("zero3", "fsdp"):
        name, plain = ("DeepSpeed ZeRO-3", "zero3") if sharding == "zero3" else ("FSDP", "fsdp2")
        raise RecipeError(
            f"found llm.quantize: {quantize} with {name}, and packed weights cannot be divided over processes; "
            "expected quantised weights whole on every device (launchers single_gpu, multi_gpu, multi_node, zero2), or "
            f"{plain} without llm.quantize"
        )


def _launched_sharding() -> str:
    """What the launcher of this process divides, by the variables accelerate sets."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '0')}"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "none"


def prepare_quantised(model: nn.Module, compute: torch.dtype) -> None:
    """Make a model with quantised weights ready for an adapter, in place.

    Everything is frozen; norms keep float32 weights and compute in float32.

    Args:
        model: As transformers loaded it.
        compute: Dtype of activations.
    """
    model.requires_grad_(False)
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such a processor the first forward in evaluation would repack 4-bit weights in place and round their
            # scales to bfloat16; from then on they multiply without gradients, and training would go on without them.
            module.support_avx512bf16_for_cpu = False
        if compute != torch.float32 and "norm" in type(module).__name__.lower() and not any(module.children()):
            module.float()
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(partial(_narrow, compute))


def _widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _narrow(compute: torch.dtype, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(compute)
