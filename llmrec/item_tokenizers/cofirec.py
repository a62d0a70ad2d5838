"""CoFiRec: one code per semantic level of an item, from broad to specific, and a collaborative code at the end.

    semantic level k:  h_k = f_sem(e_k);   s_k = argmin_j ||h_k - C_k[j]||^2;   e^_k = g_sem(h_k + sg(C_k[s_k] - h_k))
    last level:        the same with f_cf, g_cf and C_cf of its own on the collaborative vector of the item
    L = sum_k mse(e^_k, e_k) + w_cf mse(cf^, cf) + sum_k [mse(q_k, sg(h_k)) + beta mse(h_k, sg(q_k))]

The paper's: levels category, title, description, collaborative; encoder and decoder shared by the semantic levels;
codebooks not shared; nothing left over from one level to the next (every level is coded by itself).

Ours, where the paper is silent or was not seen: the losses in full, sizes and rates (smaller than LETTER's, for a CPU);
every level standardised per dimension; k-means on distinct rows to start from, surplus codes jittered copies (`spare`),
dead codes moved to current latents; narrower levels padded with zeros to the widest, since f_sem is shared; an item
without description takes its title vector, without title its category vector (`fallback`); an item without
collaborative vector takes the mean of those of its nearest items by text; collisions are repaired on the finest level
alone (`collisions`); `hierarchy: auto`, which replaces the levels of the data by two of a k-means tree and one code of
the whole text.
A level no item has is left out, and `level_names` and the report say so.

Shapes: I items, M levels, W_k codes of level k, d widest text level, n rows; latents [n, latent].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from llmrec.blocks import autoencoder
from llmrec.blocks.collisions import collision_groups
from llmrec.blocks.quantize import Quantized, VectorQuantizer, distances, nearest
from llmrec.data.schema import ItemFeatures
from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers.base import CollisionPolicy, FitReport, ItemTokenizer, kmeans
from llmrec.paper import Paper

if TYPE_CHECKING:
    from typing import Self

PAPER = Paper(
    title="CoFiRec: Coarse-to-Fine Tokenization for Generative Recommendation",
    venue="arXiv 2025",
    url_id="2511.22707",
    system="CoFiRec",
)
SEMANTIC = ("category", "title", "description")
LEVELS = (*SEMANTIC, "cluster_1", "cluster_2", "text", "collaborative", "number")
"""Every level there can be, in the order of coding; `number` is what policy append adds."""
ORDERS = ("coarse_to_fine", "reversed", "random")
JITTER = 1e-3
"""Standard deviation of spare codes around the rows they copy, relative to the mean norm of latents."""
INITIAL_ITERATIONS = 30
"""Lloyd iterations of the codebooks to start from; training moves them on."""
CHUNK = 65_536
CELLS = 2**24
Tree = tuple[Tensor, Tensor, Tensor]


class CoFiRecNetwork(nn.Module):
    """The trained part: f_sem and g_sem of all semantic levels, f_cf and g_cf, one codebook per coded level.

    Args:
        text_width: d.
        cf_width: Width of collaborative vectors; None without that level, which else is the last one.
        sizes: Codes per level.
        hidden: Widths of f_sem, mirrored in g_sem.
        cf_hidden: Widths of f_cf, mirrored in g_cf.
        latent: Width of codebooks.
    """

    def __init__(
        self,
        text_width: int,
        cf_width: int | None,
        sizes: Sequence[int],
        hidden: Sequence[int],
        cf_hidden: Sequence[int],
        latent: int,
    ) -> None:
        super().__init__()
        self.f_sem = autoencoder.mlp((text_width, *hidden, latent))
        self.g_sem = autoencoder.mlp((latent, *reversed(hidden), text_width))
        self.f_cf = self.g_cf = None
        if cf_width is not None:
            self.f_cf = autoencoder.mlp((cf_width, *cf_hidden, latent))
            self.g_cf = autoencoder.mlp((latent, *reversed(cf_hidden), cf_width))
        self.quantizers = nn.ModuleList(VectorQuantizer(size, latent) for size in sizes)

    def codebook(self, level: int) -> Tensor:
        """[W, latent] of a level (from 0; -1 is the last)."""
        quantizer = self.quantizers[level]
        assert isinstance(quantizer, VectorQuantizer)
        return quantizer.codebook

    def encode(self, level: int, values: Tensor) -> Tensor:
        """[n, d] of a level -> h [n, latent]."""
        last = level == len(self.quantizers) - 1
        encoder = self.f_cf if last and self.f_cf is not None else self.f_sem
        found: Tensor = encoder(values)
        return found

    def forward(self, level: int, values: Tensor) -> tuple[Tensor, Quantized, Tensor]:
        """[n, d] of a level -> (h [n, latent], quantised h, reconstruction [n, d])."""
        last = level == len(self.quantizers) - 1
        decoder = self.g_cf if last and self.g_cf is not None else self.g_sem
        h = self.encode(level, values)
        quantized: Quantized = self.quantizers[level](h)
        return h, quantized, decoder(quantized.through)

    def losses(
        self, values: Sequence[Tensor], known: Sequence[Tensor], *, beta: float, cf_weight: float
    ) -> tuple[Tensor, Tensor]:
        """(L_recon, L_commit) of the module docstring, scalars.

        Args:
            values: Per level [n, d].
            known: Per level [n] bool; rows that lack the level do not count there.
            beta: Weight of the commitment of latents to codes.
            cf_weight: w_cf.
        """
        recon, commit = values[0].new_zeros(()), values[0].new_zeros(())
        for level, (rows, mask) in enumerate(zip(values, known, strict=True)):
            h, quantized, rebuilt = self(level, rows)
            weight = cf_weight if self.f_cf is not None and level == len(values) - 1 else 1.0
            recon = recon + weight * masked_mse(rebuilt, rows, mask)
            commit = commit + masked_mse(quantized.vectors, h.detach(), mask)
            commit = commit + beta * masked_mse(h, quantized.vectors.detach(), mask)
        return recon, commit

    @torch.no_grad()
    def initialise(
        self, values: Sequence[Tensor], known: Sequence[Tensor], *, seed: int, generator: torch.Generator
    ) -> Tensor:
        """Codebooks from k-means on the latents of distinct rows weighted by their counts (arguments as `losses`).

        Returns:
            [levels, most codes] bool: codes a level has beyond its distinct rows, jittered copies of them.
        """
        sizes = [len(self.codebook(level)) for level in range(len(values))]
        spare = torch.zeros(len(sizes), max(sizes), dtype=torch.bool)
        for level, (rows, mask, size) in enumerate(zip(values, known, sizes, strict=True)):
            rows, _, counts = distinct(rows[mask])
            h = torch.cat([self.encode(level, chunk) for chunk in rows.split(CHUNK)])
            missing = size - len(h)
            if missing < 0:
                found = kmeans(
                    h.numpy(), size, seed=seed + level, iterations=INITIAL_ITERATIONS, weights=counts.numpy()
                )
                centroids = torch.from_numpy(found[0])
            else:
                copied = h[torch.randint(len(h), (missing,), generator=generator)]
                noise = torch.randn(missing, h.shape[1], generator=generator)
                centroids = torch.cat([h, copied + JITTER * h.norm(dim=1).mean() * noise])
                spare[level, len(h) : size] = True
            self.codebook(level).copy_(centroids)
        return spare

    @torch.no_grad()
    def reseed(
        self, values: Sequence[Tensor], known: Sequence[Tensor], spare: Tensor, generator: torch.Generator
    ) -> int:
        """Move codes without hits, spare ones excepted, to latents of random rows; how many were moved."""
        moved = 0
        for level, (rows, mask) in enumerate(zip(values, known, strict=True)):
            h = torch.cat([self.encode(level, chunk) for chunk in rows[mask].split(CHUNK)])
            book = self.codebook(level)
            hits = torch.bincount(nearest(h, book), minlength=len(book))
            dead = ((hits == 0) & ~spare[level, : len(book)]).nonzero().flatten()
            book[dead] = h[torch.randint(len(h), (len(dead),), generator=generator)]
            moved += len(dead)
        return moved


@dataclass
class CoFiRec(ItemTokenizer):
    """Coarse-to-fine codes, one per level; see the module.

    Args:
        sizes: W, codes per level; one number, or one per level from coarse to fine (`level_names` has them).
        collaborative: Use the collaborative level: yes (required), no, or None: if the data have it.
        fallback: Of an item that lacks a text level: "coarser" takes the vector of the next coarser level (texts must
            come from one model for that to mean something), "mean" the mean of the level, as does an item without any
            coarser level.
        hierarchy: "auto" derives levels from title and description for catalogues without a taxonomy: k-means, k-means
            inside each cluster (each into at most the square root of its distinct texts), and a code of the whole text.
            A category level is not used then, and the report says so.
        order: Order of the codes: "coarse_to_fine", "reversed", "random" (drawn from the seed) or a tuple of level
            names. Codes, sizes and names move together, after coding and after collision repair on the finest level.
        collisions: What happens to items with one code, see `CollisionPolicy`. Only the finest level changes.
        hidden: Widths of f_sem and, mirrored, g_sem. LETTER: 2048, 1024, 512, 256, 128, 64.
        cf_hidden: Widths of f_cf and, mirrored, g_cf.
        latent: Width of latents and codebooks.
        beta: Weight of the commitment of latents to codes.
        cf_weight: w_cf.
        epochs: Passes over the items, at most. LETTER: up to 20000.
        patience: Epochs without a lower loss before training stops; None never stops early.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        batch_size: Items of a step.
        reseed_every: Epochs between moves of dead codes; None never moves any.
        neighbours: Items whose collaborative vectors stand in for a missing one.

    Attributes:
        level_names: (M,) names of the levels in the order of the codes.
        spare: [coded levels, most codes] bool, codes that began as copies.
    """

    sizes: int | tuple[int, ...] = 256
    collaborative: bool | None = None
    fallback: Literal["coarser", "mean"] = "coarser"
    hierarchy: Literal["auto"] | None = None
    order: str | tuple[str, ...] = "coarse_to_fine"
    collisions: CollisionPolicy = "nearest_free"
    hidden: tuple[int, ...] = (512, 256, 128)
    cf_hidden: tuple[int, ...] = (64,)
    latent: int = 32
    beta: float = 0.25
    cf_weight: float = 1.0
    epochs: int = 100
    patience: int | None = 20
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 1024
    reseed_every: int | None = 10
    neighbours: int = 10

    def __post_init__(self) -> None:
        for name in ("sizes", "order", "hidden", "cf_hidden"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        choices = {
            "fallback": ("coarser", "mean"),
            "hierarchy": (None, "auto"),
            "collisions": get_args(CollisionPolicy),
            "collaborative": (None, True, False),
        }
        if isinstance(self.order, str):
            choices["order"] = ORDERS
        for name, known in choices.items():
            if getattr(self, name) not in known:
                shown = ", ".join("null" if value is None else str(value) for value in known)
                raise RecipeError(f"item_tokenizer.{name}: found {getattr(self, name)!r}, expected one of {shown}")
        for name in ("sizes", "hidden", "cf_hidden", "latent", "epochs", "patience", "batch_size", "neighbours"):
            _at_least(name, getattr(self, name), 1)
        _at_least("reseed_every", self.reseed_every, 1)
        for name in ("beta", "cf_weight", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        if not self.learning_rate > 0:
            raise RecipeError(f"item_tokenizer.learning_rate: found {self.learning_rate}, expected more than 0")

    @property
    def level_names(self) -> tuple[str, ...]:
        """(M,) names of the levels of the fit, in the order of the codes."""
        return tuple(LEVELS[number] for number in self.level_ids.tolist())

    @property
    def sources(self) -> tuple[str, ...]:
        """The feature levels that the fit used, from coarse to fine."""
        return tuple(LEVELS[number] for number in self.source_ids.tolist())

    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        """Train the network on the levels there are; codes of all items.

        Raises:
            DataError: No text level, no collaborative level though asked for, or values that are not finite.
            RecipeError: `sizes` or `order` do not fit the levels of the data.
        """
        details = self._declare(items)
        names = self._coded_names()
        sizes = self._level_sizes(names)
        columns = self._columns(names, seed)
        raw, counted = self._raw(items)
        center, deviation = np.nanmean(raw, axis=0, dtype=np.float64), np.nanstd(raw, axis=0, dtype=np.float64)
        scale = np.where(deviation > 1e-9, 1.0 / np.maximum(deviation, 1e-9), 0.0)
        self.center, self.scale = torch.from_numpy(center).float(), torch.from_numpy(scale).float()
        values, known = self._inputs(raw)
        if self.hierarchy:
            self.tree_tops, self.tree_leaves, self.tree_children = grow_tree(values[0], sizes[:2], seed)
        trained = self._train(values, known, sizes[len(names) - len(values) :], seed)
        codes, last = self._assign(values)
        for number, spare in enumerate(self.spare.sum(1).tolist(), start=len(names) - len(values) + 1):
            details[f"spare_{number}"] = float(spare)
        errors = self._errors(values, known, names)
        self.level_ids = torch.tensor([LEVELS.index(name) for name in names])
        self._settle(
            codes,
            sizes,
            self.collisions,
            costs=lambda rows: distances(last[rows], self.network.codebook(-1).detach()),
            seed=seed,
            reconstruction=sum(errors.values()) / len(errors),
            details={**details, **counted, **trained, **errors},
        )
        return self._put_in_order(codes, columns)

    def add(self, items: ItemFeatures) -> None:
        """Code the items beyond the catalogue with the trained network as it is.

        Raises:
            DataError: The levels are not those of the fit, items are missing, or no free code is left.
        """
        old = len(self.codes) - 1
        values, _ = self._inputs(self._raw(items)[0])
        if len(values[0]) < old:
            raise DataError(
                "features of too few items", found=f"{len(values[0])} items", expected=f"at least the {old} of the fit"
            )
        if len(values[0]) == old:
            return
        codes, last = self._assign([rows[old:] for rows in values])
        with self._coding_order():
            self._append(
                codes,
                self.collisions,
                costs=lambda rows: distances(last[rows], self.network.codebook(-1).detach()),
            )

    def assign(self, items: ItemFeatures) -> Tensor:
        """[I, M] codes of items 1..I by the nearest code of each level, in the order of `level_names`, without repair.

        The level that policy append adds is not among them.
        """
        columns = self.level_ids[self.level_ids != LEVELS.index("number")].argsort().argsort()
        return self._assign(self._inputs(self._raw(items)[0])[0])[0][:, columns]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder written by `save_pretrained`; see the base class."""
        tokenizer = super().from_pretrained(folder)
        weights = {name: value for name, value in vars(tokenizer).items() if name.startswith("network.")}
        for name in weights:
            delattr(tokenizer, name)
        state = {name.removeprefix("network."): value for name, value in weights.items()}
        sizes = [len(state[f"quantizers.{level}.codebook"]) for level in range(len(tokenizer.spare))]
        with autoencoder.seeded(0):  # the values are replaced at once
            tokenizer.network = tokenizer._network(sizes)
        tokenizer.network.load_state_dict(state)
        tokenizer.network.eval()
        return tokenizer

    def _arrays(self) -> dict[str, Tensor]:
        names = ["level_ids", "source_ids", "source_widths", "center", "scale", "spare"]
        if self.hierarchy:
            names += ["tree_tops", "tree_leaves", "tree_children"]
        found = {name: getattr(self, name) for name in names}
        return found | {f"network.{name}": value for name, value in self.network.state_dict().items()}

    def _declare(self, items: ItemFeatures) -> dict[str, float]:
        """Decide which levels are used; sets `source_ids` and `source_widths`, returns what the report says."""
        present = [name for name in (*SEMANTIC, "collaborative") if name in items and items[name][1][1:].any()]
        details = {f"declared_{name}": float(name in present) for name in (*SEMANTIC, "collaborative")}
        allowed = SEMANTIC[1:] if self.hierarchy else SEMANTIC
        if self.hierarchy:
            details["unused_category"] = float("category" in present)
        sources = [name for name in present if name in allowed]
        if not sources:
            raise DataError(
                "no text level to tokenise",
                found=f"levels with at least one item: {', '.join(present) or 'none'}",
                expected=f"at least one of {', '.join(allowed)}",
                remedy="build text features of the items first",
            )
        if self.collaborative and "collaborative" not in present:
            raise DataError(
                "item_tokenizer.collaborative is true, and the data have no such level",
                found=f"levels with at least one item: {', '.join(present)}",
                remedy="build collaborative features from the training part, or leave the option out",
            )
        if "collaborative" in present and self.collaborative is not False:
            sources.append("collaborative")
        self.source_ids = torch.tensor([LEVELS.index(name) for name in sources])
        self.source_widths = torch.tensor([items[name][0].shape[1] for name in sources])
        return details

    def _coded_names(self) -> list[str]:
        """Names of the levels in the order of coding."""
        text = [name for name in self.sources if name in SEMANTIC]
        return [*(("cluster_1", "cluster_2", "text") if self.hierarchy else text), *self.sources[len(text) :]]

    def _level_sizes(self, names: Sequence[str]) -> tuple[int, ...]:
        sizes = self.sizes if isinstance(self.sizes, tuple) else (self.sizes,) * len(names)
        if len(sizes) != len(names):
            raise RecipeError(
                f"item_tokenizer.sizes: found {list(sizes)}, expected one number, or one for each of the "
                f"{len(names)} levels of the data ({', '.join(names)})"
            )
        return sizes

    def _columns(self, names: Sequence[str], seed: int) -> list[int]:
        """Places of the levels, coded in the order of `names`, in the order asked for."""
        if isinstance(self.order, tuple):
            if sorted(self.order) != sorted(names):
                raise RecipeError(
                    f"item_tokenizer.order: found {list(self.order)}, expected {', '.join(ORDERS)}, "
                    f"or the levels of the data in some order ({', '.join(names)})"
                )
            return [list(names).index(name) for name in self.order]
        columns = list(range(len(names)))
        if self.order == "random":
            return [int(place) for place in np.random.default_rng(seed).permutation(columns)]
        return columns[::-1] if self.order == "reversed" else columns

    def _raw(self, items: ItemFeatures) -> tuple[np.ndarray, dict[str, float]]:
        """([I, text levels * d + cf width] with NaN for what an item lacks, figures for the report)."""
        widths = dict(zip(self.sources, self.source_widths.tolist(), strict=True))
        found = {name: items[name][0].shape[1] for name in widths if name in items}
        if found != widths:
            raise DataError("the features are not those of the fit", found=repr(found), expected=repr(widths))
        widest = max(width for name, width in widths.items() if name in SEMANTIC)
        parts: list[np.ndarray] = []
        figures: dict[str, float] = {}
        for name, width in widths.items():
            values, mask = items[name][0][1:], items[name][1][1:]
            if not np.isfinite(values[mask]).all():
                raise DataError(f"level {name} has values that are not finite", remedy="mask items without a vector")
            part = np.full((len(mask), widest if name in SEMANTIC else width), np.nan, dtype=np.float32)
            part[mask] = 0.0  # what pads a narrower level
            part[mask, :width] = values[mask]
            if name == "collaborative":
                figures["without_collaborative"] = float((~mask).sum())
            else:
                if parts and self.fallback == "coarser":
                    part[~mask] = parts[-1][~mask]
                unknown = np.isnan(part[:, 0])
                figures[f"fallback_{name}"] = float((~mask & ~unknown).sum())
                figures[f"unknown_{name}"] = float(unknown.sum())
            parts.append(part)
        return np.concatenate(parts, axis=1), figures

    def _inputs(self, raw: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
        """What the coded levels see: (standardised values [I, d], known [I] bool), one each per level."""
        widths = self.source_widths
        semantic = sum(name in SEMANTIC for name in self.sources)
        split = [int(widths[:semantic].max())] * semantic + widths[semantic:].tolist()
        standard = np.nan_to_num((raw - self.center.numpy()) * self.scale.numpy())
        parts = list(torch.from_numpy(standard).split(split, dim=1))
        starts = np.cumsum([0, *split[:-1]])
        known = [torch.from_numpy(~np.isnan(raw[:, start])) for start in starts]
        whole = torch.cat(parts[:semantic], dim=1)
        if len(parts) > semantic:
            parts[-1] = from_neighbours(whole, parts[-1], known[-1], self.neighbours)
        if self.hierarchy:
            parts[:semantic] = [whole]
            known[:semantic] = [torch.stack(known[:semantic]).any(0)]
        return [part.contiguous() for part in parts], known

    def _network(self, sizes: Sequence[int]) -> CoFiRecNetwork:
        widths = dict(zip(self.sources, self.source_widths.tolist(), strict=True))
        text = [width for name, width in widths.items() if name in SEMANTIC]
        width = max(text) * (len(text) if self.hierarchy else 1)
        return CoFiRecNetwork(width, widths.get("collaborative"), sizes, self.hidden, self.cf_hidden, self.latent)

    def _train(self, values: list[Tensor], known: list[Tensor], sizes: Sequence[int], seed: int) -> dict[str, float]:
        """Sets `network` and `spare`; figures for the report."""
        generator = torch.Generator().manual_seed(seed)
        with autoencoder.seeded(seed):
            network = self.network = self._network(sizes)
        self.spare = network.initialise(values, known, seed=seed, generator=generator)
        running, best, stale, moved = 0.0, float("inf"), 0, 0

        def loss(index: Tensor) -> Tensor:
            nonlocal running
            rows, masks = [part[index] for part in values], [mask[index] for mask in known]
            total = sum(network.losses(rows, masks, beta=self.beta, cf_weight=self.cf_weight))
            assert isinstance(total, Tensor)
            running += float(total.detach()) * len(index)
            return total

        def on_epoch(epoch: int) -> bool:
            nonlocal running, best, stale, moved
            stale = 0 if running < best else stale + 1
            best, running = min(best, running), 0.0
            stop = self.patience is not None and stale >= self.patience
            # Codes moved after the last step would stay where no step has judged them.
            if self.reseed_every and epoch % self.reseed_every == 0 and epoch < self.epochs and not stop:
                moved += network.reseed(values, known, self.spare, generator)
            return stop

        means = autoencoder.fit(
            network,
            len(values[0]),
            loss,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            generator=generator,
            on_epoch=on_epoch,
            progress="cofirec",
        )
        network.eval()
        return {"epochs": float(len(means)), "loss": means[-1], "reseeded": float(moved)}

    @torch.no_grad()
    def _assign(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Per level [n, d] -> (codes [n, M] in the order of coding, latents of the finest level [n, latent]).

        Every distinct row is coded once: rounding that depends on the place in a batch cannot part equal rows.
        """
        columns = []
        if self.hierarchy:
            rows, place, _ = distinct(values[0])
            columns += list(climb((self.tree_tops, self.tree_leaves, self.tree_children), rows)[place].T)
        for level, part in enumerate(values):
            rows, place, _ = distinct(part)
            h = torch.cat([self.network.encode(level, chunk) for chunk in rows.split(CHUNK)])
            columns.append(nearest(h, self.network.codebook(level))[place])
        return torch.stack(columns, dim=1), h[place]

    @torch.no_grad()
    def _errors(self, values: Sequence[Tensor], known: Sequence[Tensor], names: Sequence[str]) -> dict[str, float]:
        """Mean squared reconstruction error per coded level, over the items that have it."""
        found = {}
        for level, (name, rows, mask) in enumerate(zip(names[len(names) - len(values) :], values, known, strict=True)):
            chunks = rows[mask].split(CHUNK)
            total = sum(float((self.network(level, part)[2] - part).double().square().sum()) for part in chunks)
            found[f"reconstruction_{name}"] = total / (int(mask.sum()) * rows.shape[1])
        return found

    def _put_in_order(self, raw: Tensor, columns: list[int]) -> FitReport:
        """Move codes, sizes, names and the figures per level from the order of coding to that of `columns`."""
        assert self.report is not None
        rates = {}
        for depth in range(1, len(columns) + 1):
            group = collision_groups(raw[:, columns[:depth]])[0]
            rates[f"collision_rate_{depth}"] = float((torch.bincount(group)[group] > 1).double().mean())
        if len(self.level_sizes) > len(columns):  # policy append: the number stays last
            self.level_ids = torch.cat([self.level_ids, torch.tensor([LEVELS.index("number")])])
            columns = [*columns, len(columns)]
        self._rearrange(torch.tensor(columns))
        self.level_ids = self.level_ids[columns]
        old = self.report.details
        kinds = ("perplexity", "largest", "spare")
        moved = {
            f"{kind}_{new}": old[f"{kind}_{place + 1}"]
            for kind in kinds
            for new, place in enumerate(columns, start=1)
            if f"{kind}_{place + 1}" in old
        }
        kept = {name: value for name, value in old.items() if name.rpartition("_")[0] not in kinds}
        usage = tuple(self.report.usage[place] for place in columns)
        self.report = replace(self.report, usage=usage, details={**kept, **moved, **rates})
        return self.report

    def _rearrange(self, columns: Tensor) -> None:
        self.codes = self.codes[:, columns].contiguous()
        self.level_sizes = tuple(self.level_sizes[place] for place in columns.tolist())

    @contextmanager
    def _coding_order(self) -> Iterator[None]:
        """Inside, codes and sizes are in the order of coding, the finest level last, as repair needs them."""
        coding = self.level_ids.argsort()
        self._rearrange(coding)
        try:
            yield
        finally:
            self._rearrange(coding.argsort())


def _at_least(name: str, value: float | tuple[int, ...] | None, least: int) -> None:
    """Refuse an option (or a part of it) below `least`; None is left to the option's own meaning."""
    parts = value if isinstance(value, tuple) else (value,)
    if any(part is not None and not part >= least for part in parts):
        raise RecipeError(f"item_tokenizer.{name}: found {value!r}, expected at least {least}")


def masked_mse(found: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of [n, d] over the rows of a mask [n]; 0 where it has none."""
    total: Tensor = ((found - wanted).square().mean(1) * mask).sum() / mask.sum().clamp(min=1)
    return total


def distinct(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, d] -> (distinct rows [m, d], place [n] of each row among them, counts [m])."""
    found, place, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    return found, place, counts


def from_neighbours(text: Tensor, cf: Tensor, known: Tensor, count: int) -> Tensor:
    """Collaborative vectors [n, c] in which rows that lack one have the mean of their nearest known rows by text.

    Args:
        text: [n, D].
        cf: [n, c]; rows that are not known do not matter. They stay as they are if no row is known.
        known: [n] bool.
        count: Neighbours, at most.
    """
    lacking = (~known).nonzero().flatten()
    if not len(lacking) or len(lacking) == len(known):
        return cf
    cf, others, vectors = cf.clone(), text[known], cf[known]
    for rows in lacking.split(max(1, CELLS // len(others))):
        close = distances(text[rows], others).topk(min(count, len(others)), largest=False).indices
        cf[rows] = vectors[close].mean(1)
    return cf


def grow_tree(values: Tensor, sizes: Sequence[int], seed: int) -> Tree:
    """Hierarchical k-means of depth 2 over distinct rows weighted by their counts.

    A node has at most as many children as the square root of its distinct rows, so that both levels say something.

    Args:
        values: [n, D].
        sizes: Most clusters, most children of a cluster.
        seed: Of k-means.

    Returns:
        tops [k1, D], leaves [k1, k2, D] (zeros where a cluster has fewer), children [k1] (at least 1).
    """

    def split(rows: Tensor, counts: Tensor, most: int, offset: int) -> Tensor:
        k = min(most, int(np.ceil(np.sqrt(len(rows)))))
        return torch.from_numpy(kmeans(rows.numpy(), k, seed=seed + offset, weights=counts.numpy())[0])

    rows, _, counts = distinct(values)
    tops = split(rows, counts, sizes[0], 0)
    place = nearest(rows, tops)
    below = []
    for node in range(len(tops)):
        own = place == node
        below.append(split(rows[own], counts[own], sizes[1], node + 1) if own.any() else tops[node : node + 1])
    children = torch.tensor([len(part) for part in below])
    leaves = tops.new_zeros(len(tops), int(children.max()), tops.shape[1])
    for node, part in enumerate(below):
        leaves[node, : len(part)] = part
    return tops, leaves, children


def climb(tree: Tree, values: Tensor) -> Tensor:
    """[n, D] -> codes [n, 2]: the nearest top, and the nearest of its leaves, numbered within it."""
    tops, leaves, children = tree
    codes = torch.stack([nearest(values, tops), torch.zeros(len(values), dtype=torch.long)], dim=1)
    for node in torch.unique(codes[:, 0]).tolist():
        own = codes[:, 0] == node
        codes[own, 1] = nearest(values[own], leaves[node, : int(children[node])])
    return codes
