"""Prompt templates: Jinja files that declare their variables, and item slots that no title can imitate.

A template file starts with a header comment and holds one block per phrasing::

    {# variables: history, candidates, user; source: ...; phrasings: the blocks variant_1 .. variant_4 #}
    {% block variant_1 %}...{{ history | join(", ") }}...{% endblock %}

A file without such blocks is a single phrasing. Rendering is sandboxed, strict about undefined names, and escapes
nothing. Where an item vector belongs, the text carries a mark made of private-use characters; `item_entry` takes
those characters out of titles, so a mark in the rendered text is always one of ours, whatever a title says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from llmrec.assets import find_asset
from llmrec.errors import RecipeError

SlotKind = Literal["history", "candidate", "user"]
SlotPosition = Literal["after", "before"]

USER_SLOT = -1
"""What `item_slots` holds where the vector of the user, not of an item, replaces the token."""

# One supplementary private-use plane character opens a mark, another closes it; digits between them are its number.
_OPEN, _CLOSE = "\U000f5100", "\U000f5101"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_HEADER = re.compile(r"\A\s*\{#-?(.*?)-?#\}", re.DOTALL)
_VARIANT = re.compile(r"variant_([0-9]+)\Z")


@dataclass(frozen=True)
class SlotRef:
    """A place in a prompt that belongs to an item or to the user.

    Args:
        item_id: The item, or `USER_SLOT` for the user.
        kind: "history", "candidate" or "user".
    """

    item_id: int
    kind: SlotKind


@dataclass
class SlotMarks:
    """Hands out marks for one prompt and finds them again after rendering.

    The number inside a mark leads back to its slot, so a template may show the lists in any order.

    Args:
        position: Where an item's slot stands: behind its title, or in front of it.
        slots: The slots so far.
    """

    position: SlotPosition = "after"
    slots: list[SlotRef] = field(default_factory=list)

    def mark(self, item_id: int, kind: SlotKind) -> str:
        """A new mark; put it where the slot belongs."""
        self.slots.append(SlotRef(item_id, kind))
        return f"{_OPEN}{len(self.slots) - 1}{_CLOSE}"

    def item_entry(self, title: str, item_id: int, kind: SlotKind) -> str:
        """A title with the mark of its item behind it, or on both sides: the second then only ends the title."""
        mark = self.mark(item_id, kind)
        return plain_text(title) + mark if self.position == "after" else mark + plain_text(title) + mark

    def split(self, text: str) -> list[str | SlotRef]:
        """Text pieces and slots of a rendered prompt, in reading order; empty pieces are left out.

        Pieces end at the end of each title. A blank in front of a leading slot moves behind it, so that the title has
        the tokens it has as an answer.
        """
        parts = _MARK.split(text)
        segments: list[str | SlotRef] = []
        inside: int | None = None  # the item whose title began with its slot
        for place, part in enumerate(parts):
            if place % 2 == 0:
                segments += [part] if part else []
                continue
            slot, number = self.slots[int(part)], int(part)
            if inside == number:
                inside = None
                continue
            if self.position == "before" and slot.kind != "user":
                inside = number
                if parts[place - 1].endswith(" "):
                    segments[-1] = parts[place - 1][:-1]
                    parts[place + 1] = " " + parts[place + 1]
            segments.append(slot)
        return [part for part in segments if part != ""]


def plain_text(text: str) -> str:
    """One line of text without private-use characters; runs of white space become one blank."""
    return " ".join(_PRIVATE.sub("", text).split())


def segments_to_text(segments: Iterable[str | SlotRef], marker: str = "") -> str:
    """Segments as one string, each slot written as `marker`."""
    return "".join(part if isinstance(part, str) else marker for part in segments)


def _environment() -> SandboxedEnvironment:
    return SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)


@dataclass(frozen=True)
class PromptTemplate:
    """A checked template file.

    Args:
        name: Name it was asked for by.
        path: File it came from.
        source: Text of the file.

    Raises:
        RecipeError: The file has no header, is no valid template, or its header and its blocks name different
            variables.
    """

    name: str
    path: Path
    source: str

    def __post_init__(self) -> None:
        self._check()

    def __reduce__(self) -> tuple[type[PromptTemplate], tuple[str, Path, str]]:
        return PromptTemplate, (self.name, self.path, self.source)  # compiled templates do not travel to workers

    @classmethod
    def load(cls, name: str | Path) -> PromptTemplate:
        """Read `prompts/<name>.jinja`, or the file itself when `name` is the path of one."""
        path = find_asset("prompts", str(name))
        return cls(str(name), path, path.read_text(encoding="utf-8"))

    @cached_property
    def variables(self) -> frozenset[str]:
        """Variables the header declares."""
        header = _HEADER.match(self.source)
        declared = re.search(r"variables:([^;]*)", header.group(1)) if header else None
        if declared is None:
            raise RecipeError(
                f"{self.path}:1: the prompt file declares no variables; start it with a comment such as "
                "{# variables: history, candidates; source: where the wording comes from #}"
            )
        return frozenset(name.strip() for name in declared.group(1).split(",") if name.strip())

    @cached_property
    def variants(self) -> tuple[int, ...]:
        """Numbers of the phrasings, ascending."""
        return tuple(sorted(self._variant_nodes))

    @cached_property
    def _tree(self) -> nodes.Template:
        try:
            return _environment().parse(self.source)
        except TemplateSyntaxError as error:
            raise RecipeError(f"{self.path}:{error.lineno}: not a valid Jinja template: {error.message}") from error

    @cached_property
    def _variant_nodes(self) -> dict[int, nodes.Template]:
        found = {}
        for block in self._tree.find_all(nodes.Block):
            match = _VARIANT.match(block.name)
            if match:
                found[int(match.group(1))] = nodes.Template(block.body, lineno=block.lineno)
        return found or {1: self._tree}

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self.source)

    def _check(self) -> None:
        for variant, node in self._variant_nodes.items():
            node.set_environment(_environment())
            used = meta.find_undeclared_variables(node)
            undeclared, unused = used - self.variables, self.variables - used
            if undeclared or unused:
                raise RecipeError(
                    f"{self.path}:{node.lineno}: phrasing {variant} and the header disagree: "
                    + _names("used but not declared", undeclared, "declared but not used", unused)
                )

    def render(self, variant: int, **values: Any) -> str:
        """The text of one phrasing; white space at its ends is removed.

        Args:
            variant: Number of the phrasing, one of `variants`.
            values: A value for every declared variable, and for nothing else.

        Raises:
            RecipeError: No such phrasing, or the values and the declared variables differ.
        """
        if variant not in self.variants:
            known = ", ".join(map(str, self.variants))
            raise RecipeError(f"{self.path}: no phrasing {variant!r}; the file has {known}")
        missing, unused = self.variables - values.keys(), values.keys() - self.variables
        if missing or unused:
            found = _names("variables without a value", missing, "values nobody uses", unused)
            raise RecipeError(f"{self.path}: {found}")
        block = self._template.blocks.get(f"variant_{variant}")
        if block is None:
            return self._template.render(values).strip()
        return "".join(block(self._template.new_context(values))).strip()


def _names(first: str, these: set[str] | frozenset[str], second: str, those: set[str] | frozenset[str]) -> str:
    parts = [f"{label}: {', '.join(sorted(names))}" for label, names in ((first, these), (second, those)) if names]
    return "; ".join(parts)


def render_next_item(
    template: PromptTemplate,
    variant: int,
    history: Sequence[tuple[int, str]],
    candidates: Sequence[tuple[int, str]] = (),
    *,
    user_slot: bool = False,
    slot_position: SlotPosition = "after",
) -> list[str | SlotRef]:
    """One next-item prompt as text pieces and slots.

    A slot stands beside every title and, if asked for, at the place of the user; which of them become tokens is
    decided by whoever turns the segments into tokens.

    Args:
        template: A template over the variables history and, unless it never needs them, candidates and user.
        variant: Number of the phrasing.
        history: (item id, title) pairs, oldest first.
        candidates: (item id, title) pairs in the order they are shown; empty for an open question.
        user_slot: Whether the user has a slot.
        slot_position: Whether slots of items stand behind or in front of their titles.
    """
    marks = SlotMarks(slot_position)
    values: dict[str, Any] = {"history": [marks.item_entry(title, item, "history") for item, title in history]}
    # A template may do without candidates or user, as long as there are none: `render` reports the rest.
    if candidates or "candidates" in template.variables:
        values["candidates"] = [marks.item_entry(title, item, "candidate") for item, title in candidates]
    if user_slot or "user" in template.variables:
        values["user"] = marks.mark(USER_SLOT, "user") if user_slot else ""
    return marks.split(template.render(variant, **values))
