"""Switches of a stage that make steps faster without changing what is learned; applied to the model before training.

    packing            several prompts share a row (styles text and hybrid); see `llmrec.llm.packing`
    torch_compile      decoder layers are compiled, in training only
    use_liger_kernel   Triton kernels of the package liger-kernel in place of norms, rotary positions and feed-forwards

transformers would compile the whole module, loss and batch handling included, and give Liger a module it does not know;
so both are applied here, to the language model. Liger's own loss stays out of the way: logits are made at supervised
tokens only, which is what its fused loss saves elsewhere.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, fields
from importlib import util
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.recipe import StageSpec

__all__ = ["SpeedOptions", "speed_up"]


@dataclass(frozen=True)
class SpeedOptions:
    """What a stage asks for; see the module."""

    packing: bool = False
    torch_compile: bool = False
    use_liger_kernel: bool = False

    @classmethod
    def of(cls, stage: StageSpec) -> Self:
        """The switches among a stage's keys.

        Raises:
            RecipeError: A value is neither true nor false.
        """
        names = [field.name for field in fields(cls)]
        given = {name: value for name, value in stage.training_arguments.items() if name in names}
        for name, value in given.items():
            if not isinstance(value, bool):
                raise RecipeError(f"stage {stage.train}: {name}: found {value!r}, expected true or false")
        return cls(**given)


def speed_up(model: nn.Module, options: SpeedOptions, *, checkpointing: bool = False) -> None:
    """Apply the switches to a model, in place.

    Args:
        model: What the stage trains.
        options: The switches.
        checkpointing: Whether activations are recomputed.

    Raises:
        RecipeError: The model, a package or the machine does not allow one of them.
    """
    if options.packing:
        _pack(model)
    if options.use_liger_kernel:
        _use_liger(model)
    if options.torch_compile:
        _compile(model, checkpointing)


def _pack(model: Any) -> None:
    if not hasattr(model, "use_packing"):
        raise RecipeError(
            f"packing: found {type(model).__name__}, expected a recommender that answers in words (prompt.style text "
            "or hybrid); windows of items are nearly of one length, use train_sampling_strategy: group_by_length"
        )
    model.use_packing()


def _backbone(model: Any, switch: str) -> Any:
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise RecipeError(f"{switch}: found {type(model).__name__}, expected a stage that trains a language model")
    return backbone


def _use_liger(model: Any) -> None:
    from transformers.integrations.liger import apply_liger_kernel, is_liger_kernel_available

    backbone = _backbone(model, "use_liger_kernel")
    if not is_liger_kernel_available():
        raise RecipeError(
            "use_liger_kernel: the package liger-kernel is not installed; install it with: pip install liger-kernel "
            "(it needs a GPU), or remove the key"
        )
    apply_liger_kernel(backbone.base, {"fused_linear_cross_entropy": False, "cross_entropy": False})


def _compile(model: Any, checkpointing: bool) -> None:
    backbone = _backbone(model, "torch_compile")
    if backbone.gate_kind is not None and checkpointing:
        raise RecipeError(
            "torch_compile together with activation_checkpointing: the recompute of a layer needs the gates of its own "
            "forward, which an instance-wise tuner hands over by a context of torch.utils.checkpoint (context_fn), and "
            "torch.compile cannot trace such a context; switch one of the two off"
        )
    device = backbone.embedding.weight.device
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))):
        raise RecipeError("torch_compile: found no C++ compiler, which it needs on a processor; install g++ or clang++")
    if device.type == "cuda" and util.find_spec("triton") is None:
        raise RecipeError("torch_compile: found no package triton, which it needs on a GPU; pip install triton")
    backbone.compile_layers()
