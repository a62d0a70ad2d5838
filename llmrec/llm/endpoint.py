"""Texts written by a server that speaks the OpenAI chat-completions protocol (vLLM, TGI, llama.cpp, hosted services).

    generator = EndpointGenerator("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-3B-Instruct", max_concurrency=16)
    answers = generator.generate([Request("What is shown?", images=(png,))])
    print(generator.usage.to_dict())

| what happens | what follows |
|---|---|
| no connection, a timeout, 408, 409, 425, 429, 5xx, an answer cut off, malformed or empty | tried again after doubling pauses with jitter, then a transient `Failure`; all requests wait out a `Retry-After` |
| 400 and other refusals of one request, an answer withheld by a filter, an image of no known format | a lasting `Failure`, not tried again |
| 401, 402, 404, 405, a redirect, a certificate that is not trusted | `EndpointError` at once: no request can succeed |
| `give_up_after` requests in a row without an answer | `EndpointError` with the last reason: a dead server must not turn every item into a failure |

An `EndpointError` carries the replies that arrived before it. What the server does to a prompt (its chat template, its
limit of length, the size of images) is its own: nothing is cut here.
"""  # noqa: E501 - a table

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any, Literal

from llmrec.errors import LlmrecError, RecipeError
from llmrec.llm.chat_http import ChatServer, RateWindow, Stopped, Trouble
from llmrec.llm.generating import Failure, Reply, Request, check_decoding

WINDOW_SECONDS = 60.0
"""What a rate limit counts over."""
IMAGE_TOKENS = 1000
"""Guess of what an image takes of a limit of tokens, until the server says it."""
_TEMPLATE_TOKENS = 32
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"), (b"BM", "image/bmp"),
)  # fmt: skip


class EndpointError(LlmrecError):
    """An endpoint answers no request.

    Args:
        message: What was found, what was expected and how to mend it.
        answers: Replies that arrived before, in the order of the requests; None elsewhere.
    """

    def __init__(self, message: str, answers: Sequence[Reply | None] = ()) -> None:
        super().__init__(message)
        self.answers = list(answers)


@dataclass
class EndpointUsage:
    """What an endpoint was asked and what it cost.

    Args:
        requests: Requests with an outcome.
        answered: Of these, with a `Reply`.
        retries: Attempts beyond the first of a request.
        failures: Requests without an answer, by kind.
        prompt_tokens: Tokens read, as the server counts them; answers that were of no use are included.
        new_tokens: Tokens written.
        estimated: Answers whose tokens the server did not count; they are estimated.
        cost: In the currency of the prices; None without prices.
        seconds: Wall time inside `generate`.
    """

    requests: int = 0
    answered: int = 0
    retries: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    new_tokens: int = 0
    estimated: int = 0
    cost: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-like values."""
        return asdict(self)


@dataclass(eq=False)
class EndpointGenerator:
    """Answers of a chat-completions endpoint; a `llmrec.llm.generating.Generator`.

    Args:
        url: Base address ("https://host/v1") or the full one that ends in /chat/completions.
        model: Name of the model at the server.
        max_new_tokens: Longest answer.
        temperature: 0 asks for greedy decoding; above, a seed made of content and `seed` is sent with each request.
        top_p: Share of probability that is kept.
        seed: Of the draws.
        api_key_env: Environment variable that holds the key; None sends none.
        max_concurrency: Requests under way at a time.
        requests_per_minute: In any minute; None is no limit.
        tokens_per_minute: Read and written, in any minute; a request reserves its longest answer until it is known.
        timeout: Seconds without a byte, and seconds for the whole body.
        retries: Attempts after the first.
        backoff: Seconds before the first repetition; doubled for each further one, less up to half by chance.
        max_backoff: Longest pause; where a server asks for a longer one, the request fails.
        give_up_after: Requests in a row that end without an answer: for transient reasons, or any before the first
            success.
        price_in: Price of a million tokens read.
        price_out: Price of a million tokens written.
        opening: How an opening is had: "ask" says it in the words of the request, so an answer may lack it; "prefill"
            sends it as the beginning of the answer with `continue_final_message`, which vLLM understands.
        limit_field: Name of the field for `max_new_tokens`.
        max_prompt_tokens: Longest prompt of the model, where known.

    Raises:
        RecipeError: An option is out of range; see also `ChatServer`.
    """

    url: str
    model: str
    _: KW_ONLY
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    api_key_env: str | None = None
    max_concurrency: int = 8
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout: float = 120.0
    retries: int = 5
    backoff: float = 1.0
    max_backoff: float = 60.0
    give_up_after: int = 10
    price_in: float | None = None
    price_out: float | None = None
    opening: Literal["ask", "prefill"] = "ask"
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_options()
        self._server = ChatServer(self.url, self.api_key_env, self.timeout)
        self.url = self._server.url
        self._request_window = RateWindow(self.requests_per_minute or 0, WINDOW_SECONDS)
        self._token_window = RateWindow(self.tokens_per_minute or 0, WINDOW_SECONDS)
        self._lock = threading.Lock()
        self._usage = EndpointUsage(cost=None if self.price_in is None and self.price_out is None else 0.0)
        self._failures: Counter[str] = Counter()
        self._in_a_row, self._resume_at = 0, 0.0

    @property
    def identity(self) -> str:
        """16 hexadecimal digits: address, model and decoding parameters."""
        facts = [self.url, self.model, self.max_new_tokens, self.temperature, self.opening]
        facts += [self.top_p, self.seed] if self.temperature > 0 else []
        return hashlib.sha256(json.dumps(["endpoint 1", *facts]).encode()).hexdigest()[:16]

    @property
    def usage(self) -> EndpointUsage:
        """What was asked so far and what it cost."""
        with self._lock:
            return replace(self._usage, failures=dict(sorted(self._failures.items())))

    def count_tokens(self, text: str) -> int:
        """An estimate on the safe side: one token for three bytes."""
        return math.ceil(len(text.encode(errors="replace")) / 3)

    def prompt_tokens(self, request: Request) -> int:
        """An estimate of the whole prompt."""
        words = self.count_tokens(request.text) + self.count_tokens(request.opening)
        return words + IMAGE_TOKENS * len(request.images) + _TEMPLATE_TOKENS

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One answer a request, in their order.

        Raises:
            EndpointError: No request can succeed, or too many in a row did not; it carries the replies so far.
        """
        started, run = time.monotonic(), _Run(requests)
        threads = [
            threading.Thread(target=self._work, args=(run,), daemon=True)
            for _ in range(min(self.max_concurrency, len(requests)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive() and not run.stop.is_set():
                    thread.join(0.05)
        finally:
            run.stop.set()  # an interruption ends the workers as well
            with self._lock:
                self._usage.seconds += time.monotonic() - started
        if run.error is not None:
            if isinstance(run.error, EndpointError):
                run.error.answers = [answer if isinstance(answer, Reply) else None for answer in run.answers]
            raise run.error
        return [answer for answer in run.answers if answer is not None]

    def _work(self, run: _Run) -> None:
        """One worker: requests one after the other until none is left or the run is called off."""
        while (place := run.next()) is not None:
            try:
                found = self._answer(run.requests[place], run.stop)
                run.answers[place] = Failure(found.reason, found.transient) if isinstance(found, Trouble) else found
                self._record(found)
            except Stopped:
                return
            except Exception as error:  # handed to the caller's thread, which raises it
                run.end(error)
                return

    def _record(self, found: Reply | Trouble) -> None:
        """Count an outcome.

        Raises:
            EndpointError: It was fatal, or one of too many in a row.
        """
        with self._lock:
            self._usage.requests += 1
            if isinstance(found, Reply):
                self._usage.answered += 1
                self._in_a_row = 0
                return
            self._failures[found.kind] += 1
            if found.fatal:
                raise EndpointError(f"the endpoint {self.url} refuses all requests: {found.reason}")
            if not found.sent:
                return
            self._in_a_row = self._in_a_row + 1 if found.transient or not self._usage.answered else 0
            if self._in_a_row < self.give_up_after:
                return
            count, self._in_a_row = self._in_a_row, 0
        raise EndpointError(
            f"the endpoint {self.url} gave no answer to {count} requests in a row; the last reason: {found.reason}\n"
            "  expected: a server that is up and serves this model; start it, or raise give_up_after, timeout or "
            "retries, and go on with the same command"
        )

    # One request -----------------------------------------------------------------------------------------------------

    def _answer(self, request: Request, stop: threading.Event) -> Reply | Trouble:
        """The outcome of a request after as many attempts as it may have."""
        record = self._question(request)
        if isinstance(record, Trouble):
            return record
        attempt = 0
        while True:
            found = self._attempt(record, request, stop)
            if isinstance(found, Reply) or not found.transient:
                return found
            if found.wait is not None and found.wait > self.max_backoff:
                return replace(found, reason=f"{found.reason} (it asks to wait {found.wait:.0f} s)")
            if attempt == self.retries:
                return replace(found, reason=f"{found.reason} (after {attempt + 1} attempts)")
            self._pause(attempt, found, stop)
            attempt += 1

    def _pause(self, attempt: int, found: Trouble, stop: threading.Event) -> None:
        pause = min(self.max_backoff, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        with self._lock:
            self._usage.retries += 1
            if found.wait is not None:
                self._resume_at = max(self._resume_at, time.monotonic() + found.wait)
        _sleep(pause, stop)

    def _attempt(self, record: dict[str, Any], request: Request, stop: threading.Event) -> Reply | Trouble:
        while (rest := self._resume_at - time.monotonic()) > 0:
            _sleep(rest, stop)
        if self.requests_per_minute is not None:
            self._request_window.take(1, stop)
        reserved = None
        if self.tokens_per_minute is not None:
            reserved = self._token_window.take(self.prompt_tokens(request) + self.max_new_tokens, stop)
        if stop.is_set():
            raise Stopped
        found = self._server.post(record)
        if isinstance(found, Trouble):
            return found
        reply = self._read(found, request)
        read, written = self._count(found, request, reply)
        if reserved is not None:
            reserved[1] = read + written
        return replace(reply, prompt_tokens=read, new_tokens=written) if isinstance(reply, Reply) else reply

    def _question(self, request: Request) -> dict[str, Any] | Trouble:
        """The record of a request, or why it cannot be sent."""
        text, opening = request.text, request.opening.strip()
        if opening and self.opening == "ask":
            text += f"\n\nBegin the answer with exactly these words: {opening}"
        content: Any = text
        if request.images:
            content = []
            for place, data in enumerate(request.images, start=1):
                kind = image_type(data)
                if kind is None:
                    reason = f"image {place} ({len(data)} bytes) is no PNG, JPEG, WebP, GIF or BMP"
                    return Trouble("image", reason, transient=False, sent=False)
                address = f"data:{kind};base64,{base64.b64encode(data).decode()}"
                content.append({"type": "image_url", "image_url": {"url": address}})
            content.append({"type": "text", "text": text})
        record: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": content}],
            self.limit_field: self.max_new_tokens, "temperature": self.temperature,
        }  # fmt: skip
        if self.temperature > 0:
            digest = hashlib.sha256(f"{self.seed}/{request.key}".encode()).digest()
            record |= {"top_p": self.top_p, "seed": int.from_bytes(digest[:4]) >> 1}
        if opening and self.opening == "prefill":
            record["messages"].append({"role": "assistant", "content": opening})
            record |= {"add_generation_prompt": False, "continue_final_message": True}
        return record

    def _read(self, found: dict[str, Any], request: Request) -> Reply | Trouble:
        """The words of an answer; its tokens are counted elsewhere."""
        choices = found.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            return Trouble("malformed", "the answer has no choices with a message")
        content, finish = message.get("content"), choice.get("finish_reason")
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        text = content.strip() if isinstance(content, str) else ""
        if finish == "content_filter":
            return Trouble("filtered", "the server's filter withheld the answer", transient=False)
        if not text and finish == "length":
            reason = f"no words within {self.max_new_tokens} new tokens (deliberation counts); raise max_new_tokens"
            return Trouble("empty", reason, transient=False)
        if not text:
            return Trouble("empty", "the answer is an empty text")
        opening = request.opening.strip()
        if opening and self.opening == "prefill" and not text.startswith(opening):
            text = f"{opening}{' ' if text[0].isalnum() else ''}{text}"
        return Reply(text, 0, 0, "length" if finish == "length" else "stop")

    def _count(self, found: dict[str, Any], request: Request, reply: Reply | Trouble) -> tuple[int, int]:
        """Tokens read and written, as the server says, or estimated; they are added to the report."""
        said = found.get("usage")
        known = [said.get(name) if isinstance(said, dict) else None for name in ("prompt_tokens", "completion_tokens")]
        guess = [self.prompt_tokens(request), self.count_tokens(reply.text) if isinstance(reply, Reply) else 0]
        sure = [isinstance(number, int) and number >= 0 for number in known]
        read, written = (int(one or 0) if ok else two for one, ok, two in zip(known, sure, guess, strict=True))
        with self._lock:
            self._usage.prompt_tokens += read
            self._usage.new_tokens += written
            self._usage.estimated += not all(sure)
            if self._usage.cost is not None:
                self._usage.cost += (read * (self.price_in or 0.0) + written * (self.price_out or 0.0)) / 1e6
        return read, written

    def _check_options(self) -> None:
        check_decoding(self.max_new_tokens, self.temperature, self.top_p)
        for name, least in (
            ("max_concurrency", 1), ("requests_per_minute", 1), ("tokens_per_minute", 1), ("max_prompt_tokens", 1),
            ("retries", 0), ("give_up_after", 1), ("price_in", 0), ("price_out", 0), ("backoff", 0), ("max_backoff", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise RecipeError(f"{name}: found {value}, expected at least {least}")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise RecipeError(f"timeout: found {self.timeout}, expected seconds above 0")
        for name, known in (("opening", ("ask", "prefill")), ("limit_field", ("max_tokens", "max_completion_tokens"))):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name}: found {getattr(self, name)!r}, expected {' or '.join(known)}")
        if not self.model.strip():
            raise RecipeError("model: found nothing, expected the name of a model at the server")


class _Run:
    """One call of `generate`: what is left to do, what was answered, and what ended it early."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.answers: list[Reply | Failure | None] = [None] * len(self.requests)
        self.stop = threading.Event()
        self.error: Exception | None = None
        self._lock, self._places = threading.Lock(), iter(range(len(self.requests)))

    def next(self) -> int | None:
        """The next place, None when all are taken or the run was called off."""
        with self._lock:
            return None if self.stop.is_set() else next(self._places, None)

    def end(self, error: Exception) -> None:
        """Call the run off; the first error counts."""
        with self._lock:
            self.error = self.error or error
            self.stop.set()


def image_type(data: bytes) -> str | None:
    """The media type of an encoded image by its first bytes; None for other data."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _SIGNATURES if data.startswith(start)), None)


def _sleep(seconds: float, stop: threading.Event) -> None:
    if stop.wait(seconds):
        raise Stopped
