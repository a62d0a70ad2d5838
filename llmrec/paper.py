"""The record of the publication a system follows; every method file carries one as `PAPER`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Args:
        title: Title of the publication.
        venue: Conference or journal with the year ("NeurIPS 2024"), or "arXiv 2023".
        url_id: arXiv number or DOI; empty where none is known to us.
        system: Short name people use ("iLoRA").
    """

    title: str
    venue: str
    url_id: str = ""
    system: str = ""

    def citation(self) -> str:
        """One line for cards and tables."""
        tail = f", {self.url_id}" if self.url_id else ""
        return f"{self.title} ({self.venue}{tail})"
