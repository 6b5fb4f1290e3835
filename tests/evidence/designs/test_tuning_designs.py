"""Designs of stn and amtrl_lasso: equal budgets, the same rows for every arm, and the test beds they stand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from intaglio.evidence.baselines.hyperparameter_search import search
from intaglio.evidence.claims.amtrl_lasso import CLAIM as AMTRL
from intaglio.evidence.claims.stn import CLAIM as STN_CLAIM
from intaglio.evidence.designs import tune_regularizers
from intaglio.evidence.engine.claim import RunKey
from intaglio.evidence.testbeds.linear_tasks import LinearTasks
from intaglio.trainer import TrainingRun
from intaglio.trainer.dataset import hold_out

KEY = RunKey("toy", 0)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_stays_in_its_ranges_and_is_keyed(sampler: Any) -> None:
    ranges = {"a": (0.0, 0.9), "b": (-12.0, -2.0)}

    def drawn(seed: int) -> list[Mapping[str, float]]:
        seen: list[Mapping[str, float]] = []
        search(lambda values: seen.append(dict(values)) or values["a"], ranges, 5, sampler, seed)  # type: ignore[func-returns-value]
        return seen

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert len(first) == 5
    for values in first:
        assert all(low <= values[name] <= high for name, (low, high) in ranges.items())


def test_the_arms_of_stn_have_equal_operations_and_validate_on_what_stn_holds_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    design: Any = STN_CLAIM.design.toy()
    held: list[Any] = []
    attach = tune_regularizers.STN.attach

    def watching(self: Any, run: TrainingRun) -> Any:
        if run.held_out is not None:
            held.append(run.held_out(0)["pixel_values"].numpy())
            assert run.rows == 64
        return attach(self, run)

    monkeypatch.setattr(tune_regularizers.STN, "attach", watching)
    results = {name: design.run(STN_CLAIM.arms[name], KEY, {}) for name in ("STN", "random search")}
    assert results["STN"].cost.flops == results["random search"].cost.flops > 0
    assert results["STN"].parity == results["random search"].parity
    images = design.bed.training(KEY.seed)
    validation = images.take(hold_out(images.names, 0.6, KEY.seed)[1])
    assert all((validation.pixels_NCHW.numpy() == image).all((1, 2, 3)).any() for image in held[0])


def test_linear_tasks_follow_from_the_seed_and_samples_have_prefixes() -> None:
    bed = LinearTasks().toy()
    B_DK, W_KT = bed.truth(3)
    assert np.allclose(B_DK.T @ B_DK, np.eye(bed.rank))
    assert np.allclose(np.linalg.norm(W_KT, axis=0), 1)
    source = bed.sources(3)[1]
    few, many = source.draw(5), source.draw(9)
    assert (few.x == many.x[:5]).all()
    assert (few.y_NH == many.y_NH[:5]).all()
    assert not (few.x == bed.sources(3)[2].draw(5).x).any()
    assert np.allclose(bed.target_heads(3)[:, 0], W_KT[:, 0])
    samples, map_D = bed.target(3, 1)
    assert samples.x.shape == (60, 8)
    assert np.allclose(map_D, B_DK @ W_KT[:, 1])


def test_every_arm_of_amtrl_lasso_draws_the_same_number_of_samples() -> None:
    design: Any = AMTRL.design.toy()
    for name, arm in AMTRL.arms.items():
        assert design.run(arm, KEY, {}).cost.tokens == 400 * 3, name
