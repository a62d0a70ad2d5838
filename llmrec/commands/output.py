"""How verbs speak: a readable table or one JSON object on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

# Where the JSON object goes while standard output is redirected; None outside `json_output`.
_results: ContextVar[TextIO | None] = ContextVar("llmrec_results", default=None)


@contextmanager
def json_output() -> Iterator[None]:
    """Reserve standard output for `emit`: whatever else is printed inside goes to standard error."""
    token = _results.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


def emit(
    result: Mapping[str, Any], table: Callable[[], RenderableType | Sequence[RenderableType]], as_json: bool
) -> None:
    """Print the result of a verb, once, on the first process only.

    Args:
        result: What a program reads. Numbers of numpy, paths, dates and dataclasses are converted; NaN and infinity,
            which JSON cannot express, become null.
        table: Makes what a person reads: one or several things rich can print. Called only when it is shown.
        as_json: `args.as_json`.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    stream = _results.get() or sys.stdout
    if as_json:
        stream.write(json.dumps(to_json(result), allow_nan=False) + "\n")
        stream.flush()
        return
    shown = table()
    for part in shown if isinstance(shown, (list, tuple)) else [shown]:
        console_for(stream).print(part)


def note(text: str) -> None:
    """Tell the person something on standard error, on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def tabulate(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Table:
    """A table for `emit`.

    Args:
        columns: Headings.
        rows: One sequence per line; numbers are aligned to the right, floats get four significant digits.
        title: A line above it.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, heading in enumerate(columns):
        numeric = bool(lines) and all(_is_number(line[position]) or line[position] is None for line in lines)
        table.add_column(Text(heading), justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(_show(cell)) for cell in line))  # Text: a cell such as "[B, L]" is no markup
    return table


def to_json(value: Any) -> Any:
    """Convert a value to what JSON can express.

    Raises:
        TypeError: The value has no natural form in JSON; writing its `repr` would hide a mistake.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return [to_json(entry) for entry in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("tolist", "model_dump", "isoformat"):  # arrays and their scalars, pydantic, dates
        if hasattr(value, method):
            return to_json(getattr(value, method)())
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


def console_for(stream: TextIO) -> Console:
    """A rich console that prints brackets and colons as they are, and wide tables when there is no terminal."""
    from rich.console import Console

    # Without a terminal rich assumes 80 columns and folds tables that a file or a pipe could hold.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 140
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def _is_number(cell: Any) -> bool:
    return hasattr(cell, "__float__") and not isinstance(cell, (bool, str))


def _show(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, (bool, str)):
        return str(cell)
    if isinstance(cell, int) or (_is_number(cell) and hasattr(cell, "__index__")):
        return f"{int(cell):,}"
    if _is_number(cell):
        number = float(cell)
        return "-" if math.isnan(number) else f"{number:.4g}"
    return str(cell)
