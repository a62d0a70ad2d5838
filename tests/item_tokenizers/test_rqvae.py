"""RQ-VAE codes: the tokenizer contract, the family's properties 1 to 5 and 10, and small or odd catalogues."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmrec.data.schema import ItemFeatures
from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers import rqvae
from llmrec.item_tokenizers.base import fused, kmeans
from llmrec.item_tokenizers.rqvae import (
    RQVAE,
    ResidualAutoencoder,
    alignment_loss,
    cluster_codes,
    diversity_loss,
    initialise,
    revive,
)
from tests.contracts.item_tokenizers import ItemTokenizerContract, item_features

SMALL: dict[str, Any] = {
    "hidden": (16,), "latent": 8, "levels": 3, "codebook_size": 16, "epochs": 12, "batch_size": 64,
    "dead_codes_every": 4,
}  # fmt: skip


def only_text(rows: list[list[float]] | np.ndarray, mask: list[bool] | None = None) -> ItemFeatures:
    """One level "title" for items 1..I."""
    values = np.asarray(rows, dtype=np.float32)
    present = np.ones(len(values), dtype=bool) if mask is None else np.asarray(mask)
    return {"title": (np.pad(values, ((1, 0), (0, 0))), np.concatenate([[False], present]))}


def autoencoder(residual_grad: str = "full", sizes: tuple[int, ...] = (8, 8, 8), seed: int = 0) -> ResidualAutoencoder:
    torch.manual_seed(seed)
    return ResidualAutoencoder(10, (16,), 6, sizes, residual_grad)


def vectors(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 10, generator=generator) * 2
    return centres[torch.arange(rows) % 12] + torch.randn(rows, 10, generator=generator)


def gradients(module: torch.nn.Module) -> float:
    """Sum of absolute gradients; 0.0 where nothing arrived."""
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


class TestRQVAE(ItemTokenizerContract):
    tokenizer_class = RQVAE
    options = SMALL


class TestWithEveryOption(ItemTokenizerContract):
    """LETTER's losses, Sinkhorn, means, a numbering level and a larger last level."""

    tokenizer_class = RQVAE
    options = SMALL | {
        "codebook_size": (4, 8, 64), "alignment": 0.02, "diversity": 1e-3, "clusters": 3, "sinkhorn": 0.003,
        "residual_grad": "first_level", "reduction": "mean", "collisions": "append",
    }  # fmt: skip


class TestWithSharedCodes(ItemTokenizerContract):
    tokenizer_class = RQVAE
    options = SMALL | {"codebook_size": 3, "levels": 2, "collisions": "none"}


# Property 1: k-means initialisation ----------------------------------------------------------------------------------


def test_error_does_not_grow_with_levels_after_initialisation() -> None:
    model, x = autoencoder(sizes=(8, 8, 8, 8)), vectors(200)
    initialise(model, x, seed=0)
    z = model.latents(x)
    found = model.quantise(z)
    total, errors = torch.zeros_like(z), [float(z.square().mean())]
    for part in found.vectors:
        total = total + part.detach()
        errors.append(float((z - total).square().mean()))
    assert all(after <= before for before, after in zip(errors[:-1], errors[1:], strict=True)), errors
    assert errors[-1] < 0.5 * errors[1], "later levels code what the first left over"


def test_one_level_is_plain_kmeans() -> None:
    model, x = autoencoder(sizes=(8,)), vectors(200)
    initialise(model, x, seed=3)
    z = model.latents(x)
    centroids, labels = kmeans(z.numpy(), 8, seed=4)
    assert np.array_equal(model.quantizers[0].codebook.detach().numpy(), centroids)
    assert np.array_equal(model.quantise(z).codes[:, 0].numpy(), labels)


def test_collapse_at_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def collapsed(values: np.ndarray, k: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(values.mean(0, keepdims=True), k, 0), np.zeros(len(values), dtype=np.int64)

    monkeypatch.setattr(rqvae, "kmeans", collapsed)
    with pytest.raises(DataError, match=r"level 1 of the codebooks collapsed[^$]*1 of 16 codes in use for 40"):
        RQVAE(**SMALL).fit(item_features(40), seed=0)
    RQVAE(**SMALL).fit(item_features(4), seed=0)  # four items cannot use 30% of sixteen codes


@pytest.mark.parametrize("rows", [17, 30, 60])
def test_levels_with_nothing_left_to_code_are_no_collapse(rows: int) -> None:
    tokenizer = RQVAE(**SMALL | {"codebook_size": (rows + 4, 64, 64), "epochs": 0})
    tokenizer.fit(item_features(rows), seed=0)
    assert tokenizer.unique and len(torch.unique(tokenizer.codes[1:, 0])) == rows, "every item has a first code"


# Properties 2 and 3: gradients ---------------------------------------------------------------------------------------


def test_commitment_of_level_two_reaches_the_encoder_only_with_full_residual_grad() -> None:
    x, reached, outputs = vectors(40), {}, {}
    for mode in ("full", "first_level"):
        model = autoencoder(mode)
        initialise(model, x, seed=0)
        found = model.quantise(model.encoder(x))
        commitment = (found.residuals[1] - found.vectors[1].detach()).square().sum()
        if commitment.requires_grad:
            commitment.backward()
        reached[mode] = gradients(model.encoder)
        outputs[mode] = found
    assert reached["full"] > 0 and reached["first_level"] == 0.0
    assert torch.equal(outputs["full"].codes, outputs["first_level"].codes)
    assert torch.equal(outputs["full"].through, outputs["first_level"].through)


def test_decoder_loss_moves_no_codebook_and_codebook_loss_no_encoder() -> None:
    model, x = autoencoder(), vectors(40)
    initialise(model, x, seed=0)
    found = model.quantise(model.encoder(x))
    (model.decoder(found.through) - x).square().mean().backward()
    assert gradients(model.codebooks) == 0.0 and gradients(model.encoder) > 0 and gradients(model.decoder) > 0
    model.zero_grad(set_to_none=True)
    found = model.quantise(model.encoder(x))
    pairs = zip(found.residuals, found.vectors, strict=True)
    torch.stack([(residual.detach() - part).square().sum() for residual, part in pairs]).sum().backward()
    assert gradients(model.encoder) == 0.0
    assert all(gradients(quantizer) > 0 for quantizer in model.quantizers)


def test_the_loss_is_the_published_one() -> None:
    model, x = autoencoder(), vectors(30)
    initialise(model, x, seed=0)
    z = model.encoder(x)
    rest, total, quantisation = z, torch.zeros_like(z), torch.zeros(())
    for quantizer in model.quantizers:
        code = (rest[:, None] - quantizer.codebook).square().sum(-1).argmin(1)
        distance = (rest - quantizer.codebook[code]).square().sum(-1).mean()
        quantisation = quantisation + 1.25 * distance
        total, rest = total + quantizer.codebook[code], rest - quantizer.codebook[code]
    expected = (model.decoder(total) - x).square().sum(-1).mean() + quantisation
    found = RQVAE()._quantisation(model, x, model.quantise(z))
    assert torch.allclose(found, expected, rtol=1e-4)
    means = RQVAE(reduction="mean")._quantisation(model, x, model.quantise(z))
    recon = (model.decoder(total) - x).square().mean()
    assert torch.allclose(means, recon + quantisation / 6 / 3, rtol=1e-4)


# Properties 4 and 5: Sinkhorn while training, collisions -------------------------------------------------------------


def test_sinkhorn_assigns_the_last_level_alone() -> None:
    model, x = autoencoder(), vectors(64)
    initialise(model, x, seed=0)
    plain, even = model.quantise(model.latents(x)), model.quantise(model.latents(x), 0.003)
    assert torch.equal(plain.codes[:, :2], even.codes[:, :2])
    before, after = (torch.bincount(found.codes[:, 2], minlength=8) for found in (plain, even))
    assert int(after.max()) < int(before.max()) and int(after.max()) <= 12
    assert torch.equal(model.quantise(model.latents(x[:1]), 0.003).codes, plain.codes[:1]), "one row is not evened out"


def test_equal_items_are_equal_before_collisions_are_resolved() -> None:
    # Here the residuals of level 2 are rounding noise, which differs by place in a batch.
    tokenizer = RQVAE(**SMALL | {"levels": 2, "epochs": 2, "collisions": "none"})
    rows = np.random.default_rng(0).normal(size=(5, 6))[[4, 4, 0, 3, 4, 0, 1]]
    assert tokenizer.fit(only_text(rows), seed=1).collisions == 5
    assert torch.equal(tokenizer.codes[1], tokenizer.codes[5]) and torch.equal(tokenizer.codes[3], tokenizer.codes[6])


@settings(max_examples=12, deadline=None)
@given(
    copies=st.lists(st.integers(0, 4), min_size=1, max_size=14),
    policy=st.sampled_from(["nearest_free", "append", "random"]),
)
def test_catalogues_with_duplicates_get_unique_codes(copies: list[int], policy: str) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 6))[copies]
    options = SMALL | {"levels": 2, "codebook_size": 16, "epochs": 2, "collisions": policy}
    tokenizer, again = RQVAE(**options), RQVAE(**options)
    report = tokenizer.fit(only_text(rows), seed=1)
    again.fit(only_text(rows), seed=1)
    assert tokenizer.unique and len(torch.unique(tokenizer.codes[1:], dim=0)) == len(copies)
    assert torch.equal(tokenizer.decode(tokenizer.codes[1:]), torch.arange(1, len(copies) + 1))
    assert torch.equal(tokenizer.codes, again.codes) and tokenizer.fingerprint == again.fingerprint
    assert report.collisions >= len(copies) - len(set(copies))
    extended = only_text(np.concatenate([rows, rows[:2]]))
    if policy != "append":
        tokenizer.add(extended)
        assert tokenizer.unique and torch.equal(tokenizer.codes[: len(copies) + 1], again.codes)


# Property 10: LETTER -------------------------------------------------------------------------------------------------


def test_alignment_moves_the_encoder_and_no_codebook() -> None:
    model, x = autoencoder(), vectors(20)
    initialise(model, x, seed=0)
    target = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    through = model.quantise(model.encoder(x)).through
    value = alignment_loss(through, target)
    scores = (through @ target.T).detach()
    assert torch.allclose(value, (scores.logsumexp(1) - scores.diagonal()).mean())
    value.backward()
    assert gradients(model.codebooks) == 0.0 and gradients(model.encoder) > 0
    assert alignment_loss(through[:1], target[:1]).item() == 0.0


def test_diversity_ignores_the_own_code_and_moves_codebooks_alone() -> None:
    model, x = autoencoder(), vectors(40)
    initialise(model, x, seed=0)
    codes = model.quantise(model.encoder(x)).codes[:, 0]
    codebook, generator = model.quantizers[0].codebook, torch.Generator().manual_seed(0)
    diversity_loss(codes, codebook, torch.zeros(8, dtype=torch.long), generator).backward()
    assert gradients(model.encoder) == 0.0 and gradients(model.quantizers[0]) > 0
    pairs = torch.tensor([0, 0, 1, 2, 2, 3, 3, 4])  # one partner or none
    logits = (codebook @ codebook.T).detach()
    value = diversity_loss(torch.tensor([0, 2, 3]), codebook, pairs, generator)
    expected = [torch.cat([logits[a, :a], logits[a, a + 1 :]]).logsumexp(0) - logits[a, b] for a, b in ((0, 1), (3, 4))]
    assert torch.allclose(value, torch.stack(expected).mean(), rtol=1e-5), "alone in its cluster: no loss"
    assert diversity_loss(torch.tensor([2, 7]), codebook, pairs, generator).item() == 0.0


def test_clusters_of_codes_are_bounded() -> None:
    book = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    book[:200] *= 1e-3  # plain k-means would put these into one cluster
    found = cluster_codes(book, 10, seed=0)
    assert found.shape == (256,) and int(torch.bincount(found, minlength=10).max()) <= 60
    assert sorted(set(cluster_codes(book[:3], 10, seed=0).tolist())) == [0, 1, 2]


def test_weights_of_zero_train_as_without_the_losses() -> None:
    items = item_features(40)
    plain, off = RQVAE(**SMALL), RQVAE(**SMALL | {"alignment": 0.0, "diversity": 0.0, "clusters": 3})
    tiny, strong = RQVAE(**SMALL | {"diversity": 1e-30}), RQVAE(**SMALL | {"diversity": 5.0})
    for tokenizer in (plain, off, tiny, strong):
        tokenizer.fit(items, seed=0)
    assert torch.equal(plain.codebook(1), off.codebook(1)) and torch.equal(plain.codebook(3), tiny.codebook(3))
    assert not torch.equal(plain.codebook(1), strong.codebook(1))


def test_alignment_needs_its_level_which_is_then_no_input() -> None:
    items = item_features(40)
    with pytest.raises(DataError, match=r"'collaborative': 8[^$]*of width 6, as item_tokenizer.latent"):
        RQVAE(**SMALL | {"alignment": 0.1, "latent": 6}).fit(items, seed=0)
    del items["collaborative"]
    with pytest.raises(DataError, match="alignment needs a collaborative vector"):
        RQVAE(**SMALL | {"alignment": 0.1}).fit(items, seed=0)
    tokenizer, aligned = RQVAE(**SMALL), RQVAE(**SMALL | {"alignment": 0.5})
    tokenizer.fit(items, seed=0)
    aligned.fit(item_features(40), seed=0)
    assert len(tokenizer.center) == len(aligned.center) == fused(items).shape[1]
    assert not torch.equal(tokenizer.codebook(1), aligned.codebook(1))


# Training ------------------------------------------------------------------------------------------------------------


def test_training_lowers_the_error_and_the_report_says_what_was_found() -> None:
    items = item_features(60)
    start = RQVAE(**SMALL | {"epochs": 0}).fit(items, seed=0)
    tokenizer = RQVAE(**SMALL | {"epochs": 80, "learning_rate": 3e-3})
    report = tokenizer.fit(items, seed=0)
    assert report.reconstruction < 0.5 * start.reconstruction
    assert report.details["unexplained"] == pytest.approx(
        report.reconstruction / float(np.square(fused({name: items[name] for name in sorted(items)})).mean()), rel=1e-4
    )
    assert report.details["epochs"] == 80 and len(report.usage) == 3 and "perplexity_1" in report.details


def test_patience_stops_early() -> None:
    options = SMALL | {"epochs": 400, "learning_rate": 1e-12, "weight_decay": 0.0, "dead_codes_every": 0}
    stopped = RQVAE(**options | {"patience": 20}).fit(item_features(20), seed=0)
    assert stopped.details["epochs"] < 200
    assert RQVAE(**options | {"patience": 0, "epochs": 60}).fit(item_features(20), seed=0).details["epochs"] == 60


def test_dead_codes_come_back_to_life() -> None:
    model, x = autoencoder(), vectors(100)
    initialise(model, x, seed=0)
    for quantizer in model.quantizers:
        quantizer.reseed(torch.arange(1, 8), torch.full((7, 6), 1e3))
    before = [len(torch.unique(column)) for column in model.quantise(model.latents(x)).codes.T]
    assert before == [1, 1, 1]
    assert revive(model, x, torch.Generator().manual_seed(0)) == 21
    after = [len(torch.unique(column)) for column in model.quantise(model.latents(x)).codes.T]
    assert after == [8, 8, 8]


# Small and odd catalogues --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items",
    [
        only_text([[1.0, 2.0, 3.0]]),
        only_text([[1.0, 2.0, 3.0]] * 2),
        only_text([[0.0] * 3] * 5),
        only_text(np.full((6, 3), np.nan), mask=[False] * 6),
    ],
    ids=["one item", "two identical items", "no content", "nobody has text"],
)
@pytest.mark.parametrize("extra", [{}, {"sinkhorn": 0.003, "diversity": 1e-3}], ids=["plain", "options"])
def test_defined_codes_for_the_smallest_catalogues(items: ItemFeatures, extra: dict[str, Any]) -> None:
    tokenizer = RQVAE(**SMALL | extra)
    report = tokenizer.fit(items, seed=0)
    count = len(items["title"][0]) - 1
    assert tokenizer.codes.shape == (count + 1, 3) and tokenizer.unique
    assert torch.equal(tokenizer.decode(tokenizer.codes[1:]), torch.arange(1, count + 1))
    assert np.isfinite(report.reconstruction) and report.collisions == (count if count > 1 else 0)


def test_more_equal_items_than_last_codes_is_refused_and_mended_by_a_larger_last_level() -> None:
    items = only_text([[1.0, 2.0]] * 20)
    with pytest.raises(DataError, match="20 items share the prefix"):
        RQVAE(**SMALL).fit(items, seed=0)
    tokenizer = RQVAE(**SMALL | {"codebook_size": [4, 4, 32]})
    tokenizer.fit(items, seed=0)
    assert tokenizer.unique and tokenizer.level_sizes == (4, 4, 32)


def test_added_items_are_coded_by_what_was_learned() -> None:
    items = item_features(30)
    tokenizer = RQVAE(**SMALL | {"collisions": "none"})
    tokenizer.fit(items, seed=0)
    repeated = {name: (np.concatenate([v, v[1:11]]), np.concatenate([m, m[1:11]])) for name, (v, m) in items.items()}
    backwards = {name: repeated[name] for name in reversed(repeated)}
    other = copy.deepcopy(tokenizer)
    tokenizer.add(repeated)
    other.add(backwards)
    assert torch.equal(tokenizer.codes[31:], tokenizer.codes[1:11]) and not tokenizer.unique
    assert torch.equal(tokenizer.codes, other.codes), "levels are known by name"
    before = tokenizer.codes
    tokenizer.add(repeated)
    assert torch.equal(tokenizer.codes, before), "nothing to add"
    with pytest.raises(DataError, match="do not extend the catalogue"):
        tokenizer.add(items)
    with pytest.raises(DataError, match="do not extend the catalogue"):
        tokenizer.add({name: value for name, value in item_features(50).items() if name != "title"})


def test_a_loaded_tokenizer_with_several_layers_goes_on(tmp_path: Path) -> None:
    tokenizer = RQVAE(**SMALL | {"hidden": (12, 10), "codebook_size": (8, 8, 32)})
    tokenizer.fit(item_features(30), seed=0)
    tokenizer.save_pretrained(tmp_path)
    again = RQVAE.from_pretrained(tmp_path)
    assert again.report == tokenizer.report
    for one in (tokenizer, again):
        one.add(item_features(45))
    assert torch.equal(again.codes, tokenizer.codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels: found 0"),
        ({"codebook_size": (4, 4)}, r"codebook_size: found \(4, 4\).*each of 3 levels"),
        ({"hidden": (8, 0)}, "hidden: found"),
        ({"beta": -1}, "beta: found -1"),
        ({"learning_rate": 0}, "learning_rate: found 0"),
        ({"collisions": "first"}, "collisions: found 'first', expected one of nearest_free"),
        ({"residual_grad": "all"}, "residual_grad: found 'all', expected one of full, first_level"),
        ({"reduction": "max"}, "reduction: found 'max'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        RQVAE(**options)
