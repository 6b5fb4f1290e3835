"""What the experts of a model do on some text: their loads, how many units fire and how many were expected to, and
which never do.

The router rewards experts whose units rarely fire, and nothing is sparser than an expert that is dead.

Dimension letters: B batch, L sequence, T tokens, E experts, K chosen experts of a token, F units of an expert.
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
from intaglio.methods.activations.moe_x.layer import MoELayer, moe_layers
from intaglio.methods.activations.moe_x.routing import entropy, fires, loads, sparsity_scores
from intaglio.modeling.anatomy import anatomy, final_hidden

SAMPLES, LENGTH = 64, 256


class _Seen:
    """Sums over the passes of one layer."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer, self.tokens = layer, 0
        self.chosen_E = torch.zeros(layer.form.experts, dtype=torch.float64)
        self.fired_EF = torch.zeros(layer.form.experts, layer.form.units, dtype=torch.float64)
        self.expected = 0.0

    def add(self, x_TD: Tensor) -> None:
        """Take in what the last pass left behind.

        Args:
            x_TD: what entered.
        """
        routed = self.layer.routed
        assert routed is not None  # the layer is watched
        experts, units = self.fired_EF.shape
        self.tokens += len(x_TD)
        self.chosen_E += loads(routed.chosen_TK, experts).double().cpu() * routed.chosen_TK.numel()
        self.fired_EF += routed.fired_EF.double().cpu()
        share_TE = fires(sparsity_scores(x_TD, self.layer.moments()))
        self.expected += units * float(share_TE.gather(1, routed.chosen_TK).double().sum())

    def told(self) -> dict[str, Any]:
        """As plain data; see `monitor`."""
        share_E = self.chosen_E / self.chosen_E.sum()
        return {
            "load": share_E.tolist(),
            "load_entropy": entropy(share_E),
            "l0": float(self.fired_EF.sum()) / self.tokens,
            "expected_l0": self.expected / self.tokens,
            "dead_units": float((self.fired_EF == 0).double().mean()),
        }


@torch.no_grad()
def monitor(checkpoint: Checkpoint, data: Any, *, batch_size: int = 4, seed: int = 0) -> dict[str, dict[str, Any]]:
    """What each layer of experts does on some data.

    Args:
        checkpoint: has experts.
        data: segments, token ids [N, L], texts, a bundled name, a file or a folder; 64 segments of 256 tokens are cut
            out of texts.
        batch_size: sequences that pass at a time. Default 4.
        seed: which documents are taken. Default 0.

    Returns:
        By the name of the layer: `load`, each expert's share of the choices; `load_entropy`, from 0 (one expert gets
        all) to 1 (all alike); `l0`, the units that fire for a token in its chosen experts (whose pre-activation is
        above 0); `expected_l0`, what the moments of the encoders say of that; `dead_units`, the share of all units that
        fired for no token.

    Raises:
        IntaglioError: the model has no experts, or the data do not fit.
    """
    layers = moe_layers(checkpoint.model)
    if not layers:
        raise IntaglioError(f"{checkpoint.source or 'the model'} has no experts of moe_x")
    segments = as_segments(checkpoint, data, SAMPLES, LENGTH, seed)
    found = {name: _Seen(layer) for name, layer in layers.items()}
    parts, was = anatomy(checkpoint.model), checkpoint.model.training
    checkpoint.model.eval()
    with _watched(found):
        for batch in segments.batches(batch_size):
            final_hidden(parts, batch)
    checkpoint.model.train(was)
    return {name: one.told() for name, one in found.items()}


@contextmanager
def _watched(found: dict[str, _Seen]) -> Iterator[None]:
    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name].add(args[0].reshape(-1, args[0].shape[-1]))

        return hook

    handles = [one.layer.register_forward_hook(after(name)) for name, one in found.items()]
    for one in found.values():
        one.layer.watched = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one in found.values():
            one.layer.watched, one.layer.routed = False, None


__all__ = ["monitor"]
