"""Expert statistics on some text: loads, units that fire and were expected to, and units that never do.

The router rewards experts whose units rarely fire, and nothing is sparser than a dead expert.

Dimension letters: T tokens, E experts, K chosen experts of a token, F units of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.errors import IntaglioError
from intaglio.methods.activations.moe_x.layers import MoELayer, moe_layers
from intaglio.methods.activations.moe_x.routing import entropy, firing_probability, loads, sparsity_scores
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden

SAMPLES, LENGTH = 64, 256


class _LayerTotals:
    """Totals over the passes of one layer; its forward hook."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer, self.tokens, self.expected = layer, 0, 0.0
        self.chosen_E = torch.zeros(layer.config.experts, dtype=torch.float64)
        self.fired_EF = torch.zeros(layer.config.experts, layer.config.units, dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        routed = self.layer.routed
        assert routed is not None  # the layer is watched
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        experts, units = self.fired_EF.shape
        self.tokens += len(x_TD)
        self.chosen_E += loads(routed.chosen_TK, experts).double().cpu() * routed.chosen_TK.numel()
        self.fired_EF += routed.fired_EF.double().cpu()
        probs_TE = firing_probability(sparsity_scores(x_TD, self.layer.moments()))
        self.expected += units * float(probs_TE.gather(1, routed.chosen_TK).double().sum())

    def summary(self) -> dict[str, Any]:
        """Return plain data; see `expert_statistics`."""
        share_E = self.chosen_E / self.chosen_E.sum()
        return {
            "load": share_E.tolist(),
            "load_entropy": entropy(share_E),
            "l0": float(self.fired_EF.sum()) / self.tokens,
            "expected_l0": self.expected / self.tokens,
            "dead_units": float((self.fired_EF == 0).double().mean()),
        }


@torch.no_grad()
def expert_statistics(
    checkpoint: Checkpoint, data: Any, *, batch_size: int = 4, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return statistics of each layer of experts on some data.

    Args:
        checkpoint: has experts.
        data: segments, token ids [N, L], texts, a bundled name, a file or a folder; 64 segments of 256 tokens are cut
            out of texts.
        batch_size: sequences of a pass. Default 4.
        seed: chooses the documents. Default 0.

    Returns:
        By the name of the layer: `load`, each expert's share of the choices; `load_entropy`, from 0 (one expert gets
        all) to 1 (all alike); `l0`, the units that fire for a token in its chosen experts (whose pre-activation is
        above 0); `expected_l0`, the same as expected from the moments of the encoders; `dead_units`, the share of all
        units that fired for no token.

    Raises:
        IntaglioError: the model has no experts, or the data do not fit.
    """
    layers = moe_layers(checkpoint.model)
    if not layers:
        raise IntaglioError(f"{checkpoint.source or 'the model'} has no experts of moe_x")
    segments = as_segments(checkpoint, data, SAMPLES, LENGTH, seed)
    totals = {name: _LayerTotals(layer) for name, layer in layers.items()}
    parts, was_training = anatomy(checkpoint.model), checkpoint.model.training
    checkpoint.model.eval()
    with _watched(totals):
        for batch in segments.batches(batch_size):
            final_hidden(parts, batch)
    checkpoint.model.train(was_training)
    return {name: layer.summary() for name, layer in totals.items()}


@contextmanager
def _watched(totals: dict[str, _LayerTotals]) -> Iterator[None]:
    handles = [total.layer.register_forward_hook(total) for total in totals.values()]
    for total in totals.values():
        total.layer.watched = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for total in totals.values():
            total.layer.watched, total.layer.routed = False, None
