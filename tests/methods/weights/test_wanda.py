"""Wanda: |W| times the input's norm, row by row."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.checkpoint import Checkpoint
from intaglio.methods.weights.sparsity_target import prune_mask
from intaglio.methods.weights.wanda import Wanda, wanda_score
from intaglio.modeling.anatomy import anatomy
from tests.alive import alive
from tests.families import tiny_model

EXAMPLES = ({"sparsity": 0.5}, {"pattern": "2:4"})
ALIVE = {
    "sparsity": 0.25,
    "pattern": alive("1:4", sparsity=None, pattern="2:4"),
    "ignore": ["layers.0.*"],
}


@given(st.integers(0, 10_000), st.floats(0.1, 10.0), st.integers(0, 15))
def test_scaling_an_input_and_its_weights_leaves_the_mask(seed: int, factor: float, index: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_RI = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    x_NI = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    before = prune_mask(wanda_score(weight_RI, x_NI.square().sum(0).float()), 0.5)
    weight_RI[:, index] /= factor
    x_NI[:, index] *= factor
    after = prune_mask(wanda_score(weight_RI, x_NI.square().sum(0).float()), 0.5)
    assert torch.equal(before, after)


def test_magnitudes_mask_does_change_under_that_scaling() -> None:
    weight_RI = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    scaled = weight_RI.clone()
    scaled[:, 3] /= 100
    assert not torch.equal(prune_mask(weight_RI.abs(), 0.5), prune_mask(scaled.abs(), 0.5))


def test_a_model_is_pruned_on_the_outputs_of_pruned_blocks() -> None:
    """Against the plain algorithm: the whole model is run with hooks on one block, block after block."""
    ids = torch.randint(8, 150, (6, 16), generator=torch.Generator().manual_seed(1))
    model = tiny_model("llama")
    carved = Wanda(sparsity=0.5).apply(Checkpoint(copy.deepcopy(model)), ids, batch_size=2).model
    for block in anatomy(model).blocks:
        square: dict[torch.nn.Module, torch.Tensor] = {}

        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], square: dict = square) -> None:
            square[module] = square.get(module, 0) + args[0].double().square().sum((0, 1)) / len(ids)

        modules = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        handles = [module.register_forward_pre_hook(add) for module in modules]
        with torch.no_grad():
            for row in ids.split(2):
                model(row)
            for handle in handles:
                handle.remove()
            for module in modules:
                score = module.weight.abs() * square[module].float().sqrt()
                order = score.sort(dim=1, stable=True).indices[:, : score.shape[1] // 2]
                module.weight.scatter_(1, order, 0.0)
    for (name, expected), (_, found) in zip(model.named_parameters(), carved.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
