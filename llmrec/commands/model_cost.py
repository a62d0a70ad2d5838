"""What an encoder of a recipe costs before it is trained: parameters, and milliseconds for one user.

Used by `llmrec plan`. Parameters are counted on the meta device, where no weight is drawn; latency is measured on a
fresh encoder, since weights do not change the time of a forward pass.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.recipe import Recipe

WARM_UP, TIMED = 3, 9


@dataclass(frozen=True)
class EncoderSize:
    """Parameters of an encoder; `inner` leaves out embedding tables, as scaling studies count."""

    total: int
    inner: int


def encoder_size(recipe: Recipe, dataset: InteractionDataset) -> EncoderSize:
    """Count the parameters of a recipe's encoder on a data set.

    Raises:
        RecipeError: The options contradict one another (heads that do not divide the width).
    """
    import torch
    from torch import nn

    kind, config = _config(recipe, dataset)
    with torch.device("meta"), torch.no_grad():
        model = kind(config)
    tables = {id(p) for part in model.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    counts = [(p.numel(), id(p) in tables) for p in model.parameters()]
    return EncoderSize(sum(n for n, _ in counts), sum(n for n, is_table in counts if not is_table))


def encoder_latency(recipe: Recipe, dataset: InteractionDataset) -> float:
    """Median milliseconds to score the whole catalogue for one user with a full history, on this machine's device."""
    import torch

    kind, config = _config(recipe, dataset)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = kind.from_context(config, dataset.context()).to(device).eval()
    length = recipe.dataset.max_history
    generator = torch.Generator().manual_seed(recipe.seed)
    batch: dict[str, Any] = {
        "item_ids": torch.randint(1, dataset.num_items + 1, (1, length), generator=generator),
        "lengths": torch.tensor([length]),
        "user_ids": torch.tensor([1]),
        "timestamps": torch.arange(length)[None, :] * 86_400,
        "target_timestamps": torch.tensor([length * 86_400]),
    }
    batch = {name: value.to(device) for name, value in batch.items()}
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + TIMED):
            began = time.perf_counter()
            model.score_items(batch).sum().item()  # reading a number waits for the device
            times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:]) * 1000


def _config(recipe: Recipe, dataset: InteractionDataset) -> tuple[Any, Any]:
    from llmrec import discovery

    assert recipe.encoder is not None
    kind: Any = discovery.resolve("encoder", recipe.encoder.type)
    config = kind.config_class(
        num_items=dataset.num_items,
        num_users=dataset.num_users,
        max_history=recipe.dataset.max_history,
        **recipe.encoder.options,
    )
    return kind, config
