"""Random constrained models: the posterior is exact, and arms are measured against it."""

from __future__ import annotations

import itertools
import math

import pytest

from intaglio.evidence.designs.sample import CHECKS, TOTAL_VARIATION, Sample, total_variation
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.random_language_models import RandomLanguageModels
from intaglio.methods.decoding.awrs import AWRS

BED = RandomLanguageModels(letters=2, states=3, limit=5)


@pytest.mark.parametrize("seed", range(3))
def test_the_posterior_is_that_of_all_strings(seed: int) -> None:
    unit, joint = BED.unit(seed), {}
    for length in range(5):
        for tokens in itertools.product((1, 2), repeat=length):
            state = unit.state("".join("ab"[token - 1] for token in tokens))
            if state >= 0 and unit.final_S[state]:
                steps = [unit.table(tokens[:index])[token] for index, token in enumerate((*tokens, 0))]
                joint[*tokens, 0] = math.prod(float(step) for step in steps)
    assert unit.joint == pytest.approx(joint)
    assert sum(unit.posterior.values()) == pytest.approx(1)
    assert len(joint) >= 4


def test_distance_to_the_posterior() -> None:
    assert total_variation({(0,): 0.5, (1,): 0.5}, {(0,): 1.0}) == 0.5
    assert total_variation({}, {(0,): 1.0}) == 1


def test_arms_are_measured_on_the_same_model() -> None:
    """Draws of the posterior are the ceiling; with many particles AWRS reaches it, and masking does not."""
    design = Sample(RandomLanguageModels(letters=2, states=3, spread=3.0, limit=5), outputs=300, repeats=2)
    arms = {
        "exact": Arm("", {"exact": True}),
        "awrs": Arm("", {"method": AWRS()}),
        "local": Arm("", {"method": AWRS(proper_weights=False, ess_threshold=0.0)}),
    }
    distances = {name: [] for name in arms}
    for index in range(6):
        results = {name: design.run(arm, RunKey("toy", index), {}) for name, arm in arms.items()}
        assert len({result.parity["posterior"] for result in results.values()}) == 1
        for name, result in results.items():
            distances[name].append(result.values[TOTAL_VARIATION.name])
        assert results["awrs"].values[CHECKS.name] > 0
    mean = {name: sum(values) / 6 for name, values in distances.items()}
    assert mean["exact"] < 0.06
    assert mean["awrs"] < mean["exact"] + 0.06
    assert mean["local"] > mean["awrs"] + 0.05
