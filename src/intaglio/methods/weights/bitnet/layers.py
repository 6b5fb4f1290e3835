"""Quantized linear layers.

`BitLinear` trains a float weight and multiplies with its codes; `PackedLinear` holds only codes. In evaluation both
give the same numbers.

Dimension letters: B any leading dimensions, O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.kernels import ternary
from intaglio.methods.weights.bitnet import packing
from intaglio.methods.weights.bitnet.quantization import (
    Norm,
    Quantization,
    activation_codes,
    activation_scale,
    normalize,
    stochastic_codes,
    straight_through,
    weight_codes,
    weight_scale,
)
from intaglio.modeling.replacement import ReplacedLinear


class QuantizedLinear(ReplacedLinear):
    """Base of both layers: the inner norm, the bias, and the rescaled product of codes.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        config: the quantization; a norm that it leaves open is a layer norm.
        device: of the parameters.
        dtype: of bias and norm.
    """

    slug = "bitnet"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: Quantization,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.config = config
        self.norm: Norm = config.norm or "layernorm"
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = nn.Parameter(torch.zeros(out_features, **options)) if bias else None
        learns = config.learnable_norm
        self.norm_weight = nn.Parameter(torch.ones(in_features, **options)) if learns else None
        shifts = learns and self.norm == "layernorm"
        self.norm_bias = nn.Parameter(torch.zeros(in_features, **options)) if shifts else None

    def _quantized(self, x_BI: Tensor, product: Callable[[Tensor], Tensor], scale_w: Tensor, strength: float) -> Tensor:
        """Return product(codes of x) / (s_w s_x) + bias [B, O], in the dtype of x."""
        dtype = x_BI.dtype
        if self.norm != "none":
            x_BI = normalize(x_BI, self.norm, self.norm_weight, self.norm_bias)
        if self.config.activation_bits is None:
            x_BI = x_BI.to(dtype)
            y_BO = product(x_BI) / scale_w.view(-1)
        else:
            scale_B1 = activation_scale(x_BI, self.config)
            scaled_BI = x_BI.float() * scale_B1
            with torch.no_grad():
                codes_BI = activation_codes(scaled_BI, self.config)
            y_BO = product(straight_through(scaled_BI, codes_BI, strength)) / (scale_w.view(-1) * scale_B1)
        if torch.is_autocast_enabled(x_BI.device.type):
            dtype = torch.get_autocast_dtype(x_BI.device.type)
        if self.bias is not None:
            y_BO = y_BO + self.bias
        return y_BO.to(dtype)

    def extra_repr(self) -> str:
        """Return sizes, bits and norm."""
        return f"{super().extra_repr()}, bits={self.config.bits:g}, norm={self.norm}"


class BitLinear(QuantizedLinear):
    """A linear layer with a float weight that multiplies with its codes.

        x' = norm(x);  s_x = top / max(measure|x'|, eps) a token;  x_q = clamp(round(x' s_x), lo, hi)
        s_w = max(|lo|, |hi|) / max(measure|W|, eps);  w_q = clamp(round(W s_w), lo, hi)
        y = x_q w_q^T / (s_w s_x) + bias

    Rounding passes gradients straight through; scales are constants to them. While it trains, q stands for
    z + strength (q - z); in evaluation strength is 1, and nothing is drawn. At strength 0 and without a norm it is
    `nn.Linear`.

    It is no subclass of `nn.Linear`, since what works on plain matrices (pruning, adapters) must not take it for one.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one. Default True.
        config: the quantization. Default: ternary by the median, 8-bit activations, a layer norm, as in the paper's
            package.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        strength: λ, 0 to 1. Default 1.
        uniform: draws u for the stochastic strategy, shaped like its argument. Default `torch.rand_like`.
        cache_scale: whether the scale is computed once until `reset_scale`; it takes a selection. Default False.

    Source: Nielsen and Schneider-Kamp, BitNet b1.58 Reloaded, DeLTA 2024, section 3; code schneiderkamplab/bitlinear,
    whose forward adds the bias before it divides by the scales, which scales the bias by token: not copied.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Quantization | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, config or Quantization(), device, dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.strength = 1.0
        self.uniform: Callable[[Tensor], Tensor] = torch.rand_like
        self.cache_scale = False
        self._scale: Tensor | None = None
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_parameters(cls, weight_OI: nn.Parameter, bias_O: nn.Parameter | None, config: Quantization) -> BitLinear:
        """Return a layer that holds these very parameters as its float weight and its bias (None: no bias)."""
        layer = cls(weight_OI.shape[1], weight_OI.shape[0], False, config, device="meta", dtype=weight_OI.dtype)
        for name in ("norm_weight", "norm_bias"):
            value = getattr(layer, name)
            if value is not None:
                filled = torch.full_like(value, float(name == "norm_weight"), device=weight_OI.device)
                setattr(layer, name, nn.Parameter(filled))
        layer.weight, layer.bias, layer.has_bias = weight_OI, bias_O, bias_O is not None
        return layer

    def scale(self) -> Tensor:
        """Return s_w, float32 [1] or [O, 1]."""
        if self._scale is not None:
            return self._scale
        with torch.no_grad():
            scale = weight_scale(self.weight, self.config)
        if self.cache_scale:
            self._scale = scale
        return scale

    def reset_scale(self) -> None:
        """Compute the scale anew: the weight has changed."""
        self._scale = None

    def scaled(self) -> Tensor:
        """Return the weight times its scale, float32 [O, I]."""
        return self.weight.float() * self.scale()

    def codes(self) -> Tensor:
        """Return the codes that it multiplies with in evaluation, as floats [O, I]."""
        with torch.no_grad():
            return weight_codes(self.scaled(), self.config)

    def dense(self) -> Tensor:
        """Return codes / s_w [O, I]; see the base."""
        return self.codes() / self.scale()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O]."""
        strength = self.strength if self.training else 1.0
        if strength == 0 and self.norm == "none":
            return F.linear(x_BI, self.weight, self.bias)
        scale = self.scale()
        scaled_OI = self.weight.float() * scale
        with torch.no_grad():
            if self.training and self.config.strategy == "stochastic":
                codes_OI = stochastic_codes(scaled_OI, self.uniform(scaled_OI))
            else:
                codes_OI = weight_codes(scaled_OI, self.config)
        weight_OI = straight_through(scaled_OI, codes_OI, strength)
        return self._quantized(x_BI, lambda x: F.linear(x, weight_OI.to(x.dtype)), scale, strength)


class PackedLinear(QuantizedLinear):
    """A trained `BitLinear` without its float weight: packed codes, their scale, bias and norm.

    Gradients pass to its input. See `QuantizedLinear` for the arguments.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: Quantization,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, config, device, dtype)
        size = (out_features, packing.row_bytes(in_features, *config.weight_range))
        packed = torch.zeros(size, dtype=torch.uint8, device=device)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        scale = torch.ones((out_features, 1) if config.per == "row" else 1, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @classmethod
    @torch.no_grad()
    def from_bit_linear(cls, source: BitLinear) -> PackedLinear:
        """Pack the codes of a layer; its bias and norm are taken as they are."""
        layer = cls(source.in_features, source.out_features, False, source.config, device="meta")
        packed = packing.pack(source.codes(), *source.config.weight_range)
        layer.weight_packed = nn.Parameter(packed, requires_grad=False)
        layer.weight_scale = nn.Parameter(source.scale().clone(), requires_grad=False)
        layer.bias, layer.norm_weight, layer.norm_bias = source.bias, source.norm_weight, source.norm_bias
        layer.has_bias = source.has_bias
        return layer

    @property
    def packed_weights(self) -> int:
        """Number of weights beyond the bytes stored; see the base."""
        return self.in_features * self.out_features - self.weight_packed.numel()

    def codes(self) -> Tensor:
        """Return the codes, as floats [O, I]."""
        return packing.unpack(self.weight_packed, self.in_features, *self.config.weight_range).float()

    def dense(self) -> Tensor:
        """Return codes / s_w [O, I]; see the base."""
        return self.codes() / self.weight_scale.float()

    def _kernel_applies(self, x_BI: Tensor) -> bool:
        """Return whether the kernel computes this: it passes no gradient, and scales activations by their maximum."""
        learns = torch.is_grad_enabled() and any(
            part is not None and part.requires_grad for part in (x_BI, self.bias, self.norm_weight, self.norm_bias)
        )
        by_max = self.config.activation_bits is None or self.config.activation_scale == "max"
        return self.config.weight_range == packing.TERNARY and by_max and not learns

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O]."""
        if self._kernel_applies(x_BI):
            normed_BI = x_BI if self.norm == "none" else normalize(x_BI, self.norm, self.norm_weight, self.norm_bias)
            y_BO = ternary.linear(
                normed_BI,
                self.weight_packed,
                self.weight_scale,
                self.bias,
                bits=self.config.activation_bits,
                peak=self.config.activation_top if self.config.activation_bits else None,
                eps=self.config.eps,
            )
            return y_BO.to(x_BI.dtype)
        limits = self.config.weight_range
        return self._quantized(
            x_BI, lambda x: packing.product(x, self.weight_packed, *limits), self.weight_scale.float(), 1.0
        )
