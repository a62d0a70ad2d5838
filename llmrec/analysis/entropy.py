"""Entropy of item sequences: how much of a history is new, and how much repeats itself.

Four measures of the performance law (P-Law) and its appendix:

- real entropy, by Lempel-Ziv phrases: S = n ln n / sum_i Lambda_i in nats, Lambda_i the length of the shortest phrase
  that starts at event i and was not met before;
- approximate entropy ApEn(m, r): |phi(m + 1) - phi(m)|, phi(m) the mean ln of the share of windows of m events that lie
  within r of each other. It is small for item sequences that never repeat, unlike the real entropy: the two must not be
  used in one formula;
- Shannon entropy of the items, in bits;
- size after zlib over size before.

Phrases are kept as the published code keeps them: one phrase is remembered per starting event, not every substring.
Since each remembered phrase lengthens an older one by one event, the set is a trie, and one event costs one look-up.

Ours, since the published code does not say how users become one number: users stand one after the other in the order
of their ids, each closed by a separator that no other user shares and that is not counted as an event; estimates are
made on chunks of `CHUNK` events and averaged with the chunks' lengths as weights. Very large data sets are measured on
`MOST_CHUNKS` chunks spread evenly, and ApEn on `APEN_USERS` users spread evenly.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.errors import DataError
from llmrec.paper import Paper

PAPER = Paper(
    title="Predicting Quantitative Scaling Law with Entropy Guidance in Large Recommendation Models",
    venue="NeurIPS 2025",
    url_id="2412.00430",
    system="Performance Law",
)
CHUNK = 10_000
MOST_CHUNKS = 100
APEN_USERS = 1_000

_Trie = dict[tuple[int, int], int]


@dataclass(frozen=True)
class SequenceEntropy:
    """What is measured on the sequences of a data set.

    Args:
        tokens: Number of events, T.
        real: Real entropy of the whole data set in nats, S.
        real_per_user: Mean of the users' own real entropies in nats.
        approximate: Mean ApEn(1, 0) of users with at least two events, in nats; 0.0 where there is none.
        shannon_bits: Entropy of the items' frequencies within a chunk, in bits.
        zlib_ratio: Compressed over raw bytes, items written as four bytes; below 1 is compressible.
    """

    tokens: int
    real: float
    real_per_user: float
    approximate: float
    shannon_bits: float
    zlib_ratio: float


def real_entropy(sequence: Sequence[int]) -> float:
    """Real entropy of one sequence in nats; 0.0 for fewer than two events.

    Args:
        sequence: Item ids, oldest first.
    """
    return joint_entropy([sequence])


def joint_entropy(sequences: Sequence[Sequence[int] | np.ndarray]) -> float:
    """Real entropy in nats of sequences that share their phrases; a phrase never crosses from one into the next.

    The end of a sequence acts like an event that never comes again, as the end of a single sequence does in the
    published code: a phrase that is known up to the end counts its length and one more.
    """
    count = sum(len(sequence) for sequence in sequences)
    if count < 2:
        return 0.0
    trie: _Trie = {}
    total = sum(_phrase_lengths(sequence, trie) for sequence in sequences)
    return count * math.log(count) / total


def _phrase_lengths(sequence: Sequence[int] | np.ndarray, trie: _Trie) -> int:
    """Sum of the phrase lengths of one sequence; its phrases enter the trie (node 0 is the empty phrase)."""
    items = [int(item) for item in sequence]
    total, end = 0, len(items)
    for start in range(end):
        node = 0
        for place in range(start, end):
            following = trie.get((node, items[place]))
            if following is None:
                trie[(node, items[place])] = len(trie) + 1
                total += place - start + 1
                break
            node = following
        else:
            total += end - start + 1
    return total


def approximate_entropy(sequence: Sequence[float] | np.ndarray, m: int = 1, r: float = 0.0) -> float:
    """ApEn(m, r) of one sequence in nats.

    Args:
        sequence: Item ids, or numbers. For ids every 0 <= r < 1 means equality.
        m: Length of the windows that are compared.
        r: Largest distance (greatest difference of a place) at which two windows count as alike.

    Returns:
        0.0 for sequences of fewer than m + 1 events, which hold nothing to compare.

    Raises:
        DataError: m is below 1.
    """
    if m < 1:
        raise DataError("windows need at least one event", found=m, expected="m >= 1")
    values = np.asarray(sequence, dtype=np.float64)
    if len(values) <= m:
        return 0.0
    return abs(_mean_log_share(values, m + 1, r) - _mean_log_share(values, m, r))


def _mean_log_share(values: np.ndarray, m: int, r: float) -> float:
    """phi(m): mean over windows of ln(share of windows within r, itself included); a share of 0 counts as 1e-10."""
    windows = np.lib.stride_tricks.sliding_window_view(values, m)
    near = np.ones((len(windows), len(windows)), dtype=bool)
    for place in range(m):
        column = windows[:, place]
        near &= np.abs(column[:, None] - column[None, :]) <= r
    shares = near.mean(axis=1)
    return float(np.log(np.where(shares > 0, shares, 1e-10)).mean())


def shannon_bits(items: Sequence[int] | np.ndarray) -> float:
    """Entropy of the items' frequencies in bits; 0.0 without events."""
    _, counts = np.unique(np.asarray(items), return_counts=True)
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0.0 for a constant sequence


def zlib_ratio(items: Sequence[int] | np.ndarray) -> float:
    """Bytes after zlib over bytes before, items as four bytes, most significant first; 1.0 without events."""
    raw = np.asarray(items).astype(">u4").tobytes()
    return len(zlib.compress(raw)) / len(raw) if raw else 1.0


def dataset_entropy(sequences: Sequence[Sequence[int] | np.ndarray]) -> SequenceEntropy:
    """All measures of the sequences of a data set.

    Args:
        sequences: One sequence of item ids per user, in the order of user ids, already cut to the latest L events.

    Raises:
        DataError: There is no event at all.
    """
    kept = [np.asarray(sequence, dtype=np.int64) for sequence in sequences if len(sequence)]
    if not kept:
        raise DataError("there is no event to measure", expected="at least one user with a training event")
    parts = chunks(kept)
    spread = np.unique(np.linspace(0, len(parts) - 1, min(MOST_CHUNKS, len(parts))).round().astype(int))
    chosen = [parts[number] for number in spread]
    weights = np.array([sum(map(len, part)) for part in chosen], dtype=np.float64)
    joined = [np.concatenate(part) for part in chosen]
    return SequenceEntropy(
        tokens=sum(map(len, kept)),
        real=float(np.average([joint_entropy(part) for part in chosen], weights=weights)),
        real_per_user=_mean_per_user(kept),
        approximate=_mean_approximate(kept),
        shannon_bits=float(np.average([shannon_bits(part) for part in joined], weights=weights)),
        zlib_ratio=float(np.average([zlib_ratio(part) for part in joined], weights=weights)),
    )


def chunks(sequences: Sequence[np.ndarray], size: int = CHUNK) -> list[list[np.ndarray]]:
    """Cut sequences, one after the other, into parts of `size` events; a sequence on a border stands in both parts."""
    found: list[list[np.ndarray]] = [[]]
    room = size
    for sequence in sequences:
        rest = sequence
        while len(rest):
            if room == 0:
                found.append([])
                room = size
            found[-1].append(rest[:room])
            taken = len(found[-1][-1])
            rest, room = rest[taken:], room - taken
    return found


def _mean_per_user(sequences: Sequence[np.ndarray]) -> float:
    chosen = _spread(sequences, MOST_CHUNKS * 100)
    return float(np.mean([real_entropy(sequence.tolist()) for sequence in chosen]))


def _mean_approximate(sequences: Sequence[np.ndarray]) -> float:
    chosen = _spread([sequence for sequence in sequences if len(sequence) > 1], APEN_USERS)
    return float(np.mean([approximate_entropy(sequence) for sequence in chosen])) if chosen else 0.0


def _spread(sequences: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """At most `most` sequences, evenly spread over the order."""
    if not sequences:
        return []
    places = np.linspace(0, len(sequences) - 1, min(most, len(sequences))).round().astype(int)
    return [sequences[place] for place in places]
