"""CoFiRec: one code per level, each by itself; what the card of the method asks for, and small catalogues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmrec.data.schema import ItemFeatures
from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers.cofirec import CoFiRec, CoFiRecNetwork, climb, from_neighbours, grow_tree
from tests.contracts.item_tokenizers import ItemTokenizerContract, item_features
from tests.fixtures.catalogues import ITEMS, variants_catalogue, variants_labels

SMALL: dict[str, Any] = {"sizes": 16, "hidden": (24,), "cf_hidden": (16,), "latent": 8, "epochs": 12}
CATEGORY, TITLE, DESCRIPTION, COLLABORATIVE = range(4)


def small(**options: Any) -> CoFiRec:
    return CoFiRec(**{**SMALL, **options})


def fitted(items: ItemFeatures, seed: int = 0, **options: Any) -> CoFiRec:
    tokenizer = small(**options)
    tokenizer.fit(items, seed=seed)
    return tokenizer


def level(rows: Any, present: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Values of items 1.. and where they are present -> a feature level with its padding row."""
    values = np.asarray(rows, dtype=np.float32)
    mask = np.ones(len(values), dtype=bool) if present is None else np.asarray(present, dtype=bool)
    return np.concatenate([np.zeros_like(values[:1]), values]), np.concatenate([[False], mask])


def changed(items: ItemFeatures, name: str, item: int, like: int) -> ItemFeatures:
    """The features with the vector of another item at one place."""
    values = items[name][0].copy()
    values[item] = values[like]
    return {**items, name: (values, items[name][1])}


def network(levels: int = 3, cf: bool = True) -> CoFiRecNetwork:
    torch.manual_seed(0)
    sizes = [7, 6, 5, 4][: levels + cf]
    return CoFiRecNetwork(10, 5 if cf else None, sizes, (12,), (9,), 8)


def touched(part: torch.nn.Module) -> bool:
    """Whether a part has a gradient that is not 0."""
    return any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())


def rows(levels: int = 3, cf: bool = True, count: int = 20) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(count, width, generator=generator) for width in [10] * levels + [5] * cf]
    return values, [torch.ones(count, dtype=torch.bool) for _ in values]


class TestContract(ItemTokenizerContract):
    tokenizer_class = CoFiRec
    options = SMALL


class TestContractReversed(ItemTokenizerContract):
    tokenizer_class = CoFiRec
    options = {**SMALL, "order": "reversed", "collisions": "append", "fallback": "mean"}


class TestContractHierarchy(ItemTokenizerContract):
    tokenizer_class = CoFiRec
    options = {**SMALL, "hierarchy": "auto"}


# Properties of the card ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column"),
    [("category", CATEGORY), ("title", TITLE), ("description", DESCRIPTION), ("collaborative", COLLABORATIVE)],
)
def test_property_1_a_level_changes_its_own_code_only(name: str, column: int) -> None:
    items = item_features(60)
    tokenizer = fitted(items)
    before = tokenizer.assign(items)
    moved = 0
    for item in range(1, 6):
        after = tokenizer.assign(changed(items, name, item, like=item + 1))
        differs = (after != before).nonzero().tolist()
        assert all(place == [item - 1, column] for place in differs)
        moved += len(differs)
    assert moved, "the code of the level itself never moved"


def test_property_2_the_encoder_is_shared_and_codebooks_are_not() -> None:
    model = network()
    values, known = rows()
    for chosen in range(4):
        model.zero_grad()
        only = [mask if place == chosen else torch.zeros_like(mask) for place, mask in enumerate(known)]
        sum(model.losses(values, only, beta=0.25, cf_weight=1.0)).backward()  # type: ignore[union-attr]
        assert model.f_cf is not None
        assert (touched(model.f_sem), touched(model.f_cf)) == (chosen < 3, chosen == 3)
        assert [touched(quantizer) for quantizer in model.quantizers] == [place == chosen for place in range(4)]


def test_the_codebook_term_moves_codebooks_only() -> None:
    values, known = rows()
    model = network()
    model.losses(values, known, beta=0.0, cf_weight=1.0)[1].backward()
    assert all(touched(quantizer) for quantizer in model.quantizers)
    assert not touched(model.f_sem), "the term of the codebooks must not move latents"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_property_3_equal_categories_have_equal_codes(seed: int) -> None:
    items, _ = variants_catalogue(seed)
    tokenizer = fitted(items, seed=seed, sizes=64, epochs=3)
    labels = torch.from_numpy(variants_labels(seed))[1:, 0]
    for category in range(4):
        assert len(torch.unique(tokenizer.codes[1:][labels == category, 0])) == 1


@pytest.mark.parametrize("order", ["coarse_to_fine", "reversed"])
def test_property_4_repair_makes_codes_unique_and_leaves_semantic_levels(order: str) -> None:
    items, _ = variants_catalogue(0)
    items["collaborative"][0][1:] = items["collaborative"][0][1]  # nothing parts the variants
    tokenizer = fitted(items, order=order)
    raw, codes = tokenizer.assign(items), tokenizer.codes[1:]
    assert len(torch.unique(raw, dim=0)) <= 40 and len(torch.unique(codes, dim=0)) == ITEMS and tokenizer.unique
    for column, name in enumerate(tokenizer.level_names):
        assert torch.equal(raw[:, column], codes[:, column]) == (name != "collaborative")
    assert tokenizer.report is not None and tokenizer.report.collisions == ITEMS


def test_property_5_one_text_level_is_a_plain_vq_vae() -> None:
    model = network(levels=1, cf=False)
    values, known = rows(levels=1, cf=False)
    recon, commit = model.losses(values, known, beta=0.25, cf_weight=1.0)
    weights = dict(model.named_parameters())

    def layers(x: Tensor, part: str) -> Tensor:
        hidden = torch.relu(x @ weights[f"{part}.0.weight"].T + weights[f"{part}.0.bias"])
        return hidden @ weights[f"{part}.2.weight"].T + weights[f"{part}.2.bias"]

    h, book = layers(values[0], "f_sem"), weights["quantizers.0.codebook"]
    q = book[torch.cdist(h, book).argmin(1)]
    wanted = functional.mse_loss(layers(q, "g_sem"), values[0])
    assert recon.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert commit.item() == pytest.approx(1.25 * functional.mse_loss(h, q).item(), abs=1e-6)


def test_property_6_gradients_go_straight_through() -> None:
    model = network()
    values, known = rows()
    h = model.encode(0, values[0]).detach().requires_grad_()
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((model.quantizers[0](h).through * weight).sum(), h)
    assert torch.equal(gradient, weight)
    recon, _ = model.losses(values, known, beta=0.25, cf_weight=1.0)
    recon.backward()
    assert touched(model.f_sem) and not touched(model.quantizers)


def test_property_10_figures_and_codes_survive_saving(tmp_path: Path) -> None:
    items = item_features(60, missing=0.2)
    tokenizer = fitted(items, order="random")
    tokenizer.save_pretrained(tmp_path)
    again = CoFiRec.from_pretrained(tmp_path)
    assert again.report == tokenizer.report and again.level_names == tokenizer.level_names
    assert torch.equal(again.codes, tokenizer.codes) and torch.equal(again.spare, tokenizer.spare)
    assert torch.equal(again.assign(items), tokenizer.assign(items))
    assert again.report is not None
    for place in range(1, 5):
        column = tokenizer.codes[1:, place - 1]
        share = torch.bincount(column, minlength=16).double() / len(column)
        details = again.report.details
        assert details[f"largest_{place}"] == pytest.approx(float(share.max()))
        assert details[f"perplexity_{place}"] == pytest.approx(float(torch.special.entr(share).sum().exp()))
        assert 0 <= details[f"collision_rate_{place}"] <= 1
    assert again.report.details["collision_rate_4"] == pytest.approx(again.report.collisions / 60)


# Levels --------------------------------------------------------------------------------------------------------------


def test_levels_of_the_data_are_declared() -> None:
    items = item_features(30)
    del items["category"]
    items["description"] = (items["description"][0], np.zeros(31, dtype=bool))
    tokenizer = fitted(items)
    assert tokenizer.level_names == ("title", "collaborative") and tokenizer.codes.shape == (31, 2)
    details = tokenizer.report.details if tokenizer.report else {}
    found = {name: details[f"declared_{name}"] for name in ("category", "title", "description", "collaborative")}
    assert found == {"category": 0, "title": 1, "description": 0, "collaborative": 1}


def test_collaborative_level_by_option() -> None:
    items = item_features(30)
    assert fitted(items, collaborative=False).level_names == ("category", "title", "description")
    del items["collaborative"]
    assert fitted(items).level_names == ("category", "title", "description")
    with pytest.raises(DataError, match="no such level"):
        small(collaborative=True).fit(items, seed=0)


def test_without_text_there_is_nothing_to_tokenise() -> None:
    items = item_features(10)
    with pytest.raises(DataError, match="no text level"):
        small().fit({"collaborative": items["collaborative"]}, seed=0)
    with pytest.raises(DataError, match="no text level"):
        small(hierarchy="auto").fit({"category": items["category"]}, seed=0)


def test_the_collaborative_level_parts_variants() -> None:
    items, _ = variants_catalogue(0)
    reports = [fitted(items, collaborative=use, sizes=64, epochs=3).report for use in (True, False)]
    assert reports[0] is not None and reports[1] is not None
    assert reports[0].collisions < reports[1].collisions == ITEMS


def test_an_item_without_description_is_coded_by_its_title() -> None:
    rng = np.random.default_rng(0)
    title, description = rng.normal(size=(2, 40, 6))
    present = np.arange(40) >= 5
    items = {"title": level(title), "description": level(description, present)}
    tokenizer = fitted(items)
    spelled_out = {**items, "description": level(np.where(present[:, None], description, title))}
    assert torch.equal(tokenizer.assign(items), tokenizer.assign(spelled_out))
    assert tokenizer.report is not None and tokenizer.report.details["fallback_description"] == 5
    mean = fitted(items, fallback="mean")
    assert len(torch.unique(mean.assign(items)[:5, 1])) == 1, "the mean of the level is one vector"
    assert mean.report is not None
    assert (mean.report.details["fallback_description"], mean.report.details["unknown_description"]) == (0, 5)


def test_an_item_without_history_takes_the_code_of_its_neighbours() -> None:
    text = np.repeat([[5.0, 0.0], [0.0, 5.0]], 10, axis=0) + np.random.default_rng(0).normal(size=(20, 2)) * 0.1
    cf = np.repeat([[1.0, 2.0, 0.0], [0.0, -2.0, 1.0]], 10, axis=0)
    present = ~np.isin(np.arange(20), [3, 14])
    tokenizer = fitted({"title": level(text), "collaborative": level(cf, present)}, neighbours=4)
    codes = tokenizer.assign({"title": level(text), "collaborative": level(cf, present)})[:, 1]
    assert codes[3] == codes[0] != codes[10] == codes[14]
    assert tokenizer.report is not None and tokenizer.report.details["without_collaborative"] == 2


def test_neighbours_are_averaged() -> None:
    text = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    cf = torch.tensor([[torch.nan], [2.0], [4.0], [100.0]])
    known = torch.tensor([False, True, True, True])
    assert from_neighbours(text, cf, known, 2)[0].item() == 3.0
    assert from_neighbours(text, cf, known, 50)[0].item() == pytest.approx(106 / 3)
    nobody = torch.zeros(4, 1)
    assert torch.equal(from_neighbours(text, nobody, ~torch.ones(4, dtype=torch.bool), 2), nobody)


def test_a_new_item_without_history_is_coded() -> None:
    items = item_features(46)
    tokenizer = fitted({name: (values[:41], mask[:41]) for name, (values, mask) in items.items()})
    items["collaborative"][1][41:] = False
    tokenizer.add(items)
    assert tokenizer.codes.shape == (47, 4) and tokenizer.unique
    assert torch.equal(tokenizer.codes[41:, :3], tokenizer.assign(items)[40:, :3])


# Order ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "columns"),
    [("reversed", [3, 2, 1, 0]), (("title", "collaborative", "category", "description"), [1, 3, 0, 2])],
)
def test_order_moves_codes_sizes_and_names_together(order: Any, columns: list[int]) -> None:
    items, sizes = item_features(40), (11, 12, 13, 14)
    plain, moved = fitted(items, sizes=sizes), fitted(items, sizes=sizes, order=order)
    assert torch.equal(moved.codes, plain.codes[:, columns])
    assert moved.level_sizes == tuple(sizes[place] for place in columns)
    assert moved.level_names == tuple(plain.level_names[place] for place in columns)
    assert plain.report is not None and moved.report is not None
    assert moved.report.usage == tuple(plain.report.usage[place] for place in columns)
    for new, old in enumerate(columns, start=1):
        for kind in ("perplexity", "largest", "spare"):
            assert moved.report.details[f"{kind}_{new}"] == plain.report.details[f"{kind}_{old + 1}"]
    grown = item_features(50)
    plain.add(grown)
    moved.add(grown)
    assert torch.equal(moved.codes, plain.codes[:, columns]), "new items are repaired on the finest level too"


def test_random_order_is_drawn_from_the_seed() -> None:
    items = item_features(20)
    orders = [fitted(items, seed=seed, order="random", epochs=1).level_names for seed in (1, 1, 2, 3, 4)]
    assert orders[0] == orders[1] and len(set(orders)) > 1
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_appended_number_stays_last() -> None:
    items, _ = variants_catalogue(0)
    tokenizer = fitted(items, order="reversed", collisions="append", collaborative=False, epochs=2)
    assert tokenizer.level_names == ("description", "title", "category", "number")
    assert tokenizer.level_sizes[-1] >= 5 and tokenizer.unique
    assert torch.equal(tokenizer.assign(items), tokenizer.codes[1:, :3])


# Hierarchy -----------------------------------------------------------------------------------------------------------


def test_hierarchy_replaces_the_levels_of_the_data(tmp_path: Path) -> None:
    items, _ = variants_catalogue(0)
    tokenizer = fitted(items, hierarchy="auto", sizes=(4, 8, 32, 16))
    assert tokenizer.level_names == ("cluster_1", "cluster_2", "text", "collaborative")
    assert tokenizer.level_sizes == (4, 8, 32, 16) and tokenizer.unique
    assert tokenizer.report is not None and tokenizer.report.details["unused_category"] == 1
    labels = variants_labels(0)[1:]
    found = tokenizer.codes[1:].numpy()
    assert all(len(np.unique(found[labels[:, 0] == category, 0])) == 1 for category in range(4))
    for _, same in _groups(labels[:, :2]):
        assert len(np.unique(found[same, :3], axis=0)) == 1, "equal texts have equal codes up to the text level"
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(CoFiRec.from_pretrained(tmp_path).assign(items), tokenizer.assign(items))


def _groups(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    place = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    return [(group, place == group) for group in range(place.max() + 1)]


def test_the_tree_is_nested_and_bounded() -> None:
    values = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    tree = grow_tree(values, (6, 5), seed=0)
    codes = climb(tree, values)
    assert codes[:, 0].max() == 5 and codes[:, 1].max() == 4
    for node in range(6):
        own = codes[:, 0] == node
        leaf = torch.cdist(values[own], tree[1][node, : tree[2][node]]).argmin(1)
        assert torch.equal(codes[own, 1], leaf), "depth 2 looks inside its own cluster only"
    assert len(grow_tree(values, (256, 256), seed=0)[0]) == 18  # ceil(sqrt(300))


# Codebooks -----------------------------------------------------------------------------------------------------------


def test_surplus_codes_are_marked_spare() -> None:
    items, _ = variants_catalogue(0)
    tokenizer = fitted(items, sizes=(16, 64, 16, 32), epochs=1)
    assert tokenizer.spare.sum(1).tolist() == [12, 24, 0, 0]
    assert tokenizer.report is not None and tokenizer.report.details["spare_1"] == 12


def test_dead_codes_move_to_latents_and_spare_ones_stay() -> None:
    model = network(levels=1, cf=False)
    values, known = rows(levels=1, cf=False)
    generator = torch.Generator().manual_seed(0)
    spare = model.initialise(values, known, seed=0, generator=generator)
    spare[0, 6] = True
    with torch.no_grad():
        model.codebook(0)[4:] = 1e3
    kept = model.codebook(0)[:4].clone()
    assert model.reseed(values, known, spare, generator) == 2
    book = model.codebook(0).detach()
    assert torch.equal(book[:4], kept) and (book[6] == 1e3).all()
    latents = model.encode(0, values[0])
    assert torch.cdist(book[4:6], latents).min(1).values.max() < 1e-3


def test_dead_codes_are_moved_while_training() -> None:
    items = item_features(200)
    options: dict[str, Any] = {"sizes": 64, "epochs": 30, "learning_rate": 0.05, "patience": None}
    moved = [fitted(items, reseed_every=every, **options).report for every in (5, None)]
    assert moved[0] is not None and moved[1] is not None
    assert moved[0].details["reseeded"] > 0 == moved[1].details["reseeded"]


def test_training_lowers_the_loss_and_stops_early() -> None:
    items = item_features(100)
    short, long = fitted(items, epochs=1), fitted(items, epochs=60)
    assert short.report is not None and long.report is not None
    assert long.report.reconstruction < 0.8 * short.report.reconstruction
    stopped = fitted(items, epochs=60, patience=2, learning_rate=1e-30).report
    assert stopped is not None and stopped.details["epochs"] < 60


def test_rows_that_lack_a_level_do_not_train_it() -> None:
    model = network()
    values, known = rows()
    known[1][:5] = False
    before = model.losses(values, known, beta=0.25, cf_weight=1.0)
    values[1][:5] = 100.0
    assert model.losses(values, known, beta=0.25, cf_weight=1.0) == before


# Small catalogues ----------------------------------------------------------------------------------------------------


def test_one_item() -> None:
    tokenizer = fitted(item_features(1))
    assert tokenizer.codes.shape == (2, 4) and tokenizer.decode(tokenizer.codes[1:]).tolist() == [1]


@pytest.mark.parametrize("collaborative", [True, False])
def test_two_identical_items(collaborative: bool) -> None:
    items = item_features(2)
    twins = {name: level(np.repeat(values[1:2], 2, axis=0)) for name, (values, _) in items.items()}
    tokenizer = fitted(twins, collaborative=collaborative)
    assert tokenizer.unique and torch.equal(tokenizer.codes[1, :-1], tokenizer.codes[2, :-1])
    assert tokenizer.report is not None and tokenizer.report.collisions == 2


def test_descriptions_that_are_all_equal() -> None:
    items = item_features(20)
    items["description"] = level(np.ones((20, 10)))  # the vector of an empty text, for every item
    tokenizer = fitted(items)
    assert len(torch.unique(tokenizer.codes[1:, DESCRIPTION])) == 1 and tokenizer.unique


def test_catalogue_without_category_level() -> None:
    items = item_features(20)
    items["category"][1][:] = False
    tokenizer = fitted(items)
    assert tokenizer.level_names == ("title", "description", "collaborative") and tokenizer.unique


def test_too_many_items_for_one_prefix() -> None:
    items = {name: level(np.ones((20, 4))) for name in ("category", "title")}
    with pytest.raises(DataError, match="20 items share the prefix"):
        small().fit(items, seed=0)


def test_new_items_need_the_levels_of_the_fit() -> None:
    items = item_features(20)
    tokenizer = fitted(items, order="reversed")
    codes, sizes = tokenizer.codes.clone(), tokenizer.level_sizes
    with pytest.raises(DataError, match="not those of the fit"):
        tokenizer.add({name: value for name, value in item_features(25).items() if name != "title"})
    with pytest.raises(DataError, match="too few items"):
        tokenizer.add(item_features(10))
    crowd = {name: (np.repeat(v[1:2], 60, axis=0), np.arange(60) > 0) for name, (v, _) in items.items()}
    with pytest.raises(DataError, match="items share the prefix"):
        tokenizer.add(crowd)
    assert torch.equal(tokenizer.codes, codes) and tokenizer.level_sizes == sizes, "a refusal leaves it as it was"
    tokenizer.add(items)
    assert torch.equal(tokenizer.codes, codes)


def test_values_must_be_finite() -> None:
    items = item_features(10)
    items["title"][0][3, 0] = np.nan
    with pytest.raises(DataError, match="level title has values that are not finite"):
        small().fit(items, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "fine_to_coarse"}, "order: found 'fine_to_coarse'"),
        ({"hierarchy": "tree"}, "hierarchy: found 'tree'"),
        ({"fallback": "none"}, "fallback: found 'none'"),
        ({"collisions": "suffix"}, "collisions: found 'suffix'"),
        ({"collaborative": "yes"}, "collaborative: found 'yes'"),
        ({"sizes": 0}, "sizes: found 0"),
        ({"sizes": (16, 0)}, "sizes: found"),
        ({"latent": 0}, "latent: found 0"),
        ({"hidden": (0,)}, "hidden: found"),
        ({"beta": -1.0}, "beta: found -1.0"),
        ({"beta": float("nan")}, "beta: found nan"),
        ({"learning_rate": 0.0}, "learning_rate: found 0.0"),
        ({"reseed_every": 0}, "reseed_every: found 0"),
    ],
)
def test_options_that_cannot_mean_anything(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        CoFiRec(**options)


def test_sizes_and_order_must_fit_the_levels() -> None:
    items = item_features(10)
    with pytest.raises(RecipeError, match="sizes: found .* 4 levels"):
        small(sizes=(16, 16)).fit(items, seed=0)
    with pytest.raises(RecipeError, match="order: found"):
        small(order=("title", "category")).fit(items, seed=0)


# The made catalogue --------------------------------------------------------------------------------------------------


def test_variants_share_their_texts_and_users_keep_to_a_category() -> None:
    items, sequences = variants_catalogue(3)
    labels = variants_labels(3)
    for name in ("category", "title", "description"):
        assert len(np.unique(items[name][0][1:], axis=0)) == (4 if name == "category" else 40)
    for _, same in _groups(labels[1:, :2]):
        assert same.sum() == 5 and len(np.unique(items["title"][0][1:][same], axis=0)) == 1
    assert len(np.unique(items["collaborative"][0][1:], axis=0)) == ITEMS
    assert all(len(set(labels[events, 0])) == 1 for events in sequences)
    follows = [
        (labels[b] == (labels[a, 0], (labels[a, 1] + 1) % 10, labels[a, 2])).all()
        for events in sequences
        for a, b in zip(events, events[1:], strict=False)
    ]
    assert np.mean(follows) > 0.75
