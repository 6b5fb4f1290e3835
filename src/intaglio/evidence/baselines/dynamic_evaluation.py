"""Dynamic evaluation (Krause et al., 2018): gradient steps on the weights while a text is read, window by window.

    W <- W - rate g / rms(g),    g = dL/dW, the gradient of a window's loss,    rms over each tensor

The window's loss is the loss before the update, and its keys and values stay cached as they were computed. Sources:
Krause et al., Dynamic Evaluation of Neural Sequence Models, ICML 2018, and Dynamic Evaluation of Transformer Language
Models, 2019. With `normalize` off the rule is plain SGD.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intaglio.methods.decoding.apply_pretrained.hidden_state_optimization import (
    EPS,
    OptimizedCache,
    check_rows,
    negative_log_likelihood,
    read,
)
from intaglio.trainer.preserve_state import preserve_grads, preserve_modes


def dynamic_evaluation(
    model: Any, ids_1T: Tensor, window: int, *, learning_rate: float, normalize: bool = True
) -> Tensor:
    """Return -log p of every token of a row but the first, in nats, [1, T-1]; the weights are restored afterwards."""
    check_rows(model, ids_1T)
    losses, cache = [], OptimizedCache()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    try:
        with preserve_modes(model), preserve_grads(model):
            model.eval()
            model.requires_grad_(True)
            for start in range(0, ids_1T.shape[1] - 1, window):
                inputs_1T = ids_1T[:, start : start + window][:, : ids_1T.shape[1] - 1 - start]
                earlier = cache.length
                logits_1TV, states = read(model, inputs_1T, cache)
                nll_1T = negative_log_likelihood(logits_1TV, ids_1T[:, start + 1 : start + 1 + inputs_1T.shape[1]])
                losses.append(nll_1T.detach())
                cache.append([x[..., earlier:, :] for x in states])
                if start + window < ids_1T.shape[1] - 1:
                    nll_1T.mean().backward()
                    _step(model, learning_rate, normalize)
    finally:
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(before[name])
    return torch.cat(losses, 1)


@torch.no_grad()
def _step(model: Any, learning_rate: float, normalize: bool) -> None:
    for parameter in model.parameters():
        gradient: Tensor = parameter.grad
        if normalize:
            gradient = gradient / (gradient.square().mean().sqrt() + EPS)
        parameter.sub_(gradient, alpha=learning_rate)
        parameter.grad = None
