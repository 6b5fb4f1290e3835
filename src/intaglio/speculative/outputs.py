"""What `generate` returns, whichever loop made it, and the streamer while it is made.

Dimension letters: B rows, P prompt tokens, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHE
from intaglio.speculative.cache import is_windowed, release, stop_recording
from intaglio.speculative.request import Request
from intaglio.speculative.sequences import Row
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.target_model import Reader


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `return_dict_in_generate=True` returns: stock fields, and the run's statistics.

    Attributes:
        statistics: counts and seconds of the run.
    """

    statistics: Statistics | None = None


@contextmanager
def streaming(streamer: Any, ids_BP: Tensor) -> Iterator[None]:
    """Give a streamer the prompt at first and the end at last, whatever happens in between.

    Args:
        streamer: of one row, or None.
        ids_BP: the prompts.

    Raises:
        IntaglioError: a streamer for more than one row.
    """
    if streamer is None:
        yield
        return
    if len(ids_BP) > 1:
        raise IntaglioError(f"a streamer was given with {len(ids_BP)} rows; it is accepted with one row")
    try:
        streamer.put(ids_BP.cpu())
        yield
    finally:
        streamer.end()


def going(rows: list[Row], reader: Reader) -> Iterator[list[Row]]:
    """The rows of each pass: those that have not ended, until all have; the reader drops the others.

    Args:
        rows: all rows, read so far.
        reader: holds them.
    """
    live = rows
    while left := [row for row in live if not row.done]:
        if len(left) < len(live):
            reader.select([place for place, row in enumerate(live) if not row.done])
        live = left
        yield live


def gathered(request: Request, rows: Sequence[Row], ids_BL: Tensor, counts: Statistics) -> Tensor:
    """The rows [B, L] as long as the longest of them, padded, when all have ended; counts their tokens.

    Args:
        request: what was asked for.
        rows: all of them.
        ids_BL: what they were written into.
        counts: gets the number of tokens emitted.
    """
    if is_windowed(request.cache):
        stop_recording(request.cache)
    for row in rows:
        ids_BL[row.index, row.length :] = request.pad
    counts.tokens = sum(row.length for row in rows) - request.ids_BP.numel()
    return ids_BL[:, : max(row.length for row in rows)]


def as_asked(
    request: Request,
    ids_BL: Tensor,
    counts: Statistics,
    scores: Sequence[Tensor] | None = None,
    logits: Sequence[Tensor] | None = None,
) -> Tensor | SpeculativeOutput:
    """The rows, or the output with all that was asked for, out of inference mode: the user may compute with them.

    Args:
        request: what was asked for.
        ids_BL: from `gathered`.
        counts: of the run.
        scores: of each token [1, V]. Default None: not asked for.
        logits: likewise.
    """
    sequences_BL, wanted = ids_BL.clone(), request.config.return_dict_in_generate
    if wanted or getattr(request.cache, "_is_user_defined", False):
        release(request.cache)
    if not wanted:
        return sequences_BL
    return SpeculativeOutput(
        sequences=sequences_BL,
        scores=None if scores is None else tuple(score.clone() for score in scores),
        logits=None if logits is None else tuple(logit.clone() for logit in logits),
        statistics=counts,
        **{CACHE: request.cache if len(ids_BL) == 1 else None},
    )
