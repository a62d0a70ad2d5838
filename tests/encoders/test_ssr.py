"""SSR: the contract on both paths, the checkable properties of its stages, gates, diagnostics, what bands are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.data.graph import UserItemGraph
from llmrec.data.schema import DataContext
from llmrec.encoders.ssr import BandFusion, CrossBandOperator, SSRConfig, SSREncoder, band_alignment, draw_bands
from llmrec.errors import RecipeError
from llmrec.interfaces import GateSource
from tests.contracts.encoders import cyclic_context, stamped
from tests.encoders.graphs import GraphEncoderContract, content, fit, with_features

SMALL: dict[str, Any] = {"num_items": 24, "hidden_size": 8, "max_history": 16, "num_bands": 2, "align_items": 16}


def cyclic_with_content() -> DataContext:
    return with_features(cyclic_context(24), content(24))


def built(context: DataContext | None = None, seed: int = 0, **options: Any) -> SSREncoder:
    context = context or cyclic_with_content()
    torch.manual_seed(seed)
    config = SSRConfig(**{**SMALL, "num_items": context.num_items, "num_users": context.num_users, **options})
    return SSREncoder.from_context(config, context).eval()


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Training pairs of the cyclic data and one negative each."""
    users, items = (torch.from_numpy(ids) for ids in cyclic_context(24).train_edges[:, ::3].copy())
    return users, items, (items + 11) % 24 + 1


def edge_scores(model: SSREncoder) -> Any:
    users, items, others = pairs()
    return model.score_edges(users, items, others[:, None])


class TestExact(GraphEncoderContract):
    config = SSRConfig(**SMALL)
    encoder_class = SSREncoder
    overfit_learning_rate = 2e-2


class TestPolynomial(GraphEncoderContract):
    config = SSRConfig(**SMALL, eig_max=0, order=6, train_user="node", mask_target="prediction")
    encoder_class = SSREncoder
    overfit_learning_rate = 2e-2


class TestTrainedContent(GraphEncoderContract):
    config = SSRConfig(**SMALL, eig_max=0, order=4, content="mlp", align_on="bands", stop_grad_full=True)
    encoder_class = SSREncoder
    overfit_learning_rate = 2e-2


# Decompose -----------------------------------------------------------------------------------------------------------


def random_context(users: int = 60, items: int = 90, events: int = 700, seed: int = 0) -> DataContext:
    rng = np.random.default_rng(seed)
    edges = np.stack([rng.integers(1, users + 1, events), rng.integers(1, items + 1, events)])
    counts = np.bincount(edges[1], minlength=items + 1)
    return with_features(DataContext(items, users, counts, edges), content(items))


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
@pytest.mark.parametrize("eig_max", [3000, 0])
def test_bands_sum_to_the_signal_on_both_paths(bands: int, eig_max: int) -> None:
    """Property 1: within 1e-5."""
    model = built(random_context(), num_bands=bands, eig_max=eig_max)
    assert model.config.exact == (eig_max > 0)
    signal = torch.randn(150, 7, generator=torch.Generator().manual_seed(1))
    found = model.decompose(signal)
    assert found.shape == (bands, 150, 7) and (found.sum(0) - signal).abs().max() < 1e-5


def test_exact_bands_are_orthogonal_projections() -> None:
    """Property 2: idempotent, mutually orthogonal, energies add up (float64 eigenvectors)."""
    model = built(random_context(), num_bands=3)
    model.modes = torch.linalg.qr(model.modes.double()).Q  # float32 storage rounds at 1e-7
    signal = torch.randn(150, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bands = model.decompose(signal)
    for b, part in enumerate(bands):
        again = model.decompose(part)
        assert (again[b] - part).abs().max() < 1e-6
        assert all(again[c].abs().max() < 1e-6 for c in range(3) if c != b)
    torch.testing.assert_close(bands.pow(2).sum(), signal.pow(2).sum(), rtol=1e-6, atol=0)


def test_stored_eigenvectors_are_those_of_the_graph() -> None:
    model = built(random_context(), num_bands=3)
    dense = torch.from_numpy(UserItemGraph.from_context(random_context()).normalised.toarray()).float()
    spectrum = model.modes.T @ dense @ model.modes
    assert (spectrum - torch.diag(spectrum.diagonal())).abs().max() < 1e-5
    assert (spectrum.diagonal().diff() < 1e-5).all(), "from smooth (S = 1) to alternating (S = -1)"


def test_bands_have_about_equal_energy() -> None:
    """Property 4, by the content: 1/B plus or minus the share of the largest eigenvalue (0 has a null space of 30)."""
    model = built(random_context(), num_bands=3)
    signals = model._signals()[1:]
    energy = torch.stack([(model.modes.T @ signal).pow(2).sum(1) for signal in signals])
    energy = (energy / energy.sum(1, keepdim=True)).mean(0)
    dense = torch.from_numpy(UserItemGraph.from_context(random_context()).normalised.toarray())
    null = torch.linalg.eigvalsh(dense).flip(0).abs() < 1e-8
    largest = max(float(energy[~null].max()), float(energy[null].sum()))
    shares = torch.stack([model.decompose(signal).pow(2).sum((1, 2)) for signal in signals])
    shares = (shares / shares.sum(1, keepdim=True)).mean(0)
    assert (shares - 1 / 3).abs().max() <= largest + 1e-4, shares
    assert largest < 0.3, "else the bound says nothing"


def test_smooth_signals_lie_in_the_first_band() -> None:
    """sqrt(degree) is the eigenvector of eigenvalue 0 of the Laplacian, and its sign flip on users that of 2."""
    context = random_context()
    degrees = torch.from_numpy(UserItemGraph.from_context(context).degrees).float().sqrt()[:, None]
    flipped = degrees * torch.where(torch.arange(150) < 60, -1.0, 1.0)[:, None]
    for eig_max in (3000, 0):
        model = built(context, num_bands=3, eig_max=eig_max, order=64)
        for signal, band in ((degrees, 0), (flipped, 2)):
            energy = model.decompose(signal).pow(2).sum((1, 2))
            assert energy[band] > 0.95 * signal.pow(2).sum()


def test_too_many_bands_are_refused() -> None:
    context = DataContext(1, 1, np.array([0, 1]), np.array([[1], [1]]))
    with pytest.raises(RecipeError, match="num_bands"):
        built(context, num_bands=3)


# Modulate and fuse ---------------------------------------------------------------------------------------------------


def test_one_band_without_mixing_is_the_normalised_signal() -> None:
    """Property 5, first part: Z is the RMS-normalised H."""
    model = built(num_bands=1, gate="uniform")
    nodes = torch.arange(44)
    bands = model.node_bands(nodes)
    expected = F.rms_norm(bands[:, 0], (8,), eps=1e-6).flatten(1)
    torch.testing.assert_close(model.fusion(bands)[0], expected, rtol=0, atol=0)
    assert model.fusion.scale == 0, "the operator starts switched off"


@pytest.mark.parametrize("target", ["representation", "prediction"])
def test_the_masking_term_compares_the_two_passes(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(mask_target=target, mask_rate=0.5, train_user="node").train()
    keep = torch.tensor([True, False])
    monkeypatch.setattr("llmrec.encoders.ssr.draw_bands", lambda *_: keep)
    users, items, others = pairs()
    found = model.score_edges(users, items, others[:, None]).parts["masking"]
    nodes = torch.cat([users - 1, items + 19, others + 19]).unique()
    bands = model.node_bands(nodes)
    full, masked = model.fusion(bands)[0], model.fusion(bands * keep[:, None, None])[0]
    if target == "representation":
        torch.testing.assert_close(found, (full - masked).pow(2).mean().detach())
        return
    place = {int(node): at for at, node in enumerate(nodes)}
    scores = []
    for z in (full, masked):
        u = z[[place[int(user) - 1] for user in users]]
        both = [z[[place[int(item) + 19] for item in given]] for given in (items, others)]
        scores.append(torch.cat([(u * v).sum(-1) for v in both]) / model.config.temperature)
    torch.testing.assert_close(found, (scores[0] - scores[1]).pow(2).mean().detach())


def test_no_masking_term_without_a_rate_or_when_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Property 5, second part."""
    assert "masking" not in edge_scores(built(mask_rate=0.0).train()).parts
    monkeypatch.setattr("llmrec.encoders.ssr.draw_bands", lambda *_: torch.tensor([True, True]))
    assert edge_scores(built(mask_rate=0.5).train()).parts["masking"] == 0


def test_stop_grad_full_fixes_the_full_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.encoders.ssr.draw_bands", lambda *_: torch.tensor([True, False]))
    gradients = []
    for stop in (False, True):
        alone: dict[str, Any] = {"align_weight": 0.0, "l2_weight": 0.0, "mask_weight": 1.0}
        model = built(stop_grad_full=stop, cross_band=False, gate="uniform", **alone).train()
        edge_scores(model).auxiliary.backward()
        assert model.fusion.gain.grad is not None
        gradients.append(model.fusion.gain.grad[1])  # the hidden band reaches the loss by the full pass alone
    assert gradients[0].abs().min() > 0 and not gradients[1].any()


def test_bands_are_hidden_in_training_only() -> None:
    """Property 7: two evaluation passes are bit-equal, training passes differ."""
    model = built(mask_rate=0.5, align_weight=0.0)
    assert torch.equal(edge_scores(model).positive, edge_scores(model).positive)
    assert "masking" not in edge_scores(model).parts
    torch.manual_seed(0)
    losses = {float(edge_scores(model.train()).auxiliary.detach()) for _ in range(8)}
    assert len(losses) > 1


def test_at_least_one_band_stays() -> None:
    torch.manual_seed(0)
    draws = torch.stack([draw_bands(3, 0.7, torch.device("cpu")) for _ in range(300)])
    assert draws.any(1).all() and 0.25 < draws.float().mean() < 0.55


def test_the_operator_is_its_dense_kernel() -> None:
    """Property 6: the CP form equals the assembled kernel, with r(2B + 2M + d) numbers."""
    torch.manual_seed(0)
    operator = CrossBandOperator(bands=3, signals=2, width=5, rank=4)
    operator.reset()
    torch.nn.init.normal_(operator.channel)
    assert sum(p.numel() for p in operator.parameters()) == 4 * (2 * 3 + 2 * 2 + 5)
    kernel = torch.einsum(
        "pq,bq,sq,mq,cq->pbsmc",
        operator.band_out, operator.band_in, operator.signal_out, operator.signal_in, operator.channel,
    )  # fmt: skip
    states = torch.randn(7, 3, 2, 5)
    torch.testing.assert_close(operator(states), torch.einsum("pbsmc,nbmc->npsc", kernel, states), atol=1e-5, rtol=1e-5)


def test_gates_are_shares_of_bands() -> None:
    torch.manual_seed(0)
    fusion = BandFusion(SSRConfig(num_bands=3, hidden_size=8, levels={"text": 6}))
    assert fusion.gate is not None and fusion.operator is not None
    torch.nn.init.normal_(fusion.gate.weight)
    torch.nn.init.zeros_(fusion.gate.bias)
    fusion.reset()
    fusion.operator.reset()
    states, mixed, gates = fusion(torch.randn(5, 3, 2, 8))
    torch.testing.assert_close(gates.sum(1), torch.ones(5, 2))
    assert (gates[0] - gates[1]).abs().max() > 1e-3, "they depend on the node"
    torch.testing.assert_close(states, torch.einsum("nbm,nbmd->nmd", gates, mixed).flatten(1))


def test_switches_leave_parts_out() -> None:
    everything = dict(built().named_parameters())
    assert not [n for n, _ in built(cross_band=False).named_parameters() if "operator" in n or n.endswith("scale")]
    assert not [n for n, _ in built(gate="uniform").named_parameters() if "fusion.gate" in n]
    assert {"fusion.scale", "fusion.operator.channel", "fusion.gate.weight"} <= set(everything)
    assert "alignment" in edge_scores(built()).parts
    assert "alignment" not in edge_scores(built(align_weight=0.0)).parts


# Align ---------------------------------------------------------------------------------------------------------------


def test_contrast_is_the_formula() -> None:
    torch.manual_seed(0)
    v, t, tau = torch.randn(4, 3, 5), torch.randn(4, 3, 5), 0.3
    losses = []
    for a, c in ((v, t), (t, v)):
        s = lambda x, y: torch.exp(F.cosine_similarity(x, y, dim=0) / tau)  # noqa: E731
        for i in range(4):
            for b in range(3):
                items = sum(s(a[i, b], c[j, b]) for j in range(4))
                bands = sum(s(a[i, b], c[i, other]) for other in range(3) if other != b)
                losses.append(-torch.log(s(a[i, b], c[i, b]) / (items + bands)))
    torch.testing.assert_close(band_alignment(v, t, tau), 2 * torch.stack(losses).mean())


def test_contrast_is_least_for_the_true_pairs_and_can_be_learned() -> None:
    """Property 9: a rotated copy is matched by a learned rotation; no permutation of the items is better."""
    torch.manual_seed(0)
    v = torch.randn(12, 3, 6)
    t = v @ torch.linalg.qr(torch.randn(6, 6)).Q
    turn = torch.nn.Parameter(torch.eye(6))
    optimizer = torch.optim.Adam([turn], lr=0.05)
    first = band_alignment(v @ turn, t, 0.2).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = band_alignment(v @ turn, t, 0.2)
        loss.backward()
        optimizer.step()
    best = band_alignment(v @ turn, t, 0.2).item()
    assert best < 0.2 * first
    assert all(band_alignment(v @ turn, t[torch.randperm(12)], 0.2).item() > best for _ in range(20))


def test_an_item_stands_once_in_the_contrast() -> None:
    """Repeats of a positive in the batch change nothing; items without a level are left out."""
    model = built()
    items = torch.tensor([1, 5, 9])
    once = model.score_edges(items, items, items[:, None]).parts["alignment"]
    twice = torch.cat([items, items, items])
    torch.testing.assert_close(model.score_edges(twice, twice, twice[:, None]).parts["alignment"], once)
    more = torch.cat([items, torch.tensor([2, 3, 4])])  # these lack a picture, a text, both
    torch.testing.assert_close(model.score_edges(more, more, more[:, None]).parts["alignment"], once)


def test_one_level_is_aligned_with_the_identity() -> None:
    context = with_features(cyclic_context(24), {"text": content(24)["text"]})
    model = built(context)
    found = edge_scores(model).parts["alignment"]
    items = pairs()[1].unique()
    items = items[(items != 3) & (items != 4)]
    mixed = model.fusion(model.node_bands(items + 19))[1]
    torch.testing.assert_close(found, band_alignment(mixed[:, :, 0], mixed[:, :, 1], 0.2).detach())
    assert "alignment" not in edge_scores(built(cyclic_context(24))).parts, "without content there is nothing to align"


@pytest.mark.parametrize("how", ["linear", "mlp"])
def test_a_missing_level_is_masked(how: str) -> None:
    """What stands in the row of an item without the level changes no state."""
    features = content(24)
    for values, mask in features.values():
        values[~mask] = 1e6
    changed = built(with_features(cyclic_context(24), features), content=how)
    assert torch.equal(changed.item_vectors(), built(content=how).item_vectors())


# As a sequence encoder -----------------------------------------------------------------------------------------------


def test_a_training_user_is_a_row_of_the_graph_times_the_states() -> None:
    """Property 8: padding and order do not matter; with exactly the user's edges, encode is row u of S Z."""
    model, context = built(random_context()), random_context()
    graph = UserItemGraph.from_context(context)
    z = np.concatenate([np.zeros((60, model.gate_dim)), model.item_vectors()[1:].detach().numpy()])
    expected = graph.normalised @ z
    for user in (1, 17, 60):
        items = torch.from_numpy(graph.edges[1][graph.edges[0] == user])
        shuffled = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(user))]
        padded = F.pad(torch.cat([shuffled, shuffled[:2]]), (0, 3))[None]  # repeats are one link
        batch: Any = {"item_ids": padded, "lengths": torch.tensor([len(items) + 2])}
        np.testing.assert_allclose(
            model.user_representation(batch)[0].detach().numpy(), expected[user - 1], atol=1e-4, rtol=1e-4
        )


def test_gates_are_the_mean_over_the_history() -> None:
    model = built()
    assert isinstance(model, GateSource) and model.num_gates == 2
    assert model.fusion.gate is not None
    torch.nn.init.normal_(model.fusion.gate.weight)
    items = torch.tensor([[3, 7, 3, 9, 0], [2, 0, 0, 0, 0]])
    batch = stamped(items, torch.tensor([4, 1]))
    expected = model.fusion(model.node_bands(torch.tensor([3, 7, 9]) + 19))[2].mean((0, 2))
    torch.testing.assert_close(model.gates(batch)[0], expected)
    positions = model.position_gates(batch)
    torch.testing.assert_close(positions[0, 3], expected)
    torch.testing.assert_close(positions[0, 0], model.fusion(model.node_bands(torch.tensor([22])))[2].mean((0, 2)))
    torch.testing.assert_close(positions.sum(-1), torch.ones(2, 5))


def test_diagnostics_add_up() -> None:
    """Energy and gates are shares; margins add up to what training pairs score above others."""
    model = built(random_context(), num_bands=3)
    records = model.band_diagnostics()
    assert [(r["signal"], r["band"]) for r in records][:4] == [
        ("identity", 1),
        ("identity", 2),
        ("identity", 3),
        ("text", 1),
    ]
    for name in ("identity", "text", "image"):
        own = [r for r in records if r["signal"] == name]
        assert sum(r["energy"] for r in own) == pytest.approx(1, abs=1e-4)
        assert sum(r["gate"] for r in own) == pytest.approx(1, abs=1e-4)
        assert own[0]["from"] == 0 and own[-1]["to"] == 2 and own[0]["to"] == own[1]["from"]
    users, items = model._training_pairs(20_000)
    assert len(users) == UserItemGraph.from_context(random_context()).edges.shape[1]
    states = model.fusion(model.node_bands(torch.arange(150)))[0]
    other = items.roll(len(items) // 2)
    margin = ((states[users] * states[items]).sum(-1) - (states[users] * states[other]).sum(-1)).mean() / 4.0
    assert sum(r["margin"] for r in records) == pytest.approx(margin.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_bands", 0), ("order", 0), ("rank", 0), ("eig_max", -1), ("content", "cnn"), ("gate", "x"),
        ("mask_rate", 1.0), ("mask_target", "x"), ("mask_weight", -1), ("align_weight", -1), ("align_on", "x"),
        ("align_temperature", 0), ("temperature", 0), ("align_items", 1), ("train_user", "x"),
    ],
)  # fmt: skip
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"encoder\.{option}: found"):
        SSRConfig(**{option: value})


# What the bands are for ----------------------------------------------------------------------------------------------


def noisy_clusters(seed: int) -> tuple[DataContext, np.ndarray]:
    """Users like one of two groups of items; an item's content is its group, weak, and strong noise of its own."""
    rng = np.random.default_rng(seed)
    users, items = 60, 80
    group = np.arange(1, items + 1) % 2  # of item i it is i % 2
    pairs = [(u, i) for u in range(1, users + 1) for i in rng.permutation(np.flatnonzero(group == u % 2))[:12] + 1]
    edges = np.array(pairs).reshape(users, 12, 2)
    values = 2.0 * rng.standard_normal((items + 1, 16))
    values[1:, 0] += 2 * group - 1
    train = edges[:, :8].reshape(-1, 2).T
    features = {"text": (values.astype(np.float32), np.arange(items + 1) > 0)}
    context = DataContext(items, users, np.bincount(train[1], minlength=items + 1), train, item_features=features)
    return context, edges[:, 8:, 1]


def held_out_auc(model: SSREncoder, context: DataContext, held_out: np.ndarray) -> float:
    """Mean over users of how often a held-out item scores above an item of the other group."""
    histories = torch.from_numpy(context.train_edges[1]).view(len(held_out), 8)
    with torch.no_grad():
        scores = model.score_items({"item_ids": histories, "lengths": torch.full((len(held_out),), 8)})
    items, found = torch.arange(context.num_items + 1), []
    for row, wanted in zip(scores, held_out, strict=True):
        others = row[(items > 0) & (items % 2 != int(wanted[0]) % 2)]
        found.append((row[wanted][:, None] > others).float().mean())
    return float(torch.stack(found).mean())


def test_smooth_preferences_are_found_in_noisy_content() -> None:
    """Property 10: with bands and masking SSR beats plain concatenation, and the smooth band gets the most weight."""
    aucs: dict[str, list[float]] = {"bands": [], "plain": []}
    gates = []
    for seed in range(2):
        context, held_out = noisy_clusters(seed)
        for name, options in (
            ("bands", {"num_bands": 3, "mask_rate": 0.3}),
            ("plain", {"num_bands": 1, "mask_rate": 0.0, "cross_band": False, "gate": "uniform"}),
        ):
            model = built(context, seed, hidden_size=16, eig_max=0, train_user="node", **options)
            fit(model, context, 40, learning_rate=1e-2)
            aucs[name].append(held_out_auc(model, context, held_out))
            if name == "bands":
                gates.append([r["gate"] for r in model.band_diagnostics() if r["band"] == 1])
    assert np.mean(aucs["bands"]) > np.mean(aucs["plain"]) + 0.01, aucs
    assert np.mean(gates) > 1 / 3, gates
