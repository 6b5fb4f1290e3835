"""Arms choose their settings on validation data, with equal effort, before the pilot and on seeds of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intaglio.evidence import record, renew, run
from intaglio.evidence.experiment import MOST_EARLY, Experiment, Tuning, Unit
from intaglio.evidence.record import Record
from intaglio.evidence.run import prove
from intaglio.evidence.statistics import best
from tests.evidence.toy import Toy, toy

CHOICES = {"low": "a low rate", "middle": "one between", "high": "a high rate"}
BETTER = (("low", 0.5), ("middle", 2.0), ("high", math.nan))
Document = dict[str, Any]


def tuned(runner: Toy | None = None, **changes: Any) -> Experiment:
    runner = runner or Toy(better=BETTER)
    return toy(runner, **{"tuning": Tuning({"baseline": CHOICES, "method": CHOICES}, runs=2), **changes})


def proved(experiment: Experiment, directory: Path, **arguments: Any) -> Document:
    return prove("wanda", experiment=experiment, directory=directory, **arguments)


def test_the_best_choice_is_used_from_then_on(tmp_path: Path) -> None:
    document = proved(tuned(), tmp_path)
    assert {arm: of_arm["chosen"] for arm, of_arm in document["tuned"].items()} == {
        "baseline": "middle",
        "method": "middle",
    }
    used = {(r["stage"], r["arm"]): set() for r in document["runs"]}
    for of_run in document["runs"]:
        used[of_run["stage"], of_run["arm"]].add(of_run["choice"])
    assert used["tuning", "baseline"] == used["tuning", "method"] == set(CHOICES)
    for stage in ("pilot", "run"):
        assert used[stage, "baseline"] == used[stage, "method"] == {"middle"}
    assert used["run", "other"] == {""}
    # Both arms have gained as much, so the effect is as without.
    assert document["effect"] == pytest.approx(proved(toy(), tmp_path / "plain", units=document["units"])["effect"])
    assert Record.model_validate_json(json.dumps(document)).model_dump(mode="json") == document
    assert document["preregistration"]["tuning"]["choices"]["method"] == CHOICES


def test_every_trial_is_on_record(tmp_path: Path) -> None:
    document = proved(tuned(), tmp_path, units=4)
    trials = [r for r in document["runs"] if r["stage"] == "tuning"]
    assert len(trials) == 2 * 2 * 3
    of_low = [r["outcome"]["values"]["loss"]["u0"] for r in trials if (r["arm"], r["choice"]) == ("method", "low")]
    found = document["tuned"]["method"]
    assert found["means"]["low"] == pytest.approx(np.mean(of_low))
    assert found["means"]["high"] is None
    assert found["diverged"] == {"low": 0.0, "middle": 0.0, "high": 1.0}
    # All choices of all arms were tried on the same seeds, which are neither the pilot's nor the run's.
    assert document["seeds"]["tuning"] == [2 * MOST_EARLY + 1, 2 * MOST_EARLY + 3]
    seeds = {Unit(s, i, b).seed for s in ("tuning", "pilot", "run") for i in (0, 1, MOST_EARLY - 1) for b in (0, 1, 2)}  # type: ignore[arg-type]
    assert len(seeds) == 27


def test_a_killed_tuning_goes_on(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    with pytest.raises(KeyboardInterrupt):
        proved(tuned(Toy(better=BETTER, calls=str(calls), kill_at=5)), tmp_path / "broken", units=4)
    after = proved(tuned(Toy(better=BETTER, calls=str(calls))), tmp_path / "broken", units=4)
    assert len(list(calls.iterdir())) == 12 + 4 * 3
    whole = proved(tuned(), tmp_path / "whole", units=4, workers=2)
    assert {key: after[key] for key in after if key != "made"} == {key: whole[key] for key in whole if key != "made"}


def test_a_tuned_record_is_renewed_with_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(renew, "check_checkout", lambda: None)
    document = proved(tuned(), tmp_path / "out", units=4)
    document["sources"]["intaglio.methods.weights.wanda"] = "0"
    (tmp_path / "wanda.json").write_text(json.dumps(document))
    assert renew.renew("wanda", experiment=tuned())["changed"] == ["intaglio.methods.weights.wanda"]
    interval, verdict = run.reckoned(record.read_record(tmp_path / "wanda.json"))
    assert (interval.effect, verdict) == (pytest.approx(document["effect"]), document["verdict"])


@pytest.mark.parametrize(
    ("values", "direction", "chosen"),
    [
        ({"a": [3.0, 1.0], "b": [1.0, 2.0]}, "lower", "b"),
        ({"a": [3.0, 1.0], "b": [1.0, 2.0]}, "higher", "a"),
        ({"a": [2.0], "b": [2.0]}, "lower", "a"),
        ({"a": [0.0, math.nan], "b": [3.0, 2.9], "c": [9.0, 9.0]}, "lower", "b"),  # the NaN counts as 9
        ({"a": [math.inf], "b": [5.0]}, "lower", "b"),
        ({"a": [math.nan], "b": [math.nan]}, "lower", "a"),
    ],
)
def test_the_best(values: dict[str, list[float]], direction: Any, chosen: str) -> None:
    assert best({name: np.array(row) for name, row in values.items()}, direction) == chosen


@pytest.mark.parametrize(
    ("tuning", "sentence"),
    [
        (Tuning({"method": CHOICES}), "the baseline and the method among them"),
        (Tuning({"baseline": CHOICES, "method": CHOICES, "nobody": CHOICES}), "are arms"),
        (Tuning({"baseline": {"low": ""}, "method": CHOICES}), "the same number of choices"),
        (Tuning({"baseline": {}, "method": {}}), "the same number of choices"),
        (Tuning({"baseline": CHOICES, "method": CHOICES}, runs=0), "0 tuning runs choose nothing"),
    ],
)
def test_unequal_effort_is_refused(tuning: Tuning, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        toy(tuning=tuning)


def test_what_is_tuned_is_registered_and_nothing_is_said_where_nothing_is() -> None:
    assert "tuning" not in toy().preregistration()
    plain, other = tuned(), tuned(tuning=Tuning({"baseline": CHOICES, "method": CHOICES}, runs=3))
    assert len({toy().digest, plain.digest, other.digest}) == 3
    assert json.loads(json.dumps(plain.preregistration())) == plain.preregistration()
