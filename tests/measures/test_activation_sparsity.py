"""How seldom units fire, by hand and in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.measures.activation_sparsity import activation_sparsity, chunk_sparsity, token_sparsity
from tests.trainer.helpers import checkpoint

PATTERN = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0]]]).bool()


def drawn(seed: int, share: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def test_the_worked_example() -> None:
    assert token_sparsity(PATTERN) == 0.5
    assert chunk_sparsity(PATTERN, 2) == 0.25
    assert chunk_sparsity(PATTERN, 1) == token_sparsity(PATTERN)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.floats(0, 1), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_bounds(seed: int, share: float, length: int) -> None:
    active = drawn(seed, share, 3, 12, 5)
    tls, cls = token_sparsity(active), chunk_sparsity(active, length)
    assert max(0.0, 1 - length * (1 - tls)) - 1e-9 <= cls <= tls + 1e-9
    if 12 % (2 * length) == 0:
        assert chunk_sparsity(active, 2 * length) <= cls + 1e-9


def test_padding_and_what_fills_no_chunk_count_nowhere() -> None:
    active, real = drawn(0, 0.5, 2, 7, 4), torch.ones(2, 7, dtype=torch.bool)
    real[1, 5:] = False
    assert chunk_sparsity(active, 3) == chunk_sparsity(active[:, :6], 3)
    spoilt = active.clone()
    spoilt[1, 5:] = True
    assert token_sparsity(spoilt, real) == token_sparsity(active, real)
    whole = torch.cat([active[0, :6].view(2, 3, 4), active[1:, :3]])
    assert chunk_sparsity(spoilt, 3, real) == pytest.approx(1 - float(whole.any(1).float().mean()))
    with pytest.raises(IntaglioError, match="chunk is 8 tokens, longer than the rows of 7"):
        chunk_sparsity(active, 8)


def test_a_model_without_such_units_has_none() -> None:
    ids: Any = torch.randint(8, 150, (2, 8))
    assert activation_sparsity(checkpoint(layers=1), Segments(ids)) is None
