"""Recipes: a valid one comes back from its own dump; anything else is one sentence with its place and what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from intaglio.errors import IntaglioError
from intaglio.methods.decoding.aded import ADED
from intaglio.methods.registry import METHODS, Entry, get_method, list_fitted, list_methods
from intaglio.methods.weights.dsnot import DSnoT
from intaglio.methods.weights.wanda import Wanda
from intaglio.recipe.schema import Fit, Recipe, json_schema

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
WANDA = {"wanda": {"sparsity": 0.5}}

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
WORDS = st.sampled_from(
    [*Recipe.model_fields, "texts", "samples", "length", "batch_size", "speed", "wanda", "dsnot", "magnitude", "fit"]
)
# Right words in any place, so that random data gets past the first check.
LIKELY = st.recursive(
    PLAIN | st.sampled_from(["2:4", "wanda", "all", 0.5, 8]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=10,
)
AMOUNTS = st.fixed_dictionaries({"sparsity": st.floats(0, 1, exclude_max=True)}) | st.fixed_dictionaries(
    {"pattern": st.integers(2, 64).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: f"{n}:{m}"))}
)
DSNOT = st.fixed_dictionaries(
    {},
    optional={
        "base": st.sampled_from(["wanda", "magnitude", "sparsegpt"]),
        "refine": st.sampled_from(["all", "attention", "mlp"]),
        "max_cycles": st.none() | st.integers(0, 99),
        "threshold": st.none() | st.floats(0, 9),
        "same_sign": st.none() | st.booleans(),
    },
)
STEPS = (
    AMOUNTS.map(lambda amount: {"wanda": amount})
    | AMOUNTS.map(lambda amount: {"sparsegpt": amount})
    | st.tuples(AMOUNTS, st.sampled_from(["layer", "row"])).map(lambda both: {"magnitude": both[0] | {"per": both[1]}})
    | st.tuples(AMOUNTS, DSNOT).map(lambda both: {"dsnot": both[0] | both[1]})
)

SCHEMA = Draft202012Validator(json_schema())
ADED_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "corpus": st.none() | st.text(min_size=1, max_size=9) | st.lists(st.lists(st.integers(0, 99)), min_size=1),
        "search": st.sampled_from(["mcts", "greedy", "full", "best"]),
        "nodes": st.integers(1, 1024),
        "token_cost": st.floats(0, 1),
        "adaptive": st.booleans(),
    },
)
FITS = ADED_FIELDS.map(lambda fields: {"fit": {"aded": fields}})
SEGMENTS = {"samples": st.integers(1, 1000), "length": st.integers(8, 4096), "batch_size": st.integers(1, 64)}
GOOD = st.fixed_dictionaries(
    {
        "steps": st.tuples(st.lists(STEPS, max_size=3), st.lists(FITS, max_size=1))
        .map(lambda both: both[0] + both[1])
        .filter(bool)
    },
    optional={
        "model": st.text(min_size=1, max_size=9),
        "seed": st.integers(0, 2**63 - 1),
        "calibration": st.fixed_dictionaries({}, optional={"texts": st.text(min_size=1, max_size=9), **SEGMENTS}),
        "measure": st.fixed_dictionaries({}, optional={"speed": st.booleans(), **SEGMENTS}),
    },
)


def sentence_of(read: Callable[[], Recipe]) -> str | None:
    """The refusal, checked to be one line; None if the recipe is right."""
    sentence = None
    try:
        read()
    except IntaglioError as error:
        sentence = str(error)
    assert sentence is None or sentence.isprintable()
    return sentence


def refusal(text: str, tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    sentence = sentence_of(lambda: Recipe.read(path))
    assert sentence is not None
    assert sentence.startswith(str(path))
    return sentence.removeprefix(str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_right(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.model in ("smollm2", "minilm") or recipe.new is not None
    assert SCHEMA.is_valid(yaml.safe_load(path.read_text()))


def test_there_are_shipped_recipes() -> None:
    assert SHIPPED


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: smollm2\ncalibration: {samples: 8}\n"
        "steps:\n  - dsnot: {sparsity: 5e-1, base: magnitude}\n  - wanda: {pattern: 2:4}\n"
    )
    recipe = Recipe.read(path)
    assert recipe.steps == (DSnoT(sparsity=0.5, base="magnitude"), Wanda(pattern="2:4"))
    assert (recipe.model, recipe.seed, recipe.calibration.samples, recipe.calibration.texts) == (
        "smollm2",
        0,
        8,
        "wikipedia",
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        # names
        (
            "steps:\n  - wnda: {sparsity: 0.5}",
            ", line 2, steps[0]: there is no method named 'wnda'; did you mean wanda?",
        ),
        (
            "steps:\n  - prune: {}",
            ", line 2, steps[0]: there is no method named 'prune'; "
            "accepted: bitnet, combiner, drop_blocks, dsnot, fit, layerwise_unmasking, lost, magnitude, moe_x, "
            "omp_transplant, r_sparse, sparse_frontier, sparsegpt, steer, train, visibility, wanda",
        ),
        (
            "steps:\n  - wanda:\n      sparsty: 0.5",
            ", line 3, steps[0].wanda.sparsty: there is no such field here; did you mean sparsity?",
        ),
        (
            "stps:\n  - wanda: {sparsity: 0.5}",
            ", line 1, stps: there is no such field here; did you mean steps?",
        ),
        (
            "steps: [wanda: {sparsity: 0.5}]\n\ncalibration: {txts: a}",
            ", line 3, calibration.txts: there is no such field here; did you mean texts?",
        ),
        (
            "steps:\n  - dsnot: {sparsity: 0.5, base: wnda}",
            ", line 2, steps[0].dsnot.base: 'wnda' is not accepted, it should be 'wanda', 'magnitude' or 'sparsegpt'",
        ),
        # how much
        (
            "steps:\n  - wanda: {sparsity: 1.5}",
            ", line 2, steps[0].wanda.sparsity: 1.5 is not accepted, it should be less than 1",
        ),
        ("steps:\n  - wanda: {sparsity: 1}", "sparsity: 1 is not accepted, it should be less than 1"),
        ("steps:\n  - wanda: {sparsity: -0.1}", "-0.1 is not accepted, it should be greater than or equal to 0"),
        ("steps:\n  - wanda: {sparsity: .nan}", "nan is not accepted, it should be a finite number"),
        ("steps:\n  - wanda: {sparsity: -.inf}", "-inf is not accepted, it should be"),
        ("steps:\n  - wanda: {sparsity: a lot}", "'a lot' is not accepted, it should be a valid number"),
        ("steps:\n  - wanda: {sparsity: '0.5'}", "'0.5' is not accepted, it should be a valid number"),
        ("steps:\n  - wanda: {sparsity: no}", "False is not accepted, it should be a valid number"),
        ("steps:\n  - wanda: {sparsity: [0.5]}", "[0.5] is not accepted, it should be a valid number"),
        ("steps:\n  - wanda: {sparsity: 0.5, pattern: '2:4'}", "steps[0].wanda: give either sparsity or pattern"),
        ("steps:\n  - wanda: {}", ", line 2, steps[0].wanda: give either sparsity or pattern"),
        ("steps:\n  - wanda:", ", line 2, steps[0].wanda: give either sparsity or pattern"),
        ("steps:\n  - magnitude", ", line 2, steps[0].magnitude: give either sparsity or pattern"),
        (
            "steps:\n  - wanda: {pattern: 3:2}",
            ", line 2, steps[0].wanda.pattern: '3:2' keeps 3 of 2; accepted: N:M with N from 1 to M - 1",
        ),
        ("steps:\n  - wanda: {pattern: 4:4}", "'4:4' keeps 4 of 4; accepted: N:M with N from 1 to M - 1"),
        ("steps:\n  - wanda: {pattern: 0:4}", "'0:4' keeps 0 of 4; accepted"),
        ("steps:\n  - wanda: {pattern: 2-4}", "'2-4' is not a pattern; accepted: N:M, such as 2:4"),
        ("steps:\n  - wanda: {pattern: 24}", "pattern: 24 is not accepted, it should be a valid string"),
        # shapes
        ("", " is not a recipe: it must be a mapping with the key steps"),
        ("- wanda", " is not a recipe: it must be a mapping with the key steps"),
        ("model: smollm2", " is not a recipe: the key steps is missing"),
        ("steps: []", ", line 1, steps: a list of at least one step is needed"),
        ("steps:", ", line 1, steps: a list of at least one step is needed"),
        ("steps: {wanda: {sparsity: 0.5}}", ", line 1, steps: a list of at least one step is needed"),
        (
            "steps:\n  - wanda: {sparsity: 0.5}\n  - wanda: {sparsity: 0.5}\n    dsnot: {sparsity: 0.5}",
            ", line 3, steps[1]: a step is one method with its parameters, such as wanda: {sparsity: 0.5}",
        ),
        ("steps:\n  - [wanda, 0.5]", ", line 2, steps[0]: a step is one method with its parameters"),
        ("steps:\n  - {}", ", line 2, steps[0]: a step is one method with its parameters"),
        ("steps:\n  - wanda: 0.5", ", line 2, steps[0].wanda: the parameters of wanda must be a mapping"),
        ("steps: [wanda: {sparsity: 0.5}]\ncalibration: 3", "calibration: 3 is not accepted, it should be a mapping"),
        ("steps: [wanda: {sparsity: 0.5}]\nseed: -1", "seed: -1 is not accepted, it should be greater than"),
        ("steps: [wanda: {sparsity: 0.5}]\nseed: 1.5", "seed: 1.5 is not accepted, it should be a valid integer"),
        (
            "steps: [wanda: {sparsity: 0.5}]\ncalibration: {length: 4}",
            "calibration.length: 4 is not accepted, it should be greater than or equal to 8",
        ),
        ("steps: [wanda: {sparsity: 0.5}]\nmeasure: {speed: 1}", "speed: 1 is not accepted, it should be a valid bool"),
        ("steps: [wanda: {sparsity: 0.5}]\nmodel: ''", "model: '' is not accepted"),
        # what is fitted
        ("steps: [aded: {}]", ", line 1, steps[0]: aded is fitted, not applied; write fit: {aded: {}}"),
        (
            "steps:\n  - fit: {wanda: {sparsity: 0.5}}",
            ", line 2, steps[0].fit: 'wanda' is a method, but not one that is fitted; accepted: aded",
        ),
        ("steps:\n  - fit: {adad: {}}", "steps[0].fit: there is no method named 'adad'; did you mean aded?"),
        ("steps:\n  - fit", "steps[0].fit: fit names one method with its parameters, such as fit: {aded: {}}"),
        ("steps:\n  - fit: [aded]", "steps[0].fit: fit names one method with its parameters"),
        ("steps:\n  - fit: {aded: 3}", "steps[0].fit.aded: the parameters of aded must be a mapping"),
        (
            "steps:\n  - fit:\n      aded: {node: 3}",
            ", line 3, steps[0].fit.aded.node: there is no such field here; did you mean nodes?",
        ),
        (
            "steps: [fit: {aded: {nodes: 0}}]",
            "steps[0].fit.aded.nodes: 0 is not accepted, it should be greater than or equal to 1",
        ),
        ("steps: [fit: {aded: {corpus: 3}}]", "fit.aded.corpus: a corpus cannot be int; accepted: texts (a name"),
        ("steps: [fit: {aded: {corpus: ''}}]", "fit.aded.corpus: the corpus is empty; accepted: texts (a name"),
        ("steps: [fit: {aded: {corpus: [a, [1]]}}]", "corpus[0] is neither a text nor token ids; accepted: texts"),
        ("steps: [fit: {aded: {tokenizer: a}}]", "fit.aded.tokenizer: there is no such field here; accepted: adaptive"),
        (
            "steps:\n  - fit: {aded: {}}\n  - wanda: {sparsity: 0.5}",
            ", line 1, steps: wanda cannot follow the fit of aded, which belongs to the weights at that point; put "
            "fit after the steps that change them",
        ),
        # YAML; test_yamlfile.py has the rest
        ("steps: !!python/object/apply:os.system [ls]", ", line 1: a tag of YAML is not accepted in a recipe"),
        ("a: &x [b]\nsteps: *x", ", line 1: an anchor of YAML is not accepted in a recipe"),
        ("steps: [wanda: {sparsity: 0.5}]\nsteps: []", ", line 2: the key 'steps' is repeated"),
        ('steps: [wanda: {sparsity: 0.5}]\n"a\\nb\\e": 1', "a\\nb\\x1b: there is no such field here"),
        (f"steps: [wanda: {{sparsity: 0.5}}]\n{'x' * 500}: 1", "x...: there is no such field here"),
        (f"steps:\n  - {'x' * 500}: 1", "x...; accepted: bitnet, combiner, drop_blocks"),
    ],
)
def test_a_recipe_that_is_wrong(text: str, sentence: str, tmp_path: Path) -> None:
    found = refusal(text, tmp_path)
    assert sentence in found
    assert len(found) < 300


def test_what_is_fitted(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n  - wanda: {sparsity: 0.5}\n  - fit:\n      aded: {corpus: notes/, nodes: 7}\n")
    recipe = Recipe.read(path)
    assert recipe.steps == (Wanda(sparsity=0.5), Fit(ADED(corpus="notes/", nodes=7)))
    assert [step.slug for step in recipe.steps] == ["wanda", "aded"]
    assert recipe.dump()["steps"][1] == {"fit": {"aded": ADED(corpus="notes/", nodes=7).model_dump()}}
    assert Recipe.from_dict(recipe.dump()) == recipe
    assert Recipe.from_dict({"steps": [{"fit": "aded"}]}).steps == (Fit(ADED()),)


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    assert "Is a directory" in str(sentence_of(lambda: Recipe.read(tmp_path)))
    assert "No such file" in str(sentence_of(lambda: Recipe.read(tmp_path / "none.yaml")))


def test_a_method_that_is_no_carving_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("sampler", "decoding", "Sampler", "nowhere", ("decoder",), "samples", "nobody, nowhere", "https://x")
    monkeypatch.setitem(METHODS, "sampler", entry)
    assert sentence_of(lambda: Recipe.from_dict({"steps": [{"sampler": {}}]})) == (
        "recipe, steps[0]: 'sampler' is a method, but not a step of a recipe; accepted: bitnet, combiner, drop_blocks, "
        "dsnot, fit, layerwise_unmasking, lost, magnitude, moe_x, omp_transplant, r_sparse, sparse_frontier, "
        "sparsegpt, steer, train, visibility, wanda"
    )


def test_a_step_that_needs_what_an_earlier_one_undid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DSnoT, "invalidates", frozenset({"linear_weights"}))
    dsnot = {"dsnot": {"sparsity": 0.5}}
    assert sentence_of(lambda: Recipe.from_dict({"steps": [WANDA, dsnot]})) is None
    assert sentence_of(lambda: Recipe.from_dict({"steps": [dsnot, WANDA]})) == (
        "recipe, steps: wanda cannot follow dsnot: it needs linear_weights, which dsnot does away with"
    )


def test_a_digest_is_of_everything_that_decides_the_result() -> None:
    base = {"steps": [WANDA]}
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"calibration": {"batch_size": 1}},
        {"steps": [WANDA, WANDA]},
        {"steps": [{"wanda": {"sparsity": 0.25}}]},
    ]
    digests = {Recipe.from_dict(base | other).digest("a") for other in [{}, *others]}
    assert len(digests) == 5
    assert Recipe.from_dict(base).digest("b") not in digests
    assert (
        Recipe.from_dict(base | {"model": "b"}).digest("a") in digests
    )  # the model that is carved counts, not the recipe's


@settings(max_examples=40)
@given(GOOD)
def test_a_right_recipe_comes_back(value: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(value)
    assert Recipe.from_dict(recipe.dump()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.dump()))) == recipe
    assert recipe.digest("m") == Recipe.from_dict(recipe.dump()).digest("m")
    assert SCHEMA.is_valid(value)
    assert SCHEMA.is_valid(recipe.dump())


@given(PLAIN | LIKELY)
def test_any_data_gives_a_recipe_or_one_sentence(value: Any) -> None:
    sentence = sentence_of(lambda: Recipe.from_dict(value))
    if sentence is None:
        assert Recipe.from_dict(Recipe.from_dict(value).dump()) == Recipe.from_dict(value)
    else:
        assert sentence.startswith("recipe")


@settings(max_examples=200)
def _says_little(step: Any) -> bool:
    """Whether a step has a bare slug, or null, in the place of a method's parameters."""
    if not isinstance(step, dict):
        return True
    verb, value = next(iter(step.items()))
    if not isinstance(value, dict):
        return True
    named = {
        "fit": [value],
        "train": [value.get("objective"), value.get("select"), *(value.get("modifiers", value.get("shape")) or ())],
    }
    return any(not isinstance(one, dict) or None in one.values() for one in named.get(verb, ()) if one is not None)


@given(GOOD, st.data())
def test_a_changed_recipe_gives_a_recipe_or_one_sentence(value: dict[str, Any], data: st.DataObject) -> None:
    places = list(_places(value))
    *front, last = data.draw(st.sampled_from(places))
    owner: Any = value
    for part in front:
        owner = owner[part]
    what = data.draw(st.sampled_from(["replace", "delete", "add"]))
    if what == "replace":
        owner[last] = data.draw(LIKELY)
    elif what == "delete":
        del owner[last]
    elif isinstance(owner, dict):
        owner[data.draw(WORDS | st.text(max_size=5))] = data.draw(LIKELY)
    else:
        owner.append(data.draw(LIKELY))
    sentence = sentence_of(lambda: Recipe.from_dict(value))
    if sentence is None:
        # What the validator takes, the schema takes; but a bare slug, or null, says "no parameters" in YAML only.
        assert SCHEMA.is_valid(value) or any(_says_little(step) for step in value["steps"])


@settings(max_examples=60)
@given(GOOD, st.data())
def test_a_damaged_file_gives_a_recipe_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any], data: st.DataObject
) -> None:
    content = bytearray(yaml.safe_dump(value).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(content)
    sentence = sentence_of(lambda: Recipe.read(path))
    assert sentence is None or str(path) in sentence


def _places(value: Any, place: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from _places(inner, (*place, key))


# --- the JSON Schema -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"steps": []},
        {"steps": [{}]},
        {"steps": [{"wnda": {"sparsity": 0.5}}]},
        {"steps": [{"wanda": {"sparsity": 1}}]},
        {"steps": [{"wanda": {"sparsity": -1}}]},
        {"steps": [{"wanda": {"sparsity": "0.5"}}]},
        {"steps": [{"wanda": {"sparsty": 0.5}}]},
        {"steps": [{"wanda": {"sparsity": 0.5}, "dsnot": {"sparsity": 0.5}}]},
        {"steps": [{"dsnot": {"sparsity": 0.5, "base": "none"}}]},
        {"steps": [{"wanda": {"pattern": "2-4"}}]},
        {"steps": [{"wanda": {}}]},
        {"steps": [{"wanda": {"sparsity": 0.5, "pattern": "2:4"}}]},
        {"steps": [{"wanda": {"sparsity": 0.5, "ignore": "*.mlp.*"}}]},
        {"steps": [{"dsnot": {"sparsity": 0.5, "max_cycles": 1.5}}]},
        {"steps": [WANDA], "seed": -1},
        {"steps": [WANDA], "seed": True},
        {"steps": [WANDA], "calibration": {"samples": 0}},
        {"steps": [WANDA], "measure": {"speed": "yes"}},
        {"steps": [WANDA], "stps": []},
        {"steps": [{"aded": {}}]},
        {"steps": [{"fit": {}}]},
        {"steps": [{"fit": {"wanda": {"sparsity": 0.5}}}]},
        {"steps": [{"fit": {"aded": {"nodes": 0}}}]},
        {"steps": [{"fit": {"aded": {"corpus": ""}}}]},
        {"steps": [{"fit": {"aded": {"corpus": 3}}}]},
        {"steps": [{"fit": {"aded": {"tokenizer": "a"}}}]},
    ],
)
def test_the_schema_refuses_what_the_validator_refuses(value: Any) -> None:
    assert sentence_of(lambda: Recipe.from_dict(value)) is not None
    assert not SCHEMA.is_valid(value)


def test_the_schema_describes_every_step() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    offered = [choice["required"][0] for choice in schema["properties"]["steps"]["items"]["oneOf"]]
    assert offered == [*list_methods("carving"), "fit", "train"]
    fitted = schema["properties"]["steps"]["items"]["oneOf"][-2]["properties"]["fit"]["oneOf"]
    assert [choice["required"][0] for choice in fitted] == list_fitted()
    for slug in [*list_methods("carving"), *list_fitted()]:
        assert schema["$defs"][slug]["description"] == METHODS[slug].summary
        fields = get_method(slug).model_fields
        assert set(schema["$defs"][slug]["properties"]) == {name for name in fields if not fields[name].exclude}


@pytest.mark.parametrize(
    ("alpha", "sentence"),
    [
        (
            2.0,
            "r_sparse.alpha: 2.0 is not accepted, it should be less than or equal to 1, or it should be 'error', "
            "or it should be a mapping",
        ),
        (
            "abc",
            "r_sparse.alpha: 'abc' is not accepted, it should be a valid number, or it should be 'error', "
            "or it should be a mapping",
        ),
        ({"*.q_proj": 2.0}, r"r_sparse.alpha.\*.q_proj: 2.0 is not accepted, it should be less than or equal to 1"),
    ],
)
def test_a_field_of_several_types_is_named_as_the_file_has_it(alpha: Any, sentence: str) -> None:
    with pytest.raises(IntaglioError, match=f"{sentence}$"):
        Recipe.from_dict({"model": "m", "steps": [{"r_sparse": {"alpha": alpha}}]})
