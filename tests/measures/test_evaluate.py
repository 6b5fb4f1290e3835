"""One side of a report."""

from __future__ import annotations

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.data.texts import load_texts
from intaglio.measures.evaluate import Evaluator
from intaglio.modeling.anatomy import anatomy
from tests.families import tiny_model, tiny_tokenizer


def test_zeros_are_counted_by_weight_and_not_by_layer() -> None:
    checkpoint = Checkpoint(tiny_model("llama"), tiny_tokenizer("llama"), "tiny")
    linears = dict(anatomy(checkpoint.model).all_linears())
    name = "layers.0.mlp.down_proj"
    with torch.no_grad():
        linears[name].module.weight.zero_()
    held_out = as_segments(checkpoint, load_texts(["the quick brown fox jumps over the lazy dog " * 40]), 2, 16, 0)
    found = Evaluator(checkpoint, held_out, timed=False).measure(checkpoint)
    sizes = {one: linear.shape[0] * linear.shape[1] for one, linear in linears.items()}
    assert found["zero_fraction"] == {one: float(one == name) for one in sizes}
    assert found["zeros"] == pytest.approx(sizes[name] / sum(sizes.values()), abs=1e-12)
    assert found["zeros"] != pytest.approx(1 / len(sizes), rel=0.01)
