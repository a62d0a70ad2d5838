"""RQ-VAE: semantic ids from a residual-quantised autoencoder, the item codes of TIGER (NeurIPS 2023).

    z = Enc(x);  r_1 = z;   s_h = argmin_j ||r_h - C_h[j]||^2;   q_h = C_h[s_h];   r_{h+1} = r_h - sg(q_h)
    x^ = Dec(z + sg(sum_h q_h - z))
    L = ||x^ - x||^2 + sum_h ( ||sg(r_h) - q_h||^2 + beta ||r_h - sg(q_h)||^2 )

The paper's: the loss, three levels of 256 codes, hidden sizes 512, 256, 128, latent width 32, beta 0.25. Options of its
successors: last codes evened out by Sinkhorn while training (`sinkhorn`, LC-Rec, ICDE 2024), the residual that keeps
the gradient of later levels from the encoder (`residual_grad: first_level`), means instead of sums in the loss
(`reduction: mean`, both), and LETTER's two regularisers (CIKM 2024): `alignment` of the quantised latent with a
collaborative vector of the same width, `diversity` within clusters of codes.

Ours: x is the fused, standardised feature vector of an item; AdamW instead of Adagrad; codebooks start from k-means on
the residuals of the whole catalogue (the paper: of the first batch), and codes nobody uses move to random residuals
until most of the training is over; the best state by reconstruction and collisions is kept; the default of 200 epochs
is for a CPU, published runs take 5,000 to 20,000. LETTER's clusters have no least size here: those of one code give no
loss. Published weights of the two regularisers belong to `reduction: mean`.

Shapes: x [B, d], z, r_h, q_h [B, latent], C_h [W_h, latent].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.blocks.autoencoder import fit, mlp, seeded
from llmrec.blocks.collisions import ITERATIONS, collision_groups, sinkhorn
from llmrec.blocks.quantize import VectorQuantizer, distances
from llmrec.data.schema import ItemFeatures
from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers.base import CollisionPolicy, FitReport, ItemTokenizer, fused, fused_statistics, kmeans
from llmrec.paper import Paper

PAPER = Paper(
    title="Recommender Systems with Generative Retrieval", venue="NeurIPS 2023", url_id="2305.05065", system="TIGER"
)
COLLABORATIVE = "collaborative"
LEAST_USAGE = 0.3
"""Share of a codebook that k-means must leave in use; below it the fit refuses to start."""
RESEED_UNTIL, CHECK_EVERY = 0.8, 10
"""Share of the epochs in which dead codes are moved; epochs between two looks at the whole catalogue."""
_CHUNK = 65_536  # rows that pass through the networks at once outside training
LARGEST_CLUSTER = 60 / 256 * 10
"""Most codes of a LETTER cluster, in means: the published 60 for 256 codes in 10 clusters."""


@dataclass
class RQVAE(ItemTokenizer):
    """Codes of a residual-quantised autoencoder; see the module.

    Args:
        hidden: Widths of the encoder between input and latent; the decoder mirrors them.
        latent: Width of latent and codebooks.
        levels: M, number of levels.
        codebook_size: W, codes per level; one number, or one per level.
        collisions: What happens to items with one code, see `CollisionPolicy`.
        beta: Weight of the commitment loss.
        residual_grad: "full": the commitment of every level reaches the encoder; "first_level": that of the first.
        reduction: "sum" over dimensions and levels (TIGER), or "mean" (LC-Rec, LETTER).
        sinkhorn: Epsilon of the last level's assignment while training; 0 is the nearest code, LC-Rec takes 0.003.
        alignment: LETTER's alpha (published: 0.01 to 0.02). Above 0 the level "collaborative" must have width
            `latent` and is no part of the input.
        diversity: LETTER's weight of the diversity loss (published: 1e-4).
        clusters: Clusters of codes per level, for `diversity`.
        epochs: Passes over the catalogue, at most; 200 suits a CPU, thousands a GPU.
        patience: Epochs without a better state before training stops; 0 never stops early.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        batch_size: Items of a step.
        dead_codes_every: Epochs between moves of unused codes, in the first 80% of the training; 0 moves none.
    """

    hidden: tuple[int, ...] = (512, 256, 128)
    latent: int = 32
    levels: int = 3
    codebook_size: int | tuple[int, ...] = 256
    collisions: CollisionPolicy = "nearest_free"
    beta: float = 0.25
    residual_grad: Literal["full", "first_level"] = "full"
    reduction: Literal["sum", "mean"] = "sum"
    sinkhorn: float = 0.0
    alignment: float = 0.0
    diversity: float = 0.0
    clusters: int = 10
    epochs: int = 200
    patience: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 2048
    dead_codes_every: int = 50

    def __post_init__(self) -> None:
        self.hidden = tuple(self.hidden)
        if isinstance(self.codebook_size, list):
            self.codebook_size = tuple(self.codebook_size)
        for name in ("latent", "levels", "clusters", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"item_tokenizer.{name}: found {getattr(self, name)}, expected at least 1")
        for name in (
            "beta", "sinkhorn", "alignment", "diversity", "epochs", "patience", "weight_decay", "dead_codes_every",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise RecipeError(f"item_tokenizer.{name}: found {getattr(self, name)}, expected at least 0")
        if self.learning_rate <= 0:
            raise RecipeError(f"item_tokenizer.learning_rate: found {self.learning_rate}, expected a number above 0")
        if min(self.hidden, default=1) < 1:
            raise RecipeError(f"item_tokenizer.hidden: found {list(self.hidden)}, expected positive widths")
        if len(self.sizes) != self.levels or min(self.sizes) < 1:
            raise RecipeError(
                f"item_tokenizer.codebook_size: found {self.codebook_size!r}, expected a positive number, "
                f"or one for each of {self.levels} levels"
            )
        choices = {"residual_grad": ("full", "first_level"), "reduction": ("sum", "mean")}
        for name, known in {"collisions": get_args(CollisionPolicy), **choices}.items():
            if getattr(self, name) not in known:
                found, expected = getattr(self, name), ", ".join(known)
                raise RecipeError(f"item_tokenizer.{name}: found {found!r}, expected one of {expected}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """(M,) codes per level as asked for, without the level that policy append adds."""
        return self.codebook_size if isinstance(self.codebook_size, tuple) else (self.codebook_size,) * self.levels

    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        """Train the autoencoder on the catalogue, then code it.

        Raises:
            DataError: There is no input level, the collaborative level does not fit `alignment`, k-means uses too
                little of a codebook, or `collisions` cannot give every item a code of its own.
        """
        levels, target = self._inputs(items)
        center, scale = fused_statistics(levels)
        self.center, self.scale = torch.from_numpy(center), torch.from_numpy(scale)
        x = torch.from_numpy(fused(levels, center, scale))
        generator = torch.Generator().manual_seed(seed)
        with seeded(seed):
            model = ResidualAutoencoder(x.shape[1], self.hidden, self.latent, self.sizes, self.residual_grad)
            initialise(model, x, seed)
            epochs = self._train(model, x, target, generator, seed)
        error = model.measure(x)[0]
        for name, value in model.encoder.state_dict().items():
            setattr(self, f"encoder_{name.replace('.', '_')}", value.clone())
        for level, quantizer in enumerate(model.quantizers, start=1):
            setattr(self, f"codebook_{level}", quantizer.codebook.detach().clone())
        raw, costs = self._assign(x)
        power = float(x.square().mean())
        details = {"epochs": float(epochs), "unexplained": error / power if power else 0.0}
        return self._settle(
            raw, self.sizes, self.collisions, costs=costs, seed=seed, reconstruction=error, details=details
        )

    def add(self, items: ItemFeatures) -> None:
        """Code the items beyond the catalogue with encoder and codebooks as they are.

        Raises:
            DataError: The levels have other widths than those of the fit, or items are missing.
        """
        levels, _ = self._inputs(items)
        old = len(self.codes) - 1
        width = sum(values.shape[1] for values, _ in levels.values())
        rows = min((len(values) - 1 for values, _ in levels.values()), default=0)
        if width != len(self.center) or rows < old:
            raise DataError(
                "these features do not extend the catalogue of the tokenizer",
                found=f"levels {sorted(levels)} of {width} dimensions, {rows} items",
                expected=f"{len(self.center)} dimensions and at least {old} items",
                remedy="give the levels of the fit, for old and new items",
            )
        if rows == old:
            return
        # Row 0 of features is padding; here the last old item stands in its place.
        beyond = {name: (values[old:], mask[old:]) for name, (values, mask) in levels.items()}
        raw, costs = self._assign(torch.from_numpy(fused(beyond, self.center.numpy(), self.scale.numpy())))
        self._append(raw, self.collisions, costs=costs)

    def _inputs(self, items: ItemFeatures) -> tuple[ItemFeatures, tuple[Tensor, Tensor] | None]:
        """(input levels by name, (collaborative vectors [I, latent], mask [I]) or None without alignment)."""
        levels = {name: items[name] for name in sorted(items)}
        if not self.alignment:
            return levels, None
        if COLLABORATIVE not in levels or levels[COLLABORATIVE][0].shape[1] != self.latent:
            found = {name: values.shape[1] for name, (values, _) in levels.items()}
            raise DataError(
                "alignment needs a collaborative vector per item",
                found=f"levels and widths {found}",
                expected=f"a level {COLLABORATIVE!r} of width {self.latent}, as item_tokenizer.latent",
                remedy=f"add the level {COLLABORATIVE!r}, or set item_tokenizer.alignment: 0",
            )
        values, mask = levels.pop(COLLABORATIVE)
        vectors = np.where(mask[1:, None], values[1:], 0.0).astype(np.float32)
        return levels, (torch.from_numpy(vectors), torch.from_numpy(mask[1:].copy()))

    def _train(
        self,
        model: ResidualAutoencoder,
        x: Tensor,
        target: tuple[Tensor, Tensor] | None,
        generator: torch.Generator,
        seed: int,
    ) -> int:
        """Minimise the loss and leave the best state in the model; the number of epochs that were run."""
        # The losses of LETTER have random numbers of their own, so that weight 0 trains exactly as without them.
        draws = torch.Generator().manual_seed(seed + 1)
        clusters = [torch.zeros(size, dtype=torch.long) for size in self.sizes]
        watch = _Watch(model, x, self.patience)

        def regroup() -> None:
            for level, quantizer in enumerate(model.quantizers):
                clusters[level] = cluster_codes(quantizer.codebook.detach(), self.clusters, seed + level)

        def loss(index: Tensor) -> Tensor:
            batch = x[index]
            found = model.quantise(model.encoder(batch), self.sinkhorn)
            total = self._quantisation(model, batch, found)
            if self.diversity:
                parts = [
                    diversity_loss(codes, quantizer.codebook, groups, draws)
                    for codes, quantizer, groups in zip(found.codes.T, model.quantizers, clusters, strict=True)
                ]
                total = total + self.diversity * self._over_levels(torch.stack(parts))
            if target is not None:
                there = target[1][index]
                total = total + self.alignment * alignment_loss(found.through[there], target[0][index][there])
            return total

        def on_epoch(epoch: int) -> bool:
            if self.diversity:
                regroup()
            last = epoch == self.epochs
            moving = self.dead_codes_every and epoch <= RESEED_UNTIL * self.epochs
            stop = (last or epoch % CHECK_EVERY == 0) and watch.look(epoch)
            if moving and epoch % self.dead_codes_every == 0 and not stop:
                revive(model, x, generator)
            return bool(stop)

        if self.diversity:
            regroup()
        means = fit(
            model, len(x), loss, epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay, generator=generator, on_epoch=on_epoch, progress="rqvae",
        )  # fmt: skip
        watch.restore()
        return len(means)

    def _over_levels(self, values: Tensor) -> Tensor:
        return values.sum() if self.reduction == "sum" else values.mean()

    def _quantisation(self, model: ResidualAutoencoder, batch: Tensor, found: Residuals) -> Tensor:
        """The published loss of a batch: reconstruction, codebooks, commitment."""

        def square(difference: Tensor) -> Tensor:
            squares = difference.square()
            return squares.sum(-1).mean() if self.reduction == "sum" else squares.mean()

        levels = [
            square(residual.detach() - vectors) + self.beta * square(residual - vectors.detach())
            for residual, vectors in zip(found.residuals, found.vectors, strict=True)
        ]
        return square(model.decoder(found.through) - batch) + self._over_levels(torch.stack(levels))

    def _assign(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(codes [n, M] by the nearest code, function rows [k] -> distances to the last codebook [k, W])."""
        with torch.device("meta"):  # draws no random numbers
            model = ResidualAutoencoder(x.shape[1], self.hidden, self.latent, self.sizes, decoder=False)
        names = {name: f"encoder_{name.replace('.', '_')}" for name in model.encoder.state_dict()}
        weights = {f"encoder.{name}": getattr(self, attribute) for name, attribute in names.items()}
        weights |= {f"codebooks.{level - 1}.codebook": self.codebook(level) for level in range(1, self.levels + 1)}
        model.load_state_dict(weights, assign=True)
        # Equal items once: a product rounds by place in the batch, which must not tell them apart.
        distinct, twin = torch.unique(x, dim=0, return_inverse=True)
        found = model.quantise(model.latents(distinct))
        last = found.residuals[-1]
        return found.codes[twin], lambda rows: distances(last[twin[rows]], self.codebook(self.levels))

    def codebook(self, level: int) -> Tensor:
        """[W, latent] of a level from 1, after fitting."""
        found: Tensor = getattr(self, f"codebook_{level}")
        return found

    def _arrays(self) -> dict[str, Tensor]:
        names = ["center", "scale", *(f"codebook_{level}" for level in range(1, self.levels + 1))]
        names += [f"encoder_{2 * layer}_{part}" for layer in range(len(self.hidden) + 1) for part in ("weight", "bias")]
        return {name: getattr(self, name) for name in names}


@dataclass
class Residuals:
    """What residual quantisation finds in latents [B, latent].

    Args:
        codes: [B, M] int64.
        residuals: M tensors [B, latent], what each level sees.
        vectors: M tensors [B, latent], the codebook rows; gradient goes to the codebooks.
        through: [B, latent], sum of the vectors; gradient goes to the latents.
    """

    codes: Tensor
    residuals: list[Tensor]
    vectors: list[Tensor]
    through: Tensor


class ResidualAutoencoder(nn.Module):
    """Encoder, codebooks and decoder.

    Args:
        width: d of the input.
        hidden, latent, sizes: See `RQVAE`.
        residual_grad: See `RQVAE`.
        decoder: False where only codes are wanted.
    """

    def __init__(
        self,
        width: int,
        hidden: tuple[int, ...],
        latent: int,
        sizes: tuple[int, ...],
        residual_grad: str = "full",
        decoder: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = mlp((width, *hidden, latent))
        self.decoder = mlp((latent, *reversed(hidden), width)) if decoder else nn.Identity()
        self.codebooks = nn.ModuleList(VectorQuantizer(size, latent) for size in sizes)
        self.first_level_only = residual_grad == "first_level"

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """The levels' quantisers, first level first."""
        return [module for module in self.codebooks if isinstance(module, VectorQuantizer)]

    def quantise(self, z: Tensor, epsilon: float = 0.0) -> Residuals:
        """Codes level by level: z [B, latent]; epsilon above 0 assigns the last level by Sinkhorn."""
        rest, codes, residuals, vectors = z, [], [], []
        for level, quantizer in enumerate(self.quantizers, start=1):
            given = None
            if epsilon > 0 and level == len(self.codebooks) and len(z) > 1:  # transport of one row says nothing
                given = sinkhorn(distances(rest.detach(), quantizer.codebook.detach()), epsilon, ITERATIONS)
            found = quantizer(rest, given)
            codes.append(found.codes)
            residuals.append(rest)
            vectors.append(found.vectors)
            rest = rest - found.vectors.detach()
            if self.first_level_only:  # subtracting the straight-through value, as LC-Rec does, leaves no gradient
                rest = rest.detach()
        total = torch.stack(vectors).sum(0)
        return Residuals(torch.stack(codes, dim=1), residuals, vectors, z + (total - z).detach())

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        """x [N, d] of any length -> [N, latent]."""
        return torch.cat([self.encoder(part) for part in x.split(_CHUNK)])

    @torch.no_grad()
    def measure(self, x: Tensor) -> tuple[float, Tensor]:
        """(mean squared error of the reconstruction of x [N, d], codes [N, M] by the nearest code)."""
        found = self.quantise(self.latents(x))
        parts = zip(found.through.split(_CHUNK), x.split(_CHUNK), strict=True)
        error = sum(float((self.decoder(latent) - part).square().sum()) for latent, part in parts)
        return error / x.numel(), found.codes


@torch.no_grad()
def initialise(model: ResidualAutoencoder, x: Tensor, seed: int) -> None:
    """Codebooks from k-means on the residuals of the whole catalogue, level by level.

    Raises:
        DataError: Less than 30% of a codebook would be in use although enough different rows are there.
    """
    rest = model.latents(x)
    # Differences below a thousandth of the spread are rounding left over by levels that already code every row.
    grain = float(rest.square().mean().sqrt()) / 1000
    rows = torch.unique(x, dim=0)
    for level, quantizer in enumerate(model.quantizers, start=1):
        size = len(quantizer.codebook)
        centroids, _ = kmeans(rest.numpy(), size, seed=seed + level)
        quantizer.initialise(torch.from_numpy(centroids))
        found = quantizer(rest)
        used = len(torch.unique(found.codes))
        if used < LEAST_USAGE * size <= len(rows):
            raise DataError(
                f"level {level} of the codebooks collapsed at the start",
                found=f"{used} of {size} codes in use for {len(rows)} different rows",
                expected=f"at least {LEAST_USAGE:.0%}",
                remedy="look for a few features far larger than the rest, or choose a smaller codebook_size",
            )
        rest = rest - found.vectors
        if level < len(model.quantizers):
            rows = torch.unique((rest / grain).round(), dim=0) if grain else rest[:1]


@torch.no_grad()
def revive(model: ResidualAutoencoder, x: Tensor, generator: torch.Generator) -> int:
    """Move every code that no row uses to the residual of a random row, level by level; how many moved."""
    rest, moved = model.latents(x), 0
    for quantizer in model.quantizers:
        size = len(quantizer.codebook)
        dead = (torch.bincount(quantizer(rest).codes, minlength=size) == 0).nonzero().flatten()
        dead = dead[: len(rest)]
        quantizer.reseed(dead, rest[torch.randperm(len(rest), generator=generator)[: len(dead)]])
        moved += len(dead)
        rest = rest - quantizer(rest).vectors
    return moved


def alignment_loss(through: Tensor, collaborative: Tensor) -> Tensor:
    """LETTER, equation 4: each quantised latent picks its own collaborative vector out of those of the batch.

    Args:
        through: [B, latent] with the gradient of the latent.
        collaborative: [B, latent], neither normalised nor trained.

    Returns:
        Scalar, cross-entropy of the inner products against the diagonal; 0 for fewer than two rows.
    """
    if len(through) < 2:
        return through.sum() * 0.0
    return F.cross_entropy(through @ collaborative.T, torch.arange(len(through), device=through.device))


def diversity_loss(codes: Tensor, codebook: Tensor, clusters: Tensor, generator: torch.Generator) -> Tensor:
    """LETTER, equation 5: the vector of a code is drawn to a random other code of its cluster, which evens out use.

    Args:
        codes: [B] int64.
        codebook: [W, latent]; gets the gradient (the encoder gets none).
        clusters: [W] int64, cluster of each code.
        generator: Of the draws (on the CPU).

    Returns:
        Scalar, mean over the items whose cluster has another code; an item's own code is no candidate.
    """
    same = (clusters[codes][:, None] == clusters) & (torch.arange(len(codebook)) != codes[:, None])
    able = same.any(1)
    if not bool(able.any()):
        return codebook.sum() * 0.0
    codes, same = codes[able], same[able]
    chosen = torch.multinomial(same.float(), 1, generator=generator).squeeze(1)
    logits = (codebook[codes] @ codebook.T).scatter(1, codes[:, None], -torch.inf)
    return F.cross_entropy(logits, chosen)


def cluster_codes(codebook: Tensor, clusters: int, seed: int) -> Tensor:
    """[W] int64: cluster of each code by k-means, none far larger than the others.

    Pairs of code and centroid are taken by ascending distance while the cluster has room.
    """
    size = len(codebook)
    clusters = min(clusters, size)
    room = np.full(clusters, int(np.ceil(LARGEST_CLUSTER * size / clusters)))
    centroids, _ = kmeans(codebook.numpy(), clusters, seed=seed)
    order = distances(codebook, torch.from_numpy(centroids)).flatten().argsort(stable=True).tolist()
    found = np.full(size, -1)
    for pair in order:
        code, cluster = divmod(pair, clusters)
        if found[code] < 0 and room[cluster]:
            found[code] = cluster
            room[cluster] -= 1
    return torch.from_numpy(found)


class _Watch:
    """Looks at the whole catalogue now and then, keeps the best state, and says when to stop."""

    def __init__(self, model: ResidualAutoencoder, x: Tensor, patience: int) -> None:
        self.model, self.x, self.patience = model, x, patience
        self.best, self.since = float("inf"), 0
        self.state: dict[str, Tensor] | None = None

    def look(self, epoch: int) -> bool:
        """Score: unexplained share of the variance plus share of items without a code of their own (ours)."""
        error, codes = self.model.measure(self.x)
        power = float(self.x.square().mean())
        distinct = int(collision_groups(codes)[0].max()) + 1
        score = (error / power if power else error) + 1 - distinct / len(self.x)
        if score < self.best:
            self.best, self.since = score, epoch
            self.state = copy.deepcopy(self.model.state_dict())
        return bool(self.patience) and epoch - self.since >= self.patience

    def restore(self) -> None:
        """Back to the best state that was seen."""
        if self.state is not None:
            self.model.load_state_dict(self.state)
