"""CaseQ: the contract, the ten properties of a correct implementation, its posterior as the gates of an LLM, and the
protocol with a lapse from a recipe to both numbers."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.cli import main
from llmrec.data.schema import SequenceBatch
from llmrec.encoders.caseq import CaseQConfig, CaseQEncoder, CaseQLayer, divergence
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.interfaces import GateSource
from llmrec.llm.recommender import LLMRecommender
from llmrec.recipe import Recipe, load_recipe, parse_recipe
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from llmrec.training.stages import run_recipe
from llmrec.tuners.ilora import ILoraTuner
from tests.contracts.encoders import EncoderContract, same
from tests.data.tables import histories, prepared
from tests.llm import tiny

VARIANTS = list(itertools.product(("attention", "gru"), ("mix", "path")))
every_variant = pytest.mark.parametrize(("backbone", "hierarchy"), VARIANTS)


class TestCaseQMixAttention(EncoderContract):
    config = CaseQConfig(num_items=50, hidden_size=16, max_history=16, num_contexts=2)
    encoder_class = CaseQEncoder
    overfit_learning_rate = 1e-2


class TestCaseQPathGRU(TestCaseQMixAttention):
    config = CaseQConfig(
        num_items=50, hidden_size=16, max_history=16, num_contexts=2, hierarchy="path", backbone="gru", dropout=0.0
    )


def small(backbone: str = "attention", hierarchy: str = "mix", **options: Any) -> CaseQEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "initializer_range": 0.3, **options}
    return CaseQEncoder(CaseQConfig(backbone=backbone, hierarchy=hierarchy, **chosen)).eval()  # type: ignore[arg-type]


def inputs(rows: int = 3, width: int = 6, lengths: list[int] | None = None) -> SequenceBatch:
    items = torch.randint(1, 21, (rows, width), generator=torch.Generator().manual_seed(4))
    kept = torch.tensor(lengths or [width] * rows)
    return {"item_ids": items * (torch.arange(width) < kept[:, None]), "lengths": kept}


def contexts_of(model: CaseQEncoder, batch: SequenceBatch) -> Tensor:
    return model.encode(batch).parts["contexts"]  # type: ignore[index]


def gates_by_layer(model: CaseQEncoder, batch: SequenceBatch) -> list[Tensor]:
    """[S, B, L, K] of each layer, caught on the way."""
    caught: list[Tensor] = []
    handles = [
        layer.branching.register_forward_hook(lambda module, given, found: caught.append(found.exp()))
        for layer in model.layers
    ]
    with torch.no_grad():
        model.encode(batch)
    for handle in handles:
        handle.remove()
    return caught


def make_equal(layer: CaseQLayer) -> None:
    for expert in layer.experts[1:]:
        expert.load_state_dict(layer.experts[0].state_dict())


def sharpen(model: CaseQEncoder, factor: float) -> None:
    with torch.no_grad():
        for layer in model.layers:
            layer.branching.direction.mul_(factor)


# Properties --------------------------------------------------------------------------------------------------------


def test_1_one_context_is_the_plain_attention_encoder() -> None:
    """K = 1 is SASRec with the published block and the same weights, and adds nothing to the loss."""
    model = small(num_contexts=1, num_heads=2)
    plain = SASRecEncoder(
        SASRecConfig(num_items=20, hidden_size=8, max_history=12, dropout=0.0, norm="classic", num_heads=2)
    )
    weights = {
        name.replace("layers", "blocks").replace("experts.0.", ""): value
        for name, value in model.state_dict().items()
        if "branching" not in name
    }
    plain.load_state_dict(weights)
    batch = inputs(lengths=[6, 3, 1])
    same(model.encode(batch).hidden, plain.eval().encode(batch).hidden)
    output = model.train().encode(batch)
    assert output.parts is not None and output.auxiliary is not None
    assert output.parts["kl"].item() == 0.0 == output.auxiliary.item()
    assert output.parts["contexts"][0].unique().tolist() == [1.0] and output.parts["mutual_information"].item() == 0.0


@pytest.mark.parametrize("hierarchy", ["mix", "path"])
def test_1_one_context_is_the_plain_recurrent_encoder(hierarchy: str) -> None:
    model, batch = small("gru", hierarchy, num_contexts=1), inputs()
    stack = nn.GRU(8, 8, num_layers=2, batch_first=True)
    for number, layer in enumerate(model.layers):
        for name, value in layer.experts[0].gru.named_parameters():
            getattr(stack, name.replace("l0", f"l{number}")).data.copy_(value)
    embedded = model.item_embedding(batch["item_ids"]) * 8**0.5 + model.position_embedding(torch.arange(6))
    same(model.encode(batch).hidden, F.layer_norm(stack(embedded)[0], (8,)))
    assert model.train().encode(batch).auxiliary.item() == 0.0  # type: ignore[union-attr]


@every_variant
def test_2_the_posterior_is_the_product_of_gates_along_paths(backbone: str, hierarchy: str) -> None:
    model, batch = small(backbone, hierarchy), inputs(lengths=[6, 3, 1])
    contexts, real = contexts_of(model, batch), torch.arange(6) < torch.tensor([[6], [3], [1]])
    assert contexts.shape == (3, 6, 9) and contexts.dtype == torch.float32
    assert (contexts >= 0).all() and not contexts[~real].any()
    assert (contexts[real].sum(-1) - 1).abs().max() < 1e-6
    first, second = gates_by_layer(model, batch)
    for k, c in itertools.product(range(3), range(3)):
        of_path = first[0, ..., k] * second[k if hierarchy == "path" else 0, ..., c]
        torch.testing.assert_close(contexts[..., 3 * k + c][real], of_path[real], rtol=0, atol=1e-6)
    assert second.shape[0] == (3 if hierarchy == "path" else 1)


@every_variant
def test_3_kl_is_never_negative_and_zero_for_uniform_gates(backbone: str, hierarchy: str) -> None:
    model, batch = small(backbone, hierarchy, kl_weight=0.25), inputs(lengths=[6, 3, 1])
    sharpen(model, 10.0)
    output = model.train().encode(batch)
    assert output.parts is not None and output.auxiliary is not None
    assert output.parts["kl"] > 1e-3
    torch.testing.assert_close(output.auxiliary, 0.25 * output.parts["kl"])
    sharpen(model, 0.0)
    output = model.encode(batch)
    assert output.parts is not None and output.parts["kl"].abs() < 1e-6
    torch.testing.assert_close(output.parts["contexts"][0], torch.full((6, 9), 1 / 9))
    assert model.eval().encode(batch).auxiliary is None
    generator = torch.Generator().manual_seed(0)
    pair = (4 * torch.randn(2, 500, 9, generator=generator)).log_softmax(-1)
    assert divergence(pair[0], pair[1]).min() >= 0
    torch.testing.assert_close(
        divergence(pair[0], pair[1]).mean(), F.kl_div(pair[1], pair[0], log_target=True, reduction="batchmean")
    )


def test_3_the_prior_is_the_mean_posterior_of_pseudo_sequences() -> None:
    """R sequences of max_history items of the catalogue, read at their end; drawn anew, with gradient."""
    model = small(hierarchy="path", pseudo_sequences=7).train()
    torch.manual_seed(5)
    prior = model.log_prior()
    torch.manual_seed(5)
    items = torch.randint(1, 21, (7, 12))
    expected = model.gates({"item_ids": items, "lengths": torch.full((7,), 12)}).mean(0)
    torch.testing.assert_close(prior.exp(), expected)
    assert (model.log_prior() - prior).abs().max() > 1e-6
    prior[0].backward()
    assert all(layer.branching.weight.grad.abs().sum() > 0 for layer in model.layers)
    sharpen(model, 1e3)
    assert torch.isfinite(model.log_prior()).all(), "a context no pseudo-sequence has must not give log 0"
    free = small(kl_weight=0.0).train().encode(inputs())
    assert free.auxiliary is None and "kl" not in free.parts  # type: ignore[operator]


def test_4_the_objective_is_a_bound_of_the_interventional_likelihood() -> None:
    """Four contexts with known P(Y|S,c) and P(c): below log sum_c for any q, equal at q ~ P(Y|S,c) P(c)."""
    generator = torch.Generator().manual_seed(1)
    likelihood = torch.rand(50, 4, generator=generator)
    prior = torch.rand(4, generator=generator).softmax(-1)
    truth = (likelihood * prior).sum(-1).log()

    def objective(log_q: Tensor) -> Tensor:
        return (log_q.exp() * likelihood.log()).sum(-1) - divergence(log_q, prior.log())

    for scale in (0.1, 1.0, 10.0):
        assert (objective((scale * torch.randn(50, 4, generator=generator)).log_softmax(-1)) <= truth + 1e-6).all()
    same(objective((likelihood * prior).log().log_softmax(-1)), truth)


@every_variant
def test_5_states_and_posteriors_never_see_later_events(backbone: str, hierarchy: str) -> None:
    model, batch = small(backbone, hierarchy), inputs(1)
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    output = model(**batch, item_embeds=embeds)
    for found in (output.hidden, output.parts["contexts"]):
        for t in range(6):
            (gradient,) = torch.autograd.grad(found[0, t].pow(3).sum(), embeds, retain_graph=True)
            reach = gradient[0].abs().sum(-1)
            assert not reach[t + 1 :].any() and reach[t] > 0
    wider = {**batch, "item_ids": F.pad(batch["item_ids"], (0, 5))}
    same(model.encode(wider).hidden[:, :6], output.hidden)  # type: ignore[arg-type]
    same(contexts_of(model, wider)[:, :6], output.parts["contexts"])  # type: ignore[arg-type]


@every_variant
def test_6_equal_experts_make_gates_irrelevant(backbone: str, hierarchy: str) -> None:
    model, batch = small(backbone, hierarchy), inputs()
    before = model.encode(batch)
    for layer in model.layers:
        make_equal(layer)
    gated = model.encode(batch)
    sharpen(model, -7.0)
    turned = model.encode(batch)
    assert (turned.parts["contexts"] - gated.parts["contexts"]).abs().max() > 0.1  # type: ignore[index]
    same(turned.hidden, gated.hidden)
    assert (before.hidden - gated.hidden).abs().max() > 1e-2


def released_slots(model: CaseQEncoder, embedded: Tensor) -> tuple[Tensor, list[float]]:
    """The release's K slots written out: expert c reads slot c, slot i of the next layer is sum_c q_{i,c} e_c."""
    count = model.config.num_contexts
    slots, spread = embedded.unsqueeze(2).expand(-1, -1, count, -1), []
    for layer in model.layers:
        gates = layer.branching(slots).exp()  # [B, L, slot i, context c]
        outputs = torch.stack([expert(slots[:, :, c]) for c, expert in enumerate(layer.experts)], dim=2)
        slots = torch.einsum("blic,blcd->blid", gates, outputs)
        spread.append(float((slots - slots[:, :, :1]).abs().max()))
    return slots.mean(2), spread


@pytest.mark.parametrize("backbone", ["attention", "gru"])
def test_7_slots_of_the_release_stay_equal_so_one_is_enough(backbone: str) -> None:
    model, batch = small(backbone), inputs()
    with torch.no_grad():
        state, spread = released_slots(model, model._embed(batch["item_ids"], None))
        assert spread == [0.0, 0.0]
        same(model.encode(batch).hidden, model.outer_norm(state))


@pytest.mark.parametrize("backbone", ["attention", "gru"])
def test_7_paths_reduce_to_the_mixture_when_first_experts_coincide(backbone: str) -> None:
    paths, mix, batch = small(backbone, "path"), small(backbone, "mix"), inputs()
    sharpen(paths, 5.0)
    mix.load_state_dict(paths.state_dict())
    assert (paths.encode(batch).hidden - mix.encode(batch).hidden).abs().max() > 1e-3
    for model in (paths, mix):
        make_equal(model.layers[0])  # type: ignore[arg-type]
    same(paths.encode(batch).hidden, mix.encode(batch).hidden)
    same(contexts_of(paths, batch), contexts_of(mix, batch))


def cycles(model_items: int = 20) -> SequenceBatch:
    walk = (torch.arange(model_items)[:, None] + torch.arange(9)) % model_items + 1
    return {"item_ids": walk[:, :-1], "targets": walk[:, 1:], "lengths": torch.full((model_items,), 8)}  # type: ignore[typeddict-item]


def fit(model: CaseQEncoder, batch: SequenceBatch, steps: int, strategy: NextItem, lr: float = 5e-3) -> list[float]:
    """Train and give the task's share of the loss at every step."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=lr)
    losses = []
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        found = strategy.loss(model, batch, StepInfo(step, steps, 0.0, torch.Generator().manual_seed(step)))
        found.total.backward()
        optimizer.step()
        losses.append(float(found.total.detach() - found.parts.get("auxiliary", 0.0)))
    model.eval()
    return losses


def test_8_a_huge_kl_weight_makes_gates_constant_while_the_task_is_learned() -> None:
    batch, left = cycles(), {}
    for weight in (0.0, 1e3):
        model = small(hidden_size=16, kl_weight=weight)
        sharpen(model, 3.0)
        before = model.gates(batch).detach().var(0).sum()
        losses = fit(model, batch, 60, NextItem(loss="bce", negatives=5), lr=1e-2)
        assert losses[-1] < 0.75 * losses[0]
        left[weight] = float(model.gates(batch).detach().var(0).sum() / before)
    assert left[1e3] < 2e-3 and left[0.0] > 0.1


def test_9_the_gap_split_hides_both_tests_from_training() -> None:
    """Users of G + 3 events and more: `seq[:-(2+G)]` trains, the gap is input of the lapse test only."""
    gap = 4
    dataset = prepared(histories([7, 12, 20, 6, 3], items=90), split=f"gap_{gap}")
    plain, lapse = dataset.histories("test", 100), dataset.histories("test_lapse", 100)
    valid, windows = dataset.histories("valid", 100), dataset.windows(100)
    trained = {int(user): windows[n] for n, user in enumerate(windows.users)}
    askable = [dataset.user_id_of(f"u{n}") for n in (1, 2, 3)]
    assert sorted(plain.users) == sorted(lapse.users) == sorted(valid.users) == sorted(askable)
    rows = {name: {r["user_id"]: r for r in map(part.__getitem__, range(len(part)))} for name, part in
            (("plain", plain), ("lapse", lapse), ("valid", valid))}  # fmt: skip
    for user in askable:
        events = dataset.interactions.filter(dataset.interactions["user"].to_numpy() == user)["item"].to_numpy()
        targets = {name: int(part.targets[list(part.users).index(user)]) for name, part in
                   (("plain", plain), ("lapse", lapse), ("valid", valid))}  # fmt: skip
        assert targets == {"plain": events[-1 - gap], "lapse": events[-1], "valid": events[-2 - gap]}
        assert rows["valid"][user]["item_ids"].tolist() == events[: -2 - gap].tolist()
        assert rows["plain"][user]["item_ids"].tolist() == events[: -1 - gap].tolist()
        assert rows["lapse"][user]["item_ids"].tolist() == events[:-1].tolist()
        assert len(rows["lapse"][user]["seen"]) - len(rows["plain"][user]["seen"]) == gap
        if user in trained:  # the first user has one training event, which predicts nothing
            met = {*trained[user]["item_ids"].tolist(), *trained[user]["targets"].tolist()}
            assert met == set(events[: -2 - gap].tolist())
            assert not met & set(targets.values())
    for short, length in ((4, 6), (5, 3)):  # fewer than G + 3 events: training only
        assert len(trained[dataset.user_id_of(f"u{short}")]["item_ids"]) == length - 1


def adjusted_rand(first: np.ndarray, second: np.ndarray) -> float:
    """Agreement of two labellings above chance (Hubert and Arabie): 1 the same partition, 0 as by chance."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / pairs(np.array([len(first)]))
    return (both - chance) / ((rows + columns) / 2 - chance)


def test_adjusted_rand_of_known_partitions() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert adjusted_rand(labels, 1 - labels) == pytest.approx(1.0)
    assert adjusted_rand(labels, np.array([0, 0, 1, 1, 2, 2])) == pytest.approx(0.2424242)  # worked out by hand
    rng = np.random.default_rng(0)
    assert abs(adjusted_rand(rng.integers(2, size=4000), rng.integers(3, size=4000))) < 0.01


NODES = 24
"""Items of the synthetic shift; two more reveal the context."""


def shifted(rows: int, share: float, seed: int) -> tuple[Tensor, np.ndarray]:
    """[rows, 13] walks and their hidden contexts, 0 with probability `share`.

    A context has a transition matrix of its own (0.9 on one successor). Behind every step of the walk stands a nuisance
    item that names the context, so that the state a step is predicted from knows it.
    """
    rng = np.random.default_rng(seed)
    successors = np.stack([np.random.default_rng(context).permutation(NODES) for context in (7, 8)])
    contexts = (rng.random(rows) >= share).astype(np.int64)
    place, columns = rng.integers(NODES, size=rows), []
    for _ in range(6):
        columns += [place + 1, NODES + 1 + contexts]
        place = np.where(rng.random(rows) < 0.9, successors[contexts, place], rng.integers(NODES, size=rows))
    return torch.from_numpy(np.stack([*columns, place + 1], axis=1)), contexts


def under_shift(backbone: str, layers: int, contexts: int, kl_weight: float, seed: int) -> tuple[float, float]:
    """Train on contexts 90/10; test loss and adjusted Rand of the likeliest path on 10/90."""
    items, _ = shifted(1000, 0.9, seed=1)
    asked, truth = shifted(500, 0.1, seed=2)
    torch.manual_seed(seed)
    model = CaseQEncoder(CaseQConfig(
        num_items=NODES + 2, hidden_size=16, max_history=12, dropout=0.0, backbone=backbone, num_layers=layers,  # type: ignore[arg-type]
        num_contexts=contexts, kl_weight=kl_weight,
    )).train()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)

    def loss(walks: Tensor) -> Tensor:
        batch: Any = {"item_ids": walks[:, :-1], "targets": walks[:, 1:], "lengths": torch.full((len(walks),), 12)}
        return NextItem().loss(model, batch, StepInfo(0, 300, 0.0, generator)).total

    for _ in range(300):
        optimizer.zero_grad()
        loss(items[torch.randint(len(items), (128,), generator=generator)]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        gates = model.gates({"item_ids": asked[:, :-1], "lengths": torch.full((500,), 12)})
        return float(loss(asked)), adjusted_rand(truth, gates.argmax(-1).numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "layers", "seed"), [("gru", 1, 0), ("gru", 1, 1), ("attention", 2, 0)])
def test_10_contexts_are_found_and_survive_a_shift_of_their_shares(backbone: str, layers: int, seed: int) -> None:
    """Both contexts occur in training and testing, their shares change places; K = 1 is the backbone alone."""
    agreement = []
    alone, nothing = under_shift(backbone, layers, 1, 0.0, seed)
    assert nothing == 0.0
    for weight in (0.01, 0.1, 1.0):
        found, rand = under_shift(backbone, layers, 2, weight, seed)
        assert found < alone, f"kl_weight {weight}"
        agreement.append(rand)
    assert max(agreement) > 0.5


# Options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "ssept"}, "backbone: found 'ssept', expected one of attention, gru"),
        ({"hierarchy": "tree"}, "hierarchy: found 'tree', expected one of mix, path"),
        ({"num_contexts": 0}, "num_contexts: found 0, expected 1 or more"),
        ({"pseudo_sequences": 0}, "pseudo_sequences: found 0"),
        ({"kl_weight": -0.5}, "kl_weight: found -0.5, expected 0 or more"),
        ({"num_heads": 5}, "expected a divisor of hidden_size 64"),
        ({"num_contexts": 20, "num_layers": 3}, "8,000 contexts; expected at most 4,096"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("*", r"\*")):
        CaseQConfig(num_items=5, **options)


def test_three_layers_and_too_long_batches() -> None:
    for hierarchy in ("mix", "path"):
        model = small(hierarchy=hierarchy, num_layers=3, num_contexts=2)
        gates = model.gates(inputs(lengths=[6, 3, 1]))
        assert gates.shape == (3, 8) == (3, model.num_gates)
        same(gates.sum(-1), torch.ones(3))
    with pytest.raises(DataError, match="max_history = 12"):
        small().encode(inputs(width=13))


def test_diagnostics_reach_the_training_log() -> None:
    model = small().train()
    found = NextItem().loss(model, cycles(), StepInfo(0, 1, 0.0, torch.Generator()))
    assert {"kl", "mutual_information", "gate_entropy", "auxiliary"} <= set(found.parts)
    assert 0 <= found.parts["mutual_information"] <= math.log(9)
    assert not any(value.requires_grad for value in found.parts.values())
    contexts = contexts_of(model.eval(), inputs())
    mean = contexts.flatten(0, 1).mean(0)
    expected = torch.special.entr(mean).sum() - torch.special.entr(contexts).sum(-1).mean()
    same(model.encode(inputs()).parts["mutual_information"], expected)  # type: ignore[index]


# Gates of an LLM ---------------------------------------------------------------------------------------------------


def gated(style: str, hierarchy: str = "mix", **options: Any) -> LLMRecommender:
    """A tiny LLM whose iLoRA experts are weighed by CaseQ's posterior: K^D = 4 experts, no router."""
    torch.manual_seed(2)
    source = CaseQEncoder(
        CaseQConfig(num_items=tiny.ITEMS, hidden_size=tiny.WIDTH, max_history=16, num_contexts=2, hierarchy=hierarchy)  # type: ignore[arg-type]
    ).eval()
    sharpen(source, 8.0)
    with torch.no_grad():
        source.item_embedding.weight[1:].mul_(15)
    options_of_tuner = {"r": 8, "num_experts": 4, "router": "none", "lora_dropout": 0.0}
    base = ILoraTuner.attach(tiny.llama(), ILoraTuner.configure(options_of_tuner))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    renderer = None if style == "item_slots" else tiny.Renderer(style == "hybrid")
    return LLMRecommender.build(
        base, encoder=source, tokenizer=tiny.tokenizer(), renderer=renderer, style=style, max_history=tiny.LENGTH,
        **options,
    ).eval()  # fmt: skip


def test_the_posterior_is_a_source_of_gates() -> None:
    model, batch = small(), inputs(lengths=[6, 3, 1])
    assert isinstance(model, GateSource)
    gates, by_position = model.gates(batch), model.position_gates(batch)
    assert gates.shape == (3, 9) and by_position.shape == (3, 6, 9)
    torch.testing.assert_close(gates, by_position[torch.arange(3), batch["lengths"] - 1])
    same(by_position.sum(-1), torch.ones(3, 6))
    torch.testing.assert_close(by_position[1, 3:], torch.full((3, 9), 1 / 9))
    changed = {**batch, "item_ids": batch["item_ids"].clone()}
    changed["item_ids"][0, 4:] = changed["item_ids"][0, 4:] % 20 + 1
    torch.testing.assert_close(model.position_gates(changed)[0, :4], by_position[0, :4])  # type: ignore[arg-type]
    assert (model.position_gates(changed)[0, 4:] - by_position[0, 4:]).abs().max() > 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("hierarchy", ["mix", "path"])
def test_item_slots_read_the_posterior_position_by_position(hierarchy: str) -> None:
    model = gated("item_slots", hierarchy, instruction="The user watched")
    items = torch.randint(1, tiny.ITEMS + 1, (3, tiny.LENGTH), generator=torch.Generator().manual_seed(0))
    batch: Any = {"item_ids": items, "lengths": torch.full((3,), tiny.LENGTH)}
    whole = model.represent(batch)  # type: ignore[operator]
    used = model.model.base_model.last_gates[:, len(model.prefix_ids) :]  # type: ignore[arg-type]
    torch.testing.assert_close(used, model.encoder.position_gates(batch))
    changed = {**batch, "item_ids": torch.cat([items[:, :5], items[:, 5:] % tiny.ITEMS + 1], dim=1)}
    other = model.represent(changed)  # type: ignore[operator]
    torch.testing.assert_close(other[:, :5], whole[:, :5])
    assert (other[:, 5:] - whole[:, 5:]).abs().max() > 1e-4
    sharpen(model.encoder, -1.0)
    assert (model.represent(batch) - whole).abs().max() > 1e-4, "the gates must matter"  # type: ignore[operator]


def test_item_slots_train_on_the_posterior() -> None:
    model = gated("item_slots")
    start = torch.arange(tiny.ITEMS)[:, None]
    walk = (start + torch.arange(tiny.LENGTH + 1)) % tiny.ITEMS + 1
    batch: Any = {"item_ids": walk[:, :-1], "targets": walk[:, 1:], "lengths": torch.full((tiny.ITEMS,), tiny.LENGTH)}
    before = copy.deepcopy(model.encoder.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not {id(p) for p in model.encoder.parameters()} & {id(p) for p in trained}
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        found = NextItem().loss(model.train(), batch, StepInfo(step, 30, 0.0, torch.Generator()))
        found.total.backward()
        optimizer.step()
        losses.append(float(found.total.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the frozen encoder moved"


def test_hybrid_prompts_read_the_posterior_after_the_last_event() -> None:
    model = gated("hybrid")
    batch = model.collate(tiny.rows([[1, 2, 3], [4, 5], [6, 7, 8, 9]], [[10, 11], [12, 13], [14, 15]]))
    loss = model.train().answer_loss(tiny.with_answers(model, batch, [10, 12, 14]))  # type: ignore[operator]
    loss.backward()
    experts = [p for name, p in model.named_parameters() if "lora_" in name]
    assert torch.isfinite(loss) and all(p.grad is not None and torch.isfinite(p.grad).all() for p in experts)
    torch.testing.assert_close(model.model.base_model.last_gates, model.encoder.gates(batch))
    with torch.no_grad():
        assert torch.isfinite(model.eval().score_candidates(batch)).all()


def gated_recipe(style: str, **tuner: Any) -> Recipe:
    words = {"template": "next_item/movie", "candidates": 4} if style == "hybrid" else {}
    return parse_recipe({
        "name": "posterior", "seed": 1,
        "dataset": {"source": "synthetic", "max_history": 6,
                    "options": {"users": 40, "items": 30, "events_per_user": 8}},
        "encoder": {"type": "caseq", "hidden_size": 16, "num_contexts": 2},
        "llm": {"model": "tiny-llama", "dtype": "float32"},
        "tuner": {"type": "ilora", "r": 4, "num_experts": 4, "router": "none", "lora_alpha": 8,
                  "target_modules": ["q_proj", "v_proj"], **tuner},
        "prompt": {"style": style, **words},
        "stages": [{"train": part, "max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no"}
                   for part in ("encoder", "tuner")],
        "evaluate": {"protocol": "candidates-4", "max_users": 8, "baselines": ["encoder"]},
    })  # fmt: skip


@pytest.mark.parametrize("style", ["item_slots", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_a_recipe_lets_the_posterior_weigh_the_experts(style: str, tmp_path: Path) -> None:
    record = run_recipe(gated_recipe(style), tmp_path / "run", say=lambda line: None)
    assert {"caseq", "ilora"} == set(record["models"])
    import pyarrow.parquet as pq

    (stored,) = (tmp_path / "run").rglob("gates.parquet")
    gates = np.stack([pq.read_table(stored)[f"gate_{e}"].to_numpy() for e in range(4)], axis=1)
    assert np.abs(gates.sum(1) - 1).max() < 1e-5 and gates.std(0).max() > 1e-4


def test_recipes_that_cannot_work_are_refused_before_training() -> None:
    with pytest.raises(RecipeError, match="found 2, but encoder 'caseq' weighs 4 experts"):
        gated_recipe("item_slots", num_experts=2).resolve()
    raw = gated_recipe("item_slots").model_dump()
    raw["encoder"] = {"type": "sasrec", "hidden_size": 16}
    with pytest.raises(RecipeError, match="'sasrec' gives no expert weights of its own"):
        parse_recipe(raw).resolve()
    gated_recipe("item_slots").resolve()


# The protocol with a lapse -----------------------------------------------------------------------------------------


def test_one_run_is_measured_with_and_without_the_lapse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe gives the test without a lapse; the same weights are asked again after it, with the gap as input."""
    path = Path(__file__).resolve().parents[2] / "recipes" / "caseq" / "movielens_gap.yaml"
    small_run = [
        "dataset={source: synthetic, split: gap_5, max_history: 20, "
        "options: {users: 40, items: 60, events_per_user: 12}}",
        "encoder.hidden_size=16", "stages.0.num_train_epochs=1",
    ]  # fmt: skip
    out = tmp_path / "run"
    record = run_recipe(load_recipe(path, small_run), out, say=lambda line: None)
    assert record["protocol_fields"]["split"] == "test"
    kept = (out / "metrics.json").read_bytes()
    assert main(["evaluate", str(out), "--split", "test_lapse", "--json"]) == 0
    lapse = json.loads(capsys.readouterr().out)
    assert lapse["protocol_fields"]["split"] == "test_lapse" and lapse["users"] == record["users"] > 0
    assert set(lapse["models"]) == set(record["models"]) == {"caseq", "popularity", "itemknn"}
    assert lapse["evaluation"] != record["evaluation"] and lapse["fingerprint"] != record["fingerprint"]
    assert lapse["models"]["caseq"] != record["models"]["caseq"]
    assert (out / "metrics.json").read_bytes() == kept


def test_a_recipe_may_ask_for_the_lapse_itself(tmp_path: Path) -> None:
    raw = {
        "name": "lapse", "encoder": {"type": "popularity"}, "evaluate": {"split": "test_lapse"},
        "dataset": {"source": "synthetic", "split": "gap_5", "options": {"users": 40, "items": 60,
                                                                         "events_per_user": 12}},
    }  # fmt: skip
    record = run_recipe(parse_recipe(raw), tmp_path / "run", say=lambda line: None)
    assert record["protocol_fields"]["split"] == "test_lapse" and record["users"] > 0
    raw["dataset"]["split"] = "leave_one_out"  # type: ignore[index]
    with pytest.raises(DataError, match="test_lapse"):
        run_recipe(parse_recipe(raw), tmp_path / "other", say=lambda line: None)
