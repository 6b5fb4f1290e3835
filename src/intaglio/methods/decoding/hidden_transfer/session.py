"""Drafting inside the target's pass: every pass over a tree carries the pseudo states of its nodes along.

Dimension letters: B rows, Q nodes, S owners (nodes that have pseudo states), K slots, D width, V vocabulary, k steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intaglio.methods.decoding.hidden_transfer.heads import (
    TransferHeads,
    block_inputs,
    pseudo_positions,
    pseudo_visible,
)
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.partial_pass import BlockInputs, after_blocks, run_block
from intaglio.speculative.cache import drop_last
from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.protocols import DecodingRun, Step, TreePass
from intaglio.speculative.static_tree import StaticTree
from intaglio.speculative.target_model import CachedModel, Inputs
from intaglio.speculative.tree import TokenTree, root_only


def deepest_path(tree: TokenTree) -> list[int]:
    """Return the nodes of the path to the first of the deepest nodes, the root first."""
    return tree.path(tree.depths.index(max(tree.depths)))


class HiddenTransferSession:
    """A session that makes the target's passes and drafts in them; a `ForwardSession`.

    Args:
        heads: on the target's device.
        run: the run.
        sampler: takes candidates.
        tree: the static tree.
        path_only: whether only the nodes of the deepest path have pseudo states.
    """

    def __init__(
        self, heads: TransferHeads, run: DecodingRun, sampler: CandidateSampler, tree: StaticTree, path_only: bool
    ) -> None:
        self._heads, self._sampler, self._tree, self._path_only = heads, sampler, tree, path_only
        self._parts: Anatomy = anatomy(run.model)
        self._last: dict[int, int] = {}
        self._owners: list[list[int]] = []
        self._pseudo: Tensor | None = None  # [B, k, S, D] of the last pass, after the last block
        self._drafts: dict[int, Tensor] = {}  # by row: [k, D]

    def observe(self, steps: Sequence[Step]) -> None:
        """Keep the pseudo states of each row's last accepted node, if it has any."""
        self._drafts = {}
        for index, step in enumerate(steps):
            self._last[step.row] = step.tokens[-1]
            if step.tree is None or step.done or self._pseudo is None:  # the last after a pass without drafts
                continue
            node = step.path[-1]
            if node in self._owners[index]:
                self._drafts[step.row] = self._pseudo[index, :, self._owners[index].index(node)]
        self._pseudo = None

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """See `Session.propose`; the root alone where there is nothing to draft from."""
        rooms = dict(zip(rows, room, strict=True))
        drafting = [row for row in rows if rooms[row] and row in self._drafts]
        trees = {row: root_only(self._last[row]) for row in rows}
        if drafting:
            states_RkD = torch.stack([self._drafts[row] for row in drafting])
            logits_RkV = self._heads.score(self._parts, states_RkD.flatten(0, 1)).unflatten(0, states_RkD.shape[:2])
            for row, logits_kV in zip(drafting, logits_RkV, strict=True):
                trees[row] = self._sampler.cartesian(self._last[row], logits_kV, self._tree, rooms[row])
        return [trees[row] for row in rows]

    def forward(self, call: TreePass) -> Tensor:
        """See `ForwardSession.forward`."""
        self._owners = [deepest_path(tree) if self._path_only else list(range(len(tree))) for tree in call.trees]
        hidden_BQD, self._pseudo = run_with_pseudo_states(
            self._parts, self._heads, call.cached, call.inputs, self._owners
        )
        rows, nodes = hidden_BQD.shape[:2]
        return after_blocks(self._parts, hidden_BQD.flatten(0, 1)).view(rows, nodes, -1)


def run_with_pseudo_states(
    parts: Anatomy, heads: TransferHeads, cached: CachedModel, inputs: Inputs, owners: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Run the blocks over the nodes, and over pseudo states from their transfer layers on.

    The cache is left with the nodes' rows alone.

    Args:
        parts: of the target.
        heads: the maps.
        cached: the target's cache.
        inputs: of the pass.
        owners: the nodes of each row that have pseudo states.

    Returns:
        after the last block, the nodes' states [B, Q, D] and the pseudo states [B, k, S, D].
    """
    blocks, device = len(parts.blocks), inputs.tokens_BQ.device
    most = max(map(len, owners))
    # Rows with fewer owners repeat their first, which costs a row and changes nothing.
    owner_BS = torch.tensor([[*own, *[own[0]] * (most - len(own))] for own in owners], device=device)
    stages = _stages(parts, heads, cached, inputs, owner_BS)
    hidden_BND = stages[0].hidden_BLD
    nodes, width = hidden_BND.shape[1:]
    index_BSD = owner_BS[:, :, None].expand(-1, -1, width)
    for index in range(blocks + 1):
        for step, layer in enumerate(heads.layers):
            if layer == index:
                new_BSD = heads.transfer(step, hidden_BND[:, :nodes].gather(1, index_BSD))
                hidden_BND = torch.cat([hidden_BND, new_BSD], 1)
        if index < blocks:
            count = heads.present(index)
            hidden_BND = run_block(parts.blocks[index], index, hidden_BND, stages[count])
            drop_last(cached.cache.layers[index : index + 1], count * most)
    real_BQD, pseudo_BND = hidden_BND[:, :nodes], hidden_BND[:, nodes:]
    return real_BQD, pseudo_BND.unflatten(1, (heads.steps, most))


def _stages(
    parts: Anatomy, heads: TransferHeads, cached: CachedModel, inputs: Inputs, owner_BS: Tensor
) -> dict[int, BlockInputs]:
    """Return the inputs of the blocks by the number of steps present, before any block changes the cache."""
    visible_BQK, positions_BQ = inputs.visible_BQK, inputs.positions_BQ
    slots = visible_BQK.shape[-1]
    seen_BSK = visible_BQK.gather(1, owner_BS[:, :, None].expand(-1, -1, slots))
    stages = {0: block_inputs(parts, cached, inputs.tokens_BQ, positions_BQ, inputs.mask)}
    for count in sorted({heads.present(index) for index in range(len(parts.blocks))} - {0}):
        pseudo_BNK = pseudo_visible(seen_BSK, count)
        blind = pseudo_BNK.new_zeros((*visible_BQK.shape[:2], pseudo_BNK.shape[1]))
        visible_BNK = torch.cat([torch.cat([visible_BQK, blind], -1), pseudo_BNK], 1)
        positions_BN = torch.cat([positions_BQ, pseudo_positions(positions_BQ.gather(1, owner_BS), count, cached)], 1)
        mask = cached.masks(visible_BNK, positions_BN)
        stages[count] = block_inputs(parts, cached, torch.zeros_like(positions_BN), positions_BN, mask)
    return stages
