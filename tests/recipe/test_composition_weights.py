"""Which steps can follow which: computed from what methods declare, and refused before any weights are read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from intaglio.checkpoint import RECORD, Record, StepRecord, load, loading
from intaglio.checkpoint.record import hub_record
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import Capability, Method, ModelAspect, RecordedStep, check_order
from intaglio.methods.registry import get_method, list_methods
from intaglio.modeling.anatomy import anatomy
from intaglio.recipe import run, source
from intaglio.recipe.compatibility import recorded_steps
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Fit, Recipe, Step, method_of
from tests.examples import EXAMPLES
from tests.families import tiny_checkpoint_dir
from tests.recipe.test_run import corpus, make_recipe  # noqa: F401

FACTS, CHANGES = set(get_args(Capability)), set(get_args(ModelAspect))
LABELS = {"objective": {"token_classification": {}}, "labels": "x.jsonl", "steps": 1}
MORE: dict[str, list[dict[str, Any]]] = {
    "visibility": [
        {"visibility": {"rule": "bidirectional"}},
        {"visibility": {"rule": {"sliding": {"window": 4}}}},
        {"visibility": {"rule": "stock"}},
        {"visibility": {"rule": "stock", "layers": [0]}},
    ],
    "drop_blocks": [
        {"drop_blocks": {"count": 1}},
        {"drop_blocks": {"count": 1, "by": "loss"}},
        {"drop_blocks": {"layers": [0]}},
    ],
    "steer": [{"steer": {"feature": 1}}],
    "train": [
        {"train": {"steps": 1}},
        {"train": {"steps": 1, "keep_mask": False}},
        {"train": {"steps": 1, "objective": {"meap": {}}}},
        {"train": {"steps": 1, "modifiers": [{"blockffn": {"experts": 4}}]}},
        {"train": LABELS},
    ],
}
"""Steps whose declarations depend on their fields."""


def every_step() -> Iterator[dict[str, Any]]:
    """Each step that a recipe can have now, as a file would hold it."""
    for slug in list_methods("carving"):
        yield from MORE.get(slug) or [{slug: fields} for fields in EXAMPLES[slug]]
    yield from MORE["train"]
    for slug, examples in EXAMPLES.items():
        method = get_method(slug)
        if method.fitted:
            accepted = {name for name, field in method.model_fields.items() if not field.exclude}
            yield {"fit": {slug: {name: v for name, v in examples[0].items() if name in accepted}}}


STEPS = list(every_step())
READ: list[Step] = [Recipe.from_dict({"steps": [step]}).steps[0] for step in STEPS]
METHODS: list[Method] = [method_of(step) for step in READ]
PAIRS = list(itertools.product(range(len(STEPS)), repeat=2))


def missing(first: Any, second: Method) -> set[str]:
    """Facts that the second needs and the first does away with."""
    return set(second.requires & first.invalidates)


def lacking(first: int, second: int) -> set[str]:
    """The same for two steps: what is fitted learns the ids that it finds."""
    learnt = {"tokenizer"} if isinstance(READ[second], Fit) else set()
    return missing(METHODS[first], METHODS[second]) - learnt


def sentence(*numbers: int) -> str | None:
    try:
        Recipe.from_dict({"steps": [STEPS[number] for number in numbers]})
    except IntaglioError as error:
        return str(error)
    return None


def test_every_carving_and_fit_is_among_the_steps() -> None:
    assert {method.slug for method in METHODS} >= {*list_methods("carving"), "train"}
    assert {step.slug for step in READ if isinstance(step, Fit)} == {
        slug for slug in EXAMPLES if get_method(slug).fitted
    }


def test_what_is_declared_are_facts_and_changes() -> None:
    for method in METHODS:
        assert set(method.requires | method.invalidates | method.restores) <= FACTS, method.slug
        assert set(method.changes) <= CHANGES, method.slug
        assert not method.restores & method.invalidates, method.slug
        assert method.changes or not method.invalidates, method.slug


def test_what_comes_alone_is_never_refused() -> None:
    assert all(sentence(number) is None for number in range(len(STEPS)))


def test_two_steps_are_refused_exactly_where_one_needs_what_the_other_undoes() -> None:
    refused = 0
    for first, second in PAIRS:
        facts, found = lacking(first, second), sentence(first, second)
        fitted = isinstance(READ[first], Fit) and not isinstance(READ[second], Fit) and not METHODS[second].keeps_fits
        assert (found is not None) == bool(facts or fitted), (STEPS[first], STEPS[second])
        if facts:
            assert found is not None
            before, after = METHODS[first].slug, METHODS[second].slug
            words = {
                f"{after} cannot follow {before}: it needs {fact}, which {before} does away with" for fact in facts
            }
            assert any(found.endswith(one) for one in words), found
            refused += 1
    assert refused  # there are such pairs


def test_a_step_in_between_changes_nothing_unless_it_gives_back() -> None:
    impossible = [(a, b) for a, b in PAIRS if missing(METHODS[a], METHODS[b])]
    for (first, second), between in itertools.product(impossible, METHODS):
        undo = between.restores if METHODS[first].changes <= between.changes else frozenset()
        still = missing(METHODS[first], METHODS[second]) - undo
        order = (METHODS[first], between, METHODS[second])
        expected = bool(still or missing(METHODS[first], between) or missing(between, METHODS[second]))
        if expected:
            with pytest.raises(IntaglioError, match="cannot follow"):
                check_order(order)
        else:
            check_order(order)


def test_the_stock_mask_gives_back_what_rules_took_and_nothing_else() -> None:
    unmask, stock = ({"visibility": {"rule": rule}} for rule in ("bidirectional", "stock"))
    groups, fit = {"layerwise_unmasking": {"groups": 2}}, {"fit": {"aded": {}}}
    some = {"visibility": {"rule": "stock", "layers": [0]}}
    for step in (unmask, groups):
        assert Recipe.from_dict({"steps": [step, stock, fit]}).steps
        for between in ([], [some]):
            with pytest.raises(IntaglioError, match=r"aded cannot follow \w+: it needs cache"):
                Recipe.from_dict({"steps": [step, *between, fit]})
    with pytest.raises(IntaglioError, match="aded cannot follow train: it needs causal"):  # its head is gone
        Recipe.from_dict({"steps": [{"train": LABELS}, stock, fit]})


# the record of the checkpoint that the steps begin with


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "model", layers=2)


def recorded(directory: Path, *steps: StepRecord, live: bool = True) -> Path:
    """A checkpoint that says of itself that these were done to it."""
    record = Record(source="tiny", steps=list(steps))
    record.live = [{"slug": "visibility", "layers": []}] if live else []
    (directory / RECORD).write_text(record.model_dump_json(), encoding="utf-8")
    return directory


def as_record(method: Method) -> StepRecord:
    """What a record says of a step."""
    fields = method.model_dump()
    if method.slug == "train":  # it notes what it made of its fields
        fields = {k: fields[k] for k in ("objective", "modifiers", "select", "keep_mask", "learning_rate")}
        fields["objective"] = fields["objective"] or {"CausalLM": {"length": None}}
    return StepRecord(slug=method.slug, parameters=json.loads(json.dumps(fields)))


def test_a_record_says_of_a_step_what_the_step_said() -> None:
    for step, method in zip(READ, METHODS, strict=True):
        if isinstance(step, Fit):
            continue
        record = Record(steps=[as_record(method)], live=[{"slug": "visibility"}])
        assert recorded_steps(record) == [
            RecordedStep(method.slug, method.changes, method.invalidates, method.restores)
        ]
        record.live = []
        not_in_effect = getattr(method, "storage", "") == "runtime"
        assert [one.slug for one in recorded_steps(record)] == ([] if not_in_effect else [method.slug])


def test_fits_and_what_this_version_does_not_know_undo_nothing() -> None:
    steps = [
        StepRecord(slug="aded", parameters={}, verb="fit"),
        StepRecord(slug="of_tomorrow", parameters={"a": 1}),
        StepRecord(slug="wanda", parameters={"share": 0.5}),
    ]
    assert recorded_steps(Record(steps=steps)) == []


def test_steps_are_refused_behind_a_record_as_behind_the_steps_themselves(
    corpus: Path,  # noqa: F811
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were read")

    for module, name in ((source, "load"), (run, "load"), (run, "load_source"), (source, "model_class")):
        monkeypatch.setattr(module, name, never)
    impossible = [(a, b) for a, b in PAIRS if not isinstance(READ[a], Fit) and lacking(a, b)]
    assert impossible
    for first, second in impossible:
        recorded(model, as_record(METHODS[first]))
        recipe = make_recipe(corpus, [STEPS[second]])
        slug = METHODS[first].slug
        words = rf"cannot follow {slug}, which the checkpoint's record names: it needs \w+, which {slug} does away with"
        for work in (
            lambda recipe=recipe: plan(recipe, model=str(model)),
            lambda recipe=recipe: carve(recipe, tmp_path / "out", model=str(model)),
        ):
            with pytest.raises(IntaglioError, match=words) as caught:
                work()
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_record_is_followed_by_all_that_it_can_be_followed_by(corpus: Path, model: Path) -> None:  # noqa: F811
    for number in (METHODS.index(get_method("wanda")(sparsity=0.5)), METHODS.index(get_method("drop_blocks")(count=1))):
        recorded(model, as_record(METHODS[number]), live=False)
        plan(make_recipe(corpus, [{"fit": {"aded": {}}}]), model=str(model))


@torch.no_grad()
def test_an_unmasked_checkpoint_that_was_saved(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """The same with real steps: refused while the rule is live, accepted once it was taken back."""
    fit = {"fit": {"aded": {"corpus": str(corpus)}}}
    carve(make_recipe(corpus, [{"visibility": {"rule": "bidirectional"}}]), tmp_path / "a", model=str(model))
    for work in (plan, lambda *a, **k: carve(a[0], tmp_path / "no", **k)):
        with pytest.raises(IntaglioError, match="aded cannot follow visibility, which the checkpoint's record names"):
            work(make_recipe(corpus, [fit]), model=str(tmp_path / "a"))
    back = make_recipe(corpus, [{"visibility": {"rule": "stock"}}, fit])
    carve(back, tmp_path / "b", model=str(tmp_path / "a"))
    found = load(tmp_path / "b")
    assert predicts_next(anatomy(found.model))
    assert [step.slug for step in found.record.steps] == ["visibility", "visibility", "aded"]
    carve(
        make_recipe(corpus, [{"visibility": {"rule": "stock", "layers": [0, 1]}}]),
        tmp_path / "c",
        model=str(tmp_path / "a"),
    )
    carve(make_recipe(corpus, [fit]), tmp_path / "d", model=str(tmp_path / "c"))  # nothing of it is live
    ids, how = torch.arange(8, 14)[None], {"max_new_tokens": 6, "do_sample": False}
    drafted = found.model.generate(ids, custom_generate=found.decoder("aded"), **how)
    assert torch.equal(drafted, found.model.generate(ids, **how))


def test_the_record_of_a_model_on_the_hub_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(loading, "load_config", lambda x: ("user/name", None))
    monkeypatch.setattr(loading, "hub_record", lambda *a, **k: asked.append((a, k)))
    assert loading.load_record("user/name@abc") is None
    assert asked == [(("user/name", "abc"), {"needed": False})]
    assert hub_record("user/name", "abc", needed=False) is None  # no network in a test
