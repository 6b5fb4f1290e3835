"""BitNet b1.58 Reloaded (Nielsen and Schneider-Kamp, DeLTA 2024): ternary weights and 8-bit activations, trained so.

    y = clamp(round(norm(x) s_x)) clamp(round(W s_w))^T / (s_w s_x) + bias
    s_w = max(|lo|, |hi|) / max(median |W|, eps)   one a matrix      s_x = 128 / max(max |x|, eps)   one a token

- `quantization`: ranges, scales and codes; the gradient that passes straight through.
- `linear`: the layer that trains and the packed one; `bitlinear` for any torch module.
- `codes`: codes in few bytes, and the product with them.
- `surgery`: both kinds of layers in a checkpoint, and their way through a reload.

`BitLinear`, `PackedLinear`, `bitlinear` and `freeze` work on any `nn.Module`:

    names = bitlinear(network, Quantization(scale="mean"), ignore=["head"])
    ...                                                      # train as ever
    freeze(network)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.weights.bitnet import surgery
from intaglio.methods.weights.bitnet.linear import BitLinear, PackedLinear, bitlinear, freeze
from intaglio.methods.weights.bitnet.quantization import Quantization
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.trainer import Batch, ModifierSession, TrainingRun
from intaglio.trainer.rng import generator
from intaglio.trainer.sparsity_mask import pruned_mask

__all__ = ["BitLinear", "BitNet", "PackedLinear", "Quantization", "bitlinear", "freeze"]


class BitNet(Quantization, Method, slug="bitnet"):
    """Multiplies with weights of few bits, ternary by default, and with activations of 8 bits, in training as in use.

    In a training step's `shape` the projections of the blocks keep a float weight W that the optimizer moves, and
    multiply with its codes; gradients pass the rounding as if it were not there:

        s_w = max(|lo|, |hi|) / max(measure|W|, eps),  w_q = clamp(round(W s_w), lo, hi)
        s_x = 128 / max(max|x|, eps) a token,          x_q = clamp(round(x s_x), -128, 127)
        y = x_q w_q^T / (s_w s_x) + bias

    Behind the training the codes are packed, four ternary weights in a byte, and the checkpoint is a live one
    (`intaglio.load` reads it) whose passes give what the last evaluation of the training saw. Embedding, head and the
    blocks' own norms stay as they are. Zeros that a pruning made stay zeros. Fused projections get a scale each.

    As a step of its own it quantizes without training: at 8 bits that changes little, at 4 bits much, and ternary
    weights that were not trained so are of no use at all. It also packs what was trained with `keep: shadow`.

    Args:
        bits: of a weight, above 1 and at most 8; codes from ceil(-2^(b-1)) to ceil(2^(b-1) - 1). Default 1.58, which
            is -1, 0 and 1.
        scale: what |W| is measured by: `median` (the lower of two middle values), `mean` or `max`. Default: the
            median for ternary weights, else max, as more codes are there to reach the largest weight.
        per: one scale a `tensor` (default) or one a `row`.
        activation_bits: 2 to 8, or none: activations stay as they are. Default 8.
        activation_scale: what a token's |x| is measured by. Default `max`.
        activation_range: which code the measure gets, in 8 bits: 128 (default, the authors' code; a positive largest
            value is clamped to 127) or 127 (transformers and the first BitNet).
        norm: of the input of each projection: `layernorm`, `rmsnorm` or `none`. Default: none in a checkpoint, whose
            blocks normalise themselves; a layer norm in `BitLinear`, as in the authors' code. A pretrained model does
            not survive one that it was not trained with.
        learnable_norm: whether the inner norm has a weight (and a layer norm a bias) that is trained. Default False.
        strategy: of rounding in training: `deterministic` (default), or `stochastic` (ternary only): sign(z) where
            |z| >= u, drawn from 0 to 1 each step, else 0. Evaluation rounds.
        eps: the least that a measure counts as. Default 1e-5.
        targets: projections by name or shell pattern, such as `*.mlp.*`. Default: all of the blocks'.
        ignore: projections left alone, by name or shell pattern. Default: none.
        keep: what stays after training: `packed` codes (default), or the `shadow` weights in float, to train on from
            with another step of the same kind.
        lambda_warmup: share of the steps over which q(z) is mixed in, z + lambda (q(z) - z) with lambda from 0 to 1.
            Default 0: it is 1 from the first step.
        decay_until: share of the steps after which the optimizer's weight decay is 0. Default 1: never; 0.5 is the
            first BitNet's.

    Raises:
        IntaglioError: a name that is no projection, part of a fused module without the rest, weights whose measure is
            0, a model that is quantized already or trained otherwise, or adapters and frozen weights beside it.

    Source: Nielsen and Schneider-Kamp, BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks,
    DeLTA 2024, section 3; Ma et al., The Era of 1-bit LLMs, 2024; code schneiderkamplab/bitlinear. Departures: its
    forward scales the bias by token; its stochastic rounding draws in evaluation, too.
    """

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "activations"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})

    targets: Annotated[list[str], Field(min_length=1)] | None = None
    ignore: list[str] = Field(default_factory=list)
    keep: Literal["packed", "shadow"] = "packed"
    lambda_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay_until: Annotated[float, Field(ge=0, le=1)] = 1.0

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """With the layer norm in front of each projection that the authors' layers have.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"norm": "layernorm", **overrides})

    @property
    def how(self) -> Quantization:
        """The quantization of a layer in a checkpoint."""
        return Quantization(**{**self.kept(), "norm": self.norm or "none"})

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse names that are no projection's.

        Args:
            linears: `(name, rows, columns)` of each plain projection; none where all were replaced.

        Raises:
            IntaglioError: names the entry.
        """
        if linears:
            surgery.taken([name for name, _, _ in linears], self.targets, self.ignore)

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model that holds codes alone or layers of another kind, and a fused module that is named in part.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: says which.
        """
        self._begin(parts)

    def _begin(self, parts: Anatomy) -> list[str]:
        """The projections to replace; none where shadow weights are there already."""
        model = parts.model
        if surgery.is_packed(model):
            raise IntaglioError(
                "the model holds packed codes of bitnet, whose float weights are gone; to go on training, quantize "
                "with keep: shadow"
            )
        there = surgery.trained_layers(model)
        if there:
            other = next(iter(there.values())).how
            for name, value in self.how.kept().items():
                if getattr(other, name) != value:
                    raise IntaglioError(
                        f"the shadow weights of the model were trained with {name}: {getattr(other, name)}; {value} "
                        "does not fit them"
                    )
            return []
        plain = [name for name, _ in parts.all_linears()]
        if not plain:
            raise IntaglioError(f"the model has no plain projections: {surgery.replaced_by(model)} replaced them")
        names = surgery.taken(plain, self.targets, self.ignore)
        surgery.places(parts, names)
        return names

    def _put(self, checkpoint: Checkpoint) -> list[str]:
        """Have layers that train in the model, and return the projections that they stand for."""
        parts = anatomy(checkpoint.model)
        names = self._begin(parts)
        if not names:
            (part,) = [part for part in checkpoint.record.live if part.get("slug") == self.slug]
            return [str(name) for name in part["layers"]]
        surgery.check_scales(parts, names, self.how)
        surgery.put_trained(parts, names, self.how)
        return names

    def _finish(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Pack if that is wanted, and note what is there for the reload."""
        packed = self.keep == "packed"
        if packed:
            surgery.pack_layers(checkpoint.model)
        checkpoint.set_runtime_state(self.slug, surgery.part_of(self.how, names, packed))

    def estimate(self, workload: Workload) -> Cost:
        """Of a step without training: a measure of each matrix.

        Args:
            workload: of the model.
        """
        largest = max(rows * columns for rows, columns in workload.linears)
        return Cost(sorted_elements=float(sum(r * c for r, c in workload.linears)), extra_bytes=20 * largest)

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """What training takes beside the float model's: measures, and codes of weights and inputs for the gradient.

        Args:
            workload: of the model.
            steps: optimizer steps.
            batch_tokens: of a batch.
            pass_flops: not looked at.
        """
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
            calibration: not looked at.
            seed: not used.
            batch_size: not used.
            progress: called once.

        Raises:
            IntaglioError: see the class.
        """
        names = self._put(checkpoint)
        self._finish(checkpoint, names)
        progress(len(names), len(names), f"{self.slug}: {len(names)} projections")
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen={"layers": len(names)})
        return checkpoint

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty layers into a model that has no weights yet.

        Args:
            part: of the record.
            model: on the meta device.
        """
        surgery.build_empty(part, model)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """See that the layers are there.

        Args:
            part: of the record.
            checkpoint: just loaded.
        """
        surgery.check_restore(part, checkpoint.model)

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put layers that train into the model."""
        model = run.model
        adapted = bool(getattr(model, "peft_config", None))  # adapters stand in the projections' places
        names = [] if adapted else self._begin(anatomy(model))
        if adapted or not any(p.requires_grad for p in surgery.weights(model, names)):
            raise IntaglioError("bitnet trains the projections' own weights; leave lora and freeze out")
        return _Session(self, run, self._put(run.checkpoint))


class _Session(ModifierSession):
    def __init__(self, method: BitNet, run: TrainingRun, names: list[str]) -> None:
        self.method, self.run, self.names = method, run, names
        self.layers = surgery.trained_layers(run.model)
        self.zeros: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.remember = True
            mask = pruned_mask(layer.weight)
            if mask is not None:
                self.zeros[name] = ~mask
        self._set(1)

    def _set(self, step: int) -> None:
        """Set strength and draws of a step."""
        ramp = self.method.lambda_warmup * self.run.steps
        for name, layer in self.layers.items():
            layer.strength = 1.0 if step >= ramp else step / ramp
            layer.uniform = _Uniform(self.run.seed, name, step)
            layer.forget()

    def before_step(self, step: int, batch: Batch) -> None:
        self._set(step)
        if step > self.method.decay_until * self.run.steps and self.run.optimizer is not None:
            for group in self.run.optimizer.param_groups:
                group["weight_decay"] = 0.0

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for name, layer in self.layers.items():
            if name in self.zeros:
                layer.weight.masked_fill_(self.zeros[name].to(layer.weight.device), 0)
            layer.forget()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # The weights are new: their measures are taken again.
        for layer in self.layers.values():
            layer.forget()

    def detach(self) -> None:
        for layer in self.layers.values():
            layer.remember, layer.strength, layer.uniform = False, 1.0, torch.rand_like
            layer.forget()
            layer.zero_grad()
        self.method._finish(self.run.checkpoint, self.names)


class _Uniform:
    """Draws from 0 to 1 that are the same for every pass of a step.

    Args:
        seed: of the run.
        name: of the layer.
        t: the step.
    """

    def __init__(self, seed: int, name: str, t: int) -> None:
        self.key = (seed, "bitnet", name, t)

    def __call__(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator(*self.key)).to(like.device)
