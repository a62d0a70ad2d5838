"""Every prompt file that ships renders, phrasing by phrasing, to a stored text.

After a deliberate change of wording: LLMREC_WRITE_RENDERINGS=1 pytest tests/test_prompts.py, then read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmrec.assets import asset_names
from llmrec.data.prompts import PromptTemplate, SlotRef, render_next_item, segments_to_text

STORED = Path(__file__).resolve().parent / "fixtures" / "prompts"
NEXT_ITEM = [name for name in asset_names("prompts") if name.startswith("next_item/")]
HISTORY = [(1, "First, Item (1999)"), (2, 'The "Second" <Item> & {{ more }}'), (3, "Dritter Gegenstand: ä")]
CANDIDATES = [(4, "Fourth"), (2, 'The "Second" <Item> & {{ more }}'), (5, "Fifth")]
WRITE = os.environ.get("LLMREC_WRITE_RENDERINGS") == "1"


def rendered(template: PromptTemplate) -> str:
    """All phrasings, open and with candidates, as text and with visible slots."""
    parts = []
    for variant in template.variants:
        for shown in ((), CANDIDATES):
            for marker in ("", "<slot>"):
                segments = render_next_item(template, variant, HISTORY, shown, user_slot=bool(marker))
                title = f"variant {variant}, {len(shown)} candidates, {'hybrid' if marker else 'text'}"
                parts.append(f"=== {title}\n{segments_to_text(segments, marker)}\n")
    return "\n".join(parts)


def test_the_five_domains_are_there():
    assert {name.split("/")[1] for name in NEXT_ITEM} >= {"movie", "book", "product", "game", "music"}


@pytest.mark.parametrize("name", asset_names("prompts"))
def test_header_and_blocks_agree(name):
    template = PromptTemplate.load(name)
    assert template.variants and template.variables
    assert "source:" in template.source.split("#}")[0]


@pytest.mark.parametrize("name", NEXT_ITEM)
def test_renders_to_the_stored_text(name):
    template, path = PromptTemplate.load(name), STORED / f"{name.replace('/', '__')}.txt"
    if WRITE:
        path.write_text(rendered(template), encoding="utf-8")
    assert rendered(template) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NEXT_ITEM)
def test_every_phrasing_has_what_a_prompt_needs(name):
    template = PromptTemplate.load(name)
    assert len(template.variants) >= 4
    texts = set()
    for variant in template.variants:
        segments = render_next_item(template, variant, HISTORY, CANDIDATES, user_slot=True)
        kinds = [part.kind for part in segments if isinstance(part, SlotRef)]
        assert sorted(kinds) == ["candidate"] * 3 + ["history"] * 3 + ["user"]
        text = segments_to_text(render_next_item(template, variant, HISTORY, CANDIDATES))
        assert text.endswith(":"), "the answer follows with a blank of its own"
        assert all(text.count(title) >= 1 for _, title in HISTORY + CANDIDATES)
        assert "  " not in text and " ," not in text and "\n\n" not in text
        open_question = segments_to_text(render_next_item(template, variant, HISTORY))
        assert "Fourth" not in open_question and text != open_question
        texts.add(text)
    assert len(texts) == len(template.variants)


def summarize_prompts() -> dict[str, str]:
    """The prompts of the summarizers, first and later blocks, first and second attempts."""
    image, block = (PromptTemplate.load(f"summarize/{name}") for name in ("item_image", "user_block"))
    items = [
        {"title": title, "text": text} for (_, title), text in zip(HISTORY, ("A red ring.", "", "{{ x }}"), strict=True)
    ]
    images = [
        image.render(1, noun="film poster", known=known, again=again)
        for known in ("", "First, Item (1999)")
        for again in (False, True)
    ]
    blocks = [
        block.render(1, items=items, previous=previous, opening="This customer likes", again=again)
        for previous in ("", "This customer likes rings.")
        for again in (False, True)
    ]
    return {"item_image": "\n===\n".join(images) + "\n", "user_block": "\n===\n".join(blocks) + "\n"}


@pytest.mark.parametrize("name", ["item_image", "user_block"])
def test_prompts_of_summarizers_render_to_the_stored_text(name):
    text, path = summarize_prompts()[name], STORED / f"summarize__{name}.txt"
    if WRITE:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    assert "\n\n" not in text and "  " not in text, "no holes where a part is left out"
