"""Prefix trie of a catalogue's codes as three flat arrays, so that a step of decoding is a gather, not a loop.

Users: `blocks.beam_search`, `item_tokenizers.base`, `heads.tiger`, `heads.cobra`, `llm.constrained`.

Nodes are numbered level by level, siblings side by side in the order of their codes: node 0 is the root, the children
of node n are the nodes first_child[n] .. first_child[n + 1] - 1, and `code[n]` leads from its parent to n. A leaf owns
the items `leaf_items[leaf_start[l]:leaf_start[l + 1]]`, l counted from the first leaf. Memory is O(items x levels), a
step costs O(rows x widest node), whatever the size of the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixTrie:
    """See the module; make one with `build`.

    Args:
        first_child: [nodes + 1] int64; leaves have no children.
        code: [nodes] int64; -1 at the root.
        leaf_start: [leaves + 1] int64.
        leaf_items: [I] int64 item ids.
        widths: The largest number of children at each level, from the root.
        level_sizes: Codes per level, the alphabet of each step.
    """

    first_child: Tensor
    code: Tensor
    leaf_start: Tensor
    leaf_items: Tensor
    widths: tuple[int, ...]
    level_sizes: tuple[int, ...]

    @classmethod
    def build(cls, codes: Tensor, level_sizes: tuple[int, ...], priority: Tensor | None = None) -> PrefixTrie:
        """The trie of codes [I+1, M] (row 0 is padding), by one sort per level.

        Args:
            codes: Codes of the catalogue.
            level_sizes: Codes per level.
            priority: [I+1], order of items that share a code, greatest first (popularity); by id where equal.

        Raises:
            ValueError: There is no item, or a code lies outside its level.
        """
        table = codes[1:]
        sizes = torch.tensor(level_sizes, device=codes.device)
        if not len(table):
            raise ValueError("a trie needs at least one item")
        if bool((table < 0).any()) or bool((table >= sizes).any()):
            raise ValueError(f"a code lies outside its level; level sizes are {level_sizes}")
        order = torch.arange(len(table), device=codes.device)
        if priority is not None:
            order = priority[1:].to(codes.device).argsort(descending=True, stable=True)
        for column in reversed(range(table.shape[1])):  # least significant level first, each pass stable
            order = order[table[order, column].argsort(stable=True)]
        ordered = table[order]
        new = torch.zeros(len(table), dtype=torch.bool, device=codes.device)  # where a node begins, at this level
        new[0] = True
        starts, code, counts = [torch.zeros(1, dtype=torch.long, device=codes.device)], [torch.tensor([-1])], []
        for level in range(table.shape[1]):
            new = new.clone()
            new[1:] |= ordered[1:, level] != ordered[:-1, level]
            begin = new.nonzero().flatten()
            parents = torch.searchsorted(starts[-1], begin, right=True) - 1
            counts.append(torch.bincount(parents, minlength=len(starts[-1])))
            starts.append(begin)
            code.append(ordered[begin, level].cpu())
        children = torch.cat([*counts, torch.zeros(len(starts[-1]), dtype=torch.long, device=codes.device)])
        first = torch.cat([children.new_ones(1), 1 + children.cumsum(0)])
        leaf_start = torch.cat([starts[-1], starts[-1].new_tensor([len(table)])])
        return cls(
            first, torch.cat(code).to(codes.device), leaf_start, order + 1, tuple(int(c.max()) for c in counts),
            tuple(level_sizes),
        )  # fmt: skip

    @property
    def depth(self) -> int:
        """M, levels of a code."""
        return len(self.widths)

    @property
    def num_leaves(self) -> int:
        """Distinct codes of the catalogue."""
        return len(self.leaf_start) - 1

    @property
    def first_leaf(self) -> int:
        """Number of the first leaf node."""
        return len(self.code) - self.num_leaves

    def to(self, device: torch.device | str) -> PrefixTrie:
        """The trie on a device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in parts.items()}
        return PrefixTrie(**moved)

    def children(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """What may follow: nodes [...] of a level -> (child nodes, their codes, which are real), each [..., width].

        Places that are not real hold some child of another node and code 0. Negative nodes have no children.
        """
        start = self.first_child[nodes.clamp(min=0)]
        end = self.first_child[nodes.clamp(min=0) + 1]
        found = start[..., None] + torch.arange(self.widths[level], device=nodes.device)
        real = (found < end[..., None]) & (nodes >= 0)[..., None]
        found = found.clamp(max=len(self.code) - 1)
        return found, self.code[found].masked_fill(~real, 0), real

    def allowed(self, nodes: Tensor, level: int) -> Tensor:
        """[...] nodes -> [..., W] bool over the alphabet of the level: the codes that may follow."""
        _, codes, real = self.children(nodes, level)
        mask = torch.zeros(*nodes.shape, self.level_sizes[level] + 1, dtype=torch.bool, device=nodes.device)
        mask.scatter_(-1, codes.masked_fill(~real, self.level_sizes[level]), True)
        return mask[..., :-1]

    def follow(self, nodes: Tensor, codes: Tensor, level: int) -> Tensor:
        """The child a code leads to: nodes [...], codes [...] -> nodes [...], -1 where there is none."""
        found, known, real = self.children(nodes, level)
        hit = real & (known == codes[..., None])
        place = hit.long().argmax(-1, keepdim=True)
        return torch.where(hit.any(-1), found.gather(-1, place).squeeze(-1), -1)

    def find(self, codes: Tensor) -> Tensor:
        """[..., m] prefixes of m levels -> [...] nodes, -1 where no item begins so."""
        nodes = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        for level in range(codes.shape[-1]):
            nodes = self.follow(nodes, codes[..., level], level)
        return nodes

    def items(self, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Leaf nodes [...] -> (item ids, which are real), each [..., most items of one leaf]; nothing for node -1."""
        index = (leaves - self.first_leaf).clamp(min=0)
        start, end = self.leaf_start[index], self.leaf_start[index + 1]
        widest = int((self.leaf_start[1:] - self.leaf_start[:-1]).max())
        place = start[..., None] + torch.arange(widest, device=leaves.device)
        real = (place < end[..., None]) & (leaves >= self.first_leaf)[..., None]
        return self.leaf_items[place.clamp(max=len(self.leaf_items) - 1)].masked_fill(~real, 0), real
