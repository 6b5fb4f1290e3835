"""The one-to-many language: its documents are valid, its sets share no input, and outputs are recognised."""

from __future__ import annotations

from collections import Counter

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence.claims.diverse_beam_search import every_mode, score
from intaglio.evidence.testbeds.one_to_many import (
    LENGTH,
    MODES,
    OBJECTS,
    PLACES,
    OneToMany,
    mode_of,
    modes_found,
    output,
    word,
)

BED = OneToMany().toy(steps=50)


def test_every_training_document_is_valid_and_modes_are_as_likely_as_stated() -> None:
    rows = BED.training(0).ids_NT.tolist()
    modes = Counter(mode_of(row[: OBJECTS + 2], row[OBJECTS + 2 :]) for row in rows)
    assert None not in modes
    assert {len(row) for row in rows} == {LENGTH}
    assert all(abs(modes[mode] / len(rows) - p) < 0.06 for mode, p in enumerate(MODES))
    assert BED.training(1).digest != BED.training(0).digest == BED.training(0).digest


def test_sets_share_no_input() -> None:
    evaluation = {prompt.ids for index in range(50) for prompt in BED.source("evaluation", index)}
    assert len(evaluation) == 100
    trained = {tuple(row[: OBJECTS + 2]) for row in BED.training(0).ids_NT.tolist()}
    assert not evaluation & trained
    with pytest.raises(IntaglioError, match="unit 9999 was requested; the evaluation set has"):
        BED.source("evaluation", 9999)


def test_a_wrong_word_object_or_order_is_no_mode() -> None:
    prompt = BED.source("evaluation", 0)[0].ids
    objects = prompt[1 : 1 + OBJECTS]
    good = output(objects, 2, [0, 1, 1, 0])
    assert mode_of(prompt, good) == 2
    for place, token in ((1, objects[1]), (2, word(3, 1, 0)), (0, word(2, 1, 0)), (7, 0), (3, 0)):
        wrong = list(good)
        wrong[place] = token if wrong[place] != token else 1
        assert mode_of(prompt, wrong) is None
    assert mode_of(prompt, good[:-1]) is None
    assert mode_of(prompt, []) is None


def test_modes_are_counted_once() -> None:
    prompt = BED.source("evaluation", 0)[0].ids
    objects = prompt[1 : 1 + OBJECTS]
    outputs = [output(objects, 0, [0] * PLACES), output(objects, 0, [1] * PLACES), output(objects, 4, [0] * PLACES), []]
    assert modes_found(prompt, outputs) == {"modes found": 2 / 6, "valid outputs": 3 / 4}
    assert score(prompt, every_mode(prompt))["modes found"] == 1.0
