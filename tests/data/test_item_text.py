from __future__ import annotations

import pyarrow as pa
import pytest

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.data.item_text import ItemTextSpec, item_text, move_article, preview, same_title_key, title_texts
from llmrec.errors import DataError, RecipeError


def catalogue(**columns):
    count = len(next(iter(columns.values())))
    ids = pa.array(range(1, count + 1), pa.int64())
    items = pa.table({"item": ids, "key": [f"k{i}" for i in range(1, count + 1)], **columns})
    interactions = pa.table({"user": [1], "item": [1], "order": [0], "split": ["train"]})
    users = pa.table({"user": [1], "key": ["u"]})
    return InteractionDataset(interactions, items, users, DatasetMeta("hand made", "table", "given"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Haine, La (Hate) (1995)", "La Haine (Hate) (1995)"),
        (
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            "The City of Lost Children (La Cité des enfants perdus) (1995)",
        ),
        ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly (1966)"),
        ("Auberge, L' (2002)", "L'Auberge (2002)"),
        ("African Queen, The", "The African Queen"),
        ("Me, Myself (2000)", "Me, Myself (2000)"),
        ("Theodore Rex, Then (1995)", "Theodore Rex, Then (1995)"),
        ("Very Natural Thing, A (1974)", "A Very Natural Thing (1974)"),
    ],
)
def test_trailing_articles_move_to_the_front(before, after):
    assert move_article(before) == after
    assert move_article(after) == after


def test_fields_optional_parts_and_lists():
    spec = ItemTextSpec("{title}[ by {brand}][; kinds: {categories}]")
    assert spec.fields == ("title", "brand", "categories")
    data = catalogue(title=["Lamp", "Rope", None], brand=["Acme", None, "Acme"], categories=[["a", "b"], [], ["c"]])
    assert title_texts(data, spec) == ["", "Lamp by Acme; kinds: a, b", "Rope", "by Acme; kinds: c"]
    assert title_texts(data, ItemTextSpec("{title}")) == ["", "Lamp", "Rope", "k3"], "an empty text becomes the key"
    assert item_text({"title": "Lamp", "brand": "", "categories": None}, spec) == "Lamp"
    with pytest.raises(DataError, match="item record lacks brand"):
        item_text({"title": "Lamp", "categories": None}, spec)


def test_titles_become_single_lines_of_limited_length():
    data = catalogue(title=["  one\n two\tthree  ", "word " * 100, "x" * 300])
    texts = title_texts(data, ItemTextSpec(max_chars=40))
    assert texts[1] == "one two three"
    assert texts[2] == ("word " * 8).strip() and texts[3] == "x" * 40
    assert title_texts(data, ItemTextSpec(max_chars=None))[3] == "x" * 300


def test_years_are_dropped_only_at_the_end():
    data = catalogue(title=["Alien (1979)", "2001: A Space Odyssey (1968)", "(1999)", "Blade (2049) Runner"])
    texts = title_texts(data, ItemTextSpec(drop_year=True))
    assert texts[1:] == ["Alien", "2001: A Space Odyssey", "(1999)", "Blade (2049) Runner"]


def test_titles_that_read_alike_are_told_apart():
    titles = ["Alien", "ALIEN!", "Alien (2)", "alien", "Other"]
    texts = title_texts(catalogue(title=titles))[1:]
    assert texts[0] == "Alien" and texts[2] == "Alien (2)" and texts[4] == "Other"
    assert texts[1] == "ALIEN! (3)" and texts[3] == "alien (4)"
    assert len({same_title_key(text) for text in texts}) == 5
    assert title_texts(catalogue(title=titles), ItemTextSpec(unique=False))[1:] == titles


def test_numbers_stay_within_the_length():
    texts = title_texts(catalogue(title=["a" * 50] * 1200), ItemTextSpec(max_chars=20))[1:]
    assert len(set(texts)) == 1200 and max(map(len, texts)) == 20


def test_no_titles_at_all():
    assert title_texts(catalogue(brand=["x", "y"])) == ["", "k1", "k2"]


def test_wrong_specifications_are_named():
    with pytest.raises(RecipeError, match="column 'colour', which data set 'hand made' lacks; its items have: item"):
        title_texts(catalogue(title=["a"]), ItemTextSpec("{colour}"))
    with pytest.raises(RecipeError, match="names no field"):
        ItemTextSpec("nothing")
    with pytest.raises(RecipeError, match="braces hold a column name"):
        ItemTextSpec("{title.__class__}")
    with pytest.raises(RecipeError, match="cannot be read"):
        ItemTextSpec("{title")
    with pytest.raises(RecipeError, match="at least 8 characters"):
        ItemTextSpec(max_chars=3)


def test_preview_spreads_over_the_catalogue():
    rows = preview(catalogue(title=[f"T{i}" for i in range(1, 12)]), rows=3)
    assert rows == [{"key": "k1", "text": "T1"}, {"key": "k6", "text": "T6"}, {"key": "k11", "text": "T11"}]
    assert len(preview(catalogue(title=["only"]), rows=5)) == 1


def test_movielens_titles(test_data):
    import pyarrow.parquet as pq

    titles = pq.read_table(test_data / "ml-100k" / "items.parquet").column("title").to_pylist()
    texts = title_texts(catalogue(title=titles), ItemTextSpec(move_article=True))[1:]
    moved = [text for title, text in zip(titles, texts, strict=True) if title != text]
    assert len(moved) > 300 and not [text for text in texts if ", The (" in text]
    assert "The Good, The Bad and The Ugly (1966)" in texts
    assert len(set(map(same_title_key, texts))) == len(titles)
