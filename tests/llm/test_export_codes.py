"""Exported item codes: plain transformers says what the recommender says, and whatever cannot be exact is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM, LogitsProcessorList

from llmrec.cli import main
from llmrec.data.code_prompts import CodeAsker, CodeTaskOptions
from llmrec.errors import CheckFailed, CheckpointError, DataError, RecipeError
from llmrec.llm import export, export_codes
from llmrec.llm.code_tokens import CodeTokens, ExportedCodes, misnumbered, with_codes
from llmrec.llm.export import Exported, export_recommender
from llmrec.llm.item_codes import ItemCodeRecommender
from llmrec.llm.parity import Parity, compare_levels
from tests.fixtures.tokenizers import tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer
from tests.llm.test_item_codes import SIZES, TEXT, item_codes, recommender, spelled
from tests.llm.tiny import ITEMS, LENGTH, TITLES, llama, rows, tokenizer
from tests.training.test_item_codes import language_model, run

FACTS = {"system": "x", "base_model": "tiny", "dataset": "d", "quantised": None}
KEYS = ["", *[f"item-{number}" for number in range(1, ITEMS + 1)]]
HISTORIES = [[4, 8, 15], [12], [7, 7, 2, 19, 3, 1, 18, 10, 5, 6]]  # the last is longer than a window
GATE = [0.7, 0.1, 0.1, 0.1]
BASE = len(tokenizer())


def asking(tuner: str | None = "lora", base: Any = None, length: int | None = None, **changes: Any) -> Any:
    """A recommender of tasks, whose prompts stand between words."""
    tasks = ("history_to_item", "title_to_item")
    base = llama() if base is None else base
    options = CodeTaskOptions(dict.fromkeys(tasks, 1.0), max_length=length, **changes)
    rows_of_base = base.get_input_embeddings().weight.shape[0]
    asker = CodeAsker(item_codes().codes.numpy(), SIZES, rows_of_base, tokenizer(), options, TITLES)
    return recommender(tuner, base=base, renderer=asker, tasks=tasks)


class Case(NamedTuple):
    """How to make a recommender, and the gate it is exported with."""

    make: Callable[[], ItemCodeRecommender]
    gate: Any = None


CASES = {
    "lora": Case(lambda: recommender("lora")),
    "tied": Case(lambda: recommender("lora", base=llama(tie_word_embeddings=True), instruction=TEXT)),
    "fillers": Case(lambda: recommender("lora", base=llama(vocab_size=BASE + 9), instruction=TEXT)),
    "ilora": Case(lambda: recommender("ilora"), GATE),
    "tasks": Case(lambda: asking()),
    "tied tasks": Case(lambda: asking("ilora", llama(tie_word_embeddings=True, vocab_size=BASE + 3)), "uniform"),
}


class Made(NamedTuple):
    """An export, what the recommender said before it, and what stands in the folder."""

    folder: Path
    done: Exported
    prompts: list[Tensor]
    said: list[Tensor]
    trained: ItemCodeRecommender
    codes: ExportedCodes
    model: Any


@torch.no_grad()
def everything(model: ItemCodeRecommender, histories: Sequence[Sequence[int]]) -> Tensor:
    """[B, I] log-probabilities of all items."""
    batch: Any = model.collate(rows([list(history) for history in histories]))
    listed = torch.arange(1, ITEMS + 1).expand(len(histories), -1)
    return model.score_candidates({**batch, "candidates": listed})


def fix(model: ItemCodeRecommender, gate: Any) -> None:
    """Read the same mixture of experts for everybody."""
    if gate is None:
        return
    weights = torch.tensor(GATE if gate is GATE else [0.25] * 4)
    read: Any = model.backbone.forward

    def fixed(embeds: Tensor, mask: Any = None, gates: Any = None, **call: Any) -> Any:
        alike = weights.expand(*gates["user_repr"].shape[:-1], -1)
        return read(embeds, mask, {"gates": alike}, **call)

    model.backbone.forward = fixed  # type: ignore[method-assign, assignment]


@cache
def exported(name: str, root: Path) -> Made:
    """One export per case, made by the first test that asks."""
    case, folder = CASES[name], root / name.replace(" ", "-")
    trained, twin = case.make(), case.make()
    fix(twin, case.gate)
    said = [everything(twin, [history])[0] for history in HISTORIES]
    asked = rows(HISTORIES, [[1, 2, 3, 4, 5, 6]] * 3)
    done = export_recommender(trained, folder, facts=FACTS, rows=asked, gate=case.gate, item_keys=KEYS)
    codes = ExportedCodes.read(folder)
    prompts = [torch.tensor(codes.prompt([KEYS[item] for item in history])) for history in HISTORIES]
    return Made(folder, done, prompts, said, twin, codes, AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, root: Path) -> Made:
    return exported(request.param, root)


# What the folder says ------------------------------------------------------------------------------------------------


def prompt_of(model: ItemCodeRecommender, history: list[int]) -> list[int]:
    """Token ids a recommender reads, written with loops."""
    if model.options.tasks:
        return model.tasks.encode_history(history[-LENGTH:]).tolist()
    ids, first = model.prefix_ids.tolist(), model.vocabulary
    for item in history[-LENGTH:]:
        for level, code in enumerate(model.codes[item].tolist()):
            ids.append(first + model.offsets[level] + code)
    return ids


def test_prompts_are_those_of_the_recommender(made: Made) -> None:
    for history, prompt in zip(HISTORIES, made.prompts, strict=True):
        assert prompt.tolist() == prompt_of(made.trained, history)
    assert made.done.record["example"]["prompt_token_ids"] == made.prompts[0].tolist()


@torch.no_grad()
def test_plain_transformers_gives_the_same_log_probabilities(made: Made) -> None:
    """Every item is read behind every prompt, one by one, by nothing but the saved model."""
    starts = [made.codes.tokens.first + offset for offset in made.trained.offsets]
    for prompt, said in zip(made.prompts, made.said, strict=True):
        written = torch.tensor(starts) + made.trained.codes[1:]
        logits = made.model(torch.cat([prompt.expand(ITEMS, -1), written], 1)).logits[:, len(prompt) - 1 : -1]
        found = torch.zeros(ITEMS)
        for level, (start, size) in enumerate(zip(starts, SIZES, strict=True)):
            scores = logits[:, level]
            wanted = written[:, level, None]
            if not made.trained.options.tasks:
                scores, wanted = scores[:, start : start + size], wanted - start
            found += scores.log_softmax(-1).gather(1, wanted)[:, 0]
        torch.testing.assert_close(found, said, rtol=1e-4, atol=1e-4)
    spread = torch.stack(made.said)
    assert float((spread[0] - spread[1]).abs().max()) > 1e-2, "histories have to matter"


@torch.no_grad()
def test_generate_ranks_as_llmrec_does(made: Made) -> None:
    """Beams as many as items are exhaustive; greedy writing is a beam of one."""
    for history, prompt, said in zip(HISTORIES, made.prompts, made.said, strict=True):

        def answers(prompt: Tensor = prompt, **options: Any) -> Any:
            return made.model.generate(
                prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, pad_token_id=0,
                logits_processor=LogitsProcessorList([made.codes.processor(len(prompt))]), length_penalty=0.0,
                max_new_tokens=made.codes.max_new_tokens, return_dict_in_generate=True, output_scores=True, **options,
            )  # fmt: skip

        found = answers(num_beams=ITEMS, num_return_sequences=ITEMS)
        best, order = said.sort(descending=True)
        items = [made.codes.items_of(answer[len(prompt) :]) for answer in found.sequences]
        torch.testing.assert_close(found.sequences_scores, best, rtol=1e-4, atol=1e-4)
        assert float(best.diff().abs().min()) > 2e-4, "an order is only one where no two scores are the same"
        assert items == [[KEYS[item + 1]] for item in order.tolist()]
        greedy = made.codes.items_of(answers().sequences[0, len(prompt) :])
        narrow: Any = made.trained.collate(rows([history]))
        narrow.pop("seen", None)
        assert greedy == [KEYS[int(made.trained.recommend(narrow, 1, beams=1).item_ids[0, 0])]]


def test_tokenizer_and_model_number_codes_alike(made: Made) -> None:
    again: Any = AutoTokenizer.from_pretrained(made.folder)
    first = made.trained.vocabulary
    letters = [f"<{letter}_{code}>" for letter, size in zip("abc", SIZES, strict=True) for code in range(size)]
    assert again.convert_tokens_to_ids(letters) == list(range(first, first + sum(SIZES)))
    assert len(again) == first + sum(SIZES) == made.model.config.vocab_size
    assert made.model.get_output_embeddings().weight.shape[0] == made.model.get_input_embeddings().weight.shape[0]
    for text in ("watched: red blue", TEXT):
        assert again(text)["input_ids"] == tokenizer()(text)["input_ids"]
    written = json.loads((made.folder / "item_codes.json").read_text())["items"]["item-3"]
    ids = again("".join(written), add_special_tokens=False)["input_ids"]
    assert ids == [first + at + int(code) for at, code in zip((0, 3, 7), item_codes().codes[3], strict=True)]
    assert again.decode(ids, skip_special_tokens=True).replace(" ", "") == "".join(written), "answers keep codes"
    fillers = [name for name in again.get_vocab() if name.startswith("<|unused_")]
    assert len(fillers) == first - BASE == made.done.record["item_codes"]["filler_tokens"]
    assert sorted(again.convert_tokens_to_ids(fillers)) == list(range(BASE, first))


def test_the_record_says_what_was_checked(made: Made) -> None:
    codes, tasks = made.done.record["item_codes"], bool(made.trained.options.tasks)
    assert codes["parity"]["max_abs_diff"] <= codes["parity"]["tolerance"] and codes["parity"]["positions"] == 12
    assert codes["normalised"] == ("vocabulary" if tasks else "level")
    assert codes["item_tokenizer"] == item_codes().fingerprint == made.codes.fingerprint
    assert made.codes.max_new_tokens == 3 + tasks and made.codes.tokens.level_sizes == SIZES
    assert made.done.parity.holds and made.done.scores is not None
    assert made.done.scores.top_1_same == 1.0 or made.done.record["lost"]
    assert json.loads((made.folder / export.RECORD).read_text()) == made.done.record
    read = (made.folder / "README.md").read_text()
    assert "plain language model server can run it" in read and "`<a_0>` to `<a_2>`" in read
    assert ("unused" in read) == bool(codes["filler_tokens"]) and "share their codes" not in read
    assert not {"recommender", "encoder", "adapter_config.json"} & {path.name for path in made.folder.iterdir()}


def test_tied_models_stay_tied(root: Path) -> None:
    for name in ("tied", "lora"):
        model, tied = exported(name, root).model, name == "tied"
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert model.config.tie_word_embeddings == tied


def test_a_fixed_gate_is_compared_with_the_run(root: Path) -> None:
    done = exported("ilora", root).done
    assert done.record["gate"] == pytest.approx(GATE) and "no longer follow" in done.record["lost"]
    assert done.scores is not None and done.scores.max_abs_diff > 1e-4, "users lose their own weights"


def test_prompts_leave_out_what_the_recommender_leaves_out(tmp_path: Path) -> None:
    """Prompts of tasks have a length, in which sometimes a single item fits."""
    whole = asking()
    one, two = (len(whole.tasks.encode_history(items)) for items in ([1], [1, 2]))
    for number, length in enumerate((one + 4, two + 3, two + 4, two + 4 + 2 * (two - one))):
        model = asking(length=length, max_history=5)
        expected = [model.tasks.encode_history(history).tolist() for history in HISTORIES]
        assert max(map(len, expected)) <= length - 4
        out = tmp_path / str(number)
        export_recommender(model, out, facts=FACTS, item_keys=KEYS)
        codes = ExportedCodes.read(out)
        assert [codes.prompt([KEYS[item] for item in history]) for history in HISTORIES] == expected


def test_items_with_one_code_are_named_together(tmp_path: Path) -> None:
    table = item_codes().codes[1:].clone()
    table[6] = table[2]
    done = export_recommender(
        recommender(None, codes=spelled(table, SIZES)), tmp_path / "out", facts=FACTS, item_keys=KEYS
    )
    codes = ExportedCodes.read(tmp_path / "out")
    assert codes.items_of(codes.prompt([KEYS[7]])[-3:]) == [KEYS[3], KEYS[7]]
    assert codes.items_of([0, 1, 2]) == [] and codes.items_of([BASE]) == []
    assert done.record["item_codes"]["items_share_codes"] and codes.trie.num_leaves == ITEMS - 1
    assert "share their codes" in (tmp_path / "out" / "README.md").read_text()


def test_bfloat16(tmp_path: Path) -> None:
    model = recommender("lora", base=llama(dtype=torch.bfloat16))
    done = export_recommender(
        model, tmp_path / "out", facts=FACTS, rows=rows(HISTORIES, [[1, 2, 3]] * 3), item_keys=KEYS
    )
    assert done.record["item_codes"]["parity"]["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(model: Any, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(RecipeError, match=message):
        export_recommender(model, out, facts=FACTS, **{"item_keys": KEYS, **options})
    assert not list(out.parent.iterdir())


def test_item_keys_are_needed(tmp_path: Path) -> None:
    refused(recommender(None), tmp_path / "out", "item_keys: found none, expected 21", item_keys=None)
    refused(recommender(None), tmp_path / "out", "item_keys: found 20, expected 21", item_keys=KEYS[1:])


@pytest.mark.parametrize("name", ["<a_0>", "<c_4>", "<|unused_7|>"])
def test_names_of_the_base_tokenizer_are_not_taken_over(name: str, tmp_path: Path) -> None:
    own = tiny_bpe_tokenizer([*TITLES], vocab_size=300)
    base = llama(vocab_size=len(own) + 20)
    own.add_tokens([name.replace("7", str(len(own) + 5))])
    model = recommender(None, base=base, titles=None)
    model.tokenizer = own
    refused(model, tmp_path / "out", "already has tokens called <")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path: Path) -> None:
    refused(recommender(None, base=llama(vocab_size=BASE - 1), titles=None), tmp_path / "out", "ids up to 329, but")


def test_models_that_scale_outside_their_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = CohereForCausalLM(
        CohereConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=BASE)
    ).eval()
    assert base.config.logit_scale != 1
    refused(recommender(None, base=base), tmp_path / "out", "CohereForCausalLM has logit_scale")

    scaled = llama()
    scaled.get_input_embeddings().register_forward_hook(lambda layer, given, found: 3 * found)
    refused(recommender(None, base=scaled), tmp_path / "out", "scaled token embeddings")


def test_a_missing_or_idle_gate(tmp_path: Path) -> None:
    refused(recommender("ilora"), tmp_path / "out", "--gate uniform")
    refused(recommender("lora"), tmp_path / "out", "no gates", gate="uniform")


@pytest.mark.parametrize("part", ["rows", "order", "tokenizer"])
def test_wrong_codes_leave_nothing(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow, write = export_codes.grow, export_codes.CodeExport.write

    def wrong(model: Any, trained: Any, tokens: CodeTokens) -> None:
        grow(model, trained, tokens)
        with torch.no_grad():
            table = model.get_input_embeddings().weight
            if part == "rows":
                table[tokens.first :] *= 1.2
            elif part == "order":
                model.lm_head.weight[tokens.first :] = model.lm_head.weight[tokens.first :].flip(0)

    def shifted(self: Any, folder: Path) -> None:
        write(self, folder)
        tokenizer().save_pretrained(folder)

    monkeypatch.setattr(export_codes, "grow", wrong)
    if part == "tokenizer":
        monkeypatch.setattr(export_codes.CodeExport, "write", shifted)
    message = "numbers item codes otherwise" if part == "tokenizer" else "writes other item codes"
    with pytest.raises(CheckFailed, match=message):
        export_recommender(recommender("lora"), tmp_path / "out", facts=FACTS, item_keys=KEYS)
    assert not list(tmp_path.iterdir())


def test_parity_of_levels_sees_one_wrong_level_and_missing_numbers() -> None:
    levels = [torch.randn(4, size).log_softmax(-1) for size in (30, 20)]
    same: Parity = compare_levels(levels, levels, torch.float32)
    assert same.holds and same.positions == 8
    for wrong in (levels[1].flip(1), levels[1] * float("nan")):
        assert not compare_levels(levels, [levels[0], wrong], torch.float32).holds


# Tokens --------------------------------------------------------------------------------------------------------------


def test_a_sentencepiece_tokenizer_numbers_codes_too(tmp_path: Path) -> None:
    base = tiny_sentencepiece_tokenizer([*TITLES, TEXT], tmp_path / "sp", vocab_size=300)
    before = dict(base.get_vocab())
    tokens = CodeTokens(len(base) + 2, SIZES)
    grown, fillers = with_codes(base, tokens)
    assert fillers == 2 and base.get_vocab() == before
    grown.save_pretrained(tmp_path / "out")
    assert misnumbered(AutoTokenizer.from_pretrained(tmp_path / "out"), tokens) is None
    assert misnumbered(grown, CodeTokens(tokens.first + 1, SIZES)) == f"<a_0> is token {tokens.first}, expected " + str(
        tokens.first + 1
    )


def test_letters_are_numbered_and_end() -> None:
    tokens = CodeTokens(100, (2, 3))
    assert tokens.names == ["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"] and tokens.starts == [100, 102]
    assert tokens.end == 105 and tokens.ids(torch.tensor([[1, 2]])).tolist() == [[101, 104]]
    with pytest.raises(RecipeError, match="found 27 levels of item codes, expected at most 26"):
        CodeTokens(0, (2,) * 27)


# The file ------------------------------------------------------------------------------------------------------------


def test_histories_with_unknown_items(root: Path) -> None:
    codes = exported("lora", root).codes
    with pytest.raises(DataError, match=r"items without codes\n.*\['never-seen'\]"):
        codes.prompt(["item-3", "never-seen"])
    with pytest.raises(DataError, match="no item"):
        codes.prompt([])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no item_codes\.json; expected an export of the style item_codes"):
        ExportedCodes.read(tmp_path)


def test_a_newer_file(root: Path, tmp_path: Path) -> None:
    record = json.loads((exported("lora", root).folder / "item_codes.json").read_text())
    (tmp_path / "item_codes.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(CheckpointError, match="found format 2, this version reads format 1"):
        ExportedCodes.read(tmp_path)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda record: [record],
    "items as a list": lambda record: {**record, "items": list(record["items"].values())},
    "no items": lambda record: {**record, "items": {}},
    "no prompt": lambda record: {name: value for name, value in record.items() if name != "prompt"},
    "half a prompt": lambda record: {**record, "prompt": {"before": []}},
    "a strange code": lambda record: {**record, "items": {"x": ["<a_0>", "<b_0>", "<c_99>"]}},
    "levels in another order": lambda record: {**record, "items": {"x": ["<b_0>", "<a_0>", "<c_0>"]}},
    "codes missing": lambda record: {**record, "items": {"x": ["<a_0>"]}},
    "uneven codes": lambda record: {**record, "items": {**record["items"], "x": ["<a_0>"]}},
    "too many levels": lambda record: {**record, "level_sizes": [2] * 30},
    "another normaliser": lambda record: {**record, "normalised": "none"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(damage: str, root: Path, tmp_path: Path) -> None:
    record = json.loads((exported("lora", root).folder / "item_codes.json").read_text())
    (tmp_path / "item_codes.json").write_text(json.dumps(DAMAGES[damage](record)))
    with pytest.raises(CheckpointError, match="is damaged"):
        ExportedCodes.read(tmp_path)


def test_a_file_that_was_cut_off(root: Path, tmp_path: Path) -> None:
    content = (exported("lora", root).folder / "item_codes.json").read_bytes()
    for cut in (content[:100], b"", b"\xff\xfe\xfa"):
        (tmp_path / "item_codes.json").write_bytes(cut)
        with pytest.raises(CheckpointError, match="is damaged"):
            ExportedCodes.read(tmp_path)


def test_the_mask_knows_items_and_their_end(root: Path) -> None:
    codes = exported("tasks", root).codes
    mask, written = codes.processor(2), codes.prompt([KEYS[3]])
    item = written[next(n for n, token in enumerate(written) if token >= BASE) :][:3]
    assert codes.items_of(item) == [KEYS[3]]
    scores = torch.randn(1, codes.tokens.end).log_softmax(-1)
    for level, start in enumerate(codes.tokens.starts):
        same = item_codes().codes[1:, :level].eq(item_codes().codes[3, :level]).all(1)
        expected = {start + int(code) for code in item_codes().codes[1:, level][same]}
        left = mask(torch.tensor([[5, 6, *item[:level]]]), scores)[0]
        assert set(left.isfinite().nonzero().flatten().tolist()) == expected
        assert torch.equal(left[item[level]], scores[0, item[level]])
    ended = mask(torch.tensor([[5, 6, *item]]), scores)[0]
    assert ended.isfinite().nonzero().flatten().tolist() == [tokenizer().eos_token_id]
    assert float(ended[tokenizer().eos_token_id]) == 0.0, "the end is certain, so it does not move a score"


# From a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_training_to_a_plain_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(language_model(), tmp_path / "run")
    words = ["export", str(tmp_path / "run"), "--for", "vllm", "--out", str(tmp_path / "out"), "--histories", "4"]
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    assert record["scores"]["max_abs_diff"] < 1e-3 and record["style"] == "item_codes"
    codes = ExportedCodes.read(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == codes.tokens.end
    assert len(codes._ids) == 30 and codes.prompt(list(codes._ids)[:2])
