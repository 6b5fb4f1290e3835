"""What every method with trained heads promises: trained on the user's model, resumed, saved, found again, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.cli.app import app
from intaglio.cli.generate import generate
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.registry import get_method
from intaglio.recipe.plan import Rates, plan
from intaglio.recipe.report_document import non_default_fields
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.speculative.heads.base import TrainedHeads, split
from tests.families import DECODERS, tiny_checkpoint_dir, tiny_model, tiny_tokenizer

METHODS = ("chimera", "hidden_transfer")
IDS = [9, 30, 31, 32, 9, 30, 31, 32, 9, 30]
TEXTS = ["the quick brown fox jumps over the lazy dog", "and then the dog sleeps in the sun"]
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "prompt": 4, "length": 20, "learning_rate": 1e-2}


class Killed(BaseException):
    pass


def tiny(family: str = "llama", **more: Any) -> Checkpoint:
    return Checkpoint(tiny_model(family, layers=2, **more), tiny_tokenizer(family), "tiny")


def recipe(slug: str, texts: Path, **fields: Any) -> Recipe:
    measure = {"texts": str(texts), "samples": 2, "length": 16, "speed": False}
    return Recipe.from_dict(
        {"steps": [{"fit": {slug: QUICK | fields}}], "calibration": {"texts": str(texts)}, "measure": measure}
    )


@pytest.mark.parametrize("slug", METHODS)
@pytest.mark.parametrize("family", DECODERS)
def test_output_is_stock_after_a_short_training(slug: str, family: str) -> None:
    checkpoint = tiny(family)
    get_method(slug)(**QUICK).fit(checkpoint, [{"input_ids": IDS}] * 4)  # type: ignore[attr-defined]
    decoder = checkpoint.decoder(slug)
    model: Any = checkpoint.model.double()
    ids = torch.tensor([IDS])
    expected = model.generate(ids, do_sample=False, max_new_tokens=14)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=14, custom_generate=decoder), expected)


@pytest.mark.parametrize("slug", METHODS)
def test_training_teaches_what_the_model_says(slug: str) -> None:
    checkpoint = tiny(eos_token_id=None)
    model: Any = checkpoint.model
    ids = torch.tensor([IDS])
    answer = model.generate(ids, do_sample=False, max_new_tokens=24)
    passes = []
    for steps in (1, 30):
        method: Any = get_method(slug)(**QUICK | {"steps": steps, "length": 34})
        method.fit(checkpoint, [{"input_ids": answer[0].tolist()}] * 2, seed=1)
        decoder = checkpoint.decoder(slug)
        found = model.generate(ids, do_sample=False, max_new_tokens=24, custom_generate=decoder)
        assert torch.equal(found, answer)
        passes.append(decoder.statistics.passes)
    assert passes[1] < passes[0]
    assert passes[1] <= 16


@pytest.mark.parametrize("slug", METHODS)
def test_a_killed_fit_resumes_to_the_same_bytes(
    slug: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=2)
    wanted = recipe(slug, corpus_file, save_every=1, samples=6)
    document = carve(wanted, tmp_path / "whole", model=str(model))
    assert document["title"] == f"{model} fitted {slug}"
    assert document["steps"][0]["chosen"]["parameters"] > 0
    seen: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        if what.startswith("train"):
            seen.append(done)
            if done == 3:
                raise Killed

    with pytest.raises(Killed):
        carve(wanted, tmp_path / "broken", model=str(model), progress=kill)
    assert not (tmp_path / "broken").exists()
    seen.clear()
    carve(wanted, tmp_path / "broken", model=str(model), resume=True, progress=lambda done, total, what: (
        seen.append(done) if what.startswith("train") else None
    ))  # fmt: skip
    assert seen == [3, 4]
    files = [tmp_path / name / "attachments" / f"{slug}.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Saved beside weights that are still an ordinary checkpoint, and found again.
    decoder = load(tmp_path / "whole").decoder(slug)
    assert {tensor.dtype for tensor in load(tmp_path / "whole").attachments[slug].tensors.values()} == {torch.bfloat16}
    assert isinstance(decoder, TrainedHeads)
    assert 1 <= len(decoder.static_tree()) <= 15
    assert len(load(tmp_path / "whole").decoder(slug, nodes=15).static_tree()) == 15
    found = generate(load(tmp_path / "whole"), "the quick", decoder=slug, max_new_tokens=8)
    assert found["token_ids"] == generate(load(model), "the quick", max_new_tokens=8)["token_ids"]
    assert found["accepted_share"] is not None


@pytest.mark.parametrize("slug", METHODS)
def test_heads_of_another_checkpoint_are_refused(slug: str, tmp_path: Path) -> None:
    checkpoint = tiny()
    get_method(slug)(**QUICK).fit(checkpoint, [{"input_ids": IDS}] * 2)  # type: ignore[attr-defined]
    decoder = checkpoint.decoder(slug)
    ids = torch.tensor([IDS])
    half: Any = tiny().model.bfloat16()  # the same model in another precision
    half.generate(ids, do_sample=False, max_new_tokens=4, custom_generate=decoder)
    other: Any = Checkpoint(tiny_model("llama", layers=2, seed=1)).model
    with pytest.raises(IntaglioError, match=f"the heads of {slug} were trained for another checkpoint") as caught:
        other.generate(ids, do_sample=False, max_new_tokens=4, custom_generate=decoder)
    assert "\n" not in str(caught.value)
    checkpoint.save(tmp_path / "a")
    wide = Checkpoint(tiny_model("llama", layers=2, hidden_size=64), tiny_tokenizer("llama"), "wide")
    wide.attachments = load(tmp_path / "a").attachments
    wide.record = load(tmp_path / "a").record
    with pytest.raises(IntaglioError, match="does not fit LlamaForCausalLM; it belongs to another checkpoint"):
        wide.decoder(slug)
    with (tmp_path / "a" / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\0" * 8)
    with pytest.raises(IntaglioError, match="belongs to other weights than those beside it; fit it again"):
        load(tmp_path / "a").decoder(slug)


@pytest.mark.parametrize(("slug", "field"), [("chimera", "heads"), ("hidden_transfer", "ahead")])
def test_what_heads_are_cannot_be_set_afterwards(slug: str, field: str) -> None:
    checkpoint = tiny()
    get_method(slug)(**QUICK).fit(checkpoint, [{"input_ids": IDS}] * 2)  # type: ignore[attr-defined]
    with pytest.raises(IntaglioError, match=f"{field} is 2; the heads of {slug} were fitted with"):
        checkpoint.decoder(slug, **{field: 2})
    assert len(checkpoint.decoder(slug, nodes=5).static_tree()) == 5


@pytest.mark.parametrize("slug", METHODS)
def test_what_cannot_be_trained_is_one_sentence(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = get_method(slug)(**QUICK)
    encoder = Checkpoint(tiny_model("bert", layers=1), tiny_tokenizer("bert"), "tiny")
    cases: list[tuple[Any, Any, str]] = [
        (encoder, TEXTS, "is no causal language model"),
        (tiny(), None, f"heads are trained on texts; give {slug} some"),
        (Checkpoint(tiny().model), TEXTS, "no tokenizer"),
        (tiny(), [{"input_ids": [200]}], "the token id 200"),
    ]
    for checkpoint, texts, says in cases:
        with pytest.raises(IntaglioError, match=says) as caught:
            method.fit(checkpoint, texts)
        assert "\n" not in str(caught.value)
        assert checkpoint.attachments == {}
        assert checkpoint.record.steps == []
    with pytest.raises(IntaglioError, match="prompt is 4 and length 4"):
        get_method(slug)(**QUICK | {"length": 4}).fit(tiny(), TEXTS)  # type: ignore[attr-defined]
    with pytest.raises(IntaglioError, match="length is 500; from 2 tokens to the model's context of 128"):
        get_method(slug)(**QUICK | {"length": 500, "own_text": False}).fit(tiny(), TEXTS)  # type: ignore[attr-defined]
    model: Any = tiny().model
    with pytest.raises(IntaglioError, match=rf"{slug} has no heads; a recipe with the step fit: {{{slug}: {{}}}}"):
        model.generate(torch.tensor([IDS]), max_new_tokens=4, custom_generate=method)
    with pytest.raises(
        IntaglioError, match="a prompt of 10 tokens and 500 new ones need more than the model's context"
    ):
        model.generate(torch.tensor([IDS]), max_new_tokens=500, custom_generate=get_method(slug)(untrained=True))


@pytest.mark.parametrize("slug", METHODS)
def test_the_command_line_says_what_is_missing(slug: str, tmp_path: Path) -> None:
    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=1)
    run = CliRunner().invoke(app, ["generate", str(model), "the quick", "--decoder", slug, "--max-new-tokens", "4"])
    assert run.exit_code == 2
    assert f"nothing of {slug} is attached to {model}; a recipe with the step fit: {{{slug}: {{}}}} does that" in (
        " ".join(run.stderr.split())
    )
    quiet = ["--set", "untrained=true", "--set", "nodes=4", "--json"]
    run = CliRunner().invoke(
        app, ["generate", str(model), "the quick", "--decoder", slug, "--max-new-tokens", "4", *quiet]
    )
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize("slug", METHODS)
def test_the_plan_says_what_a_fit_takes(
    slug: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fixed machine: measured rates differ from plan to plan.
    monkeypatch.setattr("intaglio.recipe.plan.machine_rates", lambda *_: Rates(flops=1e9, elements=1e8, bytes=1e9))
    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=2)
    found = plan(recipe(slug, corpus_file), model=str(model))
    assert found["steps"][0]["verb"] == "fit"
    assert found["steps"][0]["seconds"] > 0
    more = plan(recipe(slug, corpus_file, steps=400), model=str(model))
    assert more["steps"][0]["seconds"] > found["steps"][0]["seconds"]
    encoder = tiny_checkpoint_dir("bert", tmp_path / "encoder", layers=1)
    with pytest.raises(IntaglioError, match=f"{slug} needs a model that generates"):
        plan(recipe(slug, corpus_file), model=str(encoder))
    assert non_default_fields(get_method(slug)()) == {}
    assert non_default_fields(get_method(slug)(token_cost=0.5)) == {"token_cost": 0.5}


@pytest.mark.parametrize("slug", METHODS)
def test_half_precision(slug: str) -> None:
    checkpoint = tiny(dtype=torch.bfloat16)
    model: Any = checkpoint.model
    get_method(slug)(**QUICK).fit(checkpoint, [{"input_ids": IDS}] * 4)  # type: ignore[attr-defined]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    decoder = checkpoint.decoder(slug)
    ids = torch.tensor([IDS])
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 5}):
        found = model.generate(ids, max_new_tokens=12, eos_token_id=None, custom_generate=decoder, **options)
        assert found.shape == (1, len(IDS) + 12)
        assert decoder.statistics.nodes > 0


def test_a_fingerprint_is_of_the_numbers() -> None:
    model = tiny_model("llama", layers=1)
    assert fingerprint(model) == fingerprint(tiny_model("llama", layers=1, dtype=torch.float64))
    assert fingerprint(model) == fingerprint(tiny_model("llama", layers=1, dtype=torch.bfloat16))
    assert fingerprint(model) != fingerprint(tiny_model("llama", layers=1, seed=1))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    assert fingerprint(model) != fingerprint(tiny_model("llama", layers=1))


def test_texts_are_held_out_where_there_are_enough() -> None:
    few = [{"input_ids": [n]} for n in range(39)]
    assert split(few) == (few, few)
    many = [{"input_ids": [n]} for n in range(60)]
    trained, held = split(many)
    assert (len(trained), len(held)) == (57, 3)
    assert not [example for example in held if example in trained]


def test_texts_as_they_are() -> None:
    checkpoint = tiny()
    method: Any = get_method("hidden_transfer")(**QUICK | {"own_text": False, "samples": 1})
    assert len(method._examples(checkpoint, load_texts(TEXTS), 0, lambda *_: None)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("slug", METHODS)
def test_smollm2_says_the_same(slug: str) -> None:
    checkpoint = load("smollm2")
    model: Any = checkpoint.model
    ids = checkpoint.tokenizer("The river that runs through the town", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    decoder: Any = get_method(slug)(untrained=True)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decoder, **options)
    assert torch.equal(found, expected)
    assert decoder.statistics.nodes > 0
    assert sum(parameter.numel() for parameter in decoder._heads.parameters()) * 2 <= 24e6  # bytes in bfloat16


@pytest.mark.parametrize("slug", METHODS)
def test_trees_shrink_with_the_rows_that_share_a_pass(slug: str) -> None:
    method: Any = get_method(slug)(untrained=True)
    sizes = [len(method.static_tree(rows)) for rows in (1, 4, 16)]
    assert sizes[0] > sizes[1] >= sizes[2] == 1
    assert len(get_method(slug)(untrained=True, nodes=9).static_tree(4)) == 9  # type: ignore[attr-defined]


def test_heads_that_were_saved_with_a_seed_are_found_again() -> None:
    checkpoint = tiny()
    get_method("hidden_transfer")(**QUICK).fit(checkpoint, TEXTS)
    attachment = checkpoint.attachments["hidden_transfer"]
    checkpoint.attachments["hidden_transfer"] = replace(attachment, parameters=attachment.parameters | {"seed": 0})
    assert checkpoint.decoder("hidden_transfer")._heads is not None
