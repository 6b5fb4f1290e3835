"""Costs of passes, and what follows from them: the size of trees, what is verified, and whether heads draft at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.environment import tuning
from intaglio.environment.tuning import Tuner
from intaglio.methods.decoding.aded import ADED
from intaglio.methods.registry import get_method
from intaglio.speculative import Speculative, prepacked_linear
from intaglio.speculative.drafters import NGramStore, PromptLookup
from intaglio.speculative.pass_cost import FIXED, SIZES, TOKEN_COST, PassCosts, pass_costs
from intaglio.speculative.prepacked_linear import MIN_NEW_TOKENS, choices, prepacked
from tests.families import tiny_model
from tests.tuners import GivenTimes

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = [9, 30, 31, 32, 9, 30, 31, 32, 9, 30]
FREE = dict.fromkeys(SIZES, 1.0)
DEAR = {size: float(size) for size in SIZES}
"""Seconds of passes: as long whatever they read, and as long as reading the tokens one by one."""


@given(
    st.lists(st.floats(0.01, 5), min_size=5, max_size=5),
    st.integers(1, 8),
    st.floats(1, 64),
    st.floats(0, 10),
)
def test_a_cost_grows_with_the_tokens_and_is_one_for_one(
    seconds: list[float], rows: int, tokens: float, more: float
) -> None:
    costs = PassCosts(tuple(zip(SIZES, sorted(seconds), strict=True)), rows)
    assert costs.cost(1) == 1
    assert 1 <= costs.cost(tokens) <= costs.cost(tokens + more) * (1 + 1e-9)
    for size, value in zip(SIZES, sorted(seconds), strict=True):
        assert costs.cost(size) == pytest.approx(value / min(seconds))


def test_costs_between_and_beyond_the_measured_sizes() -> None:
    costs = PassCosts(((1, 0.05), (2, 0.06), (4, 0.06), (8, 0.07), (16, 0.09)), rows=2)
    assert [costs.cost(n) for n in (1, 1.5, 2, 3, 6, 12, 24)] == pytest.approx([1, 1.1, 1.2, 1.2, 1.3, 1.6, 2.2])
    assert costs.cost(16, rows=1) == pytest.approx(1.4)  # half of the rows have ended
    assert costs.token_cost == pytest.approx(0.8 / 15)
    assert FIXED.cost(11, rows=2) == pytest.approx(1 + 2 * 10 * TOKEN_COST)
    assert FIXED.token_cost == pytest.approx(TOKEN_COST)


def test_passes_leave_model_and_generator_as_they_were() -> None:
    model: Any = tiny_model("llama")
    before = torch.get_rng_state()
    with tuning.using(given := GivenTimes(passes=FREE)):
        costs = pass_costs(model, 3, None)
    assert costs.measured
    assert costs.rows == 3
    (key,) = given.used
    assert "LlamaForCausalLM" in key
    assert "rows 3 threads 1" in key
    assert torch.equal(before, torch.get_rng_state())
    assert pass_costs(model, 3, None) == PassCosts(rows=3)  # off
    with tuning.using(Tuner(limit=0.0)):
        assert not pass_costs(model, 1, None).measured


@pytest.mark.parametrize("faster", ["stock", "prepacked", "direct 1"])
def test_products_are_used_only_where_they_win(faster: str) -> None:
    if not prepacked_linear._works(torch.float32):
        pytest.skip("this build of torch has no oneDNN")
    model: Any = tiny_model("llama")
    with tuning.using(given := GivenTimes(faster, FREE)):
        steps = choices(model.modules())
        made = prepacked(model, None, MIN_NEW_TOKENS)
    assert {step for own in steps.values() for step in own} == {faster}
    assert (made is None) == (faster == "stock")
    shapes = {tuple(module.weight.shape) for module in steps}  # type: ignore[union-attr, arg-type]
    assert len(given.used) == 4 * len(shapes)
    assert prepacked(model, True, 1) is not None  # wherever possible


def lookups() -> dict[str, Any]:
    return {
        "aded": ADED(corpus=[IDS]),
        "prompt_lookup": Speculative(PromptLookup()),
        "ngram": Speculative(NGramStore.build([IDS * 3], 160)),
    }


@pytest.mark.parametrize("name", lookups())
def test_less_is_verified_where_tokens_are_dear(name: str) -> None:
    """Tree size from the measured cost of passes: none where a token costs a pass; the text stays the target's."""
    model: Any = tiny_model("llama")
    ids = torch.tensor([IDS])
    expected = model.generate(ids, max_new_tokens=24, **GREEDY)
    nodes = {}
    for cost, passes in (("free", FREE), ("dear", DEAR)):
        decoder = lookups()[name]
        with tuning.using(GivenTimes(passes=passes)):
            assert torch.equal(model.generate(ids, max_new_tokens=24, custom_generate=decoder, **GREEDY), expected)
        nodes[cost] = decoder.statistics.nodes
    assert nodes["dear"] == 0
    assert nodes["free"] > 0


def test_a_lookup_that_comes_true_is_trusted_with_longer_drafts() -> None:
    costs = PassCosts(tuple((size, 1 + 0.4 * (size - 1)) for size in SIZES))

    class Run:
        prompts = ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) * 2,)

        def costs(self) -> PassCosts:
            return costs

    (row,) = PromptLookup().start(Run())._sessions  # type: ignore[arg-type, attr-defined]
    sizes = []
    for _ in range(12):
        tree = row.propose(99)
        sizes.append(len(tree))
        last = tree.tokens[0]

        class Step:
            tokens = tuple((last + n) % 15 + 1 for n in range(3))

        row.observe(Step)
    assert sizes[0] < sizes[-1]
    assert sizes[-1] > 8


@pytest.mark.parametrize("slug", ["chimera", "hidden_transfer"])
def test_heads_that_lose_draft_nothing_and_say_so(slug: str) -> None:
    model: Any = tiny_model("llama")
    ids = torch.tensor([IDS])
    expected = model.generate(ids, max_new_tokens=8, **GREEDY)
    for passes, fields, drafts in (
        (DEAR, {}, False),
        (FREE, {}, True),
        (DEAR, {"nodes": 3}, True),  # who names a tree gets it
        (DEAR, {"token_cost": 0.0}, True),
    ):
        decoder: Any = get_method(slug)(untrained=True, **fields)
        with tuning.using(GivenTimes(passes=passes)):
            assert torch.equal(model.generate(ids, max_new_tokens=8, custom_generate=decoder, **GREEDY), expected)
        assert (decoder.statistics.nodes > 0) == drafts
        assert decoder.statistics.note.startswith("nothing was drafted: on this processor") == (not drafts)
