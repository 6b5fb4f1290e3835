"""Labelled texts: files, objects, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intaglio.data.labelled_texts import LabelledTexts, load_labelled_texts
from intaglio.errors import IntaglioError


def test_files_and_objects_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "label": "b"}\n\n{"text": "two", "label": "a", "id": 3}\n')
    read = load_labelled_texts(path)
    assert (read.texts, read.labels, read.classes, len(read)) == (("one", "two"), ("b", "a"), ("a", "b"), 2)
    assert load_labelled_texts([{"text": "one", "label": "b"}]) == LabelledTexts(("one",), ("b",))
    assert load_labelled_texts(read) is read


@pytest.mark.parametrize(
    "row", ["3", "{}", '{"text": "x"}', '{"text": 1, "label": "a"}', '{"text": " ", "label": "a"}', '{"label": "a"}']
)
def test_a_line_without_both_strings_is_named(row: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one", "label": "b"}}\n{row}\n')
    with pytest.raises(
        IntaglioError, match=r"line 2 of .*a.jsonl is .*; it needs text and label, both strings"
    ) as caught:
        load_labelled_texts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "says"), [("none.jsonl", "cannot read the labelled texts"), ([], "is empty")])
def test_nothing_is_refused(source: Any, says: str) -> None:
    with pytest.raises(IntaglioError, match=says):
        load_labelled_texts(source)
