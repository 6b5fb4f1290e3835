"""Replay gives the real loop's passes on a small model, for every drafter that it replays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.evidence.designs import drafters
from intaglio.evidence.designs.drafters import medusa, medusa_sizes, trained_heads
from intaglio.evidence.designs.replay import (
    AGREED_TOKENS,
    AGREEMENT,
    BEFORE_LOOP,
    DRAFT_PASSES,
    TOKENS,
    Passes,
    Replay,
    continuations,
    loop_start,
    ratio,
)
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.decoding.chimera import Chimera
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer
from intaglio.methods.decoding.lud import LUD
from intaglio.speculative.drafters.medusa import MedusaHeads
from intaglio.trainer import train

KEY = RunKey("look", 0)
BED = SourceCode().toy(steps=150, context=64, tokens=24, documents_run=6)
DESIGN = Replay(BED, new=24)
METHOD = Chimera(heads=2)


class Draft:
    """A test bed whose draft model is the target less trained."""

    def load(self) -> Any:
        return dataclasses.replace(BED, steps=60).load()

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Draft)


ARMS = {
    "lookup": Arm("prompt lookup", {"drafter": drafters.prompt_lookup}),
    "lookup tree": Arm("merged", {"drafter": drafters.prompt_lookup, "candidates": 3, "length": 6}),
    "aded": Arm("ADED", {"drafter": drafters.aded}),
    "chain": Arm("chain", {"drafter": drafters.fixed_tree, "tree": "chain", "nodes": 4, "draft": Draft()}),
    "best": Arm("best tree", {"drafter": drafters.fixed_tree, "nodes": 8, "draft": Draft()}),
    "dyspec": Arm("DySpec", {"drafter": drafters.dyspec, "nodes": 8, "draft": Draft()}),
    "fitted": Arm("fitted", {"drafter": drafters.dyspec, "nodes": 8, "fitted": True, "draft": Draft()}),
    "medusa": Arm("Medusa", {"drafter": medusa, "like": METHOD, "heads": 2}),
    "chimera": Arm("Chimera", {"drafter": trained_heads, "method": METHOD}),
}


@pytest.fixture(autouse=True)
def home(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "smollm2" not in request.node.name:  # its model lies in the user's cache
        monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path_factory.getbasetemp() / "replay"))


@pytest.mark.parametrize("name", ARMS)
def test_a_replay_gives_the_passes_of_the_real_loop(name: str) -> None:
    result = DESIGN.run(ARMS[name], KEY, {})
    real = dataclasses.replace(DESIGN, real_loop=True).run(ARMS[name], KEY, {})
    for metric in (TOKENS.name, BEFORE_LOOP.name):
        assert result.values[metric] == real.values[metric]
    assert result.cost.flops == real.cost.flops
    assert result.parity == real.parity
    assert result.values[TOKENS.name] >= 1.0  # type: ignore[operator]
    assert (DRAFT_PASSES.name in result.values) == (name in ("chain", "best", "dyspec", "fitted"))


def test_drafters_do_guess_here() -> None:
    rates = {name: DESIGN.run(ARMS[name], KEY, {}).values[TOKENS.name] for name in ("lookup", "chain", "best")}
    assert all(rate > 1.1 for rate in rates.values()), rates  # type: ignore[operator]
    assert rates["best"] >= 1.2  # type: ignore[operator]


def test_hidden_transfer_runs_its_true_pass_in_one_batch() -> None:
    arm = Arm("Hidden Transfer", {"drafter": trained_heads, "method": HiddenTransfer(ahead=2)})
    design = Replay(SourceCode().toy(steps=60, depth=2, context=64, tokens=24, documents_run=4), new=16)
    batched, alone = (dataclasses.replace(design, real_loop=loop).run(arm, KEY, {}) for loop in (False, True))
    assert batched.values == alone.values


def test_lexical_units_count_by_their_agreement() -> None:
    arm = Arm("LUD", {"target": _tuned, "decoder": _lud})
    loose, strict = (DESIGN.run(arm, KEY, {"beta": beta}).values for beta in (0.0, 2.0))
    assert strict[TOKENS.name] == strict[AGREED_TOKENS.name] == strict[AGREEMENT.name] == 1.0
    assert loose[TOKENS.name] > 3  # type: ignore[operator]
    assert loose[AGREEMENT.name] < 1  # type: ignore[operator]
    assert loose[AGREED_TOKENS.name] < loose[TOKENS.name]  # type: ignore[operator]


def _tuned(bed: SourceCode) -> Any:
    checkpoint = bed.new(0)
    train(checkpoint, bed.training(0), objective=LUD(cap=4, anchors=4, length=32), **{**bed.recipe(0), "steps": 3})
    return checkpoint


def _lud(context: Any, beta: float) -> LUD:
    return LUD(cap=4, beta=beta, guard="none", tokenizer=context.target.tokenizer)


def test_texts_are_generated_once_and_end_at_a_stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    target = BED.load()
    prompts = tuple(prompt.ids for prompt in BED.source("evaluation", 0))
    texts = continuations(target, prompts, 20, True)
    monkeypatch.setattr(target.model, "generate", lambda *a, **k: pytest.fail("generated again"))
    continuations.cache_clear()
    again = continuations(target, prompts, 20, False)
    for text, other in zip(texts, again, strict=True):
        assert text.new == other.new
        assert len(text.new) == 20 or text.new[-1] == target.tokenizer.eos_token_id
        assert text.hidden_TD is not None
        assert text.hidden_TD.shape == (len(text.prompt) + len(text.new), 16)
        assert other.hidden_TD is None


def test_units_are_paired_and_head_trainings_differ_by_unit() -> None:
    parity = [DESIGN.run(ARMS["medusa"], RunKey("look", index), {}).parity for index in (0, 1)]
    assert parity[0] == parity[1]  # the same prompts
    folder = Path(str(pytest.importorskip("intaglio.data.assets").cache_dir())) / "testbeds"
    assert len(list(folder.glob("draft_heads-*/choices.json"))) >= 2


def test_counts_by_hand() -> None:
    passes = Passes([1] * 10, [1, 4, 1, 4], 0)
    assert passes.count() == (9, 3)
    assert passes.count(5) == (5, 2)
    assert ratio([passes.count(), (1, 3)]) == 10 / 6
    assert ratio([(0, 0)]) == 1.0


@pytest.mark.parametrize(
    ("text", "start"),
    [([1, 2, 3, 4], 4), ([5, 1, 2, 1, 2], 1), ([1, 1, 1], 0), ([1, 2, 3, 3], 2), ([1, 2, 3, 1, 2], 5), ([], 0)],
)
def test_where_a_text_begins_to_repeat_itself(text: list[int], start: int) -> None:
    assert loop_start(text) == start


def test_medusa_heads_have_nearly_the_parameters_of_a_budget() -> None:
    model = BED.load().model
    for budget in (2_000, 20_000, 60_000):
        heads = MedusaHeads(model, heads=2, **medusa_sizes(model, 2, budget))  # type: ignore[arg-type]
        assert 0.9 * budget < sum(p.numel() for p in heads.parameters()) <= budget
    assert torch.is_grad_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lookup", "aded"])
def test_a_replay_gives_the_real_passes_on_twenty_prompts_of_smollm2(name: str) -> None:
    design = Replay(new=32)
    for index in range(4):
        key = RunKey("probe", index)
        result = design.run(ARMS[name], key, {}).values
        assert result == dataclasses.replace(design, real_loop=True).run(ARMS[name], key, {}).values
