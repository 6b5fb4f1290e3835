"""What patterns and policies select, against the card's formulas and written-out sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intaglio.methods.attention.sparse_frontier.cache import AdaSnapKV, Quest, RandomPolicy, SequenceCache, SnapKV
from intaglio.methods.attention.sparse_frontier.prefill import (
    BlockSparse,
    FlexPrefill,
    Oracle,
    Random,
    SinkWindow,
    VerticalSlash,
    block_means,
    diagonal_sums,
)
from intaglio.methods.attention.sparse_frontier.tiled_attention import (
    Meter,
    causal_pairs,
    flex_tiles,
    kept_pairs,
    tiled_attention,
)

HEADS, GROUPS, WIDTH = 4, 2, 8


def states(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(h, length, WIDTH, generator=generator) for h in (HEADS, GROUPS, GROUPS))  # type: ignore[return-value]


def pairs(pattern: Any, length: int, seed: int = 0, window: int | None = None) -> Tensor:
    query, key, _ = states(length, seed)
    return kept_pairs(pattern.indices(query, key, 0.35, window, 0), HEADS, length, window)


PATTERNS = st.one_of(
    st.builds(
        VerticalSlash,
        sinks=st.integers(0, 3),
        recent=st.integers(1, 3),
        columns=st.integers(3, 9),
        offsets=st.integers(3, 9),
        block_size=st.integers(1, 7),
        num_queries=st.integers(1, 30),
    ),
    st.builds(
        FlexPrefill,
        sinks=st.integers(0, 3),
        recent=st.integers(1, 3),
        min_budget=st.integers(3, 9),
        coverage=st.floats(0.01, 1.0),
        block_size=st.integers(1, 7),
        num_queries=st.integers(1, 30),
    ),
    st.builds(BlockSparse, block_size=st.integers(1, 7), blocks=st.integers(3, 6)),
    st.builds(SinkWindow, sinks=st.integers(0, 3), budget=st.integers(4, 9), block_size=st.integers(1, 7)),
    st.builds(
        Random,
        sinks=st.integers(0, 3),
        recent=st.integers(1, 3),
        budget=st.integers(6, 9),
        block_size=st.integers(1, 7),
    ),
    st.builds(Oracle, budget=st.integers(1, 9)),
)


@settings(max_examples=60, deadline=None)
@given(PATTERNS, st.integers(1, 30), st.sampled_from([None, 1, 5]), st.integers(0, 5))
def test_patterns_are_causal_and_no_row_is_empty(pattern: Any, length: int, window: int | None, seed: int) -> None:
    """Every pattern is causal, every row nonempty, forced sinks/local present; selected indices unique."""
    seen = pairs(pattern, length, seed, window)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    assert not bool((seen & ~allowed).any())
    assert bool(seen.any(-1).all())
    if isinstance(pattern, BlockSparse):
        block = torch.arange(length) // pattern.block_size
        forced = (block[:, None] - block <= 1) | (block == 0)
    elif isinstance(pattern, Oracle):
        forced = torch.zeros_like(allowed)
    else:
        recent = pattern.budget - pattern.sinks if isinstance(pattern, SinkWindow) else pattern.recent
        forced = (distance < recent) | (torch.arange(length) < pattern.sinks)
    assert bool((seen | ~(forced & allowed)).all())


@settings(max_examples=30, deadline=None)
@given(PATTERNS, st.integers(1, 30), st.sampled_from([None, 5]))
def test_tiles_compute_the_kept_pairs(pattern: Any, length: int, window: int | None) -> None:
    query, key, value = states(length)
    indices = pattern.indices(query, key, 0.35, window, 0)
    seen = kept_pairs(indices, HEADS, length, window)
    keys, values = (state.repeat_interleave(HEADS // GROUPS, 0) for state in (key, value))
    expected = (query @ keys.mT * 0.35).masked_fill(~seen, -torch.inf).softmax(-1) @ values
    meter = Meter()
    assert torch.allclose(tiled_attention(query, key, value, indices, 0.35, window, meter), expected, atol=1e-5)
    assert meter.prefill_computed == int(seen.sum())
    assert meter.prefill_pairs == HEADS * causal_pairs(length, window)


@pytest.mark.parametrize(
    ("pattern", "window"),
    [
        (VerticalSlash(sinks=1, recent=2, columns=20, offsets=9, block_size=48, num_queries=20), None),
        (BlockSparse(block_size=16, blocks=3), 90),
    ],
)
def test_block_masks_compute_the_kept_pairs(pattern: Any, window: int | None) -> None:
    query, key, value = states(300)
    indices, tiles, blocks = pattern.indices(query, key, 0.35, window, 0), Meter(), Meter()
    expected = tiled_attention(query, key, value, indices, 0.35, window, tiles)
    assert torch.allclose(flex_tiles(query, key, value, indices, 0.35, window, blocks), expected, atol=1e-5)
    assert blocks.prefill_pairs == tiles.prefill_pairs
    assert tiles.prefill_computed <= blocks.prefill_computed <= blocks.prefill_pairs


def test_a_block_mask_leaves_out_unused_blocks() -> None:
    pattern = SinkWindow(sinks=1, budget=65, block_size=32)
    query, key, value = states(1400)
    indices, meter = pattern.indices(query, key, 0.35, None, 0), Meter()
    out = flex_tiles(query, key, value, indices, 0.35, None, meter)
    assert torch.allclose(out, tiled_attention(query, key, value, indices, 0.35), atol=1e-5)
    # Eleven blocks of queries: each its own block, the one before, and the first.
    assert meter.prefill_computed == HEADS * (1 + 2 + 3 * 9) * 128**2


def test_pairs_of_a_window() -> None:
    assert [causal_pairs(5, window) for window in (None, 1, 2, 5, 9)] == [15, 5, 9, 15, 15]


def weights(query: Tensor, key: Tensor, count: int, scale: float) -> Tensor:
    """Attention of the last queries by definition, [H, W, N]."""
    length = key.shape[1]
    scores = query @ key.repeat_interleave(HEADS // GROUPS, 0).mT * scale
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)[:, length - count :]


def test_vertical_slash_is_the_cards_formula() -> None:
    """Mask[i,j] = j<=i and (j in columns or i-j in offsets)."""
    pattern = VerticalSlash(num_queries=6, columns=5, offsets=4, sinks=2, recent=2, block_size=1)
    query, key, _ = states(20)
    seen, weight = pairs(pattern, 20), weights(query, key, 6, 0.35)
    for head in range(HEADS):
        columns = weight[head].sum(0)
        offsets = torch.tensor(
            [sum(float(weight[head, r, 14 + r - o]) for r in range(6) if o <= 14 + r) for o in range(20)]
        )
        columns[:2] = offsets[:2] = torch.inf
        best_columns, best_offsets = set(columns.topk(5).indices.tolist()), set(offsets.topk(4).indices.tolist())
        for i in range(20):
            for j in range(20):
                assert bool(seen[head, i, j]) == (j <= i and (j in best_columns or i - j in best_offsets))


def test_slashes_are_computed_as_tiles() -> None:
    """A tile reads every key that one of its queries reads by a slash."""
    exact, tiled = (
        pairs(VerticalSlash(columns=2, offsets=3, sinks=2, recent=1, block_size=size), 21) for size in (1, 4)
    )
    for first in range(0, 21, 4):
        wanted = exact[:, first : first + 4].any(1, keepdim=True) & torch.ones(21, 21).tril().bool()[first : first + 4]
        assert torch.equal(tiled[:, first : first + 4] & wanted, wanted)
    assert int(tiled.sum()) > int(exact.sum())


def test_diagonal_sums_are_sums_over_distances() -> None:
    weight = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 5)
    for row in range(3):
        for key in range(row + 3):
            expected[:, 2 + row - key] += weight[:, row, key]
    assert torch.allclose(diagonal_sums(weight), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.floats(0.01, 1), st.floats(0.01, 1))
def test_flexprefill_count_is_monotone_in_the_coverage(seed: int, a: float, b: float) -> None:
    """FlexPrefill count monotone in alpha; alpha -> 0 gives min_budget."""
    scores = torch.rand(3, 30, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    low, high = (FlexPrefill(coverage=c, min_budget=2, recent=1, sinks=1).counts(scores) for c in sorted((a, b)))
    assert bool((low <= high).all())
    assert FlexPrefill(coverage=1e-9, min_budget=7, recent=1, sinks=1).counts(scores).tolist() == [7] * 3
    assert FlexPrefill(coverage=1.0, min_budget=7, recent=1, sinks=1).counts(scores).tolist() == [30] * 3


def test_flexprefill_counts_the_cumulative_sums_up_to_the_coverage_and_one_more() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.25, 0.25, 0.25, 0.25]])
    pattern = FlexPrefill(coverage=0.76, min_budget=1, recent=1, sinks=1)
    assert pattern.counts(scores).tolist() == [3, 4]


def test_flexprefill_divides_by_the_queries() -> None:
    pattern = FlexPrefill(coverage=0.5, min_budget=1, sinks=0, recent=1, num_queries=6, block_size=1)
    query, key, _ = states(20)
    seen, weight = pairs(pattern, 20), weights(query, key, 6, 0.35)
    columns = weight.mean(1).sort(dim=-1, descending=True).values.cumsum(-1)
    offsets = (diagonal_sums(weight) / 6).sort(dim=-1, descending=True).values.cumsum(-1)
    for head in range(HEADS):
        counts = [int((sums[head] <= 0.5).sum()) + 1 for sums in (columns, offsets)]
        exact = VerticalSlash(columns=counts[0], offsets=counts[1], sinks=0, recent=1, num_queries=6, block_size=1)
        assert torch.equal(seen[head], pairs(exact, 20)[head])


@pytest.mark.parametrize(("length", "size", "blocks", "expected"), [(1024, 64, 4, 0.5735), (8192, 16, 64, 0.7658)])
def test_the_closed_form_of_block_sparsity(length: int, size: int, blocks: int, expected: float) -> None:
    assert BlockSparse.sparsity(length, size, blocks) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("tiles", "size", "blocks"), [(8, 4, 3), (6, 3, 5), (4, 2, 9)])
def test_the_closed_form_is_the_counted_share_of_blocks(tiles: int, size: int, blocks: int) -> None:
    """Block formula against counted mask (aligned n) exact."""
    length = tiles * size
    seen = pairs(BlockSparse(block_size=size, blocks=blocks), length)
    cells = seen.view(HEADS, tiles, size, tiles, size).any(4).any(2).sum((1, 2))
    expected = (1 - BlockSparse.sparsity(length, size, blocks)) * tiles * (tiles + 1) / 2
    assert cells.tolist() == pytest.approx([expected] * HEADS)


def test_blocks_for_a_sparsity() -> None:
    for target in (0.5, 0.8, 0.9):
        pattern = BlockSparse.at_sparsity(4096, target, 16)
        others = [BlockSparse.sparsity(4096, 16, pattern.blocks + step) for step in (-1, 1)]
        assert abs(BlockSparse.sparsity(4096, 16, pattern.blocks) - target) <= min(abs(o - target) for o in others)
    assert BlockSparse.at_sparsity(40, 0.99, 16).blocks == 3


def test_block_scores_are_products_of_means_with_the_tail_filled_with_zeros() -> None:
    query, key, _ = states(22)
    means = block_means(key, 4)
    assert torch.allclose(means[:, 5], key[:, 20:].sum(1) / 4)
    scores = block_means(query, 4) @ means.repeat_interleave(HEADS // GROUPS, 0).mT
    seen = pairs(BlockSparse(block_size=4, blocks=4), 22)
    for head in range(HEADS):
        best = 1 + int(scores[head, 5, 1:4].argmax())
        blocks = {int(j) // 4 for j in seen[head, 21].nonzero()}
        assert blocks == {0, 4, 5, best}


def test_oracle_keeps_the_best_keys_of_each_query() -> None:
    query, key, _ = states(15)
    seen = pairs(Oracle(budget=3), 15)
    scores = query @ key.repeat_interleave(2, 0).mT
    for i in range(3, 15):
        for head in range(HEADS):
            assert set(seen[head, i].nonzero()[:, 0].tolist()) == set(scores[head, i, : i + 1].topk(3).indices.tolist())


def test_random_differs_by_head_and_layer_and_not_by_input() -> None:
    pattern = Random(budget=9, sinks=1, recent=2, block_size=1)
    first, second = pairs(pattern, 30, seed=0), pairs(pattern, 30, seed=1)
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    query, key, _ = states(30)
    assert not torch.equal(kept_pairs(pattern.indices(query, key, 0.3, None, 1), HEADS, 30, None), first)
    # Seven columns and two recent keys, which columns may repeat.
    assert set(first[:, 29].sum(-1).tolist()) <= {7, 8, 9}
    assert pairs(Random(budget=12, sinks=1, recent=2, block_size=1), 30)[:, 29].sum() > first[:, 29].sum()


def test_the_random_policy_draws_anew_for_each_layer_head_and_token() -> None:
    policy = RandomPolicy(budget=6)
    query, key, value = states(40)
    first, other = (
        policy.select(query[:, -1], SequenceCache(policy, query, key, value, 0.3, layer)) for layer in (0, 1)
    )
    assert first is not None
    assert other is not None
    assert first.shape == (GROUPS, 6)
    assert first[:, -1].tolist() == [39, 39]
    assert all(len(set(row.tolist())) == 6 for row in first)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    shorter = policy.select(query[:, -2], SequenceCache(policy, query[:, :39], key[:, :39], value[:, :39], 0.3, 0))
    assert shorter is not None
    assert not torch.equal(first[:, :-1], shorter[:, :-1])


def cached(policy: Any, length: int, seed: int = 0) -> SequenceCache:
    query, key, value = states(length, seed)
    return SequenceCache(policy, query, key, value, 0.35, 0)


def test_quest_of_the_worked_example() -> None:
    """Page keys (1,-2),(3,0): m=(1,-2), M=(3,0); q=(1,-1): max(1,3)+max(2,0)=5 >= true max 3."""
    keys = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])
    sequence = SequenceCache(Quest(budget=2, page_size=2), keys, keys, keys, 1.0, 0)
    assert sequence.extremes is not None
    low, high = sequence.extremes
    assert low.tolist() == [[[1, -2]]]
    assert high.tolist() == [[[3, 0]]]
    assert Quest(budget=2, page_size=2).scores(torch.tensor([[1.0, -1.0]]), low, high).tolist() == [[5.0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 9), st.floats(0.1, 10))
def test_quest_bounds_every_key_of_a_page(length: int, page: int, seed: int, factor: float) -> None:
    """Quest bound: page score >= max q.k in page, equality for P = 1. Selection is invariant to scaling of q."""
    policy = Quest(budget=page, page_size=page, share_pages=False)
    sequence = cached(policy, length, seed)
    if sequence.extremes is None:
        assert length < page
        return
    query = states(1, seed + 100)[0][:, 0]
    scores = policy.scores(query, *sequence.extremes)
    pages = length // page
    products = query[:, None] @ states(length, seed)[1].repeat_interleave(HEADS // GROUPS, 0).mT
    best = products[:, 0, : pages * page].view(HEADS, pages, page).amax(-1)
    assert bool((scores >= best - 1e-5).all())
    if page == 1:
        assert torch.allclose(scores, best, atol=1e-5)
    shared = Quest(budget=page, page_size=page).scores(query, *sequence.extremes)
    assert torch.allclose(shared, scores.view(GROUPS, -1, pages).sum(1), atol=1e-4)
    chosen, scaled = (policy.select(q, sequence) for q in (query, query * factor))
    assert chosen is None or torch.equal(chosen, scaled)


@pytest.mark.parametrize("share", [True, False])
def test_quest_reads_the_best_complete_pages_and_the_current_one(share: bool) -> None:
    policy = Quest(budget=8, page_size=4, share_pages=share)
    for length in range(10, 30):
        sequence, query = cached(policy, length), states(1, 7)[0][:, 0]
        units, current = policy.select(query, sequence), (length - 1) // 4
        if current <= 2:
            assert units is None
            continue
        assert units is not None
        assert sequence.extremes is not None
        low, high = (extreme[:, :current] for extreme in sequence.extremes)
        best = policy.scores(query, low, high).topk(2).indices
        assert units[:, -1].tolist() == [current] * len(units)
        assert units[:, :2].sort(-1).values.tolist() == best.sort(-1).values.tolist()
        assert len(units) == (GROUPS if share else HEADS)


def test_statistics_follow_new_tokens() -> None:
    policy = Quest(budget=8, page_size=4)
    query, key, value = states(31)
    whole = SequenceCache(policy, query, key, value, 0.35, 0)
    grown = SequenceCache(policy, query[:, :6], key[:, :6], value[:, :6], 0.35, 0)
    for start, end in ((6, 7), (7, 19), (19, 31)):
        grown.attend(*(state[:, start:end] for state in (query, key, value)))
    assert grown.extremes is not None
    assert whole.extremes is not None
    for a, b in zip(grown.extremes, whole.extremes, strict=True):
        assert torch.equal(a, b)
    assert grown.seen == 31


def expected_scores(query: Tensor, key: Tensor, policy: Any, maxima: bool) -> Tensor:
    """Pooled scores by definition, [G, N]."""
    length = key.shape[1]
    weight = weights(query, key, min(policy.num_queries, length), 0.35).view(GROUPS, HEADS // GROUPS, -1, length)
    raw = weight.amax((1, 2)) if maxima else weight.mean(1).sum(1)
    half = policy.kernel_size // 2
    pooled = torch.stack(
        [raw[:, max(j - half, 0) : j + half + 1].sum(1) / policy.kernel_size for j in range(length)], 1
    )
    pooled[:, : policy.sinks] = pooled[:, length - policy.recent :] = torch.inf
    return pooled


COMPRESSION: dict[str, Any] = {"budget": 12, "num_queries": 6, "kernel_size": 3, "sinks": 2, "recent": 4}


def test_snapkv_keeps_the_best_pooled_sums() -> None:
    policy = SnapKV(**COMPRESSION)
    query, key, value = states(40)
    scores = expected_scores(query, key, policy, maxima=False)
    kept = policy.keep(query, key, 0.35)
    assert kept is not None
    assert [k.tolist() for k in kept] == [sorted(row.topk(12).indices.tolist()) for row in scores]
    sequence = SequenceCache(policy, query, key, value, 0.35, 0)
    for head, index in enumerate(kept):
        assert torch.equal(sequence.buffers[0].keys[head, :12], key[head, index])
        assert torch.equal(sequence.buffers[0].values[head, :12], value[head, index])


def test_ada_snapkv_shares_one_budget() -> None:
    """Ada total kept = capacity*H_kv exactly; min per head respected."""
    policy = AdaSnapKV(**COMPRESSION, min_ratio=0.6)
    uneven = 0
    for seed in range(8):
        query, key, value = states(40, seed)
        query = query * torch.tensor([3.0, 3.0, 0.2, 0.2])[:, None, None]
        scores = expected_scores(query, key, policy, maxima=True)
        kept = policy.keep(query, key, 0.35)
        assert kept is not None
        assert sum(map(len, kept)) == 12 * GROUPS
        own = [set(row.topk(7).indices.tolist()) for row in scores]
        rest = scores.clone()
        for head, positions in enumerate(own):
            assert positions <= set(kept[head].tolist())
            rest[head, list(positions)] = -torch.inf
        best = rest.flatten().topk(10).indices.tolist()
        expected = [sorted(own[h] | {b - 40 * h for b in best if b // 40 == h}) for h in range(GROUPS)]
        assert [k.tolist() for k in kept] == expected
        sequence = SequenceCache(policy, query, key, value, 0.35, 0)
        assert sequence.lengths == [len(k) for k in kept]
        uneven += len(set(sequence.lengths)) > 1
    assert uneven


def test_ada_of_ratio_one_keeps_equally_many() -> None:
    """min ratio 1 -> uniform counts (SnapKV-like)."""
    query, key, _ = states(40)
    kept = AdaSnapKV(**COMPRESSION, min_ratio=1.0).keep(query, key, 0.35)
    assert kept is not None
    assert [len(k) for k in kept] == [12, 12]
    least = AdaSnapKV(**COMPRESSION | {"recent": 9}, min_ratio=0.0).keep(query, key, 0.35)
    assert least is not None
    assert min(map(len, least)) >= 11


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_key_is_kept(seed: int) -> None:
    """Keys random unit, one key = 8 q: Quest, SnapKV and vertical keep it at any budget >= forced + 1."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.nn.functional.normalize(torch.randn(1, 64, WIDTH, generator=generator), dim=-1)
    query = torch.nn.functional.normalize(torch.randn(1, 64, WIDTH, generator=generator), dim=-1)
    query[:, -4:] = query[:, -1:]
    place = 11 + 7 * seed
    key[0, place] = 8 * query[0, -1]
    quest = Quest(budget=4, page_size=4)
    units = quest.select(query[:, -1], SequenceCache(quest, query, key, key, 1.0, 0))
    assert units is not None
    assert place // 4 in units[0].tolist()
    for kind in (SnapKV, AdaSnapKV):
        kept = kind(budget=6, num_queries=4, kernel_size=1, sinks=1, recent=4).keep(query, key, 1.0)
        assert kept is not None
        assert place in kept[0].tolist()
    pattern = VerticalSlash(columns=3, offsets=2, sinks=2, recent=2, num_queries=4, block_size=1)
    assert bool(kept_pairs(pattern.indices(query, key, 1.0, None, 0), 1, 64, None)[0, place + 2 :, place].all())


def test_block_means_miss_a_planted_key() -> None:
    """Block mean pooling with B=64 misses it with sizeable probability - a documented failure."""
    missed = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        key, query = (
            torch.nn.functional.normalize(torch.randn(1, 64 * 16, 64, generator=generator), dim=-1) for _ in "kq"
        )
        key[0, 64 * 5 + 3] = 8 * query[0, -1]
        seen = kept_pairs(BlockSparse(block_size=64, blocks=4).indices(query, key, 1.0, None, 0), 1, 1024, None)
        missed += not bool(seen[0, -1, 64 * 5 + 3])
    assert 10 <= missed <= 39
