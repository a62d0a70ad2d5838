"""Several examples in one row of the language model, so that it computes on hardly any padding.

A batch of prompts is as wide as its longest one. `packed_states` lays the examples end to end into fewer rows, with
positions that restart, runs the model, and puts every state back where its token stood. This happens inside the
forward: batches, order of examples, steps, curriculum and gates are those of training without packing, and so is the
loss, rounding and the draws of dropout aside. Each token gets the gate of its own example.

Examples in one row must not see each other. transformers derives that from positions that restart when neither a mask
nor a cache is given: a block-diagonal mask for sdpa, variable-length kernels for flash attention. Whether a model and
its attention back-end do so is not believed but tried, once, before training (`check_isolation`).

It pays when lengths differ: at most B * longest / (sum of lengths), less what attention costs over longer rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import RecipeError
from llmrec.llm.backbone import Backbone, GateArguments

__all__ = ["PackedRows", "arrange", "check_isolation", "pack", "packed_states"]

_ATTENTION_KNEE = 6
"""Row length, in widths of the model, at which attention costs as much as all linear layers of a decoder."""


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of a padded batch stand in packed rows; all int64. Filling cells point at 0.

    Args:
        source: [N, R] place of each cell's token in the batch, counted over [B * S].
        owner: [N, R] row of the batch each cell's token belongs to.
        positions: [N, R], from 0 in each example; the filling behind the last one counts as an example.
        cell: [B, S] place of each token in the packed rows, counted over [N * R].
    """

    source: Tensor
    owner: Tensor
    positions: Tensor
    cell: Tensor


def packed_states(backbone: Backbone, inputs_embeds: Tensor, attention_mask: Tensor, gates: GateArguments) -> Tensor:
    """Final hidden states of a padded batch, computed on packed rows.

    Args:
        backbone: The language model.
        inputs_embeds: [B, S, d_llm].
        attention_mask: [B, S], ones without holes, on either side.
        gates: One per sequence, as for `Backbone.forward`.

    Returns:
        [B, S, d_llm]; places of padding hold no meaning.
    """
    rows = pack(attention_mask, backbone.width, single_row=_flattens(backbone))
    weights = backbone.finished_gates(gates)
    spread = {} if weights is None else {"gates": weights[rows.owner]}
    packed = inputs_embeds.flatten(0, 1)[rows.source]
    hidden = backbone(packed, None, spread, position_ids=rows.positions).last_hidden_state
    return hidden.flatten(0, 1)[rows.cell]


def pack(attention_mask: Tensor, width: int, *, single_row: bool = False) -> PackedRows:
    """Lay the examples of a padded batch into rows; see `arrange`.

    Args:
        attention_mask: [B, S], ones without holes, on either side.
        width: d_llm, which decides how long a row may get before attention costs more than padding.
        single_row: Everything in one row, for kernels that skip what lies outside an example.
    """
    count, longest = attention_mask.shape
    lengths = attention_mask.sum(1).tolist()
    starts = attention_mask.argmax(1).tolist()
    members = [list(range(count))] if single_row else arrange(lengths, _ATTENTION_KNEE * width)
    shape = (len(members), max(sum(lengths[b] for b in row) for row in members))
    source, owner, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    cell = np.zeros((count, longest), dtype=np.int64)
    for number, row in enumerate(members):
        at = 0
        for b in row:
            steps = np.arange(lengths[b])
            source[number, at + steps] = b * longest + starts[b] + steps
            owner[number, at + steps] = b
            positions[number, at + steps] = steps
            cell[b, starts[b] + steps] = number * shape[1] + at + steps
            at += lengths[b]
        positions[number, at:] = np.arange(shape[1] - at)
    return PackedRows(*(torch.from_numpy(part).to(attention_mask.device) for part in (source, owner, positions, cell)))


def arrange(lengths: Sequence[int], knee: int) -> list[list[int]]:
    """Divide examples over rows so that the rows cost least: N rows of R cells cost N * R * (knee + R).

    Args:
        lengths: Tokens of each example.
        knee: Row length at which attention costs as much as everything else.

    Returns:
        Numbers of the examples in each row; all examples, each once.
    """
    longest = max(lengths)
    best: tuple[int, list[list[int]]] | None = None
    for count in range(1, len(lengths) + 1):
        rows, width = _spread(lengths, count)
        cost = count * width * (knee + width)
        if best is None or cost < best[0]:
            best = (cost, rows)
        if width == longest:
            break  # more rows would only add cells
    assert best is not None
    return best[1]


def _spread(lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """Examples over `count` rows, the longest first, each onto the row that is shortest so far; and the longest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for example in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        length, number = heapq.heappop(filled)
        rows[number].append(example)
        heapq.heappush(filled, (length + lengths[example], number))
    return rows, max(length for length, _ in filled)


def _attention(backbone: Backbone) -> str:
    return str(getattr(backbone.base.config, "_attn_implementation", None) or "unknown")


def _flattens(backbone: Backbone) -> bool:
    # transformers hands positions on to variable-length kernels for a single row only.
    return "flash" in _attention(backbone)


@torch.no_grad()
def check_isolation(backbone: Backbone) -> None:
    """Run a few short examples packed and padded, and compare; the global random numbers are left alone.

    Raises:
        RecipeError: They differ: examples of one row see each other in this model or attention back-end.
    """
    lengths = torch.tensor([9, 4, 6, 3])
    device = backbone.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(backbone.embedding.weight), (len(lengths), int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
    embeds, gates = backbone.embed(ids.to(device)), _neutral_gates(backbone, len(lengths))
    training = backbone.training
    backbone.eval()
    try:
        padded = backbone(embeds, None, gates).last_hidden_state.float()
        packed = packed_states(backbone, embeds, mask, gates).float()
    finally:
        backbone.train(training)
    real = mask.bool()
    error = float((packed - padded)[real].abs().max() / padded[real].abs().max())
    limit = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    if not error <= limit:
        raise RecipeError(
            f"packing: {type(backbone.base).__name__} with attention {_attention(backbone)!r} does not keep packed "
            f"examples apart: found states that differ by {error:.2g} of their size from those of lone examples, "
            f"expected at most {limit:g}; use an attention back-end that does (sdpa, flash attention), or "
            "train_sampling_strategy: group_by_length instead of packing"
        )


def _neutral_gates(backbone: Backbone, rows: int) -> GateArguments:
    kind, config, device = backbone.gate_kind, backbone.adapter_config, backbone.embedding.weight.device
    if kind is None:
        return {}
    if kind == "gates":
        return {kind: torch.full((rows, config.num_experts), 1.0 / config.num_experts, device=device)}
    return {kind: torch.zeros(rows, config.gate_dim, device=device)}
