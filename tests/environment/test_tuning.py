"""Choices by measurement: nothing is used that does not win, what is known is not measured again, off is off."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.environment import tuning
from intaglio.environment.tuning import LIMIT, MARGIN, ROUNDS, Tuner, default_path, fastest, tuner, using
from intaglio.errors import IntaglioError


class Clock:
    """Time that only candidates spend."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.calls += 1

        return call


@pytest.fixture
def clock() -> Clock:
    return Clock()


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=5))
def test_nothing_is_used_that_does_not_win(seconds: list[float]) -> None:
    times = {str(place): value for place, value in enumerate(seconds)}
    chosen = fastest(times)
    assert times[chosen] <= times["0"]
    if chosen == "0":
        assert min(seconds) > (1 - MARGIN) * seconds[0] or min(seconds) == seconds[0]
    else:
        assert times[chosen] == min(seconds)
        assert times[chosen] <= (1 - MARGIN) * times["0"]


def test_the_faster_candidate_is_chosen_and_not_measured_again(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    candidates = {"stock": clock.taking(0.004), "other": clock.taking(0.003)}
    first = Tuner(path, clock=clock)
    assert first.choose("a", candidates) == "other"
    calls = clock.calls
    assert first.choose("a", candidates) == "other"
    first.save()
    assert Tuner(path, clock=clock).choose("a", candidates) == "other"
    assert clock.calls == calls
    assert json.loads(path.read_text())["times"] == {"a": pytest.approx({"stock": 0.004, "other": 0.003})}
    # Another candidate makes it another choice.
    assert first.choose("a", {**candidates, "third": clock.taking(0.001)}) == "third"


def test_measuring_ends_at_the_limit_and_the_rest_stays_stock(clock: Clock) -> None:
    own = Tuner(clock=clock)
    slow = {"stock": clock.taking(0.2), "other": clock.taking(0.1)}
    chosen = [own.choose(str(place), slow) for place in range(9)]
    assert chosen[0] == "other"
    assert chosen[-1] == "stock"
    assert own.skipped
    assert set(own.used) == {str(place) for place in range(9) if chosen[place] == "other"}
    assert clock.now <= LIMIT + (1 + ROUNDS) * 0.3


def test_a_single_slow_choice_is_cut_short(clock: Clock) -> None:
    own = Tuner(clock=clock)
    assert own.choose("a", {"stock": clock.taking(2.0), "other": clock.taking(1.0)}) == "other"
    assert clock.now == pytest.approx(6.0)  # each twice: once to warm up


def test_tables_of_other_machines_are_ignored(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    times = {"a": {"stock": 1.0, "other": 0.1}}
    path.write_text(json.dumps({"machine": {"processor": "another"}, "times": times}))
    assert Tuner(path, clock=clock).choose("a", {"stock": clock.taking(0.1), "other": clock.taking(0.2)}) == "stock"


@pytest.mark.parametrize("text", ["{", "[]", '{"times": {"a": 3}}', '{"times": {"a": {"stock": -1}}}', "\x00"])
def test_a_damaged_table_is_one_warning_and_measured_anew(clock: Clock, tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="is damaged, so its choices are measured again") as warned:
        own = Tuner(path, clock=clock)
    assert len(warned) == 1
    assert own.choose("a", {"stock": clock.taking(0.2), "other": clock.taking(0.1)}) == "other"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been reported
        own.save()
    assert Tuner(path, clock=clock).choose("a", {"stock": clock.taking(9), "other": clock.taking(9)}) == "other"


def test_times_of_a_busy_machine_are_used_but_not_kept(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "_seconds", clock)  # it passes while this thread does not run
    own = Tuner(tmp_path / "table.json")
    assert own.choose("a", {"stock": clock.taking(0.2), "other": clock.taking(0.1)}) == "other"
    own.save()
    assert own.busy
    assert not (tmp_path / "table.json").exists()


def test_a_cache_that_cannot_be_written_is_one_warning(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own = Tuner(tmp_path / "file" / "table.json", clock=clock)
    own.choose("a", {"stock": clock.taking(0.2)})
    with pytest.warns(UserWarning, match="measured again in the next process: cannot write"):
        own.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.choose("b", {"stock": clock.taking(0.2)})
        own.save()


def test_what_another_process_has_measured_is_kept(clock: Clock, tmp_path: Path) -> None:
    one, other = (Tuner(tmp_path / "table.json", clock=clock) for _ in range(2))
    for own, key in ((one, "a"), (other, "b")):
        own.choose(key, {"stock": clock.taking(0.1)})
        own.save()
    assert set(json.loads((tmp_path / "table.json").read_text())["times"]) == {"a", "b"}


def test_the_mode_is_on_off_or_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> None:
    monkeypatch.setattr(tuning, "_current", None)
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert tuner() is None
    with using(own := Tuner()):
        assert tuner() is own
        with using(None):
            assert tuner() is None
    monkeypatch.delenv(tuning.VARIABLE)
    assert tuner() is tuner() is not None
    assert default_path().is_relative_to(tmp_path)
    table = tmp_path / "fixed.json"
    for text in (None, "{}"):
        if text is not None:
            table.write_text(text)
        monkeypatch.setattr(tuning, "_current", None)
        monkeypatch.setenv(tuning.VARIABLE, str(table))
        with pytest.raises(IntaglioError, match="which is no tuning table; on, off or a file"):
            tuner()
    # A fixed table is used whatever machine it was made on, and nothing is measured.
    table.write_text(json.dumps({"machine": {}, "times": {"a": {"stock": 2.0, "other": 1.0}}}))
    given = tuner()
    assert given is not None
    candidates = {"stock": clock.taking(1), "other": clock.taking(9)}
    assert [given.choose(key, candidates) for key in ("a", "b")] == ["other", "stock"]
    assert clock.calls == 0
