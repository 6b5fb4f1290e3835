from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from intaglio.search.snippets import snippet


def spans(text: str, word: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(rf"\b{word}\b", text)]


def test_matches_are_marked_and_a_short_text_is_whole() -> None:
    text = "the mask hides a key"
    assert snippet(text, spans(text, "mask")) == [("the ", False), ("mask", True), (" hides a key", False)]


def test_the_excerpt_starts_before_its_matches_at_a_word() -> None:
    text = "filler " * 100 + "the mask and the key" + " filler" * 100
    pieces = snippet(text, spans(text, "mask|key"), 120)
    assert [piece for piece, marked in pieces if marked] == ["mask", "key"]
    assert (pieces[0][0], pieces[-1][0]) == ("… ", " …")
    assert pieces[1][0].split()[0] == "filler"


def test_more_distinct_words_beat_more_words() -> None:
    text = "mask mask mask" + " filler" * 100 + " mask key"
    assert ("key", True) in snippet(text, spans(text, "mask|key"), 100)


@given(st.text(), st.data(), st.integers(70, 400))
def test_the_pieces_are_a_part_of_the_text(text: str, data: st.DataObject, max_length: int) -> None:
    cuts = sorted(set(data.draw(st.lists(st.integers(0, len(text)), max_size=8))))
    marked = list(zip(cuts[::2], cuts[1::2], strict=False))
    pieces = snippet(text, marked, max_length)
    joined = "".join(piece for piece, _ in pieces).removeprefix("… ").removesuffix(" …")
    assert joined in text
    assert len(joined) <= max_length
    assert {piece for piece, is_match in pieces if is_match} <= {text[a:b] for a, b in marked}
