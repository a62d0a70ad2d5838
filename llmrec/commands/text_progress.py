"""Progress of long jobs of texts: how many are settled, and the time left by those that are made now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_SAY_EVERY = 10.0  # seconds between two lines where there is no terminal


class TextProgress:
    """A bar with the time left on a terminal, a line now and then elsewhere.

    The time left is reckoned from the texts made now: finished ones from the cache pass too fast to tell anything.

    Args:
        what: What is written.
        total: How many texts, finished ones included.
    """

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        self._what, self._total, self._done, self._made = what, total, 0, 0
        self._began = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total, left="")

    def __enter__(self) -> TextProgress:
        from llmrec.commands.output import note

        note(f"{self._what}: {self._total:,} to write")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, made: int) -> None:
        from llmrec.commands.output import note

        self._done, self._made = self._done + done, self._made + made
        self._bar.update(self._task, completed=self._done, left=self._left())
        if self._bar.disable and time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            note(f"{self._what}: {self._done:,} of {self._total:,}, {self._left()}")

    def _left(self) -> str:
        if not self._made:
            return ""
        seconds = (time.monotonic() - self._began) / self._made * (self._total - self._done)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
