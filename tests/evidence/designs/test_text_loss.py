"""The design that scores texts: disjoint units, both kinds of arms, and bytes as the unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence.baselines.dynamic_evaluation import dynamic_evaluation
from intaglio.evidence.claims.apply_pretrained import CLAIM
from intaglio.evidence.designs.text_loss import NATS, TextLoss
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.engine.golden import TOLERANCE, golden_values, toy_results
from intaglio.measures.language_modeling import quality
from intaglio.methods.decoding.apply_pretrained import ApplyPretrained

DESIGN = replace(TextLoss().toy(tokens=48, context=48), fixed=())


def run(settings: dict[str, Any], index: int = 0, **tuned: Any) -> Any:
    return DESIGN.run(Arm("an arm", settings), RunKey("probe", index), tuned)


def test_without_a_step_it_is_the_loss_of_the_model() -> None:
    result = run({"method": ApplyPretrained(window=16, step_size=0.0), "passes": 1})
    segments = DESIGN.bed.documents("pilot").segments
    losses = quality(DESIGN.bed.load(), segments, batch_size=2).losses[:2]
    assert list(result.values[NATS.name].values()) == pytest.approx(losses, rel=1e-4)
    assert result.cost.tokens == 96


def test_units_share_no_text_and_tuned_settings_arrive() -> None:
    first, second = (run({"method": ApplyPretrained(window=16), "passes": 2}, n).values[NATS.name] for n in (0, 1))
    assert not first.keys() & second.keys()
    arm = {"score": dynamic_evaluation, "window": 16, "passes": 3}
    still, moved = (run(arm, learning_rate=rate) for rate in (0.0, 1e-2))
    assert still.values != moved.values
    assert still.cost.flops == 3 / 2 * run({"method": ApplyPretrained(), "passes": 2}).cost.flops
    with pytest.raises(IntaglioError, match="102 pilot texts were requested"):
        run(arm, 50, learning_rate=0.0)


def test_a_step_of_the_arm_itself_is_not_tuned() -> None:
    """An ablation with another rule keeps its own step although it inherits the method's tuned settings."""
    plain, kept, tuned = (
        run({"method": ApplyPretrained(window=16), "passes": 2, **own}, step_size=1.0).values
        for own in ({"step_size": 0.0}, {"step_size": 0.0, "rule": "sgd"}, {})
    )
    assert plain == kept != tuned
    ablation = CLAIM.arms["plain gradient"].settings
    assert (ablation["rule"], ablation["step_size"]) == ("sgd", 0.1)


def test_the_miniature_shows_the_steps() -> None:
    """Golden numbers of the method and its baseline differ from the plain model's beyond their tolerance."""
    goldens = [values[NATS.name] for values in CLAIM.golden.values()]
    plain = golden_values(toy_results(CLAIM, ["plain model"]))["plain model"][NATS.name]
    assert all(abs(value - plain) > 3 * TOLERANCE * plain for value in goldens)
