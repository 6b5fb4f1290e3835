"""Score rules: biases added to attention scores, instead of hiding keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`score(b, h, q, kv)`: what is added to a score, broadcast over the four index tensors."""


@dataclasses.dataclass(frozen=True)
class Alibi:
    """ALiBi: `-slope_h * |q - kv|` is added to the attention scores (Press et al. 2021).

    Slopes are the powers of `2 ** (-8 / heads)`, starting with the first; `heads` should be a power of two.

    Args:
        heads: number of attention heads.
    """

    heads: int

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Return the bias where query `q` of head `h` in row `b` sees key `kv`."""
        return -(2.0 ** (-8.0 / self.heads * (h + 1))) * (q - kv).abs()
