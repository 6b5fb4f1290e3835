"""Chimera at work: F's cache over hidden states and tri-grams, and a tree drafted level by level.

F's cache is kept by slots: rows of different lengths leave slots that nobody sees. Slots hold hidden states (H), the
tri-grams of tokens that are read (U), and while a tree is drafted what stands in for hidden states that are missing.

Dimension letters: B rows, N rows of F, K slots, E nodes that are expanded, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from intaglio.methods.decoding.chimera.drafting import Draft, edges
from intaglio.modeling.anatomy import anatomy
from intaglio.speculative.heads.static_tree import Path, Picker, Shape
from intaglio.speculative.protocols import Run, Step
from intaglio.speculative.tree import TokenTree, root_only

REMEMBERED = 4096
"""Tri-grams whose encoding is kept."""


class Branches:
    """A session over all rows.

    Args:
        draft: the modules, on the target's device.
        run: the run.
        picker: takes candidates.
        shape: the static tree.
    """

    def __init__(self, draft: Draft, run: Run, picker: Picker, shape: Shape) -> None:
        self._draft, self._picker, self._shape = draft, picker, shape
        self._parts = anatomy(run.model)
        self._weight_VD: Tensor = run.model.get_output_embeddings().weight
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
        """Take in the true hidden states and the tokens behind them.

        Args:
            steps: of the pass.
        """
        for step in steps:
            assert step.hidden is not None
            if step.done:
                continue
            self._ids[step.row] += step.tokens
            self._unread[step.row].append(step.hidden)
            self._last[step.row] = step.hidden[-1]

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """One tree a row.

        Args:
            rows: indices.
            room: most drafted tokens of each.
        """
        if list(rows) != self._rows:
            kept = [place for place, row in enumerate(self._rows) if row in rows]
            self._slots.select(kept)
            if self._cache.get_seq_length():
                self._cache.batch_select_indices(torch.tensor(kept, device=self._device))
            self._rows = list(rows)
        levels = min(self._shape.depth, max(room))
        if levels < 1:
            return [root_only(self._ids[row][-1]) for row in rows]
        return self._grow(self._read(), self._shape.cut(levels))

    def _u(self, triples: Sequence[tuple[int, int, int]]) -> Tensor:
        """Encoded tri-grams [N, D]; what was encoded lately is remembered."""
        missing = [triple for triple in dict.fromkeys(triples) if triple not in self._encoded]
        if missing:
            found = self._draft.embed(self._parts, torch.tensor(missing, device=self._device))
            if len(self._encoded) + len(missing) > REMEMBERED:
                kept = {triple: self._encoded[triple] for triple in triples if triple in self._encoded}
                self._encoded.clear()
                self._encoded.update(kept)
            self._encoded.update(zip(missing, found, strict=True))
        return torch.stack([self._encoded[triple] for triple in triples])

    def _read(self) -> Tensor:
        """Let F read what is new of every row: hidden states, and the tri-grams of the tokens behind them. Returns the
        estimate z of each row's next hidden state [B, D]."""
        new = [torch.cat(self._unread[row]) for row in self._rows]
        most, width = max(map(len, new)), new[0].shape[-1]
        dtype = self._draft.trigram.down.weight.dtype
        rows_BND = torch.zeros((len(new), 2 * most, width), dtype=dtype, device=self._device)
        positions_BN = torch.zeros((len(new), 2 * most), dtype=torch.long, device=self._device)
        real_BN = torch.zeros((len(new), 2 * most), dtype=torch.bool, device=self._device)
        for place, (row, hidden_ND) in enumerate(zip(self._rows, new, strict=True)):
            ids, count = self._ids[row], len(hidden_ND)
            first = len(ids) - 1 - count  # the last token has no hidden state yet
            rows_BND[place, :count] = hidden_ND.to(dtype)
            positions_BN[place, :count] = torch.arange(first, first + count, device=self._device)
            # On the right: so the newest tri-gram stands last in every row.
            rows_BND[place, -count:] = self._u([edges(ids, at) for at in range(first + 1, len(ids))])
            positions_BN[place, -count:] = torch.arange(first + 1, len(ids), device=self._device)
            real_BN[place, :count] = real_BN[place, -count:] = True
            self._unread[row] = []
        slots = self._slots.with_rows(positions_BN)
        visible_BNK = slots.only_self(2 * most)
        # Only the newest row's output is read, and it sees all that is real.
        visible_BNK[:, -1] = torch.cat([self._slots.real_BK, real_BN], 1)
        visible_BNK = self._draft.in_window(visible_BNK, positions_BN, slots.positions_BK)
        found_BND = self._draft.encode(self._parts, rows_BND, positions_BN, visible_BNK, self._cache)
        is_hidden = torch.arange(2 * most, device=self._device) < most
        self._slots.keep(positions_BN, real_BN, real_BN & is_hidden)
        return found_BND[:, -1]

    def _grow(self, z_BD: Tensor, shape: Shape) -> list[TokenTree]:
        """The trees, a level at a time."""
        last_BD = torch.stack([self._last[row] for row in self._rows]).to(z_BD.dtype)
        tokens: list[dict[Path, list[int]]] = [{} for _ in self._rows]
        laws: list[dict[Path, Tensor | None]] = [{} for _ in self._rows]
        z_BED, inner = z_BD[:, None], shape.inner(0)
        drafted = _Drafted(self._slots)
        for level in range(shape.depth):
            if level:
                before = inner
                inner = shape.inner(level)
                z_BED = self._extend(drafted, z_BED, before, inner, tokens, level)
            hidden_BED = last_BD[:, None].expand_as(z_BED)
            logits_RV = self._draft.score(hidden_BED.flatten(0, 1), z_BED.flatten(0, 1), level, self._weight_VD)
            counts = [shape.children[path] for path in inner] * len(self._rows)
            found, drawn_from = self._picker.pick(logits_RV, counts)
            for place in range(len(self._rows)):
                for at, path in enumerate(inner):
                    tokens[place][path] = found[place * len(inner) + at]
                    laws[place][path] = drawn_from[place * len(inner) + at]
        if drafted.rows:
            self._cache.crop(-drafted.rows)
        return [
            shape.build(self._ids[row][-1], tokens[place].__getitem__, laws[place].__getitem__)
            for place, row in enumerate(self._rows)
        ]

    def _extend(
        self,
        drafted: _Drafted,
        z_BED: Tensor,
        before: list[Path],
        inner: list[Path],
        tokens: list[dict[Path, list[int]]],
        level: int,
    ) -> Tensor:
        """The estimates [B, E, D] at the nodes `inner`: F reads the estimates `z_BED` of the level above, at the nodes
        `before`, and the tri-grams of the nodes."""
        rows, count = len(self._rows), len(before) + len(inner)
        u_BED = self._u(
            [_triple(self._ids[row], path, tokens[place]) for place, row in enumerate(self._rows) for path in inner]
        ).unflatten(0, (rows, len(inner)))
        root_B = torch.tensor([len(self._ids[row]) - 1 for row in self._rows], device=self._device)
        ahead_N = torch.tensor([level - 1] * len(before) + [level] * len(inner), device=self._device)
        positions_BN = root_B[:, None] + ahead_N
        visible_BNK, slots_BK = drafted.see(before, inner, positions_BN)
        visible_BNK = self._draft.in_window(visible_BNK, positions_BN, slots_BK)
        rows_BND = torch.cat([z_BED, u_BED], 1)
        found_BND = self._draft.encode(self._parts, rows_BND, positions_BN, visible_BNK, self._cache)
        if self._draft.layer is not None:
            drafted.rows += count
        return found_BND[:, len(before) :]


def _triple(ids: Sequence[int], path: Path, tokens: dict[Path, list[int]]) -> tuple[int, int, int]:
    """The tri-gram of a drafted node: its token and the two before it on its branch."""
    branch = list(ids[-2:])
    for depth, rank in enumerate(path):
        candidates = tokens[path[:depth]]
        # Under sampling a law may give fewer candidates than the tree has room for; what hangs on them is left out.
        branch.append(candidates[rank] if rank < len(candidates) else candidates[0])
    a, b, c = branch[-3:]
    return a, b, c


class _Slots:
    """Which slots of F's cache are real, which hold hidden states, and their positions, row by row."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.positions_BK = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self.real_BK = torch.zeros((rows, 0), dtype=torch.bool, device=device)
        self.hidden_BK = torch.zeros((rows, 0), dtype=torch.bool, device=device)

    def select(self, kept: Sequence[int]) -> None:
        """Go on with some rows only."""
        self.positions_BK = self.positions_BK[list(kept)]
        self.real_BK = self.real_BK[list(kept)]
        self.hidden_BK = self.hidden_BK[list(kept)]

    def with_rows(self, positions_BN: Tensor) -> _Slots:
        """The slots and new ones behind them, of which nothing is said yet but their positions."""
        found = _Slots(0, positions_BN.device)
        found.positions_BK = torch.cat([self.positions_BK, positions_BN], 1)
        return found

    def only_self(self, new: int) -> Tensor:
        """Visibility [B, N, K] in which each of the last `new` slots sees itself alone."""
        rows, slots = self.positions_BK.shape
        seen_NK = torch.eye(slots, dtype=torch.bool, device=self.positions_BK.device)[-new:]
        return seen_NK[None].repeat(rows, 1, 1)

    def keep(self, positions_BN: Tensor, real_BN: Tensor, hidden_BN: Tensor) -> None:
        """Add slots."""
        self.positions_BK = torch.cat([self.positions_BK, positions_BN], 1)
        self.real_BK = torch.cat([self.real_BK, real_BN], 1)
        self.hidden_BK = torch.cat([self.hidden_BK, hidden_BN], 1)


class _Drafted:
    """The slots that a tree's levels have added behind the kept ones, which go again when the tree is there."""

    def __init__(self, slots: _Slots) -> None:
        self._hidden_BK = slots.hidden_BK
        self._positions_BK = slots.positions_BK
        self._stand_ins: dict[Path, int] = {}
        self.rows = 0

    def see(self, before: list[Path], inner: list[Path], positions_BN: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows of a level see [B, N, K], and the positions of all slots [B, K]: a node its row's hidden
        states, the estimates on its own branch, and itself; an estimate itself alone."""
        rows, kept = self._hidden_BK.shape
        offset = self._positions_BK.shape[1]
        count = len(before) + len(inner)
        self._stand_ins |= {path: offset + at for at, path in enumerate(before)}
        self._positions_BK = torch.cat([self._positions_BK, positions_BN], 1)
        visible_BNK = torch.zeros((rows, count, offset + count), dtype=torch.bool, device=positions_BN.device)
        visible_BNK[:, :, offset:] = torch.eye(count, dtype=torch.bool, device=positions_BN.device)
        for at, path in enumerate(inner, len(before)):
            visible_BNK[:, at, :kept] = self._hidden_BK
            visible_BNK[:, at, [self._stand_ins[path[:depth]] for depth in range(len(path))]] = True
        return visible_BNK, self._positions_BK
