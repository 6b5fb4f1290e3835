"""The diagnostics of a language model as tables and as a page with plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intaglio.report.html import trained_page
from intaglio.report.svg import Bar, bars

Document = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]
"""Title, headings and rows."""


def diagnostics_tables(document: Document) -> list[Table]:
    """Return the diagnostics as tables of text."""
    steps, fisher, alignment = document["steps"], document["fisher"], document["alignment"]
    tables: list[Table] = [
        (
            "Next-token steps, held-out texts",
            ["measure", "nats"],
            [
                ["loss", f"{steps['loss']:.3f}"],
                ["model entropy (KL)", f"{steps['entropy']:.3f}"],
                ["entropy minus loss", f"{steps['entropy_gap']:+.3f}"],
                ["Rényi entropy", f"{steps['renyi']:.3f}"],
                ["1 - sum p² (TV), no unit", f"{steps['gini']:.3f}"],
                ["alignment term of the loss", f"{steps['alignment']:.3f}"],
                ["uniformity term of the loss", f"{steps['uniformity']:.3f}"],
            ],
        ),
        (
            "Fisher metric of hidden states",
            ["measure", "value"],
            [
                ["trace", f"{fisher['trace']:.4g}"],
                ["effective directions, mean metric", f"{fisher['participation_ratio']:.1f}"],
                ["effective directions, single contexts", f"{fisher['context_participation_ratio']:.1f}"],
                *[[f"share of the {count} leading", f"{share:.1%}"] for count, share in fisher["leading_shares"]],
            ],
        ),
        (
            f"Alignment with the predictive kernel of {_reference(document)}",
            ["measure", "hidden states", "contexts permuted"],
            [
                ["centred alignment (CKA)", f"{alignment['cka']:.3f}", f"{alignment['permuted_cka']:.3f}"],
                ["the same, Fisher-weighted", f"{alignment['fisher_weighted_cka']:.3f}", ""],
                ["the same, with the model's own distributions (circular)", f"{alignment['own_cka']:.3f}", ""],
                ["subspace overlap", f"{alignment['subspace_overlap']:.3f}", f"{alignment['permuted_overlap']:.3f}"],
                ["whitened functional J", f"{alignment['functional']:.4f}", f"{alignment['permuted_functional']:.4f}"],
                ["Dirichlet energy, leading direction", f"{alignment['dirichlet'][0]:.3f}", ""],
            ],
        ),
    ]
    if document["surplus"]:
        rows = [
            [
                f"token {term['token'] + 1} given those before",
                f"{term['without_hidden']:.3f}",
                f"{term['with_hidden']:.3f}",
                f"{term['surplus']:+.3f}",
            ]
            for term in document["surplus"]
        ]
        tables.append(
            ("Information surplus, nats", ["term", "loss without h", "loss with h", "surplus, lower bound"], rows)
        )
    if document["drafts"]:
        rows = [[draft["slug"], f"{draft['tokens_a_pass']:.2f}", str(draft["prompts"])] for draft in document["drafts"]]
        tables.append(("Bundled draft heads of this model", ["heads", "tokens a pass", "prompts"], rows))
    return tables


def diagnostics_page(document: Document) -> str:
    """Return the diagnostics as a self-contained HTML page."""
    pictures = [_entropies(document), _spectrum(document), _alignment(document), _surplus(document), _drafts(document)]
    sections: list[dict[str, Any]] = [
        {
            "title": title,
            "summary": "",
            "pictures": [pictures[number]] if pictures[number] else [],
            "tables": [{"title": "Values", "headings": headings, "rows": rows}],
        }
        for number, (title, headings, rows) in _numbered(document)
    ]
    sections.append(
        {"title": "Run", "summary": "", "notes": {"texts": document["texts"], "parameters": document["parameters"]}}
    )
    summary = (
        f"{document['tokens']:,} tokens of {document['texts']}, {document['contexts']} contexts. Entropy equals the "
        "loss where the model's distributions are those of the texts. Surplus is what a hidden state knows of the "
        "token after next; drafting lives on it. Alignment near its permuted value means none."
    )
    return trained_page(f"Diagnostics of {document['model']}", summary, sections, "diagnostics")


def _numbered(document: Document) -> list[tuple[int, Table]]:
    """Return the tables with the numbers of their pictures; those of surplus and drafts may be missing."""
    present = [0, 1, 2, *([3] if document["surplus"] else []), *([4] if document["drafts"] else [])]
    return list(zip(present, diagnostics_tables(document), strict=True))


def _reference(document: Document) -> str:
    """Return the name of the distributions that the kernel is of."""
    name: str = document["alignment"]["reference"]
    return "n-gram counts" if name == "ngram" else name


def _bars(title: str, items: list[Bar], axis: str, caption: str, **options: Any) -> tuple[str, str]:
    words = "; ".join(f"{bar.label}: {bar.text}" for bar in items)
    return bars(title, words, items, axis=axis, **options), caption


def _entropies(document: Document) -> tuple[str, str]:
    histogram = document["steps"]["histogram"]
    total = sum(count for _, _, count in histogram) or 1
    items = [
        Bar(
            f"{low:g} to {high:g}" if number + 1 < len(histogram) else f"over {low:g}",
            count / total,
            f"{count / total:.1%}",
        )
        for number, (low, high, count) in enumerate(histogram)
    ]
    return _bars(
        "Entropies of next-token distributions", items, "share of positions", "Entropy in nats, held-out positions."
    )


def _spectrum(document: Document) -> tuple[str, str]:
    items = [
        Bar(f"{count} direction" + "s" * (count > 1), share, f"{share:.1%}")
        for count, share in document["fisher"]["leading_shares"]
    ]
    marks = [(step / 4, f"{25 * step} %") for step in range(5)]
    caption = "Share of the mean metric's trace in its leading directions."
    return _bars("Spectrum of the Fisher metric", items, "share of the trace", caption, ticks=marks)


def _alignment(document: Document) -> tuple[str, str]:
    alignment = document["alignment"]
    named = (
        ("hidden states", "cka"),
        ("Fisher-weighted", "fisher_weighted_cka"),
        ("own distributions (circular)", "own_cka"),
        ("contexts permuted", "permuted_cka"),
    )
    items = [Bar(label, alignment[key], f"{alignment[key]:.3f}", strong=key == "cka") for label, key in named]
    marks = [(step / 5, f"{step / 5:g}") for step in range(6)]
    caption = f"Centred kernel alignment; the kernel is of {_reference(document)} but in the third bar."
    return _bars("Alignment with the predictive kernel", items, "alignment", caption, ticks=marks)


def _surplus(document: Document) -> tuple[str, str] | None:
    items = [
        Bar(label, term[key], f"{term[key]:.3f}", group=f"token {term['token'] + 1}", strong=key == "with_hidden")
        for term in document["surplus"]
        for label, key in (("without hidden state", "without_hidden"), ("with hidden state", "with_hidden"))
    ]
    return (
        _bars("Probes of later tokens", items, "held-out loss, nats", "The difference is the surplus.")
        if items
        else None
    )


def _drafts(document: Document) -> tuple[str, str] | None:
    items = [
        Bar(draft["slug"], draft["tokens_a_pass"], f"{draft['tokens_a_pass']:.2f}") for draft in document["drafts"]
    ]
    return (
        _bars("Acceptance of draft heads", items, "tokens a pass", "Measured when the heads were made.")
        if items
        else None
    )
