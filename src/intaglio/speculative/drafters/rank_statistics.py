"""Acceptance statistics of a draft's choices by rank, to fit the best static tree.

The functions read whole texts, one pass of each model per text, and generate nothing.

Dimension letters: L tokens of a text, K ranks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative.drafters.dynamic_tree import ProbsFn
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.sampling import rejection_sample
from intaglio.speculative.tree import TokenTree

Text = tuple[Sequence[int], int]
"""Token ids, and the number of prompt tokens in front, at least one."""


@torch.no_grad()
def draft_ranks(draft: Any, text: Text) -> list[int]:
    """Return the rank, from 0, of each token after the prompt among the draft's choices.

    Args:
        draft: a causal language model, or an `NGramStore`.
        text: with a continuation by the target itself.

    Raises:
        IntaglioError: a text without a prompt or without a continuation.
    """
    ids, start = _checked(text)
    logits_LV = _logits(draft, ids)[start - 1 : -1]
    next_L1 = torch.tensor(ids[start:], device=logits_LV.device)[:, None]
    own_L1 = logits_LV.gather(1, next_L1)
    # Of equals the smaller id comes first, as in `DraftModel`.
    earlier_LV = torch.arange(logits_LV.shape[1], device=logits_LV.device) < next_L1
    ahead_LV = (logits_LV > own_L1) | ((logits_LV == own_L1) & earlier_LV)
    ranks: list[int] = ahead_LV.sum(1).tolist()
    return ranks


def acceptance_by_rank(ranks: Iterable[Sequence[int]], most: int) -> list[float]:
    """Return how often the k-th choice is right [K].

    Args:
        ranks: of several texts, each from `draft_ranks`.
        most: K; later ranks are left out.

    Raises:
        IntaglioError: no ranks at all.
    """
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(text, dtype=np.int64) for text in ranks)])
    if not len(joined):
        raise IntaglioError("acceptance statistics need at least one text with a continuation")
    counts = np.bincount(np.minimum(joined, most), minlength=most + 1)[:most]
    shares: list[float] = (counts / len(joined)).tolist()
    return shares


@torch.no_grad()
def sampled_acceptance_by_rank(
    target: Any,
    draft: Any,
    texts: Sequence[Text],
    target_probs: ProbsFn,
    draft_probs: ProbsFn,
    most: int,
    generator: torch.Generator,
) -> list[float]:
    """Return how often the k-th of `most` children, drawn without replacement, is accepted under sampling [K].

    Args:
        target: a causal language model.
        draft: a smaller one with its vocabulary, or an `NGramStore`.
        texts: with continuations that the target drew.
        target_probs: from its logits to the distribution that it samples from.
        draft_probs: likewise.
        most: K.
        generator: source of the draws.

    Raises:
        IntaglioError: a text without a prompt or without a continuation, or no text.
    """
    accepted, tried = np.zeros(most, dtype=np.int64), 0
    for text in texts:
        p_LV, q_LV = (
            continuation_probs(model, text, fn).cpu() for model, fn in ((target, target_probs), (draft, draft_probs))
        )
        for p_V, q_V in zip(p_LV, q_LV, strict=True):
            children = torch.multinomial(q_V, min(most, int((q_V > 0).sum())), generator=generator).tolist()
            tree = TokenTree([0, *children], [-1] + [0] * len(children), {0: q_V})
            _, child = rejection_sample(tree, 0, p_V, generator)
            tried += 1
            if child is not None:
                accepted[child - 1] += 1
    if not tried:
        raise IntaglioError("acceptance statistics need at least one text with a continuation")
    shares: list[float] = (accepted / tried).tolist()
    return shares


@torch.no_grad()
def continuation_probs(model: Any, text: Text, to_probs: ProbsFn) -> Tensor:
    """Return the distribution of a model or an `NGramStore` before each token after the prompt [L, V].

    Raises:
        IntaglioError: a text without a prompt or without a continuation.
    """
    ids, start = _checked(text)
    return to_probs(_logits(model, ids)[start - 1 : -1])


def _checked(text: Text) -> tuple[list[int], int]:
    ids, start = list(text[0]), text[1]
    if not 1 <= start < len(ids):
        raise IntaglioError(
            f"a text of {len(ids)} tokens has a prompt of {start}; the prompt and the continuation need at least one "
            "token each"
        )
    return ids, start


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Return logits [L, V] after each token."""
    if isinstance(model, NGramStore):
        most = len(model.tables)
        probs = [model.probs(ids[max(0, end - most) : end]) for end in range(1, len(ids) + 1)]
        return torch.from_numpy(np.stack(probs)).log()
    logits_LV: Tensor = model(torch.tensor([list(ids)], device=model.device)).logits[0].float()
    return logits_LV
