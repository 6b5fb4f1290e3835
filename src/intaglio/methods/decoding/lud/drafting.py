"""Lexical units as drafts that the model verifies: it predicts them in the same passes in which it verifies the last.

Every node of the chain of drafts may turn out to be the last one accepted, so a group of PADs stands behind each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from intaglio.methods.decoding.lud.accept import Repeats, accepted
from intaglio.methods.decoding.lud.slots import best, confidence, context_of, with_slots, within
from intaglio.speculative.cache import drop_last
from intaglio.speculative.protocols import Pass, Run, Step
from intaglio.speculative.target_model import stack
from intaglio.speculative.tree import TokenTree, chain


class Drafting:
    """A session of one run; see `verify.protocols.PassingSession`.

    Args:
        run: the run.
        pad: id of PAD.
        slots: PADs behind a node, k - 1.
        beta: least confidence of what is drafted.
        stop: the guard against repetition.
    """

    def __init__(self, run: Run, pad: int, slots: int, beta: float, stop: Repeats) -> None:
        self._pad, self._slots, self._beta, self._stop = pad, slots, beta, stop
        self._context = context_of(run.model)
        self._chains: dict[int, list[int]] = {}
        # For each row of the last pass and each of its nodes: what its slots predict, and how sure they are.
        self._said: dict[int, list[tuple[list[int], list[float]]]] = {}

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """As `PassingSession.propose`: the chain that the last pass's slots were sure of."""
        chains = [self._chains[row][: left + 1] for row, left in zip(rows, room, strict=True)]
        return [chain(tokens[0], tokens[1:]) for tokens in chains]

    def observe(self, steps: Sequence[Step]) -> None:
        """As `PassingSession.observe`: take what the slots behind the last accepted node said."""
        for step in steps:
            token, following = step.tokens[-1], []
            if step.tree is not None and not step.done:
                node = step.path[-1]
                tokens, sure = self._said[step.row][node]
                first = (token, confidence(step.logits[node], token))
                following = list(accepted([first, *zip(tokens, sure, strict=True)], self._beta, self._stop))[1:]
            self._chains[step.row] = [token, *following]

    def forward(self, call: Pass) -> Tensor:
        """As `PassingSession.forward`: the pass with PADs behind every node, whose rows of the cache go again."""
        reader, own = call.reader, max(map(len, call.trees))
        nodes_BQ = np.broadcast_to(np.arange(own), (len(call.rows), own))
        room = [self._context - 1 - length + pad for length, pad in zip(reader.lengths, reader.pads, strict=True)]
        arrays = within(with_slots(stack(call.trees), nodes_BQ, self._pad, self._slots), room)
        logits_BSV = reader.run(reader.lay(*arrays))
        drop_last(reader.cache.layers, own * self._slots)
        for place, (row, tree) in enumerate(zip(call.rows, call.trees, strict=True)):
            tokens, sure = best(logits_BSV[place, own : own + len(tree) * self._slots])
            cuts = [slice(node * self._slots, (node + 1) * self._slots) for node in range(len(tree))]
            self._said[row] = [(tokens[cut], sure[cut]) for cut in cuts]
        return logits_BSV[:, :own]
