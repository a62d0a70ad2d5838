"""What a source hands to `llmrec.data.prepare`: lazy Ibis tables with our column names, plus what was rejected.

One file of this folder = one value of `--format` (or of `dataset.source` in a recipe): a module with one subclass
of `Source`. Reading is two steps: sniff the layout, then one read with explicit types, so that a bad row is found
with its line and column instead of changing the type of a whole column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import ibis
    import pyarrow as pa

OnBadRows = Literal["stop", "quarantine"]


@dataclass(frozen=True)
class ReadOptions:
    """How to read.

    Args:
        columns: Explicit mapping, ours -> theirs ("user" -> "UserID"); overrides sniffing.
        items: Extra item files, joined on the item id.
        on_bad_rows: "stop" raises at the first bad row; "quarantine" keeps good rows and returns the bad ones.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    items: tuple[Path, ...] = ()
    on_bad_rows: OnBadRows = "stop"


@dataclass(frozen=True)
class RawTables:
    """Lazy tables, ids still the source's own.

    Args:
        interactions: user_key (string), item_key (string), source_row (int64, unique, file order)
            [, timestamp (int64 seconds), order (float64 or int64), rating (float64), label, split (string), ...].
        items: item_key (string, unique) [, title, description, categories (array<string>), brand, image (binary), ...].
        users: user_key (string, unique) [, ...], or None.
        rejected: Rows left out: file (string), line (int64), column (string), found (string), reason (string).
        columns: Mapping found, ours -> theirs, for the data card.
        notes: Notices for the data card.
    """

    interactions: ibis.Table
    items: ibis.Table | None
    users: ibis.Table | None = None
    rejected: pa.Table | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Source(ABC):
    """Reads one family of file layouts."""

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether a file or folder looks like this layout (file names only; nothing is read)."""

    @abstractmethod
    def read(self, connection: ibis.BaseBackend, path: Path, options: ReadOptions) -> RawTables:
        """Lazy tables on the given Ibis connection.

        Raises:
            DataError: A file, column or row is not what was expected (rows only with on_bad_rows "stop").
        """
