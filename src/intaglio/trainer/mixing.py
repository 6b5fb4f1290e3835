"""Mixing of training examples: mixup, CutMix and ManifoldMix, for images and for texts.

    x~_b = sum_k s_bk x_{r_bk},    y~_b = sum_k s_bk y_{r_bk},    r_b0 = b,  sum_k s_bk = 1

`Mix` holds the rows r and the shares s. Mixup draws the shares from Dirichlet(alpha), of two folds Beta(alpha, alpha);
CutMix pastes a box of the partner's image and takes the share of its area; ManifoldMix mixes hidden states. Texts are
mixed at their embeddings, and a mixed text sees every position that is a token in any of its texts.

Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Yun et al., CutMix: Regularization Strategy
to Train Strong Classifiers with Localizable Features, ICCV 2019; Verma et al., Manifold Mixup: Better Representations
by Interpolating Hidden States, ICML 2019.

Dimension letters: B rows, K folds (examples in a mix), C classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.errors import IntaglioError
from intaglio.methods.base import Method
from intaglio.modeling.anatomy import blocks

MixKind = Literal["mixup", "cutmix", "manifold"]
DEFAULT_LAYERS = 3
"""Layers that ManifoldMix chooses from by default: the inputs and the outputs of the first two blocks."""


@dataclass(frozen=True, eq=False)
class Mix:
    """Rows and shares of a mixed batch.

    Args:
        rows_BK: the rows mixed in each example, int64 [B, K]; the first is the example itself.
        shares_BK: their shares, float [B, K], each row with the sum 1; may carry a gradient.
        pasted_BHW: pixels that come from the second row (CutMix), bool [B, H, W]. Default: all are averaged.
    """

    rows_BK: Tensor
    shares_BK: Tensor
    pasted_BHW: Tensor | None = None

    def combine(self, x: Tensor) -> Tensor:
        """Return the mixes of the rows of x, float [B, ...] of any shape; pasted where the mix has a box."""
        if self.pasted_BHW is None:
            return self.average(x)
        if x.ndim != 4 or x.shape[-2:] != self.pasted_BHW.shape[1:]:
            raise IntaglioError(f"mix is cutmix; images [B, C, H, W] are needed, this batch is {tuple(x.shape)}")
        return torch.where(self.pasted_BHW.to(x.device)[:, None], x[self.rows_BK[:, 1].to(x.device)], x)

    def average(self, x: Tensor) -> Tensor:
        """Return sum_k s_bk x_{r_bk}, for inputs and for targets [B, C]."""
        rows_BK, shares_BK = self.rows_BK.to(x.device), self.shares_BK.to(x)
        shape = (-1, *[1] * (x.ndim - 1))
        terms = [shares_BK[:, k].reshape(shape) * x[rows_BK[:, k]] for k in range(rows_BK.shape[1])]
        return torch.stack(terms).sum(0) if len(terms) > 2 else terms[0] + terms[1]

    def labels(self, labels_B: Tensor) -> Tensor:
        """Return the labels of the mixed rows, [B, K]."""
        return labels_B[self.rows_BK.to(labels_B.device)]

    def visible(self, mask_BL: Tensor) -> Tensor:
        """Return the positions that are tokens in any of the mixed rows with a share above 0, as the mask's type."""
        counted_BKL = mask_BL[self.rows_BK.to(mask_BL.device)] * (self.shares_BK > 0).to(mask_BL)[..., None]
        return counted_BKL.amax(1)


def mixed_targets(mix: Mix, labels_B: Tensor, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Return soft targets y~ [B, C]; smoothing moves its share of each target to all classes equally."""
    targets_BC = mix.average(F.one_hot(labels_B, num_classes).to(mix.shares_BK.dtype))
    return (1 - label_smoothing) * targets_BC + label_smoothing / num_classes


def soft_cross_entropy(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Return the cross-entropy of each row with soft targets, `-sum_c y_c log p_c`, float [B]."""
    return -(targets_BC * logits_BC.log_softmax(-1)).sum(-1)


def draw_rows(count: int, folds: int, rng: torch.Generator) -> Tensor:
    """Return each row beside folds - 1 partners by random permutations, int64 [B, K]; a row may meet itself."""
    partners = [torch.randperm(count, generator=rng) for _ in range(folds - 1)]
    return torch.stack([torch.arange(count), *partners], 1)


def draw_shares(
    count: int,
    folds: int,
    alpha: float,
    rng: torch.Generator,
    *,
    per_example: bool = False,
    largest_first: bool = False,
) -> Tensor:
    """Return shares from Dirichlet(alpha), float32 [B, K].

    Args:
        count: rows B.
        folds: examples K in a mix.
        alpha: concentration; small values leave one example nearly whole.
        rng: the source of the draws.
        per_example: whether each row has its own shares. Default False: the batch shares them.
        largest_first: whether the largest share goes to the row itself, as `max(lam, 1 - lam)`. Default False.
    """
    source = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
    drawn = source.dirichlet([alpha] * folds, size=count if per_example else 1)
    shares = torch.from_numpy(-np.sort(-drawn) if largest_first else drawn).float()
    return shares.expand(count, folds).contiguous()


def cut_boxes(rows_BK: Tensor, shares_BK: Tensor, size: tuple[int, int], rng: torch.Generator) -> Mix:
    """Return CutMix of drawn shares: a box at a uniform centre, cut at the border, with the share of its true area.

    The box has sides `sqrt(1 - lam)` of the image's, rounded down to pixels. Rows with equal shares in the whole batch
    have the same box.
    """
    height, width = size
    batch_wide = bool((shares_BK == shares_BK[:1]).all())
    count = 1 if batch_wide else len(shares_BK)
    cut_B = (1 - shares_BK[:count, 0].double()).clamp(min=0).sqrt()
    pasted_BHW = torch.ones(count, height, width, dtype=torch.bool)
    for axis, side in enumerate((height, width)):
        half_B = (cut_B * side).long() // 2
        centre_B = torch.randint(side, (count,), generator=rng)
        place_S = torch.arange(side)
        inside_BS = (place_S >= (centre_B - half_B)[:, None]) & (place_S < (centre_B + half_B)[:, None])
        pasted_BHW &= inside_BS[:, :, None] if axis == 0 else inside_BS[:, None, :]
    pasted_BHW = pasted_BHW.expand(len(shares_BK), height, width)
    area_B = pasted_BHW.float().mean((1, 2))
    return Mix(rows_BK, torch.stack([1 - area_B, area_B], 1), pasted_BHW)


class Mixing(Method):
    """Base of methods that mix examples by drawn shares: fields, draws and the mixed forward pass.

    Args:
        mix: `mixup` (inputs are averaged; texts at their embeddings), `cutmix` (a box of the partner's image is
            pasted; images only) or `manifold` (hidden states of a random layer are averaged). Default `mixup`.
        alpha: concentration of the shares, Dirichlet(alpha), above 0. Default 1: uniform.
        folds: examples in a mix, at least 2; `cutmix` takes 2. Default 2.
        mixing_rate: share of the batches that are mixed, 0 to 1. Default 1.
        per_example: whether each row draws its own shares. Default False: the batch shares them.
        layers: layers that `manifold` chooses from: 0 for the inputs (texts: embeddings), n for the output of block n.
            Default 0, 1 and 2.
    """

    mix: MixKind = "mixup"
    alpha: Annotated[float, Field(gt=0)] = 1.0
    folds: Annotated[int, Field(ge=2)] = 2
    mixing_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    per_example: bool = False
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    def draw(
        self, count: int, rng: torch.Generator, size: tuple[int, int] | None = None, *, largest_first: bool = False
    ) -> Mix | None:
        """Return the mix of a batch of `count` rows, or None where the batch stays as it is.

        Args:
            count: rows of the batch.
            rng: the source of the draws.
            size: height and width of the images, for `cutmix`.
            largest_first: whether the row itself has the largest share. Default False.
        """
        if float(torch.rand((), generator=rng)) >= self.mixing_rate:
            return None
        rows_BK = draw_rows(count, self.folds, rng)
        shares_BK = draw_shares(
            count, self.folds, self.alpha, rng, per_example=self.per_example, largest_first=largest_first
        )
        if self.mix != "cutmix":
            return Mix(rows_BK, shares_BK)
        if size is None:
            raise IntaglioError("mix is cutmix; it needs images: texts take mixup or manifold")
        return cut_boxes(rows_BK, shares_BK, size, rng)

    def draw_layer(self, rng: torch.Generator) -> int:
        """Return the layer at which a batch is mixed: 0 but for `manifold`."""
        choices = range(DEFAULT_LAYERS) if self.layers is None else self.layers
        return choices[int(torch.randint(len(choices), (), generator=rng))] if self.mix == "manifold" else 0


def image_size(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images of a batch; None for texts."""
    name = pixels_name(inputs)
    return None if name is None else (inputs[name].shape[-2], inputs[name].shape[-1])


def pixels_name(inputs: Mapping[str, Any]) -> str | None:
    """Return the key of the images [B, C, H, W] of a batch; None for texts."""
    return next((name for name in ("pixel_values", "pixels") if name in inputs), None)


def mixing_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Return the modules whose outputs ManifoldMix may mix, in order: blocks, or the children of a plain sequence."""
    return list(model.children())[:-1] if isinstance(model, nn.Sequential) else blocks(model)


@contextmanager
def mixed_output(module: nn.Module, mix: Mix) -> Iterator[None]:
    """Average the output of a module (a tensor, or the first of a tuple) over mixed rows, in this context."""

    def average(module: nn.Module, args: Any, output: Any) -> Any:
        return (mix.average(output[0]), *output[1:]) if isinstance(output, tuple) else mix.average(output)

    handle = module.register_forward_hook(average)
    try:
        yield
    finally:
        handle.remove()


def forward_mixed(
    forward: Callable[[Mapping[str, Any]], Any],
    model: nn.Module,
    inputs: Mapping[str, Any],
    mix: Mix,
    layer: int = 0,
) -> Any:
    """Run a model on mixed examples and return its outputs.

    Args:
        forward: runs the model on inputs.
        model: the model, for its layers.
        inputs: of the unmixed rows: `pixel_values` or `pixels` [B, C, H, W], or `input_ids` with `attention_mask`.
        mix: rows and shares, of as many rows as the inputs.
        layer: 0 for the inputs (texts: embeddings), n for the output of block n. Default 0.

    Raises:
        IntaglioError: the model has no such layer, or recomputes it for the gradient.
    """
    changed = dict(inputs)
    if "attention_mask" in inputs:
        changed["attention_mask"] = mix.visible(inputs["attention_mask"])
    pixels = pixels_name(inputs)
    if layer == 0 and pixels is not None:
        return forward({**changed, pixels: mix.combine(inputs[pixels])})
    if layer == 0:
        embedding: Any = getattr(model, "get_input_embeddings", None)
        if embedding is None:
            raise IntaglioError(f"{type(model).__name__} has no input embeddings at which texts could be mixed")
        module = embedding()
    else:
        module = _block(model, layer)
    with mixed_output(module, mix):
        return forward(changed)


def _block(model: nn.Module, layer: int) -> nn.Module:
    every = mixing_layers(model)
    if layer > len(every):
        raise IntaglioError(f"layers names {layer}; this model has blocks 1 to {len(every)}, and 0 for its inputs")
    if getattr(every[layer - 1], "gradient_checkpointing", False):
        raise IntaglioError("mix is manifold, but gradient checkpointing runs blocks again without the mix; give"
                            " layers: [0], or gradient_checkpointing: false")  # fmt: skip
    return every[layer - 1]
