"""The plumbing of ADED's claim, end to end on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.evidence import aded
from intaglio.evidence.aded import EXPERIMENTS, FRESH, METHODS, ROWS, SECONDS, SHIFTED, TOKENS
from intaglio.evidence.continuing import Generated, loop_start
from intaglio.evidence.experiment import Unit
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from tests.families import tiny_checkpoint_dir


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> SmolLM2Wikipedia:
    model = tiny_checkpoint_dir("llama", tmp_path_factory.mktemp("world") / "tiny", layers=1)
    return SmolLM2Wikipedia(model=str(model), texts=str(corpus_file), documents_run=4, documents_pilot=3, tokens=20)


def test_end_to_end(small: SmolLM2Wikipedia, tmp_path: Path) -> None:
    quick = dataclasses.replace(aded.experiment(small, new=4), pilot_runs=2, most_runs=2, threads=1)
    document = prove("aded", experiment=quick, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(METHODS)
    assert len(document["secondaries"]) == 9
    for run in document["runs"]:
        values = run["outcome"]["values"]
        assert set(values) == {TOKENS, FRESH, SHIFTED, SECONDS}
        assert all(value["prompt"] >= 1 for name, value in values.items() if name != SECONDS)


def test_all_arms_say_the_same_and_stay_in_their_rows(small: SmolLM2Wikipedia) -> None:
    target, unit = small.load(), Unit("run", 1)
    prompt = small.documents("run").segments.ids_NT[1].tolist()
    stock = target.model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    for arm in METHODS:
        found = aded.go_on(target, aded.make(arm, target, small), prompt, 10)
        assert list(found.ids) == stock
        assert sum(found.steps) == len(found.ids)
        assert found.rows <= len(prompt) + (len(found.steps) - 1) * (ROWS + 1)
    outcomes = [aded.Continue(small, 6)(arm, unit, 0) for arm in ("lookup", "aded")]
    assert outcomes[0].shared == outcomes[1].shared
    other = aded.Continue(small, 6)("aded", Unit("run", 2), 0)
    assert not set(other.shared.values()) & set(outcomes[0].shared.values())
    with pytest.raises(IntaglioError, match="prompt 4 was asked for; the world has 4"):
        aded.Continue(small, 6)("aded", Unit("run", 4), 0)


def test_the_table_is_of_articles_that_no_prompt_is_of(small: SmolLM2Wikipedia) -> None:
    calibration = set(small.part("calibration").hashes)
    for part in ("pilot", "evaluation"):
        assert not calibration & set(small.part(part).hashes)  # type: ignore[arg-type]
    target = small.load()
    both: list[Any] = [aded.make(arm, target, small) for arm in ("aded", "aded-static")]
    assert both[0].table(target.model) is both[1].table(target.model)
    assert len(both[0].table(target.model)) > 0


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([1, 2, 3], 3),
        ([1, 2, 2], 1),
        ([1, 2, 3, 2, 3], 1),
        ([1, 2, 3, 2, 3, 2], 1),
        ([7] * 9, 0),
        ([1, 1, 2], 3),
        ([], 0),
    ],
)
def test_where_a_loop_starts(ids: list[int], start: int) -> None:
    assert loop_start(ids) == start


@given(st.lists(st.integers(0, 2), max_size=24))
def test_a_loop_goes_on_to_the_end(ids: list[int]) -> None:
    def loops(place: int) -> bool:
        rest = ids[place:]
        return any(rest[p:] == rest[:-p] for p in range(1, len(rest) // 2 + 1))

    assert loop_start(ids) == next((place for place in range(len(ids)) if loops(place)), len(ids))


def test_rates_leave_the_prefill_out() -> None:
    found = Generated((0,) * 9, (1, 3, 1, 4), 0, 1.0)
    assert found.rate() == 8 / 3
    assert found.rate(4) == 2
    assert found.rate(1) == 3
    assert found.rate(0) == 1
    assert Generated((0,), (1,), 0, 1.0).rate() == 1


def test_the_claim() -> None:
    chosen = experiment_of("aded")
    assert chosen is EXPERIMENTS["cpu"]
    assert (chosen.baseline, chosen.method, chosen.delta, chosen.tier) == ("lookup", "aded", 0.2, "cpu")
    assert (chosen.metric, chosen.direction, chosen.design) == (TOKENS, "higher", "independent")
    assert chosen.factors == ("prompt",)
    assert all(settings.nodes == ROWS for settings, _ in METHODS.values() if settings is not None)
    there = pickle.loads(pickle.dumps(chosen))
    assert (there.digest, there.run_unit) == (chosen.digest, chosen.run_unit)
