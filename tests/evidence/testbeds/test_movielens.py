from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.data.item_sequences import dense
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.movielens import BOUNDS, MovieLens
from intaglio.evidence.testbeds.splits import part_of

Rows = list[tuple[str, str, int]]
Make = Callable[[Rows], MovieLens]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A bed of these (user, item, time), in a file of the asset's form."""

    def made(rows: Rows) -> MovieLens:
        folder = tmp_path_factory.mktemp("ratings")
        lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        lines += [f"{user}\t{item}\t3\t{time}" for user, item, time in rows]
        (folder / "small.inter").write_text("\n".join(lines) + "\n")
        items = sorted({item for _, item, _ in rows})
        titles = [f"{item}\tTitle of {item}\t1999" for item in items[1:]]
        (folder / "small.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq\tyear:token", *titles]))
        return MovieLens(source=str(folder), users_run=20, users_pilot=5)

    return made


@pytest.fixture(scope="module")
def small(make: Make) -> MovieLens:
    draw = random.Random(0)
    rows = []
    for user in range(60):
        watched = draw.sample(range(40), 8 + user % 5)
        rows += [(f"u{user}", f"i{item}", 100 * place) for place, item in enumerate(watched)]
    draw.shuffle(rows)
    return make(rows)


def test_leave_one_out_by_hand(make: Make) -> None:
    # Five users who watched the same five films, each in an order of their own, and what falls below five.
    rows = [(f"u{user}", f"i{(user + place) % 5}", 10 * place) for user in range(5) for place in range(5)]
    rows += [("u0", "rare", 5), ("lazy", "i0", 1), ("lazy", "i1", 2)]
    random.Random(1).shuffle(rows)
    bed = make(rows)
    found = bed.load()
    assert sorted(found.names[1:]) == ["i0", "i1", "i2", "i3", "i4"]
    watched = {user: [found.names[i] for i in items] for user, items in found.sequences.items()}
    assert watched == {f"u{user}": [f"i{(user + place) % 5}" for place in range(5)] for user in range(5)}
    assert {user: len(items) for user, items in bed.training().items()} == dict.fromkeys(watched, 3)
    for question in bed.questions("validation"):
        items = found.sequences[question.user]
        assert (question.history, question.target) == (items[:3], items[3])
    assert bed.training(with_validation=True) == {user: items[:4] for user, items in found.sequences.items()}
    # Each film is the test of one user and the validation of another.
    assert found.counts == (0, 3, 3, 3, 3, 3)
    assert (found.items, found.mask, found.vocabulary) == (5, 6, 7)
    assert found.titles == ("", "", "Title of i1", "Title of i2", "Title of i3", "Title of i4")


def test_ids_are_contiguous_and_frequent_items_come_first(small: MovieLens) -> None:
    found = small.load()
    used = {item for items in found.sequences.values() for item in items}
    assert used == set(range(1, found.items + 1))
    learned = Counter(item for items in small.training().values() for item in items)
    assert found.counts == (0, *(learned[item] for item in range(1, found.items + 1)))
    assert list(found.counts[1:]) == sorted(found.counts[1:], reverse=True)
    assert len(set(found.names)) == found.items + 1


def test_no_held_out_item_is_learned_from(small: MovieLens) -> None:
    training = small.training()
    for question in (*small.questions("validation"), *small.questions("pilot"), *small.questions("evaluation")):
        assert question.target not in training[question.user]
        assert question.target not in question.history
        assert question.history[: len(training[question.user])] == training[question.user]
    tests = {question.user: question.target for question in small.questions("evaluation")}
    assert all(question.target != tests.get(question.user) for question in small.questions("validation"))


def test_users_of_pilots_and_runs_are_sealed(small: MovieLens) -> None:
    for base in range(10):
        for part, count in (("pilot", 5), ("evaluation", 20)):
            users = [question.user for question in small.questions(part, base)]  # type: ignore[arg-type]
            assert len(set(users)) == count
            assert {part_of(f"user {user}", BOUNDS) for user in users} == {part}
    assert len({small.questions("evaluation", base) for base in range(10)}) == 10
    assert small.questions("evaluation", 3) == MovieLens(**asdict(small)).questions("evaluation", 3)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60), st.integers(1, 4))
def test_what_is_dense_is_the_largest_such_part(rows: list[tuple[int, int]], least: int) -> None:
    sequences: dict[str, tuple[str, ...]] = {}
    for user, item in rows:
        sequences[f"u{user}"] = (*sequences.get(f"u{user}", ()), f"i{item}")
    found = dense(sequences, least)
    counts = Counter(item for items in found.values() for item in items)
    assert all(len(items) >= least for items in found.values())
    assert all(count >= least for count in counts.values())
    # Nothing more can be kept: put one user back whole, and some rule breaks for them.
    for name in set(sequences) - set(found):
        kept = [item for item in dict.fromkeys(sequences[name]) if counts[item]]
        assert len(kept) < least or (least == 1 and not kept)
    for name, items in found.items():
        assert list(items) == [item for item in dict.fromkeys(sequences[name]) if item in counts]


def test_the_order_of_the_file_changes_only_ties(make: Make, small: MovieLens) -> None:
    found = small.load()
    rows = [
        (user, found.names[item], place) for user, items in found.sequences.items() for place, item in enumerate(items)
    ]
    random.Random(2).shuffle(rows)
    again = make(rows).load()
    assert again.sequences == {user: again.sequences[user] for user in found.sequences} == dict(found.sequences)
    assert (again.names, again.counts) == (found.names, found.counts)


def test_bad_settings_and_data_are_one_sentence(make: Make, small: MovieLens) -> None:
    with pytest.raises(IntaglioError, match=r"movielens' is not in .*run `intaglio assets` first"):
        MovieLens().load()
    with pytest.raises(IntaglioError, match="no users and items with 5 interactions each"):
        make([("u", "i", 1), ("u", "j", 2)]).load()
    with pytest.raises(IntaglioError, match=r"600 evaluation users were requested; there are \d+"):
        MovieLens(source=small.source).questions("evaluation")


def test_settings_compare_by_their_fields() -> None:
    assert MovieLens() == MovieLens(source="movielens", least=5)
    assert len({MovieLens(), MovieLens(), MovieLens(least=3)}) == 2


@pytest.mark.slow
def test_the_real_ratings() -> None:
    bed = MovieLens()
    found = bed.load()
    # The known numbers of this data set: 943 users, and 1,349 films with five ratings or more.
    assert (len(found.sequences), found.items) == (943, 1349)
    assert sum(map(len, found.sequences.values())) == 99_287
    assert sum(found.counts) == 99_287 - 2 * 943
    assert all(found.titles[1:])
    assert found.titles[1] == "Star Wars"
    assert found.digest.startswith("5344b689650eaa69")
    assert (len(bed.questions("evaluation")), len(bed.questions("pilot"))) == (600, 150)
    assert len({bed.questions("evaluation", base) for base in range(5)}) == 5
