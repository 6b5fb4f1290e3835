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
from intaglio.modeling.anatomy import HeadOnly, anatomy, final_hidden

# Logits are made for as many positions at a time as keep one float32 table below this many elements.
ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Reference:
    """What is kept of an original to compare a carved model with: not its blocks, only what came out of them.

    Args:
        hidden: final hidden states of each batch [B, L, D] (what predicts the next token).
        head: turns them into logits, as the original did (likewise).
        embedded_ND: pooled embeddings (encoders, and decoders that see later tokens or have no head).
        digest: of the data they were made from.
        tokens: rows of the token embedding.
    """

    hidden: tuple[Tensor, ...] = ()
    head: HeadOnly | None = None
    embedded_ND: Tensor | None = None
    digest: str = ""
    tokens: int = 0

    def fits(self, checkpoint: Checkpoint, data: Segments) -> bool:
        """Whether agreement with it has a meaning: the same tokens of one vocabulary, or embeddings of one width.

        Args:
            checkpoint: what would be measured.
            data: what it would be measured on.
        """
        parts = anatomy(checkpoint.model)
        if self.digest != data.digest:
            return False
        if predicts_next(parts):
            return self.head is not None and self.tokens == checkpoint.vocabulary
        kept = self.hidden[0] if self.embedded_ND is None else self.embedded_ND
        return int(kept.shape[-1]) == parts.config.hidden_size


@dataclass(frozen=True)
class Quality:
    """What a model predicts on held-out text; None where it has no meaning for the model.

    Args:
        perplexity: exp of the mean negative log-likelihood of a token.
        bits_per_byte: negative log2-likelihood over the UTF-8 bytes of the scored text; compares tokenizers fairly.
        kl_mean: mean over positions of KL(original || model), in nats.
        top1_agreement: share of positions at which both have the same most likely next token.
        cosine: (what does not predict the next token) mean cosine between the pooled embeddings of both.
        losses: mean negative log-likelihood of each segment, in nats a token: the unit of paired comparisons.
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
    """Keep what agreement with this checkpoint will be measured by.

    Costs tokens * width elements and one copy of the head; the model may be carved afterwards.

    Args:
        checkpoint: the original.
        data: held-out segments.
        batch_size: segments that pass at a time; the same as in `quality`.
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

    Every token of a segment but its first is predicted from those before it in the same segment.

    Args:
        checkpoint: what is measured.
        data: held-out segments, without padding (decoders).
        original: from `reference` on the same data and batch size; None leaves agreement out.
        batch_size: segments that pass at a time.
        progress: called after each batch.

    Raises:
        IntaglioError: the reference is of other data or another vocabulary, or ids are outside the vocabulary.
    """
    checkpoint.check_ids(data.ids_NT)
    if original is not None and original.digest != data.digest:
        raise IntaglioError("agreement needs both models on the same tokens: the reference was made from other data")
    parts = anatomy(checkpoint.model)
    if not predicts_next(parts):  # an encoder, a decoder without its head, or one that sees what it would predict
        now_ND = embeddings(checkpoint, data, batch_size=batch_size)
        then_ND = None if original is None else original.embedded_ND
        if original is not None and original.hidden:
            then_ND = torch.cat([pool(hidden_BLD, None).cpu() for hidden_BLD in original.hidden])
        cosine = None if then_ND is None else float(F.cosine_similarity(now_ND, then_ND, dim=1).mean())
        return Quality(cosine=None if cosine is None else _finite(cosine))
    if original is not None and original.head is None:
        original = None  # it predicted no next token, so there is nothing to agree with
    head = HeadOnly(parts, frozen=False)
    total, count, divergence, agree = 0.0, 0, 0.0, 0
    losses: list[float] = []
    batches = math.ceil(data.n / batch_size)
    for index, batch in enumerate(data.batches(batch_size)):
        hidden_BLD = final_hidden(parts, batch)
        ids_BL = batch["input_ids"].to(hidden_BLD.device)
        for row in range(len(ids_BL)):
            then = None if original is None else original.hidden[index][row]
            nll, kl, same = _row(head, hidden_BLD[row], ids_BL[row], original, then)
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
    head: HeadOnly, hidden_LD: Tensor, ids_L: Tensor, original: Reference | None, then_LD: Tensor | None
) -> tuple[float, float, int]:
    """Summed negative log-likelihood, summed KL and the count of equal choices of one segment."""
    nll, kl, same = 0.0, 0.0, 0
    low, last = 0, ids_L.shape[0] - 1
    step = last
    while low < last:
        logits_TV = head.logits(hidden_LD[None, low : min(low + step, last)])[0].float()
        if step * logits_TV.shape[1] > ELEMENTS and step > 1:
            # Now that the vocabulary is known, go on in pieces that fit.
            step = max(1, ELEMENTS // logits_TV.shape[1])
            logits_TV = logits_TV[:step]
        high = low + len(logits_TV)
        log_p_TV = F.log_softmax(logits_TV, dim=-1)
        nll += float(F.nll_loss(log_p_TV, ids_L[low + 1 : high + 1], reduction="sum"))
        if original is not None and original.head is not None and then_LD is not None:
            then_TV = original.head.logits(then_LD[None, low:high])[0].float()
            if then_TV.shape != log_p_TV.shape:
                raise IntaglioError(
                    f"agreement needs one vocabulary: the original has {then_TV.shape[1]} tokens, the model "
                    f"{log_p_TV.shape[1]}"
                )
            kl += float(F.kl_div(log_p_TV, F.log_softmax(then_TV, dim=-1), log_target=True, reduction="sum"))
            same += int((then_TV.argmax(-1) == log_p_TV.argmax(-1)).sum())
        low = high
    return nll, kl, same
