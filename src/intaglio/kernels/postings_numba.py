"""Exact top-k over posting lists: MaxScore in windows of rows.

    score(d) = Σ_t w_t f_td,   f_td = v_td (learned sparse)   or   v_td / (v_td + norm_d) (BM25)

Rows are scored in windows whose sums stay in the L1 cache. The terms are ordered by bound per posting; the longest
prefix whose bounds add up to no more than the k-th best score so far is non-essential (Turtle and Flood 1995, MaxScore;
windows as in Lucene's bulk scorer). Essential lists are added term by term; rows that cannot reach the k-th score with
the bounds of the rest are dropped before the rest is looked up. Sums are float32.

Dimension letters: P postings, T query terms, N rows, K results.
"""

from __future__ import annotations

import numpy as np
from numba import njit

WINDOW = 4096
"""Rows of a window: 16 KB of sums and 16 KB of norms."""
_BLOCK = 64
"""Rows whose sums are compared with the threshold at once; divides the window."""
_LOOKUP = 8
"""Postings that are added in the time of a lookup."""
_ESSENTIAL = np.float32(0.35)
_SLACK = np.float32(1 + 1e-5)
"""Bounds are widened by more than the rounding of a sum."""

_compiled = njit(nogil=True, error_model="numpy", cache=True, fastmath={"contract", "nsz"})


@_compiled
def _lower_bound(rows_P, low, high, row):
    """Return the first position in [low, high) with a row of at least `row`."""
    while low < high:
        middle = (low + high) >> 1
        if rows_P[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@_compiled
def _gallop(rows_P, low, high, row):
    """Do the same, fast where the position is near `low`."""
    step = 1
    probe = low
    while probe < high and rows_P[probe] < row:
        low = probe + 1
        probe += step
        step += step
    return _lower_bound(rows_P, low, min(probe, high), row)


@_compiled
def _worse(score_a, key_a, score_b, key_b):
    """Return whether a ranks after b: equal scores rank by key."""
    return score_a < score_b or (score_a == score_b and key_a > key_b)


@_compiled
def _push(scores_K, keys_K, size, score, key):
    """Insert into the heap, whose root is the worst of the best; return the new size."""
    if size == len(scores_K):
        if not _worse(scores_K[0], keys_K[0], score, key):
            return size
        hole = 0
        while True:
            child = 2 * hole + 1
            if child >= size:
                break
            if child + 1 < size and _worse(scores_K[child + 1], keys_K[child + 1], scores_K[child], keys_K[child]):
                child += 1
            if not _worse(scores_K[child], keys_K[child], score, key):
                break
            scores_K[hole], keys_K[hole] = scores_K[child], keys_K[child]
            hole = child
    else:
        hole = size
        size += 1
        while hole:
            parent = (hole - 1) >> 1
            if not _worse(score, key, scores_K[parent], keys_K[parent]):
                break
            scores_K[hole], keys_K[hole] = scores_K[parent], keys_K[parent]
            hole = parent
    scores_K[hole], keys_K[hole] = score, key
    return size


@_compiled
def search(rows_P, values_P, norm_N, allowed_N, starts_T, ends_T, weights_T, bounds_T, base, N, scores_K, keys_K, size):
    """Add a segment's rows to the heap of the best (score, key = base + row) and return its size.

    `norm_N` is empty for learned-sparse values, `allowed_N` where every row is. `bounds_T` are upper bounds of
    weight times f.
    """
    T, K = len(starts_T), len(scores_K)
    normed, masked = len(norm_N) > 0, len(allowed_N) > 0
    order_T = np.argsort(bounds_T / (ends_T - starts_T).astype(np.float32))
    reach_T = np.empty(T, np.float32)  # what a term and those before it can add
    total = np.float32(0)
    for i in range(T):
        total += bounds_T[order_T[i]]
        reach_T[i] = total * _SLACK
    cursor_T = starts_T.copy()
    sums_W = np.zeros(WINDOW, np.float32)
    candidates_W = np.empty(WINDOW + 1, np.int32)
    first = 0
    for low in range(0, N, WINDOW):
        high = min(low + WINDOW, N)
        threshold = scores_K[0] if size == K else np.float32(0)
        while first < T and size == K and reach_T[first] <= threshold * _ESSENTIAL:
            first += 1
        if first == T:
            break
        for i in range(first, T):
            t = order_T[i]
            weight, end, position = weights_T[t], ends_T[t], cursor_T[t]
            position = _gallop(rows_P, position, end, low)
            stop = _lower_bound(rows_P, position, min(end, position + high - low), high)
            if normed:
                for p in range(np.uint64(position), np.uint64(stop)):
                    row = np.uint32(rows_P[p])
                    value = np.float32(values_P[p])
                    sums_W[np.uint32(row - np.uint32(low))] += weight * (value / (value + norm_N[row]))
            else:
                for p in range(np.uint64(position), np.uint64(stop)):
                    sums_W[np.uint32(np.uint32(rows_P[p]) - np.uint32(low))] += weight * np.float32(values_P[p])
            cursor_T[t] = stop
        rest = reach_T[first - 1] if first else np.float32(0)
        count = 0
        direct = first == 0 and not masked  # every term is essential, every row allowed
        cut = max(threshold - rest, np.float32(0)) / _SLACK
        for block in range(0, high - low, _BLOCK):
            hit = False
            for i in range(block, block + _BLOCK):
                hit |= sums_W[i] > cut
            if not hit:
                continue
            if direct:
                for i in range(block, block + _BLOCK):
                    if sums_W[i] > cut:
                        size = _push(scores_K, keys_K, size, sums_W[i], base + low + i)
                        if size == K:
                            cut = scores_K[0]
            else:
                for i in range(block, block + _BLOCK):
                    candidates_W[count] = i
                    count += sums_W[i] > cut
        if masked:
            kept = 0
            for c in range(count):
                candidates_W[kept] = candidates_W[c]
                kept += allowed_N[low + candidates_W[c]] != 0
            count = kept
        for i in range(first - 1, -1, -1):
            if not count:
                break
            t = order_T[i]
            weight, end = weights_T[t], ends_T[t]
            rest = reach_T[i - 1] if i else np.float32(0)
            position = _gallop(rows_P, cursor_T[t], end, low)
            kept = 0
            if (end - starts_T[t]) * (high - low) < count * _LOOKUP * N:
                # As many candidates as postings: the list is added as a whole.
                stop = _lower_bound(rows_P, position, min(end, position + high - low), high)
                for p in range(np.uint64(position), np.uint64(stop)):
                    row = np.uint32(rows_P[p])
                    value = np.float32(values_P[p])
                    if normed:
                        value /= value + norm_N[row]
                    sums_W[np.uint32(row - np.uint32(low))] += weight * value
                position = stop
                for c in range(count):
                    row = candidates_W[c]
                    candidates_W[kept] = row
                    kept += sums_W[row] + rest > threshold
            else:
                for c in range(count):
                    row = low + candidates_W[c]
                    position = _gallop(rows_P, position, end, row)
                    score = sums_W[row - low]
                    if position < end and rows_P[position] == row:
                        value = np.float32(values_P[position])
                        score += weight * (value / (value + norm_N[row]) if normed else value)
                        sums_W[row - low] = score
                    candidates_W[kept] = row - low
                    kept += score + rest > threshold
            count = kept
            cursor_T[t] = position
        for c in range(count):
            size = _push(scores_K, keys_K, size, sums_W[candidates_W[c]], base + low + candidates_W[c])
        sums_W[: high - low] = 0
    return size


@_compiled
def count_allowed(rows_P, start, end, allowed_N):
    """Return the number of postings of allowed rows."""
    total = 0
    for position in range(start, end):
        total += allowed_N[rows_P[position]] != 0
    return total


__all__ = ["WINDOW", "count_allowed", "search"]
