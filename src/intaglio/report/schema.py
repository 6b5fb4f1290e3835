"""Measurement documents, checked and cleaned before they are rendered.

A document is a plain dict, as written to `report.json`. There are three kinds: `carve` (`before`, `after`, `steps`),
`compare` (`a`, `b`) and `demo` (`dense`, `variants`). A SIDE holds the metrics of one checkpoint: `perplexity`,
`bits_per_byte`, `kl_mean` (nats per token, against the original), `top1_agreement`, `cosine` (see `has_cosine`),
`zero_fraction` (layer to share), `zeros` (share of all weights of the layers), `activation_sparsity` (see
`has_left_out`), `token_sparsity` and `chunk_sparsity` (inactive units), `bytes`, `prefill_tokens_per_s`,
`decode_tokens_per_s`, `peak_memory_bytes`, `parameters`, `tokens` (a digest of the tokens it was measured on), and
perhaps `continuations` (see `measures.generated_text`), which are shown where both sides have them. A number
that is null, missing or not finite is shown as a dash, with the reason where it is known.

A step or variant may have `given`, its non-default parameters: they are shown, the others are folded away. Without it,
those that are not null are shown. A step may have `bars`, measurements of parts of the model: `title`, `axis`, `items`
(name to value), and which of these are `marked`, with the word `mark`; a `grid`, shares chosen for projections: `title`
and `values` (layer to share); `samples`, with `scores` (name to percent before and after) and `rows` (`prompt`,
`expected`, `before`, `after`); and `timings`, the seconds of its parts. Its `chosen` values may hold a `selection` of
examples, with `clusters` (a list). In a demo, `best` maps an amount to the slugs of its best variants, several in a
tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from intaglio.errors import IntaglioError
from intaglio.report import svg

Document = Mapping[str, Any]
Kind = Literal["carve", "compare", "demo"]
FORMAT = 1
EVEN = 0.001
"""Shares of zeros that differ by less count as equal."""
TIE = 0.05
"""Relative difference of perplexities up to which demo variants tie: results vary as much between machines."""
ZEROS = (
    "Zeros alone change neither bytes nor speed: a zero is stored and multiplied like any other number. "
    "To gain either: drop whole blocks or units, use packed N:M storage with matching kernels, or fewer bits."
)
LIVE = (
    "A live checkpoint: part of it is restored when it is loaded. "
    "The stock loader refuses it; load it with intaglio.load."
)
BAKED = "A baked checkpoint: plain tensors that the stock loader of transformers reads; Intaglio is not needed."
NEEDED: dict[Kind, tuple[str, ...]] = {
    "carve": ("title", "model", "kind", "steps", "before", "after"),
    "compare": ("title", "a", "b"),
    "demo": ("title", "model", "dense", "variants", "best"),
}


def finite(value: Any) -> float | None:
    """Return the number, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def share(value: Any) -> float | None:
    """Return the number, or None if it is not from 0 to 1."""
    number = finite(value)
    return number if number is not None and 0 <= number <= 1 else None


def fractions_of(side: Document) -> dict[str, float]:
    """Return the share of zeros of each layer where it is known."""
    fractions = side.get("zero_fraction")
    items = fractions.items() if isinstance(fractions, Mapping) else ()
    return {name: known for name, value in items for known in [share(value)] if known is not None}


def shares_of(side: Document) -> list[float]:
    """Return the known shares of zeros."""
    return list(fractions_of(side).values())


def about_zeros(side: Document) -> str:
    """Return a note on the effect of zeros, or "" where there are none to speak of."""
    shares = shares_of(side)
    none = max(shares) < EVEN if shares else has_left_out([side])
    return "" if none else ZEROS


SHARES = frozenset({"top1_agreement", "activation_sparsity", "token_sparsity", "chunk_sparsity"})
"""Numbers of a SIDE from 0 to 1."""


def value_of(side: Document, key: str) -> float | None:
    """Return a number of a SIDE, or None; for `zero_fraction` the share of all weights, else the mean over layers."""
    if key == "zero_fraction":
        shares, of_all = shares_of(side), share(side.get("zeros"))
        if not shares:
            return None
        return math.fsum(shares) / len(shares) if of_all is None else of_all
    return share(side.get(key)) if key in SHARES else finite(side.get(key))


def other_tokens(a: Document, b: Document) -> bool:
    """Return whether two SIDEs were measured on different tokens, so that per-token metrics do not compare."""
    return a.get("tokens") is not None and b.get("tokens") is not None and a["tokens"] != b["tokens"]


def any_has(sides: Iterable[Document], key: str) -> bool:
    """Return whether any SIDE has a number."""
    return any(value_of(side, key) is not None for side in sides)


def has_cosine(sides: Iterable[Document]) -> bool:
    """Return whether any SIDE has a cosine instead of a perplexity, as it does not predict the next token.

    That holds for encoders, and decoders that label words or see both ways.
    """
    return any_has(sides, "cosine")


def has_left_out(sides: Iterable[Document]) -> bool:
    """Return whether any SIDE skips some of its projections' inputs, chosen per token."""
    return any_has(sides, "activation_sparsity")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return svg.clean_text(value)
    if isinstance(value, Mapping):
        return {svg.clean_text(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checked(document: Document, kind: Kind) -> dict[str, Any]:
    """Return the document without control characters and numbers that are not finite."""
    if not isinstance(document, Mapping):
        raise IntaglioError(f"the {kind} report is a {type(document).__name__}; accepted: the object in report.json")
    if document.get("format") != FORMAT:
        raise IntaglioError(f"the {kind} report has format {document.get('format')!r}; accepted: {FORMAT}")
    for field in NEEDED[kind]:
        if document.get(field) is None:
            raise IntaglioError(f"the {kind} report lacks {field}; accepted: a document with {', '.join(NEEDED[kind])}")
    cleaned: dict[str, Any] = _clean(document)
    return cleaned


def kind_of(document: Document) -> Kind:
    """Return the kind of a document."""
    if "variants" in document:
        return "demo"
    return "compare" if "a" in document else "carve"


def reference_of(a: Document) -> str:
    """Return the name of the reference of B: A, unless A itself was compared with an original."""
    return "the original" if value_of(a, "kl_mean") or (value_of(a, "cosine") or 1.0) < 1.0 else "A"


def best_variants(document: Document) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return each amount with its best variants, several in a tie."""
    by_name = {(v.get("amount"), v.get("slug")): v for v in reversed(document["variants"])}
    best = (
        (amount, [by_name.get((amount, slug)) for slug in _slugs(slugs)]) for amount, slugs in document["best"].items()
    )
    return [(amount, [v for v in tied if v is not None]) for amount, tied in best if any(tied)]


def variant_name(variant: Document) -> str:
    """Return the name of a variant."""
    return str(variant.get("name", variant.get("slug", "not named")))


def short_name(variant: Document) -> str:
    """Return its name without the amount."""
    return variant_name(variant).removesuffix(f", {variant.get('amount')}")


def _slugs(best: str | list[str]) -> list[str]:
    """Return the slugs of an entry of `best`, a single slug in older documents."""
    return [best] if isinstance(best, str) else best


def is_best(document: Document, variant: Document) -> bool:
    """Return whether the variant is among the best at its amount."""
    return variant.get("slug") in _slugs(document["best"].get(variant.get("amount"), []))
