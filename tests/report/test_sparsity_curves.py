"""Pictures of the study of sparse attention."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from intaglio.methods.attention.sparse_frontier.study import METHODS
from intaglio.report.sparsity_curves import Panel, Series, operation_dots, sparsity_curves
from intaglio.report.svg import LABEL_CHARACTER, SMALL_CHARACTER, WIDTH


@pytest.mark.parametrize("draw", [sparsity_curves, operation_dots])
def test_all_methods_and_the_longest_titles_fit_beside_each_other(draw) -> None:  # type: ignore[no-untyped-def]
    series = tuple(Series(m, model, ((0.5, 0.2), (0.9, 0.1))) for m in METHODS for model in ("smollm2", "other"))
    panel = Panel("multi_hop, smollm2", "16,384 tokens, question before and after the context", series, 0.3)
    root = ET.fromstring(draw("title", [panel, panel]))
    texts = [text for text in root.iter("text") if text.get("text-anchor") == "start"]
    assert {text.text for text in texts} >= set(METHODS)
    for text in texts:
        left, advance = (
            float(text.get("x", "nan")),
            LABEL_CHARACTER if text.get("class") == "label" else SMALL_CHARACTER,
        )
        end = left + advance * len(text.text or "")
        assert end <= (WIDTH / 2 if left == 52 and text.text not in METHODS else WIDTH), text.text


def test_the_best_of_equal_operations_are_encircled_and_models_differ_in_shape() -> None:
    series = (Series("quest", "one", ((1e9, 0.5), (4e9, 0.7))), Series("quest", "two", ((2e9, 0.9),)))
    root = ET.fromstring(operation_dots("title", [Panel("niah", "after", series, best=((2e9, 0.9),))]))
    marks = list(root.iter("polygon"))
    dots = {mark[0].text: mark.get("points", "").split() for mark in marks if len(mark)}
    assert {name: len(corners) for name, corners in dots.items()} == {
        "one quest: 0.50 at 1e+09 operations": 24,
        "one quest: 0.70 at 4e+09 operations": 24,
        "two quest: 0.90 at 2e+09 operations": 4,
    }
    assert marks[-1].get("class") == "best"
    (ring_x, ring_y), (x, y) = (
        (float(corner.split(",")[0]), float(corner.split(",")[1]))
        for corner in (marks[-1].get("points", "").split()[0], dots["two quest: 0.90 at 2e+09 operations"][0])
    )
    assert (ring_x, ring_y) == pytest.approx((x, y - 3.5), abs=0.2)  # upper corners of radius 7 and 3.5
