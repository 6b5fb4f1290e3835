"""Token classification: the head, LoRA, resuming, stock checkpoints, pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, pipeline

from intaglio.checkpoint import load
from intaglio.errors import IntaglioError
from intaglio.modeling.token_classifier import classification_head, classifier_class, label_names, to_classifier
from intaglio.trainer import KeyedRNG, Objective, Prepares, train
from intaglio.trainer.token_classification import TokenClassification, make_evaluator, predict
from tests.families import DECODERS, DESIGN_FAMILIES, tiny_model
from tests.trainer.helpers import checkpoint, same, weights
from tests.trainer.test_resume import Killed, killer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
ROWS = [
    {
        "words": [WORDS[(n + k) % 8] for k in range(3 + n % 5)],
        "labels": ["x" if (n + k) % 3 else "y" for k in range(3 + n % 5)],
    }
    for n in range(12)
]
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0, "log_every": 1}


def test_it_is_an_objective() -> None:
    assert isinstance(TokenClassification(), Objective)
    assert isinstance(TokenClassification(), Prepares)
    assert len(TokenClassification().modules()) == 0
    ckpt = checkpoint()
    train(ckpt, ROWS, objective=TokenClassification(), **SETTINGS)
    for refused in (lambda: train(ckpt, ["the quick brown fox"] * 4, **SETTINGS),):
        with pytest.raises(IntaglioError, match="needs a language-model head; LlamaForTokenClassification has none"):
            refused()


@pytest.mark.parametrize("family", DESIGN_FAMILIES)
def test_the_body_stays_and_the_head_is_new(family: str, tmp_path: Path) -> None:
    ckpt = checkpoint(family)
    ids = torch.arange(8, 20)[None]
    ckpt.model.eval()
    body = ckpt.model.base_model
    with torch.no_grad():
        hidden = body(ids).last_hidden_state
    to_classifier(ckpt, ["x", "y", "z"], seed=3)
    head = classification_head(ckpt.model)
    assert head is not None
    assert ckpt.model.base_model is body
    assert not ckpt.model.training
    assert label_names(ckpt.model) == ("x", "y", "z")
    assert type(ckpt.model) is classifier_class(ckpt.model.config)
    with torch.no_grad():
        logits = ckpt.model(ids).logits
        if family in DECODERS:
            assert torch.equal(logits, head(hidden))
    assert float(head.bias.detach().abs().max()) == 0
    again = checkpoint(family)
    to_classifier(again, ["x", "y", "z"], seed=3)
    assert torch.equal(classification_head(again.model).weight, head.weight)  # type: ignore[union-attr]
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.kind == ("runtime" if family == "gemma3" else "standalone")  # transformers has no class for that one
    with torch.no_grad():
        assert torch.equal(back.model(ids).logits, logits)
    if back.kind == "standalone":
        stock = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            assert torch.equal(stock(ids).logits, logits)
    else:
        with pytest.raises(ValueError, match="intaglio_gemma3"):
            AutoModelForTokenClassification.from_pretrained(tmp_path / "out")


def test_two_heads_are_not_mixed_up() -> None:
    ckpt = checkpoint()
    to_classifier(ckpt, ["x", "y"])
    model = ckpt.model
    to_classifier(ckpt, ["x", "y"], place="last")
    assert ckpt.model is model
    with pytest.raises(IntaglioError, match="labels with x, y, and the examples with y, z; start from another model"):
        to_classifier(ckpt, ["y", "z"])


@pytest.mark.parametrize("lora", [None, {"r": 2}, {"r": 2, "targets": ["q_proj", "v_proj"]}])
def test_killed_training_resumes_bit_for_bit(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    whole, killed, again = (checkpoint() for _ in range(3))
    arguments = {**SETTINGS, "save_every": 1, "lora": lora}
    unbroken = train(whole, ROWS, objective=TokenClassification(), **arguments)
    with pytest.raises(Killed):
        train(killed, ROWS, objective=TokenClassification(), directory=tmp_path, progress=killer(3), **arguments)
    resumed = train(again, ROWS, objective=TokenClassification(), directory=tmp_path, **arguments)
    assert resumed.history == unbroken.history
    assert "accuracy" in resumed.history[-1].parts
    assert same(weights(again), weights(whole))


def test_under_lora_the_head_is_trained_in_full_and_has_no_adapter() -> None:
    ckpt, stock = checkpoint(), tiny_model("llama", layers=2)
    train(ckpt, ROWS, objective=TokenClassification(), lora={"r": 2, "targets": ["q_proj"]}, **SETTINGS)
    before, after = dict(stock.named_parameters()), dict(ckpt.model.named_parameters())
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert changed == {"score.weight", "score.bias"} | {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)}
    assert type(classification_head(ckpt.model)) is torch.nn.Linear


def test_it_learns_and_says_where_labels_stand(tmp_path: Path) -> None:
    ckpt = checkpoint()
    done = train(
        ckpt, ROWS, objective=TokenClassification(place="last"), evaluate=make_evaluator(ROWS), evaluate_every=10,
        **{**SETTINGS, "steps": 40},
    )  # fmt: skip
    assert done.history[-1].loss < done.history[0].loss
    assert done.history[-1].evaluation == make_evaluator(ROWS)(ckpt)
    assert ckpt.record.steps[-1].parameters["objective"]["token_classification"]["place"] == "last"
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.model.config.labelled_token == "last"
    wanted = predict(ckpt, ROWS)
    assert predict(back, ROWS) == wanted
    assert predict(back, [{"words": row["words"]} for row in ROWS], batch_size=1) == wanted
    assert predict(back, [{"passage": " ".join(row["words"]), "spans": []} for row in ROWS[:1]]) == [[]]


def test_long_texts_are_cut_and_every_word_has_an_answer() -> None:
    ckpt = checkpoint()
    train(ckpt, ROWS, objective=TokenClassification(length=8), **SETTINGS)
    (found,) = predict(ckpt, [{"words": WORDS * 9}], length=8)
    assert len(found) == 72
    assert set(found) <= {"x", "y"}


def test_a_pipeline_of_transformers_reads_it() -> None:
    ckpt = checkpoint()
    train(ckpt, ROWS, objective=TokenClassification(), **SETTINGS)
    found = pipeline("token-classification", model=ckpt.model, tokenizer=ckpt.tokenizer)("the quick fox")
    assert {one["entity"] for one in found} <= {"x", "y"}


@pytest.mark.parametrize(
    ("data", "goal", "words"),
    [
        ([{"words": ["a", "b"], "labels": ["x", "x"]}], {}, "have 1 different labels"),
        (ROWS, {"labels": ["x", "z"]}, "example 0 has the label 'y'; accepted: x, z"),
        ([{"words": ["a"]}], {}, "example 0 of the labelled data has no labels"),
        (["plain text"], {}, "has no labels"),
        ([{"words": ["a", "b"], "labels": [None, None]}], {"labels": ["x", "y"]}, "the training data is empty"),
        (ROWS, {"length": 999}, "length is 999; from 2 tokens to the model's context of 128"),
    ],
)
def test_data_that_do_not_fit_are_refused(data: list[Any], goal: dict[str, Any], words: str) -> None:
    with pytest.raises(IntaglioError, match=words):
        train(checkpoint(), data, objective=TokenClassification(**goal), **SETTINGS)


def test_labels_that_training_has_not_seen_are_refused_while_evaluating() -> None:
    strange = [{"words": ["a"], "labels": ["z"]}]
    with pytest.raises(IntaglioError, match="example 0 has the label 'z'"):
        train(checkpoint(), ROWS, objective=TokenClassification(), evaluate=strange, **SETTINGS)


def test_what_cannot_label_is_refused() -> None:
    ckpt = checkpoint()
    with pytest.raises(IntaglioError, match="LlamaForCausalLM does not label tokens"):
        predict(ckpt, ROWS)
    ckpt.tokenizer = None
    with pytest.raises(IntaglioError, match="no tokenizer, so words cannot be labelled"):
        list(TokenClassification().prepare(ckpt, [], KeyedRNG(0)))
