"""Every line is stated twice, and the middle one of the first half is the hole."""

from __future__ import annotations

import torch

from intaglio.evidence.testbeds.repeated_lines import LINE_END, SPECIAL, RepeatedLines

BED = RepeatedLines()


def test_the_second_half_repeats_the_lines_in_another_order() -> None:
    rows = BED.documents("evaluation").segments.ids_NT
    assert rows.shape == (500, 18)
    halves = [[[tuple(line) for line in half.view(3, 3).tolist()] for half in row.view(2, 9)] for row in rows]
    assert all(sorted(one) == sorted(two) and len({name for name, _, _ in one}) == 3 for one, two in halves)
    assert sum(one != two for one, two in halves) > 380
    first = len(SPECIAL)
    assert all(first <= n < first + 8 <= v < first + 16 and end == LINE_END for one, _ in halves for n, v, end in one)


def test_a_hole_is_a_line_in_the_middle_of_the_first_half() -> None:
    rows = BED.documents("pilot", 1).segments.ids_NT.tolist()
    for row, (before, hole, after) in zip(rows, BED.holes("pilot", 1), strict=True):
        assert before + hole + after == row
        assert (len(before), len(hole)) == (3, 2)


def test_sets_and_seeds_have_documents_of_their_own() -> None:
    sets = [BED.documents(part, base).segments.ids_NT[:200] for part in ("pilot", "evaluation") for base in (0, 1)]
    sets += [BED.training(seed, 10).ids_NT[:200] for seed in (0, 1)]
    assert len({tuple(one.flatten().tolist()) for one in sets}) == 6
    assert torch.equal(BED.training(0, 10).ids_NT, BED.training(0, 20).ids_NT[:320])
