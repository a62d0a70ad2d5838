"""Secrets and home folders: found before anything is published, and taken out of what llmrec prints and stores.

Three uses. `find_secrets` reads the bytes of a file that is about to leave the machine. `redact` cleans texts: error
messages, and through `redacted_output` everything a verb prints, tracebacks of libraries included. `secrets_in` names
the places of a recipe that hold a secret, so that it is refused before it reaches a file.

A secret is a text of a known shape (a token of the Hub, a private key, ...), the value of an environment variable named
like a secret, or the value of a key named like one. No function here returns or prints what it found.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO, cast

HOME = "path in a home folder"
_NAME = r"[A-Za-z0-9._-]+"
# Kind, the texts a match starts with, and the whole match. Searching for the start first keeps large files fast.
_SHAPES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Hugging Face token", ("hf_",), r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{20,}"),
    ("secret key (sk-)", ("sk-",), r"(?<![A-Za-z0-9])sk-(?=[A-Za-z0-9_-]*[0-9])[A-Za-z0-9_-]{20,}"),
    ("AWS access key", ("AKIA", "ASIA"), r"(?<![A-Za-z0-9])A[KS]IA[0-9A-Z]{16}(?![A-Za-z0-9])"),
    ("GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{20,}"),
    ("GitHub token", ("github_pat_",), r"(?<![A-Za-z0-9])github_pat_[A-Za-z0-9_]{20,}"),
    ("Slack token", ("xox",), r"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{10,}"),
    ("Google API key", ("AIza",), r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}"),
    ("private key", ("-----BEGIN",), r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----[A-Za-z0-9+/=\s\\-]*"),
    ("password in an address", ("://",), r"://[^\s/:@\"'<>]+:[^\s/:@\"'<>]+@"),
)
_HOMES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (HOME, ("/home/", "/Users/"), rf"(?<![A-Za-z0-9_.])/(?:home|Users)/{_NAME}"),
    (HOME, ("/root/",), rf"(?<![A-Za-z0-9_.])/root(?=/{_NAME})"),
    (HOME, (":\\Users\\", ":\\\\Users\\\\"), rf"(?<=[A-Za-z]):\\{{1,2}}Users\\{{1,2}}{_NAME}"),
)
_TEXT = [(kind, starts, re.compile(shape)) for kind, starts, shape in _SHAPES]
_BYTES = [
    (kind, [start.encode() for start in starts], re.compile(shape.encode()))
    for kind, starts, shape in (*_SHAPES, *_HOMES)
]
_HOME_TEXT = re.compile(rf"(?:[A-Za-z](?=:\\))?(?:{'|'.join(shape for *_, shape in _HOMES)})")
_SECRET_NAME = re.compile(r"(?i)(?:^|[_.-])(?:token|key|api_?key|password|passwd|secret|credentials)$")
_PASSWORD = re.compile(r"(?i)(?:password|passwd)$")
# Columns and special tokens are called so, and so is a key alone.
_HARMLESS = re.compile(
    r"(?i)^(?:.*[.])?(?:key|(?:user|item|target|sort|bos|eos|pad|unk|sep|cls|mask|image|audio|video)_(?:key|token))$"
)
_ASSIGNED = re.compile(
    r"(?i)(?<![A-Za-z0-9_.-])([A-Za-z0-9_.-]*(?:[_-](?:token|key)|api_?key|password|passwd|secret))"
    r"([\"']?\s*[=:]\s*[\"']?)([^\s\"',;)}]+)"
)
_CHUNK, _OVERLAP = 16 << 20, 8 << 10


@dataclass(frozen=True)
class Finding:
    """Where a file holds a secret: its kind and the place, "line 3" in text, "byte 120" in other files."""

    kind: str
    place: str


def environment_secrets() -> dict[str, str]:
    """Values of environment variables named like secrets, by name; paths and plain words are none."""
    return {
        name: value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name)
        and not value.startswith(("/", "~"))
        and (len(value) >= 20 or (len(value) >= 8 and re.search(r"\d", value) and re.search(r"[A-Za-z]", value)))
    }


def find_secrets(file: BinaryIO, *, homes: bool = True) -> list[Finding]:
    """Secrets, and with `homes` paths of home folders, among all bytes of a file.

    Args:
        file: Opened for reading bytes, at its start.
        homes: Whether paths of home folders count.
    """
    values = environment_secrets().items()
    known = [(f"value of the environment variable {name}", value.encode()) for name, value in values]
    shapes = _BYTES if homes else [entry for entry in _BYTES if entry[0] != HOME]
    found: dict[Finding, None] = {}
    before, lines, tail, binary = 0, 1, b"", False
    while chunk := file.read(_CHUNK):
        binary = binary or b"\0" in chunk[:_OVERLAP]
        data = tail + chunk
        spans = [(kind, at) for kind, starts, shape in shapes for at, _ in _spans(data, starts, shape)]
        spans += [(kind, at) for kind, value in known for at in _places(data, value)]
        for kind, at in sorted(spans, key=lambda span: span[1]):
            line = lines + data.count(b"\n", 0, at)
            place = f"byte {before + at}" if binary else f"line {line}"
            found[Finding(kind, place)] = None
        kept = min(_OVERLAP, len(data))
        lines += data.count(b"\n", 0, len(data) - kept)
        before, tail = before + len(data) - kept, data[len(data) - kept :]
    return list(found)


def redact(text: str, *, homes: bool = False, values: Mapping[str, str] | None = None) -> str:
    """The text with every secret replaced by its kind in brackets.

    Args:
        text: Any text.
        homes: Also write "~" for home folders.
        values: Environment variables to look for; by default those of `environment_secrets`.
    """
    for name, value in (environment_secrets() if values is None else values).items():
        text = text.replace(value, f"[redacted: ${name}]")
    for kind, starts, shape in _TEXT:
        if any(start in text for start in starts):
            text = shape.sub(f"[redacted: {kind}]", text)
    text = _ASSIGNED.sub(_without_value, text)
    return shorten_homes(text) if homes else text


def shorten_homes(text: str) -> str:
    """The text with "~" for every home folder; nothing else changes."""
    return _HOME_TEXT.sub("~", text)


def redact_record(value: Any, *, homes: bool = False) -> Any:
    """A JSON-like value with secrets taken out of every text, and out of every value whose key is named like one."""
    if isinstance(value, str):
        return redact(value, homes=homes)
    if isinstance(value, Mapping):
        return {
            redact(str(key), homes=homes): f"[redacted: {key}]"
            if _is_named_secret(str(key), entry)
            else redact_record(entry, homes=homes)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_record(entry, homes=homes) for entry in value]
    return value


def secrets_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Places of a JSON-like value that hold a secret: (keys and positions from the top, what it is)."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if isinstance(key, str) and _kind_of(key):
                yield place, _kind_of(key)
            elif _is_named_secret(str(key), entry):
                yield (*place, key), "a value under a key named like a secret"
            else:
                yield from secrets_in(entry, (*place, key))
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from secrets_in(entry, (*place, number))
    elif isinstance(value, str) and _kind_of(value):
        yield place, _kind_of(value)


@contextmanager
def redacted_output() -> Iterator[None]:
    """Take secrets out of everything written to standard output and standard error inside."""
    values = environment_secrets()
    before = sys.stdout, sys.stderr
    # What libraries keep of the streams afterwards goes on redacting.
    sys.stdout, sys.stderr = (cast(TextIO, _Redacting(stream, values)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Redacting:
    """A text stream that redacts what is written; everything else is the stream's own."""

    def __init__(self, stream: TextIO, values: Mapping[str, str]) -> None:
        self._stream, self._values = stream, values

    def write(self, text: str) -> int:
        self._stream.write(redact(text, values=self._values))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _kind_of(text: str) -> str:
    """What secret a text holds, or ""."""
    for name, value in environment_secrets().items():
        if value in text:
            return f"the value of the environment variable {name}"
    return next((kind for kind, starts, shape in _TEXT if any(s in text for s in starts) and shape.search(text)), "")


def _is_named_secret(key: str, value: Any) -> bool:
    """Whether a key is named like a secret and the value can be one: no marker such as <pad>, no short word."""
    if not isinstance(value, str) or not value or not _SECRET_NAME.search(key) or _HARMLESS.search(key):
        return False
    return bool(_PASSWORD.search(key)) or (len(value) >= 8 and value[0] not in "<[" and not re.search(r"\s", value))


def _without_value(match: re.Match[str]) -> str:
    key, between, value = match.groups()
    return f"{key}{between}[redacted]" if _is_named_secret(key, value) else match[0]


def _spans(data: bytes, starts: list[bytes], shape: re.Pattern[bytes]) -> Iterator[tuple[int, int]]:
    for start in starts:
        for at in _places(data, start):
            match = shape.match(data, at)
            if match is not None:
                yield match.span()


def _places(data: bytes, wanted: bytes) -> Iterator[int]:
    at = data.find(wanted)
    while at >= 0:
        yield at
        at = data.find(wanted, at + 1)
