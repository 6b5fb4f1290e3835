"""Context managers that restore modes, dropout, `requires_grad`, gradients and global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def preserve_grads(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of every parameter, and leave no gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every dropout probability to 0, those that attention modules keep as numbers too, and restore them."""
    changed = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and value
        and ("dropout" in name or (name == "p" and isinstance(module, _DropoutNd)))
    ]
    try:
        for module, name, _ in changed:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
