"""Made-up shoppers whose next purchase can be learned from the last one.

Our design, from no paper. Items belong to categories; the items of a category form a ring in a secret order. Every
user favours two categories. An event is, with probability

- `FOLLOW`: the item that follows the user's last item on its ring (what a sequence model can learn),
- `TASTE`: an item of a favourite category, popular ones more often (what a user profile can learn),
- otherwise: any item, popular ones more often (noise, and what popularity can learn).

Repeats are dropped, so that each user meets an item once. With `visual_taste` a share of the users goes by a look
that only the picture of an item shows, see `llmrec.data.sources.looks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from ibis.util import gen_name

from llmrec.data.item_images import COLOURS, PATTERNS, SHAPES, draw_item
from llmrec.data.sources.base import RawTables, ReadOptions, Source
from llmrec.data.sources.looks import ATTRIBUTES, LookWalk, Tastes, draw_tastes, look_codes, look_of
from llmrec.errors import RecipeError

FOLLOW, TASTE = 0.65, 0.25
FIRST_TIME, TWO_YEARS = 1_577_836_800, 2 * 365 * 86_400
CATEGORIES: dict[str, tuple[str, ...]] = {
    "Kitchen": ("kettle", "saucepan", "teapot", "ladle", "whisk", "bread knife", "mixing bowl", "grater"),
    "Garden": ("trowel", "watering can", "flower pot", "rake", "seed tray", "bird feeder", "hose", "lantern"),
    "Music": ("ukulele", "tambourine", "drum pad", "metronome", "flute", "capo", "music stand", "kalimba"),
    "Books": ("atlas", "novel", "cookbook", "field guide", "comic", "notebook", "dictionary", "diary"),
    "Sport": ("football", "yoga mat", "skipping rope", "racket", "kettlebell", "helmet", "swim cap", "frisbee"),
    "Toys": ("puzzle", "kite", "toy train", "building set", "doll", "board game", "spinning top", "marble run"),
    "Clothing": ("scarf", "raincoat", "jumper", "sun hat", "mittens", "belt", "waistcoat", "socks"),
    "Office": ("stapler", "desk lamp", "fountain pen", "calendar", "folder", "tape holder", "ruler", "paper tray"),
}
ADJECTIVES = (
    "quiet", "bright", "sturdy", "folding", "gentle", "classic", "tiny", "northern", "amber", "swift", "woven",
    "polished", "rustic", "modern", "silver", "cosy", "grand", "simple", "hidden", "sunny", "velvet", "crisp",
)  # fmt: skip
BRANDS = ("Alder & Co", "Brightwell", "Corvane", "Dunmere", "Elmstone", "Fairhaven")


@dataclass(frozen=True)
class SyntheticSource(Source):
    """Generator of users with latent tastes.

    Args:
        users: Number of users.
        items: Size of the catalogue.
        events_per_user: Events of each user (fewer where the catalogue runs out).
        seed: Equal seeds and sizes give equal data.
        images: Draw a picture of each item (shape: category, colour and pattern and lettering: the title).
        visual_taste: Share of the users who prefer a shape or a colour, 0 to 1. Above 0 the pictures show `look_of`,
            which no text tells.
        taste_drift: Share of those whose preferred look changes in the second half of the history.
        shuffle_pictures: Deal the pictures out to the items anew, everything else as it is: a control in which no
            picture tells anything about its item.
    """

    users: int = 500
    items: int = 200
    events_per_user: int = 20
    seed: int = 0
    images: bool = False
    visual_taste: float = 0.0
    taste_drift: float = 0.0
    shuffle_pictures: bool = False

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Only the name itself, where no file has it."""
        return str(path) == "synthetic" and not path.exists()

    def read(self, connection: Any, path: Path, options: ReadOptions) -> RawTables:
        """Generate the tables; `path` and `options` are not used.

        Raises:
            RecipeError: A size makes no sense.
        """
        if self.users < 1 or self.items < 2 or self.events_per_user < 1 or self.seed < 0:
            raise RecipeError(
                f"synthetic source: users={self.users}, items={self.items}, "
                f"events_per_user={self.events_per_user}, seed={self.seed}; "
                "expected users >= 1, items >= 2, events_per_user >= 1, seed >= 0"
            )
        self._check_tastes()
        streams = self._streams()
        catalogue = self._catalogue(streams[0])
        if self.shuffle_pictures:
            catalogue = _with_dealt_pictures(catalogue, streams[5])
        walk = self._walk(streams[3], streams[4]) if self.visual_taste else None
        events = self._events(streams[1], streams[2], walk)
        raw, items = (
            connection.create_table(gen_name(f"llmrec_synthetic_{name}"), ibis.memtable(table), temp=True)
            for name, table in (("events", events), ("items", catalogue))
        )
        keys = {f"{name}_key": ibis.literal(name[0]).concat(raw[name].cast("string")) for name in ("user", "item")}
        note = f"synthetic data, seed {self.seed}: {FOLLOW:.0%} follow the last item, {TASTE:.0%} a taste"
        if self.visual_taste:
            note += f"; {self.visual_taste:.0%} of the users prefer a look that only the pictures show"
            note += f", which changes for {self.taste_drift:.0%} of these" if self.taste_drift else ""
        note += "; pictures dealt out anew, so they tell nothing" if self.shuffle_pictures else ""
        return RawTables(
            interactions=raw.select(**keys, **{c: raw[c] for c in raw.columns[2:]}), items=items, notes=(note,)
        )

    def tastes(self) -> pa.Table:
        """Who goes by which look: the truth behind the events, kept out of the data set.

        Returns:
            user_key, attribute ("shape" or "colour"), first and second (the preferred value in both halves of the
            history; they differ for users with a drift). Users without a look are left out.
        """
        self._check_tastes()
        found = self._tastes(self._streams()[3], look_codes(self.items, self.seed))
        words = (SHAPES, tuple(name for name, _ in COLOURS))
        rows = [
            (f"u{user + 1}", ATTRIBUTES[a], words[a][found.first[user]], words[a][found.second[user]])
            for user, a in enumerate(found.attribute)
            if a >= 0
        ]
        names = ("user_key", "attribute", "first", "second")
        return pa.table({name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(names)})

    def _check_tastes(self) -> None:
        for name in ("visual_taste", "taste_drift"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise RecipeError(f"synthetic source: {name}={value!r}; expected a share from 0 to 1")
        if self.visual_taste and not self.images:
            raise RecipeError("synthetic source: visual_taste shows in pictures only; expected images: true beside it")
        if self.taste_drift and not self.visual_taste:
            raise RecipeError("synthetic source: taste_drift changes a visual taste; expected visual_taste above 0")
        if self.shuffle_pictures and not self.images:
            raise RecipeError("synthetic source: shuffle_pictures without pictures; expected images: true beside it")

    def _streams(self) -> list[np.random.Generator]:
        """Random numbers of catalogue, events, times, tastes, looks and dealing; a later one changes no earlier one."""
        return [np.random.default_rng(stream) for stream in np.random.SeedSequence(self.seed).spawn(6)]

    def _tastes(self, generator: np.random.Generator, looks: np.ndarray) -> Tastes:
        return draw_tastes(generator, self.users, looks, self.visual_taste, self.taste_drift)

    def _walk(self, tastes: np.random.Generator, orders: np.random.Generator) -> LookWalk:
        looks = look_codes(self.items, self.seed)
        return LookWalk(orders, self._tastes(tastes, looks), looks, self._steps, self.events_per_user)

    @property
    def _steps(self) -> int:
        return int(self.events_per_user * 1.6) + 4

    @property
    def _ring_count(self) -> int:
        return min(len(CATEGORIES), max(1, self.items // 4))

    def _catalogue(self, generator: np.random.Generator) -> pa.Table:
        """Item i belongs to category i mod C and is number i // C in it."""
        count, names = self._ring_count, list(CATEGORIES)
        ids = np.arange(self.items)
        category, number = ids % count, ids // count
        noun, adjective = number % 8, (number // 8 + number * 5 + category * 3) % len(ADJECTIVES)
        edition = number // (8 * len(ADJECTIVES))
        brand = generator.integers(len(BRANDS), size=self.items)
        titles = [
            f"{ADJECTIVES[a].capitalize()} {CATEGORIES[names[c]][n]}" + (f" No. {e + 1}" if e else "")
            for a, c, n, e in zip(adjective, category, noun, edition, strict=True)
        ]
        colour, pattern = adjective % len(COLOURS), brand % len(PATTERNS)
        columns: dict[str, Any] = {
            "item_key": [f"i{i + 1}" for i in ids],
            "title": titles,
            "description": [
                f"{title} by {BRANDS[b]}, {'' if self.visual_taste else f'{PATTERNS[p]} {COLOURS[k][0]}, '}"
                f"for {names[c].lower()}."
                for title, b, p, k, c in zip(titles, brand, pattern, colour, category, strict=True)
            ],
            "categories": pa.array([[names[c]] for c in category], pa.list_(pa.string())),
            "brand": [BRANDS[b] for b in brand],
        }
        if self.visual_taste:
            pictures = [look_of(item, self.seed).draw() for item in range(1, self.items + 1)]
            columns["image"] = pa.array(pictures, pa.binary())
        elif self.images:
            columns["image"] = pa.array(
                [
                    draw_item(int(c), int(k), int(p), t.split()[-1])
                    for c, k, p, t in zip(category, colour, pattern, titles, strict=True)
                ],
                pa.binary(),
            )
        return pa.table(columns)

    def _events(self, generator: np.random.Generator, clock: np.random.Generator, walk: LookWalk | None) -> pa.Table:
        """Events of all users side by side: one numpy step for each position in the history."""
        count, users = self._ring_count, self.users
        sizes = np.bincount(np.arange(self.items) % count, minlength=count)
        rings = [generator.permutation(size) for size in sizes]
        follower = np.zeros(self.items, dtype=np.int64)
        for c, ring in enumerate(rings):
            follower[ring * count + c] = np.roll(ring, -1) * count + c
        favourites = generator.integers(count, size=(2, users))
        steps = self._steps
        history = np.zeros((users, steps), dtype=np.int64)
        for step in range(steps):
            choice, skew = generator.random(users), generator.random(users)
            favourite = favourites[(generator.random(users) < 0.3).astype(np.int64), np.arange(users)]
            category = np.where(
                (choice < FOLLOW + TASTE) | (step == 0), favourite, generator.integers(count, size=users)
            )
            drawn = (skew**2 * sizes[category]).astype(np.int64) * count + category
            habit = np.where((choice < FOLLOW) & (step > 0), follower[history[:, max(0, step - 1)]], drawn)
            history[:, step] = habit if walk is None else walk.step(habit, history[:, :step])
        kept = _first_visits(history)
        kept &= np.cumsum(kept, axis=1) <= self.events_per_user
        user, item = np.repeat(np.arange(users), kept.sum(axis=1)), history[kept]
        liked = (favourites[:, user] == item % count).any(axis=0)
        if walk is not None:
            liked = walk.liked(user, item, liked)
        rating = np.clip(np.rint(2.6 + 1.5 * liked + clock.normal(0, 0.8, len(user))), 1, 5)
        return pa.table(
            {
                "user": user + 1,
                "item": item + 1,
                "source_row": np.arange(len(user), dtype=np.int64),
                "timestamp": self._times(clock, user),
                "rating": rating,
            }
        )

    def _times(self, clock: np.random.Generator, user: np.ndarray) -> np.ndarray:
        """Seconds [N], strictly increasing for each user; gaps of minutes within a visit, of days between visits."""
        gaps = np.where(
            clock.random(len(user)) < 0.6,
            clock.integers(30, 3_600, len(user)),
            clock.integers(86_400, 14 * 86_400, len(user)),
        )
        total = np.cumsum(gaps)
        starts = np.searchsorted(user, np.arange(self.users))
        begin = clock.integers(FIRST_TIME, FIRST_TIME + TWO_YEARS, self.users)
        return (begin[user] + total - total[starts][user]).astype(np.int64)


def _with_dealt_pictures(catalogue: pa.Table, generator: np.random.Generator) -> pa.Table:
    place = catalogue.column_names.index("image")
    dealt = catalogue.column("image").take(pa.array(generator.permutation(len(catalogue))))
    return catalogue.set_column(place, "image", dealt)


def _first_visits(history: np.ndarray) -> np.ndarray:
    """[U, S] bool: whether an event is the first of its item in the row."""
    order = np.argsort(history, axis=1, kind="stable")
    ranked = np.take_along_axis(history, order, axis=1)
    fresh = np.ones(history.shape, dtype=bool)
    fresh[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    first = np.empty_like(fresh)
    np.put_along_axis(first, order, fresh, axis=1)
    return first
