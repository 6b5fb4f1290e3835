"""Perplexity of texts, answers or captions, one number a sample.

Dimension letters: B samples, L tokens of a row, T scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.partial_pass import HeadOnly, final_hidden
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.tokenised_samples import ELEMENTS, Sample, padded_batch, positions


def caption_perplexity(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Return exp of the mean negative log-likelihood of each row's labels, for models with images in their input.

        logits = model(**processor(images=images, text=prompts_and_captions, return_tensors="pt")).logits
        scores = caption_perplexity(logits, labels)  # labels: -100 at the prompt, image and pad tokens

    Args:
        logits_BLV: predictions of the next token at each position.
        labels_BL: token ids, -100 where nothing is scored; not shifted.

    Returns:
        Float32 [B]; infinite for a row without a scored token.
    """
    losses_BL = F.cross_entropy(
        logits_BLV[:, :-1].float().transpose(1, 2), labels_BL[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    count_B = (labels_BL[:, 1:] != IGNORED).sum(1)
    return torch.where(count_B > 0, losses_BL.sum(1) / count_B.clamp(min=1), torch.inf).exp()


def lowest(scores: Sequence[float], share: float, highest: bool = False) -> list[int]:
    """Return the indices of the `int(share * n)` lowest scores, at least one, in ascending order of score.

    Args:
        scores: of n samples; of equal ones the first comes first.
        share: above 0 and at most 1.
        highest: whether the highest are taken instead. Default False.
    """
    order = sorted(range(len(scores)), key=lambda n: -scores[n] if highest else scores[n])
    return order[: max(1, int(share * len(scores) + 1e-9))]


@torch.no_grad()
def perplexities(
    samples: Sequence[Sample], scorer: Checkpoint, *, batch_size: int = 8, progress: Progress = no_progress
) -> list[float]:
    """Return the perplexity of each sample's answer, or of a text after its first token; prompts are not scored.

    Raises:
        IntaglioError: the scorer does not predict the next token, or a prediction is not finite.
    """
    parts = anatomy(scorer.model)
    if not predicts_next(parts):
        raise IntaglioError(
            f"points: {scorer.source or 'the scorer'} does not predict the next token; a causal model does"
        )
    head = HeadOnly(parts, frozen=False)
    order = sorted(range(len(samples)), key=lambda n: len(samples[n].prompt) + len(samples[n].answer))
    scores = [0.0] * len(samples)
    with preserve_modes(scorer.model):
        scorer.model.eval()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for n, losses_T in zip(chosen, _losses([samples[n] for n in chosen], parts, head), strict=True):
                scores[n] = float(losses_T.mean().exp()) if len(losses_T) else torch.inf
            progress(min(start + batch_size, len(order)), len(order), "points: perplexities")
    if any(score != score for score in scores):
        raise IntaglioError("points: a prediction is not finite; the weights or their dtype overflow")
    return scores


def _losses(samples: Sequence[Sample], parts: Anatomy, head: HeadOnly) -> list[Tensor]:
    """Return the negative log-likelihoods of each sample's scored tokens, float64 [T]."""
    batch = padded_batch(samples)
    wanted = [positions(sample, "answer") for sample in samples]
    at = torch.tensor([(row, place) for row, places in enumerate(wanted) for place in places]).long().reshape(-1, 2)
    hidden_TD = final_hidden(parts, batch)[at[:, 0], at[:, 1]]
    targets_T = batch["input_ids"][at[:, 0], at[:, 1] + 1].to(hidden_TD.device)
    losses, low = [torch.empty(0, dtype=torch.float64)], 0
    while low < len(at):
        high = low + max(1, ELEMENTS // parts.config.vocab_size)
        logits_TV = head.logits(hidden_TD[None, low:high])[0].float()
        losses.append(F.cross_entropy(logits_TV, targets_T[low:high], reduction="none").double().cpu())
        low = high
    return list(torch.cat(losses).split([len(places) for places in wanted]))
