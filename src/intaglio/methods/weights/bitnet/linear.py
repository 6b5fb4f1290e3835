"""The two modules: `BitLinear`, which trains a float weight and multiplies with its codes, and `PackedLinear`, which
has the codes alone. In evaluation both give the same numbers.

Dimension letters: B any leading dimensions, O output features, I input features, P bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.kernels import ternary
from intaglio.methods.weights.bitnet import codes as bits
from intaglio.methods.weights.bitnet.quantization import (
    Norm,
    Quantization,
    activation_codes,
    activation_scale,
    drawn_codes,
    normed,
    straight_through,
    weight_codes,
    weight_scale,
)
from intaglio.modeling.replacement import FusedLinears, ReplacedLinear, replace_modules
from intaglio.modeling.targets import matches, select_layers

SLUG = "bitnet"


class Quantized(ReplacedLinear):
    """What both modules share: the inner norm, the bias, and the product of codes put back to scale.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        how: the quantization; a norm that it leaves open is a layer norm.
    """

    slug = SLUG

    def __init__(
        self, in_features: int, out_features: int, bias: bool, how: Quantization, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features)
        self.how = how
        self.norm: Norm = how.norm or "layernorm"
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = nn.Parameter(torch.zeros(out_features, **make)) if bias else None
        learns = how.learnable_norm
        self.norm_weight = nn.Parameter(torch.ones(in_features, **make)) if learns else None
        shifts = learns and self.norm == "layernorm"
        self.norm_bias = nn.Parameter(torch.zeros(in_features, **make)) if shifts else None

    def _through(self, x_BI: Tensor, product: Callable[[Tensor], Tensor], scale_w: Tensor, strength: float) -> Tensor:
        """y = product(codes of x) / (s_w s_x) + bias, [B, O], in the dtype of x."""
        dtype = x_BI.dtype
        if self.norm != "none":
            x_BI = normed(x_BI, self.norm, self.norm_weight, self.norm_bias)
        if self.how.activation_bits is None:
            x_BI = x_BI.to(dtype)
            y_BO = product(x_BI) / scale_w.view(-1)
        else:
            scale_B1 = activation_scale(x_BI, self.how)
            scaled_BI = x_BI.float() * scale_B1
            with torch.no_grad():
                codes_BI = activation_codes(scaled_BI, self.how)
            y_BO = product(straight_through(scaled_BI, codes_BI, strength)) / (scale_w.view(-1) * scale_B1)
        if torch.is_autocast_enabled(x_BI.device.type):
            dtype = torch.get_autocast_dtype(x_BI.device.type)
        if self.bias is not None:
            y_BO = y_BO + self.bias
        return y_BO.to(dtype)

    def extra_repr(self) -> str:
        """As `nn.Linear` says it, and the bits."""
        return f"{super().extra_repr()}, bits={self.how.bits:g}, norm={self.norm}"


class BitLinear(Quantized):
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
        how: the quantization. Default: ternary by the median, 8-bit activations, a layer norm, as in the paper's
            package.
        device: of the parameters.
        dtype: of the parameters.

    Source: Nielsen and Schneider-Kamp, BitNet b1.58 Reloaded, DeLTA 2024, section 3; code schneiderkamplab/bitlinear,
    whose forward adds the bias before it divides by the scales, which scales the bias by token: not copied.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        how: Quantization | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, how or Quantization(), device, dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.strength = 1.0
        self.uniform: Callable[[Tensor], Tensor] = torch.rand_like
        """Draws u for the stochastic strategy, shaped as the weight."""
        self.remember = False
        """Whether the measure of the weight is taken once until `forget`: it is sorted for."""
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
    def of(cls, weight_OI: nn.Parameter, bias_O: nn.Parameter | None, how: Quantization) -> BitLinear:
        """A layer with these very parameters.

        Args:
            weight_OI: becomes the float weight.
            bias_O: becomes the bias; None: there is none.
            how: the quantization.
        """
        made = cls(weight_OI.shape[1], weight_OI.shape[0], False, how, device="meta", dtype=weight_OI.dtype)
        for name in ("norm_weight", "norm_bias"):
            value = getattr(made, name)
            if value is not None:
                filled = torch.full_like(value, float(name == "norm_weight"), device=weight_OI.device)
                setattr(made, name, nn.Parameter(filled))
        made.weight, made.bias = weight_OI, bias_O
        return made

    def scale(self) -> Tensor:
        """s_w, float32 [1] or [O, 1]."""
        if self._scale is not None:
            return self._scale
        with torch.no_grad():
            found = weight_scale(self.weight, self.how)
        if self.remember:
            self._scale = found
        return found

    def forget(self) -> None:
        """The weight has changed: measure it anew."""
        self._scale = None

    def scaled(self) -> Tensor:
        """The weight times its scale, float32 [O, I]."""
        return self.weight.float() * self.scale()

    def codes(self) -> Tensor:
        """The codes that it multiplies with in evaluation, as floats [O, I]."""
        with torch.no_grad():
            return weight_codes(self.scaled(), self.how)

    def dense(self) -> Tensor:
        """See the base."""
        return self.codes() / self.scale()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O].

        Args:
            x_BI: the input.
        """
        strength = self.strength if self.training else 1.0
        if strength == 0 and self.norm == "none":
            return F.linear(x_BI, self.weight, self.bias)
        scale = self.scale()
        scaled_OI = self.weight.float() * scale
        with torch.no_grad():
            if self.training and self.how.strategy == "stochastic":
                codes_OI = drawn_codes(scaled_OI, self.uniform(scaled_OI))
            else:
                codes_OI = weight_codes(scaled_OI, self.how)
        weight_OI = straight_through(scaled_OI, codes_OI, strength)
        return self._through(x_BI, lambda x: F.linear(x, weight_OI.to(x.dtype)), scale, strength)


class PackedLinear(Quantized):
    """What a `BitLinear` is after training: packed codes, their scale, bias and norm; gradients pass to its input.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        how: the quantization.
        device: of the parameters.
        dtype: of bias and norm.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, how: Quantization, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, how, device, dtype)
        size = (out_features, bits.bytes_of_row(in_features, *how.weight_range))
        packed = torch.zeros(size, dtype=torch.uint8, device=device)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        scale = torch.ones((out_features, 1) if how.per == "row" else 1, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: BitLinear) -> PackedLinear:
        """Freeze a layer.

        Args:
            layer: its bias and norm are taken as they are.
        """
        made = cls(layer.in_features, layer.out_features, False, layer.how, device="meta")
        packed = bits.pack(layer.codes(), *layer.how.weight_range)
        made.weight_packed = nn.Parameter(packed, requires_grad=False)
        made.weight_scale = nn.Parameter(layer.scale().clone(), requires_grad=False)
        made.bias, made.norm_weight, made.norm_bias = layer.bias, layer.norm_weight, layer.norm_bias
        return made

    @property
    def packed_away(self) -> int:
        """See the base."""
        return self.in_features * self.out_features - self.weight_packed.numel()

    def codes(self) -> Tensor:
        """The codes, as floats [O, I]."""
        return bits.unpack(self.weight_packed, self.in_features, *self.how.weight_range).float()

    def dense(self) -> Tensor:
        """See the base."""
        return self.codes() / self.weight_scale.float()

    def _kernel_fits(self, x_BI: Tensor) -> bool:
        """Whether the kernel computes this: it passes no gradient, and measures activations by their largest."""
        learns = torch.is_grad_enabled() and any(
            part is not None and part.requires_grad for part in (x_BI, self.bias, self.norm_weight, self.norm_bias)
        )
        largest = self.how.activation_bits is None or self.how.activation_scale == "max"
        return self.how.weight_range == bits.TERNARY and largest and not learns

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O].

        Args:
            x_BI: the input.
        """
        limits = self.how.weight_range
        if self._kernel_fits(x_BI):
            normed_BI = x_BI if self.norm == "none" else normed(x_BI, self.norm, self.norm_weight, self.norm_bias)
            y_BO = ternary.linear(
                normed_BI,
                self.weight_packed,
                self.weight_scale,
                self.bias,
                bits=self.how.activation_bits,
                peak=self.how.activation_top if self.how.activation_bits else None,
                eps=self.how.eps,
            )
            return y_BO.to(x_BI.dtype)
        return self._through(
            x_BI, lambda x: bits.product(x, self.weight_packed, *limits), self.weight_scale.float(), 1.0
        )


def bitlinear(
    module: nn.Module,
    how: Quantization | None = None,
    *,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
) -> list[str]:
    """Put a `BitLinear` with the same weight and bias in the place of linear layers of any module.

    Args:
        module: changed in place.
        how: the quantization. Default: that of `BitLinear`.
        targets: names of layers or shell patterns. Default: every `nn.Linear` and `Conv1D`.
        ignore: layers left alone, in the same way. Default: none.

    Returns:
        The names of the layers that were replaced.

    Raises:
        IntaglioError: a name or pattern names no layer, or none is left.
    """
    found = {name: part for name, part in module.named_modules() if name and isinstance(part, (nn.Linear, Conv1D))}
    for what, patterns in (("targets", targets or []), ("ignore", ignore or [])):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in found):
                raise IntaglioError(
                    f"{what}: {pattern!r} names no linear layer; there are {', '.join(found) or 'none'}"
                )
    names = list(found)
    taken = [names[place] for place in select_layers(names, targets, ignore or [])]
    if not taken:
        raise IntaglioError("no linear layer is left to replace")
    layers: dict[str, nn.Module] = {}
    for name in taken:
        part: Any = found[name]
        weight = nn.Parameter(part.weight.T.contiguous()) if isinstance(part, Conv1D) else part.weight
        layers[name] = BitLinear.of(weight, part.bias, how or Quantization())
    replace_modules(module, layers)
    return taken


def freeze(module: nn.Module) -> list[str]:
    """Put a `PackedLinear` in the place of every `BitLinear` of a module, and say which.

    Args:
        module: changed in place.
    """
    found = {name: PackedLinear.of(part) for name, part in module.named_modules() if isinstance(part, BitLinear)}
    replace_modules(module, found)
    return list(found)


def layers(module: nn.Module) -> list[Quantized]:
    """The quantized layers in the place of one projection, fused ones apart; empty where something else stands there.

    Args:
        module: what stands there.
    """
    parts: list[Any] = list(module.parts) if isinstance(module, FusedLinears) else [module]
    return parts if all(isinstance(part, Quantized) for part in parts) else []
