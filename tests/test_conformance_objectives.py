"""What every registered objective promises, on every decoder family; a new one inherits this by being registered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.trainer import Loss, Objective
from intaglio.trainer.dataset import as_example
from tests.examples import EXAMPLES, TEST_FILES
from tests.families import DECODERS, ENCODERS, tiny_model
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run, same, weights
from tests.trainer.test_resume import Killed, killer

OBJECTIVES = [slug for slug, entry in PUBLISHED.items() if "objective" in entry.kinds]
CASES = [(slug, index) for slug in OBJECTIVES for index in range(len(EXAMPLES[slug]))]
FITTING = {slug: getattr(TEST_FILES[slug], "FAMILIES", DECODERS) for slug in OBJECTIVES}
"""Families that an objective trains: `FAMILIES` in its test file, or all decoders."""
DATA = {slug: PAIRS if "encoder" in PUBLISHED[slug].kinds else TEXTS for slug in OBJECTIVES}
"""Training data by objective: pairs for encoders."""


def objective(slug: str, index: int) -> Any:
    return get_method(slug)(**EXAMPLES[slug][index])


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_it_is_an_objective_and_plain_data(slug: str, index: int) -> None:
    method = objective(slug, index)
    assert isinstance(method, Objective)
    assert isinstance(method.modules(), torch.nn.ModuleDict)
    assert type(method).model_validate(json.loads(json.dumps(method.model_dump()))) == method
    assert method.changes


@pytest.mark.parametrize(
    ("slug", "index", "family"),
    [(*case, name) for case in CASES for name in FITTING[case[0]] if case[1] == 0 or name == FITTING[case[0]][0]],
)
def test_two_steps_saved_and_resumed_are_equal(slug: str, index: int, family: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"steps": 3, "save_every": 1, "warmup": 0}
    whole, killed, again = (checkpoint(family, layers=1) for _ in range(3))
    before = weights(whole)
    unbroken = run(whole, DATA[slug], objective=objective(slug, index), **arguments)
    with pytest.raises(Killed):
        run(killed, DATA[slug], objective=objective(slug, index), directory=tmp_path, progress=killer(3), **arguments)
    resumed = run(again, DATA[slug], objective=objective(slug, index), directory=tmp_path, **arguments)
    assert resumed.history == unbroken.history
    assert same(weights(again), weights(whole))
    assert not same(weights(whole), before)
    assert whole.record.steps[-1].parameters["objective"] == {slug: objective(slug, index).model_dump()}
    assert type(whole.model) is type(tiny_model(family, layers=1))


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_its_loss_is_a_scalar_with_a_gradient(slug: str, index: int) -> None:
    from intaglio.trainer import KeyedRNG

    ckpt, method, draws = checkpoint(FITTING[slug][0]), objective(slug, index), KeyedRNG(0)
    examples = [as_example(ckpt, n, item) for n, item in enumerate(DATA[slug])]
    made = method.prepare(ckpt, examples, draws) if hasattr(method, "prepare") else examples
    rows = [{**row, "id": n, "epoch": 0, "step": 0} for n, row in enumerate(made)][:3]
    batch = method.collate(rows, draws)
    again = method.collate(rows, draws)
    assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(again[name])) for name in batch)
    loss = method.loss(ckpt.model, batch)
    assert isinstance(loss, Loss)
    assert loss.total.ndim == 0
    loss.total.backward()
    assert any(p.grad is not None and p.grad.any() for p in ckpt.model.parameters())


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("slug", [slug for slug in OBJECTIVES if "causal" in get_method(slug).requires])
def test_the_family_is_refused_in_one_sentence(slug: str, family: str) -> None:
    ckpt = checkpoint(family)
    before = weights(ckpt)
    with pytest.raises(IntaglioError, match="needs a causal decoder") as caught:
        run(ckpt, objective=objective(slug, 0))
    assert "\n" not in str(caught.value)
    assert same(weights(ckpt), before)
