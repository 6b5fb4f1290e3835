"""Cache policies: which keys a decoded token reads (Quest, baselines), and which are kept (SnapKV, Ada-SnapKV).

A `SparseLayer` replaces a layer of a `DynamicCache`. Each row of a batch is a `SequenceCache` without padding, so that
rows of any length share a batch. Positions count from the uncompressed length.

Dimension letters: N tokens of a sequence, Q new tokens, H query heads, G key-value heads, D width of a head, W last
queries, P tokens of a page, U units (pages, or single rows) of a sequence, K kept or selected units.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from intaglio.errors import IntaglioError
from intaglio.methods.attention.sparse_frontier.prefill import Count, FrozenSettings, check_budget, draws, last_weights
from intaglio.methods.attention.sparse_frontier.tiled_attention import Meter

ROOM = 64
"""Fewest spare rows of a buffer."""


class HeadBuffer:
    """Keys and values of key-value heads that hold equally many rows, in preallocated memory.

    Args:
        key_GND: first rows.
        value_GND: their values.
        unit: the capacity is a multiple of it.
    """

    def __init__(self, key_GND: Tensor, value_GND: Tensor, unit: int = 1) -> None:
        self.unit, self.length = unit, 0
        self.keys, self.values = key_GND[:, :0], value_GND[:, :0]
        self.append(key_GND, value_GND)

    def append(self, key_GQD: Tensor, value_GQD: Tensor) -> None:
        """Add rows to every head."""
        before, self.length = self.length, self.length + key_GQD.shape[1]
        if self.length > self.keys.shape[1]:
            capacity = self.length + max(ROOM, self.length // 16)
            capacity += -capacity % self.unit
            for name, states in (("keys", key_GQD), ("values", value_GQD)):
                grown = states.new_empty((len(states), capacity, states.shape[-1]))
                grown[:, :before] = getattr(self, name)[:, :before]
                setattr(self, name, grown)
        self.keys[:, before : self.length] = key_GQD
        self.values[:, before : self.length] = value_GQD

    @property
    def bytes(self) -> int:
        """Memory of the buffer."""
        return self.keys.nbytes + self.values.nbytes


class SequenceCache:
    """The cached keys and values of one layer and one sequence.

    Heads of equal lengths share a buffer; otherwise each has its own, as long as what it keeps.

    Args:
        policy: decides what is kept and read.
        query_HND: queries of the prompt after rotary embedding; the last ones score the keys.
        key_GND: its keys.
        value_GND: its values.
        scale: factor of the scores.
        layer: index of the layer.

    Attributes:
        seen: tokens so far, dropped ones counted.
        prompt: tokens of the prompt.
        kept: positions of the prompt that each key-value head kept; None for all.
        extremes: minimum and maximum of the keys of each complete page, [G, U, D] each (Quest).
        selected: units that the last token read; None for all.
    """

    def __init__(
        self, policy: Policy, query_HND: Tensor, key_GND: Tensor, value_GND: Tensor, scale: float, layer: int
    ) -> None:
        self.policy, self.scale, self.layer = policy, scale, layer
        self.seen = self.prompt = key_GND.shape[1]
        self.extremes: tuple[Tensor, Tensor] | None = None
        self.selected: Tensor | None = None
        self.kept = policy.keep(query_HND, key_GND, scale)
        unit = policy.unit
        if self.kept is None:
            self.buffers = [HeadBuffer(key_GND, value_GND, unit)]
        elif len(set(map(len, self.kept))) == 1:
            index_GK = torch.stack(self.kept)
            heads = torch.arange(len(index_GK), device=index_GK.device)[:, None]
            self.buffers = [HeadBuffer(key_GND[heads, index_GK], value_GND[heads, index_GK], unit)]
        else:
            self.buffers = [
                HeadBuffer(key_GND[head : head + 1, index], value_GND[head : head + 1, index], unit)
                for head, index in enumerate(self.kept)
            ]
        policy.observe(self)

    @property
    def lengths(self) -> list[int]:
        """Rows held by each key-value head."""
        return [buffer.length for buffer in self.buffers for _ in range(len(buffer.keys))]

    def visible_keys(self) -> Tensor:
        """Return which tokens the last one read, or the next will read of those seen so far, bool [G or H, N]."""
        if self.selected is not None:
            seen = torch.zeros((len(self.selected), -(-self.seen // self.policy.unit)), dtype=torch.bool)
            seen.scatter_(1, self.selected.cpu(), True)
            return seen.repeat_interleave(self.policy.unit, 1)[:, : self.seen]
        seen = torch.ones((len(self.lengths), self.seen), dtype=torch.bool)
        if self.kept is not None:
            seen[:, : self.prompt] = False
            for head, index in enumerate(self.kept):
                seen[head, index.cpu()] = True
        return seen

    @property
    def bytes(self) -> int:
        """Memory of keys, values, positions and page statistics."""
        others = (*(self.extremes or ()), *(self.kept or ()))
        return sum(buffer.bytes for buffer in self.buffers) + sum(each.nbytes for each in others)

    def attend(self, query_HQD: Tensor, key_GQD: Tensor, value_GQD: Tensor, meter: Meter | None = None) -> Tensor:
        """Add new tokens and return their attention [H, Q, D]; each token reads what the policy selects for it."""
        if self.policy.selects and query_HQD.shape[1] > 1:
            tokens = zip(query_HQD.split(1, 1), key_GQD.split(1, 1), value_GQD.split(1, 1), strict=True)
            outputs = [self._attend(*token, meter) for token in tokens]
            return torch.cat(outputs, 1)
        return self._attend(query_HQD, key_GQD, value_GQD, meter)

    def _attend(self, query_HQD: Tensor, key_GQD: Tensor, value_GQD: Tensor, meter: Meter | None) -> Tensor:
        new, groups = key_GQD.shape[1], len(key_GQD)
        self.seen += new
        first = 0
        for buffer in self.buffers:
            last = first + len(buffer.keys)
            buffer.append(key_GQD[first:last], value_GQD[first:last])
            first = last
        self.policy.observe(self)
        units = self.selected = self.policy.select(query_HQD[:, -1], self) if self.policy.selects else None
        if units is not None:
            keys, values = self._gather(units)
            states = [(keys, values)]
        else:
            states = [(b.keys[:, : b.length], b.values[:, : b.length]) for b in self.buffers]
        outputs, first = [], 0
        share = len(query_HQD) // (groups if units is None else len(units))  # query heads of a set of rows
        for keys, values in states:
            rows = keys.shape[1]
            query = query_HQD[first : first + share * len(keys)]
            first += len(query)
            mask = None
            if new > 1:
                mask = torch.ones(new, rows, dtype=torch.bool, device=keys.device).tril(rows - new).repeat(share, 1)
            # Four dimensions, for the fused kernel.
            attended = torch.nn.functional.scaled_dot_product_attention(
                query.reshape(1, len(keys), share * new, -1), keys[None], values[None], mask, scale=self.scale
            )
            outputs.append(attended.reshape(len(query), new, -1))
            if meter is not None:
                meter.decode_computed += len(query) * (rows * new - new * (new - 1) / 2)
        if meter is not None:
            meter.decode_pairs += len(query_HQD) * (self.seen * new - new * (new - 1) / 2)
        return torch.cat(outputs)

    def _gather(self, units_GK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of units for each key-value or query head; the last unit is the current one."""
        (buffer,) = self.buffers
        groups, capacity, _ = buffer.keys.shape
        unit, heads = buffer.unit, len(units_GK)
        base = torch.arange(heads, device=units_GK.device) * groups // heads * (capacity // unit)
        index = (units_GK + base[:, None]).flatten()
        rows = units_GK.shape[1] * unit - (-buffer.length % unit)

        def taken(storage: Tensor) -> Tensor:
            width = storage.shape[-1]
            picked = storage.view(-1, unit * width).index_select(0, index)
            return picked.view(heads, -1, width)[:, :rows]

        return taken(buffer.keys), taken(buffer.values)


class Policy(FrozenSettings):
    """Base of the cache policies.

    `selects`: each token reads a selection of the keys, all of which stay in memory. Others drop keys after the prompt.
    """

    selects: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Name of the policy."""
        return str(getattr(self, "name", type(self).__name__))

    @property
    def unit(self) -> int:
        """Rows that are selected together."""
        return 1

    def keep(self, query_HND: Tensor, key_GND: Tensor, scale: float) -> list[Tensor] | None:
        """Return the prompt's kept positions of each key-value head in order, int64 [K]; None keeps all."""
        return None

    def observe(self, sequence: SequenceCache) -> None:
        """Update statistics after rows were added."""

    def select(self, query_HD: Tensor, sequence: SequenceCache) -> Tensor | None:
        """Return the units that a token reads, the current one last, int64 [G, K] or [H, K]; None reads all."""
        raise NotImplementedError


class Quest(Policy):
    """Quest: each token reads the pages whose keys could score highest.

    With m and M the elementwise minimum and maximum of a page's keys,

        score(page) = sum_d max(q_d m_d, q_d M_d) >= max_{k in page} q k

    The best `budget / page_size` complete pages are read, and always the current one. All keys stay in memory, with an
    eighth more of the keys for the statistics at the default page size.

    Args:
        budget: tokens of the selected pages, a multiple of `page_size`. Default 1024.
        page_size: tokens of a page. Default 16.
        share_pages: sum the scores over the query heads of a key-value head, which share the selection. Default True.
    """

    selects: ClassVar[bool] = True

    name: Literal["quest"] = "quest"
    budget: Count = 1024
    page_size: Count = 16
    share_pages: bool = True

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        if self.budget % self.page_size:
            raise ValueError(
                f"budget is {self.budget}; a multiple of the page size, {self.page_size} tokens, is accepted"
            )
        return self

    @property
    def unit(self) -> int:
        """Tokens of a page."""
        return self.page_size

    def observe(self, sequence: SequenceCache) -> None:
        """Compute the extremes of pages that were completed."""
        (buffer,) = sequence.buffers
        done = 0 if sequence.extremes is None else sequence.extremes[0].shape[1]
        complete = buffer.length // self.page_size
        if complete == done:
            return
        new = buffer.keys[:, done * self.page_size : complete * self.page_size]
        pages = new.unflatten(1, (-1, self.page_size))
        extremes = pages.amin(2), pages.amax(2)
        if sequence.extremes is not None:
            extremes = tuple(torch.cat(pair, 1) for pair in zip(sequence.extremes, extremes, strict=True))  # type: ignore[assignment]
        sequence.extremes = extremes

    def scores(self, query_HD: Tensor, low_GUD: Tensor, high_GUD: Tensor) -> Tensor:
        """Return the score of each page for key-value heads (shared) or query heads, [G, U] or [H, U]."""
        query_GgD = query_HD.unflatten(0, (len(low_GUD), -1))
        if self.share_pages:  # the maximum is linear in the positive and in the negative part of q
            positive, negative = query_GgD.clamp(min=0).sum(1), query_GgD.clamp(max=0).sum(1)
            # Rows times matrices: on a CPU a batch of matrices times columns takes several times as long.
            return ((positive[:, None] @ high_GUD.mT) + (negative[:, None] @ low_GUD.mT))[:, 0]
        scores_GgU = query_GgD.clamp(min=0) @ high_GUD.mT + query_GgD.clamp(max=0) @ low_GUD.mT
        return scores_GgU.flatten(0, 1)

    def select(self, query_HD: Tensor, sequence: SequenceCache) -> Tensor | None:
        """Return the best complete pages before the current one, and that one."""
        current, count = (sequence.buffers[0].length - 1) // self.page_size, self.budget // self.page_size
        if current <= count:
            return None
        assert sequence.extremes is not None  # there are complete pages
        low_GUD, high_GUD = (extreme[:, :current] for extreme in sequence.extremes)
        best = self.scores(query_HD, low_GUD, high_GUD).topk(count, sorted=False).indices
        return torch.nn.functional.pad(best, (0, 1), value=current)


class _Compression(Policy):
    """Base of the policies that drop keys after a dense prompt by the attention of its last queries.

    Scores are average-pooled over neighbours; the first and the most recent tokens are always kept. The dropped keys
    are freed. New tokens are all kept.

    Args:
        budget: keys kept of each head, at least `sinks + recent`. Default 1024.
        num_queries: W. Default 256.
        kernel_size: odd width of the pooling. Default 21.
        sinks: first tokens that are always kept. Default 4.
        recent: last tokens of the prompt that are always kept. Default 128.
    """

    budget: Count = 1024
    num_queries: Count = 256
    kernel_size: Count = 21
    sinks: Annotated[int, Field(ge=0)] = 4
    recent: Annotated[int, Field(ge=0)] = 128

    @model_validator(mode="after")
    def _holds_the_forced(self) -> Self:
        check_budget(self.budget, self.sinks, self.recent)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; odd numbers are accepted")
        return self

    def importance(self, weights_gWN: Tensor) -> Tensor:
        """Return the score of each key from the weights of a key-value head's queries, [N]."""
        raise NotImplementedError

    def choose(self, scores_GN: Tensor) -> list[Tensor]:
        """Return the kept positions of each head, in order."""
        raise NotImplementedError

    def pooled(self, query_HND: Tensor, key_GND: Tensor, scale: float) -> Tensor:
        """Return the pooled scores, infinite where a token is always kept, [G, N]."""
        count = min(self.num_queries, query_HND.shape[1])
        weights = last_weights(query_HND, key_GND, count, scale)
        scores_GN = torch.stack([self.importance(weights_gWN) for weights_gWN in weights])
        # Infinite scores only after pooling, which would spread them.
        scores_GN = torch.nn.functional.avg_pool1d(scores_GN, self.kernel_size, 1, self.kernel_size // 2)
        scores_GN[:, : self.sinks] = torch.inf
        scores_GN[:, scores_GN.shape[1] - self.recent :] = torch.inf
        return scores_GN

    def keep(self, query_HND: Tensor, key_GND: Tensor, scale: float) -> list[Tensor] | None:
        """Keep the keys with the highest scores."""
        if key_GND.shape[1] <= self.budget:
            return None
        return self.choose(self.pooled(query_HND, key_GND, scale))


class SnapKV(_Compression):
    """SnapKV: each key-value head keeps the keys that the prompt's last queries attend to.

        score_j = mean over the group's query heads of sum_i S[i, j],  i among the last W queries

    The fields are those of the base.
    """

    name: Literal["snapkv"] = "snapkv"

    def importance(self, weights_gWN: Tensor) -> Tensor:
        """Return the sum over queries of the mean over heads."""
        return weights_gWN.mean(0).sum(0)

    def choose(self, scores_GN: Tensor) -> list[Tensor]:
        """Return the best positions of each head."""
        return list(scores_GN.topk(self.budget).indices.sort(-1).values)


class AdaSnapKV(_Compression):
    """Ada-SnapKV: heads share one budget, so that heads whose attention is spread keep more keys.

    Scores are maxima over queries and the group's heads, pooled as in SnapKV. Each head keeps its best
    `max(min_ratio budget, sinks + recent)`; the rest of the G `budget` keys are the best of all heads together.

    Args:
        min_ratio: least share of the budget that a head keeps. Default 0.2.
    """

    name: Literal["ada_snapkv"] = "ada_snapkv"
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2

    def importance(self, weights_gWN: Tensor) -> Tensor:
        """Return the maximum over queries and heads."""
        return weights_gWN.amax((0, 1))

    def choose(self, scores_GN: Tensor) -> list[Tensor]:
        """Return each head's own best positions and the best of the rest of all heads."""
        heads, _ = scores_GN.shape
        least = max(int(self.min_ratio * self.budget), self.sinks + self.recent)
        kept_GN = torch.zeros_like(scores_GN, dtype=torch.bool)
        kept_GN.scatter_(1, scores_GN.topk(least).indices, True)
        rest = scores_GN.masked_fill(kept_GN, -torch.inf).flatten().topk((self.budget - least) * heads).indices
        kept_GN.view(-1)[rest] = True
        return [kept_N.nonzero()[:, 0] for kept_N in kept_GN]


class SinkWindowPolicy(Policy):
    """Baseline: each token reads the first tokens and the most recent ones; all keys stay in memory.

    Args:
        budget: tokens read, at least `sinks + 1`. Default 1024.
        sinks: first tokens. Default 4.
    """

    selects: ClassVar[bool] = True

    name: Literal["sink_window"] = "sink_window"
    budget: Count = 1024
    sinks: Annotated[int, Field(ge=0)] = 4

    @model_validator(mode="after")
    def _holds_the_forced(self) -> Self:
        check_budget(self.budget, self.sinks, 1)
        return self

    def select(self, query_HD: Tensor, sequence: SequenceCache) -> Tensor | None:
        """Return the first and the last rows."""
        (buffer,) = sequence.buffers
        if buffer.length <= self.budget:
            return None
        row = torch.arange(self.budget, device=query_HD.device)
        return torch.where(row < self.sinks, row, row + buffer.length - self.budget).expand(len(buffer.keys), -1)


class RandomPolicy(Policy):
    """Baseline: each token reads random keys and itself, drawn anew for each token and head; all stay in memory.

    Args:
        budget: tokens read. Default 1024.
        seed: of the draws. Default 0.
    """

    selects: ClassVar[bool] = True

    name: Literal["random"] = "random"
    budget: Count = 1024
    seed: Annotated[int, Field(ge=0)] = 0

    def select(self, query_HD: Tensor, sequence: SequenceCache) -> Tensor | None:
        """Return random rows and the current one."""
        (buffer,) = sequence.buffers
        if buffer.length <= self.budget:
            return None
        scores_GN = draws(self.seed, sequence.layer, len(buffer.keys), buffer.length).to(query_HD.device)
        scores_GN[:, -1] = -1
        chosen = scores_GN.topk(self.budget).indices
        chosen[:, -1] = buffer.length - 1  # the lowest of the chosen ones makes room for the current token
        return chosen


class OraclePolicy(Policy):
    """Baseline: each token reads the keys with the most attention of its group; it takes all scores to know them.

    Args:
        budget: tokens read. Default 1024.
    """

    selects: ClassVar[bool] = True

    name: Literal["oracle"] = "oracle"
    budget: Count = 1024

    def select(self, query_HD: Tensor, sequence: SequenceCache) -> Tensor | None:
        """Return the rows with the highest summed attention weights."""
        (buffer,) = sequence.buffers
        if buffer.length <= self.budget:
            return None
        keys_GND = buffer.keys[:, : buffer.length]
        query_GgD = query_HD.unflatten(0, (len(keys_GND), -1))
        weights = ((query_GgD @ keys_GND.mT).float() * sequence.scale).softmax(-1).sum(1)
        return weights.topk(self.budget).indices


class SparseLayer(DynamicLayer):
    """A layer of a cache under a policy; `update` returns the new rows alone, and attention adds them to `sequences`.

    Args:
        policy: decides what is kept and read.
        layer: index of the layer.
    """

    is_croppable = False

    def __init__(self, policy: Policy, layer: int) -> None:
        super().__init__()
        self.policy, self.layer, self.seen = policy, layer, 0
        self.sequences: list[SequenceCache] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count new tokens; other arguments are ignored."""
        self.seen += key_states.shape[-2]
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the uncompressed length, from which positions count."""
        return self.seen

    def reset(self) -> None:
        """Forget all tokens."""
        self.seen, self.sequences, self.is_initialized = 0, [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens."""
        if tokens_to_remove:
            raise IntaglioError(
                f"a {self.policy.label} cache cannot take tokens back, as speculative decoding would need; "
                "decode one token at a time"
            )

    def _arrange(self, rows: Sequence[int]) -> None:
        """Continue with some rows, of which one may occur several times."""
        taken: set[int] = set()
        arranged = []
        for row in rows:
            arranged.append(deepcopy(self.sequences[row]) if row in taken else self.sequences[row])
            taken.add(row)
        self.sequences = arranged

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with the rows of a beam search."""
        self._arrange(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._arrange([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Continue with some rows."""
        self._arrange(torch.arange(len(self.sequences))[indices.cpu()].tolist())


def cache_bytes(cache: Cache) -> int:
    """Return the memory of keys, values and statistics of a cache, spare rows included."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, SparseLayer):
            total += sum(sequence.bytes for sequence in layer.sequences)
        else:
            states = (getattr(layer, name, None) for name in ("keys", "values"))
            total += sum(held.untyped_storage().nbytes() for held in states if isinstance(held, Tensor))
    return total


CachePolicy = Quest | SnapKV | AdaSnapKV | SinkWindowPolicy | RandomPolicy | OraclePolicy
