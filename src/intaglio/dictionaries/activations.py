"""Activations of a model in chunks, computed as they are needed: no cache on disk.

Dimension letters: N activations, D width of a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments, segments
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.sites import Site, check_site, read_sites

HELD_OUT = 16
"""Most segments that are kept for measurements: at most a tenth of all."""


def token_segments(checkpoint: Checkpoint, texts: Any, tokens: int, length: int, skip: int, seed: int) -> Segments:
    """Return segments with at least this many tokens after the first `skip`, fewer where the texts are short.

    Given segments without a token after the first `skip` are left out.

    Raises:
        IntaglioError: there is no text or no tokenizer, or ids are outside the vocabulary.
    """
    if isinstance(texts, (Tensor, Segments)):
        given = texts if isinstance(texts, Segments) else Segments.of(texts)
    elif texts is None:
        raise IntaglioError("a dictionary is trained on activations of text; give it some texts")
    elif checkpoint.tokenizer is None:
        raise IntaglioError(f"{checkpoint.source or 'the checkpoint'} has no tokenizer, so it can read no texts")
    else:
        length = min(length, checkpoint.context)
        if length <= skip:
            raise IntaglioError(f"length is {length} and skip is {skip}; a segment needs tokens after the skipped ones")
        rows = math.ceil(tokens / (length - skip))
        given = segments(checkpoint.tokenizer, load_texts(texts), rows, length, seed, fewer=True)
    checkpoint.check_ids(given.ids_NT)
    if given.length <= skip:
        raise IntaglioError(f"segments have {given.length} tokens and skip is {skip}; nothing is left")
    if given.mask_NT is None:
        return given
    kept_N = given.mask_NT[:, skip:].any(1)
    if not kept_N.any():
        raise IntaglioError(f"the first {skip} tokens of all segments are skipped and the others are padding")
    return Segments(given.ids_NT[kept_N], given.mask_NT[kept_N])


@dataclass(frozen=True)
class ActivationStream:
    """Shuffled activations of sites, in chunks that follow from their index alone.

    Chunk i holds the tokens of `rows` segments; segments come in a new order in every pass over them, and tokens are
    shuffled within a chunk. So a run that resumes at chunk i sees what it would have seen.

    Args:
        parts: the model's anatomy, in evaluation mode.
        sites: what is read, in one pass of the model.
        data: the segments.
        tokens: in total; passes over the segments are repeated until there are so many.
        buffer: tokens of a chunk, at least those of a segment.
        skip: first tokens of each segment that are left out: an attention sink's activations are outliers.
        batch_size: segments of a pass.
        seed: of both orders.
    """

    parts: Anatomy
    sites: tuple[Site, ...]
    data: Segments
    tokens: int
    buffer: int
    skip: int
    batch_size: int
    seed: int

    @property
    def total_rows(self) -> int:
        """Number of segments that are read, repeated ones counted."""
        return math.ceil(self.tokens / (self.data.length - self.skip))

    @property
    def rows(self) -> int:
        """Segments of a chunk."""
        return max(1, min(self.total_rows, self.buffer // (self.data.length - self.skip)))

    def __len__(self) -> int:
        """Return the number of chunks."""
        return math.ceil(self.total_rows / self.rows)

    def size(self, index: int) -> int:
        """Return the number of tokens of a chunk, padding counted."""
        rows = min(self.rows, self.total_rows - index * self.rows)
        return rows * (self.data.length - self.skip)

    def chunk(self, index: int, progress: Progress = no_progress) -> dict[Site, Tensor]:
        """Return the activations [N, D] of each site in float32, in the same order of tokens.

        Raises:
            IntaglioError: they are not finite; names the site and the batch.
        """
        order = self._order(index * self.rows, min((index + 1) * self.rows, self.total_rows))
        ids_NT, mask_NT = self.data.ids_NT[order], None if self.data.mask_NT is None else self.data.mask_NT[order]
        chunk = Segments(ids_NT, mask_NT)
        activations: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        batches = math.ceil(chunk.n / self.batch_size)
        for number, batch in enumerate(chunk.batches(self.batch_size)):
            for site, x_BLD in read_sites(self.parts, self.sites, batch).items():
                x_ND = kept_tokens(x_BLD, batch, self.skip).float()
                check_finite(x_ND, site, f"batch {number} of chunk {index}")
                activations[site].append(x_ND)
            progress(index * batches + number + 1, len(self) * batches, "reading activations")
        count = sum(len(part) for part in activations[self.sites[0]])
        shuffled = torch.from_numpy(np.random.default_rng([self.seed, 1, index]).permutation(count))
        return {site: torch.cat(parts)[shuffled.to(parts[0].device)] for site, parts in activations.items()}

    def _order(self, low: int, high: int) -> Tensor:
        """Return the segments of places in the endless sequence of passes."""
        passes, count = range(low // self.data.n, (high - 1) // self.data.n + 1), self.data.n
        orders = [np.random.default_rng([self.seed, 0, number]).permutation(count) for number in passes]
        offset = passes.start * count
        return torch.from_numpy(np.concatenate(orders)[low - offset : high - offset])


def check_finite(x: Tensor, site: Site, where: str) -> None:
    """Refuse activations with NaN or infinite values; `where` names the batch."""
    if not torch.isfinite(x).all():
        raise IntaglioError(f"the activations of {site.name} hold NaN or infinite values in {where}")


def kept_tokens(x_BLD: Tensor, batch: dict[str, Tensor], skip: int) -> Tensor:
    """Return the activations [N, D] of the tokens after the first `skip`, padding left out."""
    kept = x_BLD[:, skip:]
    mask = batch.get("attention_mask")
    return kept.reshape(-1, kept.shape[-1]) if mask is None else kept[mask[:, skip:].bool().to(kept.device)]


def split_held_out(data: Segments) -> tuple[Segments, Segments]:
    """Split off the last tenth of the segments, at most `HELD_OUT`, for measurements; a single one serves for both."""
    count = min(HELD_OUT, max(1, data.n // 10))
    if data.n <= count:
        return data, data
    mask = data.mask_NT
    return (
        Segments(data.ids_NT[:-count], None if mask is None else mask[:-count]),
        Segments(data.ids_NT[-count:], None if mask is None else mask[-count:]),
    )


def check_sites(parts: Anatomy, sites: Sequence[Site]) -> None:
    """Refuse sites that the model does not have, before any work."""
    for site in sites:
        check_site(parts, site)
