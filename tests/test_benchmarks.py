"""Rules of the benchmarks: quiet machines only, prompts without loops, and the guard's verdict."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from intaglio.errors import IntaglioError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Module = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    before = set(sys.modules)
    for folder in (BENCHMARKS, BENCHMARKS / "decoding"):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_results_are_refused_from_a_machine_that_wandered(module: Module) -> None:
    """The dense time may wander by 10 % during a run."""
    machine = module("machine")
    steady = [1.0, 1.3, 1.02, 0.99, 1.0, 1.04, 1.01, 1.0, 1.05, 1.03, 1.0, 1.02]
    machine.check_quiet(steady, "dense")
    assert machine.wandering([1.0]) == 0
    assert machine.wandering([1.0, 1.0, 1.5, 1.5]) == pytest.approx(0.5)
    with pytest.raises(IntaglioError, match="the time of dense wandered by 20% during the run"):
        machine.check_quiet([*steady[:9], 1.2, 1.2, 1.2], "dense")
    assert machine.machine()["processor"] in machine.title()


def test_a_loop_is_an_8_gram_that_repeats(module: Module) -> None:
    prompts = module("prompts")
    assert not prompts.loops(range(30))
    assert not prompts.loops([*range(7), 99, *range(7)])
    assert prompts.loops([*range(8), 99, *range(8)])
    assert not prompts.loops([])


@pytest.mark.parametrize(("slower", "code"), [(1.02, 0), (1.05, 1)])
def test_the_guard_fails_where_a_fast_path_is_slower_by_more_than_3_percent(
    module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slower: float, code: int
) -> None:
    guard, now = module("guard"), [0.0]
    monkeypatch.setattr(guard, "time", SimpleNamespace(thread_time=lambda: now[0], perf_counter=lambda: now[0]))

    def taking(seconds: float) -> Callable[[int], None]:
        def call(count: int) -> None:
            now[0] += seconds * count

        return call

    def pairs(*_: Any) -> Iterator[Any]:
        yield "even", (taking(0.001), taking(0.001))
        yield "slower", (taking(0.001), taking(0.001 * slower))

    monkeypatch.setattr(guard, "_pairs", pairs)
    monkeypatch.setattr(sys, "argv", ["guard.py", "--parts", "products", "--threads", "1", "--out", str(tmp_path)])
    assert guard.main() == code
    document = json.loads((tmp_path / "guard.json").read_text())
    assert [result["ratio"] for result in document["results"]] == pytest.approx([1.0, slower])
    assert document["machine"]["threads"] == 1
