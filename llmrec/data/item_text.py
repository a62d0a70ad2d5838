"""An item record as one line of text: which fields, in which words, how long, and never the same text twice."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrec.data.prompts import plain_text
from llmrec.data.schema import KEY, TITLE
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset

# "Matrix, The (1999)": the article stands behind the title proper, before a bracket or the end.
_ARTICLES = "The|A|An|Les|Le|La|L'|Il|Lo|Gli|El|Los|Las|Der|Die|Das|Den|Det|Het|Een|Ein|Eine|Un|Une|Una"
_TRAILING_ARTICLE = re.compile(rf"(^|\()([^()]*?), ({_ARTICLES})(?=\s*(?:[()]|$))")
_YEAR = re.compile(r"\s*\((?:1[89]|20)[0-9]{2}\)\s*$")
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
_NO_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class ItemTextSpec:
    """How items are written.

    Args:
        template: Text with the names of item columns in braces. A part in square brackets is left out for items
            that lack one of its fields: "{title}[ by {brand}]".
        max_chars: Longest text; a longer one is cut at a word where possible. None keeps everything.
        move_article: Write "The Matrix (1999)" for "Matrix, The (1999)", as MovieLens files have it.
        drop_year: Leave out a year in brackets at the end of a title.
        unique: Give texts that differ in letter case or punctuation at most a number, " (2)", " (3)", by item id;
            an answer then names one item only.
    """

    template: str = "{title}"
    max_chars: int | None = 200
    move_article: bool = False
    drop_year: bool = False
    unique: bool = True

    def __post_init__(self) -> None:
        if self.max_chars is not None and self.max_chars < 8:
            raise RecipeError(f"max_chars is {self.max_chars}; item texts need room for at least 8 characters")
        if not self.fields:
            raise RecipeError(f"item text template {self.template!r} names no field; expected one such as {{title}}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns the template names, each once."""
        return tuple(dict.fromkeys(_fields_of(_OPTIONAL.sub(r"\1", self.template))))


def title_texts(dataset: InteractionDataset, spec: ItemTextSpec | None = None) -> list[str]:
    """The text of every item; index = item id, entry 0 is empty.

    An item whose template comes out empty is called by its key.

    Args:
        dataset: Supplies the item columns.
        spec: How to write them; by default the title, at most 200 characters.

    Raises:
        RecipeError: The template names a column the data set lacks.
    """
    spec = spec or ItemTextSpec()
    texts = _texts(spec, _columns(dataset, spec.fields), dataset.item_keys[1:])
    return ["", *(_made_unique(texts, spec.max_chars) if spec.unique else texts)]


def preview(dataset: InteractionDataset, spec: ItemTextSpec | None = None, rows: int = 5) -> list[dict[str, str]]:
    """Key and text of some items spread over the catalogue, to look at before a long run; reads those rows only.

    Args:
        dataset: Supplies the item columns.
        spec: How to write them.
        rows: How many.
    """
    spec = spec or ItemTextSpec()
    last, count = dataset.num_items - 1, min(rows, dataset.num_items)
    chosen = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    keys = [dataset.item_keys[1 + row] for row in chosen]
    texts = _texts(spec, _columns(dataset, spec.fields, chosen), keys)
    return [{"key": key, "text": text} for key, text in zip(keys, texts, strict=True)]


def item_text(record: dict[str, Any], spec: ItemTextSpec | None = None) -> str:
    """The text of one record, before any numbering of equal texts.

    Args:
        record: Column -> value; lists are joined with commas, None is an empty field.
        spec: How to write it.
    """
    spec = spec or ItemTextSpec()
    absent = [name for name in spec.fields if name not in record]
    if absent:
        known, wanted = ", ".join(record), ", ".join(spec.fields)
        raise DataError(f"item record lacks {', '.join(absent)}", found=known, expected=wanted)
    columns = {name: [_as_text(record[name])] for name in spec.fields}
    return _texts(spec, columns, [_as_text(record.get(KEY))])[0]


def move_article(title: str) -> str:
    """A title with its trailing article in front: "Haine, La (Hate) (1995)" becomes "La Haine (Hate) (1995)"."""
    return _TRAILING_ARTICLE.sub(lambda m: f"{m[1]}{m[3]}{'' if m[3].endswith(chr(39)) else ' '}{m[2]}", title)


def same_title_key(text: str) -> str:
    """What two titles have in common when they differ in letter case, punctuation or blanks only."""
    return _NO_WORD.sub(" ", text.casefold()).strip() or text


def _columns(dataset: InteractionDataset, names: Sequence[str], rows: list[int] | None = None) -> dict[str, list[str]]:
    columns = {}
    for name in names:
        if name == TITLE and name not in dataset.items.column_names:
            keys = dataset.item_keys[1:]  # as InteractionDataset.item_titles has it
            columns[name] = keys if rows is None else [keys[row] for row in rows]
            continue
        if name not in dataset.items.column_names:
            raise RecipeError(
                f"item text names the column {name!r}, which data set {dataset.meta.name!r} lacks; "
                f"its items have: {', '.join(dataset.items.column_names)}"
            )
        column = dataset.items.column(name)
        columns[name] = [_as_text(value) for value in (column if rows is None else column.take(rows)).to_pylist()]
    return columns


def _texts(spec: ItemTextSpec, columns: dict[str, list[str]], keys: Sequence[str]) -> list[str]:
    if TITLE in columns:
        columns = {**columns, TITLE: [_title(value, spec) for value in columns[TITLE]]}
    write = _writer(spec.template)
    texts = []
    for row, values in enumerate(zip(*columns.values(), strict=True)):
        text = plain_text(write(dict(zip(columns, values, strict=True)))) or plain_text(keys[row])
        texts.append(_shorten(text, spec.max_chars))
    return texts


def _title(title: str, spec: ItemTextSpec) -> str:
    title = " ".join(title.split())
    if spec.move_article:
        title = move_article(title)
    return (_YEAR.sub("", title) or title) if spec.drop_year else title


def _writer(template: str) -> Callable[[dict[str, str]], str]:
    """The template as a function; braces name columns and nothing else, so a template reaches no attribute."""
    formatter = string.Formatter()
    parsed = [  # the split puts the bracketed parts at the odd places
        ([(literal, name) for literal, name, *_ in formatter.parse(part)], place % 2 == 1)
        for place, part in enumerate(_OPTIONAL.split(template))
    ]

    def write(values: dict[str, str]) -> str:
        out = []
        for pieces, optional in parsed:
            if not (optional and any(name and not values[name] for _, name in pieces)):
                out += [literal + (values[name] if name else "") for literal, name in pieces]
        return "".join(out)

    return write


def _fields_of(template: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise RecipeError(f"item text template {template!r} cannot be read: {error}") from error
    named = [entry for entry in parsed if entry[1] is not None]
    strange = [repr(name) for _, name, form, conversion in named if not str(name).isidentifier() or form or conversion]
    if strange:
        raise RecipeError(f"item text template {template!r}: braces hold a column name, found {', '.join(strange)}")
    return [name for _, name, *_ in parsed if name]


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(_as_text(entry) for entry in value if entry is not None)
    return str(value).strip()


def _shorten(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    words = text[: limit + 1].rpartition(" ")[0]
    return words if len(words) >= limit // 2 else text[:limit].rstrip()


def _made_unique(texts: list[str], limit: int | None) -> list[str]:
    # A numbered text must not take the name of an item that is really called so.
    keys = [same_title_key(text) for text in texts]
    taken, met, numbers = set(keys), set[str](), dict[str, int]()
    result = []
    for text, key in zip(texts, keys, strict=True):
        chosen = text
        if key in met:
            number = numbers.get(key, 2)
            while same_title_key(chosen := _numbered(text, number, limit)) in taken:
                number += 1
            numbers[key] = number + 1
            taken.add(same_title_key(chosen))
        met.add(key)
        result.append(chosen)
    return result


def _numbered(text: str, number: int, limit: int | None) -> str:
    suffix = f" ({number})"
    return (text if limit is None else text[: max(1, limit - len(suffix))].rstrip()) + suffix


def level_texts(dataset: InteractionDataset, template: str, max_chars: int | None = 1000) -> list[str]:
    """The text of every item at one level of an item tokenizer; entry 0 and items that lack the fields are empty.

    Args:
        dataset: Supplies the item columns.
        template: As `ItemTextSpec.template`.
        max_chars: Longest text.

    Raises:
        RecipeError: The template names a column the data set lacks.
    """
    spec = ItemTextSpec(template=template, max_chars=max_chars, unique=False)
    columns, write = _columns(dataset, spec.fields), _writer(template)
    rows = zip(*columns.values(), strict=True)
    texts = [plain_text(write(dict(zip(columns, values, strict=True)))) if any(values) else "" for values in rows]
    return ["", *(_shorten(text, max_chars) for text in texts)]
