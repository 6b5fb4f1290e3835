"""What a report is made from: the measurement documents, checked and cleaned before anything is told.

A document is a plain dict, the same that is written as `report.json`. There are three: `carve` (`before`, `after`,
`steps`), `compare` (`a`, `b`) and `demo` (`dense`, `variants`). A SIDE is what was measured on one checkpoint:
`perplexity`, `bits_per_byte`, `kl_mean` (nats a token, against the original), `top1_agreement`, `cosine` (see
`has_cosine`), `zero_fraction` (layer to share), `zeros` (share of all weights of the layers), `activation_sparsity`
(see `has_left_out`), `token_sparsity` and `chunk_sparsity` (units that rest), `bytes`, `prefill_tokens_per_s`,
`decode_tokens_per_s`, `peak_memory_bytes`, `parameters`, `tokens` (a digest of those that it was measured on). A number
that is null, missing or not finite is shown as a dash, with the reason where it is known.

A step or variant may bring `given`, its parameters that are not as they are by default: they are shown, the others are
folded away. Without it, those that are not null are shown. A step may bring `bars`, what it measured of parts of the
model: `title`, `axis`, `items` (name to value), and which of these are `marked`, by the word `mark`; a `grid`, shares
that it chose for projections: `title` and `values` (layer to share); and `timings`, the seconds of its parts. What it
chose may hold a `selection` of examples, with `clusters` (a list).
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
# Layers whose shares of zeros differ by less are said to have the same.
EVEN = 0.001
ZEROS = (
    "Zeros alone change neither bytes nor speed: a zero is stored and multiplied like any other number. "
    "What would: dropping whole blocks or units, packed N:M storage with kernels that use it, or fewer bits."
)
LIVE = (
    "A live checkpoint: part of it is put in place when it is loaded. "
    "The stock loader refuses it; intaglio.load is needed."
)
BAKED = "A baked checkpoint: plain tensors that the stock loader of transformers reads; nothing of Intaglio is needed."
NEEDED: dict[Kind, tuple[str, ...]] = {
    "carve": ("title", "model", "kind", "steps", "before", "after"),
    "compare": ("title", "a", "b"),
    "demo": ("title", "model", "dense", "variants", "best"),
}


def finite(value: Any) -> float | None:
    """The number, or None if it is none or not finite.

    Args:
        value: anything that a document may hold.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def share(value: Any) -> float | None:
    """The number, or None if it is no share: not from 0 to 1.

    Args:
        value: anything that a document may hold.
    """
    number = finite(value)
    return number if number is not None and 0 <= number <= 1 else None


def fractions_of(side: Document) -> dict[str, float]:
    """The share of zeros of each layer whose share is known.

    Args:
        side: see the module.
    """
    found = side.get("zero_fraction")
    items = found.items() if isinstance(found, Mapping) else ()
    return {name: known for name, value in items for known in [share(value)] if known is not None}


def shares_of(side: Document) -> list[float]:
    """The shares of zeros alone.

    Args:
        side: see the module.
    """
    return list(fractions_of(side).values())


def about_zeros(side: Document) -> str:
    """What zeros are worth; nothing where there are none to speak of, nor where inputs are left out and none counted.

    Args:
        side: see the module.
    """
    shares = shares_of(side)
    none = max(shares) < EVEN if shares else has_left_out([side])
    return "" if none else ZEROS


SHARES = frozenset({"top1_agreement", "activation_sparsity", "token_sparsity", "chunk_sparsity"})
"""Numbers of a SIDE that lie between 0 and 1."""


def value_of(side: Document, key: str) -> float | None:
    """One number of a SIDE, or None; of `zero_fraction` the share of all weights, or without it the mean over layers.

    Args:
        side: see the module.
        key: its field.
    """
    if key == "zero_fraction":
        shares, of_all = shares_of(side), share(side.get("zeros"))
        if not shares:
            return None
        return math.fsum(shares) / len(shares) if of_all is None else of_all
    return share(side.get(key)) if key in SHARES else finite(side.get(key))


def other_tokens(a: Document, b: Document) -> bool:
    """Whether two SIDEs were measured on different tokens, so that nothing that is told by the token compares.

    Args:
        a: one side.
        b: the other.
    """
    return a.get("tokens") is not None and b.get("tokens") is not None and a["tokens"] != b["tokens"]


def any_has(sides: Iterable[Document], key: str) -> bool:
    """Whether one of these has a number.

    Args:
        sides: of one document.
        key: the number's field.
    """
    return any(value_of(side, key) is not None for side in sides)


def has_cosine(sides: Iterable[Document]) -> bool:
    """Whether one of these has a cosine in the place of a perplexity, as it predicts no next token.

    An encoder does not, nor does a decoder that labels words or sees both ways.

    Args:
        sides: of one document.
    """
    return any_has(sides, "cosine")


def has_left_out(sides: Iterable[Document]) -> bool:
    """Whether one of these leaves out some of its projections' inputs, whichever a token needs least.

    Args:
        sides: of one document.
    """
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
    """The document without what no reader can show: control characters and numbers that are not finite.

    Args:
        document: what `report.json` holds.
        kind: which of the three it is.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    if not isinstance(document, Mapping):
        raise IntaglioError(
            f"the {kind} report is a {type(document).__name__}; accepted: what report.json holds, an object"
        )
    if document.get("format") != FORMAT:
        raise IntaglioError(f"the {kind} report has format {document.get('format')!r}; accepted: {FORMAT}")
    for field in NEEDED[kind]:
        if document.get(field) is None:
            raise IntaglioError(f"the {kind} report lacks {field}; accepted: a document with {', '.join(NEEDED[kind])}")
    cleaned: dict[str, Any] = _clean(document)
    return cleaned


def kind_of(document: Document) -> Kind:
    """Which of the three a document is.

    Args:
        document: see the module.
    """
    if "variants" in document:
        return "demo"
    return "compare" if "a" in document else "carve"


def reference_of(a: Document) -> str:
    """What B of a comparison was held against: A, unless A itself is at a distance from an original."""
    return "the original" if value_of(a, "kl_mean") or (value_of(a, "cosine") or 1.0) < 1.0 else "A"


def best_variants(document: Document) -> list[dict[str, Any]]:
    """The variant that does least harm at each amount.

    Args:
        document: of a demo.
    """
    found = []
    for amount, slug in document["best"].items():
        found += [v for v in document["variants"] if v.get("amount") == amount and v.get("slug") == slug][:1]
    return found


def variant_name(variant: Document) -> str:
    """What a variant is called.

    Args:
        variant: of a demo.
    """
    return str(variant.get("name", variant.get("slug", "not named")))


def short_name(variant: Document) -> str:
    """Its name without the amount.

    Args:
        variant: of a demo.
    """
    return variant_name(variant).removesuffix(f", {variant.get('amount')}")


def is_best(document: Document, variant: Document) -> bool:
    """Whether the variant does least harm at its amount.

    Args:
        document: of a demo.
        variant: one of its.
    """
    return variant.get("slug") is not None and document["best"].get(variant.get("amount")) == variant["slug"]
