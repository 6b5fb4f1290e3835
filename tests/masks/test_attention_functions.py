"""Attention functions of layers: what they receive, who keeps them, and who refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.masks import (
    Causal,
    MaskRequest,
    attention_functions,
    clear_visibility,
    set_attention,
    set_visibility,
)
from tests.families import tiny_model

IDS = torch.randint(8, 150, (2, 6), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


class Keeps:
    """Returns the values, and keeps the masks it was given."""

    def __init__(self, takes_request: bool = True) -> None:
        self.takes_request = takes_request
        self.masks: list[Any] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *base: str, **more: Any
    ) -> Any:
        self.masks.append((mask, *base))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


def documents(**inputs: Any) -> Tensor | None:
    """Return the documents that a function of the last layer reads in a pass."""
    model, function = tiny_model("llama", layers=2), Keeps()
    set_attention(model, {1: function})
    model(IDS, use_cache=False, **inputs)
    ((request, base),) = function.masks
    assert base == "sdpa"
    return request.documents(CPU)  # type: ignore[no-any-return]


def test_a_function_takes_the_request_or_the_built_mask() -> None:
    for takes, kind in ((True, MaskRequest), (False, Tensor)):
        model, function = tiny_model("llama", layers=2, attn_implementation="eager"), Keeps(takes)
        set_attention(model, {0: function})
        model(IDS)
        assert isinstance(function.masks[0][0], kind)
        assert len(function.masks[0]) == 1 + takes


def test_documents_are_padding_and_packed_rows() -> None:
    assert documents() is None
    assert documents(attention_mask=torch.ones(2, 6, dtype=torch.long)) is None
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    padded = documents(attention_mask=mask)
    assert padded is not None
    assert padded.tolist() == [[-1, -1, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1]]
    packed = documents(position_ids=torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]))
    assert packed is not None
    assert packed.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6]


def test_a_mask_that_sees_later_tokens_is_refused() -> None:
    arguments = {"batch_size": 1, "q_length": 3, "kv_length": 3, "allow_is_causal_skip": False}
    request = MaskRequest({**arguments, "mask_function": lambda b, h, q, kv: (kv <= q) | (q == 0)})
    with pytest.raises(IntaglioError, match="the model's own mask function cannot be combined"):
        request.documents(CPU)
    causal = {**arguments, "mask_function": lambda b, h, q, kv: (kv <= q) & (b == b)}
    assert MaskRequest(causal).documents(CPU) is None
    with pytest.raises(IntaglioError, match="the model's own mask function cannot be combined"):
        MaskRequest({**causal, "use_vmap": True}).documents(CPU)


def test_functions_stay_when_rules_go_and_go_when_they_are_replaced() -> None:
    model, function = tiny_model("llama", layers=2), Keeps()
    set_attention(model, {0: function, 1: torch.nn.Identity()})
    assert attention_functions(model) == {0: function, 1: model.model.layers[1].self_attn.intaglio_attention}
    set_attention(model, {0: function})
    set_visibility(model, {1: Causal()})
    clear_visibility(model)
    assert attention_functions(model) == {0: function}
    assert model.config._attn_implementation == "intaglio_sdpa"
    set_attention(model, {})
    clear_visibility(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IntaglioError, match="names the layer 5"):
        set_attention(model, {5: function})
