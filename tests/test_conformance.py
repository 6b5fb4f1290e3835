"""What every registered method promises, for each protocol it declares and on every family.

A new method inherits this suite by being in the registry; its examples are `EXAMPLES` in its own test file.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from intaglio.checkpoint import Checkpoint, load, weights_digest
from intaglio.errors import IntaglioError
from intaglio.masks import visible
from intaglio.methods.base import Carving, Cost, Method, Workload
from intaglio.methods.registry import get_method, list_methods
from intaglio.methods.weights.one_shot import OneShotPruner
from intaglio.modeling.anatomy import anatomy
from intaglio.recipe.schema import Recipe
from tests.examples import EXAMPLES
from tests.families import DECODERS, ENCODERS, FAMILIES, tiny_model, tiny_tokenizer

CARVINGS = [slug for slug in list_methods("carving") if slug in EXAMPLES]
CASES = [(slug, index) for slug in CARVINGS for index in range(len(EXAMPLES[slug]))]
PRUNING = [case for case in CASES if issubclass(get_method(case[0]), OneShotPruner)]
VISIBILITY = [slug for slug in list_methods("visibility") if slug in EXAMPLES]
# Who sees whom is a question to decoders; encoders are refused.
APPLIED = [(*case, name) for case in CASES for name in FAMILIES if name not in ENCODERS or case[0] not in VISIBILITY]
IDS = torch.randint(8, 150, (6, 16), generator=torch.Generator().manual_seed(0))


def example(slug: str, index: int = 0) -> Method:
    return get_method(slug)(**EXAMPLES[slug][index])


def carved(slug: str, index: int, family: str) -> Checkpoint:
    checkpoint = Checkpoint(tiny_model(family), tiny_tokenizer(family), source="tiny")
    return example(slug, index).apply(checkpoint, IDS, batch_size=2)  # type: ignore[attr-defined]


def test_every_method_has_an_example() -> None:
    assert all(EXAMPLES.values())


@pytest.mark.parametrize("slug", CARVINGS)
def test_it_is_a_carving(slug: str) -> None:
    method = get_method(slug)
    assert isinstance(example(slug), Carving)
    assert method.storage in ("standalone", "runtime")  # type: ignore[attr-defined]
    assert method.changes


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_schema_round_trip(slug: str, index: int) -> None:
    method = example(slug, index)
    recipe = Recipe.from_dict({"steps": [{slug: method.model_dump()}]})
    assert recipe.steps == (method,)
    assert Recipe.from_dict(recipe.dump()) == recipe
    assert json.loads(json.dumps(method.model_dump())) == method.model_dump()


@pytest.mark.parametrize(("slug", "index", "family"), APPLIED)
def test_apply_save_load_gives_the_same_logits_and_record(slug: str, index: int, family: str, tmp_path: Path) -> None:
    checkpoint = carved(slug, index, family)
    with torch.no_grad():
        expected = checkpoint.model(IDS).logits
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(back.model(IDS).logits, expected)
    assert back.record == checkpoint.record
    step = back.record.steps[-1]
    assert (step.slug, step.parameters) == (slug, example(slug, index).model_dump())
    if example(slug, index).needs_calibration:  # type: ignore[attr-defined]
        assert step.calibration is not None
        assert (step.calibration["samples"], step.calibration["length"]) == (6, 16)
    if back.kind == "runtime":
        assert get_method(slug).storage == "runtime"  # type: ignore[attr-defined]
        for loader in (AutoModelForCausalLM, type(checkpoint.model)):
            with pytest.raises((ValueError, OSError)):  # it must not run as another model in silence
                loader.from_pretrained(tmp_path / "out")
    else:
        stock = (AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM).from_pretrained(tmp_path / "out")
        with torch.no_grad():
            assert torch.equal(stock.eval()(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("slug", "index"), PRUNING)
def test_it_changes_something_and_only_what_it_says(slug: str, index: int, family: str) -> None:
    before = tiny_model(family)
    after = carved(slug, index, family).model
    inside = {id(linear.module.weight) for _, linear in anatomy(before).all_linears()}
    changed = 0
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if not torch.equal(old, new):
            assert id(old) in inside, name
            changed += 1
    assert changed == len(inside)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("slug", VISIBILITY)
@torch.no_grad()
def test_it_changes_what_is_seen_and_no_weight(slug: str, family: str) -> None:
    before, after = tiny_model(family), carved(slug, 0, family).model
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert not torch.equal(before(IDS).logits, after(IDS).logits)
    # Sparse attention chooses keys by the input, so no mask shows it.
    assert torch.equal(visible(before, 16), visible(after, 16)) == (slug == "sparse_frontier")
    assert example(slug).changes == {"attention"}


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("slug", VISIBILITY)
def test_an_encoder_is_refused_in_one_sentence(slug: str, family: str) -> None:
    checkpoint = Checkpoint(tiny_model(family), tiny_tokenizer(family), source="tiny")
    with pytest.raises(IntaglioError, match="an encoder") as caught:
        example(slug).apply(checkpoint)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    assert checkpoint.record.steps == []


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_it_is_deterministic_to_the_byte(slug: str, index: int, tmp_path: Path) -> None:
    for name in ("a", "b"):
        carved(slug, index, "gemma3").save(tmp_path / name)
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


@pytest.mark.parametrize(("slug", "index"), PRUNING)
def test_half_precision_is_kept(slug: str, index: int) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    after = example(slug, index).apply(Checkpoint(copy.deepcopy(model)), IDS).model  # type: ignore[attr-defined]
    assert {p.dtype for p in after.parameters()} == {torch.bfloat16}
    for _, linear in anatomy(after).all_linears():
        assert float((linear.read() == 0).float().mean()) == 0.5


@pytest.mark.parametrize("slug", [s for s in CARVINGS if example(s).needs_calibration])  # type: ignore[attr-defined]
def test_missing_calibration_is_refused_and_nothing_changes(slug: str) -> None:
    model = tiny_model("llama")
    checkpoint = Checkpoint(copy.deepcopy(model))
    with pytest.raises(IntaglioError, match="calibration data is missing"):
        example(slug).apply(checkpoint)  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), checkpoint.model.parameters(), strict=True))
    assert checkpoint.record.steps == []


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_the_estimate_is_a_cost(slug: str, index: int) -> None:
    workload = Workload(((64, 32), (32, 64)), 4096, 8192, 32, 128, 32, 4)
    cost = example(slug, index).estimate(workload)  # type: ignore[attr-defined]
    assert isinstance(cost, Cost)
    assert cost.flops >= 0
    assert cost.sorted_elements > 0 or (slug, index) not in PRUNING
    assert cost.extra_bytes > 0 or (slug, index) not in PRUNING


@pytest.mark.parametrize("slug", CARVINGS)
def test_the_family_is_refused_in_one_sentence(slug: str) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    with pytest.raises(IntaglioError, match="is not supported") as caught:
        example(slug).apply(Checkpoint(Odd()), IDS)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
