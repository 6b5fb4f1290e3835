"""Chains of steps on tiny models: carved, saved, read again, generating; with drafting the very same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.exporters import export
from intaglio.measures.input_sparsity import count_inputs, input_sparsity
from intaglio.methods.activations.r_sparse import SparseLinear
from intaglio.methods.weights.bitnet import PackedLinear
from intaglio.modeling.replacement import ReplacedLinear
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.loop import Speculative
from tests.families import tiny_checkpoint_dir
from tests.recipe.test_run import corpus, make_recipe  # noqa: F401

IDS = torch.tensor([[20, 30, 40, 21, 31, 20, 30, 40]])
TRAIN = {"steps": 2, "batch_size": 2, "length": 16, "learning_rate": 0.001}


def train(**more: Any) -> dict[str, Any]:
    return {"train": {**TRAIN, **more}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "model", layers=3)


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "donor", seed=5, layers=1)


def carved(corpus: Path, model: Path, out: Path, *steps: dict[str, Any]) -> Checkpoint:  # noqa: F811
    carve(make_recipe(corpus, list(steps)), out, model=str(model))
    return load(out)


def says(checkpoint: Checkpoint, **how: Any) -> list[int]:
    with torch.no_grad():
        found = checkpoint.model.generate(  # type: ignore[operator]
            IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=12, **how
        )
    return [int(token) for token in found[0]]


def drafts_alike(checkpoint: Checkpoint) -> None:
    """Prompt lookup says what the model says alone."""
    assert says(checkpoint, custom_generate=Speculative(PromptLookup())) == says(checkpoint)


def zeros(checkpoint: Checkpoint) -> float:
    weights = [
        m.weight for n, m in checkpoint.model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    ]
    return float(torch.cat([weight.flatten() for weight in weights]).eq(0).float().mean())


def test_fewer_blocks_pruned_recovered_and_rounded(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    steps = [{"drop_blocks": {"count": 1}}, {"wanda": {"pattern": "2:4"}}, train(lora={"r": 2})]
    pruned = carved(corpus, model, tmp_path / "pruned", *steps)
    assert zeros(pruned) >= 0.5
    drafts_alike(pruned)
    whole = carved(corpus, model, tmp_path / "whole", *steps, {"bitnet": {"bits": 8, "activation_bits": None}})
    packed = [module for module in whole.model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 2 * 7
    assert len(whole.model.model.layers) == 2
    assert all(float((module.dense() == 0).float().mean()) >= 0.5 for module in packed)  # zeros stay
    assert whole.bytes < pruned.bytes
    drafts_alike(whole)
    again = carved(corpus, tmp_path / "pruned", tmp_path / "later", {"bitnet": {"bits": 8, "activation_bits": None}})
    assert says(again) == says(whole)


def test_pruned_then_recovered_then_sparse_by_the_token_then_drafts(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    select = {"paser": {"count": 3, "clusters": 2, "embedding": "tfidf", "length": 16}}
    steps = [{"wanda": {"sparsity": 0.5}}, train(lora={"r": 2}, select=select), {"r_sparse": {"sparsity": 0.5}}]
    carved(corpus, model, tmp_path / "out", *steps)
    # In float64, where no score lies on a threshold to the last bit.
    found = load(tmp_path / "out", dtype="float64")
    layers = [module for module in found.model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 3 * 7
    assert all(float((module.weight == 0).double().mean()) >= 0.5 for module in layers)  # zeros stay
    drafts_alike(found)
    with count_inputs(found.model) as tallies:
        says(found)
    assert 0.3 < (input_sparsity(tallies) or 0.0) < 0.7


def test_another_tokenizer_then_masks_that_tighten_then_drafts(
    corpus: Path,  # noqa: F811
    model: Path,
    donor: Path,
    tmp_path: Path,
) -> None:
    shaped = train(modifiers=[{"progressive_nm": {"pattern": "2:4"}}])
    steps = [{"omp_transplant": {"donor": str(donor), "k": 2}}, shaped, {"fit": {"aded": {"corpus": str(corpus)}}}]
    found = carved(corpus, model, tmp_path / "out", *steps)
    assert says(found, custom_generate=found.decoder("aded")) == says(found)
    rows = found.model.model.layers[0].mlp.up_proj.weight
    assert int((rows.reshape(-1, 4) != 0).sum(1).max()) <= 2


def test_low_rank_trained_merged_and_pruned_is_stock_again(
    corpus: Path,  # noqa: F811
    model: Path,
    tmp_path: Path,
) -> None:
    lost = {"lost": {"activation": "identity", "rank": 4}}
    trained = carved(corpus, model, tmp_path / "lost", lost, train())
    assert any(isinstance(module, ReplacedLinear) for module in trained.model.modules())
    drafts_alike(trained)
    done = carved(
        corpus, tmp_path / "lost", tmp_path / "out", {"lost": {"merge": True}}, {"sparsegpt": {"sparsity": 0.5}}
    )
    assert done.kind == "standalone"
    export(done, tmp_path / "exported", "safetensors")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, done.model(IDS).logits)


def test_learnt_masks_and_rules_of_sight(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    steps = [train(modifiers=[{"bip": {"sparsity": 0.5}}]), {"visibility": {"rule": {"sliding": {"window": 4}}}}]
    found = carved(corpus, model, tmp_path / "out", *steps)
    assert zeros(found) == pytest.approx(0.5, abs=0.01)
    assert found.kind == "runtime"
    assert torch.equal(load(tmp_path / "out").model(IDS).logits, found.model(IDS).logits)


def test_ternary_with_hidden_tokens_goes_to_the_stock_format(
    corpus: Path,  # noqa: F811
    model: Path,
    tmp_path: Path,
) -> None:
    bits = {"scale": "mean", "activation_range": 127, "norm": "none"}
    shaped = train(objective={"meap": {"length": 16}}, modifiers=[{"bitnet": bits}])
    del shaped["train"]["length"]
    found = carved(corpus, model, tmp_path / "out", {"drop_blocks": {"layers": [1]}}, shaped)
    drafts_alike(found)
    export(found, tmp_path / "exported", "bitnet")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    # transformers compiles its small functions for this format, which takes most of a minute here.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(stock(IDS).logits, found.model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shapers", [["bip", "progressive_nm"], ["progressive_nm", "bitnet"], ["bip", "bitnet"]])
def test_two_that_shape_the_same_weights_are_refused_before_a_model_loads(shapers: list[str]) -> None:
    fields: dict[str, dict[str, Any]] = {"progressive_nm": {"pattern": "2:4"}}
    with pytest.raises(IntaglioError, match=f"{shapers[0]} and {shapers[1]} both change the weights") as caught:
        Recipe.from_dict({"steps": [train(modifiers=[{slug: fields.get(slug, {})} for slug in shapers])]})
    assert "\n" not in str(caught.value)
