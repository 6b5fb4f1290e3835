"""What every registered decoder and drafter promises: the target's own ids, one sentence for what it cannot do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Fittable, Method, Workload
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.modeling.anatomy import CACHE
from intaglio.recipe.schema import Fit, Recipe, json_schema
from tests.examples import EXAMPLES
from tests.families import DECODERS, tiny_model, tiny_tokenizer

DRAFTERS = [slug for slug, entry in PUBLISHED.items() if "drafter" in entry.kinds]
CASES = [(slug, index) for slug in DRAFTERS for index in range(len(EXAMPLES[slug]))]
FITTED = [slug for slug, entry in PUBLISHED.items() if entry.fitted]
PROMPT = [9, 30, 31, 32, 9, 30, 31, 32, 9, 30]
TEXTS = ["the quick brown fox jumps over the lazy dog", "and then the dog sleeps in the sun"]


def example(slug: str, index: int = 0) -> Any:
    return get_method(slug)(**EXAMPLES[slug][index])


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("slug", "index"), CASES)
def test_greedy_ids_are_stock(slug: str, index: int, family: str) -> None:
    model = tiny_model(family, layers=2, dtype=torch.float64)
    ids = torch.tensor([PROMPT])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "repetition_penalty": 1.1}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, custom_generate=example(slug, index)), expected)


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_it_draws_nothing_from_the_global_generator(slug: str, index: int) -> None:
    model = tiny_model("llama", layers=1)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=6, custom_generate=example(slug, index))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_what_it_cannot_do_is_one_sentence(slug: str, index: int) -> None:
    decoder, ids = example(slug, index), torch.tensor([PROMPT])
    window = tiny_model("mistral_window", layers=1)
    full = tiny_model("llama", layers=1)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (full, {"num_beams": 2}, "num_beams is 2"),
        (full, {"use_cache": False}, "cache"),
        (window, {CACHE: StaticCache(window.config, max_cache_len=32)}, "a StaticCache was given"),
        (full, {"max_new_tokens": 500}, "context"),
    ]
    for model, options, says in refused:
        with pytest.raises(IntaglioError, match=says) as caught:
            model.generate(ids, **{"max_new_tokens": 4, "do_sample": False} | options, custom_generate=decoder)
        assert "\n" not in str(caught.value)
    quantized = QuantizedCache.__new__(QuantizedCache)  # making one needs another package
    with pytest.raises(IntaglioError, match="QuantizedCache"):
        decoder(full, ids, [], [], _config(full), **{CACHE: quantized})
    with pytest.raises(IntaglioError, match="is no causal language model") as caught:
        decoder(tiny_model("bert", layers=1), ids, [], [], _config(full), **{CACHE: DynamicCache()})
    assert "\n" not in str(caught.value)


def _config(model: Any) -> Any:
    config = model.generation_config
    config.max_length, config.do_sample, config.num_beams = 20, False, 1
    return config


@pytest.mark.parametrize("slug", FITTED)
def test_a_fit_step_comes_back_and_is_in_the_schema(slug: str) -> None:
    for fields in EXAMPLES[slug]:
        method: Method = get_method(slug)(**fields)
        recipe = Recipe.from_dict({"steps": [{"fit": {slug: fields}}]})
        assert recipe.steps == (Fit(method),)
        assert Recipe.from_dict(json.loads(json.dumps(recipe.dump()))) == recipe
    assert slug in json_schema()["$defs"]


@pytest.mark.parametrize("slug", FITTED)
def test_what_is_fitted_is_saved_restored_and_equal(slug: str, tmp_path: Any) -> None:
    method = example(slug)
    assert isinstance(method, Fittable)
    for name in ("a", "b"):
        checkpoint = Checkpoint(tiny_model("gemma3", layers=2), tiny_tokenizer("gemma3"), "tiny")
        before = {key: value.clone() for key, value in checkpoint.model.state_dict().items()}
        method.fit(checkpoint, TEXTS, seed=3)
        assert all(torch.equal(before[key], value) for key, value in checkpoint.model.state_dict().items())
        (step,) = checkpoint.record.steps
        assert (step.slug, step.verb, step.seed) == (slug, "fit", 3)
        json.dumps(step.model_dump())
        checkpoint.save(tmp_path / name)
    files = [tmp_path / name / "attachments" / f"{slug}.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    ready = load(tmp_path / "a").fitted(slug)
    assert {**ready.model_dump(), "corpus": None} == {**method.model_dump(), "corpus": None}
    workload = Workload(((64, 32),), 4096, 8192, 32, 128, 32, 4)
    cost = method.estimate_fit(workload, load_texts(TEXTS))
    assert isinstance(cost, Cost)
    assert cost.extra_bytes > 0
