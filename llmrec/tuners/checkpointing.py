"""Activation checkpointing for tuners whose layers read a shared state during the recompute.

The recompute of a checkpointed layer runs in backward, when the state may hold the gates of another forward. Every
checkpointing module therefore gets a `context_fn` that captures the state when the layer runs forward. The callable
cannot stand in training arguments (they are written as JSON), so it is put on the modules themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from llmrec.errors import RecipeError
from llmrec.tuners.gate_state import GateState


def adopt_checkpointing(modules: Iterable[Any], state: GateState) -> None:
    """Give checkpointing modules the contexts of `state`, whoever enabled them; a second call changes nothing.

    Args:
        modules: Modules with the attribute `gradient_checkpointing` of transformers.
        state: The gates to capture.

    Raises:
        RecipeError: When a module uses the reentrant form or has contexts of its own.
    """
    contexts = state.checkpoint_contexts
    for module in modules:
        if not module.gradient_checkpointing:
            continue
        function = module._gradient_checkpointing_func
        options = dict(getattr(function, "keywords", {}))
        if options.get("context_fn") == contexts:
            continue
        if isinstance(getattr(options.get("context_fn"), "__self__", None), GateState):
            del options["context_fn"]  # left by an adapter that was unloaded
        check_checkpoint_options(options)
        module._gradient_checkpointing_func = partial(function, use_reentrant=False, context_fn=contexts)


def check_checkpoint_options(options: Mapping[str, Any]) -> None:
    """Refuse options of `torch.utils.checkpoint` that lose the gates.

    Raises:
        RecipeError: For use_reentrant=True or a foreign context_fn.
    """
    if options.get("use_reentrant"):
        raise RecipeError(
            "activation checkpointing: found use_reentrant=True, expected False: "
            "the reentrant form loses the gradient of the router"
        )
    if options.get("context_fn") is not None:
        raise RecipeError("activation checkpointing: found a context_fn, expected none: iLoRA needs its own")
