"""A chat-completions endpoint that fails in every way a server can, played by a local one."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llmrec.errors import LlmrecError, RecipeError
from llmrec.llm import endpoint
from llmrec.llm.chat_http import RateWindow, Stopped
from llmrec.llm.endpoint import EndpointError, EndpointGenerator, image_type
from llmrec.llm.generating import Failure, Reply, Request

PNG = b"\x89PNG\r\n\x1a\n" + b"rest"
KEY = "k3y-of-the-server-0123456789"
Answer = tuple[int, dict[str, str], bytes]
Behaviour = Callable[[dict[str, Any], int], Answer]


def said(text: Any = "a red ring", finish: str = "stop", usage: Any = (7, 3), status: int = 200) -> Answer:
    """A well-formed answer."""
    record: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    if usage is not None:
        record["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return status, {}, json.dumps(record).encode()


def refused(status: int, message: str = "no", **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, fields, json.dumps({"error": {"message": message, "code": "some_code"}}).encode()


class Server:
    """A local server; `behaviour(record, number of the attempt)` decides each answer."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = lambda record, number: said()
        self.records: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802 - the name the library calls
                record = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.records.append(record)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    number = len(outer.records)
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    status, fields, body = outer.behaviour(record, number)
                finally:
                    with lock:
                        outer.at_once -= 1
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **fields}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    return  # the client has given up

            def log_message(self, *args: Any) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def generator(server: Server, **options: Any) -> EndpointGenerator:
    chosen: dict[str, Any] = {"backoff": 0.002, "max_backoff": 0.5, "timeout": 2.0, "retries": 2, **options}
    return EndpointGenerator(server.url, "tiny-vlm", **chosen)


def one(made: EndpointGenerator, request: Request | None = None) -> Reply | Failure:
    return made.generate([request or Request("What is shown?")])[0]


# What is asked -------------------------------------------------------------------------------------------------------


def test_a_request_becomes_a_chat_completion(server: Server) -> None:
    made = generator(server, max_new_tokens=9)
    assert one(made, Request("What is shown?", (PNG, b"GIF89a"))) == Reply("a red ring", 7, 3, "stop")
    record = server.records[0]
    assert server.paths == ["/v1/chat/completions"] and "Authorization" not in server.headers[0]
    assert (record["model"], record["max_tokens"], record["temperature"]) == ("tiny-vlm", 9, 0.0)
    first, second, text = record["messages"][0]["content"]
    assert first["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert second["image_url"]["url"].startswith("data:image/gif;base64,")
    assert text == {"type": "text", "text": "What is shown?"}
    one(made, Request("no picture"))
    assert server.records[1]["messages"] == [{"role": "user", "content": "no picture"}]


def test_an_opening_is_asked_for_or_sent_ahead(server: Server) -> None:
    server.behaviour = lambda record, number: said("quiet films")
    request = Request("Summarise.", opening="The user likes ")
    assert one(generator(server), request) == Reply("quiet films", 7, 3, "stop")
    assert server.records[0]["messages"][0]["content"].endswith("these words: The user likes")
    ahead = one(generator(server, opening="prefill"), request)
    assert isinstance(ahead, Reply) and ahead.text == "The user likes quiet films"
    assert server.records[1]["messages"][1] == {"role": "assistant", "content": "The user likes"}
    assert server.records[1]["continue_final_message"] is True
    server.behaviour = lambda record, number: said("The user likes quiet films")
    assert one(generator(server, opening="prefill"), request) == ahead


def test_a_sampled_request_carries_a_seed_of_its_content(server: Server) -> None:
    first, second = generator(server, temperature=0.6, top_p=0.9), generator(server, temperature=0.6, seed=1)
    for made, text in ((first, "a"), (first, "a"), (first, "b"), (second, "a")):
        one(made, Request(text))
    seeds = [record["seed"] for record in server.records]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    assert server.records[0]["top_p"] == 0.9
    one(generator(server, limit_field="max_completion_tokens"))
    assert "seed" not in server.records[4] and server.records[4]["max_completion_tokens"] == 256


def test_answers_keep_the_order_and_few_are_under_way(server: Server) -> None:
    def slow(record: dict[str, Any], number: int) -> Answer:
        text = record["messages"][0]["content"]
        time.sleep(0.002 * (12 - int(text)))
        return said(f"answer {text}")

    server.behaviour = slow
    answers = generator(server, max_concurrency=3).generate([Request(str(n)) for n in range(12)])
    assert [answer.text for answer in answers if isinstance(answer, Reply)] == [f"answer {n}" for n in range(12)]
    assert 2 <= server.most_at_once <= 3
    assert generator(server).generate([]) == []


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image/png"), (b"\xff\xd8\xff\xe0", "image/jpeg"), (b"RIFF\0\0\0\0WEBP", "image/webp"),
        (b"GIF87a", "image/gif"), (b"BM..", "image/bmp"), (b"", None), (b"<svg>", None), (b"RIFF\0\0\0\0WAVE", None),
    ],
)  # fmt: skip
def test_the_type_of_an_image_is_read_from_its_bytes(data: bytes, kind: str | None) -> None:
    assert image_type(data) == kind


def test_an_image_of_no_known_format_fails_alone_and_is_not_sent(server: Server) -> None:
    made = generator(server, give_up_after=1)
    answers = made.generate([Request("x", (b"<svg>",)), Request("x", (PNG,)), Request("x", (b"",))])
    assert [type(answer) for answer in answers] == [Failure, Reply, Failure]
    assert isinstance(answers[2], Failure) and "image 1 (0 bytes)" in answers[2].reason and not answers[2].transient
    assert len(server.records) == 1 and made.usage.failures == {"image": 2}


# Transient troubles --------------------------------------------------------------------------------------------------


def hung_up() -> Answer:
    return 200, {"Content-Length": "0"}, b""


TROUBLES: dict[str, tuple[Answer, str, str]] = {
    "429": (refused(429, "slow down"), "http 429", "429 Too Many Requests: slow down"),
    "500": (refused(500), "http 500", "500 Internal Server Error"),
    "503": ((503, {}, b"<html>\n\nbusy</html>"), "http 503", "<html> busy</html>"),
    "408": (refused(408), "http 408", "408"),
    "truncated": ((200, {}, said()[2][:40]), "not JSON", "40 bytes"),
    "shorter than announced": ((200, {"Content-Length": "500"}, said()[2][:40]), "not JSON", "cut off"),
    "no bytes": (hung_up(), "not JSON", "0 bytes"),
    "nested": ((200, {}, b"[" * 100_000), "not JSON", "cut off or no JSON"),
    "a list": ((200, {}, b"[]"), "malformed", "a list"),
    "no choices": ((200, {}, b'{"choices": []}'), "malformed", "no choices"),
    "no message": ((200, {}, b'{"choices": [{}]}'), "malformed", "no choices"),
    "an error inside": ((200, {}, b'{"error": {"message": "overloaded"}}'), "malformed", "overloaded"),
    "empty": (said("  \n"), "empty", "empty text"),
    "null": (said(None), "empty", "empty text"),
}


@pytest.mark.parametrize("name", list(TROUBLES))
def test_a_trouble_that_passes_is_tried_again(server: Server, name: str) -> None:
    answer, kind, words = TROUBLES[name]
    server.behaviour = lambda record, number: answer if number <= 2 else said()
    made = generator(server, timeout=0.3)
    assert one(made) == Reply("a red ring", 7, 3, "stop")
    assert (made.usage.retries, made.usage.answered, made.usage.failures) == (2, 1, {})
    server.behaviour = lambda record, number: answer
    failed = one(made)
    assert isinstance(failed, Failure) and failed.transient
    assert words in failed.reason and "after 3 attempts" in failed.reason and "\n" not in failed.reason
    assert made.usage.failures == {kind: 1} and len(server.records) == 6


def test_a_slow_answer_is_a_timeout(server: Server) -> None:
    def slow(record: dict[str, Any], number: int) -> Answer:
        if number == 1:
            time.sleep(0.4)
        return said()

    server.behaviour = slow
    made = generator(server, timeout=0.1)
    assert isinstance(one(made), Reply) and made.usage.retries == 1
    server.records.clear()
    failed = one(generator(server, timeout=0.1, retries=0))
    assert isinstance(failed, Failure) and failed.transient and "no answer within 0.1 s" in failed.reason


def test_no_server_is_a_transient_failure() -> None:
    gone = Server()
    gone.close()
    made = generator(gone, retries=1)
    failed = one(made)
    assert isinstance(failed, Failure) and failed.transient and "ConnectionRefused" in failed.reason
    assert made.usage.failures == {"connection": 1}


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_out_by_all_requests(server: Server, form: str) -> None:
    times: list[float] = []
    wait = "0.3" if form == "seconds" else formatdate(time.time() + 1.3, usegmt=True)  # whole seconds: 0.3 to 1.3

    def limited(record: dict[str, Any], number: int) -> Answer:
        times.append(time.monotonic())
        return refused(429, Retry_After=wait) if number == 1 else said()

    server.behaviour = limited
    made = generator(server, max_concurrency=1, max_backoff=5.0)
    assert all(isinstance(answer, Reply) for answer in made.generate([Request("a"), Request("b")]))
    assert times[1] - times[0] >= 0.29


def test_a_longer_pause_than_allowed_fails_at_once(server: Server) -> None:
    server.behaviour = lambda record, number: refused(429, Retry_After="3600")
    failed = one(generator(server))
    assert isinstance(failed, Failure) and failed.transient and "asks to wait 3600 s" in failed.reason
    assert len(server.records) == 1


@pytest.mark.parametrize("header", ["soon", "-1", "nan", "inf", ""])
def test_a_senseless_retry_after_is_no_pause(server: Server, header: str) -> None:
    server.behaviour = lambda record, number: refused(429, Retry_After=header) if number == 1 else said()
    started = time.monotonic()
    assert isinstance(one(generator(server)), Reply) and time.monotonic() - started < 1


# Lasting troubles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_refused_request_is_not_tried_again(server: Server, status: int) -> None:
    server.behaviour = lambda record, number: refused(status, "too long") if number == 2 else said()
    made = generator(server, max_concurrency=1)
    first, failed, last = made.generate([Request("a"), Request("b"), Request("c")])
    assert isinstance(first, Reply) and isinstance(last, Reply)
    assert isinstance(failed, Failure) and not failed.transient and "too long" in failed.reason
    assert len(server.records) == 3 and made.usage.failures == {f"http {status}": 1}


def test_the_end_of_an_answer(server: Server) -> None:
    server.behaviour = lambda record, number: said("half a sen", "length")
    assert one(generator(server)) == Reply("half a sen", 7, 3, "length")
    server.behaviour = lambda record, number: said("", "length")
    made = generator(server)
    failed = one(made)
    assert isinstance(failed, Failure) and not failed.transient and "raise max_new_tokens" in failed.reason
    server.behaviour = lambda record, number: said("x", "content_filter")
    failed = one(made)
    assert isinstance(failed, Failure) and not failed.transient and "filter" in failed.reason
    assert len(server.records) == 3
    server.behaviour = lambda record, number: said([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}])
    assert one(made) == Reply("in parts", 7, 3, "stop")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refused(401, f"bad key {KEY}"), "environment variable TINY_KEY"), (refused(404, "no model"), "ends in /v1"),
        (refused(402), "credit"), (refused(429, "insufficient_quota"), "credit"),
        ((307, {"Location": "http://127.0.0.1:9/elsewhere"}, b""), "redirects are not followed"),
    ],
)  # fmt: skip
def test_what_no_request_survives_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str
) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    server.behaviour = lambda record, number: answer if number > 1 else said()
    made = generator(server, api_key_env="TINY_KEY", max_concurrency=1)
    with pytest.raises(EndpointError, match=words) as caught:
        made.generate([Request("a"), Request("b"), Request("c")])
    assert caught.value.answers == [Reply("a red ring", 7, 3, "stop"), None, None]
    assert len(server.records) == 2 and server.url in str(caught.value)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    everything = f"{caught.value} {made!r} {vars(made)} {made.identity} {made.usage.to_dict()}"
    assert KEY not in everything


def test_an_unauthorised_request_without_a_key_says_how_to_name_one(server: Server) -> None:
    server.behaviour = lambda record, number: refused(401)
    with pytest.raises(EndpointError, match="api_key_env"):
        one(generator(server))


def test_a_key_a_server_repeats_is_not_in_a_failure(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    server.behaviour = lambda record, number: refused(400, f"the key {KEY} may not do this")
    failed = one(generator(server, api_key_env="TINY_KEY"))
    assert isinstance(failed, Failure) and KEY not in failed.reason and "redacted" in failed.reason


# Giving up -----------------------------------------------------------------------------------------------------------


def test_a_dead_server_does_not_fail_every_item(server: Server) -> None:
    server.behaviour = lambda record, number: said() if number <= 2 else refused(503, "loading")
    made = generator(server, give_up_after=4, retries=1, max_concurrency=2)
    with pytest.raises(EndpointError, match="4 requests in a row") as caught:
        made.generate([Request(str(n)) for n in range(500)])
    assert server.url in str(caught.value) and "loading" in str(caught.value)
    assert isinstance(caught.value, LlmrecError) and caught.value.exit_status == 2
    assert [type(answer) for answer in caught.value.answers[:2]] == [Reply, Reply]
    assert not any(caught.value.answers[2:]) and len(server.records) <= 2 + 2 * 5
    server.behaviour = lambda record, number: said()
    assert isinstance(one(made), Reply)  # once it is back, the same generator goes on


def test_all_kinds_count_and_a_success_starts_anew(server: Server) -> None:
    kinds = [TROUBLES[name][0] for name in ("503", "truncated", "429", "empty")]
    server.behaviour = lambda record, number: kinds[number % 4] if number % 4 else said()
    made = generator(server, give_up_after=4, retries=0, max_concurrency=1)
    answers = made.generate([Request(str(n)) for n in range(16)])
    assert sum(isinstance(answer, Reply) for answer in answers) == 4
    assert made.usage.failures == {"empty": 4, "http 429": 4, "not JSON": 4}
    server.behaviour = lambda record, number: kinds[number % 4]
    with pytest.raises(EndpointError):
        made.generate([Request(str(n)) for n in range(16)])


def test_a_server_that_refuses_everything_is_given_up_and_single_refusals_are_not(server: Server) -> None:
    server.behaviour = lambda record, number: refused(400, "unknown field max_tokens")
    with pytest.raises(EndpointError, match="unknown field"):
        generator(server, give_up_after=3, max_concurrency=1).generate([Request(str(n)) for n in range(50)])
    assert len(server.records) == 3
    server.behaviour = lambda record, number: said() if number == 4 else refused(400)
    answers = generator(server, give_up_after=3, max_concurrency=1).generate([Request(str(n)) for n in range(9)])
    assert sum(isinstance(answer, Failure) for answer in answers) == 8


def test_waiting_requests_stop_when_the_work_is_called_off(server: Server) -> None:
    def late(record: dict[str, Any], number: int) -> Answer:
        if number > 1:
            return refused(503, Retry_After="30")
        time.sleep(0.3)
        return refused(401)

    server.behaviour = late
    started = time.monotonic()
    with pytest.raises(EndpointError, match="401"):
        generator(server, max_concurrency=4, max_backoff=60).generate([Request(str(n)) for n in range(4)])
    assert time.monotonic() - started < 10


# Limits and the report -----------------------------------------------------------------------------------------------


def test_a_window_never_holds_more_than_its_limit() -> None:
    now = [0.0]
    window, stop = RateWindow(3, 10.0, clock=lambda: now[0]), threading.Event()
    for _ in range(3):
        window.take(1, stop)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        window.take(1, stop)
    now[0] = 10.0
    assert window.take(3, threading.Event()) == [10.0, 3]
    now[0] = 20.0
    entry = window.take(50, threading.Event())  # more than the limit passes alone
    entry[1] = 1
    assert window.take(2, threading.Event())[1] == 2


def test_waiting_for_a_window_is_first_come_first_served() -> None:
    window, order = RateWindow(2, 0.15), list[int]()

    def taker(number: int) -> None:
        time.sleep(0.02 * number)
        window.take(2 if number == 1 else 1, threading.Event())
        order.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(taker, range(4)))
    assert order[:2] == [0, 1]


@pytest.mark.parametrize("limit", [{"requests_per_minute": 4}, {"tokens_per_minute": 4 * 50}])
def test_rates_are_kept(server: Server, monkeypatch: pytest.MonkeyPatch, limit: dict[str, int]) -> None:
    monkeypatch.setattr(endpoint, "WINDOW_SECONDS", 0.4)
    times: list[float] = []

    def noted(record: dict[str, Any], number: int) -> Answer:
        times.append(time.monotonic())
        return said(usage=(40, 10))

    server.behaviour = noted
    made = generator(server, max_new_tokens=10, max_concurrency=2, **limit)
    assert all(isinstance(answer, Reply) for answer in made.generate([Request("x" * 24)] * 10))
    for first, fifth in zip(times, times[4:], strict=False):
        assert fifth - first > 0.3
    assert times[-1] - times[0] < 5


def test_the_report_counts_tokens_and_cost(server: Server) -> None:
    answered = [said(usage=None), said("", usage=(5, 0)), said(), refused(400)]
    server.behaviour = lambda record, number: answered[number - 1]
    made = generator(server, price_in=2.0, price_out=10.0, max_concurrency=1)
    answers = made.generate([Request("abc"), Request("x"), Request("y")])
    usage = made.usage
    assert isinstance(answers[0], Reply) and answers[0].prompt_tokens == made.prompt_tokens(Request("abc")) == 33
    assert (usage.requests, usage.answered, usage.retries, usage.failures) == (3, 2, 1, {"http 400": 1})
    assert (usage.prompt_tokens, usage.new_tokens, usage.estimated) == (33 + 5 + 7, 4 + 0 + 3, 1)
    assert usage.cost == pytest.approx((45 * 2 + 7 * 10) / 1e6) and usage.seconds > 0
    assert json.loads(json.dumps(usage.to_dict()))["failures"] == {"http 400": 1}
    assert generator(server).usage.cost is None
    usage.failures["x"] = 1
    assert made.usage.failures == {"http 400": 1}  # what was given out is a copy


def test_identity_names_what_decides_an_answer(server: Server) -> None:
    same = [generator(server, **options).identity for options in ({}, {"seed": 3}, {"timeout": 9.0, "retries": 0})]
    assert len(set(same)) == 1 and len(same[0]) == 16
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 5}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}, {"opening": "prefill"},
    ]  # fmt: skip
    others = [generator(server, **option).identity for option in options]
    others.append(EndpointGenerator(server.url, "other").identity)
    assert len({*same, *others}) == 6
    assert EndpointGenerator(f"{server.url}/chat/completions", "tiny-vlm").identity == same[0]


# Addresses, keys, options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1", "file:///etc/passwd", "host/v1", "", "http://", "http://host:99999/v1", "https://me:pw@host/v1",
        "https://host/v1?api_key=abc", "https://host/v1#x", "https://ho st/v1", "https://host/v1\r\nX: y",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="url: ") as caught:
        EndpointGenerator(url, "m")
    assert "me:pw" not in str(caught.value) and "abc" not in str(caught.value)


def test_a_key_travels_encrypted_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    with pytest.raises(RecipeError, match="not encrypted") as caught:
        EndpointGenerator("http://192.168.0.7/v1", "m", api_key_env="TINY_KEY")
    assert KEY not in str(caught.value)
    for url in ("https://host/v1", "http://localhost:8000/v1", "http://127.0.0.2/v1", "http://[::1]:80/v1"):
        EndpointGenerator(url, "m", api_key_env="TINY_KEY")
    EndpointGenerator("http://192.168.0.7/v1", "m")  # no key, nothing to read


@pytest.mark.parametrize(("variable", "value"), [("EMPTY_KEY", " "), ("BROKEN_KEY", "abc\r\nX: y"), (KEY, "x")])
def test_keys_that_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    if variable != KEY:
        monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match="api_key_env") as caught:
        EndpointGenerator("https://host/v1", "m", api_key_env=variable)
    assert KEY not in str(caught.value) and "abc" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_concurrency": 0}, {"requests_per_minute": 0}, {"tokens_per_minute": 0}, {"retries": -1},
        {"give_up_after": 0}, {"price_in": -1.0}, {"timeout": 0.0}, {"timeout": float("inf")},
        {"backoff": float("nan")}, {"max_new_tokens": 0}, {"temperature": -0.1}, {"opening": "shout"},
        {"limit_field": "n"}, {"max_prompt_tokens": 0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(options))}: found .*expected"):
        EndpointGenerator("https://host/v1", "m", **options)
