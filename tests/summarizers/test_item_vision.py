"""Texts of pictures: what is asked, what is refused without asking, and what is counted."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from llmrec.assets import find_asset
from llmrec.data.dataset import InteractionDataset
from llmrec.data.item_images import draw_item
from llmrec.errors import RecipeError
from llmrec.llm.generating import Failure, Reply
from llmrec.summarizers.base import ItemContent, Written
from llmrec.summarizers.item_vision import ItemVision
from llmrec.summarizers.jobs import Tally, write_item_texts
from llmrec.summarizers.store import TextStore
from tests.summarizers.stubs import Stub, shop

RED, BLUE = draw_item(0, 0, 0), draw_item(1, 5, 1)


def pictured(*images: bytes | None) -> InteractionDataset:
    base = shop([[1, 1]], items=len(images))
    items = base.items.append_column("image", pa.array(images, pa.binary()))
    return InteractionDataset(base.interactions, items, base.users, base.meta)


def write(
    dataset: InteractionDataset, folder: Path, stub: Stub, summarizer: ItemVision | None = None
) -> tuple[dict[int, Written], Tally]:
    tally = Tally()
    with TextStore(folder) as store:
        texts = write_item_texts(
            dataset, range(1, dataset.num_items + 1), summarizer or ItemVision(), stub, store, batch=3,
            tell=lambda *_: None, tally=tally,
        )  # fmt: skip
    return texts, tally


def test_every_item_has_an_outcome_and_damage_stops_nobody(tmp_path: Path) -> None:
    stub = Stub(lambda request: f"A picture of {len(request.images[0])} bytes.")
    texts, _ = write(pictured(RED, None, b"", b"no picture", RED[:60], BLUE), tmp_path, stub)
    assert [texts[item].status for item in range(1, 7)] == ["ok", "missing", "broken", "broken", "broken", "ok"]
    assert [request.images for request in stub.asked] == [(RED,), (BLUE,)]
    assert texts[6].text == f"A picture of {len(BLUE)} bytes." and texts[2].reason == "no picture"
    assert all(texts[item].reason.startswith("the picture") for item in (3, 4, 5))


def test_one_picture_is_asked_about_once(tmp_path: Path) -> None:
    dataset, stub = pictured(RED, BLUE, RED, RED, BLUE), Stub(lambda request: "Something round.")
    _, tally = write(dataset, tmp_path, stub)
    assert len(stub.asked) == 2 and (tally.asked, tally.cached) == (2, 0)
    again = Stub()
    texts, tally = write(dataset, tmp_path, again)
    assert again.asked == [] and tally.cached == 2 and texts[5].text == "Something round."


def test_the_title_is_not_shown_unless_asked_for(tmp_path: Path) -> None:
    stub = Stub(lambda request: "Round.")
    write(pictured(RED), tmp_path, stub, ItemVision(noun="film poster"))
    write(pictured(RED), tmp_path, stub, ItemVision(noun="film poster", known="{title}"))
    assert "film poster" in stub.asked[0].text and "Title1." not in stub.asked[0].text
    assert "Title1." in stub.asked[1].text, "other words, another text"


def test_failures_are_told_apart_and_counted(tmp_path: Path) -> None:
    answers = {RED: "", BLUE: Failure("busy", transient=True)}
    texts, tally = write(pictured(RED, BLUE), tmp_path, Stub(lambda request: answers[request.images[0]]))
    assert [(texts[n].status, texts[n].reason) for n in (1, 2)] == [("failed", "empty answer"), ("unfinished", "busy")]
    assert tally.marks == {"retried": 1}
    stub = Stub(lambda request: "Blue.")
    texts, _ = write(pictured(RED, BLUE), tmp_path, stub)
    assert [request.images for request in stub.asked] == [(BLUE,)] and texts[2].text == "Blue."
    with TextStore(tmp_path, retry_failed=True) as store:
        assert len(store) == 1
    refused = Stub(lambda request: Failure("too long", transient=False))
    texts, _ = write(pictured(draw_item(3, 3, 3)), tmp_path, refused)
    assert texts[1].status == "failed" and texts[1].reason == "too long" and refused.calls == [1, 1]


def test_an_empty_answer_is_asked_for_once_more(tmp_path: Path) -> None:
    stub = Stub(lambda request: "Red at last." if "was empty" in request.text else " \n")
    texts, tally = write(pictured(RED), tmp_path, stub)
    assert texts[1] == Written("Red at last.", "ok", "", texts[1].prompt_tokens, 3, ("retried",))
    assert texts[1].prompt_tokens == sum(len(request.text.split()) for request in stub.asked) and tally.marks


def test_long_and_cut_texts_end_after_a_sentence(tmp_path: Path) -> None:
    stub = Stub(lambda request: "A red ring. " * 30)
    texts, tally = write(pictured(RED), tmp_path, stub, ItemVision(max_text_tokens=10))
    assert texts[1].text == "A red ring. A red ring. A red ring." and tally.marks == {"text_shortened": 1}
    texts, tally = write(
        pictured(BLUE), tmp_path, Stub(lambda request: Reply("A blue square. It is pai", 1, 1, "length"))
    )
    assert texts[1].text == "A blue square." and tally.marks == {"cut_by_model": 1}


def test_version(tmp_path: Path) -> None:
    changed = tmp_path / "mine.jinja"
    source = find_asset("prompts", "summarize/item_image").read_text(encoding="utf-8")
    changed.write_text(source.replace("Describe", "Tell"), encoding="utf-8")
    versions = {
        ItemVision().version(Stub()), ItemVision(prompt=str(changed)).version(Stub()),
        ItemVision(noun="poster").version(Stub()), ItemVision().version(Stub(identity="x")),
    }  # fmt: skip
    assert len(versions) == 4
    content = ItemContent(1, "", RED)
    keys = {ItemVision().item_key(one, "v") for one in (content, ItemContent(2, "", RED), ItemContent(1, "", BLUE))}
    assert len(keys) == 2, "the picture counts, not the number of the item"


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="max_text_tokens: found 2, expected at least 8"):
        ItemVision(max_text_tokens=2)
    with pytest.raises(RecipeError, match="declares again, items, opening, previous; expected again, known, noun"):
        ItemVision(prompt="summarize/user_block")
    with pytest.raises(RecipeError, match="--model"):
        ItemVision().write_items([ItemContent(1, "", RED)], None)
    with pytest.raises(RecipeError, match="writes no texts of users"):
        ItemVision().write_users([], Stub())
