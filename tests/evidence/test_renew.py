"""A stale record is renewed only if one run of every arm gives the very same values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence import record, renew, run
from intaglio.evidence.experiment import Outcome
from intaglio.evidence.run import prove
from tests.evidence.toy import COST, Toy, toy


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a record whose code has changed since."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "check_checkout", lambda: None)
    document = prove("wanda", experiment=toy(), directory=tmp_path / "out", units=5)
    document["sources"]["intaglio.methods.weights.wanda"] = "0"
    path = tmp_path / "wanda.json"
    path.write_text(json.dumps(document))
    return path


def stale() -> bool:
    found = record.shipped("wanda")
    assert found is not None
    return record.is_stale(found)


def edited(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_values_clear_the_flag_and_change_nothing_else(shipped: Path, workers: int) -> None:
    before = json.loads(shipped.read_text())
    seen: list[tuple[int, int]] = []
    assert stale()
    found = renew.renew("wanda", experiment=toy(), workers=workers, progress=lambda d, t, w: seen.append((d, t)))
    assert found["changed"] == ["intaglio.methods.weights.wanda"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not stale()
    after = json.loads(shipped.read_text())
    assert {key for key in after if after[key] != before[key]} == {"sources", "renewed"}
    assert after["renewed"] == found["renewed"]


def test_a_record_that_is_not_stale_runs_nothing(shipped: Path, tmp_path: Path) -> None:
    renew.renew("wanda", experiment=toy())
    calls = tmp_path / "calls"
    calls.mkdir()
    content = shipped.read_bytes()
    assert renew.renew("wanda", experiment=toy(Toy(calls=str(calls))))["changed"] == []
    assert not list(calls.iterdir())
    assert shipped.read_bytes() == content


def test_one_other_value_keeps_it_stale(shipped: Path) -> None:
    def nudge(document: dict[str, Any]) -> None:
        values = next(r for r in document["runs"] if (r["stage"], r["index"], r["arm"]) == ("run", 0, "other"))
        values["outcome"]["values"]["twice"]["u0"] += 1e-12

    edited(shipped, nudge)
    content = shipped.read_bytes()
    with pytest.raises(IntaglioError, match=r"other of run 0 does not give what is on record \(twice of u0: .*anew"):
        renew.renew("wanda", experiment=toy())
    assert shipped.read_bytes() == content
    assert stale()


def test_measured_times_are_left_out() -> None:
    def once(seconds: float, value: float) -> record.Run:
        values = {"loss": {"u": value}, "seconds a token": {"u": seconds}}
        return record.Run(stage="run", index=0, seed=0, arm="a", outcome=Outcome(values=values, cost=COST))

    assert renew._difference(once(1.0, 2.0), once(3.0, 2.0)) == ""
    assert "loss of u: 2.0, now 2.5" in renew._difference(once(1.0, 2.0), once(1.0, 2.5))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"delta": 0.4}, "the experiment of wanda is not the one on record"),
        ({"run_unit": Toy(tokens=(("baseline", 11), ("method", 11), ("other", 11)))}, "tokens: 10, now 11"),
        ({"run_unit": Toy(unfair=True)}, "other data"),
    ],
)
def test_another_experiment_data_or_cost_is_refused(shipped: Path, changes: dict[str, Any], sentence: str) -> None:
    content = shipped.read_bytes()
    with pytest.raises(IntaglioError, match=sentence):
        renew.renew("wanda", experiment=toy(**changes))
    assert shipped.read_bytes() == content


def test_no_record_is_said(shipped: Path) -> None:
    shipped.unlink()
    with pytest.raises(IntaglioError, match="there is no record of wanda to renew"):
        renew.renew("wanda", experiment=toy())
