"""The loss of a middle line: the hole alone is scored, in the model's own format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intaglio.evidence.baselines.fim import FillInMiddleTraining
from intaglio.evidence.designs.base import Measured
from intaglio.evidence.designs.infill import LINE, SINGLE, _line, _losses, middle_lines
from intaglio.evidence.engine.claim import RunKey
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.objectives.codegen2 import CodeGen2
from intaglio.trainer import KeyedRNG

BED = SourceCode().toy(context=64, tokens=56, depth=2)
FIELDS: dict[str, Any] = {"length": 64, "pack": False}


def measured(objective: Any) -> Measured:
    checkpoint = BED.new(0)
    list(objective.prepare(checkpoint, [], KeyedRNG(0)))
    return Measured(checkpoint, BED, RunKey("toy", 0), {"objective": objective})


@pytest.mark.parametrize("objective", [CodeGen2(**FIELDS), FillInMiddleTraining(**FIELDS)])
def test_a_hole_is_scored_after_its_prompt(objective: Any) -> None:
    one = measured(objective)
    row = one.documents.segments.ids_NT[0].tolist()
    prefix, hole, suffix = _line(one.checkpoint.tokenizer, row) or ([], [], [])
    assert prefix + hole + suffix == row
    losses, _ = _losses(one, objective._tokens, [(prefix, hole, suffix)])
    prompt = objective._tokens.prompt([prefix, suffix])
    with torch.no_grad():
        scores = one.checkpoint.model(torch.tensor([prompt + hole])).logits[0].log_softmax(-1)
    expected = [-float(scores[len(prompt) - 1 + place, token]) for place, token in enumerate(hole)]
    assert losses[0] == pytest.approx(expected, rel=1e-4)


def test_a_causal_model_has_the_prefix_alone() -> None:
    one = measured(CodeGen2(**FIELDS, corruption_ratio=0.0))
    hole = ([10, 65, 66], [67, 68], [69, 10])
    other = ([10, 65, 66], [67, 68], [70, 71, 72])
    assert _losses(one, None, [hole]) == _losses(one, None, [other])
    values = middle_lines(one)
    assert isinstance(values[LINE.name], float)
    assert 0 <= values[SINGLE.name] <= 100  # type: ignore[operator]


def test_a_prefix_lm_reads_both_ways() -> None:
    one = measured(CodeGen2(**FIELDS, attention="prefix"))
    plain = Measured(one.checkpoint, BED, one.key, {"objective": CodeGen2(**FIELDS)})
    assert middle_lines(one)[LINE.name] != middle_lines(plain)[LINE.name]
