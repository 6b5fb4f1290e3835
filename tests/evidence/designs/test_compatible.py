"""The design `Compatible` and its test bed, in miniature."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.claims.bt2 import CLAIM
from intaglio.evidence.designs.compatible import BOTH, DIMENSIONS, NEW_NEW, NEW_OLD, OLD_OLD
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.methods.retrieval.bt2 import BT2

KEY = RunKey("toy", 0)


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTAGLIO_HOME", str(tmp_path_factory.mktemp("home")))
        made = CLAIM.design.toy()
        made.bed.cached_pairs(KEY.seed)
        yield made


def test_an_arm_is_measured_in_every_direction(design: Any) -> None:
    results = {name: design.run(CLAIM.arms[name], KEY, {"steps": 3}) for name in ("bct", "bt2")}
    results["re-embedded"] = design.run(CLAIM.arms["re-embedded"], KEY, {})
    assert len({result.parity["data"] for result in results.values()}) == 1
    assert len({str(result.values[OLD_OLD.name]) for result in results.values()}) == 1
    for result in results.values():
        both, cross, own = (result.values[metric.name] for metric in (BOTH, NEW_OLD, NEW_NEW))
        assert fmean(both.values()) == pytest.approx((fmean(cross.values()) + fmean(own.values())) / 2)
    widths = {name: result.values[DIMENSIONS.name] for name, result in results.items()}
    assert widths == {"bct": 32, "bt2": 32, "re-embedded": 16}


def test_a_setting_that_reaches_nothing_is_refused(design: Any) -> None:
    with pytest.raises(IntaglioError, match="the settings wrong of the arm"):
        design.run(Arm("a", {"method": BT2(), "wrong": 1}), KEY, {})


def test_the_old_encoder_is_that_of_its_seed_and_packages(design: Any) -> None:
    texts = ["Return the loop.", "Load a template."]
    first, second = (design.bed.old_vectors(seed, texts, "query") for seed in (KEY.seed, KEY.seed))
    assert torch.equal(first, second)
    assert not torch.equal(first, design.bed.old_vectors(KEY.seed + 2, texts, "query"))
    assert torch.allclose(first.norm(dim=1), torch.ones(2), atol=1e-5)


def test_pairs_are_those_of_every_unit(design: Any, tmp_path: Path) -> None:
    pairs = design.bed.cached_pairs(KEY.seed)
    assert [len(part) for part in pairs] == [12] * 5
    assert torch.equal(pairs[0], design.bed.cached_pairs(KEY.seed + 2)[0])
