"""What the loop leaves as it found it: modes, `requires_grad`, gradients, global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into the mode it was in.

    Args:
        model: may be switched between training and evaluation inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Put back the global generators of Python, NumPy and torch."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def preserve_grads(model: nn.Module) -> Iterator[None]:
    """Put back `requires_grad` of every parameter, and leave no gradients.

    Args:
        model: may be trained inside.
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, want in wanted:
            parameter.requires_grad_(want)
            parameter.grad = None
