"""Alignment with true laws: the source, equal loss reduction, and what permuting does."""

from __future__ import annotations

import pytest
import torch

from intaglio.evidence.designs.predictive_alignment import ALIGNMENT, LEFT, PERMUTED, WEIGHTED, PredictiveAlignment
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.finite_source import MixtureLaws

DESIGN = PredictiveAlignment().toy()


def values(trains: str, **settings: object) -> dict[str, float]:
    return DESIGN.run(Arm("an arm", {"trains": trains, **settings}), RunKey("toy", 0), {}).values  # type: ignore[return-value]


def test_a_source_is_a_mixture_of_few_laws() -> None:
    source = MixtureLaws().source(1)
    assert torch.allclose(source.laws_NV.sum(1), torch.ones(200))
    assert source.law_N.sum().item() == pytest.approx(1, abs=1e-5)
    for matrix in (source.laws_NV, source.targets_NV):
        assert int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5)) == 8
    assert not torch.equal(MixtureLaws().source(2).laws_NV, source.laws_NV)
    assert torch.equal(MixtureLaws().source(1).targets_NV, source.targets_NV)


def test_laws_align_and_random_targets_of_equal_reduction_do_not() -> None:
    laws, targets, permuted = (values(name) for name in ("laws", "targets", "permuted"))
    assert max(laws[LEFT.name], targets[LEFT.name], permuted[LEFT.name]) <= 0.02
    assert laws[ALIGNMENT.name] > 0.8 > 0.4 > max(targets[ALIGNMENT.name], permuted[ALIGNMENT.name])
    assert laws[PERMUTED.name] < 0.3
    assert laws[WEIGHTED.name] > 0.8


def test_the_ceiling_is_one_and_an_untrained_network_is_left_alone() -> None:
    assert values("oracle")[ALIGNMENT.name] == pytest.approx(1)
    untrained = values("nothing")
    assert untrained[LEFT.name] == 1
    assert untrained[ALIGNMENT.name] < 0.4
    assert values("laws", kernel="linear")[ALIGNMENT.name] != values("laws")[ALIGNMENT.name]
