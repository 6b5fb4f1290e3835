"""What every registered method promises, for each protocol it declares and on every family.

A new method inherits this suite by being in the catalogue. Methods with no working defaults name an example below.
"""

from __future__ import annotations

import atexit
import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from intaglio.methods.registry import PUBLISHED, get_method
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from intaglio.checkpoint import Checkpoint, from_scratch, load, weights_digest
from intaglio.errors import IntaglioError
from intaglio.masks import visible
from intaglio.methods.base import Carving, Cost, Method, Workload
from intaglio.methods.weights.one_shot import OneShotPruner
from intaglio.modeling.anatomy import anatomy
from intaglio.recipe.schema import Recipe
from intaglio.speculative.drafters.ngrams import NGramStore
from tests.families import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    VOCAB,
    tiny_checkpoint_dir,
    tiny_model,
    tiny_tokenizer,
)

EXAMPLES: dict[str, tuple[dict[str, Any], ...]] = {
    slug: ({"sparsity": 0.5}, {"pattern": "2:4"}) for slug in ("magnitude", "wanda", "sparsegpt", "dsnot")
}
EXAMPLES["sparsegpt"] = ({"sparsity": 0.5, "block": 16}, {"pattern": "2:4", "block": 16})
EXAMPLES["aded"] = (
    {},
    {"search": "best", "nodes": 7},
    {"trim": "distinct", "draft_cost": 0.0, "token_cost": 0.0, "carry_over": True},
)
EXAMPLES["layerwise_unmasking"] = ({"configuration": "01"}, {"configuration": "0110", "window": "none"}, {"groups": 2})
EXAMPLES["bip"] = (
    {"sparsity": 0.5},
    {"sparsity": 0.5, "kind": "neuron", "implicit": False, "schedule": "cosine"},
    {"sparsity": 0.25, "kind": "head", "scope": "layer", "normalise": False, "clip": 1.0, "implicit": "released"},
)
EXAMPLES["blockffn"] = (
    {"experts": 6},
    {"experts": 4, "width": 32, "norm": "sum", "chunk": 4, "adapt": False, "router_rate": 3e-3, "router_decay": 0.1},
    {"experts": 5, "expert_width": 3, "router": "topk", "k": 2},
    {"experts": 5, "expert_width": 3, "router": "remoe", "k": 2, "l1": 1e-4},
)
EXAMPLES["lost"] = (
    {},
    {"activation": "identity", "rank": {"layers.1.*": 9, "*": 0.5}, "columns": 3, "columns_by": "l1", "inverse": True},
    {"adapter": True, "alpha": 2.0, "columns_by": "random", "column_values": "complement", "ignore": ["layers.1.*"]},
    {"elements": 0.1, "activation": "identity", "init": "zero", "gamma": [0.25, 1.0], "rank": 8, "within_rank": True},
)
EXAMPLES["dyspec"] = (
    {"draft": tiny_model("llama", seed=1, layers=1, dtype=torch.float64), "budget": 9},
    {"draft": NGramStore.build([list(range(5, 40)) * 2], VOCAB), "algorithm": "threshold", "order": "blocks"},
)
EXAMPLES["moe_x"] = (
    {},
    {"experts": 3, "active": 1, "router": "linear", "activation": "own", "gates": "all", "layers": [0], "reset": 0.5},
    {"experts": 4, "active": 3, "start": "split", "gated": "drop", "noise": 0.2, "temperature": 0.5, "balance": 0.0},
)
EXAMPLES["meap"] = ({"length": 24}, {"length": 24, "shared_positions": True, "cycle": 2})
EXAMPLES["paser"] = (
    {"embedding": "tfidf", "clusters": 3},
    {"embedding": "tfidf", "clusters": None, "scope": "both", "concepts": None, "synonyms": 0.9, "order": "sequential"},
)
EXAMPLES["bitnet"] = (
    {},
    {
        "bits": 4,
        "scale": "max",
        "per": "row",
        "activation_bits": None,
        "norm": "layernorm",
        "learnable_norm": True,
        "targets": ["layers.0.*"],
    },
    {
        "norm": "rmsnorm",
        "strategy": "stochastic",
        "activation_range": 127,
        "keep": "shadow",
        "lambda_warmup": 0.5,
        "decay_until": 0.5,
    },
)
EXAMPLES["r_sparse"] = (
    {"alpha": 0.9},
    {
        "sparsity": 0.3,
        "alpha": {"layers.0.*": 0.0, "layers.1.*": 0.4},
        "threshold": "topk",
        "strict": True,
        "ignore": ["layers.2.*"],
    },
    {"how": "teal", "tokens": 64},
)
# Lossless where it verifies, or is never sure enough; PAD is a token that is there, so that it decodes untrained too.
EXAMPLES["lud"] = (
    {"length": 24, "pad_token": 3, "alpha": 0.0, "verify": True, "beta": 0.0},
    {"length": 24, "pad_token": 3, "alpha": 0.0, "verify": True, "cap": 3, "layout": "truncated", "identify": "before"},
    {"length": 24, "pad_token": 3, "alpha": 0.0, "beta": 1.01, "pack": False},
)
# Heads that were never trained draft badly, but must not change a token.
HEADS = {"untrained": True, "steps": 2, "batch_size": 2, "prompt": 4, "length": 16}
EXAMPLES["chimera"] = (
    HEADS,
    {**HEADS, "heads": 2, "rank": 2, "head_sharing": True, "start_from": "copy", "feature": 1.0, "distil": 1.0},
    {**HEADS, "tree": [[0], [1], [0, 0]], "encoders": "no_context", "own_text": False},
)
EXAMPLES["hidden_transfer"] = (
    HEADS,
    {**HEADS, "ahead": 2, "layers": [0, 1], "draft_rows": "path", "goal": "text", "decay": 0.9, "state": 0.1},
    {**HEADS, "tree": [[0], [1], [0, 0]], "drawn": False, "own_text": False},
)
EXAMPLES["progressive_nm"] = (
    {"pattern": "1:8"},
    {"pattern": "2:4", "recipe": "sr-ste", "targets": ["mlp", "q", "k", "v", "o"], "attention": "1:4"},
    {"pattern": "1:4", "recipe": "custom", "custom": {"0": "3:4", "1": "2:4"}, "masked_momentum": True, "dense": 0.0},
    {"sparsity": 0.75, "recipe": "mdgf-linear", "masked_momentum": True, "along": "outputs", "finetune": 0.4},
)
# A donor with the same tokens, and one with others.
_DONORS = Path(tempfile.mkdtemp(prefix="intaglio-donors-"))
atexit.register(shutil.rmtree, _DONORS, ignore_errors=True)
_OTHER = from_scratch.new(
    "llama", width=24, depth=1, vocab=VOCAB + 200, seed=2, tokenizer=["a rather quick, lazy river 1995\n" * 9]
).save(_DONORS / "other")
EXAMPLES["omp_transplant"] = (
    {"donor": str(tiny_checkpoint_dir("llama", _DONORS / "same", seed=1))},
    {"donor": str(_OTHER), "k": 3, "join": "strings", "byte_match": "both"},
    {"donor": str(_OTHER), "method": "linear", "noise": 0.01, "digits": "single"},
)
CARVINGS = [slug for slug, entry in PUBLISHED.items() if "carving" in entry.kinds]
CASES = [(slug, index) for slug in CARVINGS for index in range(len(EXAMPLES[slug]))]
PRUNING = [case for case in CASES if issubclass(get_method(case[0]), OneShotPruner)]
VISIBILITY = [slug for slug, entry in PUBLISHED.items() if "visibility" in entry.kinds]
# Who sees whom is a question to decoders; encoders are refused.
APPLIED = [(*case, name) for case in CASES for name in FAMILIES if name not in ENCODERS or case[0] not in VISIBILITY]
IDS = torch.randint(8, 150, (6, 16), generator=torch.Generator().manual_seed(0))


def example(slug: str, index: int = 0) -> Method:
    return get_method(slug)(**EXAMPLES[slug][index])


def carved(slug: str, index: int, family: str) -> Checkpoint:
    checkpoint = Checkpoint(tiny_model(family), tiny_tokenizer(family), source="tiny")
    return example(slug, index).apply(checkpoint, IDS, batch_size=2)  # type: ignore[attr-defined]


def test_every_method_has_an_example() -> None:
    assert set(EXAMPLES) == set(PUBLISHED)


@pytest.mark.parametrize("slug", CARVINGS)
def test_it_is_a_carving(slug: str) -> None:
    method = get_method(slug)
    assert isinstance(example(slug), Carving)
    assert method.storage in ("standalone", "runtime")  # type: ignore[attr-defined]
    assert method.changes


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_schema_round_trip(slug: str, index: int) -> None:
    method = example(slug, index)
    recipe = Recipe.from_dict({"steps": [{slug: method.model_dump()}]})
    assert recipe.steps == (method,)
    assert Recipe.from_dict(recipe.dump()) == recipe
    assert json.loads(json.dumps(method.model_dump())) == method.model_dump()


@pytest.mark.parametrize(("slug", "index", "family"), APPLIED)
def test_apply_save_load_gives_the_same_logits_and_record(slug: str, index: int, family: str, tmp_path: Path) -> None:
    checkpoint = carved(slug, index, family)
    with torch.no_grad():
        expected = checkpoint.model(IDS).logits
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(back.model(IDS).logits, expected)
    assert back.record == checkpoint.record
    step = back.record.steps[-1]
    assert (step.slug, step.parameters) == (slug, example(slug, index).model_dump())
    if example(slug, index).needs_calibration:  # type: ignore[attr-defined]
        assert step.calibration is not None
        assert (step.calibration["samples"], step.calibration["length"]) == (6, 16)
    if back.kind == "runtime":
        assert get_method(slug).storage == "runtime"  # type: ignore[attr-defined]
        for loader in (AutoModelForCausalLM, type(checkpoint.model)):
            with pytest.raises((ValueError, OSError)):  # it must not run as another model in silence
                loader.from_pretrained(tmp_path / "out")
    else:
        stock = (AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM).from_pretrained(tmp_path / "out")
        with torch.no_grad():
            assert torch.equal(stock.eval()(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("slug", "index"), PRUNING)
def test_it_changes_something_and_only_what_it_says(slug: str, index: int, family: str) -> None:
    before = tiny_model(family)
    after = carved(slug, index, family).model
    inside = {id(linear.module.weight) for _, linear in anatomy(before).all_linears()}
    changed = 0
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if not torch.equal(old, new):
            assert id(old) in inside, name
            changed += 1
    assert changed == len(inside)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("slug", VISIBILITY)
@torch.no_grad()
def test_it_changes_what_is_seen_and_no_weight(slug: str, family: str) -> None:
    before, after = tiny_model(family), carved(slug, 0, family).model
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert not torch.equal(before(IDS).logits, after(IDS).logits)
    assert not torch.equal(visible(before, 16), visible(after, 16))
    assert example(slug).changes == {"attention"}


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("slug", VISIBILITY)
def test_an_encoder_is_refused_in_one_sentence(slug: str, family: str) -> None:
    checkpoint = Checkpoint(tiny_model(family), tiny_tokenizer(family), source="tiny")
    with pytest.raises(IntaglioError, match="unmasking an encoder") as caught:
        example(slug).apply(checkpoint)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    assert checkpoint.record.steps == []


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_it_is_deterministic_to_the_byte(slug: str, index: int, tmp_path: Path) -> None:
    for name in ("a", "b"):
        carved(slug, index, "gemma3").save(tmp_path / name)
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


@pytest.mark.parametrize(("slug", "index"), PRUNING)
def test_half_precision_is_kept(slug: str, index: int) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    after = example(slug, index).apply(Checkpoint(copy.deepcopy(model)), IDS).model  # type: ignore[attr-defined]
    assert {p.dtype for p in after.parameters()} == {torch.bfloat16}
    for _, linear in anatomy(after).all_linears():
        assert float((linear.read() == 0).float().mean()) == 0.5


@pytest.mark.parametrize("slug", [s for s in CARVINGS if example(s).needs_calibration])  # type: ignore[attr-defined]
def test_missing_calibration_is_refused_and_nothing_changes(slug: str) -> None:
    model = tiny_model("llama")
    checkpoint = Checkpoint(copy.deepcopy(model))
    with pytest.raises(IntaglioError, match="calibration data is missing"):
        example(slug).apply(checkpoint)  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), checkpoint.model.parameters(), strict=True))
    assert checkpoint.record.steps == []


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_the_estimate_is_a_cost(slug: str, index: int) -> None:
    workload = Workload(((64, 32), (32, 64)), 4096, 8192, 32, 128, 32, 4)
    cost = example(slug, index).estimate(workload)  # type: ignore[attr-defined]
    assert isinstance(cost, Cost)
    assert cost.flops >= 0
    assert cost.sorted_elements > 0 or (slug, index) not in PRUNING
    assert cost.extra_bytes > 0 or (slug, index) not in PRUNING


@pytest.mark.parametrize("slug", CARVINGS)
def test_the_family_is_refused_in_one_sentence(slug: str) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    with pytest.raises(IntaglioError, match="is not supported") as caught:
        example(slug).apply(Checkpoint(Odd()), IDS)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
