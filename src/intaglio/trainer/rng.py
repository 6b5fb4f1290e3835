"""Randomness by name: every draw is keyed by (seed, epoch, example id), none comes from a global generator.

So the same example gets the same draw whatever batch it is in, whichever process reads it, and after a resume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

EVALUATION = -1
"""The epoch of examples that are evaluated on."""


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by the SHA-256 of a key.

    Args:
        *key: integers and words.
    """
    digest = hashlib.sha256(":".join(str(part) for part in key).encode("utf-8")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class KeyedRNG:
    """The source of an objective's randomness: `draws(example)` is that example's generator.

    Args:
        seed: of the run.
        training: False while evaluating.
    """

    seed: int
    training: bool = True

    def __call__(self, example: dict[str, Any], purpose: str = "") -> torch.Generator:
        """Return the generator of an example in its epoch, always in its first state.

        Args:
            example: with `id`; `epoch` is 0 where it has none.
            purpose: tells apart draws of one example that must not be the same.
        """
        return generator(self.seed, example.get("epoch", 0), example["id"], purpose)

    def order(self, count: int, epoch: int) -> Tensor:
        """Return the order of an epoch, int64 [count].

        Args:
            count: of rows.
            epoch: which pass, from 0.
        """
        return torch.randperm(count, generator=generator(self.seed, "order", epoch))
