"""Rejection sampling over a node's children: the output has the target's distribution, whatever the tree.

Let p be the target's distribution at a node (after temperature, top-k, top-p and every other processor) and y_1, ...,
y_k the node's children in order.

**Children that were chosen without chance.** Draw t ~ p once. If a child holds t, the walk goes on there. The tree is
fixed before the draw, so t has the distribution p.

**Children that were drawn.** Let q_i be the distribution that y_i was drawn from given the earlier ones: q itself each
time when drawn with replacement, or q with y_1 ... y_{i-1} removed, renormalised. Start with p_1 = p. For i = 1, ...,
k: accept y_i with probability min(1, p_i(y_i) / q_i(y_i)); otherwise continue with

    p_{i+1} = max(p_i - q_i, 0) / sum(max(p_i - q_i, 0)).

If none is accepted, draw the token from p_{k+1}.

*Theorem.* The token has the distribution p. *Proof*, by induction from the last child back: let the token of stage i+1
have the distribution p_{i+1} given that stage i rejected (at stage k+1 it is drawn so). Stage i then gives t the
probability q_i(t) min(1, p_i(t) / q_i(t)) = min(p_i, q_i)(t) by acceptance. It rejects with probability 1 - sum
min(p_i, q_i) = sum max(p_i - q_i, 0), and p_{i+1} is a function of p_i and q_i alone, so rejection gives t the rest,
max(p_i - q_i, 0)(t). Together: p_i(t). At i = 1 this is p. The argument needs only that y_i ~ q_i given what came
before, so both ways of drawing are covered; a child that was chosen without chance is the case of a one-hot q_i.

The rule is recursive rejection sampling: Leviathan et al., Fast Inference from Transformers via Speculative Decoding,
ICML 2023 (one child); Miao et al., SpecInfer, ASPLOS 2024, section 4.3 (several, with replacement); Chen et al.,
Sequoia, NeurIPS 2024, algorithm 2 (without replacement).

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative.tree import TokenTree


def sample(p_V: Tensor, generator: torch.Generator | None) -> int:
    """Draw one token from nonnegative weights, exactly as stock `generate` does."""
    return int(torch.multinomial(p_V[None], 1, generator=generator))


def _level(generator: torch.Generator | None) -> float:
    """Return a uniform number in [0, 1)."""
    device = "cpu" if generator is None else generator.device
    return float(torch.rand((), dtype=torch.float64, generator=generator, device=device))


def _normalize(weights_V: Tensor) -> np.ndarray:
    """Return float64 probabilities: the residual after some rejections is a difference of nearly equal numbers."""
    probs_V: np.ndarray = weights_V.detach().to("cpu", torch.float64).numpy()
    return probs_V / probs_V.sum()


def _sample_residual(weights_V: np.ndarray, generator: torch.Generator | None) -> int:
    below_V = weights_V.cumsum()
    # The last token with any probability, should rounding put the level above the last sum.
    last = int(np.flatnonzero(weights_V)[-1])
    return min(int(np.searchsorted(below_V, _level(generator) * below_V[-1], side="right")), last)


def rejection_sample(
    tree: TokenTree, node: int, p_V: Tensor, generator: torch.Generator | None
) -> tuple[int, int | None]:
    """Return a token after a node whose children were drawn (it has a `q`), and the child accepted, if any.

    Raises:
        IntaglioError: draft probabilities over another vocabulary, or a child with no probability left.
    """
    assert tree.q is not None
    if tree.q[node].shape != p_V.shape:
        raise IntaglioError(
            f"the draft probabilities of node {node} cover {tree.q[node].numel()} tokens; the target has {p_V.numel()}"
        )
    target_V, draft_V = p_V.detach().to("cpu", torch.float64).numpy(), _normalize(tree.q[node])
    rest_V = target_V
    for child in tree.children[node]:
        token = tree.tokens[child]
        if not draft_V[token] > 0:
            raise IntaglioError(
                f"the drafted token {token} of node {child} has no probability left among its siblings; children must "
                "be in the order they were drawn from the tree's draft probabilities"
            )
        if _level(generator) * draft_V[token] < rest_V[token]:
            return token, child
        rest_V = np.maximum(rest_V - draft_V, 0)
        left = rest_V.sum()
        # If rounding leaves nothing, the distributions were equal, and the child was rejected by rounding alone.
        rest_V = rest_V / left if left > 0 else target_V
        if not tree.replace:
            draft_V = draft_V.copy()
            draft_V[token] = 0
            draft_V /= max(draft_V.sum(), np.finfo(np.float64).tiny)
    return _sample_residual(rest_V, generator), None
