"""Neurons that report a board: starts of the arms, and the units that are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from intaglio.evidence.claims.moe_x import ACTIVE, CLAIM, EXPERTS
from intaglio.evidence.designs.game_units import (
    COVERAGE,
    FIRING,
    GAME_LOSS,
    SINGLE_COVERAGE,
    _summed,
    activations,
    upcycled,
)
from intaglio.evidence.engine.claim import RunKey
from intaglio.evidence.testbeds.board_game import BoardGame
from intaglio.methods.activations.moe_x import moe_layers
from intaglio.modeling.anatomy import anatomy

BED = BoardGame().toy(steps=2)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTAGLIO_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def model_of(arm: str, **changes: Any) -> dict[str, Any]:
    return {**CLAIM.arms[arm].settings["model"], **changes}


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_a_token_uses_equally_many_units_in_all_arms(arm: str) -> None:
    model = upcycled(BED, 3, model_of(arm)).model
    layers = list(moe_layers(model).values())
    if not layers:
        assert anatomy(model).mlp(0).into.shape == (ACTIVE * BED.inner, BED.width)
        return
    config = layers[0].config
    assert (config.experts, config.active * config.units) == (EXPERTS, ACTIVE * BED.inner)


@pytest.mark.parametrize("arm", ["dense", "moe-x"])
def test_arms_start_as_the_dense_model_but_for_noise(arm: str) -> None:
    model = model_of(arm)
    if "experts" in model:
        model["experts"] = model["experts"].model_copy(update={"noise": 0.0})
    else:
        model["noise"] = 0.0
    ids = BED.games("train", "x", 4).ids_NT
    with torch.no_grad():
        logits, base = (c.model(ids).logits for c in (upcycled(BED, 3, model), BED.base(3, "relu")))
    torch.testing.assert_close(logits, base, atol=1e-5, rtol=1e-4)


def test_units_have_their_gates_and_copies_are_summed() -> None:
    checkpoint, boards = upcycled(BED, 3, model_of("moe-x")), BED.boards("validation", 0)
    z_PU, nats = activations(checkpoint, boards)
    assert z_PU.shape == (len(boards.properties_PK), EXPERTS * BED.inner)
    assert int((z_PU.unflatten(1, (EXPERTS, BED.inner)) != 0).any(-1).sum(1).max()) == ACTIVE
    examples, losses = boards.games.examples(), []
    with torch.no_grad():
        for example in examples:
            ids = example["input_ids"][None]
            losses.append((float(checkpoint.model(ids, labels=ids).loss), ids.shape[1] - 1))
    assert nats == pytest.approx(sum(a * b for a, b in losses) / sum(b for _, b in losses), rel=1e-4)
    summed = _summed(torch.arange(12.0)[None], 2, 2)  # two layers of three copies of two units
    assert summed.tolist() == [[0 + 2 + 4, 1 + 3 + 5, 6 + 8 + 10, 7 + 9 + 11]]


def test_a_run_measures_coverage_and_loss() -> None:
    design = CLAIM.design.toy(steps=2)
    results = [design.run(CLAIM.arms[arm], RunKey("toy", 0), {"learning_rate": 1e-3}) for arm in ("dense", "moe-x")]
    assert results[0].parity == results[1].parity
    assert results[0].cost.tokens == results[1].cost.tokens
    for result in results:
        values: Any = result.values
        assert 0 < values[SINGLE_COVERAGE.name] < 1
        assert 0 < values[COVERAGE.name] < 1
        assert values[GAME_LOSS.name] > 0
        assert 0 < values[FIRING.name] <= ACTIVE * BED.inner
