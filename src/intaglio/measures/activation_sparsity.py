"""How seldom units fire: the share that rests for a token, and the share that rests through a run of tokens.

    TLS = 1 - mean over tokens and units of A_te,   A_te = 1 where unit e fires for token t, else 0
    CLS_L = 1 - mean over chunks of L tokens in a row, and units, of max_t A_te

What a chunk reads of the weights is the union of what its tokens fire, so CLS is the sparsity that a verify pass over L
tokens has, as TLS is that of a single one. A chunk lies in one document; padding counts nowhere. CLS_1 = TLS;
max(0, 1 - L (1 - TLS)) <= CLS_L <= TLS.

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
from intaglio.modeling.anatomy import anatomy, final_hidden
from intaglio.modeling.replacement import ReplacedMLP

CHUNK = 8
"""Tokens of a chunk, where nothing else is said: what drafting has verified at a time."""


def token_sparsity(active_NTE: Tensor, real_NT: Tensor | None = None) -> float:
    """TLS, the share of units that rest for a token.

    Args:
        active_NTE: which units fire, bool.
        real_NT: False at padding; None: there is none.
    """
    fired, tokens = _tokens(active_NTE, real_NT)
    return 1 - fired / (tokens * active_NTE.shape[-1])


def chunk_sparsity(active_NTE: Tensor, length: int, real_NT: Tensor | None = None) -> float:
    """CLS, the share of units that rest through a chunk.

    Args:
        active_NTE: which units fire, bool; a row is a document.
        length: L. Tokens behind the last whole chunk of a row are left out, and chunks with padding in them.
        real_NT: False at padding; None: there is none.

    Raises:
        IntaglioError: no row has a whole chunk.
    """
    fired, chunks = _chunks(active_NTE, length, real_NT)
    if not chunks:
        raise IntaglioError(f"chunk is {length} tokens, longer than the rows of {active_NTE.shape[1]}")
    return 1 - fired / (chunks * active_NTE.shape[-1])


def _tokens(active_NTE: Tensor, real_NT: Tensor | None) -> tuple[int, int]:
    """How often a unit fires, and in how many tokens."""
    if real_NT is None:
        return int(active_NTE.sum()), active_NTE.shape[0] * active_NTE.shape[1]
    return int((active_NTE & real_NT[..., None]).sum()), int(real_NT.sum())


def _chunks(active_NTE: Tensor, length: int, real_NT: Tensor | None) -> tuple[int, int]:
    """How often a unit fires in a chunk, and in how many chunks."""
    whole = active_NTE.shape[1] // length
    if not whole:
        return 0, 0
    union = active_NTE[:, : whole * length].unflatten(1, (whole, length)).any(2)
    if real_NT is None:
        return int(union.sum()), union.shape[0] * whole
    real = real_NT[:, : whole * length].unflatten(1, (whole, length)).all(2)
    return int((union & real[..., None]).sum()), int(real.sum())


@dataclass
class _Count:
    """Of one layer."""

    units: int = 0
    tokens: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)

    def share(self, which: list[tuple[int, int]]) -> float:
        fired, seen = (sum(column) for column in zip(*which, strict=True))
        return 1 - fired / (seen * self.units)


@dataclass(frozen=True)
class ActivationSparsity:
    """How seldom the units of a model fire.

    Args:
        token_sparsity: TLS, mean over layers.
        chunk_sparsity: CLS, mean over layers.
        chunk: L.
        layers: `{layer: (TLS, CLS)}`, by where each stands.
    """

    token_sparsity: float
    chunk_sparsity: float
    chunk: int
    layers: dict[str, tuple[float, float]]


@torch.no_grad()
def activation_sparsity(
    checkpoint: Checkpoint, data: Segments, chunk: int = CHUNK, batch_size: int = 4
) -> ActivationSparsity | None:
    """Measure on held-out text how seldom units fire; None for a model that has none which ever rest.

    Args:
        checkpoint: what is measured.
        data: held-out segments, a document each.
        chunk: L. Default 8.
        batch_size: segments that pass at a time. Default 4.

    Raises:
        IntaglioError: segments are shorter than a chunk.
    """
    modules = {name: m for name, m in checkpoint.model.named_modules() if isinstance(m, ReplacedMLP)}
    if not modules:
        return None
    if data.ids_NT.shape[1] < chunk:
        raise IntaglioError(f"chunk is {chunk} tokens, longer than the rows of {data.ids_NT.shape[1]}")
    checkpoint.check_ids(data.ids_NT)
    counts = {name: _Count() for name in modules}
    now: dict[str, Tensor | None] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            active = module.active(inputs[0])
            if active is None:
                counts.pop(name, None)
                return
            real, count = now["real"], counts[name]
            count.units = active.shape[-1]
            count.tokens.append(_tokens(active, real))
            count.chunks.append(_chunks(active, chunk, real))

        return hook

    parts = anatomy(checkpoint.model)
    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        for batch in data.batches(batch_size):
            mask = batch.get("attention_mask")
            now["real"] = None if mask is None else mask.bool().to(checkpoint.device)
            final_hidden(parts, batch)
            if not counts:
                break  # none of them ever rests
    finally:
        for handle in handles:
            handle.remove()
    layers = {name: (count.share(count.tokens), count.share(count.chunks)) for name, count in counts.items()}
    if not layers:
        return None
    token, whole = (sum(values) / len(layers) for values in zip(*layers.values(), strict=True))
    return ActivationSparsity(token, whole, chunk, layers)


__all__ = ["CHUNK", "ActivationSparsity", "activation_sparsity", "chunk_sparsity", "token_sparsity"]
