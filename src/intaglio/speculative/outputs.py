"""Output of `generate`: streaming, active rows, padded ids, the returned object.

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
from intaglio.speculative.sequences import SequenceState
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.target_model import CachedModel


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Stock output of `return_dict_in_generate=True` with the run's statistics.

    Attributes:
        statistics: counts and seconds of the run.
    """

    statistics: Statistics | None = None


@contextmanager
def streaming(streamer: Any, ids_BP: Tensor) -> Iterator[None]:
    """Give a streamer the prompt first and the end last, even after an error.

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


def active_rows(rows: list[SequenceState], cached: CachedModel) -> Iterator[list[SequenceState]]:
    """Yield the rows of each pass until all have ended; ended rows are dropped from the cache."""
    live = rows
    while active := [row for row in live if not row.done]:
        if len(active) < len(live):
            cached.select_rows([index for index, row in enumerate(live) if not row.done])
        live = active
        yield live


def collect_rows(
    request: Request, cached: CachedModel, rows: Sequence[SequenceState], ids_BL: Tensor, counts: Statistics
) -> Tensor:
    """Return the ended rows [B, L], padded to the longest, and count their tokens; leave the cache as stock does."""
    if request.keeps_cache:
        cached.close()
    if is_windowed(cached.cache):
        stop_recording(cached.cache)
    for row in rows:
        ids_BL[row.index, row.length :] = request.pad
    counts.tokens = sum(row.length for row in rows) - request.ids_BP.numel()
    return ids_BL[:, : max(row.length for row in rows)]


def build_output(
    request: Request,
    cached: CachedModel,
    ids_BL: Tensor,
    counts: Statistics,
    scores: Sequence[Tensor] | None,
    logits: Sequence[Tensor] | None,
) -> Tensor | SpeculativeOutput:
    """Return the rows, or the requested output object, outside of inference mode, so that users may compute with it."""
    sequences_BL = ids_BL.clone()
    if request.keeps_cache:
        release(cached.cache)
    if not request.config.return_dict_in_generate:
        return sequences_BL
    return SpeculativeOutput(
        sequences=sequences_BL,
        scores=None if scores is None else tuple(score.clone() for score in scores),
        logits=None if logits is None else tuple(logit.clone() for logit in logits),
        statistics=counts,
        **{CACHE: cached.cache if len(ids_BL) == 1 else None},
    )
