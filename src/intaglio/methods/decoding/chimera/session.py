"""Chimera's drafting: F's cache over hidden states and tri-grams, and a tree drafted level by level.

F's cache is kept by slots: rows of different lengths leave slots that no row sees. Slots hold hidden states (H), the
tri-grams of tokens that were read (U), and while a tree is drafted the estimates of missing hidden states.

Dimension letters: B rows, N rows of F, K slots, E expanded nodes, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from intaglio.methods.decoding.chimera.model import ChimeraModel, trigram_at
from intaglio.modeling.anatomy import anatomy
from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.heads.lm_head import TargetHead
from intaglio.speculative.protocols import DecodingRun, Step
from intaglio.speculative.static_tree import StaticTree
from intaglio.speculative.tree import TokenTree, root_only

CACHED_TRIGRAMS = 4096
"""Most encoded tri-grams kept."""


class ChimeraSession:
    """A session over all rows.

    Args:
        draft: the modules, on the target's device.
        run: the run.
        sampler: takes candidates.
        tree: the static tree.
    """

    def __init__(self, draft: ChimeraModel, run: DecodingRun, sampler: CandidateSampler, tree: StaticTree) -> None:
        self._draft, self._sampler, self._tree = draft, sampler, tree
        self._parts = anatomy(run.model)
        self._target = TargetHead(self._parts, draft.words)
        self._device = run.model.device
        self._ids = {row: list(prompt) for row, prompt in enumerate(run.prompts)}
        self._rows = list(self._ids)
        self._cache = DynamicCache()
        self._slots = _Slots(len(self._rows), self._device)
        # By row: hidden states that F has not read, one for each token since, the last token emitted left out.
        self._unread: dict[int, list[Tensor]] = {row: [] for row in self._rows}
        self._last: dict[int, Tensor] = {}
        self._encoded: dict[tuple[int, int, int], Tensor] = {}

    def observe(self, steps: Sequence[Step]) -> None:
        """Take in the true hidden states and the tokens after them."""
        for step in steps:
            assert step.hidden is not None
            if step.done:
                continue
            self._ids[step.row] += step.tokens
            self._unread[step.row].append(step.hidden)
            self._last[step.row] = step.hidden[-1]

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """See `Session.propose`."""
        if list(rows) != self._rows:
            kept = [index for index, row in enumerate(self._rows) if row in rows]
            self._slots.select(kept)
            if self._cache.get_seq_length():
                self._cache.batch_select_indices(torch.tensor(kept, device=self._device))
            self._rows = list(rows)
        levels = min(self._tree.depth, max(room))
        if levels < 1:
            return [root_only(self._ids[row][-1]) for row in rows]
        return self._grow(self._read(), self._tree.truncate(levels))

    def _embed(self, triples: Sequence[tuple[int, int, int]]) -> Tensor:
        """Return encoded tri-grams [N, D]; recent ones are cached."""
        missing = [triple for triple in dict.fromkeys(triples) if triple not in self._encoded]
        if missing:
            encoded = self._draft.embed(self._parts, torch.tensor(missing, device=self._device))
            if len(self._encoded) + len(missing) > CACHED_TRIGRAMS:
                self._encoded = {triple: self._encoded[triple] for triple in triples if triple in self._encoded}
            self._encoded.update(zip(missing, encoded, strict=True))
        return torch.stack([self._encoded[triple] for triple in triples])

    def _read(self) -> Tensor:
        """Let F read the new hidden states and the tri-grams of the tokens after them.

        Returns:
            the estimate z of each row's next hidden state [B, D].
        """
        new = [torch.cat(self._unread[row]) for row in self._rows]
        most, width = max(map(len, new)), new[0].shape[-1]
        dtype = self._draft.trigram.down.weight.dtype
        rows_BND = torch.zeros((len(new), 2 * most, width), dtype=dtype, device=self._device)
        positions_BN = torch.zeros((len(new), 2 * most), dtype=torch.long, device=self._device)
        real_BN = torch.zeros((len(new), 2 * most), dtype=torch.bool, device=self._device)
        for index, (row, hidden_ND) in enumerate(zip(self._rows, new, strict=True)):
            ids, count = self._ids[row], len(hidden_ND)
            first = len(ids) - 1 - count  # the last token has no hidden state yet
            rows_BND[index, :count] = hidden_ND.to(dtype)
            positions_BN[index, :count] = torch.arange(first, first + count, device=self._device)
            # On the right, so that the newest tri-gram is the last of every row.
            rows_BND[index, -count:] = self._embed([trigram_at(ids, at) for at in range(first + 1, len(ids))])
            positions_BN[index, -count:] = torch.arange(first + 1, len(ids), device=self._device)
            real_BN[index, :count] = real_BN[index, -count:] = True
            self._unread[row] = []
        positions_BK = torch.cat([self._slots.positions_BK, positions_BN], 1)
        slots = positions_BK.shape[1]
        visible_BNK = torch.eye(slots, dtype=torch.bool, device=self._device)[-2 * most :].repeat(len(new), 1, 1)
        # Only the newest row's output is used, and it sees all real slots.
        visible_BNK[:, -1] = torch.cat([self._slots.real_BK, real_BN], 1)
        visible_BNK = self._draft.in_window(visible_BNK, positions_BN, positions_BK)
        encoded_BND = self._draft.encode(self._parts, rows_BND, positions_BN, visible_BNK, self._cache)
        is_hidden = torch.arange(2 * most, device=self._device) < most
        self._slots.append(positions_BN, real_BN, real_BN & is_hidden)
        return encoded_BND[:, -1]

    def _grow(self, z_BD: Tensor, tree: StaticTree) -> list[TokenTree]:
        """Draft the trees, a level at a time."""
        last_BD = torch.stack([self._last[row] for row in self._rows]).to(z_BD.dtype)
        tokens: list[dict[int, list[int]]] = [{} for _ in self._rows]
        probs: list[dict[int, Tensor | None]] = [{} for _ in self._rows]
        z_BED, inner = z_BD[:, None], tree.inner(0)
        drafted = _Drafted(self._slots, tree)
        for level in range(tree.depth):
            if level:
                above, inner = inner, tree.inner(level)
                z_BED = self._extend(drafted, z_BED, above, inner, tokens, level)
            hidden_BED = last_BD[:, None].expand_as(z_BED)
            logits_RV = self._draft.score(hidden_BED.flatten(0, 1), z_BED.flatten(0, 1), level, self._target)
            counts = [len(tree.children[node]) for node in inner] * len(self._rows)
            candidates, drawn_from = self._sampler.pick(logits_RV, counts)
            for index in range(len(self._rows)):
                own = slice(index * len(inner), (index + 1) * len(inner))
                tokens[index].update(zip(inner, candidates[own], strict=True))
                probs[index].update(zip(inner, drawn_from[own], strict=True))
        if drafted.rows:
            self._cache.crop(-drafted.rows)
        return [
            tree.fill(self._ids[row][-1], tokens[index].__getitem__, probs[index].__getitem__)
            for index, row in enumerate(self._rows)
        ]

    def _extend(
        self,
        drafted: _Drafted,
        z_BED: Tensor,
        above: list[int],
        inner: list[int],
        tokens: list[dict[int, list[int]]],
        level: int,
    ) -> Tensor:
        """Return the estimates [B, E, D] at the nodes `inner` of a level.

        F reads the estimates `z_BED` at the nodes `above` and the tri-grams of the nodes `inner`.
        """
        rows, tree = len(self._rows), drafted.tree
        u_BED = self._embed(
            [_trigram(self._ids[row], tree, node, tokens[i]) for i, row in enumerate(self._rows) for node in inner]
        ).unflatten(0, (rows, len(inner)))
        root_B = torch.tensor([len(self._ids[row]) - 1 for row in self._rows], device=self._device)
        ahead_N = torch.tensor([level - 1] * len(above) + [level] * len(inner), device=self._device)
        positions_BN = root_B[:, None] + ahead_N
        visible_BNK, positions_BK = drafted.visible(above, inner, positions_BN)
        visible_BNK = self._draft.in_window(visible_BNK, positions_BN, positions_BK)
        rows_BND = torch.cat([z_BED, u_BED], 1)
        encoded_BND = self._draft.encode(self._parts, rows_BND, positions_BN, visible_BNK, self._cache)
        if self._draft.layer is not None:
            drafted.rows += len(above) + len(inner)
        return encoded_BND[:, len(above) :]


def _trigram(ids: Sequence[int], tree: StaticTree, node: int, tokens: dict[int, list[int]]) -> tuple[int, int, int]:
    """Return the tri-gram of a drafted node: its token and the two before it on its branch."""
    branch: list[int] = []
    while node > 0:
        parent, rank = tree.parents[node], tree.paths[node][-1]
        # Under sampling a node may have fewer candidates than the tree has room for; its subtree is left out later.
        branch.append(tokens[parent][rank] if rank < len(tokens[parent]) else tokens[parent][0])
        node = parent
    a, b, c = [*ids[-2:], *reversed(branch)][-3:]
    return a, b, c


class _Slots:
    """Positions of the slots of F's cache, and which are real and which hold hidden states, row by row."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.positions_BK = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self.real_BK = torch.zeros((rows, 0), dtype=torch.bool, device=device)
        self.hidden_BK = torch.zeros((rows, 0), dtype=torch.bool, device=device)

    def select(self, kept: list[int]) -> None:
        """Keep some rows only."""
        self.positions_BK, self.real_BK = self.positions_BK[kept], self.real_BK[kept]
        self.hidden_BK = self.hidden_BK[kept]

    def append(self, positions_BN: Tensor, real_BN: Tensor, hidden_BN: Tensor) -> None:
        """Add slots."""
        self.positions_BK = torch.cat([self.positions_BK, positions_BN], 1)
        self.real_BK = torch.cat([self.real_BK, real_BN], 1)
        self.hidden_BK = torch.cat([self.hidden_BK, hidden_BN], 1)


class _Drafted:
    """Slots that a tree's levels add after the kept ones, until the tree is complete."""

    def __init__(self, slots: _Slots, tree: StaticTree) -> None:
        self.tree = tree
        self.rows = 0
        self._hidden_BK = slots.hidden_BK
        self._positions_BK = slots.positions_BK
        self._estimates: dict[int, int] = {}  # slot of the estimate at each node

    def visible(self, above: list[int], inner: list[int], positions_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the rows of a level see [B, N, K], and the positions of all slots [B, K].

        A node sees its row's hidden states, the estimates on its own branch, and itself; an estimate sees only itself.
        """
        rows, kept = self._hidden_BK.shape
        offset = self._positions_BK.shape[1]
        count = len(above) + len(inner)
        self._estimates |= {node: offset + at for at, node in enumerate(above)}
        self._positions_BK = torch.cat([self._positions_BK, positions_BN], 1)
        visible_BNK = torch.zeros((rows, count, offset + count), dtype=torch.bool, device=positions_BN.device)
        visible_BNK[:, :, offset:] = torch.eye(count, dtype=torch.bool, device=positions_BN.device)
        for at, node in enumerate(inner, len(above)):
            visible_BNK[:, at, :kept] = self._hidden_BK
            while node > 0:
                node = self.tree.parents[node]
                visible_BNK[:, at, self._estimates[node]] = True
        return visible_BNK, self._positions_BK
