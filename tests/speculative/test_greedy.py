"""Greedy output equals stock greedy `generate`, token by token, whatever the drafter proposes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from intaglio.modeling.anatomy import CACHE
from intaglio.speculative import Speculative, TokenTree
from tests.families import EXTRA_FAMILIES, tiny_tokenizer
from tests.speculative.toys import DESIGN_DECODERS, Made, mixed, nothing, oracle, prompt, ragged, target, wrong

STOPS = [2, 15, 33, 60, 77, 90]


def compare(model: Any, drafter: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor, **options: Any) -> Any:
    decoder = Speculative(drafter)
    found = model.generate(**inputs, custom_generate=decoder, do_sample=False, **options)
    assert torch.equal(found, expected)
    return decoder.statistics


def answers(expected: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return expected[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*itertools.product(DESIGN_DECODERS, ("sdpa", "eager")), *((name, "sdpa") for name in EXTRA_FAMILIES)],
)
def test_one_row(family: str, implementation: str) -> None:
    model = target(family, implementation)
    inputs = {"input_ids": prompt(11)}
    options: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, do_sample=False, **options)
    right = answers(expected, inputs)
    perfect = compare(model, oracle(right), inputs, expected, **options)
    # 16 tokens: one at the prefill, then blocks of five drafted ones and the target's own; the last block is cut.
    assert perfect.lengths == [5, 5, 2]
    assert perfect.passes == 4
    useless = compare(model, wrong(right), inputs, expected, **options)
    assert useless.passes == 16
    assert useless.accepted == 0
    some = compare(model, mixed(right, seed=1), inputs, expected, **options)
    assert 0 < some.accepted < 16 - some.passes + 1
    # A cache that keeps every row, where the one that generate makes drops what lies outside the window.
    compare(model, mixed(right, seed=2), inputs, expected, **{CACHE: DynamicCache()}, **options)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*((name, "sdpa") for name in (*DESIGN_DECODERS, *EXTRA_FAMILIES)), *((name, "eager") for name in DESIGN_DECODERS)],
)
def test_ragged_rows_that_end_at_different_times(family: str, implementation: str) -> None:
    # In float64, stock eager attention gives a fully padded query no number at all, so padding is tried in float32.
    model = target(family, implementation, torch.float64 if implementation == "sdpa" else torch.float32)
    inputs = ragged([6, 3, 11, 1])
    options: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": STOPS, "pad_token_id": 0}
    expected = model.generate(**inputs, do_sample=False, **options)
    right = answers(expected, inputs)
    for drafter in (mixed(right, seed=3), oracle(right, 9)):
        assert compare(model, drafter, inputs, expected, **options).accepted > 0


@pytest.mark.parametrize("length", [1, 2, 30])
def test_prompts_of_one_token_and_beyond_the_window(length: int) -> None:
    for family in ("llama", "gemma3", "mistral_window"):
        model, inputs = target(family), {"input_ids": prompt(length, seed=5)}
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        compare(model, mixed(answers(expected, inputs), seed=4), inputs, expected, max_new_tokens=12)


@pytest.mark.parametrize("most", range(1, 9))
def test_every_length_limit_cuts_where_stock_does(most: int) -> None:
    model, inputs = target("llama"), {"input_ids": prompt(7)}
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=most, eos_token_id=None)
    longer = model.generate(**inputs, do_sample=False, max_new_tokens=20, eos_token_id=None)
    right = answers(longer, inputs)
    statistics = compare(model, oracle(right, 6), inputs, expected, max_new_tokens=most, eos_token_id=None)
    assert statistics.tokens == most
    compare(model, oracle(right, 6), inputs, expected, max_length=7 + most, eos_token_id=None)


@pytest.mark.parametrize("place", range(6))
def test_a_stop_token_inside_an_accepted_block_ends_the_row(place: int) -> None:
    model, inputs = target("gemma3"), {"input_ids": prompt(9, seed=8)}
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=16, eos_token_id=None)
    right = answers(whole, inputs)
    stop = right[0][place]
    options: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": [159, stop]}
    expected = model.generate(**inputs, do_sample=False, **options)
    assert expected.shape[1] == 9 + right[0].index(stop) + 1
    compare(model, oracle(right, 5), inputs, expected, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10, "eos_token_id": STOPS},
        {"bad_words_ids": [[5], [9, 12]], "repetition_penalty": 1.2},
        {"suppress_tokens": list(range(20, 90)), "begin_suppress_tokens": [100, 101]},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": [2]},
    ],
)
def test_processors_see_each_nodes_own_prefix(options: dict[str, Any]) -> None:
    model = target("llama")
    for inputs in ({"input_ids": prompt(9)}, ragged([4, 9])):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=20, **options)
        compare(model, mixed(answers(expected, inputs), seed=6), inputs, expected, max_new_tokens=20, **options)


def test_allowed_tokens_may_depend_on_the_row() -> None:
    model, inputs = target("llama"), ragged([4, 9, 6])

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [token for token in range(160) if token % 3 == row and token != int(ids[-1])]

    options: dict[str, Any] = {"max_new_tokens": 12, "prefix_allowed_tokens_fn": allowed, "eos_token_id": None}
    expected = model.generate(**inputs, do_sample=False, **options)
    compare(model, mixed(answers(expected, inputs), seed=6), inputs, expected, **options)


class _Counting(LogitsProcessor):
    """Remembers how it was called; changes what it adds from call to call."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.dtype == torch.float32
        assert scores.shape == (1, 160)
        self.lengths.append(input_ids.shape[1])
        return scores + torch.arange(160) * (0.01 * (len(self.lengths) % 5))


def test_a_processor_with_a_memory_is_called_once_a_token_in_order() -> None:
    model, inputs = target("llama"), {"input_ids": prompt(5)}
    stock, ours = _Counting(), _Counting()
    options: dict[str, Any] = {"max_new_tokens": 15, "eos_token_id": None}
    expected = model.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([stock]), **options)
    drafter = mixed(answers(expected, inputs), seed=2)
    compare(model, drafter, inputs, expected, logits_processor=LogitsProcessorList([ours]), **options)
    assert ours.lengths == stock.lengths == list(range(5, 20))


class _EndsOn(StoppingCriteria):
    def __init__(self, tokens: set[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([int(row[-1]) in self.tokens for row in input_ids])


@pytest.mark.parametrize("stops", [None, [2]])
def test_stopping_criteria_are_asked_after_every_token(stops: list[int] | None) -> None:
    model = target("llama")
    for inputs in ({"input_ids": prompt(9)}, ragged([4, 9, 2])):
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=20, eos_token_id=None)
        right = answers(whole, inputs)
        ends = {row[place] for row, place in zip(right, (4, 9, 2), strict=False)}
        options = {
            "max_new_tokens": 20, "eos_token_id": stops, "pad_token_id": 0,
            "stopping_criteria": StoppingCriteriaList([_EndsOn(ends)]),
        }  # fmt: skip
        expected = model.generate(**inputs, do_sample=False, **options)
        assert expected.shape[1] < whole.shape[1]
        compare(model, oracle(right, 6), inputs, expected, **options)
        compare(model, wrong(right), inputs, expected, **options)


def test_stop_strings_end_a_row_inside_a_block() -> None:
    model, inputs, tokenizer = target("llama"), {"input_ids": prompt(9)}, tiny_tokenizer("llama")
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=20, eos_token_id=None)
    right = answers(whole, inputs)
    stop = tokenizer.decode(right[0][6:8])
    criterion = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None, "stopping_criteria": criterion}
    expected = model.generate(**inputs, do_sample=False, **options)
    assert 9 < expected.shape[1] <= 9 + 8
    compare(model, oracle(right, 6), inputs, expected, **options)


def test_repeated_siblings_are_all_followed() -> None:
    model, inputs = target("llama"), {"input_ids": prompt(9)}
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    right = answers(expected, inputs)

    def make(row: int, ids: list[int], new: int, room: int) -> TokenTree:
        a, b, c = (*right[0], 0, 0, 0)[new : new + 3]
        # The right first token twice; only the second one goes on, and there the right second token twice.
        return TokenTree([ids[-1], a, a, 0, b, b, c], [-1, 0, 0, 1, 2, 2, 5])

    statistics = compare(model, Made(make), inputs, expected, max_new_tokens=12, eos_token_id=None)
    assert statistics.lengths == [3, 3, 2]


def test_a_given_cache_is_filled_and_continued() -> None:
    for family in ("gemma3", "mistral_window"):
        model, first = target(family), prompt(9)
        for make in (DynamicCache, lambda model=model: DynamicCache(config=model.config)):
            stock, ours = make(), make()
            expected = model.generate(first, do_sample=False, max_new_tokens=10, **{CACHE: stock})
            drafter = oracle(answers(expected, {"input_ids": first}))
            compare(model, drafter, {"input_ids": first}, expected, max_new_tokens=10, **{CACHE: ours})
            assert ours.get_seq_length() == stock.get_seq_length()
            for mine, theirs in zip(ours.layers, stock.layers, strict=True):
                torch.testing.assert_close(mine.keys, theirs.keys, rtol=0, atol=5e-5)
                assert not mine.keys.is_inference()
            more = torch.cat([expected, prompt(3, seed=1)], 1)
            again = model.generate(more, do_sample=False, max_new_tokens=10, **{CACHE: stock})
            drafter = mixed(answers(again, {"input_ids": more}), seed=0)
            compare(model, drafter, {"input_ids": more}, again, max_new_tokens=10, **{CACHE: ours})


def test_the_output_is_an_ordinary_tensor_and_more_than_ids_on_request() -> None:
    model, inputs = target("llama"), {"input_ids": prompt(9)}
    options: dict[str, Any] = {
        "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
        "output_logits": True, "repetition_penalty": 1.3, "eos_token_id": None,
    }  # fmt: skip
    stock = model.generate(**inputs, **options)
    decoder = Speculative(mixed(answers(stock.sequences, inputs), seed=1))
    ours = model.generate(**inputs, custom_generate=decoder, **options)
    assert torch.equal(ours.sequences, stock.sequences)
    assert not ours.sequences.is_inference()
    for name in ("scores", "logits"):
        assert len(ours[name]) == 12
        for mine, theirs in zip(ours[name], stock[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-5)
    assert ours.statistics is decoder.statistics
    assert ours[CACHE].get_seq_length() == stock[CACHE].get_seq_length() == 20


def test_a_run_without_drafts_costs_a_pass_a_token() -> None:
    model, inputs = target("qwen3"), {"input_ids": prompt(9)}
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=10, eos_token_id=None)
    statistics = compare(model, nothing(), inputs, expected, max_new_tokens=10, eos_token_id=None)
    assert (statistics.passes, statistics.nodes, statistics.tokens_per_pass) == (10, 0, 1.0)
