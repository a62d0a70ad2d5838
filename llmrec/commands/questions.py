"""What `llmrec recommend` asks of a run: the same here, in every process of a launcher, and in every actor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.recommender import Recommendation, Recommender

_ASKED = ("recommend", "score_candidates", "score_items")
_TIME_FIELD = "target_timestamps"
_GIVEN = frozenset({"item_ids", "lengths", "user_ids", "seen", "timestamps", _TIME_FIELD})
_LATEST_SECOND = 10**11


@dataclass(frozen=True)
class Question:
    """One question for many histories.

    Args:
        run: The run.
        system: "auto", "model" or "encoder".
        k: Items per history.
        on_empty: What an empty history means.
        on_unknown: What an id outside the catalogue means.
        reasons: History items named per recommendation.
        candidates: Original ids of the only items to rank; None ranks the catalogue.
        at: Query time in seconds, for encoders that read it; None leaves it open.
    """

    run: str
    system: Literal["auto", "model", "encoder"] = "auto"
    k: int = 10
    on_empty: Literal["error", "popular"] = "error"
    on_unknown: Literal["error", "skip"] = "error"
    reasons: int = 0
    candidates: tuple[str, ...] | None = None
    at: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"-k is {self.k}; expected 1 or more")
        given = self.candidates
        if given is not None and (not given or len(set(given)) < len(given)):
            raise RecipeError(f"--candidates: found {','.join(given) or 'nothing'}; expected different item ids")
        if given is not None and self.on_empty == "popular":
            raise RecipeError("--candidates ranks a given list; found --on-empty popular, which asks for another one")

    def open(self) -> Recommender:
        """Load the run, on the accelerator where there is one.

        Raises:
            RecipeError: The system cannot answer this question.
        """
        from llmrec.llm.loading import own_device
        from llmrec.recommender import Recommender

        recommender = Recommender.from_pretrained(self.run, system=self.system)
        self._check_candidates(recommender.system)
        self._check_time(recommender)
        recommender.system = Placed(recommender.system, own_device())
        return recommender

    def answer(
        self,
        recommender: Recommender,
        names: Sequence[str],
        histories: Sequence[Sequence[str]],
        times: Sequence[Sequence[int]] | None = None,
    ) -> list[dict[str, Any]]:
        """One row per recommended item, histories in the order given.

        Args:
            recommender: From `open`.
            names: What each history is called.
            histories: Original item ids, oldest first.
            times: Seconds of every event, for systems that read them.
        """
        order = sorted(range(len(histories)), key=lambda n: -len(histories[n]))  # batches of like lengths
        asked = [histories[n] for n in order]
        stamps = None if times is None else [times[n] for n in order]
        if self.candidates is None:
            answers = recommender.recommend(
                asked,
                self.k,
                on_empty=self.on_empty,
                on_unknown=self.on_unknown,
                reasons=self.reasons,
                times=stamps,
                at=self.at,
            )
        else:
            lists = [self.candidates] * len(asked)
            ranked = recommender.rank(
                asked, lists, on_unknown=self.on_unknown, reasons=self.reasons, times=stamps, at=self.at
            )
            answers = [items[: self.k] for items in ranked]
        place = {n: position for position, n in enumerate(order)}
        return [
            _row(name, rank, item)
            for number, name in enumerate(names)
            for rank, item in enumerate(answers[place[number]], 1)
        ]

    def _check_candidates(self, system: Any) -> None:
        listed = getattr(getattr(getattr(system, "renderer", None), "options", None), "candidates", None)
        if listed is not None and self.candidates is None:
            raise RecipeError(
                f"{self.run}: its prompts list {listed} candidates, so it cannot rank the catalogue; give the items to "
                f"rank with --candidates ID,ID,.. (it was trained with {listed} of them), or --system encoder"
            )

    def _check_time(self, recommender: Recommender) -> None:
        encoder = getattr(recommender.system, "encoder", None) or recommender.system
        needed, taken = (frozenset(getattr(encoder, name, ())) for name in ("uses", "optional"))
        name = type(encoder).__name__
        if self.at is not None and _TIME_FIELD not in needed | taken:
            raise RecipeError(
                f"--at: {name} does not read the time of the question ({_TIME_FIELD} is in neither its `uses` nor its "
                "`optional` fields), so the answer would be the same at any time; leave --at out"
            )
        if self.at is None and _TIME_FIELD in needed:
            raise RecipeError(f"{name} answers for a moment in time; give it with --at (seconds or an ISO date)")
        lacking = sorted(needed - _GIVEN)
        if lacking:
            raise RecipeError(
                f"{name} needs {', '.join(lacking)} with every history; `llmrec recommend` knows the items of a "
                "history, their order and their times only. `llmrec evaluate` measures such a system"
            )


class Placed:
    """A system asked where it stands: batches move to its device.

    Args:
        system: Anything with `recommend(batch, k)`; a torch module is moved to the device.
        device: Device of torch it is asked on.
    """

    def __init__(self, system: Any, device: Any) -> None:
        self._system = system.to(device).eval() if hasattr(system, "parameters") else system
        self._device = device

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._system, name)
        if name not in _ASKED:
            return value
        return lambda batch, *more: value(self._batch(batch), *more)

    def _batch(self, batch: Any) -> dict[str, Any]:
        import torch

        return {name: part.to(self._device) if torch.is_tensor(part) else part for name, part in batch.items()}


def parse_time(text: str) -> int:
    """Seconds since 1970 of a number of seconds or an ISO date or time (UTC unless it says otherwise).

    Raises:
        RecipeError: Neither of them.
    """
    try:
        if text.strip().lstrip("-").isdigit():
            seconds = int(text)
        else:
            moment = datetime.fromisoformat(text.strip())
            seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"--at: found {text!r}, expected seconds since 1970 or an ISO date (2024-05-01)") from error
    if abs(seconds) >= _LATEST_SECOND:
        raise RecipeError(f"--at: found {text}, which are not seconds; divide milliseconds by 1000")
    return seconds


def _row(name: str, rank: int, item: Recommendation) -> dict[str, Any]:
    because = "; ".join(str(reason) for reason in item.reasons)
    return {"user": name, "rank": rank, "item": item.item, "title": item.title, "score": item.score, "because": because}
