"""A run as a user and as a maintainer see it: stages, resumption, records, refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from intaglio.errors import IntaglioError
from intaglio.evidence.engine import golden, pending, registration, run
from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.claim import Arm, Claim, Cost, Result, RunKey, Settings, Stage
from intaglio.evidence.engine.journal import Entry, open_journal
from intaglio.evidence.engine.plot import effects
from intaglio.evidence.engine.record import Record, compose_advice, is_stale, read_record, write_record
from intaglio.evidence.engine.run import OutOfTimeError, extensions, prove
from intaglio.evidence.engine.spot import spot
from intaglio.evidence.engine.tables import arms, cell, lead, report, sentence
from intaglio.evidence.testbeds import cache

from .toy import LOSS, Noise, toy_claim


def run_toy(folder: Path, method: float = 0.7, **options: Any) -> Record:
    """Prove the toy claim; options are fields of the claim or arguments of `prove`."""
    names = {f.name for f in fields(Claim)}
    changes = {name: value for name, value in options.items() if name in names}
    arguments = {name: value for name, value in options.items() if name not in names}
    return prove("wanda", claim=toy_claim(method, **changes), directory=folder, **arguments)


def journal_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in next(folder.rglob("journal.jsonl")).read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    folder = tmp_path_factory.mktemp("prove")
    return run_toy(folder), folder


def test_stages_run_in_order_each_on_units_of_its_own(finished: tuple[Record, Path]) -> None:
    record, folder = finished
    lines = journal_lines(folder)
    assert list(dict.fromkeys(line["stage"] for line in lines)) == ["tune", "probe", "look"]
    assert {line["arm"] for line in lines if line["stage"] == "probe"} == {"plain", "better", "oracle"}
    assert record.verdict == "holds"
    assert record.units == 5
    assert record.interval is not None
    assert record.interval[0] > 0.1
    assert record.level == 0.995
    assert record.arms["half"].units == 3
    assert record.headroom == pytest.approx(0.8, abs=0.2)


@dataclass(frozen=True)
class Prepared(Noise):
    """Noise whose first unit prepares a test bed."""

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        if (arm.what, key.stage, key.index) == ("plain training", "look", 0):
            with cache.preparation():
                sum(range(2_000_000))
        return super().run(arm, key, settings)


def test_no_arm_is_charged_for_the_preparation_of_the_test_bed(tmp_path: Path) -> None:
    record = run_toy(tmp_path, design=Prepared(), units=5, tune={})
    first, *others = journal_lines(tmp_path)
    assert first["bed_seconds"] > 0
    assert first["core_seconds"] >= 0
    assert not any(line["bed_seconds"] for line in others)
    assert record.cost["test bed"] == round(first["bed_seconds"] / 60, 2)
    assert record.seconds["plain"][0] == round(first["core_seconds"], 2)


def test_a_projection_takes_the_median_pilot_unit_and_no_finished_look_twice(tmp_path: Path) -> None:
    claim = toy_claim(looks=(5, 10))
    with open_journal(tmp_path / "journal.jsonl", claim, 0) as journal:
        session = run.Session(claim, journal, 0)

        def add(stage: Stage, index: int, arm: str, minutes: float, bed: float = 0.0) -> None:
            journal.add(Entry(stage, index, arm, {}, {}, Cost(), {}, 60 * minutes, 60 * bed, "here"))

        add("tune", 0, "plain", 4)
        for index in range(3):
            add("probe", index, "plain", 1, bed=30 * (index == 0))
            add("probe", index, "better", 2)
        projected = 4 + (30 + 3 + 6) + 10 * (1 + 2) + 3 * 2 * 2  # tuning, probe, looks, two other arms
        assert session.projected_minutes() == pytest.approx(projected)
        add("look", 0, "plain", 1)
        assert session.projected_minutes() == pytest.approx(projected)


def test_both_tuned_arms_choose_and_a_choice_at_the_edge_extends_the_grid_once(finished: tuple[Record, Path]) -> None:
    record, _ = finished
    for arm in ("plain", "better"):
        assert [trial["settings"]["rate"] for trial in record.tuning[arm]] == [1e-5, 1e-4, 1e-3, 1e-2]
        assert record.arms[arm].settings == {"rate": 1e-3}
    assert record.arms["half"].settings == {"rate": 1e-3}
    assert set(record.tuning) == {"plain", "better"}


def test_grids_extend_by_their_own_ratio_and_only_where_numbers_can_go_on() -> None:
    grid = {"rate": (1e-3, 2e-3, 8e-3), "kind": ("a", "b"), "rank": (4, 8), "weight": (0.0, 1.0), "share": (0.5, 0.9)}
    chosen = {"rate": 8e-3, "kind": "a", "rank": 4, "weight": 0.0, "share": 0.9}
    assert extensions(grid, chosen, closed=("share",)) == [("rate", 0.032), ("rank", 2)]


def test_a_finished_run_does_nothing_when_it_is_called_again(finished: tuple[Record, Path]) -> None:
    record, folder = finished
    before = len(journal_lines(folder))
    again = run_toy(folder)
    assert len(journal_lines(folder)) == before
    assert again == replace(record, made=again.made)


def test_a_killed_run_resumes_with_the_same_result_whatever_line_was_torn(
    finished: tuple[Record, Path], tmp_path: Path
) -> None:
    record, folder = finished
    content = next(folder.rglob("journal.jsonl")).read_bytes()
    path = tmp_path / "wanda-v1-seed0" / "journal.jsonl"
    path.parent.mkdir()
    path.write_bytes(content[: len(content) // 2])
    again = run_toy(tmp_path)
    assert (again.effect, again.differences, again.tuning) == (record.effect, record.differences, record.tuning)


@pytest.mark.slow
def test_processes_change_nothing(finished: tuple[Record, Path], tmp_path: Path) -> None:
    assert run_toy(tmp_path, workers=2).differences == finished[0].differences


def test_the_deadline_keeps_what_finished(tmp_path: Path) -> None:
    with pytest.raises(OutOfTimeError):
        run_toy(tmp_path, deadline=time.monotonic() - 1)
    assert journal_lines(tmp_path) == []


def test_units_asks_for_one_look_without_a_probe(tmp_path: Path) -> None:
    record = run_toy(tmp_path, units=4)
    assert (record.units, record.level, len(record.looks), record.probe) == (4, 0.95, 1, {})
    assert record.command == "intaglio prove wanda --seed-base 0 --units 4"


def test_looks_go_on_until_the_claim_is_decided(tmp_path: Path) -> None:
    record = run_toy(tmp_path, 0.85, design=Noise(0.06))
    assert record.verdict == "holds"
    assert [look.units for look in record.looks] == [5, 10, 20, 40][: len(record.looks)]
    assert len(record.looks) > 1


@pytest.mark.parametrize(("method", "verdict"), [(0.95, "smaller"), (1.0, "no effect"), (1.3, "worse")])
def test_every_decided_verdict_stops_the_looks(method: float, verdict: str, tmp_path: Path) -> None:
    record = run_toy(tmp_path, method, design=Noise(0.005))
    assert (record.verdict, record.why) == (verdict, "decided")
    assert record.units <= 10


@pytest.mark.parametrize("how", ["is nan", "raises"])
@pytest.mark.parametrize("crossed", [False, True])
def test_a_diverging_method_is_worse_and_a_diverging_baseline_is_not_tested(
    how: str, crossed: bool, tmp_path: Path
) -> None:
    broken = Arm("broken", {"diverges": how})
    toy, inner = toy_claim(), {"crossed": crossed, "design": Noise(inner=8), "unit_names": ("seed", "document")}
    bad_method = toy_claim(arms={**toy.arms, "better": broken}, **inner)
    bad_baseline = toy_claim(arms={**toy.arms, "plain": broken}, **inner)
    assert prove("wanda", claim=bad_method, directory=tmp_path / "a").verdict == "worse"
    record = prove("wanda", claim=bad_baseline, directory=tmp_path / "b")
    assert (record.verdict, record.why) == ("untestable here", "the baseline diverges; it needs other settings")


def test_a_setting_whose_training_diverges_is_not_chosen(tmp_path: Path) -> None:
    record = prove("wanda", claim=toy_claim(tune={"rate": (1e-3, 10.0)}), directory=tmp_path)
    assert record.arms["plain"].settings == {"rate": 1e-3}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arms": {**toy_claim().arms, "oracle": Arm("all data", {"level": 0.9})}}, "no headroom"),
        ({"design": Noise(2.0), "ceiling": None, "reported": ("oracle",)}, "too noisy"),
    ],
)
def test_a_probe_that_stops_says_what_would_be_needed(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    record = prove("wanda", claim=toy_claim(**changes), directory=tmp_path)
    assert record.verdict == "untestable here"
    assert record.why.startswith(why)
    assert "needed" in record.why
    assert (record.effect, record.interval, record.looks) == (None, None, ())
    assert {line["stage"] for line in journal_lines(tmp_path)} == {"tune", "probe"}
    assert sentence(record).startswith("wanda: untestable here")
    assert Record.from_document(json.loads(json.dumps(record.document()))) == record


def test_as_good_as_needs_a_floor_that_the_metric_can_tell(tmp_path: Path) -> None:
    toy = toy_claim()
    changes: dict[str, Any] = {
        "kind": "as good as",
        "ceiling": None,
        "floor": "oracle",
        "arms": {**toy.arms, "oracle": Arm("no data")},
    }
    assert prove("wanda", claim=toy_claim(1.0, **changes), directory=tmp_path / "a").verdict == "untestable here"
    changes |= {"arms": {**toy.arms, "half": Arm("all data")}, "ceiling": "half", "ablations": ()}
    assert prove("wanda", claim=toy_claim(1.0, **changes), directory=tmp_path / "c").arms["half"].role == "ceiling"
    changes["arms"] = {**toy.arms, "oracle": Arm("no data", {"level": 2.0})}
    record = prove("wanda", claim=toy_claim(1.0, **changes), directory=tmp_path / "b")
    assert (record.verdict, record.margin, record.arms["oracle"].role) == ("holds", -0.1, "floor")


def test_crossed_units_keep_every_inner_difference(tmp_path: Path) -> None:
    record = run_toy(tmp_path, design=Noise(0.02, inner=6), crossed=True, unit_names=("draw", "document"))
    assert record.inner == [f"d{i}" for i in range(6)]
    assert [len(row) for row in record.differences] == [6] * record.units
    assert "5 units (draw) by 6 documents" in sentence(record)


def test_arms_that_are_no_pairs_are_a_defect_of_the_design(tmp_path: Path) -> None:
    toy = toy_claim()
    more = toy_claim(arms={**toy.arms, "better": Arm("the method", {"level": 0.7, "tokens": 200})})
    with pytest.raises(RuntimeError, match="differ in tokens"):
        prove("wanda", claim=more, directory=tmp_path)


def test_seeds_belong_to_one_stage_index_base_and_version() -> None:
    keys = [
        RunKey(stage, index, base, version)
        for stage in ("tune", "probe", "look")
        for index in (0, 1, 40)
        for base in (0, 1, 999)
        for version in (1, 2, 19)
    ]
    assert len({key.seed for key in keys}) == len(keys)
    assert max(key.seed for key in keys) < 2**32


# Claims and records


def test_prose_and_new_default_options_leave_the_digest_alone_and_choices_change_it() -> None:
    claim = toy_claim()
    assert toy_claim(use_when="x", parity="y", golden={"plain": {"loss": 1.0}}).digest == claim.digest
    assert toy_claim(design=Noise(inner=1)).digest == claim.digest
    for change in ({"delta": 0.2}, {"design": Noise(inner=2)}, {"looks": (5, 10)}, {"tune": {"rate": (1e-3,)}}):
        assert toy_claim(**change).digest != claim.digest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"delta": 0.0}, "delta is 0.0"),
        ({"looks": (10, 5)}, "looks must increase"),
        ({"ablations": ()}, "exactly one role"),
        ({"version": 2}, "gives its reason"),
        ({"minutes": 90}, "minutes is 90"),
        ({"equal": ("watts",)}, "equal names no cost"),
        ({"floor": "oracle", "ceiling": None}, "a floor is for"),
        ({"golden": {"nobody": {"loss": 1.0}}}, "golden numbers cannot hold"),
        ({"arms": {**toy_claim().arms, "plain": Arm("plain training", tune={})}}, "tuned less"),
    ],
)
def test_a_claim_that_contradicts_itself_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        toy_claim(**change)


def test_a_record_survives_its_file_and_is_small(finished: tuple[Record, Path], tmp_path: Path) -> None:
    record, _ = finished
    write_record(record, tmp_path / "wanda.json")
    assert read_record(tmp_path / "wanda.json", "wanda") == record
    assert (tmp_path / "wanda.json").stat().st_size < 30_000
    assert {"slug", "verdict", "effect", "interval", "delta", "units", "arms", "cost"} <= record.document().keys()


def test_a_record_is_stale_when_version_or_digest_differ(finished: tuple[Record, Path]) -> None:
    record, _ = finished
    assert not is_stale(record, toy_claim())
    assert is_stale(record, toy_claim(delta=0.2))
    assert is_stale(record, toy_claim(version=2, reason="a larger model"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a record"),
        ("[]", "not a record"),
        ('{"format": 1}', "format"),
        ('{"format": 2, "slug": "wanda"}', "lacks or adds"),
        (None, "cannot be read"),
    ],
)
def test_foreign_and_truncated_records_get_one_sentence(content: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "wanda.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(IntaglioError, match=reason) as raised:
        read_record(path)
    assert "\n" not in str(raised.value)


def test_a_record_whose_fields_disagree_is_refused(finished: tuple[Record, Path], tmp_path: Path) -> None:
    record, _ = finished
    wrong_fields = {"effect": 9.0, "verdict": "great", "method": "nobody", "arms": {"x": {}}, "interval": 3}
    for wrong in ({name: value} for name, value in wrong_fields.items()):
        (tmp_path / "wanda.json").write_text(json.dumps(record.document() | wrong))
        with pytest.raises(IntaglioError):
            read_record(tmp_path / "wanda.json")
    write_record(record, tmp_path / "wanda.json")
    with pytest.raises(IntaglioError, match="not of 'dsnot'"):
        read_record(tmp_path / "wanda.json", "dsnot")


def test_a_record_is_read_without_torch_and_numpy(tmp_path: Path) -> None:
    code = "import sys; import intaglio.evidence.engine.record; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_advice_says_when_to_use_it_and_what_to_take_otherwise() -> None:
    claim = toy_claim()
    assert compose_advice(claim, "holds") == "Use it when tokens are scarce, otherwise take plain training."
    assert all("plain training" in compose_advice(claim, verdict) for verdict in records.VERDICTS)
    assert "unknown amount" in compose_advice(claim, "undecided", low=0.01)
    assert compose_advice(replace(claim, advice="Do."), "worse") == "Do."


def test_tables_and_picture_show_effect_interval_baseline_delta_and_ceiling(finished: tuple[Record, Path]) -> None:
    record, _ = finished
    assert cell(record).startswith("holds: +0.")
    assert "99.5 % interval" in sentence(record)
    assert arms(record).row_count == 4
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(report(record))
    text = console.export_text()
    assert "better (method): the method" in text
    assert record.advice in text
    worse = replace(record, verdict="worse", effect=-0.2)
    assert cell(worse) == "worse: -0.2 nats; take plain training"
    assert cell(replace(worse, metric=replace(LOSS, relative=True))).startswith("worse: -20.0%")
    svg = effects(record)
    for text in ("plain", "+0.1 to pass", "oracle", "99.5 % interval", "wanda: holds"):
        assert text in svg
    assert "prefers-color-scheme" not in effects(record, alone=False)


def test_arms_are_compared_with_the_baseline_on_the_units_that_both_ran(finished: tuple[Record, Path]) -> None:
    record, _ = finished
    values = {"plain": [4.0, 2.0, 9.0], "half": [2.0, 1.0], "better": [None, 1.5, 3.0], "oracle": [None]}
    record = replace(record, values={LOSS.name: values}, effect=None)
    assert [record.gain(arm) for arm in values] == [0.0, 1.5, 3.25, None]
    assert [lead(record, arm) for arm in values] == ["", "+1.5000", "+3.2500", ""]
    assert record.gain("better") == 3.25
    assert replace(record, effect=0.25).gain("better") == 0.25
    assert replace(record, metric=replace(LOSS, better="higher")).gain("half") == -1.5
    relative = replace(record, metric=replace(LOSS, relative=True))
    assert relative.gain("half") == 0.5
    assert lead(relative, "half") == "+50.0%"


@pytest.mark.parametrize("slug", records.all_committed())
def test_the_tables_of_a_record_are_readable_at_80_columns(slug: str) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report(records.all_committed()[slug]))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.split("\n"))) <= 80


# Journals


def test_an_edited_claim_cannot_go_on_with_its_journal(tmp_path: Path) -> None:
    run_toy(tmp_path, units=3)
    with pytest.raises(IntaglioError, match="was edited after its run began"):
        prove("wanda", claim=toy_claim(delta=0.2), directory=tmp_path, units=3)


@pytest.mark.parametrize(
    ("content", "reason"), [("{}\n", "not a journal"), ("hello\n", "not a journal"), (None, "line 2 of the journal")]
)
def test_a_foreign_or_damaged_journal_gets_one_sentence(content: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with open_journal(path, toy_claim(), 0):
        pass
    path.write_text(path.read_text() + '{"stage": "look"}\n' if content is None else content)
    with pytest.raises(IntaglioError, match=reason), open_journal(path, toy_claim(), 0):
        pass


def test_a_journal_of_another_seed_base_is_refused_and_a_second_process_waits_outside(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    busy = pytest.raises(IntaglioError, match="another process is running wanda")
    with open_journal(path, toy_claim(), 0), busy, open_journal(path, toy_claim(), 0):
        pass
    with pytest.raises(IntaglioError, match="seed base"), open_journal(path, toy_claim(), 1):
        pass


# Registration


def commit_all(folder: Path) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "Register")):
        subprocess.run(["git", "-C", str(folder), *words], check=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repository with a committed claim file of wanda; the evidence folder is its root."""
    for name in ("claims", "records", "journals"):
        (tmp_path / name).mkdir()
    (tmp_path / "claims" / "wanda.py").write_text("CLAIM = 1\n")
    commit_all(tmp_path)
    for name in ("CLAIMS", "RECORDS", "JOURNALS"):
        monkeypatch.setattr(records, name, tmp_path / name.lower())
    monkeypatch.setattr(records, "EVIDENCE", tmp_path)
    return tmp_path


def test_a_journal_that_goes_on_does_not_make_the_code_uncommitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, journal = tmp_path / "evidence" / "__init__.py", tmp_path / "evidence" / "journals" / "wanda-v1.jsonl"
    journal.parent.mkdir(parents=True)
    for path in (code, journal):
        path.write_text("\n")
    commit_all(tmp_path)
    monkeypatch.setattr(records, "EVIDENCE", code.parent)
    commit = registration.commit_of_code()
    journal.write_text("more\n")
    assert registration.commit_of_code() == commit
    code.write_text("x = 1\n")
    assert registration.commit_of_code() == f"{commit}+"


def test_a_committed_claim_is_recorded_once_and_its_journal_goes(checkout: Path) -> None:
    record = prove("wanda", claim=toy_claim(), record=True)
    assert records.committed("wanda") == record
    assert list((checkout / "journals").iterdir()) == []
    with pytest.raises(IntaglioError, match="version 1 of the claim of wanda has a record; a new run needs a higher"):
        prove("wanda", claim=toy_claim(), record=True)
    with pytest.raises(IntaglioError, match="was edited since"):
        prove("wanda", claim=toy_claim(delta=0.2), record=True)
    assert prove("wanda", claim=toy_claim(version=2, reason="more data"), record=True).version == 2


def test_an_uncommitted_or_edited_claim_is_not_recorded(checkout: Path) -> None:
    (checkout / "claims" / "wanda.py").write_text("CLAIM = 2\n")
    with pytest.raises(IntaglioError, match="not committed as it stands"):
        prove("wanda", claim=toy_claim(), record=True)
    with pytest.raises(IntaglioError, match="not committed as it stands"):
        prove("dsnot", claim=toy_claim(slug="dsnot"), record=True)


@pytest.mark.parametrize("options", [{"units": 5}, {"seed_base": 1}])
def test_record_takes_neither_units_nor_other_seeds(options: dict[str, Any], checkout: Path) -> None:
    with pytest.raises(IntaglioError, match="--record takes neither"):
        prove("wanda", claim=toy_claim(), record=True, **options)


def test_a_run_that_would_cost_too_much_is_not_recorded_but_a_user_may_run_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.Session, "projected_minutes", lambda self: 99.0)
    assert prove("wanda", claim=toy_claim(), directory=checkout / "out").verdict == "holds"
    assert prove("wanda", claim=toy_claim(), record=True).why.startswith("too expensive: 99 core-minutes")


def test_an_unfinished_record_resumes_from_the_committed_journal(checkout: Path) -> None:
    with pytest.raises(OutOfTimeError):
        prove("wanda", claim=toy_claim(), record=True, deadline=time.monotonic() - 1)
    assert [path.name for path in (checkout / "journals").iterdir()] == ["wanda-v1.jsonl"]
    prove("wanda", claim=toy_claim(), record=True)
    assert list((checkout / "journals").iterdir()) == []


@pytest.mark.parametrize(
    ("slug", "tier", "reason"),
    [
        ("dsnott", None, "no method named 'dsnott'; did you mean dsnot?"),
        ("magnitude", None, "magnitude has no evidence yet"),
        ("dsnot", "tpu", "the tier 'tpu' is unknown; accepted: cpu, gpu"),
    ],
)
def test_an_unknown_slug_method_without_evidence_or_tier_gets_one_sentence(
    slug: str, tier: str | None, reason: str
) -> None:
    with pytest.raises(IntaglioError, match=reason.replace("?", r"\?")):
        registration.load_claim(slug, tier)


def test_a_machine_without_the_tier_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(IntaglioError, match="needs a CUDA device"):
        run_toy(tmp_path, tier="gpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"units": 2}, "units is 2; accepted: 3 to"),
        ({"seed_base": -1}, "the seed base is -1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_arguments_out_of_range_get_one_sentence(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match=reason):
        run_toy(tmp_path, **options)


# Golden numbers, spot checks, pending claims


def test_golden_numbers_catch_a_changed_constant_and_nothing_else() -> None:
    values = golden.golden_values(golden.toy_results(toy_claim()))
    claim = toy_claim(golden={arm: {"loss": values[arm]["loss"]} for arm in ("plain", "better")})
    assert golden.moved(claim) == []
    changed = replace(claim, design=Noise(inner=2))
    (message, *_) = golden.moved(changed)
    assert message.startswith("wanda: loss of plain is")


def test_golden_numbers_catch_costs_that_are_not_equal() -> None:
    claim = toy_claim(equal=("tokens",))
    assert golden.moved(claim) == []
    arms = {**claim.arms, "better": Arm("a", {**claim.arms["better"].settings, "tokens": 101})}
    assert golden.moved(replace(claim, arms=arms)) == ["wanda: plain and better differ in tokens, 100 and 101"]


def test_a_spot_check_reruns_the_cheapest_unit(finished: tuple[Record, Path]) -> None:
    record, _ = finished
    result = spot("wanda", toy_claim(), record)
    assert result.now == pytest.approx(result.recorded, rel=1e-4)
    assert result.inside
    assert "inside the 99 % prediction interval" in result.sentence()
    worse = spot("wanda", toy_claim(2.0), record)
    assert not worse.inside
    assert "OUTSIDE" in worse.sentence()
    assert "stale" in worse.sentence()


def test_a_spot_check_needs_a_record_with_an_effect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    with pytest.raises(IntaglioError, match="has no record with an effect"):
        spot("wanda", toy_claim())


def test_pending_claims_come_cheapest_first_without_those_that_are_recorded(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Record, Path]
) -> None:
    claims = {
        slug: toy_claim(slug=slug, minutes=minutes) for slug, minutes in (("dsnot", 9), ("lost", 3), ("wanda", 1))
    }
    for slug in claims:
        (checkout / "claims" / f"{slug}.py").write_text("")
    commit_all(checkout)
    monkeypatch.setattr(pending, "load_claim", claims.__getitem__)
    assert pending.pending_claims(checkout) == ["wanda", "lost", "dsnot"]
    write_record(finished[0], checkout / "records" / "wanda.json")
    with pytest.raises(OutOfTimeError):
        prove("dsnot", claim=claims["dsnot"], record=True, home=checkout, deadline=time.monotonic() - 1)
    assert pending.pending_claims(checkout) == ["lost", "dsnot"]


def test_pending_runs_in_a_detached_worktree_and_reports_each_claim(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worktree is real; its process is a stub that prints as `pending` does."""
    module = checkout / "src" / "intaglio" / "evidence" / "engine" / "pending.py"
    module.parent.mkdir(parents=True)
    for folder in module.parents[:3]:
        (folder / "__init__.py").touch()
    module.write_text(
        "import pathlib, sys; slug = sys.argv[1]; assert pathlib.Path('claims/wanda.py').exists()\n"
        "print('a warning'); print(f'{slug}: holds')\n"
        "assert slug != 'dsnot', 'a defect'\n"
    )
    commit_all(checkout)
    monkeypatch.setattr(pending, "pending_claims", lambda home: ["dsnot", "wanda"])
    failed, finished = pending.prove_pending(1, home=checkout)
    assert (failed, finished) == ("dsnot: failed with AssertionError: a defect", "wanda: holds")
    assert list(pending.prove_pending(0, home=checkout)) == ["time is over; not run: dsnot, wanda"]
    assert (registration.git("worktree", "list", at=checkout) or "").count("\n") == 0


def test_the_pending_process_records_one_claim_or_says_why_not(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_claim", lambda slug, tier=None: toy_claim())
    monkeypatch.setattr("os.nice", lambda level: level)
    assert "time is over; its journal is kept" in pending.main("wanda", checkout, -1, 1)
    assert pending.main("wanda", checkout, 5, 1).startswith("wanda: holds (")
    assert "has a record" in pending.main("wanda", checkout, 5, 1)
