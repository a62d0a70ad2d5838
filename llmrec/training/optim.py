"""Parameter groups of a stage: who learns how fast, and which weights decay.

Groups: projector (maps item vectors to token slots), router (of instance-wise tuners), head (output layers and the
added rows of item codes), tuner (the other adapter weights), encoder (sequence encoders). iLoRA's release trains the
router at 0.3 of the learning rate, which a recipe says as `learning_rates: {router: 0.3}`; a group not named there
takes the learning rate as it is.

Weight decay (ours; the papers differ) touches matrices only: not biases, norms, embeddings or low-rank adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from llmrec.encoders.base import SequenceEncoder
from llmrec.errors import RecipeError
from llmrec.heads.base import GenerativeHead

_ADAPTERS = (".lora_", "modules_to_save", "trainable_tokens", "prompt_encoder")
_HEADS = {
    "output_head",
    "score_head",
    "item_head",
    "lm_head",
    "output_bias",
    "item_bias",
    "logit_scale",
    "code_embedding",
    "code_output",
}
_OUTER_HEADS = {"head", "bias", "scale"}
"""Heads only when they stand on the model itself; deeper inside, these names mean other things."""


def group_of(name: str, default: str) -> str:
    """Group of a parameter by its name."""
    parts = name.split(".")
    if "ilora_router" in parts or "router" in parts:
        return "router"
    if any(fragment in name for fragment in _ADAPTERS):
        return "tuner"
    if any(part.endswith("projector") or part == "projectors" for part in parts):
        return "projector"
    if any(part in _HEADS for part in parts) or name.removeprefix("model.").split(".")[0] in _OUTER_HEADS:
        return "head"
    if "encoder" in parts and default != "head":
        return "encoder"
    return default


def default_group(model: nn.Module) -> str:
    """Group of parameters whose name tells nothing: that of the model's kind."""
    if isinstance(model, SequenceEncoder):
        return "encoder"
    return "head" if isinstance(model, GenerativeHead) else "tuner"


def decays(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether weight decay applies: matrices only, and no embeddings, norms or low-rank adapters."""
    if parameter.dim() < 2 or name.endswith("bias") or isinstance(owner, nn.Embedding):
        return False
    return not (any(fragment in name for fragment in _ADAPTERS) or "norm" in type(owner).__name__.lower())


def parameter_groups(
    module: nn.Module, model: nn.Module, *, learning_rate: float, weight_decay: float, factors: Mapping[Any, float]
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; every trainable parameter is in exactly one.

    Args:
        module: What is trained; parameter names are its own.
        model: The recommender inside, whose kind decides the default group.
        learning_rate: Of the stage.
        weight_decay: For the matrices.
        factors: Group -> factor on the learning rate.

    Raises:
        RecipeError: Nothing is trainable, or a factor names a group without parameters.
    """
    default = default_group(model)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(prefix=path, recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            members.setdefault((group_of(leaf, default), decays(leaf, parameter, owner)), []).append(parameter)
    if not members:
        raise RecipeError("nothing to train: every parameter of the model is frozen")
    found = {group for group, _ in members}
    idle = sorted(set(factors) - found)
    if idle:
        raise RecipeError(
            f"learning_rates: found {', '.join(idle)}, but nothing trains there; "
            f"groups of this stage: {', '.join(sorted(found))}"
        )
    return [
        {
            "params": parameters,
            "lr": learning_rate * factors.get(group, 1.0),
            "weight_decay": weight_decay if decay else 0.0,
            "name": f"{group}{'' if decay else ', no decay'}",
        }
        for (group, decay), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
