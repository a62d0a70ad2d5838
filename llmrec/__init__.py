"""llmrec: recommendation systems with large language models.

The public names below are imported on first use, so that `import llmrec` costs milliseconds and loads no torch:

    import llmrec
    recommender = llmrec.Recommender.from_pretrained("runs/quickstart")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.encoders.base import SequenceEncoder
    from llmrec.recipe import Recipe, load_recipe
    from llmrec.recommender import Recommender

_HOMES = {
    "InteractionDataset": "llmrec.data.dataset",
    "Recipe": "llmrec.recipe",
    "Recommender": "llmrec.recommender",
    "SequenceEncoder": "llmrec.encoders.base",
    "load_recipe": "llmrec.recipe",
}

__all__ = ["InteractionDataset", "Recipe", "Recommender", "SequenceEncoder", "__version__", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llmrec' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
