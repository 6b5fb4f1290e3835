"""Constraints under drafting: each node of the tree, and the constrained model's own output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from intaglio.constraints import Constraint, ConstraintProcessor, JSONSchema, Predicate, Regex, Vocabulary
from intaglio.methods.decoding.dyspec import DySpec
from intaglio.speculative import Speculative, TokenTree
from intaglio.speculative.drafters import PromptLookup
from tests.causal_lms import tiny_lm
from tests.families import EOS, VOCAB
from tests.speculative.distributions import check_law
from tests.speculative.toys import Made, mixed, target

FORMS = [b""] * 4 + [bytes([97 + id % 26]) * (1 + id // 26) for id in range(VOCAB - 4)]
LETTERS = Vocabulary(FORMS, [EOS])
PROMPT = torch.tensor([[9, 30, 31, 32, 9, 30, 31]])


def sparing(text: str) -> bool:
    """Whether no letter comes more than twice."""
    return all(text.count(letter) <= 2 for letter in text)


def processor(constraint: Constraint, rows: torch.Tensor = PROMPT) -> ConstraintProcessor:
    return ConstraintProcessor(constraint, LETTERS, rows.shape[1], greedy=True)


@pytest.mark.parametrize("family", ["llama", "qwen3_window"])
@pytest.mark.parametrize("constraint", [Regex("([a-f]+[n-s]{1,3})*"), Predicate(sparing)])
def test_drafted_ids_are_those_of_the_constrained_model(family: str, constraint: Constraint) -> None:
    model, options = target(family), {"do_sample": False, "max_new_tokens": 14, "eos_token_id": EOS}
    expected = model.generate(PROMPT, logits_processor=[processor(constraint)], **options)
    answer = expected[0, PROMPT.shape[1] :].tolist()
    for drafter in (mixed([answer], seed=1), PromptLookup(), mixed([[]], seed=2)):
        decoder = Speculative(drafter)
        ids = model.generate(PROMPT, logits_processor=[processor(constraint)], custom_generate=decoder, **options)
        assert torch.equal(ids, expected)
    assert model.generate(PROMPT, **options)[0].tolist() != expected[0].tolist()


def test_no_pass_verifies_a_node_that_the_constraint_rejects() -> None:
    trees: list[Any] = []
    each, model = processor(Regex("[a-e]{12}")), target("llama")

    def wide(row: int, ids: list[int], new: int, room: int) -> TokenTree:
        return TokenTree([ids[-1], 4, 20, 5, 6, 21], [-1, 0, 0, 1, 2, 3])  # a, q; ab, qc; abr

    decoder = Speculative(Made(wide), on_step=trees.append)
    model.generate(PROMPT, logits_processor=[each], custom_generate=decoder, do_sample=False, max_new_tokens=6)
    drafted = [list(step.tree.tokens[1:]) for step in trees[1:]]
    assert drafted[0] == [4, 5]
    assert all(tokens == [4, 5][: len(tokens)] for tokens in drafted)


@pytest.mark.parametrize("family", ["bloom", "mamba2"])
def test_a_chain_follows_the_allowed_branch(family: str) -> None:
    """A family that reads no trees verifies the first path that the constraint allows."""
    model = tiny_lm(family).double()
    trees: list[Any] = []
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": EOS}
    constraint = Regex("a[a-e]{9}")

    def wide(row: int, ids: list[int], new: int, room: int) -> TokenTree:
        return TokenTree([ids[-1], 20, 5, 21, 6], [-1, 0, 0, 1, 2])  # q, b; qr, bc

    decoder = Speculative(Made(wide), on_step=trees.append)
    expected = model.generate(PROMPT, logits_processor=[processor(constraint)], **options)
    ids = model.generate(PROMPT, logits_processor=[processor(constraint)], custom_generate=decoder, **options)
    assert torch.equal(ids, expected)
    assert list(trees[1].tree.tokens[1:]) == [5, 6]


def test_a_filtered_tree_keeps_drawn_siblings_together() -> None:
    tree = TokenTree([1, 2, 3, 4, 5], [-1, 0, 0, 2, 1], {0: torch.full((8,), 0.125), 1: torch.full((8,), 0.125)})
    kept = tree.filtered([True, True, False, False, False])
    assert (list(kept.tokens), list(kept.parents)) == ([1, 2, 3, 5], [-1, 0, 0, 1])
    plain = TokenTree([1, 2, 3, 4, 5], [-1, 0, 0, 2, 1])
    assert list(plain.filtered([True, True, False, True, False]).tokens) == [1, 2]
    assert plain.filtered([True] * 5) is plain


@pytest.mark.parametrize("drafter", ["drawn", "chosen"])
def test_drafted_draws_have_the_constrained_models_distribution(drafter: str) -> None:
    """Losslessly against the constrained model."""
    letters = Vocabulary([bytes([97 + id]) for id in range(7)] + [b""], [7])
    each = ConstraintProcessor(Regex("([ab][de]|[de][ab]){6}"), letters, 5)

    def make(model: Any) -> Any:
        if drafter == "chosen":
            return Speculative(Made(lambda row, ids, new, room: TokenTree([ids[-1], 0, 1, 4, 3], [-1, 0, 0, 0, 1])))
        draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        return DySpec(draft=draft, budget=4, draw="sample")

    check_law(make, rows=80, draws=3, processor=each)


def test_json_is_drafted_from_the_prompt() -> None:
    """A schema's fixed parts are accepted from a draft that knows them."""
    forms = [b""] * 4 + [bytes([32 + id]) if id < 95 else b"\x00%d" % id for id in range(VOCAB - 4)]
    schema = {"type": "object", "properties": {"abc": {"const": "xyz"}}, "required": ["abc"]}
    schema["additionalProperties"] = False
    text = b'{"abc": "xyz"}'
    ids = torch.tensor([[4 + byte - 32 for byte in text + b"  " + text[:1]]])
    vocabulary = Vocabulary(forms, [EOS])
    decoder, model = Speculative(PromptLookup()), target("llama")
    each = ConstraintProcessor(JSONSchema(schema), vocabulary, ids.shape[1] - 1, greedy=True)
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": EOS}
    output = model.generate(ids, logits_processor=[each], custom_generate=decoder, **options)
    assert bytes(forms[id][0] for id in output[0, ids.shape[1] - 1 : -1].tolist()) == text
    assert decoder.statistics.passes < 10
