"""The loss of heads that each look a fixed number of places ahead, all of them from one pass: the k-th from place n
predicts what the model itself will predict at place n + k.

Dimension letters: B rows, T tokens of a row, R places that are scored, K heads, X inputs of a head's output, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.speculative.heads.chunked_loss import in_pieces, kl, nothing
from intaglio.speculative.heads.lm_head import Words
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.protocols import Batch, Loss

Goal = Literal["model", "text"]
"""What heads learn: `model`, its distribution (KL divergence); `text`, the token that came (cross-entropy)."""


def ahead(states_BTX: Tensor, places: int) -> Tensor:
    """Each state moved to the place whose prediction it guesses: `places` along T, zeros in front.

    Args:
        states_BTX: states, T their second dimension.
        places: at least 1.
    """
    moved = torch.zeros_like(states_BTX)
    moved[:, places:] = states_BTX[:, :-places]
    return moved


def reachable(batch: Batch, places: int, goal: Goal) -> Tensor:
    """Which predictions a head that looks so many places ahead is scored on, bool [B, T].

    Args:
        batch: from `head_batch`.
        places: at least 1.
        goal: for `text`, the token must be known.
    """
    scored_BT: Tensor = batch["scored"] if goal == "model" else batch["target"] != IGNORED
    found_BT = scored_BT.clone()
    found_BT[:, :places] = False
    return found_BT


def ahead_loss(
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
    words: Words | None = None,
) -> Loss:
    """The sum over heads of their weighted means.

    Args:
        batch: from `head_batch`.
        states: of each head, [B, T, X] by the place that it looks from.
        hidden_BTD: the model's last hidden states, after its final norm.
        score: logits [R, K, W] of states [R, K, X], W the tokens that may be guessed.
        teach: the model's logits [R, V] of hidden states [R, D].
        parameters: what `score` uses.
        goal: what is learnt.
        weights: of the heads.
        ranks: of each head that are looked at. Default 1.
        words: the tokens that may be guessed. Where another one is right, a guess is wrong; from the text nothing is
            learnt there, from the model its distribution over those that may be guessed. Default: all.

    Returns:
        parts `loss_k` and `right_k`, the share of predictions whose most likely token is the model's (the text's);
        as outputs, see `Hits`.
    """
    words = words or Words()
    moved_BTKX = torch.stack([ahead(state, place) for place, state in enumerate(states, 1)], 2)
    valid_BTK = torch.stack([reachable(batch, place, goal) for place in range(1, len(states) + 1)], 2)
    wanted_BT = valid_BTK.any(-1)
    if not bool(wanted_BT.any()):
        return Loss(nothing([*states, *parameters]))
    counts_K = valid_BTK.sum((0, 1)).clamp(min=1)
    scale_K = torch.tensor(weights, device=counts_K.device) / counts_K

    def piece(
        states_RKX: Tensor, hidden_RD: Tensor, valid_RK: Tensor, target_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_RKV = score(states_RKX)
        if goal == "model":
            with torch.no_grad():
                teacher_RV = teach(hidden_RD)
            best_R = words.places(teacher_RV.argmax(-1))
            teacher_RV = words.narrow(teacher_RV)
            losses_RK = torch.stack([kl(teacher_RV, logits_RV) for logits_RV in logits_RKV.unbind(1)], 1)
        else:
            best_R = target_R = words.places(target_R)
            flat = F.cross_entropy(
                logits_RKV.flatten(0, 1).float(),
                target_R[:, None].expand(-1, len(states)).flatten(),
                ignore_index=IGNORED,
                reduction="none",
            )
            losses_RK = flat.view(len(target_R), -1)
        # Not a product: what is not scored may be no number.
        losses_RK = torch.where(valid_RK, losses_RK, 0.0)
        hits_RKr = hits(logits_RKV, best_R[:, None], ranks) & valid_RK[:, :, None]
        sums = torch.cat([losses_RK.detach().sum(0)[None], hits_RKr.float().sum(0).T])
        return (losses_RK * scale_K).sum(), sums, None

    rows = [moved_BTKX[wanted_BT], hidden_BTD[wanted_BT], valid_BTK[wanted_BT], batch["target"][wanted_BT]]
    total, sums, _ = in_pieces(piece, rows, parameters)
    return Loss(total, *named(sums, counts_K))


def hits(logits: Tensor, best: Tensor, ranks: int) -> Tensor:
    """Whether the candidate of each rank is the wanted token, bool [..., ranks].

    Args:
        logits: [..., V].
        best: the wanted token [...].
        ranks: the first so many.
    """
    logits = logits.detach()
    tokens = logits.argmax(-1, keepdim=True) if ranks == 1 else logits.topk(min(ranks, logits.shape[-1]), -1).indices
    return tokens == best[..., None]


@dataclass(frozen=True)
class Hits:
    """How often the candidate of each rank was right.

    Args:
        right_Kr: by head and rank.
        counts_K: predictions scored.
    """

    right_Kr: Tensor
    counts_K: Tensor


def named(sums_nK: Tensor, counts_K: Tensor) -> tuple[dict[str, Tensor], Hits]:
    """The parts of a loss by name, and its hits.

    Args:
        sums_nK: of each head, the losses and then the hits of each rank, added up.
        counts_K: predictions scored.
    """
    means_nK = sums_nK / counts_K
    parts = {
        f"{what}_{k + 1}": means_nK[n, k] for n, what in enumerate(("loss", "right")) for k in range(len(counts_K))
    }
    return parts, Hits(sums_nK[1:].T, counts_K)
