"""Late concatenation, the control of Causal2Vec: light encoder and decoder read a text apart, and vectors are joined.

    v = [F(x)_eos / |F(x)_eos|; z / |z|] / sqrt(2)

Dimension letters: N texts, D width of the decoder, K width of the light encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.methods.retrieval.causal2vec import Causal2Vec


class LateConcatenation(Causal2Vec):
    """Causal2Vec whose light encoder adds its vector to the result instead of a token to the input."""

    ctx_position: Literal["first", "after_bos", "after_instruction", "none"] = "none"
    pooling: Literal["concat", "ctx", "eos", "mean"] = "eos"

    def _context_modules(self, seed: int) -> dict[str, nn.Module]:
        return {"light_encoder": super()._context_modules(seed)["light_encoder"]}

    @property
    def reads_light(self) -> bool:
        """True: the light encoder reads every text."""
        return True

    def dimensions(self, checkpoint: Checkpoint) -> int:
        """Return D + K."""
        return super().dimensions(checkpoint) + self._light.width

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return both vectors, float32 [N, D + K]."""
        own_ND = super().embed(model, inputs, side)
        return F.normalize(torch.cat([own_ND, F.normalize(self.summaries(inputs), dim=-1)], dim=-1), dim=-1)
