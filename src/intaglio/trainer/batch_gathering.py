"""Batches of pairs gathered over the processes of a distributed run, so that every document is a negative of all.

As in the code of KaLM-Embedding (Zhao et al., 2025, arXiv 2506.20923; FlagEmbedding before it), each process computes
the loss of all queries, in which the vectors of other processes have no gradient. The gradients of a process are those
of its own vectors, so their sum is the gradient of the whole batch. DDP takes the mean, which the gradients here are
scaled to undo, and the authors do not.

Dimension letters: B queries, N documents, D dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from intaglio.trainer.protocols import Batch
from intaglio.trainer.ranking_losses import excluded_documents

PER_DOCUMENT = ("owner", "number", "teacher")
PLACES = ("pair_first", "pair_second")
"""Entries that are places among the documents."""
SHARED = ("relevant", "pair_share", "sizes")


def gathered(query_BD: Tensor, document_ND: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
    """Return the vectors and the entries of all processes' batches; the same batch where there is one process.

    The order is that of one process with the whole batch: the positives, then the negatives.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return query_BD, document_ND, batch
    device = query_BD.device
    own = {name: batch[name] for name in (*PER_DOCUMENT, *PLACES, *SHARED) if name in batch}
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, {k: v.cpu() if isinstance(v, Tensor) else v for k, v in own.items()})
    queries, documents = ([len(part[name]) for part in every] for name in ("relevant", "owner"))
    first_query = [sum(queries[:rank]) for rank in range(len(every))]
    first_negative = [sum(queries) + sum(documents[:rank]) - sum(queries[:rank]) for rank in range(len(every))]

    def joined(values: Sequence[Tensor]) -> Tensor:
        """Join values of documents, positives first."""
        positives, negatives = zip(
            *((v[:count], v[count:]) for v, count in zip(values, queries, strict=True)), strict=True
        )
        return torch.cat([*positives, *negatives])

    result: Batch = {name: value for name, value in batch.items() if name not in own}
    for part, offset in zip(every, first_query, strict=True):
        part["owner"] = part["owner"] + offset
    result |= {name: joined([part[name] for part in every]).to(device) for name in PER_DOCUMENT if name in own}
    for name in PLACES:
        if name in own:
            moved = [
                torch.where(part[name] < count, part[name] + query, part[name] - count + negative)
                for part, count, query, negative in zip(every, queries, first_query, first_negative, strict=True)
            ]
            result[name] = torch.cat(moved).to(device)
    if "pair_share" in own:
        result["pair_share"] = torch.cat([part["pair_share"] for part in every]).to(device)
    if "sizes" in own:
        result["sizes"] = every[0]["sizes"]
    most = max(part["relevant"].shape[1] for part in every)
    relevant = [F.pad(part["relevant"], (0, most - part["relevant"].shape[1]), value=-1) for part in every]
    result["relevant"] = torch.cat(relevant).to(device)
    result["excluded"] = excluded_documents(result["relevant"], result["number"])
    return torch.cat(_vectors(query_BD, queries)), joined(_vectors(document_ND, documents)), result


def _vectors(own_ND: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the vectors of each process; those of this process with their gradient, times the processes."""
    padded_ND = F.pad(own_ND.detach(), (0, 0, 0, max(counts) - len(own_ND)))
    pieces = [torch.empty_like(padded_ND) for _ in counts]
    distributed.all_gather(pieces, padded_ND.contiguous())
    pieces = [piece[:count] for piece, count in zip(pieces, counts, strict=True)]
    pieces[distributed.get_rank()] = own_ND.detach() + len(counts) * (own_ND - own_ND.detach())
    return pieces
