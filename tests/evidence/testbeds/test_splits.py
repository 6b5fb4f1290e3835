from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds import digits, movielens, smollm2
from intaglio.evidence.testbeds.splits import BOUNDS, Bounds, draw, generator, keyed, part_of

NAMES = st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=30)


def test_keyed_by_hand() -> None:
    # The first eight bytes, big-endian, of SHA-256 of "a:b", computed with coreutils.
    assert f"{keyed('a', 'b'):016x}" == "6783a31eabf68ccc"
    assert keyed("a", "b") != keyed("a:b")


@given(NAMES, st.data())
def test_a_draw_is_a_prefix_of_a_larger_one_and_company_changes_nothing(names: list[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(names)))
    drawn = [names[place] for place in draw("key", names, count)]
    assert len(set(drawn)) == count
    whole = [names[place] for place in draw("key", names, len(names))]
    assert drawn == whole[:count]
    company = [name for name in (*names, "one more") if name not in names or data.draw(st.booleans())]
    random.Random(0).shuffle(company)
    there = [company[place] for place in draw("key", company, len(company))] if company else []
    assert [name for name in whole if name in company] == [name for name in there if name in names]


def test_another_key_draws_others() -> None:
    names = [str(i) for i in range(100)]
    drawn = [tuple(draw(f"key:{seed}", names, 10)) for seed in range(20)]
    assert len(set(drawn)) == 20
    # Every name has its chance: 20 draws of 10 out of 100 meet about 88 of them.
    assert len({place for places in drawn for place in places}) > 70


@pytest.mark.parametrize(
    ("count", "sentence"), [(0, "0 cats were requested; at least 1"), (4, "4 cats .* there are 3")]
)
def test_too_few_and_too_many_are_refused(count: int, sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        draw("key", ["a", "b", "c"], count, "cats")


def test_generators_are_streams_of_their_own() -> None:
    first = generator("a").random(1000)
    assert (generator("a").random(1000) == first).all()
    assert not np.isin(generator("b").random(1000), first).any()


@pytest.mark.parametrize("bounds", [BOUNDS, digits.BOUNDS, movielens.BOUNDS, smollm2.BOUNDS])
def test_the_sets_cover_all_remainders_once(bounds: Bounds) -> None:
    assert [low for low, _ in bounds.values()] == [0, *(high for _, high in bounds.values())][:-1]
    assert list(bounds.values())[-1][1] == 1000


def test_a_part_has_its_share() -> None:
    bounds: Bounds = {"train": (0, 600), "evaluation": (600, 1000)}
    parts = [part_of(f"name {i}", bounds) for i in range(5000)]
    # 5,000 draws with probability 0.6 have a standard deviation of 35.
    assert abs(parts.count("train") - 3000) < 175
    assert set(parts) == {"train", "evaluation"}
