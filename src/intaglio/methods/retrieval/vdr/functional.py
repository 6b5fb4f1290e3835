"""Pure functions of VDR: activation, pooling, views and the contrastive mask.

Dimension letters: B queries, N texts, L tokens of a text, S pooled tokens of all texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(logits: Tensor) -> Tensor:
    """Return elu(z) + 1: z + 1 above zero, exp(z) below; positive, increasing, with slope 1 at zero."""
    return F.elu(logits) + 1


def pooled_activations(logits_SV: Tensor, lengths: Sequence[int], positions: int = 1) -> Tensor:
    """Return the mean activation of each text's largest positions, [N, V].

    Args:
        logits_SV: logits of the pooled tokens, texts one after the other.
        lengths: pooled tokens of each text, which sum to S.
        positions: number of positions. Default 1: the maximum, taken before the activation, which is increasing.
    """
    parts = logits_SV.split(list(lengths))
    if positions == 1:
        return activation(torch.stack([part.max(0).values for part in parts]))
    return torch.stack([activation(part.topk(min(positions, len(part)), dim=0).values).mean(0) for part in parts])


def bag_of_tokens(ids_NL: Tensor, mask_NL: Tensor, terms_V: Tensor) -> Tensor:
    """Return 1 for each term that occurs in a text, float32 [N, V], however often it does.

    Args:
        ids_NL: token ids.
        mask_NL: tokens of the text.
        terms_V: tokens that are terms.
    """
    bag_NV = torch.zeros(len(ids_NL), len(terms_V), device=ids_NL.device)
    return bag_NV.scatter_reduce(1, ids_NL, mask_NL.float(), "amax") * terms_V


@torch.no_grad()
def sparse_mask(vectors_NV: Tensor, terms: int | None, bag_NV: Tensor | None) -> Tensor:
    """Return the entries of a sparse view, bool [N, V]: the `terms` largest (None: all), and those of the bag."""
    if terms is None or terms >= vectors_NV.shape[1]:
        return torch.ones_like(vectors_NV, dtype=torch.bool)
    mask_NV = torch.zeros_like(vectors_NV, dtype=torch.bool)
    if terms:
        mask_NV.scatter_(1, vectors_NV.topk(terms, dim=1).indices, True)
    return mask_NV if bag_NV is None else mask_NV | (bag_NV > 0)


def contrastive_mask(bag_BV: Tensor, partner_NV: Tensor, terms_V: Tensor) -> tuple[Tensor, Tensor]:
    """Deal words that occur in no bag to the texts: word j to text j mod B.

    Args:
        bag_BV: bags of one side.
        partner_NV: vectors of the other side; text i belongs to bag i.
        terms_V: tokens that are terms.

    Returns:
        The bags, with the dealt words; and the partners without the words that were dealt to their own bag.
    """
    rows = len(bag_BV)
    word_V = torch.arange(bag_BV.shape[1], device=bag_BV.device)
    dealt_BV = (word_V % rows == torch.arange(rows, device=bag_BV.device)[:, None]) & ~(bag_BV > 0).any(0) & terms_V
    both = min(rows, len(partner_NV))
    partners = torch.cat([partner_NV[:both] * ~dealt_BV[:both], partner_NV[both:]])
    return bag_BV + dealt_BV.float(), partners
