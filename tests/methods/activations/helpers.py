"""Small models and layers that the tests of R-Sparse share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.methods.activations.r_sparse import RSparse, SparseLinear
from tests.families import tiny_model, tiny_tokenizer

IDS = torch.randint(8, 150, (6, 16), generator=torch.Generator().manual_seed(0))
PROMPT = torch.tensor([[20, 30, 40, 21, 31, 20, 30, 40]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(family: str = "llama", layers: int = 2, **more: Any) -> Checkpoint:
    return Checkpoint(tiny_model(family, layers=layers, **more), tiny_tokenizer(family), "tiny")


def carved(family: str = "llama", fields: Any = None, **more: Any) -> Checkpoint:
    fields = {"alpha": 0.9, **(fields or {})} if "how" not in (fields or {}) else fields
    return RSparse(**fields).apply(tiny(family, **more), IDS, batch_size=3)


def layers(checkpoint: Checkpoint) -> dict[str, SparseLinear]:
    return {name: m for name, m in checkpoint.model.named_modules() if isinstance(m, SparseLinear)}


def masked(layer: SparseLinear, x: Tensor) -> Tensor:
    """The dense product with zeros, whatever kernels there are."""
    return layer._masked(x, 0)
