"""Which column is which: names seen in the wild, matched without regard to case, spaces or underscores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from llmrec.errors import DataError, RecipeError

ROW = "source_row"
INTERACTION_ROLES: Mapping[str, tuple[str, ...]] = {
    "user": (
        "userid", "user", "uid", "customerid", "customer", "reviewerid", "visitorid", "memberid", "accountid",
        "playerid", "personid", "userkey", "sessionid",
    ),
    "item": (
        "itemid", "item", "iid", "movieid", "movie", "productid", "product", "parentasin", "asin", "articleid",
        "article", "trackid", "songid", "artistid", "bookid", "newsid", "videoid", "gameid", "businessid", "stockcode",
        "sku", "itemkey",
    ),
    "timestamp": (
        "timestamp", "unixtimestamp", "time", "datetime", "date", "unixreviewtime", "unixtime", "eventtime",
        "createdat", "invoicedate", "ts", "timestampms",
    ),
    "order": ("pos", "position", "order", "eventorder", "step"),
    "rating": ("rating", "overall", "score", "stars"),
    "label": ("label", "click", "clicked", "liked", "target"),
    "split": ("split", "partition"),
    ROW: ("srcrow", "sourcerow"),
}  # fmt: skip
ITEM_ROLES: Mapping[str, tuple[str, ...]] = {
    "item": (*INTERACTION_ROLES["item"], "id"),
    "title": ("title", "itemtitle", "movietitle", "producttitle", "name", "itemname", "productname"),
    "description": ("description", "overview", "plot", "synopsis", "desc", "details"),
    "categories": ("categories", "category", "genres", "genre", "class"),
    "brand": ("brand", "store", "manufacturer"),
    "image": ("image", "imagebytes", "poster", "picture"),
}
USER_ROLES: Mapping[str, tuple[str, ...]] = {"user": (*INTERACTION_ROLES["user"], "id")}
TEXT_ROLES: Mapping[str, tuple[str, ...]] = {
    "title": ("title", "itemtitle", "movietitle", "producttitle", "itemname", "productname"),
    "description": ("description",),
    "categories": ("categories", "category", "genres", "genre"),
    "brand": ("brand",),
}
"""Item fields that may stand in an interaction file; "name" is left out, since it may be the user's."""

_ALIASES = {
    "time": "timestamp", "user_key": "user", "user_id": "user", "item_key": "item", "item_id": "item",
    "pos": "order", "genres": "categories", "category": "categories", "row": ROW, "src_row": ROW,
}  # fmt: skip


def plain(name: str) -> str:
    """A name reduced to its lower-case letters and digits, the form in which names are compared."""
    return "".join(character for character in name.casefold() if character.isalnum())


def checked_overrides(columns: Mapping[str, str]) -> dict[str, str]:
    """Explicit columns with our names made canonical ("time" -> "timestamp").

    Raises:
        RecipeError: A key is no role of ours.
    """
    known = {*INTERACTION_ROLES, *ITEM_ROLES}
    result = {}
    for ours, theirs in columns.items():
        role = _ALIASES.get(ours.strip().lower(), ours.strip().lower())
        if role not in known:
            raise RecipeError(
                f"--columns: {ours!r} is not a column of ours; expected one of: {', '.join(sorted(known))}"
            )
        result[role] = theirs
    return result


def sniff_columns(
    names: Iterable[str], roles: Mapping[str, tuple[str, ...]], overrides: Mapping[str, str]
) -> dict[str, str]:
    """Role -> column name for every role that has a column; an override that is present wins.

    Args:
        names: Columns of the file.
        roles: Role -> plain names, the preferred first.
        overrides: Role -> column name given by the user.
    """
    names = list(names)
    by_plain: dict[str, str] = {}
    for name in names:
        by_plain.setdefault(plain(name), name)
    found: dict[str, str] = {}
    for role, candidates in roles.items():
        if role in overrides and overrides[role] in names:
            found[role] = overrides[role]
            continue
        free = (by_plain[c] for c in candidates if c in by_plain and by_plain[c] not in overrides.values())
        match = next(free, None)
        if match is not None and match not in found.values():
            found[role] = match
    return found


def require(
    found: Mapping[str, str], needed: Iterable[str], overrides: Mapping[str, str], *, file: Path, names: Iterable[str]
) -> None:
    """Check that needed roles, and overrides for them, were found.

    Raises:
        DataError: A needed column is missing; the message lists those present.
    """
    for role in needed:
        if role in overrides and found.get(role) != overrides[role]:
            problem, expected = f"no column {overrides[role]!r} for {role!r}", f"a column named {overrides[role]!r}"
        elif role not in found:
            examples = ", ".join(
                {"user": ("user_id", "userId", "customer_id")}.get(role, ("item_id", "movieId", "asin"))
            )
            problem, expected = f"no {role} column", f"a column such as {examples}"
        else:
            continue
        raise DataError(
            problem,
            file=file,
            line=1,
            column=role,
            found=f"columns {', '.join(map(repr, names))}",
            expected=expected,
            remedy=f"name it: --columns {role}=NAME (the first line must hold the column names)",
        )


def check_duplicates(names: Iterable[str], file: Path) -> None:
    """Refuse a file in which a column name stands twice (names that differ in case only count as equal).

    Raises:
        DataError: A name stands twice.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        if key in seen:
            raise DataError(
                f"duplicate column {name!r}",
                file=file,
                line=1,
                column=name,
                found=f"{seen[key]!r} and {name!r}",
                expected="each column name once (case is ignored)",
                remedy="rename or drop one of the two",
            )
        seen[key] = name
