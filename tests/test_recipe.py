"""Reading recipes: every mistake ends in a `RecipeError` that says where it stands and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrec import recipe as recipe_module
from llmrec.assets import asset_names, find_asset
from llmrec.errors import RecipeError
from llmrec.recipe import Recipe, load_recipe, parse_recipe
from llmrec.sweeps import is_sweep, load_sweep

GOOD = """\
name: small
seed: 3
dataset: {source: synthetic, max_history: 20}
encoder: {type: sasrec, hidden_size: 16}
stages:
  - train: encoder
    strategy: {type: next_item}
    learning_rate: 1e-3
    num_train_epochs: 2
evaluate: {ks: [1, 10]}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    recipe.resolve()
    assert (recipe.seed, recipe.dataset.max_history, recipe.evaluate.ks) == (3, 20, [1, 10])
    assert recipe.encoder is not None and recipe.encoder.options == {"hidden_size": 16}
    assert recipe.stages[0].training_arguments == {"learning_rate": 1e-3, "num_train_epochs": 2}
    assert recipe.stages[0].metric == "ndcg@10"  # a default


def test_the_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert load_recipe(write(tmp_path, recipe.dump())) == recipe


@pytest.mark.parametrize("name", asset_names("recipes"))
def test_recipes_of_the_package_resolve(name: str) -> None:
    path = find_asset("recipes", name)
    if is_sweep(path):
        assert load_sweep(path).points  # each was resolved
    else:
        load_recipe(path).resolve(str(path))


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "+1e-4", "0.0001", "1.0e-4"])
def test_scientific_notation_is_a_number(tmp_path: Path, number: str) -> None:
    recipe = load_recipe(write(tmp_path, GOOD.replace("1e-3", number)))
    assert recipe.stages[0].training_arguments["learning_rate"] == 1e-4


def test_text_that_only_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + 'report: {title: "1e-4"}\n'))
    assert recipe.report.title == "1e-4"


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("seed: 3", "sead: 3", 2, "unknown key 'sead'; did you mean 'seed'?"),
        ("max_history", "max_histry", 3, "unknown key 'dataset.max_histry'; did you mean 'max_history'?"),
        ("  - train: encoder", "  - trian: encoder", 6, "'stages.0.train' is missing"),
        ("ks: [1, 10]", "kz: [1, 10]", 10, "did you mean 'ks'?"),
        ("seed: 3", "seed: three", 2, "seed: Input should be a valid integer"),
        ("max_history: 20", "max_history: 0", 3, "greater than or equal to 1; found 0"),
        ("train: encoder", "train: everything", 6, "found 'everything'"),
        ("ks: [1, 10]", "ks: [1, ten]", 10, "evaluate.ks.1"),
        ("name: small", "name: a/b", 1, "names a folder"),
        ("seed: 3", "name: other", 2, "key 'name' stands here a second time"),
        ("hidden_size: 16", "type: ease", 4, "key 'type' stands here a second time"),
        ("seed: 3", "seed: [3", 3, "not valid YAML"),
        ("seed: 3", "? [1, 2]\n: 3", 2, "a key must be a name, found a sequence"),
        ("seed: 3", "a: &a 3", 2, "unknown key 'a'"),
        ("[1, 10]}", "&k [1]}\nreport: {title: *k}", 11, "write the value out"),
        ("stages:", "stages: &s\n  - *s\n", 6, "write the value out"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, old: str, new: str, line: int, expected: str) -> None:
    assert old in GOOD
    message = refusal(tmp_path, GOOD.replace(old, new, 1))
    assert f"{tmp_path / 'recipe.yaml'}:{line}: " in message and expected in message


@pytest.mark.parametrize(
    "text", ["", "just text", "- a\n- b\n", "name: a\nseed: 2024-13-45\n", "name: \x07\n", "a: 0b_\n", "<<: {a: 1}\n"]
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    assert str(tmp_path) in refusal(tmp_path, text)


def test_missing_deep_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="llmrec list recipes"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    assert "too deeply" in refusal(tmp_path, "name: " + "[" * 3000 + "]" * 3000)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD.replace("seed: 3", "sead: 3").replace("ks:", "kz:"))
    assert message.count("unknown key") == 2 and len(message.splitlines()) == 2


# --set


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=9", lambda r: r.seed == 9),
        ("stages.0.learning_rate=5e-4", lambda r: r.stages[0].training_arguments["learning_rate"] == 5e-4),
        ("evaluate.ks=[5, 20]", lambda r: r.evaluate.ks == [5, 20]),
        ("evaluate.ks.1=7", lambda r: r.evaluate.ks == [1, 7]),
        ("report.title=a=b", lambda r: r.report.title == "a=b"),
        ("encoder.dropout=0.5", lambda r: r.encoder.options["dropout"] == 0.5),
        ("dataset.options.users=50", lambda r: r.dataset.options == {"users": 50}),
        ("dataset.columns.0=user", lambda r: r.dataset.columns == {"0": "user"}),
        ("encoder=null", lambda r: r.encoder is None),
        ("llm={model: smollm2-135m}", lambda r: r.llm.model == "smollm2-135m"),
    ],
)
def test_overrides(tmp_path: Path, override: str, read: Any) -> None:
    assert read(load_recipe(write(tmp_path, GOOD), [override]))


def test_the_last_override_counts(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "expected a.b=value"),
        ("=3", "expected a.b=value"),
        ("sead=3", "did you mean 'seed'?"),
        ("stages.1.train=encoder", "the list has 1 entries, '1'"),
        ("stages.-1.train=encoder", "the list has 1 entries, '-1'"),
        ("stages.first.train=encoder", "'first' is not one of them"),
        ("stages.².train=encoder", "'²' is not one of them"),
        ("evaluate.ks.2=5", "the list has 2 entries"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("seed=[", "not valid YAML"),
        ("seed=2024-13-45", "not valid YAML"),
        ("seed=*a", "write the value out"),
        ("seed=three", "found 'three'"),
        ("stages.0.train=all", "found 'all'"),
        ("dataset={max_history: 5}", "'dataset.source' is missing"),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, override: str, expected: str) -> None:
    message = refusal(tmp_path, GOOD, override)
    assert expected in message and f"--set {override}" in message


# What a recipe asks for must exist and fit together.

TUNED = GOOD + "llm: {model: m}\ntuner: {type: ilora}\nprompt: {style: item_slots}\n"


def unresolvable(folder: Path, text: str, *overrides: str) -> str:
    recipe = load_recipe(write(folder, text), overrides)
    with pytest.raises(RecipeError) as caught:
        recipe.resolve("here")
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["encoder.type=sasrek"], "no encoder 'sasrek'; did you mean 'sasrec'?"),
        (["encoder.hiden_size=3"], "no option 'hiden_size'; did you mean 'hidden_size'?"),
        (["tuner.type=ilor"], "did you mean 'ilora'?"),
        (["stages.0.strategy.type=next"], "no strategy 'next'"),
        (["stages.0.strategy.nonsense=1"], "no option 'nonsense'"),
        (["llm=null"], "`tuner` needs an `llm`"),
        (["stages.0.train=tuner", "llm=null", "tuner=null"], "no `llm` or no `prompt`"),
        (["stages.0.train=head"], "no `head` section"),
        (["encoder=null"], "no `encoder` section"),
        (["encoder=null", "stages=[]"], "come from an encoder"),
        (["prompt.style=text"], "needs prompt.template"),
    ],
)
def test_parts_that_do_not_exist_or_fit(tmp_path: Path, overrides: list[str], expected: str) -> None:
    message = unresolvable(tmp_path, TUNED, *overrides)
    assert expected in message and "Traceback" not in message


def test_a_gated_tuner_needs_an_encoder_even_with_text_prompts(tmp_path: Path) -> None:
    text = ["prompt={style: text, template: next_item/movie}", "encoder=null", "stages=[]"]
    assert "come from an encoder" in unresolvable(tmp_path, TUNED, *text)


def test_nothing_to_do(tmp_path: Path) -> None:
    assert "nothing to do" in unresolvable(tmp_path, "name: a\ndataset: {source: synthetic}\n")


def test_four_bits_need_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "_importable", lambda module: False)
    message = unresolvable(tmp_path, TUNED, "llm.quantize=4bit")
    assert "llmrec[quant]" in message and "4bit" in message
    monkeypatch.setattr(recipe_module, "_importable", lambda module: module == "bitsandbytes")
    load_recipe(write(tmp_path, TUNED), ["llm.quantize=4bit"]).resolve()


OUTSIDE = """\
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder

class Clock(SASRecEncoder):
    uses = frozenset({"timestamps"})
"""


def test_check_dataset(tmp_path: Path) -> None:
    (tmp_path / "clock.py").write_text(OUTSIDE, encoding="utf-8")
    recipe = load_recipe(write(tmp_path, GOOD), [f"encoder={{type: '{tmp_path}/clock.py:Clock'}}"])
    recipe.resolve()
    recipe.check_dataset(frozenset({"timestamps"}))
    with pytest.raises(RecipeError, match="reads timestamps, and the data set has titles"):
        recipe.check_dataset(frozenset({"titles"}))
    recipe = load_recipe(write(tmp_path, GOOD), ["encoder={type: caser, use_user: true}"])
    recipe.check_dataset(frozenset())  # users are in every data set
    text = load_recipe(write(tmp_path, TUNED), ["prompt={style: text, template: next_item/movie}"])
    text.check_dataset(frozenset({"titles"}))
    with pytest.raises(RecipeError, match="needs item titles"):
        text.check_dataset(frozenset({"timestamps"}))
    load_recipe(write(tmp_path, TUNED)).check_dataset(frozenset())


def test_old_argument_names_are_translated() -> None:
    stage = {"train": "encoder", "evaluation_strategy": "epoch", "learning_rate": 1e-3}
    recipe = parse_recipe({"name": "a", "dataset": {"source": "s"}, "encoder": {"type": "sasrec"}, "stages": [stage]})
    assert recipe.stages[0].training_arguments == {"eval_strategy": "epoch", "learning_rate": 1e-3}


# Whatever stands in the file, the outcome is a recipe or a RecipeError.

_words = st.sampled_from(
    ["encoder", "sasrec", "ilora", "next_item", "all", "full", "text", "4bit", "a.b:c", "x.py:Y", "llmrec.x.Y", ""]
)
_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 60), st.floats(), _words, st.text(max_size=6), st.dates()
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _section(model: Any) -> st.SearchStrategy[Any]:
    """Mappings whose keys are mostly the real ones and whose values are anything."""
    known = st.sampled_from([*model.model_fields, "type", "unknown"])
    return st.dictionaries(known, _values, max_size=5) | _values


@st.composite
def _recipes(draw: st.DrawFn) -> Any:
    tree: dict[str, Any] = {"name": "fuzz", "dataset": {"source": "synthetic"}, "encoder": {"type": "sasrec"}}
    for key in draw(st.lists(st.sampled_from(list(Recipe.model_fields)), max_size=5, unique=True)):
        model = recipe_module._model_in(Recipe.model_fields[key].annotation)
        section = _section(model) if model is not None else _values
        tree[key] = draw(st.lists(section, max_size=2) if key in ("stages", "transforms") else section)
    return tree


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(tree=_recipes(), override=st.none() | st.tuples(st.text(max_size=8), st.text(max_size=8)))
def test_any_tree_is_read_or_refused(tmp_path: Path, tree: Any, override: tuple[str, str] | None) -> None:
    text = yaml.safe_dump(tree, allow_unicode=True)
    try:
        recipe = load_recipe(write(tmp_path, text), [] if override is None else ["=".join(override)])
        recipe.resolve()
        assert parse_recipe(yaml.safe_load(recipe.dump())).name == recipe.name
    except RecipeError as error:
        assert str(error)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(text=st.text(alphabet="ab1: -[]{}&*!<>?|'\"#\n\t%@e.0x_", max_size=40))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):  # no such text holds a data set and an encoder
        load_recipe(write(tmp_path, text))
