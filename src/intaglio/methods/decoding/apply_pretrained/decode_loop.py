"""Token-by-token decoding from a function of next-token logits, with `generate`'s processors and criteria.

Dimension letters: B rows, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def decode(
    step: Callable[[Tensor], Tensor],
    ids_BL: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    streamer: Any = None,
) -> Tensor:
    """Extend rows greedily or by sampling until all meet a criterion; return them, int64 [B, L].

    Args:
        step: next-token logits [B, V] of the rows so far.
        ids_BL: prompts of equal length.
        logits_processor: of `generate`.
        stopping_criteria: of `generate`.
        config: merged generation config; `do_sample` and `pad_token_id` are read.
        streamer: receives each token. Default: none.
    """
    active_B = torch.ones(len(ids_BL), dtype=torch.bool, device=ids_BL.device)
    while active_B.any():
        scores_BV = logits_processor(ids_BL, step(ids_BL).float())
        sampled = config.do_sample
        token_B = torch.multinomial(scores_BV.softmax(-1), 1)[:, 0] if sampled else scores_BV.argmax(-1)
        token_B = torch.where(active_B, token_B, config.pad_token_id or 0)
        ids_BL = torch.cat([ids_BL, token_B[:, None]], 1)
        if streamer is not None:
            streamer.put(token_B.cpu())
        active_B = active_B & ~stopping_criteria(ids_BL, None)
    return ids_BL
