"""Integer codes for weights and activations: ranges from bits, scales, rounding, and straight-through gradients.

    range   b bits: lo = ceil(-2^(b-1)), hi = ceil(2^(b-1) - 1); 1.58 bits: -1 to 1, 8 bits: -128 to 127
    scale   s = max(|lo|, |hi|) / max(measure(|z|), eps)
    code    q = clamp(round(z s), lo, hi)
    value   q / s

Scales are computed in float32 and are constants to the gradient.

Dimension letters: B any leading dimensions, O output features, I input features.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from intaglio.methods.weights.topk import kth_smallest

Measure = Literal["median", "mean", "max"]
Norm = Literal["none", "layernorm", "rmsnorm"]
LAYERNORM_EPS = 1e-5
RMSNORM_EPS = 1e-6


def integer_range(bits: float) -> tuple[int, int]:
    """Return the smallest and the largest code of a number of bits above 1; 1.58 (log2 of 3) gives -1, 0 and 1."""
    return math.ceil(-(2 ** (bits - 1))), math.ceil(2 ** (bits - 1) - 1)


class Quantization(BaseModel):
    """Quantization of one projection; the fields are those of `BitNet`, which describes them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    bits: Annotated[float, Field(gt=1, le=8, description="of a weight; 1.58 (default) is ternary")] = 1.58
    scale: Measure | None = None
    per: Literal["tensor", "row"] = "tensor"
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = 8
    activation_scale: Measure = "max"
    activation_range: Literal[128, 127] = 128
    norm: Norm | None = None
    learnable_norm: bool = False
    strategy: Literal["deterministic", "stochastic"] = "deterministic"
    eps: Annotated[float, Field(gt=0, le=0.1)] = 1e-5

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.strategy == "stochastic" and self.weight_range != (-1, 1):
            raise ValueError(
                f"strategy is 'stochastic' with bits: {self.bits:g}; it is for ternary weights, bits: 1.58"
            )
        if self.learnable_norm and self.norm in (None, "none"):
            raise ValueError("learnable_norm needs a norm: layernorm or rmsnorm")
        return self

    @property
    def weight_range(self) -> tuple[int, int]:
        """The smallest and the largest code of a weight."""
        return integer_range(self.bits)

    @property
    def weight_measure(self) -> Measure:
        """The statistic of |W| that sets the scale."""
        return self.scale or ("median" if self.weight_range == (-1, 1) else "max")

    @property
    def activation_codes(self) -> tuple[int, int]:
        """The smallest and the largest code of an activation."""
        return integer_range(self.activation_bits or 8)

    @property
    def activation_top(self) -> int:
        """The code of an activation as large as the measure; a positive one is then clamped."""
        lo, hi = self.activation_codes
        return -lo if self.activation_range == 128 else hi

    def fields(self) -> dict[str, Any]:
        """Return the fields of this class alone, as plain data."""
        return {name: getattr(self, name) for name in Quantization.model_fields}


def magnitude(x: Tensor, measure: Measure, per_row: bool) -> Tensor:
    """Return a statistic of |x|, float32 [1], or [..., 1] over the last dimension (`per_row`), without a gradient.

    The median is the lower of two middle values, as torch has it.
    """
    size = x.detach().float().abs()
    if not per_row:
        size = size.flatten()
    if measure == "max":
        return size.amax(-1, keepdim=True)
    if measure == "mean":
        return size.mean(-1, keepdim=True)
    return size.median(-1, keepdim=True).values if per_row else kth_smallest(size, (len(size) + 1) // 2).view(1)


def weight_scale(weight_OI: Tensor, config: Quantization) -> Tensor:
    """Return the scale s of a float weight: float32 [1], or [O, 1] for `per: row`."""
    lo, hi = config.weight_range
    return max(-lo, hi) / magnitude(weight_OI, config.weight_measure, config.per == "row").clamp(min=config.eps)


def weight_codes(scaled_OI: Tensor, config: Quantization) -> Tensor:
    """Return the nearest codes of a weight times its scale, as floats."""
    return scaled_OI.round().clamp(*config.weight_range)


def stochastic_codes(scaled_OI: Tensor, uniform_OI: Tensor) -> Tensor:
    """Return sign(z) where |z| >= u, else 0, for a weight times its scale z and u drawn from 0 to 1."""
    return scaled_OI.sign() * (scaled_OI.abs() >= uniform_OI)


def activation_scale(x_BI: Tensor, config: Quantization) -> Tensor:
    """Return the scale of each token's (normalised) activations, float32 [B, 1]."""
    return config.activation_top / magnitude(x_BI, config.activation_scale, True).clamp(min=config.eps)


def activation_codes(scaled_BI: Tensor, config: Quantization) -> Tensor:
    """Return the nearest codes of activations times their scale, as floats."""
    return scaled_BI.round().clamp(*config.activation_codes)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(z: Tensor, codes: Tensor, strength: float = 1.0) -> Tensor:
    """Return z + strength (q - z), exactly the codes q at strength 1 (λ, 0 to 1); the gradient is that of z."""
    value = codes if strength == 1 else torch.lerp(z.detach(), codes.detach(), strength)
    output: Tensor = _StraightThrough.apply(z, value.detach())
    return output


def normalize(x_BI: Tensor, norm: Norm, weight_I: Tensor | None, bias_I: Tensor | None) -> Tensor:
    """Return the activations after the inner norm, in float32; weight and bias are those of a learnable norm."""
    x_BI = x_BI.float()
    shape = x_BI.shape[-1:]
    weight_I = None if weight_I is None else weight_I.float()
    if norm == "layernorm":
        bias_I = None if bias_I is None else bias_I.float()
        return torch.nn.functional.layer_norm(x_BI, shape, weight_I, bias_I, LAYERNORM_EPS)
    if norm == "rmsnorm":
        return torch.nn.functional.rms_norm(x_BI, shape, weight_I, RMSNORM_EPS)
    return x_BI
