"""One question to a chat-completions server: its address, the key, one HTTP exchange, and limits of rate.

Used by `llmrec.llm.endpoint`, with the standard library alone. The key is read from an environment variable and goes
to the named host over https, or to this machine; redirects are not followed and no message holds it.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from llmrec.errors import RecipeError
from llmrec.redaction import redact

COMPLETIONS = "/chat/completions"
_MAX_ANSWER_BYTES = 16 << 20
_TRANSIENT = {408, 409, 425, 429}
_FATAL = {401, 402, 404, 405}


@dataclass(frozen=True)
class Trouble:
    """Why an exchange gave no answer.

    Args:
        kind: Short name, which reports count by: "timeout", "http 503", "not JSON", ...
        reason: One line.
        transient: Whether the same request may succeed later.
        fatal: Whether no request can succeed before a setting is mended; `reason` says which.
        wait: Seconds the server asks to wait.
        sent: Whether the server was asked at all.
    """

    kind: str
    reason: str
    transient: bool = True
    fatal: bool = False
    wait: float | None = None
    sent: bool = True


class Stopped(Exception):
    """Waiting ended because the work was called off."""


class ChatServer:
    """A chat-completions endpoint.

    Args:
        url: Base address or the full one.
        api_key_env: Environment variable that holds the key; None sends none.
        timeout: Seconds without a byte, and seconds for the whole body.

    Raises:
        RecipeError: No http or https address, a password in it, an empty variable, or a key that would travel
            unencrypted.
    """

    def __init__(self, url: str, api_key_env: str | None, timeout: float) -> None:
        parts = _checked(url)
        path = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{path}{'' if path.endswith(COMPLETIONS) else COMPLETIONS}"
        self._variable, self._key, self._timeout = api_key_env, _read_key(api_key_env), timeout
        local = _is_local(parts.hostname or "")
        if self._key and parts.scheme == "http" and not local:
            raise RecipeError(
                f"url: found {self.url}, which is not encrypted, and a key in {api_key_env}; expected https, because "
                "anybody on the way could read the key"
            )
        proxies = [urllib.request.ProxyHandler({})] if local else []  # a proxy is for other machines
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def post(self, record: dict[str, Any]) -> dict[str, Any] | Trouble:
        """The server's JSON object, or why there is none; never raises for what a server or a network does."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llmrec"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(record).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                data = self._body(answer, _MAX_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                return self._refusal(error)
        except (OSError, http.client.HTTPException) as error:
            return self._no_answer(error)
        return self._object(data)

    def _body(self, answer: Any, limit: int) -> bytes:
        data, deadline = b"", time.monotonic() + self._timeout
        while chunk := answer.read1(1 << 16):
            data += chunk
            if len(data) > limit:
                return data[:limit]
            if time.monotonic() > deadline:
                raise TimeoutError("the body did not end")
        return data

    def _object(self, data: bytes) -> dict[str, Any] | Trouble:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            shown = self._clean(data[:120].decode(errors="replace"))
            return Trouble("not JSON", f"the answer ({len(data)} bytes) is cut off or no JSON: {shown!r}")
        if not isinstance(found, dict):
            return Trouble("malformed", f"the answer is a {type(found).__name__}, expected a JSON object")
        if "choices" not in found and (message := _message(found)):
            return Trouble("malformed", f"the answer is an error: {self._clean(message)}")
        return found

    def _no_answer(self, error: Exception) -> Trouble:
        cause: Any = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = f"its certificate is not trusted ({cause.verify_message}); expected one this machine knows"
            return Trouble("certificate", reason, transient=False, fatal=True)
        if isinstance(cause, TimeoutError) or isinstance(error, TimeoutError):
            return Trouble("timeout", f"no answer within {self._timeout:g} s")
        return Trouble("connection", self._clean(f"{type(cause).__name__}: {cause}"))

    def _refusal(self, error: urllib.error.HTTPError) -> Trouble:
        """What a status other than 2xx means."""
        status, kind = error.code, f"http {error.code}"
        try:
            data = self._body(error, 1 << 16)
        except (OSError, http.client.HTTPException):
            data = b""
        said = f"{status} {error.reason}: {self._clean(_error_text(data))}".rstrip(": ")
        if status in _FATAL or 300 <= status < 400 or "insufficient_quota" in data.decode(errors="replace"):
            return Trouble(kind, f"{said}\n  expected: {self._remedy(status)}", transient=False, fatal=True)
        transient = status in _TRANSIENT or status >= 500
        return Trouble(kind, said, transient=transient, wait=_seconds(error.headers.get("Retry-After")))

    def _remedy(self, status: int) -> str:
        if status == 401:
            if self._variable:
                return f"a valid key in the environment variable {self._variable}"
            return "a key; name the environment variable that holds it with api_key_env"
        if status in (402, 429):
            return "an account with credit"
        if status in (404, 405):
            return "the address of an OpenAI-compatible server (it ends in /v1) and a model it serves"
        return "the final address; redirects are not followed, so that a key goes nowhere else"

    def _clean(self, text: str) -> str:
        """One short line without secrets."""
        text = text.replace(self._key, "[redacted]") if self._key else text
        return redact(" ".join(text.split()))[:300]


class RateWindow:
    """At most `limit` units in any window of `seconds`, first come, first served.

    Args:
        limit: Units; a request above it passes when the window is empty.
        seconds: Length of the window.
        clock: Tells the time.
    """

    def __init__(self, limit: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._seconds, self._clock = limit, seconds, clock
        self._entries: deque[list[float]] = deque()
        self._turn, self._lock = threading.Lock(), threading.Lock()

    def take(self, amount: float, stop: threading.Event) -> list[float]:
        """Wait until the units are free and take them.

        Returns:
            The entry (time, units); its units may be set to what was used in the end.

        Raises:
            Stopped: `stop` was set first.
        """
        with self._turn:
            while (wait := self._try(amount)) is not None:
                if stop.wait(min(wait, 0.25)):
                    raise Stopped
            return self._entries[-1]

    def _try(self, amount: float) -> float | None:
        """None and the units are taken, or the seconds until the oldest are free again."""
        with self._lock:
            now = self._clock()
            while self._entries and self._entries[0][0] <= now - self._seconds:
                self._entries.popleft()
            if not self._entries or sum(units for _, units in self._entries) + amount <= self._limit:
                self._entries.append([now, amount])
                return None
            return max(self._entries[0][0] + self._seconds - now, 0.001)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the redirect becomes an error."""
        return None


def _checked(url: str) -> SplitResult:
    expected = "expected an address such as https://host/v1 or http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError as error:
        raise RecipeError(f"url: {error}; {expected}") from error
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise RecipeError(
            f"url: found more than host, port and path; {expected}. A key belongs into an environment variable, "
            "named by api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid or re.search(r"[^!-~]", url):
        raise RecipeError(f"url: found {url!r}; {expected}")
    return parts


def _read_key(variable: str | None) -> str:
    if variable is None:
        return ""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # What stands there may be the key itself, so it is not shown.
        raise RecipeError("api_key_env: expected the name of an environment variable, such as OPENAI_API_KEY")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RecipeError(f"api_key_env: the environment variable {variable} is empty; expected the key of the server")
    if re.search(r"[^!-~]", key):
        raise RecipeError(f"api_key_env: {variable} holds blanks or letters that no HTTP header can carry")
    return key


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _seconds(header: str | None) -> float | None:
    """Retry-After as seconds from now: a number, or a date."""
    if not header:
        return None
    try:
        number = float(header)
        return number if math.isfinite(number) and number >= 0 else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _error_text(data: bytes) -> str:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return data.decode(errors="replace")
    return (_message(found) if isinstance(found, dict) else "") or data.decode(errors="replace")


def _message(record: dict[str, Any]) -> str:
    """The message of an error record, in the forms servers use."""
    error = record.get("error", record.get("message", record.get("detail", "")))
    return str(error.get("message", error) if isinstance(error, dict) else error)
