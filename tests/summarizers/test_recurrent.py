"""Leakage, recurrence, shared prefixes, failures and budgets of the users' texts, by a generator that echoes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.assets import find_asset
from llmrec.data.dataset import InteractionDataset
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.data.summaries import UserText
from llmrec.errors import RecipeError
from llmrec.llm.endpoint import EndpointError
from llmrec.llm.generating import Failure, Reply
from llmrec.summarizers.base import ItemLine, UserStep, Written
from llmrec.summarizers.jobs import History, Tally, held_out_histories, write_user_texts
from llmrec.summarizers.recurrent import Recurrent
from llmrec.summarizers.store import TextStore
from tests.summarizers.stubs import Stub, echo, shop, short

LINES = [ItemLine(f"Title{item}.", f"looks{item} fine") for item in range(40)]


@pytest.fixture(scope="module")
def dataset() -> InteractionDataset:
    options = PrepareOptions(source_options={"users": 12, "items": 60, "events_per_user": 9})
    return prepare_source("synthetic", options).dataset


def history(*items: int, user: int = 1) -> History:
    return History(user, "test", 0, items)


def write(
    histories: Sequence[History], folder: Path, stub: Stub | None = None, summarizer: Recurrent | None = None,
    batch: int = 4, lines: Sequence[ItemLine] = LINES,
) -> tuple[list[UserText], Stub, Tally]:  # fmt: skip
    stub, tally = stub or Stub(), Tally()
    with TextStore(folder) as store:
        texts = write_user_texts(
            histories, lines, summarizer or Recurrent(), stub, store, batch=batch, tell=lambda *_: None, tally=tally
        )
    return texts, stub, tally


# Card, property 1 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_target_is_in_no_prompt_and_in_no_text(split: str, dataset: InteractionDataset, tmp_path: Path) -> None:
    summarizer = Recurrent(max_state_tokens=4000)
    lines = summarizer.lines(dataset, {item: f"seenas{item}" for item in range(1, 61)})
    found = held_out_histories(dataset, [split], max_history=30, block_size=3)
    assert len(found) == 12
    for one in found:
        texts, stub, _ = write([one], tmp_path / str(one.user), Stub(echo), summarizer, lines=lines)
        rows = dataset.interactions.slice(one.example).to_pylist()
        later = [row["item"] for row in rows if row["user"] == one.user]
        assert set(one.items).isdisjoint(later)
        read = " ".join([*(request.text for request in stub.asked), texts[0].text])
        for item in later:
            assert lines[item].title not in read and f"seenas{item} " not in f"{read} "
        assert all(lines[item].title in read for item in one.items), "the search would find a title"


# Property 2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("events", "size"), [(1, 3), (3, 3), (4, 3), (7, 2), (5, 9)])
def test_one_call_a_block_with_the_previous_text_verbatim(events: int, size: int, tmp_path: Path) -> None:
    items = tuple(range(1, events + 1))
    texts, stub, _ = write([history(*items)], tmp_path, summarizer=Recurrent(block_size=size))
    assert len(stub.asked) == math.ceil(events / size) == texts[0].blocks
    previous = ""
    for number, request in enumerate(stub.asked):
        block = items[number * size : (number + 1) * size]
        assert previous in request.text
        shown = [item for item in range(40) if f"Title{item}." in request.text]
        assert tuple(shown) == block, "the items of the block and no others"
        assert f"1. Title{block[0]}.: looks{block[0]} fine" in request.text, "numbers begin anew in each block"
        assert request.opening == "This customer likes"
        previous = short(request)
    assert texts[0].text == previous, "the last text replaces the others"


def test_a_block_of_everything_is_the_direct_call(tmp_path: Path) -> None:
    direct, asked, _ = write([history(1, 2, 3, 4, 5)], tmp_path, summarizer=Recurrent(mode="direct"))
    one, again, tally = write([history(1, 2, 3, 4, 5)], tmp_path, summarizer=Recurrent(block_size=5))
    assert len(asked.asked) == 1 and again.asked == [] and tally.cached == 1 and one == direct
    fresh, single, _ = write([history(1, 2, 3, 4, 5)], tmp_path / "new", summarizer=Recurrent(block_size=8))
    assert single.asked == asked.asked and fresh == direct


# Property 3 ----------------------------------------------------------------------------------------------------------


def test_later_items_change_no_earlier_text_and_shared_blocks_are_read(tmp_path: Path) -> None:
    first, _, _ = write([history(1, 2, 3, 4, 5, 6)], tmp_path)
    more, stub, tally = write([history(1, 2, 3, 4, 5, 6, 7), history(1, 2, 3, 9, 8, 7)], tmp_path)
    assert (tally.cached, tally.asked) == (2, 2) and len(stub.asked) == 2
    assert first[0].text in stub.asked[1].text and "Title7." in stub.asked[1].text
    assert more[0].text != more[1].text


def test_users_go_forward_together_and_share_beginnings(tmp_path: Path) -> None:
    rows = [history(*range(n, n + 7), user=n) for n in range(1, 6)] + [history(*range(1, 8), user=9)]
    texts, stub, tally = write(rows, tmp_path, batch=3)
    assert stub.calls == [3, 2, 3, 2, 3, 2], "step 0 of all users in batches, then step 1 of all"
    assert texts[5].text == texts[0].text and texts[5].user == 9 and tally.asked == 15


# Property 9 ----------------------------------------------------------------------------------------------------------


def test_a_changed_prompt_or_model_reads_no_old_text(tmp_path: Path) -> None:
    changed = tmp_path / "mine.jinja"
    source = find_asset("prompts", "summarize/user_block").read_text(encoding="utf-8")
    changed.write_text(source.replace("short paragraph", "brief paragraph"), encoding="utf-8")
    versions = [
        Recurrent().version(Stub()),
        Recurrent(prompt=str(changed)).version(Stub()),
        Recurrent().version(Stub(identity="other")),
        Recurrent(opening="They like").version(Stub()),
        Recurrent(max_state_tokens=20).version(Stub()),
    ]
    assert len(set(versions)) == 5
    assert Recurrent(block_size=5, mode="direct").version(Stub()) == versions[0], "steps, not words"
    write([history(1, 2, 3)], tmp_path / "store")
    _, stub, tally = write([history(1, 2, 3)], tmp_path / "store", summarizer=Recurrent(prompt=str(changed)))
    assert len(stub.asked) == 1 and tally.cached == 0 and "brief paragraph" in stub.asked[0].text


# Property 10 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", ["Sure! This customer likes tea.", "This customer likes", "This customer likes ...", ""]
)
def test_an_answer_that_breaks_the_rule_is_asked_for_once_more(wrong: str, tmp_path: Path) -> None:
    stub = Stub(lambda request: short(request) if "last answer" in request.text else wrong)
    texts, stub, tally = write([history(1, 2, 3)], tmp_path, stub)
    assert stub.calls == [1, 1] and texts[0].status == "ok" and tally.marks == {"retried": 1}
    assert tally.tokens["prompt"] == sum(len(request.text.split()) for request in stub.asked), "both are paid for"


def test_where_it_fails_twice_the_previous_text_stands_and_is_counted(tmp_path: Path) -> None:
    stub = Stub(lambda request: "No." if "Title5." in request.text else short(request))
    texts, stub, tally = write([history(1, 2, 3, 4, 5, 6, 7), history(5)], tmp_path, stub)
    assert [(row.status, bool(row.text)) for row in texts] == [("partial", True), ("failed", False)]
    assert "does not begin with 'This customer likes'" in texts[0].reason
    assert short(stub.asked[0]) in stub.asked[-1].text and "Title7." in stub.asked[-1].text
    assert tally.marks == {"retried": 2}
    _, again, _ = write([history(1, 2, 3, 4, 5, 6, 7), history(5)], tmp_path, stub=Stub())
    assert again.asked == [], "a failure is an outcome"


def test_a_passing_failure_ends_the_user_for_now_and_is_not_stored(tmp_path: Path) -> None:
    down = Stub(lambda request: Failure("busy", transient=True) if "Title5." in request.text else short(request))
    rows = [history(1, 2, 3, 4, 5, 6, 7), history(8, 9)]
    texts, stub, _ = write(rows, tmp_path, down)
    assert [(row.status, row.reason) for row in texts] == [("unfinished", "busy"), ("ok", "")]
    assert texts[0].text == short(stub.asked[0]) and not any("Title7." in request.text for request in stub.asked)
    texts, stub, tally = write(rows, tmp_path)
    assert (tally.cached, tally.asked) == (2, 2) and texts[0].status == "ok"


def test_what_an_endpoint_answered_before_it_died_is_kept(tmp_path: Path) -> None:
    class Dying(Stub):
        def generate(self, requests: Sequence[Any]) -> list[Any]:
            answers = super().generate(requests)
            raise EndpointError("gone", [answers[0], *([None] * (len(requests) - 1))] if len(self.calls) == 1 else [])

    rows = [history(1), history(2), history(3)]
    with pytest.raises(EndpointError, match="gone"):
        write(rows, tmp_path, Dying(), batch=2)
    _, stub, tally = write(rows, tmp_path)
    assert (tally.cached, len(stub.asked)) == (1, 2)


def test_a_lasting_failure_keeps_the_previous_text(tmp_path: Path) -> None:
    stub = Stub(lambda request: Failure("refused", transient=False) if "Title5." in request.text else short(request))
    texts, _, _ = write([history(1, 2, 3, 4, 5)], tmp_path, stub)
    assert (texts[0].status, texts[0].reason) == ("partial", "refused")


def test_a_long_text_is_cut_after_a_sentence_and_counted(tmp_path: Path) -> None:
    long = Stub(lambda request: f"{request.opening} red and blue. " + "And so on it goes. " * 20)
    texts, _, tally = write([history(1)], tmp_path, long, Recurrent(max_state_tokens=20))
    assert len(texts[0].text.split()) <= 20 and texts[0].text.endswith(".") and tally.marks == {"text_shortened": 1}
    cut = Stub(lambda request: Reply(f"{request.opening} many red things. And al", 5, 6, "length"))
    texts, _, tally = write([history(2)], tmp_path, cut)
    assert texts[0].text == "This customer likes many red things." and tally.marks == {"cut_by_model": 1}


# Budget --------------------------------------------------------------------------------------------------------------


def step(previous: str, *texts: str) -> UserStep:
    return UserStep(previous, tuple(ItemLine(f"Title{n}.", text) for n, text in enumerate(texts)))


def written(stub: Stub, given: UserStep) -> Written:
    return Recurrent().write_users([given], stub)[0]


def test_long_item_texts_give_way_first_and_no_prompt_is_too_long() -> None:
    given = step("Known taste.", "a b c", "w " * 200, "v " * 90)
    free = Stub()
    written(free, given)
    bare = len(free.asked[0].text.split()) - 200 - 90
    stub = Stub(limit=bare + 60)
    done = written(stub, given)
    prompt = stub.asked[0].text
    assert done.marks == ("items_shortened",) and len(prompt.split()) == stub.max_prompt_tokens
    assert (
        "a b c" in prompt and prompt.split().count("w") == prompt.split().count("v") == 30 and "Known taste." in prompt
    )
    assert written(Stub(limit=bare + 290), given).marks == ()


def test_then_the_previous_text_and_titles_never() -> None:
    given = step("word " * 100, "a b c", "d e f")
    free = Stub()
    written(free, given)
    whole = len(free.asked[0].text.split())
    stub = Stub(limit=whole - 40)
    done = written(stub, given)
    assert done.marks == ("items_shortened", "previous_shortened")
    prompt = stub.asked[0].text
    assert len(prompt.split()) == whole - 40 and "a b c" not in prompt and "Title1." in prompt
    tight = Stub(limit=20)
    kept = written(tight, given)
    assert tight.asked == [] and kept.status == "kept" and kept.text == given.previous and "20 prompt" in kept.reason


# Property 11 ---------------------------------------------------------------------------------------------------------


def test_switches_change_their_part_alone(tmp_path: Path) -> None:
    row = [history(1, 2, 3, 4, 5, 6, 7)]
    shown: dict[str, list[str]] = {}
    for mode in ("recurrent", "direct", "last_block"):
        _, stub, _ = write(row, tmp_path / mode, summarizer=Recurrent(mode=mode))  # type: ignore[arg-type]
        shown[mode] = [request.text for request in stub.asked]
    assert [len(shown[mode]) for mode in shown] == [3, 1, 1]
    assert all(f"Title{item}." in shown["direct"][0] for item in range(1, 8))
    last = [item for item in range(1, 8) if f"Title{item}." in shown["last_block"][0]]
    assert last == [5, 6, 7] and "was known" not in shown["last_block"][0], "a full block, and nothing before it"


def test_item_summaries_can_be_left_out(tmp_path: Path) -> None:
    dataset = shop([[1, 2, 3, 4]])
    on, off = (Recurrent(item_summaries=flag).lines(dataset, {2: "red\nand round"}) for flag in (True, False))
    assert on[2] == ItemLine("Title2.", "red and round") and on[1] == off[1] == ItemLine("Title1.")
    assert off == [replace(line, text="") for line in on]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size: found 0, expected at least 1"),
        ({"max_state_tokens": 3}, "max_state_tokens: found 3"),
        ({"mode": "both"}, "mode: found 'both', expected recurrent, direct, last_block"),
        ({"opening": " "}, "opening: found nothing"),
        ({"prompt": "next_item/movie"}, "declares candidates, history, user; expected again, items"),
        ({"prompt": "summarize/user_blok"}, "user_block"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recurrent(**options)


def test_without_a_model() -> None:
    with pytest.raises(RecipeError, match="--model"):
        Recurrent().write_users([step("", "a")], None)


def test_spans_cover_every_event_once() -> None:
    for events in np.random.default_rng(0).integers(0, 40, 20):
        spans = Recurrent(block_size=4).spans(int(events))
        assert [place for start, end in spans for place in range(start, end)] == list(range(events))
