"""Rows of next-token prediction: nothing is lost, nothing leaks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer import CausalLM, KeyedRNG
from intaglio.trainer.causal_lm import causal_batch, cut, documents, next_token_loss, packed, positions, targets
from tests.families import DECODERS, ENCODERS, VOCAB, tiny_model
from tests.trainer.helpers import checkpoint

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=12)
RNG = KeyedRNG(0)


def documents_of(lengths: list[int]) -> list[dict[str, Any]]:
    """Documents whose tokens are all different."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return list(documents(({"input_ids": list(range(a, b))} for a, b in pairwise(ends)), 1000))


@given(LENGTHS, st.integers(2, 16))
def test_packing_keeps_every_token_in_order_in_full_rows(lengths: list[int], length: int) -> None:
    rows = list(packed(documents_of(lengths), length))
    assert all(len(row["input_ids"]) == length for row in rows[:-1])
    joined = torch.cat([row["input_ids"] for row in rows]).tolist() if rows else []
    total = sum(lengths)
    assert joined == list(range(len(joined)))
    # Only a last row without anything to predict is left out.
    assert total - len(joined) == 0 or max(lengths[-(total - len(joined)) :]) >= 1
    assert total - len(joined) < length


@given(LENGTHS, st.integers(2, 16))
def test_each_token_is_predicted_from_its_own_document_and_piece(lengths: list[int], length: int) -> None:
    ends = set(torch.tensor(lengths).cumsum(0).tolist())
    for cutter in (packed, cut):
        for row in cutter(documents_of(lengths), length):
            ids, target, place = row["input_ids"].tolist(), targets(row).tolist(), positions(row).tolist()
            for t, (token, wanted) in enumerate(zip(ids, target, strict=True)):
                last = t + 1 == len(ids) or token + 1 in ends
                assert wanted == (-100 if last else token + 1)
                assert place[t] == (0 if t == 0 or token in ends else place[t - 1] + 1)


def test_labels_say_what_is_predicted() -> None:
    row = {"input_ids": torch.arange(5, 10), "labels": torch.tensor([-100, -100, 7, 8, -100])}
    assert targets(row).tolist() == [-100, 7, 8, -100, -100]
    rows = list(cut(documents([row], 160), 8))
    assert targets(rows[0]).tolist() == [-100, 7, 8, -100, -100]


def test_padding_is_ignored_and_changes_nothing() -> None:
    model = tiny_model("llama", layers=2)
    short, long = ({"input_ids": torch.arange(3, 3 + n)} for n in (5, 9))
    batch = causal_batch([short, long])
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]
    assert batch["weight"] == 4 + 8
    together = next_token_loss(model, batch).total
    alone = [next_token_loss(model, causal_batch([row])).total for row in (short, long)]
    assert torch.allclose(together, (alone[0] * 4 + alone[1] * 8) / 12, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_have_no_gradient_to_each_other(family: str, attention: str) -> None:
    model = tiny_model(family, attn_implementation=attention)
    rows = list(packed(documents_of([7, 12, 5]), 24))
    batch = causal_batch([rows[0], {"input_ids": torch.arange(20)}])  # the second row is padded
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
    bounds = torch.tensor([0, 7, 19, 24])
    for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
        (gradient,) = torch.autograd.grad(logits[0, start:stop].square().sum(), embedded, retain_graph=True)
        seen = gradient.abs().sum(-1) > 0
        assert seen[0].nonzero().flatten().tolist() == list(range(start, stop)), f"document {number}"
        assert not seen[1].any()
    (gradient,) = torch.autograd.grad(logits[1, :20].square().sum(), embedded)
    assert not gradient[1, 20:].any()


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_a_packed_document_has_the_logits_it_has_alone(family: str) -> None:
    model = tiny_model(family)
    (row,) = packed(documents_of([7, 12, 5]), 24)
    batch = causal_batch([row])
    del batch["target"], batch["weight"]
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0, 7:19]
        alone = model(batch["input_ids"][:, 7:19], use_cache=False).logits[0]
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_family_packs(family: str) -> None:
    ckpt = checkpoint(family)
    examples = [{"input_ids": [5, 6, 7]}]
    rows = list(CausalLM(length=16).prepare(ckpt, examples, RNG))
    assert [row["input_ids"].tolist() for row in rows] == [[5, 6, 7]]


def test_models_that_see_the_answer_are_refused() -> None:
    from intaglio.masks import Bidirectional, set_visibility

    for family in ENCODERS:
        with pytest.raises(IntaglioError, match="needs a causal decoder"):
            CausalLM().prepare(checkpoint(family), [], RNG)
    looking = checkpoint()
    set_visibility(looking.model, {1: Bidirectional()})
    with pytest.raises(IntaglioError, match="sees later tokens"):
        CausalLM().prepare(looking, [], RNG)


def test_a_model_that_takes_no_note_of_positions_may_not_pack() -> None:
    ckpt = checkpoint()
    ckpt.model.register_forward_pre_hook(
        lambda model, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "position_ids"}), with_kwargs=True
    )
    with pytest.raises(IntaglioError, match="LlamaForCausalLM does not separate packed documents; train it with pack"):
        CausalLM().prepare(ckpt, [], RNG)
    assert list(CausalLM(pack=False).prepare(ckpt, [[]][:0], RNG)) == []


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        ({"input_ids": [1, VOCAB]}, f"example 0 of the training data has the token id {VOCAB}"),
        ({"input_ids": [1, 2], "labels": [1]}, "has 1 labels for 2 tokens"),
        ({"input_ids": [1, 2], "labels": [1, VOCAB]}, f"has the label {VOCAB}; from 0 to {VOCAB - 1}, or -100"),
        ({"input_ids": [0.5]}, "input_ids must be one row of integers"),
        ({"input_ids": []}, "example 0 of the training data is empty"),
        ({"prompt": "a"}, "has no input_ids and no text; it has: prompt"),
    ],
)
def test_malformed_examples_are_named(example: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        list(CausalLM().prepare(checkpoint(), [example], RNG))


@pytest.mark.parametrize("length", [1, 129])
def test_row_lengths_outside_the_context_are_refused(length: int) -> None:
    with pytest.raises(IntaglioError, match=f"length is {length}; from 2 tokens to the model's context of 128"):
        CausalLM(length=length).prepare(checkpoint(), [], RNG)


def test_no_target_gives_no_loss() -> None:
    ckpt: Checkpoint = checkpoint()
    row = {"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([-100, -100])}
    assert float(next_token_loss(ckpt.model, causal_batch([row])).total.detach()) == 0.0
