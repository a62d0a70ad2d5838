"""Finds the prompts, recipes and launcher profiles that come with llmrec, installed or checked out.

In a checkout they lie beside the package; a wheel carries them inside it, under `_assets`. The names are the same.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from llmrec.errors import LlmrecError, RecipeError

SUFFIXES = {"prompts": ".jinja", "recipes": ".yaml", "accelerate_configs": ".yaml"}
_PACKAGE = Path(__file__).resolve().parent


def asset_root(kind: str) -> Path:
    """The folder of one kind of asset.

    Args:
        kind: "prompts", "recipes" or "accelerate_configs".

    Returns:
        The folder inside the installed package, or the one of the checkout.

    Raises:
        LlmrecError: The kind is unknown, or the installation lacks the folder.
    """
    if kind not in SUFFIXES:
        raise LlmrecError(f"unknown kind of asset {kind!r}; expected one of: {', '.join(SUFFIXES)}")
    for root in (_PACKAGE / "_assets" / kind, _PACKAGE.parent / kind):
        if root.is_dir():
            return root
    raise LlmrecError(f"this installation of llmrec has no {kind!r} folder; install llmrec again from a complete wheel")


def asset_names(kind: str) -> list[str]:
    """Names of all assets of a kind, sorted: the path below `asset_root`, without suffix ("sasrec/movielens")."""
    root = asset_root(kind)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob(f"*{SUFFIXES[kind]}"))


def find_asset(kind: str, name: str) -> Path:
    """The file of an asset.

    A path to an existing file wins, so that a user's own file can stand wherever a name can. Otherwise `name` is
    looked up below `asset_root`; suffix and folder may be given or left out ("sasrec/movielens",
    "recipes/sasrec/movielens.yaml").

    Args:
        kind: "prompts", "recipes" or "accelerate_configs".
        name: A path of the user's, or a name as `asset_names` lists it.

    Raises:
        RecipeError: Nothing is called that; the message lists the nearest names.
    """
    own = Path(name).expanduser()
    if own.is_file():
        return own
    root, suffix = asset_root(kind), SUFFIXES[kind]
    short = name.removeprefix("./").removeprefix(f"{kind}/").removesuffix(suffix)
    known = asset_names(kind)
    # Only listed names are joined to the root: "../x" can never leave it.
    if short in known:
        return root / f"{short}{suffix}"
    near = _nearest(short, known)
    listing = f"nearest names: {', '.join(near)}" if near else f"known names: {', '.join(known) or 'none'}"
    raise RecipeError(
        f"{kind}: found {name!r}, which is neither a file nor a name that comes with llmrec; {listing}. "
        f"`llmrec list {kind}` shows them all."
    )


def _nearest(name: str, known: list[str]) -> list[str]:
    """Names that are spelled alike, or share the last or first part of the path."""
    alike = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    parts = {part for part in name.split("/") if part}
    return alike or [entry for entry in known if parts & set(entry.split("/"))][:6]
