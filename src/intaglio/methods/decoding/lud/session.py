"""Lexical units at work: PAD slots in the target's passes, taken with or without verification.

Dimension letters: B rows, Q tokens of a row, S tokens and PADs of a row, N nodes, V vocabulary, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from intaglio.methods.decoding.lud.acceptance import Repeats, accept_confident
from intaglio.methods.decoding.lud.pad_slots import clamp_depths, confidence, most_likely, with_slots
from intaglio.methods.decoding.lud.statistics import UnitStatistics
from intaglio.speculative._utils import context_length
from intaglio.speculative.acceptance import Accepted, TokenSelector
from intaglio.speculative.cache import drop_last
from intaglio.speculative.protocols import DecodingRun, Step, TreePass
from intaglio.speculative.sequences import SequenceState
from intaglio.speculative.target_model import stack
from intaglio.speculative.tree import TokenTree, chain


class _SlotSession:
    """Reads chains of tokens with PADs after some of them; a `ForwardSession`.

    Args:
        run: the run.
        pad: id of PAD.
        slots: PADs after a token, k - 1.
        beta: least confidence of a token that is taken from a slot.
        repeats: the guard against repetition.
    """

    def __init__(self, run: DecodingRun, pad: int, slots: int, beta: float, repeats: Repeats) -> None:
        self._pad, self._slots, self._beta, self._repeats = pad, slots, beta, repeats
        self._context = context_length(run.model) or 1 << 30
        self._chains: dict[int, list[int]] = {}  # by row: tokens of its next tree

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """Return the chain of each row; see `Session.propose`."""
        return [chain(self._chains[row][0], self._chains[row][1:]) for row in rows]

    def _read(self, call: TreePass, nodes_BG: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the logits of the trees' nodes and of the PADs after the nodes `nodes_BG`.

        The PADs' rows of the cache are dropped again.
        """
        cached, own = call.cached, max(map(len, call.trees))
        room = [self._context - 1 - length + pad for length, pad in zip(cached.lengths, cached.pads, strict=True)]
        arrays = clamp_depths(with_slots(stack(call.trees), nodes_BG, self._pad, self._slots), room)
        logits_BSV = cached.forward(cached.prepare_inputs(*arrays))
        drop_last(cached.cache.layers, nodes_BG.shape[1] * self._slots)
        return logits_BSV[:, :own], logits_BSV[:, own:]


class LUDSession(_SlotSession):
    """Drafts the confident tokens of the slots; the target verifies them in its next pass.

    Every node of a chain may turn out to be the last accepted one, so a group of PADs follows each.
    """

    def __init__(self, run: DecodingRun, pad: int, slots: int, beta: float, repeats: Repeats) -> None:
        super().__init__(run, pad, slots, beta, repeats)
        # For each row of the last pass and each of its nodes: tokens of its slots, and their confidence.
        self._predicted: dict[int, list[tuple[list[int], list[float]]]] = {}

    def observe(self, steps: Sequence[Step]) -> None:
        """Take the confident tokens of the slots after the last accepted node."""
        for step in steps:
            token, following = step.tokens[-1], []
            if step.tree is not None and not step.done:
                node = step.path[-1]
                tokens, confident = self._predicted[step.row][node]
                first = (token, confidence(step.logits[node], token))
                slots = [first, *zip(tokens, confident, strict=True)]
                following = list(accept_confident(slots, self._beta, self._repeats))[1:]
            self._chains[step.row] = [token, *following]

    def forward(self, call: TreePass) -> Tensor:
        """Run the pass with PADs after every node; see `ForwardSession.forward`."""
        own = max(map(len, call.trees))
        logits_BQV, logits_BPV = self._read(call, np.broadcast_to(np.arange(own), (len(call.rows), own)))
        for index, (row, tree) in enumerate(zip(call.rows, call.trees, strict=True)):
            tokens, confident = most_likely(logits_BPV[index, : len(tree) * self._slots])
            groups = [slice(node * self._slots, (node + 1) * self._slots) for node in range(len(tree))]
            self._predicted[row] = [(tokens[group], confident[group]) for group in groups]
        return logits_BQV


class UnverifiedLUDSession(_SlotSession):
    """Emits the confident tokens of the slots in the pass that predicts them; an `AcceptingSession`.

    A pass reads the tokens emitted by the last one, with PADs after the last of them. It also predicts, for each of
    these tokens but the first, the unaided model's token at its position: so the agreement costs no pass.
    """

    def __init__(
        self, run: DecodingRun, pad: int, slots: int, beta: float, repeats: Repeats, counts: UnitStatistics
    ) -> None:
        super().__init__(run, pad, slots, beta, repeats)
        self._counts = counts
        self._slot_logits_BPV: Tensor | None = None

    def observe(self, steps: Sequence[Step]) -> None:
        """Keep the emitted tokens of each row for the next pass."""
        self._chains = {step.row: [] for step in steps}
        for step in steps:
            self._chains[step.row] += step.tokens

    def forward(self, call: TreePass) -> Tensor:
        """Run the pass with PADs after each row's last token; see `ForwardSession.forward`."""
        logits_BQV, self._slot_logits_BPV = self._read(call, np.array([[len(tree) - 1] for tree in call.trees]))
        return logits_BQV

    def accept(
        self, selector: TokenSelector, row: SequenceState, index: int, tree: TokenTree, logits_NV: Tensor
    ) -> list[Accepted]:
        """Emit the target's own token and the confident tokens of the slots after it."""
        self._count_agreement(selector, row, tree, logits_NV)
        emitted: list[int] = []
        slots = self._slot_tokens(selector, row, index, tree, logits_NV)
        for token in accept_confident(slots, self._beta, self._repeats):
            row.append(token)
            emitted.append(token)
            if row.done:
                break
        own = Accepted(emitted[:1], 0, range(len(tree)), self._slots)
        return [own, Accepted(emitted[1:], len(emitted) - 1, (), 0)] if emitted[1:] else [own]

    def _slot_tokens(
        self, selector: TokenSelector, row: SequenceState, index: int, tree: TokenTree, logits_NV: Tensor
    ) -> Iterator[tuple[int, float]]:
        """Yield token and confidence of each slot, each selected when the row holds the ones before it.

        Later slots are never drawn from: their prediction does not depend on the token drawn at the first.
        """
        last = len(tree) - 1
        token, _ = selector.select(row, index, tree, last, logits_NV[last])
        yield token, confidence(logits_NV[last], token)
        assert self._slot_logits_BPV is not None
        for logits_V in self._slot_logits_BPV[index]:
            token = selector.most_likely(row.ids, row.index, logits_V)
            yield token, confidence(logits_V, token)

    def _count_agreement(self, selector: TokenSelector, row: SequenceState, tree: TokenTree, logits_NV: Tensor) -> None:
        """Compare the tokens taken from slots in the last pass with the unaided model's, now that it has read them."""
        for node, token in enumerate(tree.tokens[1:]):
            prefix_1L = row.ids[:, : row.length - len(tree) + node + 1]
            self._counts.checked += 1
            self._counts.agreed += selector.most_likely(prefix_1L, row.index, logits_NV[node]) == token
