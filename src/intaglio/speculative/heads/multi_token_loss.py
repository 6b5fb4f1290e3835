"""Multi-token loss of heads that each look a fixed number of positions ahead, all trained from one pass.

The k-th head from position n predicts what the model itself will predict at position n + k.

Dimension letters: B rows, T tokens of a row, R scored positions, K heads, X inputs of a head's output, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.speculative.heads.chunked_loss import chunked, kl, zero_loss
from intaglio.speculative.heads.lm_head import DraftVocabulary
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.protocols import Batch, Loss

Goal = Literal["model", "text"]
"""Target of the heads: `model`, its distribution (KL divergence); `text`, the next token (cross-entropy)."""


def shift_states(states_BTX: Tensor, ahead: int) -> Tensor:
    """Move each state to the position whose prediction it guesses: `ahead` (at least 1) along T, zeros in front."""
    moved = torch.zeros_like(states_BTX)
    moved[:, ahead:] = states_BTX[:, :-ahead]
    return moved


def valid_targets(batch: Batch, ahead: int, goal: Goal) -> Tensor:
    """Return which predictions of `head_batch` a head that looks `ahead` positions ahead is scored on, bool [B, T]."""
    valid_BT: Tensor = (batch["scored"] if goal == "model" else batch["target"] != IGNORED).clone()
    valid_BT[:, :ahead] = False
    return valid_BT


def multi_token_loss(
    batch: Batch,
    states: Sequence[Tensor],
    hidden_BTD: Tensor,
    score: Callable[[Tensor], Tensor],
    teach: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    goal: Goal,
    weights: Sequence[float],
    ranks: int = 1,
    words: DraftVocabulary | None = None,
) -> Loss:
    """Return the weighted sum of the heads' mean losses.

    Args:
        batch: from `head_batch`.
        states: of each head, [B, T, X] by the position that it looks from.
        hidden_BTD: the model's last hidden states, after its final norm.
        score: from states [R, K, X] to logits [R, K, W], W the tokens that may be guessed.
        teach: from hidden states [R, D] to the model's logits [R, V].
        parameters: trained tensors that `score` uses.
        goal: target of the heads.
        weights: of the heads.
        ranks: how many candidates of each head `TopKHits` counts. Default 1.
        words: tokens that may be guessed. If another token is right, a guess is wrong; from the text nothing is learnt
            there, from the model its distribution over the tokens that may be guessed. Default: all.

    Returns:
        parts `loss_k` and `right_k`, the share of predictions whose most likely token is the model's (the text's);
        outputs are `TopKHits`.
    """
    words = words or DraftVocabulary()
    moved_BTKX = torch.stack([shift_states(state, k) for k, state in enumerate(states, 1)], 2)
    valid_BTK = torch.stack([valid_targets(batch, k, goal) for k in range(1, len(states) + 1)], 2)
    used_BT = valid_BTK.any(-1)
    if not bool(used_BT.any()):
        return Loss(zero_loss([*states, *parameters]))
    counts_K = valid_BTK.sum((0, 1)).clamp(min=1)
    scale_K = torch.tensor(weights, device=counts_K.device) / counts_K

    def chunk_loss(
        states_RKX: Tensor, hidden_RD: Tensor, valid_RK: Tensor, target_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_RKV = score(states_RKX)
        if goal == "model":
            with torch.no_grad():
                teacher_RV = teach(hidden_RD)
            best_R = words.indices(teacher_RV.argmax(-1))
            teacher_RV = words.narrow(teacher_RV)
            losses_RK = torch.stack([kl(teacher_RV, logits_RV) for logits_RV in logits_RKV.unbind(1)], 1)
        else:
            best_R = target_R = words.indices(target_R)
            flat = F.cross_entropy(
                logits_RKV.flatten(0, 1).float(),
                target_R[:, None].expand(-1, len(states)).flatten(),
                ignore_index=IGNORED,
                reduction="none",
            )
            losses_RK = flat.view(len(target_R), -1)
        # Not a product: losses that are not scored may be NaN.
        losses_RK = torch.where(valid_RK, losses_RK, 0.0)
        hits_RKr = topk_hits(logits_RKV, best_R[:, None], ranks) & valid_RK[:, :, None]
        sums = torch.cat([losses_RK.detach().sum(0)[None], hits_RKr.float().sum(0).T])
        return (losses_RK * scale_K).sum(), sums, None

    rows = [moved_BTKX[used_BT], hidden_BTD[used_BT], valid_BTK[used_BT], batch["target"][used_BT]]
    total, sums, _ = chunked(chunk_loss, rows, parameters)
    return Loss(total, *name_losses(sums, counts_K))


def topk_hits(logits: Tensor, best: Tensor, ranks: int) -> Tensor:
    """Return whether each of the first `ranks` candidates of logits [..., V] is the wanted token, bool [..., ranks]."""
    logits = logits.detach()
    tokens = logits.argmax(-1, keepdim=True) if ranks == 1 else logits.topk(min(ranks, logits.shape[-1]), -1).indices
    return tokens == best[..., None]


@dataclass(frozen=True)
class TopKHits:
    """Counts of correct candidates by rank.

    Args:
        right_Kr: by head and rank.
        counts_K: predictions scored.
    """

    right_Kr: Tensor
    counts_K: Tensor


def name_losses(sums_nK: Tensor, counts_K: Tensor) -> tuple[dict[str, Tensor], TopKHits]:
    """Return the named parts of a loss, and its hits.

    Args:
        sums_nK: of each head, the summed losses and then the summed hits of each rank.
        counts_K: predictions scored.
    """
    means_nK = sums_nK / counts_K
    parts = {
        f"{name}_{k + 1}": means_nK[n, k] for n, name in enumerate(("loss", "right")) for k in range(len(counts_K))
    }
    return parts, TopKHits(sums_nK[1:].T, counts_K)
