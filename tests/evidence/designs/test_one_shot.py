"""OneShot on the toy test bed, and the output error by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.measures import LOG_PERPLEXITY, OUTPUT_ERROR, log_perplexity, output_error, output_errors
from intaglio.evidence.designs.one_shot import OneShot
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.methods.weights.wanda import Wanda
from intaglio.modeling.anatomy import anatomy

DESIGN = OneShot(measures=(log_perplexity, output_error)).toy()
KEY = RunKey("look", 0)
DENSE, WANDA = Arm("dense"), Arm("Wanda", {"method": Wanda(sparsity=0.5)})


def test_a_unit_is_a_calibration_draw_that_all_arms_share() -> None:
    before = copy.deepcopy(DESIGN.bed.load().model.state_dict())
    results = [DESIGN.run(arm, KEY, {}) for arm in (DENSE, WANDA)]
    assert results[0].parity == results[1].parity
    assert DESIGN.run(WANDA, RunKey("look", 1), {}).parity["calibration"] != results[0].parity["calibration"]
    assert DESIGN.run(WANDA, RunKey("look", 1), {}).parity["documents"] == results[0].parity["documents"]
    assert all(torch.equal(value, before[name]) for name, value in DESIGN.bed.load().model.state_dict().items())
    dense, wanda = (result.values[LOG_PERPLEXITY.name] for result in results)
    assert dense.keys() == wanda.keys() == set(DESIGN.bed.documents("evaluation").names)  # type: ignore[union-attr]
    assert results[0].values[OUTPUT_ERROR.name] == 0
    assert 0 < results[1].values[OUTPUT_ERROR.name] < 1  # type: ignore[operator]
    assert results[0].cost.parameters > results[1].cost.parameters
    assert results[1].cost.flops > results[0].cost.flops == 0


def test_tuned_fields_reach_the_method() -> None:
    strong, weak = (DESIGN.run(WANDA, KEY, {"sparsity": sparsity}).cost.parameters for sparsity in (0.5, 0.25))
    assert strong < weak


def test_wanda_beats_magnitude_in_output_error() -> None:
    arm = Arm("magnitude", {"method": Magnitude(sparsity=0.5)})
    errors = [DESIGN.run(one, KEY, {}).values[OUTPUT_ERROR.name] for one in (WANDA, arm)]
    assert errors[0] < errors[1]  # type: ignore[operator]


def test_output_errors_by_hand() -> None:
    dense = SourceCode().toy().load()
    ids = torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(0))
    same = Checkpoint(copy.deepcopy(dense.model))
    assert set(output_errors(dense, same, ids).values()) == {0.0}
    for scale, expected in ((0.5, 0.25), (0.0, 1.0)):  # W - cW = (1 - c) W at every layer, whatever enters
        changed = Checkpoint(copy.deepcopy(dense.model))
        for _, linear in anatomy(changed.model).all_linears():
            linear.write(linear.read() * scale)
        errors = output_errors(dense, changed, ids)
        assert list(errors.values()) == pytest.approx([expected] * len(errors))
    # The first token does not count.
    other = ids.clone()
    other[:, 0] = 251
    one_token = [output_errors(dense, changed, rows[:, :2]) for rows in (ids, other)]
    assert one_token[0].keys() == one_token[1].keys()
    assert not anatomy(dense.model).all_linears()[0][1].module._forward_pre_hooks
