"""The Protocols that connect everything. Types only: importing this module loads neither torch nor a sub-package.

A `GateProvider` (history -> vector) feeds tuners, a `Recommender` (history -> ranked items) feeds evaluation.
Any provider works with any tuner, and every system is measured by the same evaluator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from llmrec.data.schema import Ranking, SequenceBatch


@runtime_checkable
class GateProvider(Protocol):
    """Vectors a router turns into expert weights."""

    gate_dim: int

    def user_representation(self, batch: SequenceBatch) -> Tensor:
        """[B, gate_dim]: the state after the last event."""
        ...

    def position_representations(self, batch: SequenceBatch) -> Tensor:
        """[B, L, gate_dim], causal: row t depends on events <= t only."""
        ...


@runtime_checkable
class GateSource(Protocol):
    """Finished expert weights that bypass the router (`tuner: {router: none}`); E must divide the rank.

    Prompts with one answer read [B, E], the item_slots style [B, L, E]. A source that serves both gives the former in
    `gates` and the latter, causal, in a method `position_gates(batch)`. An attribute `num_gates` of an encoder's
    config, E, lets a recipe be checked before anything is trained.
    """

    def gates(self, batch: SequenceBatch) -> Tensor:
        """[B, E] or [B, L, E], rows sum to 1."""
        ...


@runtime_checkable
class Recommender(Protocol):
    """Ranks items for histories. Honours `batch["seen"]` (never recommended) and `batch["candidates"]` (only these)."""

    def recommend(self, batch: SequenceBatch, k: int) -> Ranking:
        """The k best items per row."""
        ...


@runtime_checkable
class CandidateScorer(Recommender, Protocol):
    """Scores given candidates."""

    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32 for `batch["candidates"]`; -inf where the candidate is padding."""
        ...


@runtime_checkable
class CatalogueScorer(CandidateScorer, Protocol):
    """Scores the whole catalogue; lets the evaluator compute exact ranks by counting."""

    def score_items(self, batch: SequenceBatch) -> Tensor:
        """[B, I+1] float32, column 0 -inf. Seen items are NOT masked here: the caller does that."""
        ...


@runtime_checkable
class TrajectoryScorer(Protocol):
    """Scores the next T items jointly."""

    def slot_scores(self, batch: SequenceBatch, horizon: int, prefix: Tensor | None = None) -> Tensor:
        """[B, T, I+1]; `prefix` [B, t] holds items already chosen for the first t slots."""
        ...


@runtime_checkable
class IncrementalEncoder(Protocol):
    """Encoders with a constant-size state for growing histories."""

    def init_state(self, batch_size: int) -> Any:
        """An empty state for `batch_size` users."""
        ...

    def step(self, state: Any, item_ids: Tensor, timestamps: Tensor | None = None) -> Any:
        """The state after one more event per user; item_ids [B]."""
        ...

    def read(self, state: Any, target_timestamps: Tensor | None = None) -> Tensor:
        """[B, d]: the representation the state stands for."""
        ...


class DenseScorer(Protocol):
    """A model whose every position is scored against the item table: encoders, and LLMs in the item_slots style.

    The objective of a stage (`llmrec.strategies`) needs no more than this.
    """

    def represent(self, batch: SequenceBatch) -> Tensor:
        """[B, L, d] causal hidden states of a batch, ready for `score`."""
        ...

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., I+1], or [..., C] for item_ids [..., C] (or [C], shared)."""
        ...


class AnswerModel(Protocol):
    """A model trained on the tokens of an answer: LLMs in the text and hybrid styles."""

    def answer_loss(self, batch: SequenceBatch) -> Tensor:
        """Mean cross-entropy over the answer tokens of the batch, a scalar."""
        ...
