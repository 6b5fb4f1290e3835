"""The study on a tiny model, the pictures of what heads keep, and the commands."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint
from intaglio.cli import inspect_sparse
from intaglio.cli.app import app
from intaglio.cli.inspect_sparse import pictures
from intaglio.errors import IntaglioError
from intaglio.measures.long_context import CommonWords, NeedleInAHaystack, StoryFiltering
from intaglio.measures.sparsity_tradeoff import decode_flops, paired_bootstrap, prefill_flops
from intaglio.methods.attention.sparse_frontier import Meter, SparseFrontier, installed, study
from intaglio.methods.attention.sparse_frontier.pictures import as_json, kept
from intaglio.methods.attention.sparse_frontier.study import (
    ADAPTED,
    METHODS,
    PREFILL,
    Answer,
    StudySizes,
    answer,
    at_sparsity,
    calibrated,
    encoded,
    operation_panels,
    run,
    sparsity_panels,
    summary,
)
from tests.families import HEADS, KV_HEADS, tiny_checkpoint_dir, tiny_model, tiny_tokenizer

POSITIONS = 1024
NIAH = NeedleInAHaystack(queries=1, parts=0)


def checkpoint(family: str = "llama") -> Checkpoint:
    model = tiny_model(family, layers=2, max_position_embeddings=POSITIONS)
    return Checkpoint(model, tiny_tokenizer(family), "tiny")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [512, 1024])
@torch.no_grad()
def test_budgets_aim_at_the_sparsity(name: str, length: int) -> None:
    model = tiny_model("llama", layers=2, max_position_embeddings=2048)
    ids = torch.randint(8, 150, (1, length + 8), generator=torch.Generator().manual_seed(0))
    measured = []
    for target in (0.5, 0.8, 0.9):
        with at_sparsity(name, length, target).attached(model) as sparse:
            cache = sparse.new_cache(model.config)
            for start, end in ((0, length), *((i, i + 1) for i in range(length, length + 8))):
                model(ids[:, start:end], cache=cache)
        meter = sparse.meter
        measured.append(meter.prefill_sparsity if name in PREFILL else meter.decode_sparsity)
    assert measured == sorted(measured)
    if name not in ADAPTED:
        assert measured == pytest.approx([0.5, 0.8, 0.9], abs=0.03)


@pytest.mark.parametrize("name", METHODS)
def test_budgets_of_adapted_patterns_are_found_by_measuring(name: str) -> None:
    tiny = checkpoint()
    ids = torch.randint(8, 150, (1, 400), generator=torch.Generator().manual_seed(0))
    nominal = calibrated(tiny, ids, name, 0.6)
    if name not in ADAPTED:
        assert nominal == 0.6
        return
    with at_sparsity(name, 400, nominal).attached(tiny.model) as sparse, torch.no_grad():
        tiny.model(ids)
    assert sparse.meter.prefill_sparsity == pytest.approx(0.6, abs=0.05)


def test_sizes_scale_with_the_length() -> None:
    """Scale forced sink/local/window sizes by n/8192, min 1/4/8."""
    small, large = (at_sparsity("snapkv", n, 0.9).cache.model_dump() for n in (256, 8192))  # type: ignore[union-attr]
    assert (small["sinks"], small["recent"], small["num_queries"]) == (1, 4, 8)
    assert (large["sinks"], large["recent"], large["num_queries"], large["kernel_size"]) == (4, 128, 256, 21)
    assert large["budget"] == 819
    for name in METHODS:
        assert at_sparsity(name, 100_000, 0.5)
    for name, sparsity, match in (("quests", 0.5, "did you mean quest"), ("quest", 1.0, "above 0 and below 1")):
        with pytest.raises(IntaglioError, match=match):
            at_sparsity(name, 100, sparsity)


def test_each_setting_scales_with_the_length() -> None:
    """All forced and window sizes at a quarter of the reference length, and the budgets of a sparsity of 0.9."""
    forced, compression = {"sinks": 1, "recent": 16}, {"sinks": 1, "recent": 32, "num_queries": 64, "kernel_size": 5}
    expected: dict[str, dict[str, Any]] = {
        "vertical_slash": {**forced, "columns": 105, "offsets": 105, "block_size": 16, "num_queries": 64},
        "block_sparse": {"block_size": 4, "blocks": 26},
        "flex_prefill": {
            **forced,
            "coverage": pytest.approx(0.1),
            "min_budget": 16,
            "block_size": 16,
            "num_queries": 128,
        },
        "quest": {"budget": 204, "page_size": 4, "share_pages": True},
        "snapkv": {"budget": 205, **compression},
        "ada_snapkv": {"budget": 205, **compression, "min_ratio": 0.2},
        "sink_window": {"budget": 205, "sinks": 1},
        "random": {"budget": 205, "seed": 0},
        "oracle": {"budget": 205},
    }
    assert set(expected) == set(METHODS)
    for name, fields in expected.items():
        method = at_sparsity(name, 2048, 0.9)
        part, other = (method.prefill, method.cache) if name in PREFILL else (method.cache, method.prefill)
        assert part is not None
        assert other is None
        assert part.model_dump() == {"name": name, **fields}


class Words:
    """A task of shuffled words, of equally many tokens, whose score is what the answer says."""

    name = "words"

    def sample(self, rng: Random, room: int, count: Any) -> Any:
        words = ["dog", "fox", "sun"] * 60
        rng.shuffle(words)
        context = f"the {' '.join(words)} runs"
        return SimpleNamespace(
            parts=lambda condition, explain: (context, f" {condition} {'why ' * explain}"), score=float
        )


@pytest.mark.parametrize("condition", ["after", "before and after"])
def test_a_cell_counts_answers_operations_and_measured_sparsity(
    condition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the estimation cost; report real sparsity, not the knob."""
    model = tiny_model("llama", layers=2, max_position_embeddings=POSITIONS, head_dim=16)
    tiny, calls = Checkpoint(model, tiny_tokenizer("llama"), "tiny"), []

    def answers(checkpoint: Any, first: Any, second: Any, method: Any, condition: Any, new: int) -> Answer:
        calls.append((first, second, method, condition, new))
        meter = Meter(8, 10, 1, 4) if method is not None else Meter()
        return Answer("0.25" if method is not None else "1", meter, first.shape[1] + second.shape[1], 3)

    monkeypatch.setattr(study, "answer", answers)
    monkeypatch.setattr(study, "calibrated", lambda checkpoint, ids, name, sparsity: sparsity)
    methods = ("quest", "snapkv", "oracle", "block_sparse", "vertical_slash")
    sizes = StudySizes((700,), methods, (0.8,), (condition,), samples=2, explain=True, seed=3)
    points = run(tiny, [Words()], sizes)
    first, second = calls[0][:2]
    assert {call[3:] for call in calls} == {(condition, 4 * study.ANSWER)}
    assert torch.equal(second, encoded(tiny, Words().sample(Random(0), 0, None), condition, True)[1])
    assert not torch.equal(first, calls[1][0])
    prompt = first.shape[1] + (0 if condition == "after" else second.shape[1])
    decoded = 3 + (second.shape[1] if condition == "after" else 0)
    matrices = sum(linear.weight.numel() for linear in model.modules() if isinstance(linear, torch.nn.Linear))
    matrices -= model.lm_head.weight.numel()
    window = at_sparsity("snapkv", prompt, 0.8).cache.num_queries  # type: ignore[union-attr]
    # Page minima and maxima for each token; all keys; half of all pairs of block means; the windows of last queries.
    estimates = ((0, 0), (0, 2 * prompt / 4), (window, 0), (0, prompt), (prompt // (2 * 4**2), 0), (window, 0))
    for point, (queries, keys) in zip(points, estimates, strict=True):
        dense, in_prompt = point.method == "dense", point.method in PREFILL
        assert point.scores == ((1.0, 1.0) if dense else (0.25, 0.25))
        assert point.sparsity == pytest.approx(0 if dense else 0.2 if in_prompt else 0.75)
        assert point.phase == ("prefill" if in_prompt else "decode")
        flops = prefill_flops(matrices, 2, HEADS * 16, prompt, 0 if dense else 0.2, queries)
        flops += decoded * decode_flops(matrices, 2, HEADS * 16, prompt, 0 if dense else 0.75, keys)
        assert point.flops == pytest.approx(flops)
        if not dense:
            assert point.difference == paired_bootstrap((1.0, 1.0), (0.25, 0.25), 3)
    calls.clear()
    run(tiny, [Words()], replace(sizes, seed=4, explain=False))
    assert not torch.equal(calls[0][0], first)
    assert calls[0][4] == study.ANSWER
    assert calls[0][1].shape[1] < second.shape[1]


def test_the_question_is_outside_the_prompt_where_it_comes_after() -> None:
    tiny = checkpoint()
    sample = NIAH.sample(Random(0), 200, lambda text: len(tiny.tokenizer(text)["input_ids"]))
    first, second = encoded(tiny, sample, "after", explain=False)
    text = tiny.tokenizer.decode(first[0])
    assert sample.question not in text
    assert sample.context in text
    assert sample.question in tiny.tokenizer.decode(second[0])
    method = at_sparsity("snapkv", first.shape[1], 0.8)
    seen = {}
    for condition, prompt in (("after", first.shape[1]), ("before and after", first.shape[1] + second.shape[1])):
        result = answer(tiny, first, second, method, condition, 4)  # type: ignore[arg-type]
        assert result.prompt_tokens == first.shape[1] + second.shape[1]
        assert 1 <= result.new_tokens <= 4
        seen[condition] = result.meter.decode_pairs
        assert prompt > 0
    # With the question after the context its tokens are decoded too.
    assert seen["after"] > seen["before and after"]
    assert installed(tiny.model) is None


def test_a_study_of_two_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ANSWER", 2)
    tiny, calls = checkpoint(), []
    sizes = StudySizes((700,), ("quest", "block_sparse"), (0.5, 0.9), samples=2, seed=1)
    points = run(tiny, [NIAH, StoryFiltering(chapters=1)], sizes, progress=lambda *call: calls.append(call))
    assert len(points) == len(calls) == 2 * 2 * 5
    assert calls[-1][:2] == (20, 20)
    assert [p.method for p in points[:5]] == ["dense", "quest", "quest", "block_sparse", "block_sparse"]
    for p in points:
        assert len(p.scores) == 2
        assert (p.difference is None) == (p.method == "dense")
        assert (p.sparsity == 0) == (p.method == "dense")
    quest = [p for p in points if p.method == "quest" and p.task == "niah" and p.condition == "after"]
    dense = next(p for p in points if p.method == "dense" and p.task == "niah" and p.condition == "after")
    assert dense.flops > quest[0].flops > quest[1].flops
    data = summary(points)
    assert len(data["cells"]) == 20
    assert {row["method"] for row in data["tolerated"]} == {"quest", "block_sparse"}
    assert len(data["equal_flops"]) == 4
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(data))
    drawn = sparsity_panels(points)
    assert len(drawn) == 4
    assert [(line.method, len(line.points)) for line in drawn[0].series] == [("quest", 2), ("block_sparse", 2)]
    for panel in operation_panels(points, data["equal_flops"]):
        assert {line.method for line in panel.series} == {"dense", "quest", "block_sparse"}
        assert set(panel.best) <= {point for line in panel.series for point in line.points}
    for picture in pictures(points, data).values():
        ET.fromstring(picture)


def test_studies_that_cannot_run_are_refused() -> None:
    for fields, match in (
        ({"lengths": ()}, "a length and 2 are needed"),
        ({"lengths": (100,), "samples": 1}, "1 samples of lengths"),
        ({"lengths": (100,), "methods": ("x",)}, "no method named 'x'"),
    ):
        with pytest.raises(IntaglioError, match=match):
            StudySizes(**fields)  # type: ignore[arg-type]
    with pytest.raises(IntaglioError, match="beyond the model's context of 1024"):
        run(checkpoint(), [NIAH], StudySizes((1000,)))
    with pytest.raises(IntaglioError, match="too short"):
        run(checkpoint(), [NIAH], StudySizes((60,), ("quest",)))
    done: list[Any] = []  # nothing is answered before the last task is known to fit
    sizes = StudySizes((300,), ("quest",), samples=2)
    with pytest.raises(IntaglioError, match="300 tokens is too short for the words of cwe"):
        run(checkpoint(), [NIAH, CommonWords()], sizes, progress=lambda *call: done.append(call))
    with pytest.raises(IntaglioError, match="layer 0 has a sliding window of 8 tokens"):
        run(checkpoint("mistral_window"), [NIAH], sizes, progress=lambda *call: done.append(call))
    assert not done


@pytest.mark.parametrize("part", ["prefill", "cache"])
def test_pictures_show_what_each_layer_kept(part: str) -> None:
    tiny = checkpoint("gemma3" if part == "prefill" else "llama")
    fields: Any = {
        "prefill": {"name": "sink_window", "budget": 6, "sinks": 2, "block_size": 1},
        "cache": {"name": "snapkv", "budget": 10, "sinks": 2, "recent": 3, "num_queries": 4, "kernel_size": 1},
    }
    ids = torch.randint(8, 150, (1, 30), generator=torch.Generator().manual_seed(0))
    with pytest.raises(IntaglioError, match="has no sparse attention to draw"):
        kept(tiny, ids)
    SparseFrontier(**{part: fields[part]}).install(tiny.model)
    layers = kept(tiny, ids)
    assert [(layer.layer, layer.part) for layer in layers] == [(0, part), (1, part)]
    if part == "prefill":
        assert layers[0].seen.shape == (HEADS, 30, 30)
        # Two sinks and four recent keys; the window of 8 hides the sinks of later queries.
        assert layers[0].seen[0, 29].nonzero()[:, 0].tolist() == [26, 27, 28, 29]
        assert layers[0].seen[0, 6].nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5, 6]
    else:
        assert layers[0].seen.shape == (KV_HEADS, 30)
        assert layers[0].seen.sum(1).tolist() == [10] * KV_HEADS
        assert layers[0].seen[:, [0, 1, 27, 28, 29]].all()
        assert layers[0].share == pytest.approx(1 / 3)
    data = as_json(layers)
    assert data[0]["kept_by_head"] == layers[0].seen.flatten(1).sum(1).tolist()
    assert [len(row) for row in data[0]["keys"]] == [30] * (HEADS if part == "prefill" else KV_HEADS)
    assert layers[0].group().seen_HQK.shape == ((1, 30, 30) if part == "prefill" else (1, KV_HEADS, 30))


def test_quest_draws_the_pages_of_the_next_token() -> None:
    tiny = checkpoint()
    SparseFrontier(cache={"name": "quest", "budget": 8, "page_size": 4}).install(tiny.model)
    ids = torch.randint(8, 150, (1, 30), generator=torch.Generator().manual_seed(0))
    for layer in kept(tiny, ids):
        assert layer.seen.sum(1).tolist() == [10, 10]  # two pages and the current one's 2 of 30 tokens
        assert layer.seen[:, 28:].all()


RUNNER = CliRunner()


def invoke(*arguments: object) -> Any:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint_dir(
        "llama", tmp_path_factory.mktemp("m") / "tiny", layers=2, max_position_embeddings=POSITIONS
    )


def test_generate_with_attention(tiny_dir: Path) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 6
    plain = json.loads(invoke("generate", tiny_dir, prompt, "--max-new-tokens", 5, "--json").stdout)
    assert plain["attention"] is None
    full = invoke("generate", tiny_dir, prompt, "--max-new-tokens", 5, "--json", "--attention", "quest")
    assert json.loads(full.stdout)["token_ids"] == plain["token_ids"]
    out = json.loads(
        invoke(
            "generate", tiny_dir, prompt, "--max-new-tokens", 5, "--json", "--attention", "quest", "--budget", 16
        ).stdout
    )
    assert 0.1 < out["attention"]["decode_sparsity"] < 1
    assert out["attention"]["prefill_sparsity"] == 0
    assert out["attention"]["cache_bytes"] > 0
    shown = invoke("generate", tiny_dir, prompt, "--max-new-tokens", 3, "--attention", "block_sparse", "--budget", 48)
    assert "of the prompt's pairs and 0% of the new tokens' left out" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--attention", "quests"], "no sparse attention named 'quests'; did you mean quest"),
        (["generate", "x", "--budget", "9"], "budget is 9 without an attention"),
        (["generate", "x", "--attention", "snapkv", "--budget", "131"], "at least the forced 4 sinks and 128 recent"),
        (["generate", "x", "--attention", "quest", "--decoder", "aded"], "the decoder aded makes passes of its own"),
        (["inspect", "--masks", "--attention", "quest"], "give it with --prompt"),
        (["inspect", "--masks", "--sparse-attention"], "--masks and --sparse-attention are given; give one"),
        (["inspect", "--sparse-attention", "--lengths", "a"], "lengths is 'a'; numbers from 1"),
        (["inspect", "--sparse-attention", "--methods", "dens"], "no method named 'dens'"),
        (["inspect", "--sparse-attention", "--sparsities", "1.5"], "sparsities is '1.5'; numbers from 0.01 to 0.99"),
        (["inspect", "--sparse-attention", "--question", "before"], "no condition named 'before'"),
        (["inspect", "--sparse-attention", "--tasks", "nih"], "no task named 'nih'; did you mean niah"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments: list[str], message: str, tiny_dir: Path) -> None:
    result = invoke(arguments[0], tiny_dir, *arguments[1:])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_options_of_the_study_reach_it(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(models: Any, sizes: Any, *, progress: Any, **options: Any) -> Any:
        calls.append((models, sizes, options))
        return [], {"tolerated": [], "scaling_laws": []}

    monkeypatch.setattr(inspect_sparse, "study", record)
    sizes = ("--lengths", "300,400", "--methods", "snapkv", "--sparsities", "0.7", "--samples", 3, "--seed", 5)
    others = ("--tasks", "vt", "--question", "after", "--paper", "--documents", "d.jsonl", "--also", "other")
    places = ("--dtype", "bfloat16", "--device", "cpu", "-o", "made")
    result = invoke("inspect", tiny_dir, "--sparse-attention", *sizes, *others, *places)
    assert result.exit_code == 0, result.output
    options = {"only": "vt", "documents": "d.jsonl", "paper": True, "device": "cpu", "dtype": "bfloat16"}
    chosen = StudySizes((300, 400), ("snapkv",), (0.7,), ("after",), samples=3, explain=True, seed=5)
    assert calls == [([str(tiny_dir), "other"], chosen, options | {"output": Path("made")})]


def test_inspect_draws_and_studies(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ANSWER", 3)
    picture = tmp_path / "kept.svg"
    quest = ("--attention", "quest", "--budget", 16)
    drawn = invoke("inspect", tiny_dir, "--masks", "--prompt", "the dog sleeps in the sun " * 9, *quest, "-o", picture)
    assert drawn.exit_code == 0, drawn.output
    assert "quest" in drawn.stdout
    ET.parse(picture)
    out = tmp_path / "study"
    sizes = ("--lengths", 300, "--tasks", "niah", "--methods", "quest,sink_window", "--sparsities", "0.9")
    result = invoke("inspect", tiny_dir, "--sparse-attention", *sizes, "--samples", 2, "--also", tiny_dir, "-o", out)
    assert result.exit_code == 0, result.output
    assert "Tolerated sparsity" in result.stdout
    assert sorted(file.name for file in out.iterdir()) == [
        "accuracy.svg",
        "equal_flops.svg",
        "study.html",
        "study.json",
    ]
    data = json.loads((out / "study.json").read_text())
    assert len(data["cells"]) == 2 * 2 * 3
    again = invoke("inspect", tiny_dir, "--sparse-attention", "-o", out)
    assert again.exit_code == 2
