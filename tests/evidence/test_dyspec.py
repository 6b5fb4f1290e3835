"""The plumbing of DySpec's claim, end to end on tiny models in the place of SmolLM2 and its draft."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from functools import lru_cache
from pathlib import Path
from typing import cast

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.evidence import dyspec
from intaglio.evidence.dyspec import DRAFTS, EXPERIMENTS, FRESH, METHODS, NODES, SECONDS, TOKENS, Drafted, Part
from intaglio.evidence.experiment import Unit
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.worlds.smollm2_draft import SmolLM2Draft
from intaglio.methods.decoding.dyspec import DySpec
from intaglio.speculative.drafters.rank_statistics import draft_ranks
from intaglio.speculative.static_tree import StaticTree
from tests.families import tiny_checkpoint_dir, tiny_model, tiny_tokenizer


@lru_cache
def _pair() -> tuple[Checkpoint, Checkpoint]:
    target = tiny_model("llama", layers=1)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tokenizer = tiny_tokenizer("llama")
    return Checkpoint(target, tokenizer, "tiny"), Checkpoint(draft, tokenizer, "tiny draft")


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A world without files: a target, one like it, prompts at random."""

    count: int = 4

    def target(self) -> Checkpoint:
        return _pair()[0]

    def draft(self) -> Checkpoint:
        return _pair()[1]

    def prompts(self, part: Part, base: int = 0) -> list[list[int]]:
        draws = torch.Generator().manual_seed(["fit", "pilot", "run"].index(part) + 3 * base)
        found: list[list[int]] = torch.randint(4, 160, (self.count, 12), generator=draws).tolist()
        return found


def test_end_to_end(tmp_path: Path) -> None:
    quick = dataclasses.replace(
        dyspec.experiment(Tiny(), new=6), pilot_runs=2, most_runs=2, secondary_runs=2, threads=1
    )
    document = prove("dyspec", experiment=quick, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(METHODS)
    assert len(document["secondaries"]) == 14
    for run in document["runs"]:
        values = run["outcome"]["values"]
        assert set(values) == {TOKENS, FRESH, DRAFTS, SECONDS}
        assert values[TOKENS]["prompt"] >= 1


def test_greedy_arms_say_the_same_and_stay_in_their_rows() -> None:
    world, new = Tiny(), 12
    target = world.target()
    prompt = world.prompts("run")[1]
    stock = dyspec.generate(target, None, prompt, new, None).ids
    for arm, spec in METHODS.items():
        found = dyspec.generate(target, dyspec.make(arm, world, new), prompt, new, 3 if spec.warm else None)
        assert sum(found.steps) == len(found.ids) == new
        assert spec.warm or found.ids == stock
        assert found.rows <= len(prompt) + (len(found.steps) - 1) * (spec.nodes + 1)
    outcomes = [dyspec.Continue(world, 6)(arm, Unit("run", 1), 0) for arm in ("fixed", "dyspec")]
    assert outcomes[0].shared == outcomes[1].shared
    with pytest.raises(IntaglioError, match="prompt 4 was asked for; the world has 4"):
        dyspec.Continue(world, 6)("dyspec", Unit("run", 4), 0)


def test_the_fixed_tree_is_the_best_on_the_fitting_prompts_alone() -> None:
    world, new = Tiny(), 12
    ranks = [draft_ranks(world.draft().model, (ids, start + 1)) for ids, start in dyspec._said(world, False, new)]
    assert len(ranks) == world.count
    assert [ids[:12] for ids, _ in dyspec._said(world, False, new)] == world.prompts("fit")
    for nodes in (16, NODES):
        fixed = dyspec.shape(world, "fixed", nodes, False, new)
        assert len(fixed) <= nodes
        passes = sum(map(fixed.replay, ranks))
        for other in (dyspec.shape(world, "widths", nodes, False, new), StaticTree.from_widths((1,) * nodes)):
            assert passes <= sum(map(other.replay, ranks))
    warm = dyspec.shape(world, "fixed", NODES, True, new)
    chances = dyspec._chances(world, True, new)
    assert warm.expected(chances) >= dyspec.shape(world, "widths", NODES, True, new).expected(chances)


def test_acceptance_is_fitted_on_the_same_text_as_the_trees() -> None:
    world, new = Tiny(), 12
    drafter = cast(DySpec, dyspec.make("dyspec-fitted", world, new))
    table = drafter.acceptance
    assert table is not None
    ranks = [rank for of_text in dyspec._ranks(world, new) for rank in of_text]
    # A choice is tried where all before it were wrong.
    assert sum(table.tried) == sum(min(rank + 1, NODES) for rank in ranks)
    assert sum(table.accepted) == sum(rank < NODES for rank in ranks)
    assert [name for name, arm in METHODS.items() if arm.fitted] == ["dyspec-fitted"]


def test_the_sets_of_prompts_share_nothing(corpus_file: Path, tmp_path: Path) -> None:
    model = str(tiny_checkpoint_dir("llama", tmp_path / "tiny", layers=1))
    world = Drafted(
        SmolLM2Wikipedia(model=model, texts=str(corpus_file)),
        SmolLM2Draft(model=model),
        tokens=20,
        fit=2,
        pilot=2,
        run=4,
    )
    parts: tuple[Part, ...] = ("fit", "pilot", "run")
    found = {part: world.prompts(part) for part in parts}
    assert [len(found[part]) for part in parts] == [2, 2, 4]
    every = [tuple(prompt) for part in parts for prompt in found[part]]
    assert len(set(every)) == len(every)
    assert all(len(prompt) == 20 for prompt in every)
    assert world.prompts("run") == found["run"] != world.prompts("run", 1)
    with pytest.raises(IntaglioError, match="texts of a kind have 20 tokens; 500 are needed for run:0"):
        dataclasses.replace(world, run=1000).prompts("run")


def test_the_claim() -> None:
    chosen = experiment_of("dyspec")
    assert chosen is EXPERIMENTS["cpu"]
    assert (chosen.baseline, chosen.method, chosen.delta, chosen.tier) == ("fixed", "dyspec", 0.1, "cpu")
    assert (chosen.metric, chosen.direction, chosen.design) == (TOKENS, "higher", "independent")
    first = chosen.secondaries[0]
    assert (first.baseline, first.method, first.metric) == ("fixed", "dyspec-fitted", TOKENS)
    assert METHODS["dyspec-fitted"] == dataclasses.replace(
        METHODS["dyspec"], what=METHODS["dyspec-fitted"].what, fitted=True
    )
    assert METHODS["fixed"].nodes == METHODS["dyspec"].nodes == NODES == 32
    assert not any(METHODS[arm].warm for arm in ("fixed", "dyspec"))
    there = pickle.loads(pickle.dumps(chosen))
    assert (there.digest, there.run_unit) == (chosen.digest, chosen.run_unit)
