"""Convolutions as matrices: autocorrelation of a kernel, distance from orthogonality, singular values by FFT.

A convolution with kernel K, stride S and circular padding is a matrix of M N^2 rows and C (S N)^2 columns for a square
input of side S N. Both orthogonality and singular values follow from the kernel alone.

Dimension letters: G groups, M output channels and C input channels of a group, k kernel sides (`...k`: 1 to 3 of them),
F output frequencies, A input frequencies that alias to one output frequency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.errors import IntaglioError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose kernels are read here; transposed convolutions are not among them."""
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Kernel:
    """The kernel of a convolution, one group at a time.

    Args:
        groups_GMCk: weights [G, M, C, k...]; those of a dilated layer have zeros between the taps.
        stride: of each spatial dimension.
        exact: whether the layer's matrix is the one described above: it pads circularly, or needs no padding. Otherwise
            borders differ. Default True.
    """

    groups_GMCk: Tensor
    stride: tuple[int, ...]
    exact: bool = True

    @classmethod
    def from_module(cls, module: nn.Module) -> Kernel:
        """Return the kernel of a convolution layer; gradients flow to its weight."""
        assert isinstance(module, CONVOLUTIONS)
        weight_MCk = module.weight
        for dimension, step in enumerate(module.dilation, start=2):
            weight_MCk = _dilated(weight_MCk, dimension, step)
        groups_GMCk = weight_MCk.unflatten(0, (module.groups, -1))
        stride, sides = tuple(module.stride), groups_GMCk.shape[3:]
        if isinstance(module.padding, str):
            padded = [side - 1 if module.padding == "same" else 0 for side in sides]
        else:
            padded = [2 * pad for pad in module.padding]
        covered = all(k - step <= pad < k for k, step, pad in zip(sides, stride, padded, strict=True))
        return cls(groups_GMCk, stride, covered and (module.padding_mode == "circular" or not any(padded)))

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides k of the kernel, dilation included."""
        return tuple(self.groups_GMCk.shape[3:])

    @property
    def rows(self) -> int:
        """Output channels M of a group."""
        return int(self.groups_GMCk.shape[1])

    @property
    def columns(self) -> int:
        """Inputs C S^2 of a group that one output position stands for."""
        return int(self.groups_GMCk.shape[2]) * math.prod(self.stride)

    @property
    def reach(self) -> tuple[int, ...]:
        """Padding P = floor((k - 1) / S) S of the autocorrelation."""
        return tuple((side - 1) // step * step for side, step in zip(self.sides, self.stride, strict=True))

    @property
    def can_be_orthogonal(self) -> bool:
        """Whether an orthogonal convolution of this shape exists with circular padding: M <= C k^2, or S <= k."""
        taps = int(self.groups_GMCk.shape[2]) * math.prod(self.sides)
        if self.rows <= self.columns:
            return self.rows <= taps
        return all(step <= side for step, side in zip(self.stride, self.sides, strict=True))

    def autocorrelation(self, padding: int | None = None) -> Tensor:
        """Return A, the filters convolved with each other at the shifts that the stride takes.

        Args:
            padding: zero padding P of each dimension. Default: `reach`, which covers every shift at which filters
                overlap.

        Returns:
            Float [G, M, M, 2 P / S + 1, ...]; the centre is the Gram matrix of the filters.
        """
        pads = self.reach if padding is None else (padding,) * len(self.sides)
        convolve = _CONVOLVE[len(self.sides)]
        return torch.stack([convolve(own, own, stride=self.stride, padding=pads) for own in self.groups_GMCk])

    def orthogonality_loss(self, padding: int | None = None) -> Tensor:
        """Return L_orth, the sum over groups of ||A - I0||_F^2, less M - C S^2 where that is positive.

        I0 is zero but for an identity of size M at the centre. With circular padding and an input of side S N of at
        least 2 k - 1, N^2 L_orth = ||K K^T - I||_F^2 where M <= C S^2 and ||K^T K - I||_F^2 where M >= C S^2, K the
        matrix of the convolution.

        Args:
            padding: see `autocorrelation`. Where it is given, nothing is subtracted, as in Wang et al.'s code: shifts
                may be missing, and the difference could be negative.
        """
        shifts_GMMk = self.autocorrelation(padding)
        identity = torch.eye(self.rows, dtype=shifts_GMMk.dtype, device=shifts_GMMk.device)
        # Shift 0, unless a padding that the stride does not divide leaves it out: then the place of Wang et al.'s code.
        central_GMM = shifts_GMMk[(slice(None),) * 3 + tuple(count // 2 for count in shifts_GMMk.shape[3:])]
        # ||A - I0||^2 = ||A||^2 - ||centre||^2 + ||centre - I||^2, without writing into A.
        around = shifts_GMMk.square().sum() - central_GMM.square().sum()
        excess = 0 if padding is not None else len(self.groups_GMCk) * max(0, self.rows - self.columns)
        return around + (central_GMM - identity).square().sum() - excess

    def spectral_bound(self) -> float:
        """Return alpha of ||K K^T - I||_2^2 <= alpha L_orth (or K^T K), which holds for every input size.

        alpha is M (2 P / S + 1)^2 where M <= C S^2, and C (2 k - 1)^2 otherwise.
        """
        if self.rows <= self.columns:
            shifts = (2 * pad // step + 1 for pad, step in zip(self.reach, self.stride, strict=True))
            return float(self.rows * math.prod(shifts))
        return float(self.groups_GMCk.shape[2] * math.prod(2 * side - 1 for side in self.sides))

    @torch.no_grad()
    def singular_values(self, size: int) -> Tensor:
        """Return all singular values of the convolution's matrix for circular padding, by FFT.

        At an output frequency the matrix is M x C S^2: the transforms of the kernel at the S^2 input frequencies that
        alias to it, divided by S.

        Args:
            size: side of the input in pixels; a multiple of the strides, and at least the kernel's sides.

        Returns:
            Float64, in descending order, G F min(M, C S^2) of them.

        Raises:
            IntaglioError: the size does not fit.
        """
        for side, step in zip(self.sides, self.stride, strict=True):
            if size < side or size % step:
                raise IntaglioError(
                    f"size is {size}; a multiple of the stride {step} from the kernel's side {side} on is accepted"
                )
        spatial = tuple(range(3, 3 + len(self.sides)))
        spectrum_GMC = torch.fft.fftn(self.groups_GMCk.detach().double(), s=(size,) * len(spatial), dim=spatial)
        for step in self.stride:  # folds the first spatial dimension into aliases and frequencies, at the end
            aliases_GMC = spectrum_GMC.unflatten(3, (step, size // step)).movedim(3, -1)
            spectrum_GMC = aliases_GMC.movedim(3, -1)
        # [G, M, C, A, F, A, F, ...] to [G, F..., M, C A...]
        sides = len(self.stride)
        aliases, frequencies = range(3, 3 + 2 * sides, 2), range(4, 4 + 2 * sides, 2)
        folded = spectrum_GMC.permute(0, *frequencies, 1, 2, *aliases).flatten(3 + sides - 1)
        matrices = folded.flatten(1, sides) / math.sqrt(math.prod(self.stride))
        return torch.linalg.svdvals(matrices).flatten().sort(descending=True).values

    def fitting_size(self, size: int) -> int:
        """Return the least input side from `size` on that the strides divide and the kernel fits into."""
        step = math.lcm(*self.stride)
        return -(-max(size, *self.sides) // step) * step


def _dilated(weight_MCk: Tensor, dimension: int, step: int) -> Tensor:
    """Insert `step` - 1 zeros between the taps of a dimension."""
    if step == 1:
        return weight_MCk
    taps = weight_MCk.unsqueeze(dimension + 1)
    zeros = taps.new_zeros(taps.shape).repeat_interleave(step - 1, dimension + 1)
    spread = torch.cat([taps, zeros], dimension + 1).flatten(dimension, dimension + 1)
    return spread.narrow(dimension, 0, step * (weight_MCk.shape[dimension] - 1) + 1)


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the convolution layers of a model by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS))


def gram_distance(matrix: Tensor) -> Tensor:
    """Return ||W W^T - I||_F^2 of a matrix that is no taller than wide, ||W^T W - I||_F^2 of a taller one."""
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()
