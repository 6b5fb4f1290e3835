"""A page a method, and the catalogue of them all."""

from __future__ import annotations

import inspect
from typing import Any

from intaglio.methods.registry import AREAS, PUBLISHED, Entry, get_method

from generate import evidence as shown
from generate import facts, notes
from generate.evidence import Evidence
from generate.text import cell, environment
from intaglio.evidence.outlook import outlook
from intaglio.methods import describe

FACTS = "../api/methods.html#intaglio.methods.base.Capability"
"""Where it stands what a fact is, as seen from a card."""


def card(slug: str, evidence: Evidence, note: dict[str, str]) -> str:
    """The page of a method, as Markdown.

    Args:
        slug: of the method.
        evidence: its claim and record.
        note: from `notes.read`.
    """
    entry, method = PUBLISHED[slug], get_method(slug)
    recipe = facts.example(slug)
    given = facts.given(recipe, slug) if recipe else describe.required_fields(method)
    paper = describe.paper_values(method, given)
    values: dict[str, Any] = {
        "entry": entry,
        "room": AREAS[entry.area],
        "carving": method if "carving" in entry.kinds else None,
        "changes": sorted(method.changes),
        "requires": sorted(method.requires),
        "invalidates": sorted(method.invalidates),
        "facts_page": FACTS,
        "description": describe.describe(inspect.getdoc(method) or ""),
        "recipe": facts.as_yaml(recipe) if recipe else "",
        "applied": recipe is not None and facts.used(recipe["steps"][-1]) == slug and not entry.fitted,
        "call": facts.call(slug, given),
        "parameters": describe.parameters(method, paper),
        "paper": paper,
        "advice": [(heading, note[heading]) for heading in notes.ALWAYS if heading in note],
        "evidence": evidence,
        "record": evidence.record,
    }
    return environment().get_template("card.md.j2").render(values | _evidence_values(evidence, note))


def _evidence_values(evidence: Evidence, note: dict[str, str]) -> dict[str, Any]:
    if evidence.state == "none":
        return {}
    claim = evidence.claim
    values: dict[str, Any] = {
        "claim": shown.claim_rows(claim),
        "settings": shown.settings_rows(claim["settings"]),
        "digest": shown.digest_of(evidence),
    }
    if (record := evidence.record) is not None:
        values |= {
            "to_pass": shown.to_pass(record.delta, record.kind),
            "changed": ", ".join(f"`{name}`" for name in evidence.stale),
            "sentence": shown.sentence(record),
            "perplexity": shown.in_perplexity(record),
            "picture": shown.picture(record),
            "meaning": note.get(notes.OF_VERDICTS[record.verdict], ""),
            "outlook": outlook(record),
            "price": shown.price(record),
            "columns": shown.arm_columns(record),
            "arms": shown.arm_rows(record),
            "tuned": shown.tuned_rows(record),
            "secondaries": shown.secondary_rows(record),
            "pilot": shown.pilot_sentence(record),
            "runs": shown.run_rows(record),
        }
    return values


def by_room() -> dict[str, list[Entry]]:
    """The methods of each room that has some, in the order of the rooms."""
    found = {room: [entry for entry in PUBLISHED.values() if entry.area == room] for room in AREAS}
    return {room: entries for room, entries in found.items() if entries}


def table(entries: list[Entry], folder: str) -> str:
    """Methods with their verdicts, as a Markdown table.

    Args:
        entries: the methods.
        folder: where their cards lie, as seen from the page.
    """
    rows = ["| method | what it does | verdict |", "| --- | --- | --- |"]
    for entry in entries:
        found = shown.of(entry.slug)
        stale = " (stale)" if found.stale else ""
        rows.append(
            f"| [{entry.name}]({folder}{entry.slug}.md) | {cell(entry.summary)} | {cell(shown.short(found))}{stale} |"
        )
    return "\n".join(rows)


def catalogue() -> str:
    """The page with all methods, by room."""
    parts = [
        "# Methods",
        f"{len(PUBLISHED)} methods in {len(by_room())} of {len(AREAS)} rooms; the others are being built. A verdict is"
        " that of the committed record: [how claims are judged](evidence.md).",
    ]
    for room, entries in by_room().items():
        parts += [f"## {room.capitalize()}", f"{AREAS[room][0].upper()}{AREAS[room][1:]}.", table(entries, "methods/")]
    return "\n\n".join(parts) + "\n"
