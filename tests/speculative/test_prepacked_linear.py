"""Weights laid out beforehand give the same products, follow the weights, and are gone when the pass is over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from intaglio.speculative import Speculative, prepacked_linear
from intaglio.speculative.drafters import PromptLookup
from intaglio.speculative.prepacked_linear import MAX_ROWS, MIN_NEW_TOKENS, Prepacked, prepacked
from tests.families import DECODERS, tiny_model

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2}}


@pytest.fixture(autouse=True)
def needs_onednn() -> None:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this build of torch has no oneDNN")


def is_prepacked(module: nn.Module) -> bool:
    return "forward" in module.__dict__


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.lists(st.integers(1, 5), max_size=3), st.booleans(), st.booleans(),
    st.sampled_from(tuple(CLOSE)), st.integers(0, 99),
)  # fmt: skip
def test_products_are_those_of_the_module(
    inputs: int, outputs: int, shape: list[int], bias: bool, transposed: bool, dtype: torch.dtype, seed: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    module: Any = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias=bias)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws)
    module.to(dtype)
    x = torch.randn(*shape, inputs, generator=draws).to(dtype)
    with torch.inference_mode():
        expected = module(x)
        with Prepacked(module):
            assert is_prepacked(module) == prepacked_linear._works(dtype)
            found = module(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, **CLOSE[dtype])


@torch.inference_mode()
@pytest.mark.parametrize("change", ["data", "in place", "another parameter", "one number"])
def test_another_weight_gets_another_copy(change: str) -> None:
    with torch.inference_mode(False):
        module = nn.Linear(24, 40)
    x = torch.randn(3, 24)
    with Prepacked(module):
        module(x)
    with torch.inference_mode(False), torch.no_grad():
        if change == "data":
            module.weight.data.mul_(-1.0)  # the version of the parameter stays as it was
        elif change == "in place":
            module.weight.mul_(0.5)
        elif change == "another parameter":
            module.weight = nn.Parameter(torch.randn(40, 24))
        else:
            module.weight.data[7, 5] += 0.25
    with Prepacked(module):
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_gradients_and_many_rows_go_through_the_module_itself() -> None:
    module = nn.Linear(8, 8)
    x = torch.randn(2, 8, requires_grad=True)
    many = torch.randn(MAX_ROWS + 1, 8)
    with Prepacked(module):
        module(x).sum().backward()
        with torch.no_grad():
            assert torch.equal(module(many), nn.functional.linear(many, module.weight, module.bias))
    assert x.grad is not None
    assert module.weight.grad is not None


def test_what_is_left_alone() -> None:
    class Own(nn.Linear):
        pass

    changed = nn.Linear(4, 4)
    changed.forward = lambda x: x + 1  # type: ignore[method-assign]
    model = nn.ModuleList(
        [Own(4, 4), changed, nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta"), nn.Linear(4, 4)]
    )
    with Prepacked(model), torch.inference_mode():
        assert [is_prepacked(module) for module in model] == [False, True, False, False, True]
        assert torch.equal(changed(torch.zeros(4)), torch.ones(4))
        with Prepacked(model):
            pass
        assert not is_prepacked(model[-1])  # the weights themselves are right as well
    assert is_prepacked(changed)


def test_an_error_leaves_nothing_behind() -> None:
    module = nn.Linear(4, 4)
    with pytest.raises(RuntimeError), Prepacked(module), torch.inference_mode():
        module(torch.zeros(5))
    assert not is_prepacked(module)


def test_when_copies_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(64, 64)
    assert prepacked(model, False, 1000) is None
    assert prepacked(model, None, MIN_NEW_TOKENS - 1) is None
    assert prepacked(model, True, 1) is not None
    assert prepacked(model, None, MIN_NEW_TOKENS) is not None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * model.weight.nbytes - 1))
    assert prepacked(model, None, MIN_NEW_TOKENS) is None
    assert prepacked(model, True, MIN_NEW_TOKENS) is not None
    monkeypatch.undo()
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert prepacked(model, True, MIN_NEW_TOKENS) is None


@pytest.mark.parametrize(
    "operator", [lambda *given: given[0].sum(), lambda *given: torch.zeros(3, 5), lambda x: x, None]
)  # fmt: skip
def test_a_torch_without_the_operators_is_run_as_ever(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepacked_linear._works.cache_clear()
    found = SimpleNamespace(_reorder_linear_weight=lambda *given: given[0])
    if operator is not None:
        found._linear_pointwise = operator
    monkeypatch.setattr(torch.ops, "mkldnn", found)
    try:
        assert prepacked(nn.Linear(4, 4), True, MIN_NEW_TOKENS) is None
    finally:
        prepacked_linear._works.cache_clear()


def test_a_processor_that_cannot_compile_the_direct_product_is_served_without(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = pytest.importorskip("intaglio.kernels.dense_llvmlite")

    def fails(*given: Any) -> None:
        raise RuntimeError("no target machine")

    assert any(name.startswith("direct") for name in prepacked_linear._products(nn.Linear(4, 4)))
    monkeypatch.setattr(dense, "linear", fails)
    prepacked_linear._direct_works.cache_clear()
    try:
        assert not any(name.startswith("direct") for name in prepacked_linear._products(nn.Linear(4, 4)))
    finally:
        prepacked_linear._direct_works.cache_clear()


@pytest.mark.parametrize("family", DECODERS)
def test_a_whole_model_says_the_same(family: str) -> None:
    model: Any = tiny_model(family)
    ids = torch.tensor([[9, 30, 31, 32, 9, 30, 31, 32, 9, 30]])
    with torch.inference_mode():
        expected = model(ids).logits
        with Prepacked(model):
            found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    plain, quick = (Speculative(PromptLookup(), prepack=prepack) for prepack in (False, True))
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    rows = [model.generate(ids, custom_generate=loop, **options) for loop in (plain, quick)]
    assert torch.equal(*rows)
    assert not any(is_prepacked(module) for module in model.modules())
