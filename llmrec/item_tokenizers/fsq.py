"""FSQ: semantic ids by rounding a bounded latent vector to a fixed grid; no codebook to learn, none to collapse.

An encoder maps the features of an item to a few numbers, each is squashed into a range of L_i steps and rounded, and a
decoder learns to give the features back (mean squared error alone, straight-through rounding):

    half = (L_i - 1)(1 + 1e-3) / 2;   off = 1/2 if L_i is even else 0;   shift = atanh(off / half)
    b_i = tanh(z_i + shift) half - off;   z^_i = round(b_i) / floor(L_i / 2)
    code = sum_i (z^_i floor(L_i / 2) + floor(L_i / 2)) prod_{j<i} L_j

These are the formulas of the paper. How they become several code levels is ours: `group` gives each level dimensions of
its own; in `residual` level h rounds what the levels before it left over, (tanh(z) - sum) s_h clamped to [-1, 1] with
s_h = prod over earlier levels of (L - 1), on the L_i evenly spaced values from -1 to 1, so that a level resolves one
step of the level before (neighbouring cells share their border: a few tuples mean the same point). Features are
standardised and brought to mean square 1 before the encoder.

Shapes: I items, M levels, n dimensions of one level, W = prod L_i codes of a level, d feature dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from llmrec.blocks import autoencoder
from llmrec.blocks.quantize import distances
from llmrec.data.schema import ItemFeatures
from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers.base import CollisionPolicy, FitReport, ItemTokenizer, fused, fused_statistics
from llmrec.paper import Paper

PAPER = Paper(
    title="Finite Scalar Quantization: VQ-VAE Made Simple", venue="ICLR 2024", url_id="2309.15505", system="FSQ"
)
Mode = Literal["group", "residual"]
MOST_STEPS = 1000
"""Above it the paper's margin of 1e-3 is wider than half a step, and rounding could leave the grid."""


class Grid:
    """The codes of one level: all points of a grid with L_i steps in dimension i.

    Args:
        shape: (n,) steps per dimension, each from 2 to 1000.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.steps = torch.tensor(shape)
        self.size = math.prod(shape)
        self.below = self.steps // 2  # steps below 0
        self.off = torch.where(self.steps % 2 == 0, 0.5, 0.0)
        self.half = (self.steps - 1) * (1 + 1e-3) / 2
        self.strides = torch.tensor([math.prod(shape[:i]) for i in range(len(shape))])

    def bound(self, z: Tensor) -> Tensor:
        """[..., n] any numbers -> [..., n] within the range whose rounding gives L_i integers (b of the module)."""
        return torch.tanh(z + torch.atanh(self.off / self.half)) * self.half - self.off

    def spread(self, unit: Tensor) -> Tensor:
        """[..., n] in [-1, 1] -> the range of `bound`, evenly: -1 and 1 are the first and the last step."""
        return unit * (self.steps - 1) / 2 - self.off

    def values(self, rounded: Tensor) -> Tensor:
        """[..., n] integers around 0 -> z^ in [-1, 1], as the paper scales them."""
        return rounded / self.below

    def even_values(self, rounded: Tensor) -> Tensor:
        """[..., n] integers around 0 -> [-1, 1] with both ends, the inverse of `spread`."""
        return (rounded + self.off) * 2 / (self.steps - 1)

    def index(self, rounded: Tensor) -> Tensor:
        """[..., n] integers around 0 -> [...] codes."""
        return ((rounded.round().long() + self.below) * self.strides).sum(-1)

    def rounded(self, index: Tensor) -> Tensor:
        """[...] codes -> [..., n] integers around 0, the inverse of `index`."""
        return (index[..., None] // self.strides % self.steps - self.below).float()


def round_through(x: Tensor) -> Tensor:
    """Rounded forward, identity backward."""
    return x + (x.round() - x).detach()


class FSQNetwork(nn.Module):
    """Encoder, grids and decoder.

    Args:
        width: d.
        shapes: (M,) grids, one per level.
        mode: "group" or "residual".
        hidden: Widths of the encoder; the decoder mirrors them.
    """

    def __init__(self, width: int, shapes: Sequence[Sequence[int]], mode: Mode, hidden: Sequence[int]) -> None:
        super().__init__()
        self.grids, self.mode = [Grid(shape) for shape in shapes], mode
        self.split = [len(shape) for shape in shapes] if mode == "group" else [len(shapes[0])]
        self.encoder = autoencoder.mlp((width, *hidden, sum(self.split)))
        self.decoder = autoencoder.mlp((sum(self.split), *reversed(hidden), width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, d] reconstructed through the codes."""
        output: Tensor = self.decoder(self.quantize(x)[0])
        return output

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, d] -> (z^ [B, latent], straight-through; codes [B, M]; the last level before rounding [B, n])."""
        z = self.encoder(x)
        if self.mode == "group":
            bounded = [grid.bound(part) for grid, part in zip(self.grids, z.split(self.split, dim=-1), strict=True)]
            rounded = [round_through(part) for part in bounded]
            latent = torch.cat([grid.values(part) for grid, part in zip(self.grids, rounded, strict=True)], dim=-1)
        else:
            unit = torch.tanh(z)
            total, finer, bounded, rounded = torch.zeros_like(unit), torch.ones_like(unit[0]), [], []
            for grid in self.grids:
                bounded.append(grid.spread(((unit.detach() - total) * finer).clamp(-1, 1)))
                rounded.append(bounded[-1].round())
                total = total + grid.even_values(rounded[-1]) / finer
                finer = finer * (grid.steps - 1)
            latent = unit + (total - unit).detach()
        codes = torch.stack([grid.index(part) for grid, part in zip(self.grids, rounded, strict=True)], dim=-1)
        return latent, codes, bounded[-1]

    def latent(self, codes: Tensor) -> Tensor:
        """[..., M] codes -> [..., latent] what the decoder receives for them."""
        rounded = [grid.rounded(codes[..., level]) for level, grid in enumerate(self.grids)]
        if self.mode == "group":
            return torch.cat([grid.values(part) for grid, part in zip(self.grids, rounded, strict=True)], dim=-1)
        total, finer = torch.zeros_like(rounded[0]), torch.ones_like(rounded[0])
        for grid, part in zip(self.grids, rounded, strict=True):
            total = total + grid.even_values(part) / finer
            finer = finer * (grid.steps - 1)
        return total


@dataclass
class FSQ(ItemTokenizer):
    """Finite scalar quantisation of item features; see the module.

    Args:
        levels: M, number of levels.
        shape: Steps per dimension of a level: one shape for all levels, or one for each. (8, 6, 5) is 240 codes.
        mode: "group" (each level has dimensions of its own) or "residual" (each level refines the one before).
        collisions: What happens to items with one code, see `CollisionPolicy`.
        hidden: Widths of the encoder; the decoder mirrors them.
        epochs: Passes over the catalogue.
        batch_size: Items per step.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
    """

    levels: int = 3
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...] = (8, 6, 5)
    mode: Mode = "group"
    collisions: CollisionPolicy = "nearest_free"
    hidden: tuple[int, ...] = (256, 128)
    epochs: int = 100
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        self.hidden = tuple(self.hidden)
        self.shape = tuple(tuple(part) if isinstance(part, (list, tuple)) else part for part in self.shape)  # type: ignore[assignment]
        for name in ("levels", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"item_tokenizer.{name}: found {getattr(self, name)}, expected at least 1")
        for name, known in (("mode", get_args(Mode)), ("collisions", get_args(CollisionPolicy))):
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"item_tokenizer.{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        nested = [isinstance(part, tuple) for part in self.shape]
        if not nested or any(nested) != all(nested) or len(self.shapes) != self.levels or not all(self.shapes):
            raise RecipeError(
                f"item_tokenizer.shape: found {self.shape!r}, expected steps per dimension such as [8, 6, 5], "
                f"or one such list for each of {self.levels} levels"
            )
        if not all(2 <= steps <= MOST_STEPS for shape in self.shapes for steps in shape):
            raise RecipeError(f"item_tokenizer.shape: found {self.shape!r}, expected from 2 to {MOST_STEPS} steps each")
        if self.mode == "residual" and len({len(shape) for shape in self.shapes}) > 1:
            raise RecipeError(
                f"item_tokenizer.shape: found {self.shape!r}, expected as many dimensions per level (mode: residual)"
            )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """(M,) the shape of each level."""
        if isinstance(self.shape[0], tuple):
            return self.shape  # type: ignore[return-value]
        return (self.shape,) * self.levels  # type: ignore[return-value]

    @property
    def network(self) -> FSQNetwork:
        """The fitted network, ready to read."""
        with autoencoder.seeded(0):  # drawn and overwritten: the global generator must not notice
            network = FSQNetwork(len(self.center), self.shapes, self.mode, self.hidden)
        prefix = "network."
        network.load_state_dict({n.removeprefix(prefix): v for n, v in vars(self).items() if n.startswith(prefix)})
        return network.eval()

    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        """Train encoder and decoder, then code all items."""
        center, scale = fused_statistics(items)
        power = float(np.square(fused(items, center, scale), dtype=np.float64).mean())
        scale = scale / math.sqrt(power) if power else scale
        self.center, self.scale = torch.from_numpy(center), torch.from_numpy(scale)
        values = torch.from_numpy(fused(items, center, scale))
        with autoencoder.seeded(seed):
            network = FSQNetwork(values.shape[1], self.shapes, self.mode, self.hidden)
        losses = autoencoder.fit(
            network,
            len(values),
            lambda rows: nn.functional.mse_loss(network(values[rows]), values[rows]),
            epochs=self.epochs,
            batch_size=min(self.batch_size, len(values)),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            generator=torch.Generator().manual_seed(seed % 2**63),
        )
        for name, value in network.state_dict().items():
            setattr(self, f"network.{name}", value.detach().clone())
        codes, last, left = self._coded(values)
        return self._settle(
            codes,
            tuple(math.prod(shape) for shape in self.shapes),
            self.collisions,
            costs=lambda rows: self._last_costs(last[rows]),
            seed=seed,
            reconstruction=left,
            details={"first_loss": losses[0], "last_loss": losses[-1]},
        )

    def add(self, items: ItemFeatures) -> None:
        """Code the items beyond the catalogue with the network as it is.

        Raises:
            DataError: The levels have other widths than those of the fit, or items are missing.
        """
        old = len(self.codes) - 1
        found = [(values.shape[1], len(values) - 1) for values, _ in items.values()]
        if sum(width for width, _ in found) != len(self.center) or min(rows for _, rows in found) < old:
            raise DataError(
                "these features do not extend the catalogue of the tokenizer",
                found=f"{len(found)} levels, {sum(w for w, _ in found)} dimensions, {min(n for _, n in found)} items",
                expected=f"{len(self.center)} dimensions and at least {old} items",
                remedy="give the levels of the fit, in their order, for old and new items",
            )
        # Row 0 of features is padding; here the last old item stands in its place.
        beyond = {name: (values[old:], mask[old:]) for name, (values, mask) in items.items()}
        values = torch.from_numpy(fused(beyond, self.center.numpy(), self.scale.numpy()))
        if len(values):
            codes, last, _ = self._coded(values)
            self._append(codes, self.collisions, costs=lambda rows: self._last_costs(last[rows]))

    def _arrays(self) -> dict[str, Tensor]:
        named = {name: value for name, value in vars(self).items() if name.startswith("network.")}
        return {"center": self.center, "scale": self.scale, **named}

    @torch.no_grad()
    def _coded(self, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """[n, d] -> (codes [n, M], last level before rounding, mean squared error)."""
        network, codes, last, error = self.network, [], [], 0.0
        for rows in values.split(8192):
            latent, code, bounded = network.quantize(rows)
            codes.append(code)
            last.append(bounded)
            error += float((network.decoder(latent) - rows).double().square().sum())
        return torch.cat(codes), torch.cat(last), error / values.numel()

    def _last_costs(self, bounded: Tensor) -> Tensor:
        """[n, dims] before rounding -> [n, W] squared distance to every point of the last grid, in its values."""
        grid = Grid(self.shapes[-1])
        values = grid.values if self.mode == "group" else grid.even_values
        return distances(values(bounded), values(grid.rounded(torch.arange(grid.size))))
