"""The real 135M checkpoint: the facts that no tiny model can show. Needs the bundled assets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import intaglio
from intaglio.cli.app import app
from intaglio.cli.demo import recipe as demo_recipe
from intaglio.measures.input_sparsity import count_inputs, input_sparsity
from intaglio.methods.activations.r_sparse import SparseLinear
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.loop import Speculative

pytestmark = pytest.mark.slow

SMALL = {
    "model": "smollm2",
    "calibration": {"samples": 4, "length": 256},
    "measure": {"samples": 2, "length": 256, "speed": False},
}


def test_smollm2_loads_whole_and_answers() -> None:
    checkpoint = intaglio.load("smollm2")
    assert sum(p.numel() for p in checkpoint.model.parameters()) == 134_515_008
    assert checkpoint.kind == "standalone"
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = checkpoint.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    text = checkpoint.tokenizer.decode(checkpoint.model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    assert "The capital of France is Paris" in text


def test_minilm_loads_as_an_encoder_and_is_measured() -> None:
    from intaglio.data.segments import Segments
    from intaglio.measures.embeddings import embeddings
    from intaglio.modeling.anatomy import anatomy

    checkpoint = intaglio.load("minilm")
    assert not anatomy(checkpoint.model).causal
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply."]
    batch = checkpoint.tokenizer(texts, padding=True, return_tensors="pt")
    vectors = embeddings(checkpoint, Segments(batch["input_ids"], batch["attention_mask"].bool()))
    near, far = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
    assert near > 0.5 > far


def test_a_carved_smollm2_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(SMALL | {"steps": [{"wanda": {"pattern": "2:4"}}]})
    document = carve(recipe, tmp_path / "out")
    # The original has a few zeros of its own among the weights that are kept.
    assert all(0.5 <= share < 0.501 for share in document["after"]["zero_fraction"].values())
    assert document["before"]["perplexity"] < document["after"]["perplexity"] < float("inf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    ours = intaglio.load(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours.model(ids).logits)
    assert model.config.tie_word_embeddings


def test_magnitude_is_far_behind(tmp_path: Path) -> None:
    """At 50 % Wanda and SparseGPT have less than 0.6 of magnitude's perplexity, on a small sample too."""
    perplexity = {}
    for slug in ("magnitude", "wanda", "sparsegpt"):
        recipe = Recipe.from_dict(SMALL | {"steps": [{slug: {"sparsity": 0.5}}]})
        perplexity[slug] = carve(recipe, tmp_path / slug)["after"]["perplexity"]
    assert max(perplexity["sparsegpt"], perplexity["wanda"]) < 0.6 * perplexity["magnitude"]


def test_pruned_recovered_and_sparse_by_the_token_it_still_decodes_and_drafts(tmp_path: Path) -> None:
    """The longest chain, on the real model: zeros that training keeps, rows that a token skips, a draft on top."""
    recover = {
        "instructions": "docstrings",
        "length": 128,
        "chat": False,
        "select": {"paser": {"count": 8, "candidates": 24, "clusters": 4, "length": 64, "chat": False}},
        "lora": {"r": 4, "alpha": 8},
        "batch_size": 4,
        "epochs": 1,
        "learning_rate": 5e-4,
    }
    steps = [{"wanda": {"pattern": "2:4"}}, {"train": recover}, {"r_sparse": {"sparsity": 0.3}}]
    document = carve(Recipe.from_dict(SMALL | {"steps": steps}), tmp_path / "out")
    assert document["after"]["perplexity"] < 1000
    found = intaglio.load(tmp_path / "out")
    layers = [module for module in found.model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 30 * 7
    assert all(float((module.weight == 0).float().mean()) >= 0.5 for module in layers)
    prompt = "one two three four five six seven eight one two three four"
    ids = found.tokenizer(prompt, return_tensors="pt")
    asked = {**ids, "do_sample": False, "min_new_tokens": 24, "max_new_tokens": 24}
    with count_inputs(found.model) as tallies:
        alone = found.model.generate(**asked)[0].tolist()
    assert 0.2 < (input_sparsity(tallies) or 0.0) < 0.4
    decoder = Speculative(PromptLookup())
    drafted = found.model.generate(**asked, custom_generate=decoder)[0].tolist()
    assert drafted[: ids["input_ids"].shape[1] + 8] == alone[: ids["input_ids"].shape[1] + 8]  # later on, near ties
    assert decoder.statistics.tokens_per_pass > 1


def test_the_demos_recipe_and_the_streamed_answer() -> None:
    assert [step.slug for step in demo_recipe().steps] == ["magnitude", "wanda", "dsnot", "sparsegpt"] * 2 + [
        "r_sparse"
    ]
    arguments = ["generate", "smollm2", "What is the capital of France?", "--chat", "--max-new-tokens", "12"]
    streamed = CliRunner().invoke(app, arguments)
    as_json = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert "The capital of France is Paris" in streamed.stdout
    assert as_json["text"].strip() == streamed.stdout.strip()
    assert as_json["passes"] == as_json["new_tokens"]
