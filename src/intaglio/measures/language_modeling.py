"""Perplexity, bits per byte and agreement with the original.

Dimension letters: B batch, L sequence, D width, T positions of one piece, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments, segment_bytes
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.measures.embeddings import embeddings, pool
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import HeadOnly, final_hidden

# Limit of elements in a float32 table of logits computed at a time.
ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Reference:
    """Outputs of an original model, for measuring agreement after its blocks were edited.

    Args:
        hidden: final hidden states of each batch [B, L, D] (models that predict the next token).
        head: the original's head (likewise).
        embedded_ND: pooled embeddings (encoders, and decoders that see later tokens or have no head).
        digest: of the data.
        tokens: rows of the token embedding.
    """

    hidden: tuple[Tensor, ...] = ()
    head: HeadOnly | None = None
    embedded_ND: Tensor | None = None
    digest: str = ""
    tokens: int = 0

    def fits(self, checkpoint: Checkpoint, data: Segments) -> bool:
        """Return whether agreement is defined: the same tokens and vocabulary, or embeddings of equal width."""
        parts = anatomy(checkpoint.model)
        if self.digest != data.digest:
            return False
        if predicts_next(parts):
            return self.head is not None and self.tokens == checkpoint.vocabulary
        kept = self.hidden[0] if self.embedded_ND is None else self.embedded_ND
        return int(kept.shape[-1]) == parts.config.hidden_size


@dataclass(frozen=True)
class Quality:
    """Predictions on held-out text; None where a metric is undefined for the model.

    Args:
        perplexity: exp of the mean negative log-likelihood of a token.
        bits_per_byte: negative log2-likelihood over the UTF-8 bytes of the scored text; comparable between tokenizers.
        kl_mean: mean over positions of KL(original || model), in nats.
        top1_agreement: share of positions at which both have the same most likely next token.
        cosine: (models that do not predict the next token) mean cosine between the pooled embeddings of both.
        losses: mean negative log-likelihood of each segment, nats per token: the unit of paired comparisons.
    """

    perplexity: float | None = None
    bits_per_byte: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    losses: tuple[float, ...] = ()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def reference(checkpoint: Checkpoint, data: Segments, batch_size: int = 4) -> Reference:
    """Store a checkpoint's outputs, against which agreement is measured.

    Takes tokens * width elements and a copy of the head; the model may be edited afterwards.
    """
    parts = anatomy(checkpoint.model)
    if not predicts_next(parts):
        return Reference(embedded_ND=embeddings(checkpoint, data, batch_size=batch_size), digest=data.digest)
    hidden = tuple(final_hidden(parts, batch) for batch in data.batches(batch_size))
    return Reference(hidden=hidden, head=HeadOnly(parts), digest=data.digest, tokens=checkpoint.vocabulary)


@torch.no_grad()
def quality(
    checkpoint: Checkpoint,
    data: Segments,
    original: Reference | None = None,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> Quality:
    """Measure a checkpoint on held-out segments.

    Every token of a segment but the first is predicted from the earlier ones in the segment.
    """
    checkpoint.check_ids(data.ids_NT)
    if original is not None and original.digest != data.digest:
        raise IntaglioError("agreement needs both models on the same tokens: the reference was made from other data")
    parts = anatomy(checkpoint.model)
    if not predicts_next(parts):  # an encoder, or a decoder without its head or with later tokens in sight
        model_ND = embeddings(checkpoint, data, batch_size=batch_size)
        original_ND = None if original is None else original.embedded_ND
        if original is not None and original.hidden:
            original_ND = torch.cat([pool(hidden_BLD, None).cpu() for hidden_BLD in original.hidden])
        cosine = None if original_ND is None else float(F.cosine_similarity(model_ND, original_ND, dim=1).mean())
        return Quality(cosine=None if cosine is None else _finite(cosine))
    if original is not None and original.head is None:
        original = None  # it does not predict the next token
    head = HeadOnly(parts, frozen=False)
    total, count, divergence, agree = 0.0, 0, 0.0, 0
    losses: list[float] = []
    batches = math.ceil(data.n / batch_size)
    for index, batch in enumerate(data.batches(batch_size)):
        hidden_BLD = final_hidden(parts, batch)
        ids_BL = batch["input_ids"].to(hidden_BLD.device)
        for row in range(len(ids_BL)):
            original_hidden = None if original is None else original.hidden[index][row]
            nll, kl, same = _row(head, hidden_BLD[row], ids_BL[row], original, original_hidden)
            losses.append(nll / (ids_BL.shape[1] - 1))
            total, count = total + nll, count + ids_BL.shape[1] - 1
            divergence, agree = divergence + kl, agree + same
        progress(index + 1, batches, "measuring")
    mean = total / count
    size = None if checkpoint.tokenizer is None else sum(segment_bytes(checkpoint.tokenizer, data))
    return Quality(
        perplexity=_finite(math.exp(mean)) if mean < 700 else None,
        bits_per_byte=_finite(total / math.log(2) / size) if size else None,
        kl_mean=None if original is None else _finite(divergence / count),
        top1_agreement=None if original is None else agree / count,
        losses=tuple(losses),
    )


def _row(
    head: HeadOnly, hidden_LD: Tensor, ids_L: Tensor, original: Reference | None, original_LD: Tensor | None
) -> tuple[float, float, int]:
    """Return a segment's summed negative log-likelihood, summed KL and count of equal choices."""
    nll, kl, same = 0.0, 0.0, 0
    low, last = 0, ids_L.shape[0] - 1
    step = last
    while low < last:
        logits_TV = head.logits(hidden_LD[None, low : min(low + step, last)])[0].float()
        if step * logits_TV.shape[1] > ELEMENTS and step > 1:
            # The vocabulary size is known now: continue in chunks that fit.
            step = max(1, ELEMENTS // logits_TV.shape[1])
            logits_TV = logits_TV[:step]
        high = low + len(logits_TV)
        log_p_TV = F.log_softmax(logits_TV, dim=-1)
        nll += float(F.nll_loss(log_p_TV, ids_L[low + 1 : high + 1], reduction="sum"))
        if original is not None and original.head is not None and original_LD is not None:
            original_TV = original.head.logits(original_LD[None, low:high])[0].float()
            if original_TV.shape != log_p_TV.shape:
                raise IntaglioError(
                    f"agreement needs one vocabulary: the original has {original_TV.shape[1]} tokens, the model "
                    f"{log_p_TV.shape[1]}"
                )
            kl += float(F.kl_div(log_p_TV, F.log_softmax(original_TV, dim=-1), log_target=True, reduction="sum"))
            same += int((original_TV.argmax(-1) == log_p_TV.argmax(-1)).sum())
        low = high
    return nll, kl, same
