"""Pretrain and Finetune on the toy test bed: arms are pairs, settings reach their method, beds may differ."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.designs.measures import BITS, NEEDLE_SCORE, bits_per_byte, needles, weight_bytes
from intaglio.evidence.designs.training import Finetune, Pretrain
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.haystack import Haystack
from intaglio.evidence.testbeds.skills import Skills
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.weights.bitnet import BitNet
from intaglio.methods.weights.lost import LOST
from intaglio.trainer.data_selection import RandomExamples

PRETRAIN = Pretrain().toy()
KEY = RunKey("toy", 0)
PLAIN = Arm("as it is")
PAIR = Arm("low-rank", {"apply": LOST.low_rank(rank=2)})


def bits(design: Any, arm: Arm, key: RunKey = KEY, **tuned: Any) -> float:
    value = design.run(arm, key, tuned).values[BITS.name]
    assert isinstance(value, float)
    return value


def test_equal_arguments_give_equal_values_and_another_unit_others() -> None:
    assert bits(PRETRAIN, PLAIN) == bits(PRETRAIN, PLAIN)
    assert len({bits(PRETRAIN, PLAIN, RunKey("toy", index)) for index in range(3)}) == 3


def test_arms_of_a_unit_share_their_data_and_cost_is_counted() -> None:
    results = [PRETRAIN.run(arm, KEY, {}) for arm in (PLAIN, PAIR)]
    assert results[0].parity == results[1].parity
    assert results[0].cost.tokens == results[1].cost.tokens == 8 * 4 * 32
    assert results[0].cost.parameters > results[1].cost.parameters > 0
    assert results[0].cost.flops == 6 * results[0].cost.parameters * results[0].cost.tokens


def test_tuned_settings_reach_the_recipe_and_the_method_and_pass_arms_without_it() -> None:
    assert bits(PRETRAIN, PLAIN, learning_rate=1e-2) != bits(PRETRAIN, PLAIN, learning_rate=1e-3)
    arm = Arm("LOST", {"apply": LOST(rank=4, columns=0.25, within_rank=True)})
    assert bits(PRETRAIN, arm, gamma=0.1) != bits(PRETRAIN, arm, gamma=1.0)
    assert bits(PRETRAIN, PLAIN, gamma=0.1) == bits(PRETRAIN, PLAIN)
    # The arm's own setting is stronger than a tuned one.
    own = Arm("own rate", {"learning_rate": 1e-2})
    assert bits(PRETRAIN, own, learning_rate=1e-3) == bits(PRETRAIN, PLAIN, learning_rate=1e-2)


def test_an_own_setting_that_reaches_nothing_is_refused() -> None:
    with pytest.raises(IntaglioError, match="the settings lerning_rate of the arm are no field"):
        PRETRAIN.run(Arm("misspelt", {"lerning_rate": 1e-3}), KEY, {})


def test_modifiers_and_models() -> None:
    ternary = Pretrain(measures=(bits_per_byte, weight_bytes)).toy()
    wide = Arm("ternary, wide", {"modifiers": (BitNet(),), "model": {"width": 32}})
    values = ternary.run(wide, KEY, {}).values
    full = ternary.run(Arm("full, wide", {"model": {"width": 32}}), KEY, {}).values
    assert values["bytes of the projections"] < full["bytes of the projections"] / 4
    assert bits(PRETRAIN, Arm("started elsewhere", {"start": lambda bed, seed, model: bed.new(seed + 1)})) != bits(
        PRETRAIN, PLAIN
    )


def test_a_selector_chooses_among_the_data_that_all_arms_share() -> None:
    bed = Skills().toy()
    design = Finetune(bed, measures=(lambda measured: {"zeros": 0.0},), steps=2)
    arms = [Arm("random", {"select": RandomExamples(budget=share)}) for share in (0.1, 0.5)]
    few, many = (design.run(arm, KEY, {}) for arm in arms)
    assert few.parity == many.parity
    assert few.cost.tokens == many.cost.tokens == 2 * bed.batch * (bed.prompt_tokens + bed.digits + 1)


def test_finetuning_starts_from_the_trained_model_and_leaves_it_alone() -> None:
    design = Finetune(steps=3).toy()
    before = copy.deepcopy(design.bed.load().model.state_dict())
    tuned = bits(design, PLAIN)
    assert tuned < bits(PRETRAIN, Arm("few steps", {"steps": 3}))
    assert all(torch.equal(value, before[name]) for name, value in design.bed.load().model.state_dict().items())


def test_other_beds_and_measures() -> None:
    design = Pretrain(Haystack(), measures=(needles,)).toy()
    values = design.run(PLAIN, KEY, {}).values
    assert values[NEEDLE_SCORE.name] < 0
    assert 0 <= values["answers found"] <= 100


def test_designs_are_picklable_and_compare_by_their_fields() -> None:
    assert pickle.loads(pickle.dumps(PRETRAIN)) == PRETRAIN != Pretrain()
    assert Pretrain(SourceCode(width=64)) != Pretrain()
