"""The logarithmic variant: the binary expansion of a position partitions everything before it into blocks.

Position i reads itself and, for each bit l that is set in i, the block of 2^l positions that ends where the remaining
lower bits begin: 5 reads {4} and {0..3}; 11 reads {10}, {8, 9} and {0..7}. While tokens are appended, the blocks count
like a binary counter: those that position i reads are those that are complete and not yet part of a larger one.

Dimension letters: B batch rows, H query heads, L positions, N blocks of a level, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.methods.attention.combiner.functional import (
    Pool,
    attend,
    joint_attention,
    merged,
    part,
    pooled,
    softmax,
)
from intaglio.methods.attention.combiner.grid import Activate, Tensors, Tokens

GROWTH = 64
"""Positions by which the stored keys and values grow."""


@dataclass
class BlockState:
    """State of earlier tokens during generation.

    Args:
        length: tokens of each batch row, int64 [B].
        blocks: `query` and `pooled_key`, pools over the latest complete block of each level, and its `key` and
            `value`, [B, H, levels, D].
        key: keys of all tokens, which larger blocks will need, [B, G, at least L, D].
        value: values, in the same way.
    """

    length: Tensor
    blocks: Tensors
    key: Tensor
    value: Tensor


class Logn:
    """Itself, and one span for each bit of the position.

        k_S = max_{j in S} k_j,   q_S = max_{j in S} q_j,   v_S = Σ_j softmax_j(q_S · k_j) v_j

    Blocks of one token have its own key and value. Blocks at the end of a level without a reader are left out.
    """

    def __init__(self, pool: Pool, size_bias: bool) -> None:
        self.pool, self.size_bias = pool, size_bias

    def levels(self, x: Tokens, count: int) -> list[Tensors]:
        """Return for each level the pools, keys and values of its complete blocks, [B, H, N, D]."""
        query, pooled_key = x.pooled_query, x.pooled_key
        levels = [{"query": query, "pooled_key": pooled_key, "key": x.key, "value": x.value}]
        everything = torch.ones((), dtype=torch.bool, device=query.device)
        for level in range(1, count):
            blocks = (query.shape[2] // 2, 2)
            query, pooled_key = (
                pooled(half[:, :, : 2 * blocks[0]].unflatten(2, blocks), 3, self.pool) for half in (query, pooled_key)
            )
            shape = (blocks[0], 1 << level)
            key, value = (known[:, :, : blocks[0] << level].unflatten(2, shape) for known in (x.key, x.value))
            spans = attend(part("row", query[:, :, :, None], key, value, everything, dropout=x.dropout))
            levels.append({"query": query, "pooled_key": pooled_key, "key": pooled_key, "value": spans[:, :, :, 0]})
        return levels

    def parallel(self, x: Tokens, keep: bool = False) -> tuple[Tensor, BlockState | None]:
        """Return the outputs [B, H, L, D] of a sequence, and with `keep` the state after it."""
        length, device = x.query.shape[2], x.query.device
        read = (length - 1).bit_length()
        # The next position may read one level more.
        levels = self.levels(x, max(read, length.bit_length()) if keep else read)
        position = torch.arange(length, device=device)
        scores = [(x.query * x.key).sum(-1)]
        for level in range(read):
            key = _for_readers(levels[level]["key"], level, length)
            score = (x.query[:, :, 1 << level :] * key).sum(-1)
            score = score + level * math.log(2) if self.size_bias else score
            unread = (position[1 << level :] >> level) % 2 == 0
            least = torch.finfo(score.dtype).min
            scores.append(F.pad(score.masked_fill(unread, least), (1 << level, 0), value=least))
        weights = softmax(torch.stack(scores, -1))[..., None]
        output = weights[..., 0, :] * x.value
        for level in range(read):
            value = _for_readers(levels[level]["value"], level, length)
            output = output + F.pad(weights[:, :, 1 << level :, level + 1] * value, (0, 0, 1 << level, 0))
        return output, self._state(x, levels) if keep else None

    @staticmethod
    def _state(x: Tokens, levels: list[Tensors]) -> BlockState:
        count = x.real.sum(-1).expand(len(x.query)).clone()
        batch = torch.arange(len(count), device=count.device)
        blocks = {}
        for name in levels[0]:
            latest = [known[name][batch, :, ((count >> level) - 1).clamp(min=0)] for level, known in enumerate(levels)]
            blocks[name] = torch.stack(latest, 2).detach()
        key, value = (known[:, :: x.groups].detach().clone() for known in (x.key, x.value))
        return BlockState(count, blocks, key, value)

    def step(self, x: Tokens, state: BlockState, activate: Activate) -> Tensor:
        """Return the outputs [B, H, 1, D] of one token in each batch row, and add the real ones to the state.

        Args:
            x: one token, [B, H, 1, D]; those that are padding change nothing.
            state: changed in place.
            activate: ignored; the pools of the token are in `x`.
        """
        everything = torch.ones((), dtype=torch.bool, device=x.query.device)
        query, key, value = (known[:, :, None] for known in (x.query, x.key, x.value))
        level = torch.arange(state.blocks["key"].shape[2], device=query.device)
        set_bits = ((state.length[:, None] >> level) % 2 == 1)[:, None, None, None]
        keys, values = (state.blocks[name][:, :, None] for name in ("key", "value"))
        parts = [part("row", query, key, value, everything), part("row", query, keys, values, set_bits, 1 << level)]
        output = joint_attention(parts, self.size_bias)
        alive = x.real.expand(len(query), 1)[:, 0].nonzero()[:, 0]
        self._append(x, state, alive)
        # Merged as in a binary counter: as many levels as the position ends with ones.
        trailing = ((state.length + 1) & ~state.length).float().log2().long()[alive]
        for count in trailing.unique().tolist():
            self._carry(x, state, alive[trailing == count], count)
        state.length[alive] += 1
        return output[:, :, 0]

    @staticmethod
    def _append(x: Tokens, state: BlockState, alive: Tensor) -> None:
        """Store the keys and values of new tokens."""
        for name in ("key", "value"):
            kept = getattr(state, name)
            if int(state.length.max()) >= kept.shape[2]:
                kept = F.pad(kept, (0, 0, 0, GROWTH))
                setattr(state, name, kept)
            kept[alive, :, state.length[alive]] = getattr(x, name)[alive, :: x.groups, 0]

    def _carry(self, x: Tokens, state: BlockState, rows: Tensor, level: int) -> None:
        """Store the block of 2^level tokens that the new tokens of some batch rows complete."""
        new = {"query": x.pooled_query[rows, :, 0], "pooled_key": x.pooled_key[rows, :, 0]}
        for lower in range(level):
            new = {name: merged(state.blocks[name][rows, :, lower], value, self.pool) for name, value in new.items()}
        if level:
            first = state.length[rows, None] + 1 - (1 << level)
            places = first + torch.arange(1 << level, device=rows.device)
            key, value = (
                known[rows[:, None], :, places].transpose(1, 2).repeat_interleave(x.groups, 1)[:, :, None]
                for known in (state.key, state.value)
            )
            everything = torch.ones((), dtype=torch.bool, device=rows.device)
            value = attend(part("row", new["query"][:, :, None, None], key, value, everything))[:, :, 0, 0]
            new |= {"key": new["pooled_key"], "value": value}
        else:
            new |= {"key": x.key[rows, :, 0], "value": x.value[rows, :, 0]}
        for name, value in new.items():
            if level >= state.blocks[name].shape[2]:
                state.blocks[name] = F.pad(state.blocks[name], (0, 0, 0, 1))
            state.blocks[name][rows, :, level] = value


def _for_readers(blocks: Tensor, level: int, length: int) -> Tensor:
    """Return for each position from 2^level on the block before its own, [B, H, L - 2^level, D]."""
    return blocks.repeat_interleave(1 << level, 2)[:, :, : length - (1 << level)]
