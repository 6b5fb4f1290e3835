"""PAD slots in a pass of the model: placed after a token, their predictions taken, their rows of the cache dropped.

Dimension letters: B rows, Q tokens of a row, G groups of PADs of a row, P PADs of a group, S slots (tokens and PADs),
V vocabulary.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens [B, Q], depths [B, Q] and visibility [B, Q, Q], as `target_model.stack` returns them."""


def with_slots(arrays: Arrays, nodes_BG: np.ndarray, pad: int, slots: int) -> Arrays:
    """Append a group of PADs after some of each row's tokens.

    PAD p of a group (from 1) has the position p after its token. It sees what the token sees, and the PADs before it in
    its group; no token sees a PAD.

    Args:
        arrays: of the tokens.
        nodes_BG: index of the token that each group follows.
        pad: id of PAD.
        slots: P.

    Returns:
        the same with [B, Q + G P]: the tokens first, then group after group.
    """
    tokens_BQ, depths_BQ, seen_BQQ = arrays
    rows, own = tokens_BQ.shape
    groups, more = nodes_BG.shape[1], nodes_BG.shape[1] * slots
    tokens = np.concatenate([tokens_BQ, np.full((rows, more), pad, dtype=np.int64)], 1)
    depths_BG = np.take_along_axis(depths_BQ, nodes_BG, 1)
    depths = np.concatenate([depths_BQ, (depths_BG[:, :, None] + np.arange(1, slots + 1)).reshape(rows, more)], 1)
    seen = np.zeros((rows, own + more, own + more), dtype=bool)
    seen[:, :own, :own] = seen_BQQ
    seen[:, own:, :own] = np.take_along_axis(seen_BQQ, nodes_BG[:, :, None], 1).repeat(slots, 1)
    # One block per group: each PAD sees those before it.
    seen[:, own:, own:] = np.kron(np.eye(groups, dtype=bool), np.tri(slots, dtype=bool))
    return tokens, depths, seen


def clamp_depths(arrays: Arrays, room_B: list[int]) -> Arrays:
    """Clamp the depths of each row, so that PADs stay inside the model's context; those beyond are never used."""
    tokens, depths, seen = arrays
    return tokens, np.minimum(depths, np.array(room_B)[:, None]), seen


def confidence(logits_V: Tensor, token: int) -> float:
    """Return the probability of a token by the plain softmax, at temperature 1 whatever the sampling."""
    scores_V = logits_V.float()
    return float((scores_V[token] - scores_V.logsumexp(-1)).exp())


def most_likely(logits_SV: Tensor) -> tuple[list[int], list[float]]:
    """Return the most likely token of each slot and its probability by the plain softmax."""
    scores_SV = logits_SV.float()
    top_S, tokens_S = scores_SV.max(-1)
    return tokens_S.tolist(), (top_S - scores_SV.logsumexp(-1)).exp().tolist()
