"""Which of a draft's choices is the right one: what the best fixed tree is fitted on.

The functions read whole texts, a pass of each model a text, and generate nothing.

Dimension letters: L tokens of a text, K ranks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative.drafters.dynamic_tree import Law
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.sampling import reject
from intaglio.speculative.tree import TokenTree

Text = tuple[Sequence[int], int]
"""Token ids, and how many of them in front are the prompt, at least one."""


@torch.no_grad()
def draft_ranks(draft: Any, text: Text) -> list[int]:
    """The place of each token behind the prompt in the order of the draft's choices there, from 0.

    Args:
        draft: a causal language model, or an `NGramStore`.
        text: with a continuation that the target itself gave.

    Raises:
        IntaglioError: a text without a prompt or without a continuation.
    """
    ids, start = _checked(text)
    logits_LV = _logits(draft, ids)[start - 1 : -1]
    said_L1 = torch.tensor(ids[start:], device=logits_LV.device)[:, None]
    own_L1 = logits_LV.gather(1, said_L1)
    # Among equals the smaller id comes first, as `topk` has it more often than not.
    earlier_LV = torch.arange(logits_LV.shape[1], device=logits_LV.device) < said_L1
    ahead_LV = (logits_LV > own_L1) | ((logits_LV == own_L1) & earlier_LV)
    found: list[int] = ahead_LV.sum(1).tolist()
    return found


def shares(ranks: Iterable[Sequence[int]], most: int) -> list[float]:
    """a_k: how often the k-th choice is the right one [K].

    Args:
        ranks: of several texts, each from `draft_ranks`.
        most: K; what lies beyond is left out.

    Raises:
        IntaglioError: no ranks at all.
    """
    whole = np.concatenate([np.asarray(of_text, dtype=np.int64) for of_text in ranks] or [np.zeros(0, dtype=np.int64)])
    if not len(whole):
        raise IntaglioError("chances of acceptance need at least one text with a continuation")
    counts = np.bincount(np.minimum(whole, most), minlength=most + 1)[:most]
    found: list[float] = (counts / len(whole)).tolist()
    return found


@torch.no_grad()
def sampled_shares(
    target: Any,
    draft: Any,
    texts: Sequence[Text],
    target_law: Law,
    draft_law: Law,
    most: int,
    generator: torch.Generator,
) -> list[float]:
    """a_k under sampling [K]: how often the k-th of `most` children, drawn without replacement, is accepted.

    Args:
        target: a causal language model.
        draft: a smaller one with its vocabulary, or an `NGramStore`.
        texts: with continuations that the target drew.
        target_law: from its logits to the law that it samples from.
        draft_law: likewise.
        most: K.
        generator: of the draws.

    Raises:
        IntaglioError: a text without a prompt or without a continuation, or no text.
    """
    accepted, tried = np.zeros(most, dtype=np.int64), 0
    for text in texts:
        p_LV, q_LV = (laws(model, text, law).cpu() for model, law in ((target, target_law), (draft, draft_law)))
        for p_V, q_V in zip(p_LV, q_LV, strict=True):
            children = torch.multinomial(q_V, min(most, int((q_V > 0).sum())), generator=generator).tolist()
            tree = TokenTree([0, *children], [-1] + [0] * len(children), {0: q_V})
            _, child = reject(tree, 0, p_V, generator)
            tried += 1
            if child is not None:
                accepted[child - 1] += 1
    if not tried:
        raise IntaglioError("chances of acceptance need at least one text with a continuation")
    found: list[float] = (accepted / tried).tolist()
    return found


@torch.no_grad()
def laws(model: Any, text: Text, law: Law) -> Tensor:
    """What a model says before each token behind the prompt [L, V].

    Args:
        model: a causal language model, or an `NGramStore`.
        text: with at least one token before and behind the place where the prompt ends.
        law: what the distributions are made of the logits by.

    Raises:
        IntaglioError: a text without a prompt or without a continuation.
    """
    ids, start = _checked(text)
    return law(_logits(model, ids)[start - 1 : -1])


def _checked(text: Text) -> tuple[list[int], int]:
    ids, start = list(text[0]), text[1]
    if not 1 <= start < len(ids):
        raise IntaglioError(
            f"a text of {len(ids)} tokens has a prompt of {start}; at least one token stands before and behind"
        )
    return ids, start


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits [L, V] after each token."""
    if isinstance(model, NGramStore):
        most = len(model.tables)
        laws = [model.law(ids[max(0, place - most) : place]) for place in range(1, len(ids) + 1)]
        return torch.from_numpy(np.stack(laws)).log()
    found: Tensor = model(torch.tensor([list(ids)], device=model.device)).logits[0].float()
    return found
