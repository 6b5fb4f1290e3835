"""Evaluation of a checkpoint on all metrics, one side of a before/after report."""

from __future__ import annotations

from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.measures.activation_sparsity import activation_sparsity
from intaglio.measures.generated_text import greedy_continuations
from intaglio.measures.input_sparsity import count_inputs, input_sparsity
from intaglio.measures.language_modeling import quality, reference
from intaglio.measures.memory import peak_memory
from intaglio.measures.speed import REPEATS, speed
from intaglio.measures.weight_sparsity import count_zeros
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.replacement import count_parameters


class Evaluator:
    """Evaluates checkpoints on the same held-out text, compared with an original.

    Args:
        original: reference for agreement. Only its outputs are stored, so it may be edited afterwards.
        held_out: the text.
        batch_size: segments at a time.
        timed: whether to time prefill and decode.
        repeats: timed runs, whose median is taken.
        continuations: number of segments whose first tokens are continued greedily. Default 0.
        progress: called after each batch.
    """

    def __init__(
        self,
        original: Checkpoint,
        held_out: Segments,
        *,
        batch_size: int = 4,
        timed: bool = True,
        repeats: int = REPEATS,
        continuations: int = 0,
        progress: Progress = no_progress,
    ) -> None:
        self.held_out = held_out
        self._original = reference(original, held_out, batch_size)
        self._batch_size = batch_size
        self._repeats = repeats if timed else 0
        self._continuations = continuations
        self._progress = progress

    def measure(self, checkpoint: Checkpoint, held_out: Segments | None = None, alone: bool = False) -> dict[str, Any]:
        """Evaluate a checkpoint; a metric is None where it is undefined for it.

        Returns:
            `perplexity, bits_per_byte, kl_mean, top1_agreement, cosine, zero_fraction, zeros, activation_sparsity,
            token_sparsity, chunk_sparsity, bytes, parameters, prefill_tokens_per_s, decode_tokens_per_s,
            peak_memory_bytes, tokens`, ready for JSON, and with `continuations` the value of `greedy_continuations`.
            Token and chunk sparsity are for models with sparse units (`activation_sparsity`). Peak memory is that of
            the evaluation: a forward pass over a batch of held-out text, and the timing. `tokens` is a digest of the
            token ids: two sides that differ in it were measured on different tokens.
        """
        data = held_out or self.held_out
        zeros = count_zeros(checkpoint)
        original = self._original if not alone and self._original.fits(checkpoint, data) else None
        with peak_memory(checkpoint.device) as peak:
            with count_inputs(checkpoint.model) as tallies:
                result = quality(checkpoint, data, original, self._batch_size, self._progress)
            sparsity = activation_sparsity(checkpoint, data, batch_size=self._batch_size)
            timing = speed(checkpoint, self._repeats) if self._repeats else None
        count = self._continuations
        continued = (
            {"continuations": greedy_continuations(checkpoint, Segments.of(data.ids_NT[:count]))} if count else {}
        )
        return continued | {
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "kl_mean": result.kl_mean,
            "top1_agreement": result.top1_agreement,
            "cosine": result.cosine,
            "zero_fraction": zeros.fractions,
            "zeros": zeros.total,
            "activation_sparsity": input_sparsity(tallies),
            "token_sparsity": None if sparsity is None else sparsity.token_sparsity,
            "chunk_sparsity": None if sparsity is None else sparsity.chunk_sparsity,
            "bytes": checkpoint.bytes,
            "parameters": count_parameters(checkpoint.model),
            "prefill_tokens_per_s": None if timing is None else timing.prefill,
            "decode_tokens_per_s": None if timing is None else timing.decode,
            "peak_memory_bytes": peak.bytes,
            "tokens": data.digest,
        }
