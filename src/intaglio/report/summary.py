"""Documents as one plain sentence."""

from __future__ import annotations

from intaglio.report.formatting import BY_KEY, cell_of, percent, plain_number
from intaglio.report.schema import (
    EVEN,
    TIE,
    Document,
    best_variants,
    checked,
    kind_of,
    other_tokens,
    reference_of,
    shares_of,
    short_name,
    value_of,
)

UNSEEN = 0.0005
"""A share of zeros that is shown as 0.0 %."""


def zeros_words(side: Document) -> str:
    """Return the share of zeros in the blocks, as a clause."""
    shares = shares_of(side)
    if not shares:
        return "no layer's zeros were counted"
    low, high = min(shares), max(shares)
    words = f"{percent(value_of(side, 'zero_fraction') or 0.0)} of the block weights are zero"
    return words if high - low < EVEN else f"{words} ({percent(low)} to {percent(high)} of a layer)"


def _quality_words(before: Document, after: Document, reference: str) -> list[str]:
    parts = []
    cosine = value_of(after, "cosine")
    old, new = value_of(before, "perplexity"), value_of(after, "perplexity")
    if cosine is not None:
        parts.append(f"embeddings have a mean cosine of {plain_number(cosine)} to {reference}'s")
    elif other_tokens(before, after):
        sizes = [cell_of(side, BY_KEY["bits_per_byte"], False, False).text for side in (before, after)]
        parts.append(f"bits per byte {sizes[0]} -> {sizes[1]} (perplexities of other tokens do not compare)")
    elif old is not None and new is not None:
        parts.append(f"perplexity {plain_number(old)} -> {plain_number(new)}")
    else:
        parts.append("perplexity not finite or not measured")
    agreement = value_of(after, "top1_agreement")
    if agreement is not None:
        same = "unchanged" if reference == "the original" else f"the same as {reference}'s"
        parts.append(f"{percent(agreement)} of next-token choices {same}")
    return parts


def summary(document: Document) -> str:
    """Return a document as one plain sentence, ASCII apart from the document's own text."""
    kind = kind_of(document)
    document = checked(document, kind)
    if kind == "demo":
        dense = value_of(document["dense"], "perplexity")
        parts = [f"perplexity {plain_number(dense)} before" if dense is not None else "perplexity before not measured"]
        for amount, tied in best_variants(document):
            values = (value_of(variant, "perplexity") for variant in tied)
            words = [
                f"{short_name(variant)} ({'not finite' if value is None else plain_number(value)})"
                for variant, value in zip(tied, values, strict=True)
            ]
            tie = f" tie, within {percent(TIE)}" if len(tied) > 1 else " is best"
            parts.append(f"at {amount} {' and '.join(words)}{tie}")
        parts.append("the zeros alone change neither bytes nor speed")
    elif kind == "compare":
        parts = _quality_words(document["a"], document["b"], reference_of(document["a"]))
        zeros = [cell_of(document[side], BY_KEY["zero_fraction"], False, False).text for side in ("a", "b")]
        parts.append(
            f"zeros ({zeros[0]} of the blocks' linears in A, {zeros[1]} in B) alone change neither bytes nor speed"
        )
    else:
        parts = _quality_words(document["before"], document["after"], "the original")
        large, small = (value_of(document[side], "bytes") for side in ("before", "after"))
        if large and small is not None and small < large:
            parts.append(f"the weights take {percent(1 - small / large)} fewer bytes")
        old, new = (value_of(document[side], "zero_fraction") for side in ("before", "after"))
        left_out = value_of(document["after"], "activation_sparsity")
        if left_out is not None:
            parts.append(f"a token skips {percent(left_out)} of the projections' inputs")
        if new is None:
            parts += [zeros_words(document["after"])] if left_out is None else []
        elif old is not None and new - old < UNSEEN:
            parts.append("no zeros were added to the blocks")
        else:
            parts.append(f"{zeros_words(document['after'])}, which alone changes neither bytes nor speed")
        if document["kind"] == "runtime":
            parts.append("the checkpoint is live and needs intaglio.load")
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]
