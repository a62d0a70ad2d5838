"""What the fits of autoencoding item tokenizers share: an MLP, seeding, and a plain training loop over rows.

Users: `item_tokenizers.rqvae`, `item_tokenizers.cofirec`, `item_tokenizers.fsq`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def mlp(sizes: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these sizes, ReLU (and dropout) between them, nothing after the last.

    Args:
        sizes: Input width, hidden widths, output width: at least two numbers.
        dropout: Probability, applied after each ReLU.

    Returns:
        The layers; weights are Xavier normal, biases zero.

    Raises:
        ValueError: Fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"an MLP needs an input and an output width, found {list(sizes)}")
    layers: list[nn.Module] = []
    for number, (width, following) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        if number:
            layers += [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
        linear = nn.Linear(width, following)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global random numbers are those of `seed`; afterwards they go on as if nothing had happened."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def fit(
    module: nn.Module,
    rows: int,
    loss: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    generator: torch.Generator,
    on_epoch: Callable[[int], bool | None] | None = None,
    progress: str | None = None,
) -> list[float]:
    """Minimise a loss over rows in shuffled batches by AdamW, gradients clipped to norm 1.

    Args:
        module: What is trained; it is in training mode during steps.
        rows: N; batches are index tensors into 0..N-1.
        loss: Index [b] int64 -> scalar, the mean over these rows.
        epochs: Passes over the rows, at most.
        batch_size: Rows of a step; the last batch of an epoch may be smaller.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW, on every parameter.
        generator: Source of the order of rows (on the CPU).
        on_epoch: Called after each epoch with its number from 1; True stops the training.
        progress: A name for lines of the log, ten at most; None is silence.

    Returns:
        Mean loss of the rows in each epoch that was run.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    means: list[float] = []
    for epoch in range(1, epochs + 1):
        module.train()
        total = 0.0
        for index in torch.randperm(rows, generator=generator).split(batch_size):
            value = loss(index)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            total += float(value.detach()) * len(index)
        means.append(total / max(rows, 1))
        if progress and (epoch == epochs or epoch % max(1, epochs // 10) == 0):
            logger.info("%s: epoch %d of %d, loss %.5g", progress, epoch, epochs, means[-1])
        if on_epoch is not None and on_epoch(epoch):
            break
    return means
