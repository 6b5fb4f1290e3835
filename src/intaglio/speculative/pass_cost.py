"""Cost of a pass over several tokens in passes over one, measured on the machine at hand, and drafts pruned by it.

    costs = pass_costs(model, rows, prepacked)
    costs.cost(9)                   # a pass over nine tokens of each row, such as 1.4

Between measured sizes the cost is linear, above the last one it continues with the slope of the last two. Without a
tuner (`environment.tuning`) it is `FIXED`: each further token of a row adds 0.035, as on one core of an AMD EPYC.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from intaglio.environment import tuning
from intaglio.modeling.anatomy import blocks
from intaglio.speculative._utils import context_length
from intaglio.speculative.prepacked_linear import Prepacked
from intaglio.speculative.target_model import CachedModel
from intaglio.speculative.tree import TokenTree

SIZES = (1, 2, 4, 8, 16)
"""Tokens of the measured passes."""
TOKEN_COST = 0.035
_CONTEXT = 32
"""Tokens in the cache while passes are measured."""
_DECAY, _PRIOR = 0.95, 2.0
"""Decay per step of the expected and the accepted tokens, and how many tokens count as accepted beforehand."""


@dataclass(frozen=True)
class PassCosts:
    """Seconds of passes of a model.

    Args:
        seconds: of a pass over so many tokens of each row, by their number; without any, each further token of a row
            costs `TOKEN_COST`.
        rows: that share a pass. Default 1.
    """

    seconds: tuple[tuple[int, float], ...] = ()
    rows: int = 1

    @property
    def measured(self) -> bool:
        """Whether passes were measured on this machine."""
        return len(self.seconds) > 1

    def cost(self, tokens: float, rows: int | None = None) -> float:
        """Return the cost of a pass over `tokens` tokens of each of `rows` rows, in passes over one token of each."""
        rows = self.rows if rows is None else rows
        if not self.measured:
            return 1.0 + TOKEN_COST * rows * (tokens - 1)
        sizes = self.seconds
        low = max(index for index in range(len(sizes) - 1) if index == 0 or sizes[index][0] <= tokens)
        (n, before), (m, after) = sizes[low], sizes[low + 1]
        seconds = before + max(0.0, after - before) * (tokens - n) / (m - n)
        return 1.0 + max(0.0, seconds / sizes[0][1] - 1.0) * rows / self.rows

    @property
    def token_cost(self) -> float:
        """The cost that a further token of a row adds on average, up to the largest pass."""
        most = self.seconds[-1][0] if self.measured else 2
        return (self.cost(most) - 1.0) / (most - 1)


FIXED = PassCosts()


def pass_costs(model: Any, rows: int, prepacked: Prepacked | None) -> PassCosts:
    """Return the costs of passes over `rows` rows, measured if they are not known; `FIXED` without a tuner.

    Args:
        model: a decoder on a CPU; elsewhere costs are fixed.
        rows: of a batch.
        prepacked: context of the passes.
    """
    tuner = tuning.tuner()
    if tuner is None or model.device.type != "cpu":
        return PassCosts(rows=rows)
    products = " chosen products" if prepacked else ""
    key = f"pass {shapes_name(model)} rows {rows}{products} threads {torch.get_num_threads()}"
    passes = _Passes(model, rows, prepacked)
    times = tuner.times(key, {str(size): passes.call(size) for size in SIZES})
    tuner.save()
    return PassCosts(tuple((size, times[str(size)]) for size in SIZES) if times else (), rows)


def shapes_name(model: Any) -> str:
    """Return a name for the shapes of a model: `LlamaForCausalLM 30x576 float32 1a2b3c4d`."""
    shapes = Counter((type(module).__name__, *(tuple(p.shape) for p in module.parameters(recurse=False)))
                     for module in model.modules())  # fmt: skip
    digest = hashlib.sha256(repr(sorted(shapes.items(), key=repr)).encode()).hexdigest()[:8]
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__} {len(blocks(model))}x{model.config.get_text_config().hidden_size} {dtype} {digest}"


class _Passes:
    """Passes over chains of tokens after a short context, through the loop's own cached model."""

    def __init__(self, model: Any, rows: int, prepacked: Prepacked | None) -> None:
        self._model, self._rows, self._prepacked = model, rows, prepacked
        self._cached: CachedModel | None = None

    def call(self, size: int) -> Callable[[], None]:
        """Return the pass over a chain of `size` tokens of each row."""
        tokens = [[1] * size] * self._rows
        depths = [list(range(size))] * self._rows
        seen = [torch.ones(size, size, dtype=torch.bool).tril().tolist()] * self._rows

        @torch.inference_mode()
        def run() -> None:
            if self._cached is None:
                self._cached = CachedModel(self._model, prepacked=self._prepacked)
                length = min(_CONTEXT, (context_length(self._model) or 1024) - SIZES[-1])
                self._cached.prefill(torch.ones(self._rows, max(1, length), dtype=torch.long))
            self._cached.extend(tokens, depths, seen)
            self._cached.keep_rows([[]] * self._rows)

        return run


class DraftPruner:
    """Cuts drafts down to the part that is expected to be worth its cost, by how much came true in the last steps."""

    def __init__(self) -> None:
        self._expected = self._accepted = 0.0  # decaying sums

    def observe(self, drafted: int) -> None:
        """Take in how many drafted tokens were emitted."""
        self._accepted = _DECAY * self._accepted + drafted

    def prune(self, tree: TokenTree, probs: Sequence[float], cost: Callable[[int], float]) -> TokenTree:
        """Return the part of a draft to verify; arguments as `prune_by_cost`."""
        trust = (self._accepted + _PRIOR) / (self._expected + _PRIOR)
        nodes = prune_by_cost(probs, cost, trust)
        self._expected = _DECAY * self._expected + sum(probs[node] for node in nodes) - 1
        return tree.subtree(nodes)


def prune_by_cost(probs: Sequence[float], cost: Callable[[int], float], trust: float = 1.0) -> list[int]:
    """Return the nodes of the part of a draft with the most expected tokens for the cost of its pass, the root first.

    A pass over the k most likely nodes is expected to give 1 + the sum of min(1, trust times their probabilities).

    Args:
        probs: of each node of a draft chosen without chance, the root's first, none more than its parent's.
        cost: of a pass over k drafted tokens, in passes over the root alone.
        trust: tokens accepted for each expected one. Default 1.
    """
    order = sorted(range(1, len(probs)), key=lambda node: (-probs[node], node))
    tokens, best, count = 1.0, 1.0, 0
    for k, node in enumerate(order, 1):
        tokens += min(1.0, trust * probs[node])
        if tokens > best * cost(k):
            best, count = tokens / cost(k), k
    return [0, *sorted(order[:count])]


__all__ = ["FIXED", "DraftPruner", "PassCosts", "pass_costs", "prune_by_cost", "shapes_name"]
