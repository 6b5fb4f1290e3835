"""Notes explain when to use a method and what its verdict means, without numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from generate import notes

from intaglio.evidence.engine.record import Record, all_committed
from intaglio.methods.registry import PUBLISHED

SHIPPED = sorted(path.stem for path in notes.NOTES.glob("*.md"))


def test_notes_belong_to_methods() -> None:
    assert SHIPPED
    assert set(SHIPPED) <= set(PUBLISHED)


@pytest.mark.parametrize("slug", SHIPPED)
def test_a_note_says_when_to_use_its_method(slug: str) -> None:
    assert "Use it when" in notes.read(slug)


@pytest.mark.parametrize(
    "text",
    [
        "lower by 0.031",
        "in 12 draws",
        "a 3 % gain",
        "-0.02",
        "30 seconds",
        "from 24.5 to 12",
        "two thirds of it",
        "twice",
    ],
)
def test_numbers_are_found(text: str) -> None:
    assert notes.numbers(text)


@pytest.mark.parametrize(
    "text", ["SmolLM2-135M at 2:4", "`sparsity: 0.5`", "[paper](https://arxiv.org/abs/2310.08915)", "L2"]
)
def test_names_and_patterns_do_not_count_as_numbers(text: str) -> None:
    assert notes.numbers(text) == []


def test_a_number_of_the_record_in_a_note_stops_the_build(tmp_path: Path, record: Record) -> None:
    assert record.interval is not None
    for value in (record.effect, *record.interval, *(arm.mean for arm in record.arms.values())):
        for text in (f"{value:.4f}", f"{value:+.2f}", f"{value:.0f} nats"):
            (tmp_path / "wanda.md").write_text(f"## Use it when\n\nThe effect of {text} is enough.\n")
            with pytest.raises(ValueError, match="numbers come from the record"):
                notes.read("wanda", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "No heading.",
        "## Use it when\n",
        "## Anything\n\nx",
        "## Use it when\n\nx\n\n## Use it when\n\ny\n",
        "x\n\n## Use it when\n\ny",
        "## Verdict: holds\n\nx\n\n## Verdict: worse\n\ny",
    ],
)
def test_invalid_sections_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "wanda.md").write_text(text)
    with pytest.raises(
        ValueError, match="accepted, each once: Use it when, Look elsewhere when, Example, and one of Verdict: holds"
    ):
        notes.read("wanda", tmp_path)


def test_a_method_needs_no_note(tmp_path: Path) -> None:
    assert notes.read("wanda", tmp_path) == {}


@pytest.mark.parametrize("slug", SHIPPED)
def test_a_note_explains_the_verdict_of_the_committed_record(slug: str) -> None:
    record = all_committed().get(slug)
    assert notes.verdict(notes.read(slug)) == (record and record.verdict)
