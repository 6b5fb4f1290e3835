"""Method pages: every number comes from the record, and a method without a record is shown as such."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from generate import cards, measured, notes
from generate import evidence as shown
from generate.evidence import Evidence

from intaglio.evidence.engine import record as records
from intaglio.evidence.engine import tables
from intaglio.evidence.engine.claim import Metric
from intaglio.evidence.engine.record import Record
from intaglio.evidence.engine.tables import signed
from intaglio.methods.registry import PUBLISHED
from tests.docs.conftest import CLAIM

NOTE = {"Use it when": "Toys are at hand.", "Verdict: holds": "It works."}


def card(record: Record | None, note: dict[str, str] | None = None) -> str:
    return cards.card("wanda", Evidence("wanda", CLAIM, record), note or {})


def plain(page: str) -> str:
    """Return a page without tags."""
    return re.sub(r"<[^>]+>", " ", page)


def test_a_page_has_the_numbers_of_its_record(record: Record) -> None:
    page = card(record)
    text = plain(page)
    assert record.effect is not None
    assert record.interval is not None
    for value in (record.effect, *record.interval):
        assert text.count(signed(value)) >= 2  # at the top and in the sentence
    for name, arm in record.arms.items():
        assert f"{arm.mean:.4f}" in text
        assert arm.what in text
        assert not arm.settings or f"({tables.settings(arm)})" in text
        assert f"<code>{name}</code>" in page
    for name, number in record.versions.items():
        assert f"{name} {number}" in text
    assert record.made in text
    assert CLAIM.digest in text
    assert "```sh\nintaglio prove wanda\n```" in page
    assert "not yet" not in text


def test_the_advice_stands_right_below_the_verdict(record: Record) -> None:
    box = card(record).partition('<div class="verdict')[2].partition("<dl>")[0]
    assert record.advice.startswith("Use it when")
    assert box.index("Holds") < box.index(record.advice)


def test_a_measured_table_stands_above_the_evidence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = {"title": "A model", "text": "No verdict.", "columns": ["dictionary", "L0"], "rows": [["<x>", "12.5"]],
             "command": "python run.py", "processor": "a CPU", "versions": {"torch": "9.9"}}  # fmt: skip
    (tmp_path / "wanda.json").write_text(json.dumps(table))
    assert "## Measured" not in card(None)
    monkeypatch.setattr(measured, "MEASURED", tmp_path)
    page = card(None)
    assert page.index("## Measured") < page.index("## Evidence")
    assert '<td>&lt;x&gt;</td><td class="number">12.5</td>' in page
    assert "`python run.py` on a CPU; torch 9.9." in page


def test_numbers_follow_the_record(record: Record) -> None:
    changed = replace(record, effect=7.7777, interval=(6.6666, 8.8888), verdict="smaller", made="2031-01-31")
    before, after = card(record), plain(card(changed))
    for text in ("+7.7777", "+6.6666", "+8.8888", "2031-01-31", "Smaller"):
        assert text in after
        assert text not in before


def test_the_plot_is_that_of_the_record(record: Record) -> None:
    (picture,) = re.findall(r"<svg.*?</svg>", card(record), re.DOTALL)
    assert picture == shown.effects_plot(record)
    assert ET.fromstring(picture).get("role") == "img"
    assert "prefers-color-scheme" not in picture  # its colours are the page's


def test_the_meaning_of_a_verdict_is_shown_with_that_verdict_only(record: Record) -> None:
    assert record.verdict == "holds"
    page = card(record, NOTE)
    assert "## Use it when\n\nToys are at hand." in page
    assert "It works." in page
    assert "It works." not in card(replace(record, verdict="worse"), NOTE)
    assert "It works." not in card(None, NOTE)


def test_text_of_a_record_is_escaped(record: Record) -> None:
    page = card(record)
    assert "<b>loss</b>" not in page
    assert "The toy lowers the &lt;b&gt;loss&lt;/b&gt; | by half a nat." in page


def test_a_record_of_an_earlier_version_is_marked(record: Record) -> None:
    assert "is of version" not in card(record)
    claim = replace(CLAIM, version=2, reason="Another metric.")
    page = cards.card("wanda", Evidence("wanda", claim, record), {})
    (box,) = re.findall(r'^!!! warning "Version 1"\n\n((?: {4}.+\n)+)\n', page, re.MULTILINE)
    assert "version 2 is registered" in box
    assert "Another metric." in box


def test_there_is_a_column_for_diverged_units_only_if_there_are_some(record: Record) -> None:
    assert "No unit diverged." in card(record)
    page = card(replace(record, arms={**record.arms, "better": replace(record.arms["better"], diverged=0.25)}))
    assert "No unit diverged." not in page
    assert '<th class="number">diverged</th>' in page
    assert '<td class="number">25%</td>' in page


def test_a_probe_that_stopped_has_a_page(record: Record) -> None:
    stopped = replace(
        record, verdict="untestable here", why="too little headroom", effect=None, interval=None, looks=(),
        advice="It could not be tested here: take plain training, or measure it on your data.",
    )  # fmt: skip
    page = card(stopped)
    assert "Untestable here" in plain(page)
    assert "Too little headroom." in plain(page)
    assert "<svg" not in page


def test_a_registered_claim_without_a_run() -> None:
    page = card(None)
    assert "Registered, not yet run" in page
    assert "its run has not been made" in page
    assert "To be tested: The toy" in page
    assert "<svg" not in page


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
    expected = "run" if records.committed(slug) else "registered" if records.is_registered(slug) else "none"
    assert evidence.state == expected


def test_the_claim_as_rows() -> None:
    rows = dict(shown.claim_rows(CLAIM))
    assert rows["Baseline"] == "`plain`: plain training"
    assert rows["Ceiling"] == "`oracle`: all data"
    assert rows["Metric"] == "loss, nats; lower is better"
    assert rows["Smallest effect that matters"] == "better by more than 0.1 nats"
    assert rows["Looks"] == "after 5, 10, 20, 40 units"
    assert rows["Tuned"].startswith("`plain`: rate in [1e-05, 0.0001, 0.001]; `better`:")
    assert "Reason for this version" not in rows
    relative = replace(CLAIM, kind="as good as", tier="gpu", metric=Metric("error", "share", relative=True))
    rows = dict(shown.claim_rows(relative))
    assert rows["Smallest effect that matters"] == "worse by no more than 0.1 of the baseline"
    assert rows["Needs"] == "a GPU, at most 15 core-minutes"


def test_effects_on_log_perplexity_are_also_shown_as_perplexity(record: Record) -> None:
    assert shown.in_perplexity(record) == ""
    nats = replace(record, metric=Metric("loss", "nats a token"), effect=0.02, interval=(0.01, 0.03), level=0.95)
    # exp(-0.02) = 0.9802, exp(-0.03) = 0.9704, exp(-0.01) = 0.9900
    assert shown.in_perplexity(nats) == "-2.0 % perplexity (95 % interval -3.0 to -1.0 %)"


def test_the_cost_relative_to_the_baseline(record: Record) -> None:
    seconds = {"plain": 2.0, "better": 5.0}
    arms = {n: replace(a, cost=replace(a.cost, seconds=seconds.get(n, 1.0))) for n, a in record.arms.items()}
    assert "2.50 times the time (5.0 against 2.0 s)" in shown.cost_sentence(replace(record, arms=arms))


def test_tuning_looks_and_units_have_rows(record: Record) -> None:
    rows = shown.tuned_rows(record)
    assert [row[1] for row in rows if row[3] == "chosen"] == ["rate=0.001", "rate=0.001"]
    assert [row[0] for row in shown.look_rows(record)] == [str(look.units) for look in record.looks]
    differences = [float(a) - float(b) for _, a, b in shown.unit_rows(record)]
    assert sum(differences) / len(differences) == pytest.approx(record.effect, abs=1e-4)


def test_the_row_of_the_catalogue(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    records.write_record(replace(record, verdict="worse"), tmp_path / "wanda.json")
    row = next(line for line in cards.catalogue().split("\n") if "methods/wanda.md" in line)
    assert f"**worse**: {record.effect:+.3g} nats; take plain training" in row
    assert row.replace("\\|", "").count("|") == 4
    assert "not yet run" in shown.short(Evidence("wanda", replace(CLAIM, version=2, reason="x"), record))


def test_the_catalogue_has_every_method_under_its_area() -> None:
    page = cards.catalogue()
    for entry in PUBLISHED.values():
        assert f"## {entry.area.capitalize()}\n" in page
        assert f"[{entry.name}](methods/{entry.slug}.md)" in page
