"""Where the gates of a forward live while the adapted layers read them.

One `GateState` belongs to one tuner and is shared by all its layers. `PeftModel.forward` or `generate` opens it with
the gates of the batch; layers read them; after the call the gates stay readable for backward, so that a recompute of
activation checkpointing finds them. Anything else that runs a layer outside an opened state is an error: it would use
the gates of some earlier batch.

Two details decide correctness under activation checkpointing. With gradients, the expansion of gates to rank space is
made before the first layer runs (a layer not seen before makes its own and stores nothing), so forward and recompute of
a checkpointed region do the same operations. And `checkpoint_contexts` captures the gates at the moment a region runs
forward, so two forwards before one backward, or a forward without gradients in between, recompute with their own gates.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmrec.errors import DataError, RecipeError

RankKey = tuple[int, torch.dtype, torch.device]


def expand_gates(gates: Tensor, rank: int) -> Tensor:
    """Gates in rank space: every expert's weight, times E, repeated over its block of the rank (iLoRA, our form).

    Args:
        gates: [..., E], rows sum to 1.
        rank: r, a multiple of E.

    Returns:
        [..., r]: all ones for uniform gates, so that scaling alpha / r is that of plain LoRA.
    """
    num_experts = gates.shape[-1]
    return (gates * num_experts).repeat_interleave(rank // num_experts, dim=-1)


@dataclass(eq=False)
class Gates:
    """Gates of one forward for one adapter, with their expansions.

    Args:
        weights: [B, E], or [B, S, E] aligned to the input tokens; float32.
        factor: Rows the layers see per row of `weights`; None accepts any whole multiple.
        expanded: [B, 1, r] or [B, S, r] per rank, dtype and device, made before the first layer ran.
        inference: The same, made by layers that ran without gradients (decoding steps reuse them).
    """

    weights: Tensor
    factor: int | None = None
    expanded: dict[RankKey, Tensor] = field(default_factory=dict)
    inference: dict[tuple[RankKey, int], Tensor] = field(default_factory=dict)

    def in_rank_space(self, key: RankKey) -> Tensor:
        """[B, 1, r] or [B, S, r] in the wanted dtype, on the wanted device; the cast comes last."""
        rank, dtype, device = key
        full = expand_gates(self.weights, rank).to(device=device, dtype=dtype)
        return full if full.dim() == 3 else full.unsqueeze(1)

    def for_inference(self, key: RankKey, repeats: int) -> Tensor:
        """[repeats * B, 1 or S, r], made once per rank, dtype, device and number of beams."""
        stored = self.inference.get((key, repeats))
        if stored is None:
            ready = self.expanded.get(key)
            stored = _repeat_rows(self.in_rank_space(key) if ready is None else ready, repeats)
            self.inference[(key, repeats)] = stored
        return stored


def _repeat_rows(full: Tensor, repeats: int) -> Tensor:
    return full.repeat_interleave(repeats, dim=0) if repeats > 1 else full


class GateState:
    """Gates of the running forward, shared by the layers of one tuner.

    Threads do not see each other's running gates, so a served model may be called from several at once. A deep copy
    is empty: gates carry the graph of their own forward.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self.last: dict[str, Gates] = {}
        # What layers ask for, in a fixed order: each forward expands it once for all of them.
        self._seen: dict[tuple[str, RankKey], None] = {}

    def __reduce__(self) -> tuple[type[GateState], tuple[()]]:
        return GateState, ()

    def foresee(self, modules: Iterable[nn.Module], adapters: Iterable[str]) -> None:
        """Note what the layers of new adapters will ask for, so that the first forward expands like all later ones.

        Expanding layer by layer sums the router's gradient in another order. A resumed run, whose first forward is a
        later step, would then differ from an uninterrupted one in the last bit.
        """
        new = set(adapters) - {adapter for adapter, _ in self._seen}
        for module in modules if new else ():
            if isinstance(module, GatedLinear) and module.gate_adapter in new:
                device = module.weight.device
                cast = torch.is_autocast_enabled(device.type)
                dtype = torch.get_autocast_dtype(device.type) if cast else module.weight.dtype
                self._seen[(module.gate_adapter, (module.out_features, dtype, device))] = None

    @contextmanager
    def opened(self, gates: dict[str, Gates]) -> Iterator[None]:
        """Make `gates` (adapter name -> gates) readable for the layers while a forward or generate runs."""
        if torch.is_grad_enabled():
            for adapter, key in list(self._seen):
                if adapter in gates:
                    gates[adapter].expanded[key] = gates[adapter].in_rank_space(key)
        self.last = gates
        with Installed(self, gates):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts of forward and recompute for `torch.utils.checkpoint` (its argument `context_fn`)."""
        return nullcontext(), Installed(self, self._current())

    def _stack(self) -> list[dict[str, Gates]]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _current(self) -> dict[str, Gates]:
        stack = self._stack()
        if stack:
            return stack[-1]
        # A checkpoint made by somebody else (FSDP's own wrapper) recomputes in backward without our contexts.
        if self.last and torch._C._current_graph_task_id() != -1:
            return self.last
        raise DataError(
            "an iLoRA layer ran outside a forward that has gates",
            found="a call of the inner model, which would reuse the gates of an earlier batch or have none",
            expected="a call of the PeftModel with user_repr or gates",
            remedy="call the PeftModel itself (forward or generate), or disable_adapter() for the base model",
        )

    def scale(self, z: Tensor, adapter: str) -> Tensor:
        """Multiply the output of lora_A by the gates of its rows.

        Args:
            z: [n * B, S, r].
            adapter: Name of the adapter the layer belongs to.

        Returns:
            [n * B, S, r].

        Raises:
            DataError: When rows or positions do not fit the gates, or the adapter has none.
        """
        current = self._current()
        if adapter not in current:
            raise DataError(f"no gates for the adapter {adapter!r}", found=sorted(current), expected=adapter)
        gates = current[adapter]
        repeats = check_alignment(gates, z)
        key: RankKey = (z.shape[-1], z.dtype, z.device)
        if not torch.is_grad_enabled():
            return z * gates.for_inference(key, repeats)
        full = gates.expanded.get(key)
        if full is None:
            self._seen[(adapter, key)] = None
            full = gates.in_rank_space(key)
        return z * _repeat_rows(full, repeats)


class Installed:
    """Context that makes given gates current in this thread; can be entered again (a graph kept for two backwards)."""

    def __init__(self, state: GateState, gates: dict[str, Gates]) -> None:
        self.state, self.gates = state, gates

    def __enter__(self) -> None:
        self.state._stack().append(self.gates)

    def __exit__(self, *error: object) -> None:
        self.state._stack().pop()


def check_alignment(gates: Gates, z: Tensor) -> int:
    """Rows of z per row of gates (1 in a plain forward, the number of beams in generation).

    Raises:
        DataError: When z is not [rows, S, r], rows are no multiple, or per-position gates have another length.
    """
    rows = gates.weights.shape[0]
    if z.dim() != 3:
        raise DataError(
            "an iLoRA layer needs inputs of shape [B, S, width]",
            found=f"{z.dim()} dimensions, shape {tuple(z.shape)}",
            expected="3 dimensions",
            remedy="restrict target_modules to the projections of the language model's decoder layers",
        )
    repeats = z.shape[0] // rows if rows else 0
    fits = repeats > 0 and z.shape[0] == repeats * rows and repeats in {1, gates.factor or repeats}
    if not fits:
        wanted = f"{rows} rows" + (f" or {rows * gates.factor}" if gates.factor else ", or a whole multiple (beams)")
        raise DataError(
            "gates do not fit the batch",
            found=f"{z.shape[0]} rows in the layer, {rows} rows of gates",
            expected=wanted,
            remedy="pass one row of user_repr (or gates) per sequence of the batch",
        )
    if gates.weights.dim() == 3 and gates.weights.shape[1] != z.shape[1]:
        raise DataError(
            "per-position gates do not fit the input tokens",
            found=f"{z.shape[1]} input tokens, gates for {gates.weights.shape[1]}",
            expected="one gate per input token",
            remedy="for cached decoding pass one gate per sequence, [B, gate_dim] or [B, E], "
            "or call forward step by step with the gates of the new tokens",
        )
    return repeats


class GatedLinear(nn.Linear):
    """The `lora_A` of one adapter, its output scaled by the gates of the row.

    Made by changing the class of peft's own Linear: no new parameter, no new key, and a call goes through the module,
    so hooks of ZeRO-3 and FSDP still gather its weight. Every layer class of peft, quantised ones included, calls it.
    """

    gate_state: GateState
    gate_adapter: str

    @staticmethod
    def convert(linear: nn.Linear, state: GateState, adapter: str) -> None:
        """Turn `linear` into a gated one, in place."""
        linear.__class__ = GatedLinear
        gated: Any = linear
        gated.gate_state, gated.gate_adapter = state, adapter

    def forward(self, input: Tensor) -> Tensor:
        """[n * B, S, d_in] -> [n * B, S, r]."""
        return self.gate_state.scale(super().forward(input), self.gate_adapter)


def checked_gates(gates: Tensor, num_experts: int) -> Tensor:
    """Gates given from outside, [B, E] or [B, S, E], as float32.

    Raises:
        DataError: When the shape is another, or a row is no set of weights.
    """
    if gates.dim() not in (2, 3) or gates.shape[-1] != num_experts:
        raise DataError(
            "gates have the wrong shape",
            found=str(tuple(gates.shape)),
            expected=f"[B, {num_experts}] or [B, S, {num_experts}]",
        )
    weights = gates.float()
    values = weights.detach()
    if not bool(((values.sum(-1) - 1).abs() < 1e-2).all() & (values >= 0).all()):
        raise DataError(
            "gates are no weights",
            found=f"row sums from {float(values.sum(-1).min()):.3g} to {float(values.sum(-1).max()):.3g}, "
            f"smallest weight {float(values.min()):.3g}",
            expected="weights of 0 or more that sum to 1 in every row",
        )
    return weights


def fixed_gate(gate: Tensor | Sequence[float] | str, num_experts: int) -> Tensor:
    """[E] float32: "uniform", or E given weights.

    Raises:
        RecipeError: For another word.
        DataError: For numbers that are no weights.
    """
    if isinstance(gate, str):
        if gate != "uniform":
            raise RecipeError(f"gate: found {gate!r}, expected 'uniform' or {num_experts} weights")
        return torch.full((num_experts,), 1.0 / num_experts)
    weights = torch.as_tensor(gate, dtype=torch.float32).detach()
    return checked_gates(weights.reshape(1, -1), num_experts)[0]


def expansion_factor(kwargs: Mapping[str, Any], defaults: Any = None) -> int | None:
    """Rows generate makes of one input row, as far as its arguments say.

    Args:
        kwargs: Arguments of forward or generate.
        defaults: The model's own generation_config, which fills what the arguments leave open.

    Returns:
        max(num_beams, num_return_sequences) when the arguments or a passed generation_config speak of generation; None
        otherwise, and layers then accept any whole multiple of the rows.
    """
    passed = kwargs.get("generation_config")
    names = ("num_beams", "num_return_sequences")
    if passed is None and all(kwargs.get(name) is None for name in names):
        return None
    factor = 1
    for name in names:
        candidates = (kwargs.get(name), getattr(passed, name, None), getattr(defaults, name, None))
        factor = max(factor, next((int(value) for value in candidates if value is not None), 1))
    return factor
