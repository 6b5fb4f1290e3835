"""Formatting of numbers, metrics, and the change of a metric between two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from intaglio.report.schema import Document, any_has, finite, has_cosine, other_tokens, value_of


def plain_number(value: float) -> str:
    """Format a number with a precision that depends on its size."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if 0 < size < 0.0005 or size >= 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    if not value:
        return "0"
    digits = 3 if size < 1 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}"


def _nats(value: float) -> str:
    return f"{plain_number(value)} nats"


def percent(value: float) -> str:
    """Format a share in percent."""
    return f"{100 * value:.1f} %" if abs(value) < 100 else f"{plain_number(100 * value)} %"


def _size(value: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # Decided on the rounded number, so that 999,999,999 is 1.00 GB and not 1,000 MB.
        if round(value / scale, 2 if unit != "MB" else 0) >= 1:
            scaled = value / scale
            return f"{scaled:,.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{value:,.0f} bytes"


def _count(value: float) -> str:
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value:,.0f}"


def _speed(value: float) -> str:
    return f"{value:,.{1 if value < 100 else 0}f} tok/s"


def duration(value: Any) -> str:
    """Format seconds."""
    seconds = finite(value)
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


@dataclass(frozen=True)
class Measure:
    """A metric of a SIDE and its presentation.

    Args:
        key: its field.
        name: its display name.
        hint: a short explanation.
        show: formats the value with its unit.
        better: the better direction; None for neither.
        noise: relative change below which a change is noise. Default 0: the number is exact.
        points: the change is a difference of shares, not a ratio.
        text: defined only for models that predict the next token.
    """

    key: str
    name: str
    hint: str
    show: Callable[[float], str]
    better: Literal["lower", "higher"] | None
    noise: float = 0.0
    points: bool = False
    text: bool = False


SPEED_NOISE = 0.25
"""The same matrix products, timed minutes apart on a shared machine, differ by up to this much."""
MEMORY_NOISE = 0.05
MEASURES = (
    Measure("perplexity", "Perplexity", "on held-out text; lower is better", plain_number, "lower", text=True),
    Measure("bits_per_byte", "Bits per byte", "comparable between tokenizers", plain_number, "lower", text=True),
    Measure("kl_mean", "KL divergence", "from the original, per token", _nats, "lower", text=True),
    Measure(
        "top1_agreement", "Same choice", "of next tokens as the original", percent, "higher", points=True, text=True
    ),
    Measure("cosine", "Cosine", "of embeddings to the original's; 1 is equal", plain_number, "higher"),
    Measure("zero_fraction", "Zeros", "share of the weights in the blocks' linears", percent, None, points=True),
    Measure(
        "activation_sparsity",
        "Inputs left out",
        "of the projections' inputs, per token",
        percent,
        None,
        points=True,
    ),
    Measure("token_sparsity", "At rest", "units inactive for a token", percent, "higher", points=True),
    Measure("chunk_sparsity", "At rest together", "units inactive for 8 tokens", percent, "higher", points=True),
    Measure("bytes", "Size on disk", "all weights, as stored", _size, "lower"),
    Measure("prefill_tokens_per_s", "Prefill", "reading a prompt", _speed, "higher", noise=SPEED_NOISE),
    Measure(
        "decode_tokens_per_s", "Decode", "writing, one token at a time", _speed, "higher", noise=SPEED_NOISE, text=True
    ),
    Measure("peak_memory_bytes", "Peak memory", "during measurement", _size, "lower", noise=MEMORY_NOISE),
    Measure("parameters", "Parameters", "zeros included", _count, None),
)
BY_TOKEN = frozenset({"perplexity", "kl_mean", "top1_agreement", "prefill_tokens_per_s", "decode_tokens_per_s"})
"""Per-token metrics, which do not compare between tokenizers."""
RARE = frozenset({"cosine", "activation_sparsity", "token_sparsity", "chunk_sparsity"})
"""Metrics of few models, shown only where a side has one."""
BY_KEY = {measure.key: measure for measure in MEASURES}


@dataclass(frozen=True)
class Cell:
    """A formatted value, or `-` and the reason, if known."""

    text: str
    why: str = ""


@dataclass(frozen=True)
class Change:
    """The formatted change of a value, its verdict, and whether the value increased (None if it did not move)."""

    text: str
    verdict: Literal["better", "worse", ""] = ""
    rises: bool | None = None


@dataclass(frozen=True)
class Row:
    """A metric on two checkpoints."""

    measure: Measure
    before: Cell
    after: Cell
    change: Change


def _lower(name: str) -> str:
    return name if name[1].isupper() else name[0].lower() + name[1:]


def cell_of(side: Document, measure: Measure, cosine: bool, original: bool) -> Cell:
    """Format a metric of a SIDE."""
    value = value_of(side, measure.key)
    if value is not None:
        return Cell(measure.show(value))
    if cosine and measure.text:
        return Cell("-", f"no {_lower(measure.name)}: does not predict the next token")
    if original and measure.key in ("kl_mean", "top1_agreement", "cosine"):
        return Cell("-", "the original")
    if measure.key in ("kl_mean", "top1_agreement") and value_of(side, "perplexity") is not None:
        return Cell("-", "not compared")
    if measure.key == "activation_sparsity":
        return Cell("-", "none: every input is read")
    if measure.key == "zero_fraction":
        return Cell("-", "no layer was measured")
    return Cell("-", "not finite, or not measured" if measure.text and "token" not in measure.key else "not measured")


def _change(measure: Measure, before: float | None, after: float | None) -> Change:
    if before is None or after is None:
        return Change("-")
    if before == after:
        return Change("unchanged")
    rises = after > before
    sign = "+" if rises else "-"
    if measure.points:
        points = 100 * abs(after - before)
        text = f"{sign}{points:,.1f} points" if points >= 0.05 else f"{sign}under 0.1 points"
    elif before <= 0 or after < 0 or not math.isfinite(after / before):
        text = f"{sign}{measure.show(abs(after - before))}"
    elif after / before >= 10:
        text = f"x {plain_number(after / before)}"
    else:
        share = 100 * abs(after / before - 1)
        text = f"{sign}{share:.1f} %" if share >= 0.05 else f"{sign}under 0.1 %"
    if measure.noise and before > 0 and abs(after / before - 1) < measure.noise:
        return Change(f"{text}, within noise", rises=rises)
    if measure.better is None:
        return Change(text, rises=rises)
    return Change(text, "better" if rises == (measure.better == "higher") else "worse", rises)


def measures_of(sides: Sequence[Document]) -> list[Measure]:
    """Return the metrics to show for these SIDEs, in order."""
    present = {key for key in RARE if any_has(sides, key)}
    return [measure for measure in MEASURES if measure.key not in RARE - present]


def rows(before: Document, after: Document, baked: bool = False) -> list[Row]:
    """Return every metric of two SIDEs with its change, in order; those of `RARE` only where a SIDE has them."""
    cosine, other = has_cosine((before, after)), other_tokens(before, after)
    alike = baked and all(before.get(key) == after.get(key) is not None for key in ("parameters", "bytes"))
    result = []
    for measure in measures_of((before, after)):
        old, new = cell_of(before, measure, cosine, original=True), cell_of(after, measure, cosine, original=False)
        if other and measure.key in ("kl_mean", "top1_agreement") and new.why:
            result.append(Row(measure, old, Cell("-", "on other tokens"), Change("-")))
        elif other and measure.key in BY_TOKEN and not (old.why or new.why):
            result.append(Row(measure, old, new, Change("other tokens: not comparable")))
        elif old.why and old.why == new.why:
            result.append(Row(measure, Cell("-"), Cell("-"), Change(old.why)))
        else:
            change = _change(measure, value_of(before, measure.key), value_of(after, measure.key))
            if alike and measure.noise == SPEED_NOISE and change.verdict:
                change = replace(change, text=f"{change.text}, the same work: noise", verdict="")
            result.append(Row(measure, old, new, change))
    return result
