"""One side of a before/after report: every measure of one checkpoint."""

from __future__ import annotations

from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.measures.activation_sparsity import activation_sparsity
from intaglio.measures.input_sparsity import count_inputs, input_sparsity
from intaglio.measures.language_modeling import quality, reference
from intaglio.measures.memory import peak_memory
from intaglio.measures.speed import REPEATS, speed
from intaglio.measures.weight_sparsity import zero_fractions
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import count_parameters


class Evaluator:
    """Measures checkpoints one after the other on the same held-out text, each compared with one original.

    Args:
        original: what agreement is with. Only what comes out of it is kept, so it may be carved afterwards.
        held_out: the text.
        batch_size: segments that pass at a time.
        timed: whether to time prefill and decode.
        repeats: counted runs of the timing, of which the median is taken.
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
        progress: Progress = no_progress,
    ) -> None:
        self.held_out = held_out
        self._original = reference(original, held_out, batch_size)
        self._batch_size = batch_size
        self._repeats = repeats if timed else 0
        self._progress = progress

    def measure(self, checkpoint: Checkpoint, held_out: Segments | None = None, alone: bool = False) -> dict[str, Any]:
        """Measure one checkpoint; a value is None where it has no meaning for it.

        Args:
            checkpoint: the original itself, or another.
            held_out: the text in the tokens of a checkpoint that has other ones. Default: the original's.
            alone: leave out the comparison with the original. Default False.

        Returns:
            `perplexity, bits_per_byte, kl_mean, top1_agreement, cosine, zero_fraction, zeros, activation_sparsity,
            token_sparsity, chunk_sparsity, bytes, parameters, prefill_tokens_per_s, decode_tokens_per_s,
            peak_memory_bytes, tokens`, ready for JSON. Token and chunk sparsity are those of `firing`, of models with
            units that rest. Peak memory is that of the measurement: a pass over a batch of held-out text, and the
            timing. `tokens` is a digest of the token ids: two sides that differ in it were measured on other tokens.
        """
        data = held_out or self.held_out
        by_layer = zero_fractions(checkpoint)
        original = self._original if not alone and self._original.fits(checkpoint, data) else None
        with peak_memory(checkpoint.device) as peak:
            with count_inputs(checkpoint.model) as tallies:
                found = quality(checkpoint, data, original, self._batch_size, self._progress)
            fired = activation_sparsity(checkpoint, data, batch_size=self._batch_size)
            times = speed(checkpoint, self._repeats) if self._repeats else None
        return {
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "kl_mean": found.kl_mean,
            "top1_agreement": found.top1_agreement,
            "cosine": found.cosine,
            "zero_fraction": by_layer,
            "zeros": _of_all(checkpoint, by_layer),
            "activation_sparsity": input_sparsity(tallies),
            "token_sparsity": None if fired is None else fired.token_sparsity,
            "chunk_sparsity": None if fired is None else fired.chunk_sparsity,
            "bytes": checkpoint.bytes,
            "parameters": count_parameters(checkpoint.model),
            "prefill_tokens_per_s": None if times is None else times.prefill,
            "decode_tokens_per_s": None if times is None else times.decode,
            "peak_memory_bytes": peak.bytes,
            "tokens": data.digest,
        }


def _of_all(checkpoint: Checkpoint, by_layer: dict[str, float]) -> float | None:
    """The zeros of all projections together; layers that are pruned unevenly and differ in size have another mean."""
    sizes = {name: linear.shape[0] * linear.shape[1] for name, linear in anatomy(checkpoint.model).all_linears()}
    weights = sum(sizes.values())
    return sum(round(by_layer[name] * size) for name, size in sizes.items()) / weights if weights else None
