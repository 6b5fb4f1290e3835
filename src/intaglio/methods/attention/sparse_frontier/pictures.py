"""Keys that sparse attention kept for a prompt, layer by layer, for `intaglio inspect MODEL --masks --prompt TEXT`.

Dimension letters: H heads, Q queries, K keys, N tokens of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.masks.visualize import Group
from intaglio.methods.attention.sparse_frontier.cache import SequenceCache
from intaglio.methods.attention.sparse_frontier.installation import installed
from intaglio.methods.attention.sparse_frontier.prefill import Indices
from intaglio.methods.attention.sparse_frontier.tiled_attention import kept_pairs
from intaglio.modeling.anatomy import CACHE, anatomy

LONGEST = 4096
"""Tokens of a prompt whose pairs are drawn."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Kept keys of a layer: pairs of the prompt, bool [H, N, N], or keys that the next token reads, bool [H, N]."""

    layer: int
    part: str
    name: str
    seen: Tensor

    @property
    def share(self) -> float:
        """The kept share of the causal pairs, or of the keys."""
        count = self.seen.shape[-1]
        pairs = count * (count + 1) / 2 if self.seen.dim() == 3 else count
        return float(self.seen.sum()) / (pairs * len(self.seen))

    @property
    def keys(self) -> Tensor:
        """Which keys some query reads, bool [H, N]."""
        return self.seen.any(1) if self.seen.dim() == 3 else self.seen

    def group(self) -> Group:
        """Return the panel of the layer: queries down where pairs were chosen, else heads down."""
        shares = self.seen.float().mean(0) if self.seen.dim() == 3 else self.seen.float()
        return Group((self.layer,), None, None, shares[None], f"{self.name}, {self.share:.0%} kept")


@torch.no_grad()
def kept(checkpoint: Checkpoint, ids: Tensor) -> list[Kept]:
    """Return what each layer under sparse attention keeps for a prompt [1, N] and the token after it.

    Raises:
        IntaglioError: the model has no sparse attention, or the prompt is too long to draw.
    """
    model: Any = checkpoint.model
    state = installed(model)
    if state is None:
        raise IntaglioError("the model has no sparse attention to draw for a prompt; give --attention")
    checkpoint.check_ids(ids)
    if state.prefill is not None and ids.shape[1] > LONGEST:
        raise IntaglioError(f"the prompt has {ids.shape[1]} tokens; up to {LONGEST} can be drawn")
    results: list[Kept] = []
    sequences: list[SequenceCache] = []
    heads, windows = int(checkpoint.config.num_attention_heads), anatomy(model).windows

    def observe(layer: int, row: int, what: Indices | SequenceCache, length: int) -> None:
        if isinstance(what, SequenceCache):
            sequences.append(what)
        else:
            assert state is not None
            assert state.prefill is not None
            seen = kept_pairs(what, heads, length, windows[layer])
            results.append(Kept(layer, "prefill", state.prefill.name, seen))

    state.observer = observe
    try:
        cache = state.new_cache(anatomy(model).config)
        first = model(ids, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        if sequences and ids.shape[1] < checkpoint.context:
            model(first, **{CACHE: cache})
    finally:
        state.observer = None
    for sequence in sequences:
        results.append(Kept(sequence.layer, "cache", sequence.policy.label, sequence.visible_keys()[:, : ids.shape[1]]))
    return results


def as_json(results: list[Kept]) -> list[dict[str, Any]]:
    """Return the kept shares as plain data, by layer and head."""
    return [
        {
            "layer": result.layer,
            "part": result.part,
            "name": result.name,
            "share": result.share,
            "kept_by_head": result.seen.flatten(1).sum(1).tolist(),
            "keys": ["".join("01"[int(cell)] for cell in head) for head in result.keys.tolist()],
        }
        for result in results
    ]
