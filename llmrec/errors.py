"""The error tree of llmrec.

```
LlmrecError               exit status 2: wrong usage, configuration or input
├── RecipeError           a recipe or a flag cannot mean what it says
├── DataError             a table, file or row is not what was expected
├── CheckpointError       a checkpoint or model folder cannot be trusted
├── DependencyError       an optional library is missing
├── HubError              the Hub cannot be reached, or refuses
└── CheckFailed           exit status 1: the command ran and a check did not hold
```

Every message says what was found, what was expected and how to mend it. Secrets are taken out of messages.
"""

from __future__ import annotations

from pathlib import Path

from llmrec.redaction import redact


class LlmrecError(Exception):
    """Base of all errors a user can mend; the command line prints it without a traceback."""

    exit_status = 2

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class RecipeError(LlmrecError):
    """A recipe key, value or combination is wrong. The message starts with `file:line` where known."""


class DataError(LlmrecError):
    """A table or row is wrong.

    Args:
        message: One line that says what is wrong.
        file: The file it was found in.
        line: 1-based line of the file (header included), when the format has lines.
        column: Name of the column.
        found: What stands there (shortened by `repr`).
        expected: What should stand there.
        remedy: What the user can do.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        column: str | None = None,
        found: object = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.file, self.line, self.column = file, line, column
        self.found, self.expected, self.remedy = found, expected, remedy
        place = ":".join(str(part) for part in (file, line) if part is not None)
        text = f"{place}: {message}" if place else message
        if column is not None:
            text += f"\n  column: {column}"
        if found is not None:
            shown = found if isinstance(found, str) else repr(found)
            text += f"\n  found: {shown if len(shown) <= 200 else shown[:200] + '...'}"
        if expected is not None:
            text += f"\n  expected: {expected}"
        if remedy is not None:
            text += f"\n  remedy: {remedy}"
        super().__init__(text)


class CheckpointError(LlmrecError):
    """A checkpoint or model folder is incomplete, damaged or belongs to something else."""


class DependencyError(LlmrecError):
    """An optional library is missing.

    Args:
        library: Import name of the library.
        extra: The extra of llmrec that installs it.
        purpose: What it is needed for.
        also: What is needed beside the library.
    """

    def __init__(self, library: str, *, extra: str, purpose: str, also: str | None = None) -> None:
        text = f"{purpose} needs the library {library!r}; install it with: pip install 'llmrec[{extra}]'"
        super().__init__(f"{text}; {also}" if also else text)
        self.library, self.extra = library, extra


class HubError(LlmrecError):
    """The Hub cannot be reached, refuses, or has no such repository; nothing was changed there unless it says so."""


class CheckFailed(LlmrecError):
    """The command did its work and found something that must not be (leaks, a failed parity check)."""

    exit_status = 1
