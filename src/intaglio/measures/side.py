"""One side of a before/after report: every measure of one checkpoint."""

from __future__ import annotations

from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.measures.memory import peak_memory
from intaglio.measures.quality import Reference, quality
from intaglio.measures.speed import REPEATS, speed
from intaglio.measures.zeros import zero_fractions
from intaglio.method import Progress, silent


def measure(
    checkpoint: Checkpoint,
    data: Segments,
    original: Reference | None = None,
    *,
    batch_size: int = 4,
    timed: bool = True,
    repeats: int = REPEATS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a checkpoint; a value is None where it has no meaning for the model.

    Args:
        checkpoint: what is measured.
        data: held-out segments.
        original: what agreement is measured against.
        batch_size: segments that pass at a time.
        timed: whether to time prefill and decode.
        repeats: counted runs of the timing, of which the median is taken.
        progress: called after each batch.

    Returns:
        `perplexity, bits_per_byte, kl_mean, top1_agreement, cosine, zero_fraction, bytes, parameters,
        prefill_tokens_per_s, decode_tokens_per_s, peak_memory_bytes`, ready for JSON. Peak memory is that of the
        measurement: a pass over a batch of held-out text, and the timing.
    """
    with peak_memory(checkpoint.device) as peak:
        found = quality(checkpoint, data, original, batch_size, progress)
        times = speed(checkpoint, repeats) if timed else None
    return {
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "kl_mean": found.kl_mean,
        "top1_agreement": found.top1_agreement,
        "cosine": found.cosine,
        "zero_fraction": zero_fractions(checkpoint),
        "bytes": checkpoint.bytes,
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "prefill_tokens_per_s": None if times is None else times.prefill,
        "decode_tokens_per_s": None if times is None else times.decode,
        "peak_memory_bytes": peak.bytes,
    }
