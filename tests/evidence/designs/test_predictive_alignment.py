"""Alignment with true distributions: the source, equal loss reduction, and what permuting does."""

from __future__ import annotations

import pytest
import torch

from intaglio.evidence.designs.predictive_alignment import ALIGNMENT, LEFT, PERMUTED, WEIGHTED, PredictiveAlignment
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.finite_source import MixtureDistributions

DESIGN = PredictiveAlignment().toy()


def values(trains: str, **settings: object) -> dict[str, float]:
    return DESIGN.run(Arm("an arm", {"trains": trains, **settings}), RunKey("toy", 0), {}).values  # type: ignore[return-value]


def test_a_source_is_a_mixture_of_few_distributions() -> None:
    source = MixtureDistributions().source(1)
    assert torch.allclose(source.distributions_NV.sum(1), torch.ones(200))
    assert source.weight_N.sum().item() == pytest.approx(1, abs=1e-5)
    for matrix in (source.distributions_NV, source.targets_NV):
        assert int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5)) == 8
    assert not torch.equal(MixtureDistributions().source(2).distributions_NV, source.distributions_NV)
    assert torch.equal(MixtureDistributions().source(1).targets_NV, source.targets_NV)


def test_distributions_align_and_random_targets_of_equal_reduction_do_not() -> None:
    distributions, targets, permuted = (values(name) for name in ("distributions", "targets", "permuted"))
    assert max(distributions[LEFT.name], targets[LEFT.name], permuted[LEFT.name]) <= 0.02
    assert distributions[ALIGNMENT.name] > 0.8 > 0.4 > max(targets[ALIGNMENT.name], permuted[ALIGNMENT.name])
    assert distributions[PERMUTED.name] < 0.3
    assert distributions[WEIGHTED.name] > 0.8


def test_the_ceiling_is_one_and_an_untrained_network_is_left_alone() -> None:
    assert values("oracle")[ALIGNMENT.name] == pytest.approx(1)
    untrained = values("nothing")
    assert untrained[LEFT.name] == 1
    assert untrained[ALIGNMENT.name] < 0.4
    assert values("distributions", kernel="linear")[ALIGNMENT.name] != values("distributions")[ALIGNMENT.name]
