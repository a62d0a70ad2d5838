"""iLoRA: the properties a correct implementation must have, numbered as in the list of the method, and its errors."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from packaging.specifiers import SpecifierSet
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from llmrec.errors import CheckpointError, DataError, LlmrecError, RecipeError
from llmrec.tuners import binding
from llmrec.tuners.base import accept_arguments, attach, load_tuner, trainable_report
from llmrec.tuners.gate_state import GatedLinear, expand_gates
from llmrec.tuners.ilora import ILoraConfig, ILoraModel, ILoraTuner, check_encoder
from tests.contracts.tuners import GATE_DIM, LENGTH, TunerContract, randomise_adapter, tiny_llama, tokens

E = 4
ALL = "all-linear"


def representations(rows: int, *positions: int, seed: int = 5) -> Tensor:
    return torch.randn(rows, *positions, GATE_DIM, generator=torch.Generator().manual_seed(seed))


def weights(rows: int, *positions: int, experts: int = E, seed: int = 6) -> Tensor:
    noise = torch.randn(rows, *positions, experts, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * noise, dim=-1)


def gated(trained: bool = True, **options: Any) -> PeftModel:
    """An iLoRA model in eval mode; the same weights for the same options."""
    base = tiny_llama()
    torch.manual_seed(3)
    chosen = {"r": 8, "lora_alpha": 16, "num_experts": E, "gate_dim": GATE_DIM, "target_modules": ALL, **options}
    model = attach(base, ILoraConfig(**{"task_type": "CAUSAL_LM", **chosen}))
    if trained:
        randomise_adapter(model)
    return model.eval()


def plain_with_weights_of(model: PeftModel, **options: Any) -> PeftModel:
    """A stock LoRA model that holds the A and B of an iLoRA model."""
    plain = attach(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=ALL, **options))
    source = model.state_dict()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_" in name:
                parameter.copy_(source[name])
    return plain.eval()


def logits(model: nn.Module, ids: Tensor, **extra: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def same(found: Tensor, expected: Tensor, atol: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def generate(model: PeftModel, ids: Tensor, **extra: Any) -> Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **extra)


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def router_weight(model: PeftModel) -> Tensor:
    return model.base_model.ilora_router["default"].scorer.weight


class TestContract(TunerContract):
    tuner = ILoraTuner
    options: ClassVar[dict[str, Any]] = {**TunerContract.options, "num_experts": E}
    adapter_parts = (".lora_A.", ".lora_B.", ".ilora_router.")

    def extra(self, rows: int) -> dict[str, Tensor]:
        return {"user_repr": representations(rows)}


class TestContractPerPosition(TestContract):
    def extra(self, rows: int) -> dict[str, Tensor]:
        return {"user_repr": representations(rows, LENGTH)}

    def test_generation_runs(self) -> None:
        with pytest.raises(DataError, match="per-position gates"):
            super().test_generation_runs()


class TestContractMlp(TestContract):
    options: ClassVar[dict[str, Any]] = {**TestContract.options, "router": "mlp"}


# 1 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 4, 8])
def test_1_uniform_gates_equal_plain_lora(experts: int) -> None:
    model, ids = gated(num_experts=experts), tokens()
    uniform = torch.full((3, experts), 1 / experts)
    same(logits(model, ids, gates=uniform), logits(plain_with_weights_of(model), ids), atol=1e-6)


def test_1_one_expert_equals_plain_lora_for_any_representation() -> None:
    model, ids = gated(num_experts=1), tokens()
    same(logits(model, ids, user_repr=100 * representations(3)), logits(plain_with_weights_of(model), ids), atol=1e-6)


# 2, 3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", range(E))
def test_2_one_hot_gate_is_a_plain_lora_of_its_block(expert: int) -> None:
    model, ids = gated(), tokens()
    block, source = slice(2 * expert, 2 * expert + 2), model.state_dict()
    # scaling E alpha / r = 4 * 16 / 8, as alpha / rank with rank 2 and alpha 16
    small = attach(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=16, target_modules=ALL)).eval()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(source[name][block])
            elif ".lora_B." in name:
                parameter.copy_(source[name][:, block])
    one_hot = F.one_hot(torch.full((3,), expert), E).float()
    same(logits(model, ids, gates=one_hot), logits(small, ids), atol=1e-5)


def test_3_rank_space_equals_the_sum_over_experts() -> None:
    model, gates = gated(), weights(3)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    x = torch.randn(3, 5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = E * 16 / 8
    expected = F.linear(x, layer.base_layer.weight)
    for e in range(E):
        block = slice(2 * e, 2 * e + 2)
        expected = expected + scaling * gates[:, e, None, None] * (x @ a[block].T @ b[:, block].T)
    with model._enable_peft_forward_hooks(gates=gates):
        found = layer(x)
    same(found, expected, atol=1e-5)


# 4 -------------------------------------------------------------------------------------------------------------------


def test_4_zero_b_equals_base_and_the_router_starts_at_the_second_step() -> None:
    model, ids = gated(trained=False).train(), tokens()
    same(logits(model, ids, user_repr=representations(3)), logits(tiny_llama(), ids))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids, user_repr=representations(3)).loss.backward()
    assert router_weight(model).grad is not None and not router_weight(model).grad.any()
    optimizer.step()
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids, user_repr=representations(3)).loss.backward()
    assert router_weight(model).grad.abs().sum() > 0


# 5 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(), (LENGTH,)])
def test_5_a_row_depends_on_its_own_gate_only(positions: tuple[int, ...]) -> None:
    model, ids, gates = gated(), tokens(4), weights(4, *positions)
    before = logits(model, ids, gates=gates)
    changed = gates.clone()
    changed[1] = gates[1].flip(-1)
    after = logits(model, ids, gates=changed)
    rest = [0, 2, 3]
    same(after[rest], before[rest])
    assert (after[1] - before[1]).abs().max() > 1e-3
    order = torch.tensor([2, 0, 3, 1])
    same(logits(model, ids[order], gates=gates[order]), before[order], atol=1e-6)


def test_5_positions_see_no_later_gate() -> None:
    model, ids, gates = gated(), tokens(2), weights(2, LENGTH)
    before = logits(model, ids, gates=gates)
    changed = gates.clone()
    changed[:, 4:] = gates[:, 4:].flip(-1)
    after = logits(model, ids, gates=changed)
    same(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().max() > 1e-3


def test_5_repeated_gate_per_position_equals_one_gate_per_sequence() -> None:
    model, ids, gates = gated(), tokens(), weights(3)
    repeated = gates[:, None].expand(-1, LENGTH, -1)
    same(logits(model, ids, gates=repeated), logits(model, ids, gates=gates), atol=1e-6)


# 6 -------------------------------------------------------------------------------------------------------------------


def checkpointed(model: PeftModel, how: str) -> PeftModel:
    options = {"use_reentrant": False}
    if how == "wrapper":
        model.activation_checkpointing_enable()
    elif how == "old_name":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    elif how == "inner_model":
        model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    elif how == "every_second_layer":
        model.activation_checkpointing_enable(every_n_layers=2)
    return model


@pytest.mark.parametrize("how", ["wrapper", "old_name", "inner_model", "every_second_layer"])
@pytest.mark.parametrize("positions", [(), (LENGTH,)])
def test_6_checkpointing_keeps_loss_and_gradients(how: str, positions: tuple[int, ...]) -> None:
    """Also with a forward without gradients in between, and with two forwards before one backward."""
    results = []
    for model in (gated().train(), checkpointed(gated().train(), how)):
        first, second = representations(3, *positions), representations(3, *positions, seed=7)
        found = []
        for _ in range(2):  # the second round uses expansions prepared for known layers
            model.zero_grad()
            loss = model(input_ids=tokens(), labels=tokens(), user_repr=first).loss
            logits(model, tokens(), user_repr=second)
            loss.backward()
            alone = gradients(model)
            model.zero_grad()
            one = model(input_ids=tokens(), labels=tokens(), user_repr=first).loss
            two = model(input_ids=tokens(seed=8), labels=tokens(seed=8), user_repr=second).loss
            (one + 2 * two).backward()
            found.append((loss.detach(), alone, gradients(model)))
        results.append(found)
    for plain, checked in zip(*results, strict=True):
        same(checked[0], plain[0])
        for expected, got in zip(plain[1:], checked[1:], strict=True):
            assert expected.keys() == got.keys() and any("router" in name for name in got)
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_6_two_backwards_through_one_graph() -> None:
    model = checkpointed(gated().train(), "wrapper")
    loss = model(input_ids=tokens(), labels=tokens(), user_repr=representations(3)).loss
    loss.backward(retain_graph=True)
    once = gradients(model)
    logits(model, tokens(), user_repr=representations(3, seed=9))
    loss.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, 2 * once[name], rtol=1e-4, atol=1e-7, msg=name)


def test_6_checkpointing_under_autocast() -> None:
    results = []
    for model in (gated().train(), checkpointed(gated().train(), "wrapper")):
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(input_ids=tokens(), labels=tokens(), user_repr=representations(3)).loss.backward()
        results.append(gradients(model))
    for name, value in results[0].items():
        same(results[1][name], value)


def test_6_foreign_checkpoint_recomputes_with_the_kept_gates() -> None:
    """FSDP's own wrapper knows nothing of our context; one forward before one backward is still right."""
    plain, model = gated().train(), gated().train()
    layer = model.base_model.model.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(inner, *args, use_reentrant=False, **kwargs)
    for each in (plain, model):
        each(input_ids=tokens(), labels=tokens(), user_repr=representations(3)).loss.backward()
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"context_fn": lambda: None}])
def test_6_checkpointing_that_loses_gates_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="activation checkpointing"):
        gated().activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    model = gated().train()
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    with pytest.raises(RecipeError, match="activation checkpointing"):
        model(input_ids=tokens(), user_repr=representations(3))


def test_6_checkpointing_survives_a_deepcopy_and_a_new_adapter() -> None:
    model = checkpointed(gated().train(), "wrapper")
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each(input_ids=tokens(), labels=tokens(), user_repr=representations(3)).loss.backward()
    for name, value in gradients(model).items():
        same(gradients(twin)[name], value)
    base = model.base_model.unload()
    fresh = attach(base, ILoraConfig(task_type="CAUSAL_LM", gate_dim=GATE_DIM, target_modules=ALL)).train()
    fresh(input_ids=tokens(), labels=tokens(), user_repr=representations(3)).loss.backward()
    assert len(gradients(fresh)) == 2 * 14 + 1


# 7 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("via", ["arguments", "generation_config", "model_default"])
def test_7_beams_of_a_batch_equal_beams_of_each_row(via: str) -> None:
    model, ids, user = gated(), tokens(), representations(3)
    extra: dict[str, Any] = {}
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    if via == "arguments":
        extra = options
    elif via == "generation_config":
        extra = {"generation_config": GenerationConfig(**options, pad_token_id=0, max_new_tokens=6)}
    else:
        model.get_base_model().generation_config.update(**options)
        model.generation_config.update(**options)
    together = generate(model, ids, user_repr=user, **extra)
    assert len(together) == 6
    for row in range(3):
        alone = generate(model, ids[row : row + 1], user_repr=user[row : row + 1], **extra)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
    shuffled = generate(model, ids, user_repr=user.flip(0), **extra)
    assert not torch.equal(shuffled, together)


def test_7_returned_samples_use_the_gate_of_their_row() -> None:
    model, ids = gated(), tokens()
    seen: list[Tensor] = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(
        lambda module, args, out: seen.append(out / F.linear(args[0], module.weight))
    )
    generate(model, ids, gates=weights(3), do_sample=True, num_return_sequences=2)
    expected = expand_gates(weights(3), 8).repeat_interleave(2, dim=0)
    for ratio in seen:
        torch.testing.assert_close(ratio, expected[:, None].expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert len(seen) == 6


def test_7_cached_greedy_equals_uncached_and_stepwise() -> None:
    model, ids, user = gated(), tokens(), representations(3)
    cached = generate(model, ids, user_repr=user)
    assert torch.equal(cached, generate(model, ids, user_repr=user, use_cache=False))
    grown = ids
    for _ in range(6):
        step = logits(model, grown, user_repr=user)[:, -1].argmax(-1, keepdim=True)
        grown = torch.cat([grown, step], dim=1)
    assert torch.equal(cached, grown)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_7_generation_for_every_task_type(task_type: str | None) -> None:
    ids, user = tokens(), representations(3)
    expected = generate(gated(), ids, user_repr=user, num_beams=2)
    assert torch.equal(generate(gated(task_type=task_type), ids, user_repr=user, num_beams=2), expected)


@pytest.mark.parametrize("rows", [2, 4])
def test_7_wrong_number_of_gates_raises(rows: int) -> None:
    model, ids = gated(), tokens(3)
    for task_type in ("CAUSAL_LM", "FEATURE_EXTRACTION", None):
        with pytest.raises(DataError, match="gates do not fit the batch"):
            logits(gated(task_type=task_type), ids, user_repr=representations(rows))
    with pytest.raises(DataError, match="gates do not fit the batch"):
        generate(model, ids, user_repr=representations(rows), num_beams=2)


def test_7_a_beam_count_that_does_not_match_raises() -> None:
    """Two gates for four rows would pass as beams in a forward; generate knows how many beams there are."""
    with pytest.raises(DataError, match="gates do not fit the batch"):
        generate(gated(), tokens(4), user_repr=representations(2), num_beams=3)


def test_7_forward_accepts_whole_multiples_in_the_order_of_beams() -> None:
    model, ids, gates = gated(), tokens(6), weights(3)
    found = logits(model, ids, gates=gates)
    same(found, logits(model, ids, gates=gates.repeat_interleave(2, dim=0)))
    model.train()
    out = model(input_ids=ids, gates=gates).logits
    same(out.detach(), found)


def test_7_per_position_gates_refuse_cached_decoding_but_serve_single_steps() -> None:
    model, ids, gates = gated(), tokens(), weights(3, LENGTH)
    with pytest.raises(DataError, match="per-position gates"):
        generate(model, ids, gates=gates)
    with torch.no_grad():
        prefill = model(input_ids=ids[:, :-1], gates=gates[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], gates=gates[:, -1:], past_key_values=prefill.past_key_values)
    same(last.logits[:, 0], logits(model, ids, gates=gates)[:, -1], atol=1e-5)


# 8 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["linear", "mlp", "resnet1d"])
def test_8_round_trip_is_bitwise_equal(router: str, tmp_path: Path) -> None:
    model, ids, user = gated(router=router, encoder_fingerprint="sasrec-1f"), tokens(), representations(3)
    if router == "resnet1d":  # move the running statistics away from their start
        model.train()
        logits(model, ids, user_repr=user)
        model.eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    expected = {"peft_type": "ILORA", "num_experts": E, "gate_dim": GATE_DIM, "router": router}
    assert stored.items() >= {**expected, "encoder_fingerprint": "sasrec-1f"}.items()
    by_peft = accept_arguments(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    for again in (load_tuner(tiny_llama(), tmp_path), by_peft):
        again.eval()
        for name, value in again.state_dict().items():
            same(value, model.state_dict()[name])
        same(logits(again, ids, user_repr=user), logits(model, ids, user_repr=user))
        assert torch.equal(generate(again, ids, user_repr=user), generate(model, ids, user_repr=user))


def test_8_loads_under_another_adapter_name(tmp_path: Path) -> None:
    model, ids, user = gated(router="mlp"), tokens(), representations(3)
    model.save_pretrained(tmp_path)
    again = accept_arguments(PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="second")).eval()
    same(logits(again, ids, user_repr=user), logits(model, ids, user_repr=user))
    assert not any(".second." in key or ".default." in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_8_low_memory_loading(tmp_path: Path) -> None:
    model, ids, user = gated(), tokens(), representations(3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True).eval()
    same(logits(again, ids, user_repr=user), logits(model, ids, user_repr=user))


def test_8_lora_part_loads_as_stock_lora(tmp_path: Path) -> None:
    model, ids = gated(), tokens()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    experts = {key: value for key, value in stored.items() if ".ilora_router." not in key}
    assert len(stored) - len(experts) == 1
    plain = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=ALL))
    result = set_peft_model_state_dict(plain, experts)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    same(logits(plain.eval(), ids), logits(model, ids, gates=torch.full((3, E), 0.25)), atol=1e-6)


def test_8_merge_raises_by_default() -> None:
    model = gated()
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(RecipeError, match="cannot be merged"):
            merge()
    with pytest.raises(RecipeError, match="weighted"):
        model.add_weighted_adapter(["default"], [1.0], "mixed")
    assert logits(model, tokens(), gates=weights(3)).isfinite().all()


@pytest.mark.parametrize("gate", ["uniform", [0.7, 0.1, 0.1, 0.1], torch.tensor([0.0, 0.0, 1.0, 0.0])])
def test_8_merge_under_a_fixed_gate_equals_that_gate(gate: Any) -> None:
    model, ids = gated(), tokens()
    row = torch.full((E,), 0.25) if isinstance(gate, str) else torch.as_tensor(gate)
    expected = logits(model, ids, gates=row.expand(3, E))
    merged = model.merge_and_unload(gate=gate)
    assert not any(isinstance(module, GatedLinear) for module in merged.modules())
    same(logits(merged, ids), expected, atol=1e-5)


@pytest.mark.parametrize("gate", ["mean", [0.5, 0.5], [1.0, 1.0, 0.0, 0.0]])
def test_8_a_wrong_fixed_gate_changes_nothing(gate: Any) -> None:
    model, ids = gated(), tokens()
    before = logits(model, ids, gates=weights(3))
    with pytest.raises((RecipeError, DataError)):
        model.merge_and_unload(gate=gate)
    same(logits(model, ids, gates=weights(3)), before)


# 9 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["linear", "mlp", "resnet1d", "none"])
def test_9_trainable_parameters_are_lora_and_router(router: str) -> None:
    model = gated(router=router)
    plain = trainable_report(attach(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=ALL)))
    own = 0 if router == "none" else sum(p.numel() for p in model.base_model.ilora_router.parameters())
    report = trainable_report(model)
    assert report.parts == {"experts": plain.trainable, "router": own, "other": 0}
    assert report.trainable == plain.trainable + own and (own > 0) == (router != "none")


def test_9_nothing_of_encoder_or_base_receives_gradient_and_an_optimizer_sees_all() -> None:
    model = gated().train()
    encoder = nn.Linear(5, GATE_DIM).requires_grad_(False)
    out = model(input_ids=tokens(), labels=tokens(), user_repr=encoder(torch.randn(3, 5)))
    out.loss.backward()
    assert encoder.weight.grad is None
    updated = {id(p) for group in torch.optim.AdamW(model.parameters()).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        ours = ".lora_" in name or ".ilora_router." in name
        assert parameter.requires_grad == ours == (parameter.grad is not None), name
        assert id(parameter) in updated


def test_9_gradient_reaches_an_encoder_that_is_not_frozen() -> None:
    model, encoder = gated().train(), nn.Linear(5, GATE_DIM)
    model(input_ids=tokens(), labels=tokens(), user_repr=encoder(torch.randn(3, 5))).loss.backward()
    assert encoder.weight.grad.abs().sum() > 0


# 10 ------------------------------------------------------------------------------------------------------------------


def fit_two_clusters(model: PeftModel, use_gates: bool, shuffle: bool = False, steps: int = 100) -> float:
    """Mean of the last losses on prompts whose next token depends on the user's cluster alone."""
    torch.manual_seed(0)
    with torch.no_grad():  # a fresh head is so small that no hidden state can be sure of a token
        model.get_base_model().lm_head.weight.mul_(30)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, 50, (8, 5), generator=generator).repeat(2, 1)
    answers = 50 + torch.randperm(50, generator=generator)[:16]
    clusters = torch.arange(2).repeat_interleave(8)
    centres, noise = (torch.randn(rows, GATE_DIM, generator=generator) for rows in (2, 16))
    users = centres[clusters] + 0.05 * noise
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        seen = users[torch.randperm(16, generator=generator)] if shuffle else users
        extra = {"user_repr": seen} if use_gates else {}
        loss = F.cross_entropy(model(input_ids=prompts, logits_to_keep=1, **extra).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


def test_10_conflicting_clusters_need_gates() -> None:
    floor = 0.6931  # two equally likely answers per prompt
    plain = attach(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=ALL))
    without = fit_two_clusters(plain, use_gates=False)
    own = fit_two_clusters(gated(trained=False), use_gates=True)
    foreign = fit_two_clusters(gated(trained=False), use_gates=True, shuffle=True)
    assert own < 0.05, (own, without, foreign)
    assert without > floor - 0.01, (own, without, foreign)
    assert foreign > floor - 0.05, (own, without, foreign)


# Gates: errors, lifetime, several adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_missing_gates_raise_and_are_never_taken_from_before(task_type: str | None) -> None:
    model, ids = gated(task_type=task_type), tokens()
    logits(model, ids, user_repr=representations(3))
    with pytest.raises(DataError, match="needs gates"):
        logits(model, ids)
    with pytest.raises(DataError, match="needs gates"):
        generate(model, ids)
    with pytest.raises(DataError, match="neither or both|both"):
        logits(model, ids, user_repr=representations(3), gates=weights(3))


def test_calling_the_inner_model_raises_instead_of_reusing_gates() -> None:
    model, ids = gated(), tokens()
    logits(model, ids, user_repr=representations(3))
    with pytest.raises(DataError, match="outside a forward that has gates"):
        logits(model.get_base_model(), ids)
    with model.disable_adapter():
        same(logits(model.get_base_model(), ids), logits(tiny_llama(), ids))
        same(logits(model, ids, user_repr=representations(3)), logits(tiny_llama(), ids))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"gates": torch.ones(3, 3) / 3}, "wrong shape"),
        ({"gates": torch.ones(3, 4)}, "sum to 1"),
        ({"gates": torch.tensor([[1.5, -0.5, 0.0, 0.0]]).expand(3, 4)}, "sum to 1"),
        ({"gates": torch.full((3, 4), float("nan"))}, "sum to 1"),
        ({"user_repr": torch.zeros(3, GATE_DIM + 1)}, "wrong shape"),
        ({"user_repr": torch.zeros(GATE_DIM)}, "wrong shape"),
        ({"user_repr": torch.zeros(3, LENGTH - 1, GATE_DIM)}, "per-position gates"),
        ({"user_repr": torch.zeros(3, GATE_DIM), "adapter_names": ["default"] * 3}, "adapter_names"),
    ],
)
def test_misfitting_gates_are_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        logits(gated(), tokens(), **extra)


def test_finished_gates_without_a_router() -> None:
    model = gated(router="none", gate_dim=None)
    same(logits(model, tokens(), gates=weights(3)), logits(gated(), tokens(), gates=weights(3)))
    with pytest.raises(DataError, match="no router"):
        logits(model, tokens(), user_repr=representations(3))


def test_last_gates_are_kept_detached() -> None:
    model, user = gated().train(), representations(3)
    assert model.base_model.last_gates is None
    model(input_ids=tokens(), user_repr=user)
    kept = model.base_model.last_gates
    assert kept.shape == (3, E) and kept.dtype == torch.float32 and not kept.requires_grad
    same(kept, model.base_model.ilora_router["default"](user).detach())
    generate(model.eval(), tokens(), user_repr=user, num_beams=2)
    assert model.base_model.last_gates.shape == (3, E)
    assert copy.deepcopy(model).base_model.last_gates is None


def test_gates_are_expanded_once_per_forward_not_once_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.tuners import gate_state

    calls: list[int] = []
    original = gate_state.expand_gates
    monkeypatch.setattr(gate_state, "expand_gates", lambda g, r: calls.append(r) or original(g, r))
    model = gated().train()
    model(input_ids=tokens(), user_repr=representations(3))
    calls.clear()
    model(input_ids=tokens(), user_repr=representations(3))
    assert calls == [8]
    calls.clear()
    logits(model, tokens(), user_repr=representations(3))
    generate(model.eval(), tokens(), user_repr=representations(3), num_beams=2)
    assert calls == [8, 8]


def test_threads_keep_their_own_gates() -> None:
    model, ids = gated(), tokens()
    users = [representations(3, seed=seed) for seed in range(4)]
    expected = [logits(model, ids, user_repr=user) for user in users]
    found: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        found[index] = [logits(model, ids, user_repr=users[index]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, outputs in found.items():
        for output in outputs:
            same(output, expected[index], atol=1e-6)
    assert len(found) == 4


def test_router_runs_in_float32_inside_a_bfloat16_model() -> None:
    config = ILoraConfig(task_type="CAUSAL_LM", gate_dim=GATE_DIM, target_modules=ALL)
    model = attach(tiny_llama(torch.bfloat16), config)
    assert router_weight(model).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=tokens(), user_repr=representations(3).bfloat16())
    assert model.base_model.last_gates.dtype == torch.float32


def test_two_adapters_have_their_own_router_and_trainability() -> None:
    model, ids, user = gated(), tokens(), representations(3)
    first = logits(model, ids, user_repr=user)
    config = ILoraConfig(task_type="CAUSAL_LM", r=4, num_experts=2, gate_dim=GATE_DIM, target_modules=["q_proj"])
    model.add_adapter("other", config)
    assert router_weight(model).requires_grad
    assert not any(p.requires_grad for p in model.base_model.ilora_router["other"].parameters())
    same(logits(model, ids, user_repr=user), first)
    model.set_adapter("other")
    same(logits(model, ids, user_repr=user), logits(tiny_llama(), ids))
    assert model.base_model.last_gates.shape == (3, 2) and not router_weight(model).requires_grad
    model.set_requires_grad("default")
    assert router_weight(model).requires_grad
    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(model.base_model.ilora_router) == ["default"]
    same(logits(model, ids, user_repr=user), first)
    with pytest.raises((RecipeError, ValueError)):
        model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"]))


def test_data_parallel_is_refused() -> None:
    with pytest.raises(RecipeError, match="DataParallel"):
        gated().base_model._replicate_for_data_parallel()


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 6}, "r: found 6"),
        ({"rank_pattern": {"q_proj": 10}}, "rank_pattern.*found 10"),
        ({"num_experts": 0}, "num_experts"),
        ({"gate_dim": None}, "gate_dim"),
        ({"router": "transformer"}, "router"),
        ({"router_norm": "rms"}, "router_norm"),
        ({"logit_noise": -1.0}, "logit_noise"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_configurations_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ILoraConfig(**{"r": 8, "num_experts": E, "gate_dim": GATE_DIM, **options})


def test_a_configuration_changed_later_is_checked_again() -> None:
    config = ILoraConfig(r=8, num_experts=E, gate_dim=GATE_DIM, target_modules=["q_proj"])
    config.rank_pattern = {"q_proj": 6}
    with pytest.raises(RecipeError, match="found 6"):
        attach(tiny_llama(), config)


def test_rank_pattern_and_rslora_keep_uniform_gates_equal_to_plain_lora() -> None:
    options = {"rank_pattern": {"q_proj": 12}, "use_rslora": True}
    model, ids = gated(**options), tokens()
    uniform = torch.full((3, E), 0.25)
    same(logits(model, ids, gates=uniform), logits(plain_with_weights_of(model, **options), ids), atol=1e-5)


def test_embeddings_and_convolutions_are_refused() -> None:
    with pytest.raises(RecipeError, match="embed_tokens"):
        gated(target_modules=["embed_tokens"])
    net = nn.Sequential(nn.Conv1d(3, 3, 1))
    with pytest.raises(RecipeError, match="Conv1d"):
        attach(net, ILoraConfig(gate_dim=GATE_DIM, target_modules=["0"]))


def test_recipe_options_reach_the_configuration() -> None:
    config = ILoraTuner.configure(
        {"r": 8, "num_experts": 2, "lora_alpha": 16, "router": "mlp", "logit_noise": 0.1}, gate_dim=64
    )
    assert isinstance(config, ILoraConfig) and ILoraTuner.needs_gates
    assert (config.num_experts, config.gate_dim, config.router, config.logit_noise) == (2, 64, "mlp", 0.1)
    with pytest.raises(RecipeError, match="use_dora"):
        ILoraTuner.configure({"use_dora": True}, gate_dim=64)
    with pytest.raises(RecipeError, match="gate_dim"):
        ILoraTuner.configure({})


def test_encoder_fingerprint_is_checked() -> None:
    config = ILoraConfig(gate_dim=GATE_DIM, encoder_fingerprint="sasrec-1f")
    check_encoder(config, "sasrec-1f")
    check_encoder(ILoraConfig(gate_dim=GATE_DIM), "anything")
    for wrong in ("gru-2a", None):
        with pytest.raises(CheckpointError, match=f"sasrec-1f.*{wrong}"):
            check_encoder(config, wrong)


def test_loading_without_router_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    gated().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in stored.items() if "router" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(CheckpointError, match="ilora_router"):
        load_tuner(tiny_llama(), tmp_path)


# Entry into peft -----------------------------------------------------------------------------------------------------


def test_installed_peft_is_in_the_supported_range() -> None:
    assert peft.__version__ in SpecifierSet(binding.PEFT_RANGE), (
        f"peft {peft.__version__} is outside {binding.PEFT_RANGE}: run tests/tuners, then widen PEFT_RANGE in "
        "llmrec/tuners/binding.py and pyproject.toml"
    )


def test_binding_twice_changes_nothing_and_a_taken_name_is_refused() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    binding.bind("ILORA", ILoraConfig, ILoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ILORA"] is ILoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["ILORA"] is ILoraModel
    with pytest.raises(LlmrecError, match="already knows"):
        binding.bind("LORA", ILoraConfig, ILoraModel)


def test_a_changed_peft_is_named_with_the_supported_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING")
    with pytest.raises(LlmrecError, match=r"PEFT_TYPE_TO_TUNER_MAPPING.*>=0.21,<0.22"):
        binding.bind("ILORA", ILoraConfig, ILoraModel)
