"""Next-token distributions that do not come from the model itself: an interpolated n-gram model, or another model.

Dimension letters: S tokens of a stream, N contexts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import HeadOnly, final_hidden

PRIOR = 3.0
"""Draws of the shorter context's distribution that are added to the counts of a longer one."""


def ngram_distributions(stream_S: Tensor, contexts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Return the distributions [N, V] of an n-gram model of order three after some contexts.

        p_n(w) = (count(context_n, w) + 3 p_{n-1}(w)) / (count(context_n) + 3),   p_0 uniform

    Args:
        stream_S: tokens to count, int64.
        contexts: tokens of each context; the last two count.
        vocabulary: V.
    """
    stream = stream_S.numpy()
    unigram_V = np.bincount(stream, minlength=vocabulary).astype(np.float64)
    distributions = np.empty((len(contexts), vocabulary), np.float32)
    base_V = (unigram_V + PRIOR / vocabulary) / (len(stream) + PRIOR)
    places_of = _places(stream)
    for row, context in enumerate(contexts):
        distribution_V = base_V
        for order in (1, 2):
            places = places_of(int(context[-1])) if len(context) >= order else np.empty(0, np.int64)
            if order == 2:
                places = places[(places > 0) & (stream[places - 1] == context[-2])] if len(places) else places
            counts_V = np.bincount(stream[places + 1], minlength=vocabulary)
            distribution_V = (counts_V + PRIOR * distribution_V) / (len(places) + PRIOR)
        distributions[row] = distribution_V
    return torch.from_numpy(distributions)


def _places(stream: np.ndarray) -> Any:
    """Return a function from a token to its places in the stream, the last place left out."""
    order = np.argsort(stream[:-1], kind="stable")
    ordered = stream[:-1][order]

    def places(token: int) -> np.ndarray:
        return order[np.searchsorted(ordered, token) : np.searchsorted(ordered, token, side="right")]

    return places


@torch.no_grad()
def model_distributions(checkpoint: Checkpoint, contexts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Return another model's distributions [N, V] after some contexts of the same tokenizer.

    Raises:
        IntaglioError: its vocabulary differs.
    """
    parts = anatomy(checkpoint.model.eval())
    head = HeadOnly(parts, frozen=False)
    rows = []
    for context in contexts:
        hidden_BLD = final_hidden(parts, {"input_ids": torch.tensor([list(context)])})
        rows.append(head.logits(hidden_BLD[:, -1:])[0, 0].float().softmax(-1).cpu())
    if len(rows[0]) != vocabulary:
        raise IntaglioError(
            f"the reference {checkpoint.source} has a vocabulary of {len(rows[0])}, the model of {vocabulary}; a model "
            "of the same tokenizer is needed"
        )
    return torch.stack(rows)
