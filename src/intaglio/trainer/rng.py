"""Keyed random generators: every draw is keyed by (seed, epoch, example id), none comes from a global generator.

So an example gets the same draw whatever batch it is in, whichever process reads it, and after a resume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EVALUATION = -1
"""Epoch number of held-out examples."""


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by the SHA-256 of a key."""
    digest = hashlib.sha256(":".join(str(part) for part in key).encode("utf-8")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class KeyedRNG:
    """Source of an objective's randomness: `rng(example)` is that example's generator.

    Args:
        seed: seed of the run.
        training: False while evaluating. Default True.
    """

    seed: int
    training: bool = True

    def __call__(self, example: dict[str, Any], purpose: str = "") -> torch.Generator:
        """Return the generator of an example in its epoch (0 by default), always in its first state.

        `purpose` tells apart draws of one example that must differ.
        """
        return generator(self.seed, example.get("epoch", 0), example["id"], purpose)

    def permutation(self, count: int, epoch: int) -> Tensor:
        """Return the order of `count` rows in an epoch (from 0), int64 [count]."""
        return torch.randperm(count, generator=generator(self.seed, "order", epoch))
