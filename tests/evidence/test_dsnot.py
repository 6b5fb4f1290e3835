"""The first claim's plumbing, end to end on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.evidence import dsnot, record
from intaglio.evidence.dsnot import ERROR, EXPERIMENTS, LOSS, METHODS, Carve, experiment, layer_errors
from intaglio.evidence.experiment import Experiment, Unit
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.measures.language_modeling import quality
from intaglio.modeling.anatomy import anatomy
from tests.families import tiny_checkpoint_dir

Small = Callable[..., SmolLM2Wikipedia]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Small:
    model = tiny_checkpoint_dir("llama", tmp_path_factory.mktemp("world") / "tiny", layers=2)

    def make(**sizes: int) -> SmolLM2Wikipedia:
        default = {"samples": 4, "length": 24, "documents_run": 6, "documents_pilot": 4, "tokens": 20}
        return SmolLM2Wikipedia(model=str(model), texts=str(corpus_file), **(default | sizes))

    return make


def quick(world: SmolLM2Wikipedia) -> Experiment:
    """The experiment with fewer draws."""
    return dataclasses.replace(experiment(world), pilot_runs=2, most_runs=3, threads=1)


def test_end_to_end(small: Small, tmp_path: Path) -> None:
    world = small()
    document = prove("dsnot", experiment=quick(world), directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert document["sizes"] == {"calibration draw": 3, "document": 6, "pairs": 18}
    assert set(document["arms"]) == set(METHODS)
    assert len(document["secondaries"]) == 7
    runs = document["runs"]
    assert len(runs) == 2 * 2 + 3 * len(METHODS)
    for run in runs:
        names = set(world.documents(run["stage"]).names)
        assert run["outcome"]["values"][LOSS].keys() == run["outcome"]["values"][ERROR].keys() == names
    # Two runs of the same code on the same seeds: only the clock differs.
    again = prove("dsnot", experiment=quick(world), directory=tmp_path / "again")
    for a, b in zip(runs, again["runs"], strict=True):
        assert a["outcome"]["values"] == b["outcome"]["values"]
    assert again["interval"] == document["interval"]


def test_all_arms_of_a_draw_see_the_very_same_tokens(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[str]] = {}
    world = small()

    def spy(kind: type) -> None:
        apply = kind.apply  # type: ignore[attr-defined]

        def watched(self: Any, checkpoint: Checkpoint, calibration: Any, **options: Any) -> Checkpoint:
            seen.setdefault(options["seed"], set()).add(calibration.digest)
            return apply(self, checkpoint, calibration, **options)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, "apply", watched)

    for kind in (dsnot.Wanda, dsnot.DSnoT, dsnot.SparseGPT):
        spy(kind)
    outcomes = {}
    for index in range(2):
        unit = Unit("run", index)
        for arm in METHODS:
            outcomes[index, arm] = Carve(world)(arm, unit, unit.seed)
    assert len(seen) == 2
    assert all(len(digests) == 1 for digests in seen.values())
    assert len(set.union(*seen.values())) == 2
    for (index, arm), outcome in outcomes.items():
        assert {outcome.shared["calibration"]} == seen[Unit("run", index).seed], arm
        assert outcome.cost.tokens == 4 * 24
        assert outcome.cost.flops > 0
        assert outcome.cost.seconds > 0
        assert outcome.shared["documents"] == outcomes[0, "wanda"].shared["documents"]


def test_the_dense_model_stays_as_it_is_and_the_numbers_are_of_the_carved_one(small: Small) -> None:
    world = small()
    dense = world.load()
    before = copy.deepcopy(dense.model.state_dict())
    unit = Unit("run", 0)
    outcome = Carve(world)("dsnot", unit, unit.seed)
    assert all(torch.equal(value, before[name]) for name, value in dense.model.state_dict().items())
    carved = Checkpoint(copy.deepcopy(dense.model), dense.tokenizer, "tiny")
    dsnot.DSnoT(sparsity=0.7).apply(carved, world.calibration(unit.seed).segments, batch_size=dsnot.BATCH)
    losses = quality(carved, world.documents("run").segments, batch_size=dsnot.BATCH).losses
    assert list(outcome.values[LOSS].values()) == list(losses)
    zeros = sum(int((p == 0).sum()) for p in carved.model.parameters())
    assert zeros > 0
    assert outcome.cost.parameters == sum(p.numel() for p in carved.model.parameters()) - zeros


def test_layer_errors_by_hand(small: Small) -> None:
    dense = small().load()
    ids = torch.randint(8, 150, (3, 7), generator=torch.Generator().manual_seed(0))
    same = Checkpoint(copy.deepcopy(dense.model))
    assert layer_errors(dense, same, ids) == [0.0] * 3
    halved = Checkpoint(copy.deepcopy(dense.model))
    for _, linear in anatomy(halved.model).all_linears():
        linear.write(linear.read() * 0.5)
    # W - W/2 = W/2 at every layer, whatever enters: a quarter of the energy.
    assert layer_errors(dense, halved, ids) == pytest.approx([0.25] * 3)
    emptied = Checkpoint(copy.deepcopy(dense.model))
    for _, linear in anatomy(emptied.model).all_linears():
        linear.write(torch.zeros_like(linear.read()))
    assert layer_errors(dense, emptied, ids) == pytest.approx([1.0] * 3)
    assert not anatomy(dense.model).all_linears()[0][1].module._forward_pre_hooks


def test_the_split_is_sealed(small: Small) -> None:
    world = small()
    parts = {part: set(world.part(part).hashes) for part in ("calibration", "pilot", "evaluation")}  # type: ignore[arg-type]
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 400
    inner = {part: set(world.part(part).hashes) for part in ("fitting", "validation")}  # type: ignore[arg-type]
    assert inner["fitting"] | inner["validation"] == parts["calibration"]
    assert not inner["fitting"] & inner["validation"]
    short = {name: {digest[:12] for digest in hashes} for name, hashes in (parts | inner).items()}
    for seed in range(20):
        assert set(world.calibration(seed).names) <= short["calibration"]
        assert set(world.calibration(seed, "tuning").names) <= short["fitting"]
        assert set(world.documents("tuning", seed).names) <= short["validation"]
        assert set(world.documents("pilot", seed).names) <= short["pilot"]
        assert set(world.documents("run", seed).names) <= short["evaluation"]


def test_draws_and_documents_follow_from_seeds_alone(small: Small) -> None:
    world, twin = small(), small()
    assert world.calibration(3).segments.digest == twin.calibration(3).segments.digest
    assert len({world.calibration(seed).segments.digest for seed in range(10)}) == 10
    assert world.documents("run").segments.digest == twin.documents("run").segments.digest
    assert world.documents("run", 0).segments.digest != world.documents("run", 1).segments.digest
    windows = world.documents("run")
    assert windows.segments.ids_NT.shape == (6, 20)
    assert len(set(windows.names)) == 6
    # Every window is a run of tokens of the document that it is named after.
    texts = {digest[:12]: text for text, digest in zip(*_documents(world), strict=True)}
    for name, row in zip(windows.names, windows.segments.ids_NT.tolist(), strict=True):
        assert world.load().tokenizer.decode(row) in texts[name]


def _documents(world: SmolLM2Wikipedia) -> tuple[tuple[str, ...], tuple[str, ...]]:
    corpus = world.part("evaluation")
    return corpus.documents, corpus.hashes


def test_too_few_long_documents_are_one_sentence(small: Small) -> None:
    with pytest.raises(IntaglioError, match="have 0 evaluation documents of 100000 tokens; 6 are needed"):
        small(tokens=100_000).documents("run")


def test_magnitude_is_taken_by_rows_and_not_refined(small: Small) -> None:
    world = small()
    dense = world.load()
    carved = Checkpoint(copy.deepcopy(dense.model), dense.tokenizer)
    METHODS["magnitude"][0].apply(carved, world.calibration(0).segments)  # type: ignore[attr-defined]
    pairs = zip(anatomy(dense.model).all_linears(), anatomy(carved.model).all_linears(), strict=True)
    for (name, before), (_, after) in pairs:
        kept = after.read() != 0
        weight = before.read().abs()
        assert len(set(kept.sum(1).tolist())) == 1, name
        assert (weight.masked_fill(kept, 0).amax(1) <= weight.masked_fill(~kept, 9).amin(1)).all()


def test_the_experiment_is_the_one_of_the_issue_and_is_registered() -> None:
    chosen = experiment_of("dsnot")
    assert chosen is EXPERIMENTS["cpu"]
    assert (chosen.baseline, chosen.method, chosen.delta, chosen.tier) == ("wanda", "dsnot", 0.02, "cpu")
    assert (chosen.metric, chosen.direction, chosen.kind, chosen.design) == (LOSS, "lower", "better", "crossed")
    assert chosen.factors == ("calibration draw", "document")
    for arm in ("wanda", "dsnot", "sparsegpt"):
        assert METHODS[arm][0].sparsity == 0.7  # type: ignore[attr-defined]
    assert METHODS["wanda-2:4"][0].pattern == METHODS["dsnot-2:4"][0].pattern == "2:4"  # type: ignore[attr-defined]
    assert METHODS["dsnot"][0] == dsnot.DSnoT(sparsity=0.7)
    committed: Any = record.preregistered("dsnot")
    assert committed == {"digest": chosen.digest, **json.loads(json.dumps(chosen.preregistration()))}, (
        "the experiment is not the one that was registered; after the first run it may not change"
    )


def test_processes_can_share_it() -> None:
    there = pickle.loads(pickle.dumps(EXPERIMENTS["cpu"]))
    assert there.digest == EXPERIMENTS["cpu"].digest
    assert there.run_unit == EXPERIMENTS["cpu"].run_unit


def test_the_worlds_sizes_are_what_the_claim_says() -> None:
    world = SmolLM2Wikipedia()
    assert (world.model, world.texts) == ("smollm2", "wikipedia")
    assert (world.samples, world.length) == (32, 256)
    assert EXPERIMENTS["cpu"].units == world.documents_run
