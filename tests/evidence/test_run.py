"""`prove` from pilot to record: pairs, sizes, resume, processes, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence import plot, record, run, sources
from intaglio.evidence import statistics as stats
from intaglio.evidence.experiment import Experiment, Secondary, Unit, digest
from intaglio.evidence.journal import NAME
from intaglio.evidence.record import Record
from intaglio.evidence.run import prove
from tests.evidence.toy import Toy, toy

Document = dict[str, Any]


def proved(experiment: Experiment, directory: Path, **arguments: Any) -> Document:
    return prove(experiment.slug, experiment=experiment, directory=directory, **arguments)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


def numbers(document: Document) -> Document:
    """A result without what the clock decides."""
    return {key: value for key, value in document.items() if key != "made"}


def test_a_planted_effect_is_found(tmp_path: Path) -> None:
    document = proved(toy(), tmp_path)
    assert {"slug", "verdict", "effect", "interval", "delta", "units", "arms", "cost"} <= set(document)
    assert (document["slug"], document["verdict"], document["delta"]) == ("wanda", "holds", 0.5)
    low, high = document["interval"]
    assert 0.5 < low < document["effect"] < high
    assert document["effect"] == pytest.approx(1.0, abs=0.3)
    assert document["units"] == document["pilot"]["asked"] == document["sizes"]["seed"] == document["sizes"]["pairs"]
    assert set(document["arms"]) == set(document["cost"]) == {"baseline", "method", "other"}
    assert document["command"] == "intaglio prove wanda --seed-base 0 --tier cpu"
    files = {path.name for path in (tmp_path / "wanda-seed0").iterdir()}
    assert files == {"result.json", "effect.svg", NAME}
    assert json.loads((tmp_path / "wanda-seed0" / "result.json").read_text()) == document
    assert Record.model_validate_json(json.dumps(document)).model_dump(mode="json") == document


@pytest.mark.parametrize(
    ("effect", "kind", "verdict"),
    [(-1.0, "better", "fails"), (0.0, "better", "fails"), (0.0, "as good as", "holds"), (-1.0, "as good as", "fails")],
)
def test_verdicts_end_to_end(effect: float, kind: Any, verdict: str, tmp_path: Path) -> None:
    assert proved(toy(Toy(effect), kind=kind), tmp_path)["verdict"] == verdict


def test_the_verdict_can_be_reckoned_again_from_the_raw_values(tmp_path: Path) -> None:
    document = proved(toy(Toy(units=4)), tmp_path)
    raw = {(r["index"], r["arm"]): r["outcome"]["values"] for r in document["runs"] if r["stage"] == "run"}
    table = np.array(
        [
            [raw[i, "baseline"]["loss"][f"u{u}"] - raw[i, "method"]["loss"][f"u{u}"] for u in range(4)]
            for i in range(document["units"])
        ]
    )
    found = stats.crossed(table)
    assert document["effect"] == pytest.approx(table.mean())
    assert document["interval"] == pytest.approx([found.low, found.high])
    assert document["sizes"] == {"seed": len(table), "unit": 4, "pairs": table.size}
    other, twice = document["secondaries"]
    assert twice["effect"] == pytest.approx(2 * document["effect"])
    assert other["effect"] == pytest.approx(document["effect"])
    assert [other["p_holm"], twice["p_holm"]] == pytest.approx(stats.holm([other["p"], twice["p"]]))


RATES = [
    # planted effect in deltas, verdict, bounds of its share
    (0.0, "holds", 0.0, 0.0),
    (1.0, "holds", 0.0, 0.1),
    (1.0, "fails", 0.0, 0.1),
    (2.0, "holds", 0.8, 1.0),
]
BASES = 40


@pytest.mark.slow
@pytest.mark.parametrize("units", [1, 4, 0], ids=["independent", "crossed", "clustered"])
def test_rates_of_whole_experiments(units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prove` itself, from pilot to verdict, over seed bases: the arms' values, not their differences, are drawn."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(sources, "of_slug", lambda slug: {})
    two = {"arms": {"baseline": "nothing", "method": "something"}, "secondaries": ()}
    shares = {}
    for planted in {row[0] for row in RATES}:
        experiment = toy(Toy(0.5 * planted, units=units, noise=0.4), pilot_runs=8, most_runs=200, **two)
        verdicts = [proved(experiment, tmp_path / f"{planted}", seed_base=base)["verdict"] for base in range(BASES)]
        shares[planted] = {verdict: verdicts.count(verdict) / BASES for verdict in verdicts}
    for planted, verdict, least, most in RATES:
        assert least <= shares[planted].get(verdict, 0.0) <= most, (planted, shares)


def test_higher_can_be_better(tmp_path: Path) -> None:
    assert proved(toy(Toy(-1.0), direction="higher"), tmp_path)["effect"] == pytest.approx(1.0, abs=0.3)


def test_unequal_clusters(tmp_path: Path) -> None:
    document = proved(toy(Toy(units=0), pilot_runs=8), tmp_path)
    assert document["verdict"] == "holds"
    assert document["units"] >= 10
    assert document["sizes"]["pairs"] > document["units"]


def test_pilot_seeds_and_run_seeds_are_disjoint_over_seed_bases() -> None:
    seeds = [Unit(stage, i, base).seed for stage in ("pilot", "run") for base in range(4) for i in (0, 1, 2, 99_999)]  # type: ignore[arg-type]
    assert len(set(seeds)) == len(seeds)


def test_another_seed_base_gives_other_values(tmp_path: Path) -> None:
    a, b = proved(toy(), tmp_path, units=4), proved(toy(), tmp_path, units=4, seed_base=1)
    assert not set(a["seeds"]["run"]) & set(b["seeds"]["run"])
    assert a["effect"] != b["effect"]


def test_units_stand_in_the_place_of_the_pilot(tmp_path: Path, calls: Path) -> None:
    document = proved(toy(Toy(calls=str(calls))), tmp_path, units=3)
    assert (document["units"], document["pilot"]) == (3, None)
    assert {path.name.partition("-")[0] for path in calls.iterdir()} == {"run"}
    assert document["command"].endswith("--units 3")


def test_the_time_allowed_limits_the_run_and_the_record_says_so(tmp_path: Path) -> None:
    document = proved(toy(Toy(noise=3.0), most_runs=6), tmp_path)
    assert document["units"] == document["pilot"]["most"] == 6
    assert document["pilot"]["asked"] > 6
    assert document["verdict"] == "underpowered"


@pytest.mark.parametrize(("diverged", "verdict"), [(2, "holds"), (3, "fails")])
def test_diverged_units(diverged: int, verdict: str, tmp_path: Path) -> None:
    document = proved(toy(Toy(3.0, noise=0.1, diverged=diverged)), tmp_path, units=10)
    assert (document["verdict"], document["arms"]["method"]["diverged"]) == (verdict, pytest.approx(diverged / 10))
    values = [r["outcome"]["values"]["loss"]["u0"] for r in document["runs"] if r["arm"] == "method"]
    assert values.count(None) == diverged
    worst = max(
        r["outcome"]["values"]["loss"]["u0"]
        for r in document["runs"]
        if r["arm"] != "other" and r["outcome"]["values"]["loss"]["u0"] is not None
    )
    baseline = [r["outcome"]["values"]["loss"]["u0"] for r in document["runs"] if r["arm"] == "baseline"]
    filled = [worst if value is None else value for value in values]
    assert document["effect"] == pytest.approx(np.mean(np.subtract(baseline, filled)))


def test_arms_of_secondaries_alone_run_in_the_first_runs_only(tmp_path: Path, calls: Path) -> None:
    document = proved(toy(Toy(calls=str(calls)), secondary_runs=3), tmp_path / "few", units=7)
    assert len([path for path in calls.iterdir() if "-other-" in path.name]) == 3
    assert {arm: summary["runs"] for arm, summary in document["arms"].items()} == {
        "baseline": 7,
        "method": 7,
        "other": 3,
    }
    assert {second["name"]: second["runs"] for second in document["secondaries"]} == {"other": 3, "twice": 7}
    # The primary claim is what it is without the limit; a secondary is what a run of that size says.
    whole = proved(toy(), tmp_path / "all", units=7)
    small = proved(toy(), tmp_path / "small", units=3)
    assert (document["effect"], document["interval"]) == (whole["effect"], whole["interval"])
    assert document["secondaries"][0]["effect"] == small["secondaries"][0]["effect"]
    assert document["secondaries"][1]["effect"] == whole["secondaries"][1]["effect"]
    assert (document["arms"]["other"], document["cost"]["other"]) == (small["arms"]["other"], small["cost"]["other"])


def test_too_few_runs_of_secondary_arms_are_refused() -> None:
    with pytest.raises(ValueError, match="1 runs of the secondary arms give no interval"):
        toy(secondary_runs=1)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, calls: Path) -> None:
    unbroken = proved(toy(), tmp_path / "unbroken")
    for kill_at in (0, 3, 10, 14):  # in the pilot, at its end, in the run
        with pytest.raises(KeyboardInterrupt):
            proved(toy(Toy(calls=str(calls), kill_at=kill_at)), tmp_path / "broken")
    seen: list[tuple[int, int, str]] = []
    # A unit that runs twice makes the same file twice, which `touch` refuses.
    again = proved(toy(Toy(calls=str(calls))), tmp_path / "broken", progress=lambda *said: seen.append(said))
    assert numbers(again) == numbers(unbroken)
    assert seen[0] == (4, 3 * again["units"], f"run: 4 of {3 * again['units']} were finished before")
    assert seen[-1][:2] == (3 * again["units"], 3 * again["units"])
    count = len(list(calls.iterdir()))
    assert numbers(proved(toy(Toy(calls=str(calls))), tmp_path / "broken")) == numbers(unbroken)
    assert len(list(calls.iterdir())) == count == 10 + 3 * again["units"]


def test_a_process_killed_without_warning_goes_on_too(tmp_path: Path, calls: Path) -> None:
    code = (
        "from intaglio.evidence.run import prove; from tests.evidence.toy import Toy, toy\n"
        f"runner = Toy(calls={str(calls)!r}, kill_at=7, hard=True)\n"
        f"prove('wanda', experiment=toy(runner), directory={str(tmp_path)!r}, units=5)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "wanda-seed0-units5" / NAME).read_bytes().count(b"\n") == 1 + 7
    document = proved(toy(Toy(calls=str(calls))), tmp_path, units=5)
    assert len(list(calls.iterdir())) == 5 * 3
    assert numbers(document) == numbers(proved(toy(), tmp_path / "unbroken", units=5))


@pytest.mark.parametrize("torn", [b'{"stage": "run", "in', b"{", b"\xff\xfe"])
def test_a_torn_last_line_is_dropped(torn: bytes, tmp_path: Path, calls: Path) -> None:
    whole = proved(toy(), tmp_path, units=4)
    path = tmp_path / "wanda-seed0-units4" / NAME
    content = path.read_bytes()
    *kept, _ = content.splitlines(keepends=True)
    path.write_bytes(b"".join(kept) + torn)
    assert numbers(proved(toy(Toy(calls=str(calls))), tmp_path, units=4)) == numbers(whole)
    assert len(list(calls.iterdir())) == 1
    assert path.read_bytes() == content


def test_a_torn_header_is_an_empty_journal(tmp_path: Path) -> None:
    folder = tmp_path / "wanda-seed0-units4"
    folder.mkdir()
    (folder / NAME).write_bytes(b'{"header": {"exper')
    assert proved(toy(), tmp_path, units=4)["units"] == 4


def test_results_do_not_depend_on_the_order_in_which_units_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = toy(Toy(units=3), most_runs=8)
    plain = proved(experiment, tmp_path / "a")
    ordered = run.outcomes

    def backwards(experiment: Experiment, tasks: Any, workers: int) -> Any:
        return ordered(experiment, list(reversed(tasks)), workers)

    monkeypatch.setattr(run, "outcomes", backwards)
    assert numbers(proved(experiment, tmp_path / "b")) == numbers(plain)


def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    one = proved(toy(Toy(units=3)), tmp_path / "one", units=5)
    two = proved(toy(Toy(units=3)), tmp_path / "two", units=5, workers=2)
    assert numbers(two) == numbers(one)
    assert (tmp_path / "one" / "wanda-seed0-units5" / "effect.svg").read_bytes() == (
        tmp_path / "two" / "wanda-seed0-units5" / "effect.svg"
    ).read_bytes()


@pytest.mark.parametrize(
    ("runner", "sentence"),
    [
        (Toy(unfair=True), "baseline and method of run 0 did not share"),
        (Toy(tokens=(("method", 11),)), "baseline and method of run 0 differ in tokens"),
    ],
)
def test_arms_that_are_no_pairs_are_a_defect(runner: Toy, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        proved(toy(runner), tmp_path)


def refused(action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(IntaglioError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_bad_arguments_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {"directory": tmp_path / "out"}
    refused(lambda: prove("dsnott", **at), "no method named 'dsnott'", "did you mean dsnot?")
    refused(lambda: prove("record", **at), "no method named 'record'")
    refused(lambda: prove("magnitude", **at), "magnitude has no experiment yet")
    refused(lambda: prove("dsnot", tier="tpu", **at), "the tier 'tpu' is unknown; accepted: cpu, gpu")
    refused(lambda: prove("dsnot", tier="gpu", **at), "not made for the tier gpu; accepted: cpu")
    for units in (0, 1, -3, 10**9):
        refused(
            lambda units=units: prove("dsnot", units=units, **at), f"units is {units}; an interval needs at least 2"
        )
    refused(lambda: prove("dsnot", seed_base=-1, **at), "the seed base is -1")
    refused(lambda: prove("dsnot", workers=0, **at), "workers is 0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(lambda: proved(toy(tier="gpu"), **at), "the tier gpu needs a CUDA device, and this machine has none")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    refused(lambda: proved(toy(), tmp_path / "file"), "cannot write")


def test_without_scipy_it_is_one_sentence() -> None:
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from intaglio.errors import IntaglioError\n"
        "try:\n    import intaglio.evidence.run\nexcept IntaglioError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run pip install 'intaglio[evidence]'" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_journal_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proved(toy(), tmp_path, units=4)
    refused(lambda: proved(toy(delta=0.4), tmp_path, units=4), "begun with other choices", "remove that directory")
    with monkeypatch.context() as changed:
        changed.setattr("intaglio.evidence.run.versions", lambda also: {"python": "2.7"})
        refused(lambda: proved(toy(), tmp_path, units=4), 'begun with other versions ({"intaglio": ', '"python": "2.7"')
    with monkeypatch.context() as changed:
        changed.setattr(sources, "of_slug", lambda slug: {"intaglio.methods.weights.wanda": "0"})
        refused(lambda: proved(toy(), tmp_path, units=4), "begun with other code")
    path = tmp_path / "wanda-seed0-units4" / NAME
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], '{"stage": "run"}', *lines[3:]]))
    refused(lambda: proved(toy(), tmp_path, units=4), "line 3 of", "is damaged", "Field required")
    path.write_text("a shopping list\n")
    refused(lambda: proved(toy(), tmp_path, units=4), "is no journal of an experiment")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    experiment = toy()

    def inside(*_: Any) -> None:
        refused(lambda: proved(experiment, tmp_path, units=4), "another process is running the experiment")

    assert proved(experiment, tmp_path, units=4, progress=inside)["units"] == 4


@pytest.fixture
def made(tmp_path: Path) -> Document:
    return proved(toy(), tmp_path / "made", units=4)


def test_corrupt_and_foreign_records_are_one_sentence(tmp_path: Path, made: Document) -> None:
    path = tmp_path / "wanda.json"
    path.write_text(json.dumps(made))
    assert record.read_record(path, "wanda").verdict == made["verdict"]
    refused(lambda: record.read_record(path, "dsnot"), "is the record of 'wanda', not of 'dsnot'")
    damaged: list[tuple[str, str]] = [
        (json.dumps(made)[:-200], "Invalid JSON"),
        ("[]", "no record of Intaglio"),
        ("", "no record of Intaglio"),
        (json.dumps(made | {"verdict": "proved"}), "verdict: "),
        (json.dumps(made | {"effect": 99.0}), "the effect lies outside its interval"),
        (json.dumps(made | {"more": 1}), "more: Extra inputs are not permitted"),
        (json.dumps(made | {"method": "nobody"}), "not among the arms"),
        (json.dumps({k: v for k, v in made.items() if k != "runs"}), "runs: Field required"),
        (json.dumps(made).replace(str(made["effect"]), "NaN"), "no record of Intaglio"),
    ]
    for text, part in damaged:
        path.write_text(text)
        refused(lambda: record.read_record(path), str(path), part)
    path.write_bytes(b"\xff\x00")
    refused(lambda: record.read_record(path), "no record of Intaglio")
    refused(lambda: record.read_record(tmp_path / "none.json"), "cannot be read: No such file")
    refused(lambda: record.read_record(tmp_path), "cannot be read")


def test_shipped_records_and_staleness(tmp_path: Path, made: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert record.shipped("wanda") is None
    (tmp_path / "wanda.json").write_text(json.dumps(made))
    found = record.shipped("wanda")
    assert found is not None
    assert not record.is_stale(found)
    changed = dict(found.sources) | {"intaglio.methods.weights.wanda": "0", "intaglio.gone": "0"}
    stale = found.model_copy(update={"sources": changed})
    assert record.is_stale(stale)
    assert record.stale_parts(stale) == ("intaglio.gone", "intaglio.methods.weights.wanda")


def unsound(records: dict[str, Record]) -> list[str]:
    """Slugs whose record says another thing than its raw values, or was not registered as it stands."""
    found = []
    for slug, of_slug in records.items():
        interval, verdict = run.reckoned(of_slug)
        said = (of_slug.effect, *of_slug.interval, of_slug.verdict)
        registered = record.preregistered(slug)
        sound = (interval.effect, interval.low, interval.high) == pytest.approx(said[:3]) and verdict == said[3]
        digests = {registered and registered["digest"], digest(of_slug.preregistration)}
        seeds = all(Unit(r.stage, r.index, of_slug.seed_base).seed == r.seed for r in of_slug.runs)
        if not sound or not seeds or digests != {of_slug.preregistration_digest}:
            found.append(slug)
    return found


def test_shipped_records_say_what_their_raw_values_say() -> None:
    assert unsound(record.all_shipped()) == []


def test_a_record_with_a_typed_in_number_is_found(
    tmp_path: Path, made: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "PREREGISTERED", tmp_path)
    (tmp_path / "wanda.json").write_text(json.dumps(made))
    records = record.all_shipped()
    monkeypatch.setattr(record, "preregistered", lambda slug: None)
    assert unsound(records) == ["wanda"]
    monkeypatch.setattr(record, "preregistered", lambda slug: {"digest": made["preregistration_digest"]})
    assert unsound(records) == []
    typed = {"effect": made["effect"] + 0.01, "verdict": "fails" if made["verdict"] != "fails" else "holds"}
    for field, value in typed.items():
        assert unsound({"wanda": records["wanda"].model_copy(update={field: value})}) == ["wanda"]
    first, *others = records["wanda"].runs
    elsewhere: list[Document] = [
        {"runs": [first.model_copy(update={"seed": first.seed + 2}), *others]},
        {"preregistration": records["wanda"].preregistration | {"delta": 0.4}},
    ]
    for change in elsewhere:
        assert unsound({"wanda": records["wanda"].model_copy(update=change)}) == ["wanda"]


def test_only_what_was_registered_first_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "PREREGISTERED", tmp_path / "preregistered")
    checkout = tmp_path / "checkout"
    monkeypatch.setattr(run, "check_checkout", lambda: None)
    experiment = toy(Toy(calls=str(calls)))
    refused(lambda: proved(experiment, checkout, units=4, record=True), "was committed", "cannot be recorded")
    assert not list(calls.iterdir())
    monkeypatch.setattr(run, "experiment_of", lambda slug, tier: experiment)
    assert json.loads(run.register("wanda").read_text())["digest"] == experiment.digest
    other = replace(experiment, delta=0.1)
    refused(lambda: proved(other, checkout, units=4, record=True), "cannot be recorded")
    document = proved(experiment, checkout, units=4, record=True)
    assert json.loads((tmp_path / "results" / "wanda.json").read_text()) == document


def test_records_are_written_in_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "lib" / "site-packages" / "intaglio")
    refused(run.check_checkout, "in a source checkout only")


def test_the_preregistration_is_every_choice() -> None:
    plain = toy()
    assert json.loads(json.dumps(plain.preregistration())) == plain.preregistration()
    changes: list[dict[str, Any]] = [
        {"claim": "x"}, {"metric": "m"}, {"unit": "u"}, {"direction": "higher"}, {"delta": 0.1}, {"kind": "as good as"},
        {"tier": "gpu"}, {"arms": plain.arms | {"method": "x"}}, {"baseline": "other"}, {"method": "other"},
        {"parity": "x"}, {"equal": ()}, {"secondaries": ()}, {"pilot_runs": 6}, {"most_runs": 99}, {"threads": 1},
        {"settings": {"effect": 2}}, {"why": "x"}, {"factors": ("a",)}, {"design": "clustered"},
    ]  # fmt: skip
    digests = {toy(**change).digest for change in changes}
    assert len(digests | {plain.digest}) == len(changes) + 1
    assert toy().digest == plain.digest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"delta": 0.0}, "delta is 0.0"),
        ({"method": "nobody"}, "no arm named 'nobody'"),
        ({"secondaries": (Secondary("x", "a", "method"),)}, "no arm named 'a'"),
        ({"baseline": "method"}, "held against itself"),
        ({"design": "crossed"}, "how many units a run has"),
        ({"units": 3}, "how many units a run has"),
        ({"pilot_runs": 1}, "the pilot has 1 runs"),
        ({"equal": ("beauty",)}, "a cost has no beauty"),
    ],
)
def test_an_experiment_that_contradicts_itself_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        toy(**change)


def test_the_plot(tmp_path: Path) -> None:
    found = Record.model_validate_json(json.dumps(proved(toy(), tmp_path, units=6)))
    root = ET.fromstring(plot.effects(found))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert "method against baseline" in texts
    assert "other" in texts
    assert "twice" not in texts  # another metric has another axis
    assert f"{found.effect:+.4f}" in texts
    assert "0.5 must be passed" in texts
    (at,) = [line for line in root.iter(f"{space}line") if line.get("class") == "reference"]
    first = next(root.iter(f"{space}circle"))
    assert (float(first.get("cx", "")) > float(at.get("x1", ""))) == (found.effect > found.delta)
    assert "--ink:" not in plot.effects(found, alone=False)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-0.013, 0.02, [-0.015, -0.01, -0.005, 0.0, 0.005, 0.01, 0.015, 0.02])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert plot.ticks(low, high) == expected


def test_the_cost_is_the_mean_over_runs(tmp_path: Path) -> None:
    cost = proved(toy(), tmp_path, units=4)["cost"]["method"]
    assert cost == {"tokens": 10, "flops": 1.0, "parameters": 5, "seconds": 0.0, "peak_bytes": 1}


def test_the_journal_is_on_the_disk_after_each_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[int] = []
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor))[1])

    def look(done: int, total: int, what: str) -> None:
        lines.append((tmp_path / "wanda-seed0-units4" / NAME).read_bytes().count(b"\n"))
        assert len(synced) >= len(lines)

    proved(toy(), tmp_path, units=4, progress=look)
    assert lines == list(range(2, 14))


LONG = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from intaglio.evidence.run import _begin

def work(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=(None,)) as pool:
        pool.submit(work, sys.argv[1]).result()
"""


def test_workers_end_with_the_process_that_asked(tmp_path: Path) -> None:
    script, note = tmp_path / "long.py", tmp_path / "pid"
    script.write_text(LONG)
    asked = subprocess.Popen([sys.executable, script, note])
    try:
        until = time.monotonic() + 60
        while not (note.is_file() and note.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        asked.kill()
        asked.wait()
    worker = int(note.read_text())
    until = time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the worker goes on"
        time.sleep(0.05)
