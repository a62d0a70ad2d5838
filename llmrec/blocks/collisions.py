"""Items that share a code: finding them by one sort, and giving them codes of their own.

Users: `item_tokenizers.base`, `item_tokenizers.cofirec`, `item_tokenizers.rqvae` (`sinkhorn` while training).

Policies (`resolve`), all leave the levels before the last as they are:

    append        a level more, numbering the items of a code 0, 1, 2, ... (TIGER, NeurIPS 2023)
    sinkhorn      last codes evened out by optimal transport inside each shared code (LC-Rec, ICDE 2024, section 3.2)
    nearest_free  the cheapest free last code of the prefix, pairs of item and code taken by ascending cost (ours)
    random        a random free last code of the prefix
    none          nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ROUNDS, EPSILON, ITERATIONS = 20, 0.003, 50
"""Of policy sinkhorn, as LC-Rec runs it."""
_CELLS = 2**24  # largest matrix of costs held at once
_LEAST_EXPONENT = -680.0  # exp of it is 1e-296: columns nobody is near keep a mass that float64 can scale up


def collision_groups(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are equal, by sorting: O(N log N), no loop over rows.

    Args:
        codes: [N, M] int64.

    Returns:
        (group, place), both [N] int64: equal rows share a group number (0.. in the order of the codes); `place` counts
        0, 1, 2, ... inside a group in row order.
    """
    rows = len(codes)
    if not rows:
        return codes.new_zeros(0), codes.new_zeros(0)
    order, new = _sorted_rows(codes)
    number = new.cumsum(0) - 1
    starts = new.nonzero().flatten()
    group, place = torch.empty_like(order), torch.empty_like(order)
    group[order] = number
    place[order] = torch.arange(rows, device=codes.device) - starts[number]
    return group, place


def _sorted_rows(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(order [N] that sorts rows, equal ones in row order; new [N] bool, where a sorted row differs from the last)."""
    rows = len(codes)
    keys, span, passes = codes.new_zeros(rows), 1, []
    limit = 2**62 // max(rows, 1)
    for values in codes.T.contiguous():  # as many levels as fit are one number, and one sort
        low, high = (int(bound) for bound in torch.aminmax(values))
        width = high - low + 1
        if span > 1 and span * width > limit:
            passes.append(keys)
            keys, span = codes.new_zeros(rows), 1
        keys.mul_(width).add_(values).sub_(low)
        span *= width
    ordered, order = keys.sort(stable=True)
    new = torch.ones(rows, dtype=torch.bool, device=codes.device)
    torch.ne(ordered[1:], ordered[:-1], out=new[1:])
    if passes:
        for key in reversed(passes):  # less significant parts are in order already, and every pass is stable
            order = order[key[order].argsort(stable=True)]
        new[1:] = False
        for key in (*passes, keys):
            ordered = key[order]
            new[1:] |= ordered[1:] != ordered[:-1]
    return order, new


def resolve(
    codes: Tensor,
    sizes: tuple[int, ...],
    policy: str,
    *,
    costs: Callable[[Tensor], Tensor],
    seed: int,
    kept: Tensor | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Codes after a collision policy; levels before the last never change.

    Args:
        codes: [N, M] int64 as assigned.
        sizes: Codes per level.
        policy: "nearest_free", "append", "sinkhorn", "random" or "none"; see the module.
        costs: Rows [n] -> [n, W of the last level], what each last code costs these items (distances). Asked only for
            rows that are not kept.
        seed: For policy random.
        kept: [n0, M], or [n0, M + 1] for append: final codes of the first n0 rows. They come out as they are and count
            as taken.

    Returns:
        (codes [N, M], sizes); for append [N, M + 1] and one size more, that of the largest group.

    Raises:
        ValueError: The policy is unknown, or a prefix has more items than the last level has codes (nearest_free,
            random).
    """
    settled = 0 if kept is None else len(kept)
    if kept is not None:
        codes = torch.cat([kept[:, : codes.shape[1]], codes[settled:]])
    if policy == "append":
        return _append(codes, sizes, kept)
    if policy == "nearest_free":
        return _nearest_free(codes, sizes[-1], costs, settled), sizes
    if policy == "random":
        generator = torch.Generator().manual_seed(seed)
        # Greedy by costs that are noise is a random free code, and a random item that keeps its own.
        noise = lambda rows: torch.rand(len(rows), sizes[-1], generator=generator).to(codes.device)  # noqa: E731
        return _nearest_free(codes, sizes[-1], noise, settled), sizes
    if policy == "sinkhorn":
        return _even_out(codes, costs, settled), sizes
    if policy == "none":
        return codes, sizes
    raise ValueError(f"found policy {policy!r}, expected nearest_free, append, sinkhorn, random or none")


def _append(codes: Tensor, sizes: tuple[int, ...], kept: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """Number the rows of a code, after the numbers that are taken."""
    group, number = collision_groups(codes)
    if kept is not None and len(kept):
        old = group[: len(kept)]
        groups = int(group.max()) + 1
        following = torch.zeros(groups, dtype=torch.long, device=codes.device)
        following = following.scatter_reduce(0, old, kept[:, -1] + 1, "amax")
        number = number - torch.bincount(old, minlength=groups)[group] + following[group]
        number[: len(kept)] = kept[:, -1]
    largest = int(number.max()) + 1 if len(number) else 1
    return torch.cat([codes, number[:, None]], dim=1), (*sizes, largest)


def _nearest_free(codes: Tensor, size: int, costs: Callable[[Tensor], Tensor], settled: int) -> Tensor:
    """Unique last codes inside every prefix. Of the items of a code the one that pays least keeps it."""
    prefix = collision_groups(codes[:, :-1])[0]
    full = collision_groups(codes)[0]
    if not len(codes):
        return codes
    count = torch.bincount(prefix)
    if int(count.max()) > size:
        worst = int(count.argmax())
        shown = tuple(codes[(prefix == worst).nonzero()[0, 0], :-1].tolist())
        raise ValueError(f"{int(count[worst])} items share the prefix {shown}, and the last level has {size} codes")
    contested = torch.bincount(full)[full] > 1
    contested[:settled] = False
    codes = codes.clone()
    for rows in _whole_prefixes(prefix, contested, size):
        asked = contested[rows]
        local = torch.unique_consecutive(prefix[rows], return_inverse=True)[1]
        free = torch.ones(int(local[-1]) + 1, size, dtype=torch.bool, device=codes.device)
        free[local[~asked], codes[rows[~asked], -1]] = False
        wishing, local = rows[asked], local[asked]
        cost = torch.nan_to_num(costs(wishing).double(), nan=torch.finfo(torch.float64).max)
        canonical = _by_cost(cost)  # ties must not be decided by the order of rows
        wishing, local, cost = wishing[canonical], local[canonical], cost[canonical]
        own = codes[wishing, -1]
        keeps = _cheapest(local * size + own, cost[torch.arange(len(own)), own]) & free[local, own]
        free[local[keeps], own[keeps]] = False
        codes[wishing[~keeps], -1] = _greedy(cost[~keeps], local[~keeps], free)
    return codes


def _whole_prefixes(prefix: Tensor, contested: Tensor, size: int) -> Iterator[Tensor]:
    """The rows of prefixes that have a contested code, sorted by prefix, in parts of whole prefixes."""
    concerned = torch.zeros(int(prefix.max()) + 1, dtype=torch.bool, device=prefix.device)
    concerned[prefix[contested]] = True
    rows = concerned[prefix].nonzero().flatten()
    rows = rows[prefix[rows].argsort(stable=True)]
    if not len(rows):
        return
    lengths = torch.unique_consecutive(prefix[rows], return_counts=True)[1]
    ends = lengths.cumsum(0).tolist()
    start = 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or (following - start) * size > _CELLS:
            yield rows[start:end]
            start = end


def _by_cost(cost: Tensor) -> Tensor:
    """An order of rows that depends on their costs alone (equal rows aside)."""
    return torch.unique(cost, dim=0, return_inverse=True)[1].argsort(stable=True)


def _cheapest(key: Tensor, cost: Tensor) -> Tensor:
    """[n] bool: the first row of least cost among those with the same key."""
    order = cost.argsort(stable=True)
    order = order[key[order].argsort(stable=True)]
    first = torch.ones(len(key), dtype=torch.bool, device=key.device)
    first[1:] = key[order][1:] != key[order][:-1]
    chosen = torch.zeros_like(first)
    chosen[order[first]] = True
    return chosen


def _greedy(cost: Tensor, group: Tensor, free: Tensor) -> Tensor:
    """Pairs (row, free code of its group) by ascending cost, each row and code once.

    A pair that is the cheapest of its row and of its code will be taken whatever happens elsewhere, so all such pairs
    are taken at once; the result is that of the loop over sorted pairs.

    Args:
        cost: [n, W].
        group: [n] rows of `free`.
        free: [G, W] bool, with enough free codes for the rows of each group.

    Returns:
        [n] int64 codes.
    """
    free, found = free.clone(), torch.full((len(cost),), -1, device=cost.device)
    left = torch.arange(len(cost), device=cost.device)
    while len(left):
        pairs = cost[left].masked_fill(~free[group[left]], torch.inf)
        least, code = pairs.min(1)
        code = pairs.argmin(1)  # the first of equal ones
        rivals = torch.full(free.shape, torch.inf, dtype=cost.dtype, device=cost.device)
        rivals.scatter_reduce_(0, group[left][:, None].expand_as(pairs), pairs, "amin")
        wins = (least == rivals[group[left], code]).nonzero().flatten()
        wins = wins[_cheapest(group[left][wins] * free.shape[1] + code[wins], least[wins])]
        found[left[wins]] = code[wins]
        free[group[left][wins], code[wins]] = False
        left = left[found[left] < 0]
    return found


def _even_out(codes: Tensor, costs: Callable[[Tensor], Tensor], settled: int) -> Tensor:
    """LC-Rec's repair: Sinkhorn on the items of each shared code alone, round after round; leftovers stay shared."""
    codes = codes.clone()
    for _ in range(ROUNDS):
        group = collision_groups(codes)[0]
        shared = torch.bincount(group)[group] > 1 if len(group) else group.bool()
        shared[:settled] = False  # ours: LC-Rec knows no items that must keep their code
        rows = shared.nonzero().flatten()
        rows = rows[group[rows].argsort(stable=True)]
        counts = torch.unique_consecutive(group[rows], return_counts=True)[1].tolist()
        before = codes[:, -1].clone()
        for members in rows.split(counts):
            if len(members) > 1:  # transport of one item is uniform and says nothing
                codes[members, -1] = sinkhorn(costs(members), EPSILON, ITERATIONS)
        if torch.equal(before, codes[:, -1]):
            break
    return codes


def sinkhorn_plan(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Entropic transport between items and codes of equal mass (LC-Rec, equation 5), float64 whatever comes in.

    Distances are first brought to [-1, 1] over the whole matrix. Columns sum to B / W exactly, being scaled last; rows
    approach 1 as iterations grow, slowly for small epsilon.

    Args:
        distances: [B, W] squared distances.
        epsilon: Weight of the entropy, above 0.
        iterations: Rounds of scaling rows, then columns.

    Returns:
        [B, W] float64.

    Raises:
        ValueError: epsilon is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"a transport plan needs epsilon > 0, found {epsilon}")
    items, size = distances.shape
    if not items:
        return distances.double()
    cost = distances.double()
    least, most = (bound / 2 for bound in torch.aminmax(cost))
    middle = least + most
    exponent = -(cost - middle) / (2 * most - middle + 1e-5) / epsilon
    # A factor per row is lost in the first scaling of rows; without it the greatest term of a row is 1.
    exponent = exponent - exponent.amax(1, keepdim=True)
    plan = exponent.clamp(min=_LEAST_EXPONENT).exp()
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True).clamp(min=tiny) / items
        plan = plan / plan.sum(0, keepdim=True).clamp(min=tiny) / size
    return plan * items


def sinkhorn(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes [B] that use the codes evenly: the greatest mass of each row of the plan; epsilon <= 0 is the nearest."""
    if epsilon <= 0:
        return distances.argmin(1)
    return sinkhorn_plan(distances, epsilon, iterations).argmax(1)
