"""Degradation of a model on a sample: the Jensen-Shannon divergence of its predictions from the original's.

    JSD(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m),  m = (p + q) / 2,  in nats, from 0 to ln 2

Dimension letters: B rows, L tokens of a row, D width, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.loading import unlike_tokens
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import HeadOnly, final_hidden
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.tokenised_samples import ELEMENTS, Sample, Scope, padded_batch, positions

Reduce = Literal["mean", "sum"]

MAX_GAP = 80.0
"""A difference of log-probabilities that is effectively infinite."""


def jsd(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two distributions at each position, in nats [T].

    With d = log q - log p the two halves are -p ln((1 + e^d) / 2) and -q ln((1 + e^-d) / 2): without the logarithm of a
    mixture equal distributions give exactly 0, and zero probabilities no NaN.
    """
    gap_TV = (log_q_TV - log_p_TV).nan_to_num(0.0, posinf=MAX_GAP, neginf=-MAX_GAP).clamp_(-MAX_GAP, MAX_GAP)
    first_TV = log_p_TV.exp() * torch.expm1(gap_TV).div_(2).log1p_()
    second_TV = log_q_TV.exp() * torch.expm1(-gap_TV).div_(2).log1p_()
    return -0.5 * (first_TV + second_TV).sum(-1)


def shared_vocabulary(model: Checkpoint, original: Checkpoint) -> int:
    """Return the number of ids, from 0 on, that mean the same to both: a vocabulary may have grown since."""
    rows = min(model.vocabulary, original.vocabulary)
    if model.tokenizer is not None and original.tokenizer is not None:
        different = sum(id < rows for id in unlike_tokens(model.tokenizer, original.tokenizer))
        ours, theirs = ({*side.tokenizer.get_vocab().values()} for side in (model, original))
        if different or not any(id < rows for id in ours & theirs):
            how = f"{different} ids stand for other tokens" if different else "no id is common to both"
            raise IntaglioError(
                f"paser compares the model with {original.source}, whose tokenizer differs ({how}); an original with "
                "the same tokenizer is needed"
            )
    elif model.vocabulary != original.vocabulary:
        raise IntaglioError(
            f"paser compares the model with {original.source}: vocabularies of {model.vocabulary} and "
            f"{original.vocabulary} tokens; an original with the same tokenizer is needed"
        )
    return rows


@torch.no_grad()
def degradation(
    samples: Sequence[Sample],
    model: Checkpoint,
    original: Checkpoint,
    *,
    scope: Scope = "answer",
    reduce: Reduce = "mean",
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> list[float]:
    """Return J of each sample: its divergences over the tokens in scope, averaged or summed."""
    rows = shared_vocabulary(model, original)
    sides = [(anatomy(side.model), HeadOnly(anatomy(side.model), frozen=False)) for side in (model, original)]
    order = sorted(range(len(samples)), key=lambda n: len(samples[n].prompt) + len(samples[n].answer))
    scores = [0.0] * len(samples)
    with preserve_modes(model.model), preserve_modes(original.model):
        model.model.eval()
        original.model.eval()
        for start in range(0, len(order), batch_size):
            part = [samples[n] for n in order[start : start + batch_size]]
            for n, value in zip(
                order[start : start + batch_size], _batch_divergences(part, sides, rows, scope), strict=True
            ):
                scores[n] = float(value.mean() if reduce == "mean" else value.sum()) if len(value) else 0.0
            progress(min(start + batch_size, len(order)), len(order), "paser: comparing predictions")
    if not all(map(torch.isfinite, torch.tensor(scores, dtype=torch.float64))):
        raise IntaglioError("paser: a prediction is not finite; the weights or their dtype overflow")
    return scores


def _batch_divergences(
    samples: Sequence[Sample], sides: Sequence[tuple[Any, HeadOnly]], rows: int, scope: Scope
) -> list[Tensor]:
    """Return the divergences of each sample of a batch, float64 [positions]."""
    batch = padded_batch(samples)
    wanted = [positions(sample, scope) for sample in samples]
    counts = [len(places) for places in wanted]
    at = torch.tensor([(row, place) for row, places in enumerate(wanted) for place in places]).long().reshape(-1, 2)
    hidden = [final_hidden(parts, batch)[at[:, 0], at[:, 1]] for parts, _ in sides]  # [T, D]
    step = max(1, ELEMENTS // rows)
    pieces = [torch.empty(0, dtype=torch.float64)]
    for low in range(0, len(at), step):
        log_p_TV, log_q_TV = (
            F.log_softmax(head.logits(side_TD[None, low : low + step])[0, :, :rows].float(), dim=-1)
            for (_, head), side_TD in zip(sides, hidden, strict=True)
        )
        pieces.append(jsd(log_p_TV, log_q_TV.to(log_p_TV.device)).double().cpu())
    return list(torch.cat(pieces).split(counts))
