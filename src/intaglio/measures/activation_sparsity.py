"""Activation sparsity: the share of units that are inactive for a token, and throughout a chunk of tokens.

    TLS = 1 - mean over tokens and units of A_te,   A_te = 1 where unit e fires for token t, else 0
    CLS_L = 1 - mean over chunks of L consecutive tokens, and units, of max_t A_te

A chunk reads the weights of all units that any of its tokens activates, so CLS is the sparsity of a verify pass over L
tokens, as TLS is that of a single token. A chunk lies in one document; padding is excluded. CLS_1 = TLS; max(0, 1 - L
(1 - TLS)) <= CLS_L <= TLS.

Source: Song et al., BlockFFN, COLM 2025 (arXiv 2507.08771).

Dimension letters: N rows, T tokens of a row, D width, E units, L tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden
from intaglio.modeling.replacement import ReplacedMLP

CHUNK = 8
"""Default tokens of a chunk, as verified at a time in speculative decoding."""


def token_sparsity(active_NTE: Tensor, real_NT: Tensor | None = None) -> float:
    """Return TLS, the share of units inactive for a token."""
    fired, tokens = _tokens(active_NTE, real_NT)
    return 1 - fired / (tokens * active_NTE.shape[-1])


def chunk_sparsity(active_NTE: Tensor, length: int, real_NT: Tensor | None = None) -> float:
    """Return CLS, the share of units inactive throughout a chunk."""
    fired, chunks = _chunks(active_NTE, length, real_NT)
    if not chunks:
        raise IntaglioError(f"chunk is {length} tokens, longer than the rows of {active_NTE.shape[1]}")
    return 1 - fired / (chunks * active_NTE.shape[-1])


def _tokens(active_NTE: Tensor, real_NT: Tensor | None) -> tuple[int, int]:
    """Return the number of activations and of tokens."""
    if real_NT is None:
        return int(active_NTE.sum()), active_NTE.shape[0] * active_NTE.shape[1]
    return int((active_NTE & real_NT[..., None]).sum()), int(real_NT.sum())


def _chunks(active_NTE: Tensor, length: int, real_NT: Tensor | None) -> tuple[int, int]:
    """Return the number of activations by chunk and of chunks."""
    count = active_NTE.shape[1] // length
    if not count:
        return 0, 0
    union = active_NTE[:, : count * length].unflatten(1, (count, length)).any(2)
    if real_NT is None:
        return int(union.sum()), union.shape[0] * count
    real = real_NT[:, : count * length].unflatten(1, (count, length)).all(2)
    return int((union & real[..., None]).sum()), int(real.sum())


@dataclass
class _Count:
    """Counts of a layer."""

    units: int = 0
    tokens: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)

    def share(self, which: list[tuple[int, int]]) -> float:
        fired, seen = (sum(column) for column in zip(*which, strict=True))
        return 1 - fired / (seen * self.units)


@dataclass(frozen=True)
class ActivationSparsity:
    """Activation sparsity of a model, mean over layers, for chunks of `chunk` tokens; `layers` maps to (TLS, CLS)."""

    token_sparsity: float
    chunk_sparsity: float
    chunk: int
    layers: dict[str, tuple[float, float]]


@torch.no_grad()
def activation_sparsity(
    checkpoint: Checkpoint, data: Segments, chunk: int = CHUNK, batch_size: int = 4
) -> ActivationSparsity | None:
    """Measure activation sparsity on held-out text; None for a model without sparse units."""
    modules = {name: m for name, m in checkpoint.model.named_modules() if isinstance(m, ReplacedMLP)}
    if not modules:
        return None
    if data.ids_NT.shape[1] < chunk:
        raise IntaglioError(f"chunk is {chunk} tokens, longer than the rows of {data.ids_NT.shape[1]}")
    checkpoint.check_ids(data.ids_NT)
    counts = {name: _Count() for name in modules}
    current: dict[str, Tensor | None] = {}

    def record(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            active = module.active_units(inputs[0])
            if active is None:
                counts.pop(name, None)
                return
            real, count = current["real"], counts[name]
            count.units = active.shape[-1]
            count.tokens.append(_tokens(active, real))
            count.chunks.append(_chunks(active, chunk, real))

        return hook

    parts = anatomy(checkpoint.model)
    handles = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    try:
        for batch in data.batches(batch_size):
            mask = batch.get("attention_mask")
            current["real"] = None if mask is None else mask.bool().to(checkpoint.device)
            final_hidden(parts, batch)
            if not counts:
                break  # no sparse units
    finally:
        for handle in handles:
            handle.remove()
    layers = {name: (count.share(count.tokens), count.share(count.chunks)) for name, count in counts.items()}
    if not layers:
        return None
    token, chunked = (sum(values) / len(layers) for values in zip(*layers.values(), strict=True))
    return ActivationSparsity(token, chunked, chunk, layers)
