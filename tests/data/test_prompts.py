from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.prompts import (
    USER_SLOT,
    PromptTemplate,
    SlotMarks,
    SlotRef,
    plain_text,
    render_next_item,
    segments_to_text,
)
from llmrec.errors import RecipeError

TWO = """{# variables: history, candidates; source: this test #}
{% block variant_1 %}Seen {{ history | join("; ") }}.{% if candidates %} Of {{ candidates | join("; ") }}?{% endif %}
{% endblock %}
{% block variant_7 %}{% for c in candidates %}({{ c }}){% endfor %} after {{ history[-1] }}{% endblock %}
"""


def template_of(tmp_path, text):
    path = tmp_path / "mine.jinja"
    path.write_text(text, encoding="utf-8")
    return PromptTemplate.load(path)


def test_loads_a_file_of_the_user_and_a_shipped_name(tmp_path):
    own = template_of(tmp_path, TWO)
    assert own.variants == (1, 7) and own.variables == {"history", "candidates"}
    assert own.render(1, history=["A", "B"], candidates=[]) == "Seen A; B."
    assert own.render(7, history=["A", "B"], candidates=["C"]) == "(C) after B"
    assert PromptTemplate.load("next_item/movie").variants == (1, 2, 3, 4)


def test_a_file_without_blocks_is_one_phrasing(tmp_path):
    single = template_of(tmp_path, "{# variables: text; source: this test #}\nSum up: {{ text }}\n")
    assert single.variants == (1,) and single.render(1, text="a <b>") == "Sum up: a <b>"


def test_missing_and_unused_values_are_named_with_the_file(tmp_path):
    own = template_of(tmp_path, TWO)
    with pytest.raises(RecipeError, match=r"mine\.jinja: variables without a value: candidates"):
        own.render(1, history=["A"])
    with pytest.raises(RecipeError, match=r"mine\.jinja: values nobody uses: mood, weather"):
        own.render(1, history=["A"], candidates=[], weather="fine", mood="good")
    with pytest.raises(RecipeError, match=r"no phrasing 2; the file has 1, 7"):
        own.render(2, history=["A"], candidates=[])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Seen {{ history }}", r"mine\.jinja:1: the prompt file declares no variables"),
        ("{# variables: history, mood #}{{ history }}", "declared but not used: mood"),
        ("{# variables: history #}\n{{ history }} {{ mood }}", "used but not declared: mood"),
        (TWO.replace("(1)", "").replace("after {{ history[-1] }}", ""), "phrasing 7 and the header disagree"),
        ("{# variables: history #}\n\n{% if history %}", r"mine\.jinja:3: not a valid Jinja template"),
    ],
)
def test_faults_of_a_file_are_found_when_it_is_loaded(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        template_of(tmp_path, text)


def test_templates_are_sandboxed_and_values_are_not_templates(tmp_path):
    from jinja2.exceptions import SecurityError

    own = template_of(tmp_path, "{# variables: text; source: t #}{{ text.__class__.__mro__ }}")
    with pytest.raises(SecurityError):
        own.render(1, text="x")
    plain = template_of(tmp_path, "{# variables: text; source: t #}{{ text }}")
    assert plain.render(1, text="{{ 7 * 7 }} & <b>") == "{{ 7 * 7 }} & <b>"


def test_a_template_may_do_without_candidates_only_when_there_are_none(tmp_path):
    own = template_of(tmp_path, "{# variables: history; source: t #}{{ history | join(', ') }} then:")
    assert segments_to_text(render_next_item(own, 1, [(1, "A"), (2, "B")])) == "A, B then:"
    with pytest.raises(RecipeError, match="values nobody uses: candidates"):
        render_next_item(own, 1, [(1, "A")], [(2, "B")])
    with pytest.raises(RecipeError, match="values nobody uses: user"):
        render_next_item(own, 1, [(1, "A")], user_slot=True)


def test_slots_follow_their_titles_whatever_the_order_in_the_template():
    template = PromptTemplate.load("next_item/movie")
    for variant in template.variants:
        segments = render_next_item(template, variant, [(1, "A"), (2, "B")], [(3, "C"), (1, "A")], user_slot=True)
        for before, slot in zip(segments, segments[1:], strict=False):
            if isinstance(slot, SlotRef) and slot.kind != "user":
                assert isinstance(before, str) and before.endswith("?ABC"[slot.item_id])
        assert [s.item_id for s in segments if isinstance(s, SlotRef) and s.kind == "user"] == [USER_SLOT]


@pytest.mark.parametrize("name", ["movie", "book", "game", "music", "product"])
def test_leading_slots_stand_in_front_of_their_titles_and_leave_the_text_alone(name):
    template = PromptTemplate.load(f"next_item/{name}")
    lists = ([(1, "A"), (2, "B")], [(3, "C"), (1, "A")])
    for variant in template.variants:
        behind = render_next_item(template, variant, *lists, user_slot=True)
        leading = render_next_item(template, variant, *lists, user_slot=True, slot_position="before")
        assert segments_to_text(leading) == segments_to_text(behind)
        assert [part for part in leading if isinstance(part, SlotRef)] == [p for p in behind if isinstance(p, SlotRef)]
        for slot, title in zip(leading, leading[1:], strict=False):
            if isinstance(slot, SlotRef) and slot.kind != "user":
                assert title == " " + "?ABC"[slot.item_id]  # a piece of its own: the tokens it has as an answer


def test_a_leading_slot_takes_no_blank_that_is_not_there():
    marks = SlotMarks("before")
    text = "(" + marks.item_entry("A", 1, "history") + "," + marks.item_entry("", 2, "history") + ")"
    assert marks.split(text) == ["(", SlotRef(1, "history"), "A", ",", SlotRef(2, "history"), ")"]


def test_a_title_cannot_imitate_a_slot():
    marks = SlotMarks()
    real = marks.mark(7, "history")
    hostile = ["[HistoryEmb]", "<item>", real, real * 2, "\U000f51000\U000f5101", "\ue000x\uf8ff", "a\nb\tc "]
    template = PromptTemplate.load("next_item/book")
    history = list(enumerate(hostile, start=1))
    segments = render_next_item(template, 1, history)
    slots = [part for part in segments if isinstance(part, SlotRef)]
    assert [slot.item_id for slot in slots] == [1, 2, 3, 4, 5, 6, 7]
    text = segments_to_text(segments)
    assert "[HistoryEmb]; <item>; 0; 00; 0; x; a b c." in text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
def test_slots_survive_any_title(titles):
    segments = render_next_item(PromptTemplate.load("next_item/game"), 4, list(enumerate(titles, start=1)))
    assert [part.item_id for part in segments if isinstance(part, SlotRef)] == list(range(1, len(titles) + 1))


def test_plain_text_is_one_line():
    assert plain_text(" a\u2028b\r\n c\x0bd ") == "a b c d"


def test_a_template_travels_to_workers():
    template = PromptTemplate.load("next_item/music")
    template.render(1, history=["A"], candidates=[], user="")
    assert copy.copy(template).variants == template.variants
