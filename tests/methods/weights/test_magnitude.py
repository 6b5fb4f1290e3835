"""Magnitude: one threshold a layer, or a share of each row."""

from __future__ import annotations

import copy

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.modeling.anatomy import anatomy
from tests.alive import alive
from tests.families import tiny_model

EXAMPLES = ({"sparsity": 0.5}, {"pattern": "2:4"})
ALIVE = {
    "sparsity": 0.25,
    "pattern": alive("1:4", sparsity=None, pattern="2:4"),
    "ignore": ["layers.0.*"],
    "per": "row",
}


def test_one_threshold_a_layer() -> None:
    dense = tiny_model("llama")
    carved = Magnitude(sparsity=0.3).apply(Checkpoint(copy.deepcopy(dense)))
    pairs = zip(anatomy(dense).all_linears(), anatomy(carved.model).all_linears(), strict=True)
    for (_, before), (_, after) in pairs:
        old, new = before.read(), after.read()
        pruned = new == 0
        assert int(pruned.sum()) == int(old.numel() * 0.3)
        assert old[pruned].abs().max() <= old[~pruned].abs().min()
        assert torch.equal(new[~pruned], old[~pruned])


def test_rows_have_equal_shares_when_asked() -> None:
    carved = Magnitude(sparsity=0.25, per="row").apply(Checkpoint(tiny_model("llama")))
    for _, linear in anatomy(carved.model).all_linears():
        zeros = (linear.read() == 0).sum(1)
        assert zeros.unique().tolist() == [linear.shape[1] // 4]


def test_embedding_head_and_norms_are_untouched() -> None:
    dense = tiny_model("llama")
    carved = Magnitude(sparsity=0.5).apply(Checkpoint(copy.deepcopy(dense))).model
    inside = {id(linear.module.weight) for _, linear in anatomy(dense).all_linears()}
    for (name, old), (_, new) in zip(dense.named_parameters(), carved.named_parameters(), strict=True):
        assert id(old) in inside or torch.equal(old, new), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_packed_weights_are_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama", layers=2)
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(IntaglioError, match=r"layers.1.mlp.up_proj stores its weight as (float8|int8).*was quantized"):
        Magnitude(sparsity=0.5).apply(Checkpoint(model))
