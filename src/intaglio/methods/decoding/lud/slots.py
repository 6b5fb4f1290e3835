"""PADs in a pass of the model: read behind a token, their predictions taken, their rows of the cache dropped.

Dimension letters: B rows, Q tokens of a row, G groups of PADs of a row, P PADs of a group, S slots (tokens and PADs),
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens [B, Q], depths [B, Q] and who sees whom [B, Q, Q], as `verify.reader.stack` gives them."""


def with_slots(arrays: Arrays, behind_BG: np.ndarray, pad: int, slots: int) -> Arrays:
    """Put a group of PADs behind some of each row's tokens.

    PAD p of a group (from 1) stands p places behind its token. It sees what the token sees, and the PADs before it in
    its group; no token sees a PAD.

    Args:
        arrays: of the tokens.
        behind_BG: index of the token that each group stands behind.
        pad: id of PAD.
        slots: P.

    Returns:
        the same with [B, Q + G P]: the tokens first, then group after group.
    """
    tokens_BQ, depths_BQ, seen_BQQ = arrays
    rows, own = tokens_BQ.shape
    groups, more = behind_BG.shape[1], behind_BG.shape[1] * slots
    tokens = np.concatenate([tokens_BQ, np.full((rows, more), pad, dtype=np.int64)], 1)
    deep_BG = np.take_along_axis(depths_BQ, behind_BG, 1)
    depths = np.concatenate([depths_BQ, (deep_BG[:, :, None] + np.arange(1, slots + 1)).reshape(rows, more)], 1)
    seen = np.zeros((rows, own + more, own + more), dtype=bool)
    seen[:, :own, :own] = seen_BQQ
    sees_BGQ = np.take_along_axis(seen_BQQ, behind_BG[:, :, None], 1)
    seen[:, own:, :own] = sees_BGQ.repeat(slots, 1)
    # One block a group: each PAD sees those before it.
    seen[:, own:, own:] = np.kron(np.eye(groups, dtype=bool), np.tri(slots, dtype=bool))
    return tokens, depths, seen


def within(arrays: Arrays, room_B: list[int]) -> Arrays:
    """Keep the places of PADs inside the model's context; what is predicted there lies beyond it and is never used.

    Args:
        arrays: from `with_slots`.
        room_B: the greatest depth of each row.
    """
    tokens, depths, seen = arrays
    return tokens, np.minimum(depths, np.array(room_B)[:, None]), seen


def confidence(logits_V: Tensor, token: int) -> float:
    """Return the probability of a token by the plain softmax, at temperature 1 whatever the sampling.

    Args:
        logits_V: raw.
        token: its id.
    """
    scores_V = logits_V.float()
    return float((scores_V[token] - scores_V.logsumexp(-1)).exp())


def best(logits_SV: Tensor) -> tuple[list[int], list[float]]:
    """Return the most likely token of each slot and its probability by the plain softmax.

    Args:
        logits_SV: raw.
    """
    scores_SV = logits_SV.float()
    top_S, tokens_S = scores_SV.max(-1)
    tokens: list[int] = tokens_S.tolist()
    shares: list[float] = (top_S - scores_SV.logsumexp(-1)).exp().tolist()
    return tokens, shares


def context_of(model: Any) -> int:
    """Return the most tokens that a model takes.

    Args:
        model: a stock causal model.
    """
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
