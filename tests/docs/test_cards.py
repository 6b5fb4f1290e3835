"""Method pages: every number comes from the record, and a method without a record is shown as such."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from generate import cards, notes
from generate import evidence as shown
from generate.evidence import Evidence

from intaglio.evidence import record as records
from intaglio.evidence.experiment import Outcome
from intaglio.evidence.record import Record, preregistered
from intaglio.methods.registry import PUBLISHED
from tests.evidence.toy import COST, toy

NOTE = {
    "Use it when": "Toys are at hand.",
    "Verdict: holds": "It works.",
}


def evidence_of(record: Record) -> Evidence:
    return Evidence("wanda", {"digest": record.preregistration_digest, **record.preregistration}, record)


def plain(page: str) -> str:
    """Return a page without tags."""
    return re.sub(r"<[^>]+>", " ", page)


def test_a_page_has_every_number_of_its_record(record: Record) -> None:
    page = cards.card("wanda", evidence_of(record), {})
    text = plain(page)
    low, high = record.interval
    for value in (record.effect, low, high):
        assert text.count(f"{value:+.4f}") >= 2  # at the top and in the sentence
    for name, arm in record.arms.items():
        assert f"{arm.mean:.4f}" in text
        assert arm.what in text
        assert f"<code>{name}</code>" in page
    for second in record.secondaries:
        assert second.name in text
        assert f"{second.effect:+.4f}" in text
        assert f"{second.interval[0]:+.4f} to {second.interval[1]:+.4f}" in text
    for name, number in record.versions.items():
        assert f"{name} {number}" in text
    assert ", ".join(map(str, record.seeds["run"])) in text
    assert f"pilot {', '.join(map(str, record.seeds['pilot']))}" in text
    assert f"```sh\n{record.command}\n```" in page
    assert record.preregistration_digest in text
    assert record.made in text
    assert "Holds" in text
    assert "not yet run" not in text


def test_numbers_follow_the_record(record: Record) -> None:
    numbers = {"effect": 7.7777, "interval": (6.6666, 8.8888), "verdict": "inconclusive", "made": "2031-01-31"}
    changed = record.model_copy(update={**numbers, "secondaries": []})
    before, after = cards.card("wanda", evidence_of(record), {}), plain(cards.card("wanda", evidence_of(changed), {}))
    for text in ("+7.7777", "+6.6666", "+8.8888", "2031-01-31", "Inconclusive"):
        assert text in after
        assert text not in before
    for text in (f"{record.effect:+.4f}", f"{record.interval[0]:+.4f}", record.made, "Holds"):
        assert text not in after


def test_the_plot_is_that_of_the_record(record: Record) -> None:
    page = cards.card("wanda", evidence_of(record), {})
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert found == [shown.effects_plot(record)]
    assert ET.fromstring(found[0]).get("role") == "img"
    assert "prefers-color-scheme" not in found[0]  # its colours are the page's


def test_the_meaning_of_a_verdict_is_shown_with_that_verdict_only(record: Record) -> None:
    assert record.verdict == "holds"
    page = cards.card("wanda", evidence_of(record), NOTE)
    assert "## Use it when\n\nToys are at hand." in page
    assert "It works." in page
    failed = record.model_copy(update={"verdict": "fails"})
    assert "It works." not in cards.card("wanda", evidence_of(failed), NOTE)
    registered = Evidence("wanda", evidence_of(record).registration, None)
    assert "It works." not in cards.card("wanda", registered, NOTE)


def test_text_of_a_record_is_escaped(record: Record) -> None:
    page = cards.card("wanda", evidence_of(record), {})
    assert "<b>loss</b>" not in page
    assert "The toy lowers the &lt;b&gt;loss&lt;/b&gt; | by half a nat." in page


def test_a_stale_record_names_the_changed_modules(record: Record) -> None:
    fresh = cards.card("wanda", evidence_of(record), {})
    assert f"unchanged since: {len(record.sources)} modules" in fresh
    assert "Stale" not in fresh
    changed = record.model_copy(
        update={"sources": {**record.sources, "intaglio.methods.weights.wanda": "0", "intaglio.gone": "0"}}
    )
    page = cards.card("wanda", evidence_of(changed), {})
    # All of it is inside the box: indented, and closed by an empty line.
    (box,) = re.findall(r'^!!! warning "Stale"\n\n((?: {4}.+\n)+)\n', page, re.MULTILINE)
    assert "`intaglio.gone`, `intaglio.methods.weights.wanda`." in box
    assert "changed since: 2 of" in page
    assert "`intaglio prove wanda --renew`" in box
    assert f"`{record.command} --record` makes a new record" in box


def test_a_renewed_record_is_marked(record: Record) -> None:
    assert "renewed" not in cards.card("wanda", evidence_of(record), {})
    assert "renewed 2031-01-31: one run" in cards.card(
        "wanda", evidence_of(record.model_copy(update={"renewed": "2031-01-31"})), {}
    )


def test_there_is_a_column_for_diverged_units_only_if_there_are_some(record: Record) -> None:
    assert "No unit diverged." in cards.card("wanda", evidence_of(record), {})
    arms = {**record.arms, "method": record.arms["method"].model_copy(update={"diverged": 0.25})}
    page = cards.card("wanda", evidence_of(record.model_copy(update={"arms": arms})), {})
    assert "No unit diverged." not in page
    assert '<th class="number">diverged</th>' in page
    assert '<td class="number">25%</td>' in page


def test_a_registered_claim_without_a_run(record: Record) -> None:
    page = cards.card("wanda", Evidence("wanda", evidence_of(record).registration, None), {})
    assert "Registered, not yet run" in page
    assert "its run has not been made yet" in page
    assert "by half a nat" in page
    assert "```sh\nintaglio prove wanda --tier cpu\n```" in page
    assert "<svg" not in page
    assert "other: `method` against `other`, loss" in page


def test_a_method_without_a_claim() -> None:
    page = cards.card("wanda", Evidence("wanda", None, None), {})
    assert "No evidence yet" in page
    assert "prove" not in page


@pytest.mark.parametrize("slug", PUBLISHED)
def test_the_page_of_each_method_as_committed(slug: str) -> None:
    evidence = shown.load_evidence(slug)
    page = cards.card(slug, evidence, notes.read(slug))
    entry = PUBLISHED[slug]
    for text in (entry.name, entry.url, entry.citation.replace("&", "&amp;"), evidence.word[1:]):
        assert text in page
    expected = "run" if records.shipped(slug) else "registered" if preregistered(slug) else "none"
    assert evidence.state == expected


def test_the_claim_as_rows() -> None:
    rows = dict(shown.claim_rows(toy().preregistration()))
    assert rows["Baseline"] == "`baseline`: nothing"
    assert rows["Metric"] == "loss, nats; lower is better"
    assert rows["Smallest effect that matters"] == "better by more than 0.5 nats"
    assert rows["Number of runs"] == "set by a pilot of 5 runs on other seeds, between 5 and 1000"
    assert "Rationale" not in rows
    few = dict(shown.claim_rows(toy(secondary_runs=4).preregistration()))
    assert few["Number of runs"].endswith("; arms used only by secondary comparisons run in the first 4")
    other = toy(kind="as good as", tier="gpu", why="Delta was 1.").preregistration()
    rows = dict(shown.claim_rows(other))
    assert rows["Smallest effect that matters"] == "worse by no more than 0.5 nats"
    assert (rows["Needs"], rows["Rationale"]) == ("a GPU", "Delta was 1.")
    assert shown.threshold(0.5, "as good as") == "-0.5"


def test_settings_as_rows() -> None:
    settings: dict[str, Any] = {"a": 1, "world": {"x": 2, "y": None}, "methods": {"m": {"s": 0.5}, "n": {}}}
    assert shown.settings_rows(settings) == [
        ("a", "1"),
        ("world", "x = 2"),
        ("methods, m", "s = 0.5"),
        ("methods, n", ""),
    ]


def test_effects_on_log_perplexity_are_also_shown_as_perplexity(record: Record) -> None:
    assert shown.in_perplexity(record) == ""
    found = record.model_copy(update={"unit": "nats a token", "effect": 0.02, "interval": (0.01, 0.03)})
    # exp(-0.02) = 0.9802, exp(-0.03) = 0.9704, exp(-0.01) = 0.9900
    assert shown.in_perplexity(found) == "-2.0 % perplexity (95 % interval -3.0 to -1.0 %)"


def test_secondaries_are_significant_by_their_corrected_p(record: Record) -> None:
    one = record.secondaries[0]
    cases = [
        (0.2, 0.01, "`method` is better"),
        (-0.2, 0.01, "`other` is better"),
        (0.2, 0.06, "no significant difference"),
    ]
    seconds = [one.model_copy(update={"effect": effect, "p_holm": p}) for effect, p, _ in cases]
    rows = shown.secondary_rows(record.model_copy(update={"secondaries": seconds}))
    assert [row.result for row in rows] == [result for *_, result in cases]
    tiny = one.model_copy(update={"p_holm": 1e-9})
    assert shown.secondary_rows(record.model_copy(update={"secondaries": [tiny]}))[0].p == "< 0.0001"


def test_the_cost_and_the_pilot(record: Record) -> None:
    cost = {
        arm: COST.model_copy(update={"seconds": s}) for arm, s in (("baseline", 2.0), ("method", 5.0), ("other", 1.0))
    }
    text = shown.cost_sentence(record.model_copy(update={"cost": cost}))
    assert "2.50 times the time (5.0 against 2.0 s)" in text
    assert "1.00 times the peak memory" in text
    assert record.pilot is not None
    asked = record.model_copy(update={"pilot": record.pilot.model_copy(update={"asked": 12})})
    assert "A pilot of 5 runs on separate seeds showed that 12 runs are needed;" in shown.pilot_sentence(asked)
    none = record.model_copy(update={"pilot": record.pilot.model_copy(update={"asked": None})})
    assert "no number of runs would make the interval narrow enough" in shown.pilot_sentence(none)
    assert "was given on the command line" in shown.pilot_sentence(record.model_copy(update={"pilot": None}))


def test_every_run_has_a_row(record: Record) -> None:
    rows = shown.run_rows(record)
    assert [row[1] for row in rows] == [str(seed) for seed in record.seeds["run"]]
    # Equal numbers of units: the mean of the runs' differences is the effect.
    assert sum(float(row[4]) for row in rows) / len(rows) == pytest.approx(record.effect, abs=1e-4)


def test_diverged_units_are_left_out_of_a_runs_row(record: Record) -> None:
    def lost(values: dict[str, float | None], keep: int) -> dict[str, float | None]:
        return {name: value if index < keep else None for index, (name, value) in enumerate(sorted(values.items()))}

    def with_kept(keep: int) -> tuple[str, ...]:
        runs = [
            run.model_copy(
                update={"outcome": Outcome(values={"loss": lost(run.outcome.values["loss"], keep)}, cost=COST)}
            )
            if run.arm == "method"
            else run
            for run in record.runs
        ]
        return shown.run_rows(record.model_copy(update={"runs": runs}))[0]

    first = {run.arm: run.outcome.values["loss"]["u0"] for run in record.runs if (run.stage, run.index) == ("run", 0)}
    assert with_kept(1)[2:4] == (f"{first['baseline']:.4f}", f"{first['method']:.4f}")
    assert with_kept(0)[2:] == ("diverged", "diverged", "")


def test_the_row_of_the_catalogue(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    (tmp_path / "wanda.json").write_text(record.model_dump_json())
    low, high = record.interval
    row = next(line for line in cards.catalogue().split("\n") if "methods/wanda.md" in line)
    assert f"**holds**: loss {record.effect:+.4f} ({low:+.4f} to {high:+.4f}), threshold +0.5" in row
    assert row.replace("\\|", "").count("|") == 4
    assert not row.endswith("(stale) |")
    changed = record.model_copy(update={"sources": {}})
    (tmp_path / "wanda.json").write_text(changed.model_dump_json())
    assert "(stale)" in next(line for line in cards.catalogue().split("\n") if "methods/wanda.md" in line)


def test_the_catalogue_has_every_method_under_its_area() -> None:
    page = cards.catalogue()
    for entry in PUBLISHED.values():
        assert f"## {entry.area.capitalize()}\n" in page
        assert f"[{entry.name}](methods/{entry.slug}.md)" in page
