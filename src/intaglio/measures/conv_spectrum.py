"""Spectra of a model's layers: singular values of convolutions by FFT and of linear layers, and their L_orth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.convolutions import CONVOLUTIONS, Kernel, gram_distance

QUANTILES = 40
"""Points of a layer's curve of singular values."""


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of a layer.

    Args:
        name: of the layer.
        kind: `convolution` or `linear`.
        shape: of the weight.
        stride: of a convolution, empty for a linear layer.
        size: input side that the values are for; None for a linear layer.
        loss: L_orth of a convolution; ||W W^T - I||_F^2 or ||W^T W - I||_F^2, the smaller Gram matrix, of a linear
            layer. 0 where every singular value is 1.
        minimum, median, maximum: of the singular values.
        band: interval that holds the singular values at every input size, sqrt(1 - e) to sqrt(1 + e) with e^2 = alpha
            L_orth (or e^2 = loss of a linear layer).
        curve: singular values at equal steps of rank, in descending order.
        exact: whether the layer pads circularly or not at all, so that the values are its own; otherwise they leave out
            the borders.
        possible: whether an orthogonal layer of this shape exists.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    size: int | None
    loss: float
    minimum: float
    median: float
    maximum: float
    band: tuple[float, float]
    curve: tuple[float, ...]
    exact: bool = True
    possible: bool = True

    @property
    def spread(self) -> float:
        """Difference of the largest and the smallest singular value."""
        return self.maximum - self.minimum

    def document(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "spread": self.spread}


@torch.no_grad()
def layer_spectra(model: nn.Module, size: int, progress: Progress = no_progress) -> list[LayerSpectrum]:
    """Return the spectra of all convolutions and linear layers of a model.

    Args:
        model: any module.
        size: side of each convolution's input in pixels (or positions), rounded up to a multiple of its stride.
        progress: called after each layer.

    Raises:
        IntaglioError: there is no such layer, or a weight is not finite.
    """
    kinds = (*CONVOLUTIONS, nn.Linear, Conv1D)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    if not layers:
        raise IntaglioError(f"{type(model).__name__} has neither convolutions nor linear layers")
    spectra = []
    for number, (name, module) in enumerate(layers, start=1):
        spectra.append(layer_spectrum(name, module, size))
        progress(number, len(layers), "singular values")
    return spectra


@torch.no_grad()
def layer_spectrum(name: str, module: Any, size: int) -> LayerSpectrum:
    """Return the spectrum of a convolution or linear layer; see `layer_spectra`."""
    if not bool(torch.isfinite(module.weight).all()):
        raise IntaglioError(f"the weight of {name} holds values that are not finite")
    return _convolution(name, module, size) if isinstance(module, CONVOLUTIONS) else _linear(name, module)


def _convolution(name: str, module: nn.Module, size: int) -> LayerSpectrum:
    kernel = Kernel.from_module(module)
    own = Kernel(kernel.groups_GMCk.double(), kernel.stride)
    fitting, loss = kernel.fitting_size(size), max(0.0, float(own.orthogonality_loss()))
    values, error = own.singular_values(fitting), math.sqrt(own.spectral_bound() * loss)
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    about = (kernel.exact, kernel.can_be_orthogonal)
    return LayerSpectrum(name, "convolution", shape, kernel.stride, fitting, loss, *_summary(values, error), *about)


def _linear(name: str, module: Any) -> LayerSpectrum:
    matrix = module.weight.double()
    loss = float(gram_distance(matrix))
    values = torch.linalg.svdvals(matrix)
    return LayerSpectrum(name, "linear", tuple(matrix.shape), (), None, loss, *_summary(values, math.sqrt(loss)))


def _summary(values: Tensor, error: float) -> tuple[float, float, float, tuple[float, float], tuple[float, ...]]:
    """Return minimum, median, maximum, band and curve of descending singular values."""
    ranks = torch.linspace(0, len(values) - 1, min(QUANTILES, len(values))).round().long()
    band = (math.sqrt(max(0.0, 1 - error)), math.sqrt(1 + error))
    curve = tuple(values[ranks].tolist())
    return float(values[-1]), float(values[len(values) // 2]), float(values[0]), band, curve


def spread(spectra: Sequence[LayerSpectrum]) -> float:
    """Return the mean over layers of the difference of the largest and the smallest singular value."""
    return math.fsum(layer.spread for layer in spectra) / len(spectra)
