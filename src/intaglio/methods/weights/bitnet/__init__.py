"""BitNet b1.58 Reloaded (Nielsen and Schneider-Kamp, DeLTA 2024): training with ternary weights and 8-bit activations.

    y = clamp(round(norm(x) s_x)) clamp(round(W s_w))^T / (s_w s_x) + bias
    s_w = max(|lo|, |hi|) / max(median |W|, eps)   one a matrix      s_x = 128 / max(max |x|, eps)   one a token

- `quantization`: ranges, scales, codes and straight-through gradients.
- `layers`: the layer that trains and the packed one.
- `packing`: packed codes and their product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.replacement import ReplacesLinears
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Method, Progress, Workload, no_progress
from intaglio.methods.weights.bitnet.layers import BitLinear, PackedLinear, QuantizedLinear
from intaglio.methods.weights.bitnet.quantization import Quantization, magnitude
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.replacement import replace_modules
from intaglio.modeling.targets import projections, replace_linears
from intaglio.trainer import Batch, ModifierSession, TrainingRun
from intaglio.trainer.rng import generator
from intaglio.trainer.sparsity_mask import pruned_mask

__all__ = ["BitLinear", "BitNet", "PackedLinear", "Quantization", "pack_layers"]


class BitNet(ReplacesLinears, Quantization, Method, slug="bitnet"):
    """Multiplies weights of few bits, ternary by default, with activations of 8 bits, in training and inference.

    As a modifier of a training step: the projections of the blocks keep a float weight W that the optimizer moves, and
    multiply with its codes; gradients pass the rounding as if it were not there:

        s_w = max(|lo|, |hi|) / max(measure|W|, eps),  w_q = clamp(round(W s_w), lo, hi)
        s_x = 128 / max(max|x|, eps) a token,          x_q = clamp(round(x s_x), -128, 127)
        y = x_q w_q^T / (s_w s_x) + bias

    After the training the codes are packed, four ternary weights in a byte, and the checkpoint needs `intaglio.load`;
    its outputs equal those of the last evaluation in training. Embedding, head and the blocks' own norms stay as they
    are. Zeros that a pruning made stay zeros. Fused projections get a scale each.

    As a step of its own it quantizes without training: at 8 bits that changes little, at 4 bits much, and ternary
    weights that were not trained so are useless. It also packs what was trained with `keep: shadow`. In Python,
    `BitNet().replace(module)` puts the layers into any torch module, `train(module, ..., modifiers=[BitNet()])` trains
    it, and `pack_layers(module)` packs its codes.

    Args:
        bits: bits of a weight, above 1 and at most 8; codes from ceil(-2^(b-1)) to ceil(2^(b-1) - 1). Default 1.58,
            which is -1, 0 and 1.
        scale: the statistic of |W| that sets its scale: `median` (the lower of two middle values), `mean` or `max`.
            Default: the median for ternary weights, else max, as more codes are there to reach the largest weight.
        per: one scale a `tensor` (default) or one a `row`.
        activation_bits: 2 to 8, or none: activations stay as they are. Default 8.
        activation_scale: the statistic of a token's |x|. Default `max`.
        activation_range: the code of that statistic, in 8 bits: 128 (default, the authors' code; a positive largest
            value is clamped to 127) or 127 (transformers and the first BitNet).
        norm: of the input of each projection: `layernorm`, `rmsnorm` or `none`. Default: none in a transformer, whose
            blocks normalise themselves; a layer norm in any other module, as in the authors' code. A pretrained model
            does not survive one that it was not trained with.
        learnable_norm: whether the inner norm has a weight (and a layer norm a bias) that is trained. Default False.
        strategy: of rounding in training: `deterministic` (default), or `stochastic` (ternary only): sign(z) where
            |z| >= u, drawn from 0 to 1 each step, else 0. Evaluation rounds.
        eps: lower bound of the statistics. Default 1e-5.
        targets: projections by name or shell pattern, such as `*.mlp.*`. Default: all of the blocks'.
        ignore: projections left alone, by name or shell pattern. Default: none.
        keep: what stays after training: `packed` codes (default), or the `shadow` weights in float, to train on from
            with another step of the same kind.
        lambda_warmup: share of the steps over which q(z) is mixed in, z + lambda (q(z) - z) with lambda from 0 to 1.
            Default 0: it is 1 from the first step.
        decay_until: share of the steps after which the optimizer's weight decay is 0. Default 1: never; 0.5 is the
            first BitNet's.

    Raises:
        IntaglioError: a name that matches no projection, part of a fused module without the rest, weights whose
            statistic is 0, a model that is quantized already or trained otherwise, or adapters and frozen weights.

    Source: Nielsen and Schneider-Kamp, BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks,
    DeLTA 2024, section 3; Ma et al., The Era of 1-bit LLMs, 2024; code schneiderkamplab/bitlinear. Departures: its
    forward scales the bias by token; its stochastic rounding draws in evaluation, too.
    """

    kinds = ("carving", "modifier")
    summary = "trains ternary weights and 8-bit activations by straight-through rounding, and packs them"
    citation = (
        "Nielsen and Schneider-Kamp, BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks, "
        "DeLTA 2024"
    )
    url = "https://arxiv.org/abs/2407.09527"

    module_types: ClassVar[tuple[type[QuantizedLinear], ...]] = (BitLinear, PackedLinear)

    keep: Literal["packed", "shadow"] = "packed"
    lambda_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay_until: Annotated[float, Field(ge=0, le=1)] = 1.0

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the layer norm before each projection that the authors' layers have."""
        return cls(**{"norm": "layernorm", **overrides})

    def quantization(self, model: nn.Module) -> Quantization:
        """Return the quantization of the layers of a model."""
        default = "none" if isinstance(model, PreTrainedModel) else "layernorm"
        return Quantization(**{**self.fields(), "norm": self.norm or default})

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse names that match none of the projections `(name, rows, columns)`; none where all were replaced."""
        if linears:
            super().check(linears)

    def check_model(self, parts: Anatomy) -> None:
        """Refuse packed codes, layers trained otherwise, and a fused module that is named in part."""
        self.plan(parts.model)

    def plan(self, model: nn.Module) -> list[str]:
        """Return the projections to replace; none where shadow weights to train on are there already."""
        layers = list(self.modules_of(model).values())
        if any(isinstance(layer, PackedLinear) for layer in layers):
            raise IntaglioError(
                "the model holds packed codes of bitnet, whose float weights are gone; to go on training, quantize "
                "with keep: shadow"
            )
        if not layers:
            return super().plan(model)
        for name, value in self.quantization(model).fields().items():
            there = getattr(layers[0].config, name)
            if there != value:
                raise IntaglioError(
                    f"the shadow weights of the model were trained with {name}: {there}; {value} does not fit them"
                )
        return []

    def replace(self, model: nn.Module) -> list[str]:
        """Replace projections by `BitLinear` layers with the same weights, and return their names.

        Args:
            model: a transformer, whose blocks' projections are replaced, or any other module, whose linear layers are.

        Raises:
            IntaglioError: see the class.
        """
        names, config = self.plan(model), self.quantization(model)
        for name, linear in projections(model):
            if name in names:
                _check_scale(name, linear.read(), config)
        replace_linears(model, names, lambda name, linear: _bit_linear(linear, config))
        return names

    def _replace(self, checkpoint: Checkpoint) -> list[str]:
        """Have `BitLinear` layers in a checkpoint, and return the projections they replace."""
        names = self.replace(checkpoint.model)
        known = [list(part["layers"]) for part in checkpoint.record.live if part.get("slug") == self.slug]
        return names or (known[0] if known else list(self.modules_of(checkpoint.model)))

    def _finish(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Pack the codes unless shadow weights are kept, and note the live part."""
        if self.keep == "packed":
            pack_layers(checkpoint.model)
        config = self.quantization(checkpoint.model).fields()
        part = {"quantization": config, "layers": list(names), "packed": self.keep == "packed"}
        checkpoint.set_runtime_state(self.slug, part)

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of a step without training: a statistic of each matrix."""
        largest = max(rows * columns for rows, columns in workload.linears)
        return Cost(sorted_elements=float(sum(r * c for r, c in workload.linears)), extra_bytes=20 * largest)

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost beyond the float model's: statistics, and codes kept for the gradient."""
        weights = sum(rows * columns for rows, columns in workload.linears)
        inputs = sum(columns for _, columns in workload.linears)
        return Cost(sorted_elements=steps * weights, extra_bytes=4 * (weights + 2 * batch_tokens * inputs))

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Quantize `checkpoint` in place, without training, or pack its shadow weights, and return it.

        Args:
            checkpoint: what to quantize.
            calibration, seed, batch_size: Ignored; kept for API compatibility.
            progress: called once.

        Raises:
            IntaglioError: see the class.
        """
        anatomy(checkpoint.model).all_linears()  # refuses families that are not supported
        names = self._replace(checkpoint)
        self._finish(checkpoint, names)
        progress(len(names), len(names), f"{self.slug}: {len(names)} projections")
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen={"layers": len(names)})
        return checkpoint

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty layers into a model without weights."""
        config = Quantization(**part["quantization"])
        kind = PackedLinear if part["packed"] else BitLinear

        def empty(name: str, linear: Linear) -> QuantizedLinear:
            outputs, inputs = linear.shape
            stock: Any = linear.module
            return kind(inputs, outputs, stock.bias is not None, config, device="meta", dtype=stock.weight.dtype)

        replace_linears(model, part["layers"], empty)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Check that the layers are in a loaded model."""
        cls.check_restored(checkpoint.model, len(part["layers"]))

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put layers that train into the model.

        Raises:
            IntaglioError: see the class.
        """
        model = run.model
        self.refuse_frozen(model)
        names = set(self.plan(model))
        shadow = [layer.weight for layer in self.modules_of(model).values() if isinstance(layer, BitLinear)]
        plain = [linear.module.weight for name, linear in projections(model) if name in names]
        self.refuse_frozen(model, cast(list[nn.Parameter], shadow or plain))
        return _Session(self, run, self._replace(run.checkpoint))


class _Session(ModifierSession):
    """A training with `BitLinear` layers: λ, draws, weight decay, and the zeros of a pruned model."""

    def __init__(self, method: BitNet, run: TrainingRun, names: list[str]) -> None:
        self._method, self._run, self._names = method, run, names
        self._layers = {name: part for name, part in run.model.named_modules() if isinstance(part, BitLinear)}
        self._zeros: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            layer.cache_scale = True
            mask = pruned_mask(layer.weight)
            if mask is not None:
                self._zeros[name] = ~mask
        self._set_step(1)

    def _set_step(self, step: int) -> None:
        ramp = self._method.lambda_warmup * self._run.steps
        for name, layer in self._layers.items():
            layer.strength = 1.0 if step >= ramp else step / ramp
            layer.uniform = _Uniform(self._run.seed, name, step)
            layer.reset_scale()

    def before_step(self, step: int, batch: Batch) -> None:
        self._set_step(step)
        if step > self._method.decay_until * self._run.steps and self._run.optimizer is not None:
            for group in self._run.optimizer.param_groups:
                group["weight_decay"] = 0.0

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for name, layer in self._layers.items():
            if name in self._zeros:
                layer.weight.masked_fill_(self._zeros[name].to(layer.weight.device), 0)
            layer.reset_scale()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for layer in self._layers.values():
            layer.reset_scale()

    def detach(self) -> None:
        for layer in self._layers.values():
            layer.cache_scale, layer.strength, layer.uniform = False, 1.0, torch.rand_like
            layer.reset_scale()
            layer.zero_grad()
        self._method._finish(self._run.checkpoint, self._names)


class _Uniform:
    """Draws from 0 to 1 that are the same in every pass of a step."""

    def __init__(self, seed: int, name: str, step: int) -> None:
        self.key = (seed, "bitnet", name, step)

    def __call__(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator(*self.key)).to(like.device)


def pack_layers(model: nn.Module) -> list[str]:
    """Replace every `BitLinear` of a module by a `PackedLinear`, in place, and return their names."""
    packed: dict[str, nn.Module] = {
        name: PackedLinear.from_bit_linear(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, BitLinear)
    }
    replace_modules(model, packed)
    return list(packed)


def _bit_linear(linear: Linear, config: Quantization) -> BitLinear:
    """Return a layer with the projection's weight: the very parameters of a plain linear, else copies."""
    stock: Any = linear.module
    if isinstance(linear.module, nn.Linear) and linear.rows is None:
        return BitLinear.from_parameters(stock.weight, stock.bias, config)
    weight, bias_O = nn.Parameter(linear.read().contiguous().clone(), stock.weight.requires_grad), linear.read_bias()
    bias = None if bias_O is None else nn.Parameter(bias_O.clone(), stock.bias.requires_grad)
    return BitLinear.from_parameters(weight, bias, config)


def _check_scale(name: str, weight_OI: Tensor, config: Quantization) -> None:
    """Refuse, before anything is changed, a weight whose statistic is 0 or not finite."""
    size = magnitude(weight_OI, config.weight_measure, config.per == "row")
    if not bool(torch.isfinite(size).all()):
        raise IntaglioError(f"{name} holds weights that are not finite; nothing is quantized")
    if bool((size == 0).any()):
        what = f"a row of {name}" if config.per == "row" else name
        if config.weight_measure == "median" and bool(weight_OI.any()):
            raise IntaglioError(
                f"at least half of {what} is zero, so its median is 0 and scales nothing; set scale: mean"
            )
        raise IntaglioError(f"{what} is all zeros, which has no scale; leave it out with ignore")
