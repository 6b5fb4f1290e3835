"""Known directions: the testbed's samples, and arms that are measured on the same ones."""

from __future__ import annotations

import pytest
import torch

from intaglio.dictionaries.baselines import TopKSAE
from intaglio.errors import IntaglioError
from intaglio.evidence.designs.recover_features import ACTIVE, RECOVERED, UNEXPLAINED, RecoverFeatures
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.sparse_features import SparseFeatures
from intaglio.methods.activations.gba_sae import GBASAE

BED = SparseFeatures(features=10, width=10, samples=400, sparsities=(1, 4))
KEY = RunKey("toy", 0)


def test_samples_are_sums_of_few_directions() -> None:
    directions, x_ND = BED.directions(3), BED.activations(3)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(10))
    codes = torch.linalg.solve(directions.T.double(), x_ND.T.double()).T
    active = codes.abs() > 1e-3
    assert set(active.sum(1).tolist()) == {1, 4}
    assert 0.35 < float((active.sum(1) == 1).double().mean()) < 0.65
    assert 0.49 < float(codes[active].min()) < 0.6
    assert 1.4 < float(codes[active].max()) < 1.51
    assert float(active.double().mean(0).min()) > 0.15
    assert BED.frequency == 0.25
    assert torch.equal(BED.activations(3), x_ND)
    assert not torch.equal(BED.activations(4), x_ND)
    assert not torch.equal(BED.directions(4), directions)


def test_arms_share_samples_and_measures_are_means_over_dictionaries() -> None:
    design = RecoverFeatures(BED, width=20, steps=30, batch_tokens=20)

    def run(**settings: object) -> dict[str, float]:
        result = design.run(Arm("", settings), KEY, {"learning_rate": 0.01})
        digests.add(result.parity["samples"])
        assert result.cost.tokens == 600
        return dict(result.values)

    digests: set[str] = set()
    one, two = (run(dictionaries=(TopKSAE(k=k),)) for k in (1, 4))
    both = run(dictionaries=(TopKSAE(k=1), TopKSAE(k=4)))
    assert both == pytest.approx({name: (one[name] + two[name]) / 2 for name in one})
    assert one[ACTIVE.name] == 1
    assert 3.9 < two[ACTIVE.name] <= 4
    assert run(oracle=True)[RECOVERED.name] == 1
    assert run(dictionaries=(GBASAE(),), groups=2)[UNEXPLAINED.name] > 0
    assert len(digests) == 1
    with pytest.raises(IntaglioError, match="are no field of its methods"):
        run(dictionaries=(GBASAE(),), k=3)
