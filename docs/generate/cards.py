"""The page of each method, and the catalogue."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from generate import evidence as shown
from generate import facts, measured, notes
from generate.evidence import Evidence
from generate.text import cell, environment
from intaglio.evidence.engine import tables
from intaglio.methods import describe
from intaglio.methods.base import Method
from intaglio.methods.registry import AREAS, PUBLISHED, Entry, get_method

CAPABILITIES = "../api/methods.html#intaglio.methods.base.Capability"
"""Where the site documents what methods require and invalidate, as a link from a method's page."""


def card(slug: str, evidence: Evidence, note: dict[str, str]) -> str:
    """Return a method's page as Markdown, `note` being from `notes.read`."""
    entry, method = PUBLISHED[slug], get_method(slug)
    example = facts.example(slug)
    given = (facts.fields_of(example.document, slug) if example else None) or describe.required_fields(method)
    paper = _paper_values(method, given)
    # What a step needs may depend on its fields; shown are the defaults.
    step: Any = method.model_construct(**describe.required_fields(method))
    values: dict[str, Any] = {
        "entry": entry,
        "area": AREAS[entry.area],
        "carving": step if "carving" in entry.kinds else None,
        "changes": sorted(step.changes),
        "requires": sorted(step.requires),
        "invalidates": sorted(step.invalidates),
        "capabilities": CAPABILITIES,
        "description": describe.describe(inspect.getdoc(method) or ""),
        "example": example,
        "in_python": example is not None and facts.is_last_step(example.document, slug),
        "call": facts.call(slug, given),
        "parameters": describe.parameters(method, paper),
        "paper": paper,
        "note": note,
        "advice": notes.SECTIONS[:2],
        "measured": measured.read(slug),
        "evidence": evidence,
        "record": evidence.record,
    }
    return environment().get_template("card.md.j2").render(values | _evidence_values(evidence, note))


def _paper_values(method: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paper's values, with the example's fields only where `paper()` cannot do without them."""
    try:
        paper = describe.paper_values(method, describe.required_fields(method))
    except ValueError:  # such as: sparsity or pattern has to be given
        paper = describe.paper_values(method, given)
    return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in paper.items()}


def _evidence_values(evidence: Evidence, note: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if (claim := evidence.claim) is not None:
        values |= {"claim": shown.claim_rows(claim), "settings": shown.settings_rows(claim)}
    if (record := evidence.record) is not None:
        values |= {
            "effect": None if record.effect is None else tables.signed(record.effect),
            "interval": None if record.interval is None else tuple(map(tables.signed, record.interval)),
            "sentence": tables.outcome(record),
            "perplexity": shown.in_perplexity(record),
            "plot": shown.effects_plot(record),
            "meaning": note.get(f"Verdict: {record.verdict}", ""),
            "cost": shown.cost_sentence(record),
            "columns": shown.arm_columns(record),
            "arms": shown.arm_rows(record),
            "tuned": shown.tuned_rows(record),
            "looks": shown.look_rows(record),
            "units": shown.unit_rows(record),
        }
    return values


def by_area() -> dict[str, list[Entry]]:
    """Return the methods of each area that has any, in the order of the areas."""
    entries = {area: [entry for entry in PUBLISHED.values() if entry.area == area] for area in AREAS}
    return {area: methods for area, methods in entries.items() if methods}


def table(entries: list[Entry], folder: str) -> str:
    """Return methods with their verdicts as a Markdown table; `folder` is that of their pages, seen from the page."""
    rows = ["| method | what it does | verdict |", "| --- | --- | --- |"]
    for entry in entries:
        verdict = shown.short(shown.load_evidence(entry.slug))
        rows.append(f"| [{entry.name}]({folder}{entry.slug}.md) | {cell(entry.summary)} | {cell(verdict)} |")
    return "\n".join(rows)


def catalogue() -> str:
    """Return the page that lists all methods by area."""
    parts = [
        "# Methods",
        f"{len(PUBLISHED)} methods in {len(by_area())} areas. The verdict is that of the committed record; see"
        " [how claims are judged](evidence.md).",
    ]
    for area, entries in by_area().items():
        parts += [f"## {area.capitalize()}", f"{AREAS[area][0].upper()}{AREAS[area][1:]}.", table(entries, "methods/")]
    return "\n\n".join(parts) + "\n"
