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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.errors import IntaglioError, shorten
from intaglio.methods.base import Method, TrainingData
from intaglio.modeling.anatomy import blocks
from intaglio.modeling.classifier import logits_layer
from intaglio.trainer.protocols import Batch, ModifierSession, TrainingRun
from intaglio.trainer.rng import generator
from intaglio.trainer.shown_examples import PIXELS, pixels_png, shown_example

MixKind = Literal["mixup", "cutmix", "manifold"]
SHOWN = 8
"""Mixed samples in a report."""
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

    @classmethod
    def unmixed(cls, count: int, folds: int = 2) -> Mix:
        """Return the mix that leaves `count` rows as they are."""
        shares_K = torch.zeros(folds)
        shares_K[0] = 1
        return cls(torch.arange(count)[:, None].expand(count, folds), shares_K.expand(count, folds))

    def padded(self, count: int) -> Mix:
        """Return the mix with rows that stay as they are after its own, `count` in all; for averaged rows."""
        rest = Mix.unmixed(count, self.rows_BK.shape[1])
        own = len(self.rows_BK)
        return Mix(
            torch.cat([self.rows_BK, rest.rows_BK[own:].to(self.rows_BK.device)]),
            torch.cat([self.shares_BK, rest.shares_BK[own:].to(self.shares_BK)]),
        )

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

    def tokens(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the ids of each row, its padding filled with tokens of its partners, so that decoders find its end."""
        own_B = self.rows_BK[:, 0].to(ids_BL.device)
        filled_BL, seen_BL = ids_BL[own_B], mask_BL[own_B].bool()
        for rows_B, shares_B in zip(self.rows_BK.T.to(ids_BL.device), self.shares_BK.T, strict=True):
            new_BL = mask_BL[rows_B].bool() & (shares_B > 0).to(ids_BL.device)[:, None] & ~seen_BL
            filled_BL, seen_BL = torch.where(new_BL, ids_BL[rows_B], filled_BL), seen_BL | new_BL
        return filled_BL


def mixed_targets(mix: Mix, labels_B: Tensor, classes: int) -> Tensor:
    """Return soft targets y~, float [B, C]."""
    return mix.average(F.one_hot(labels_B, classes).to(mix.shares_BK.dtype))


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

    trains_on: ClassVar[TrainingData] = "classes"
    sets_targets: ClassVar[bool] = True

    mix: MixKind = "mixup"
    alpha: Annotated[float, Field(gt=0)] = 1.0
    folds: Annotated[int, Field(ge=2)] = 2
    mixing_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    per_example: bool = False
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _two_folds(self) -> Self:
        if self.mix == "cutmix" and self.folds != 2:
            raise ValueError(f"mix is 'cutmix', which pastes one image into another; folds is {self.folds}")
        return self

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
        return self.place(rows_BK, shares_BK, size, rng)

    def place(self, rows_BK: Tensor, shares_BK: Tensor, size: tuple[int, int] | None, rng: torch.Generator) -> Mix:
        """Return the mix of drawn rows and shares, for `cutmix` with boxes in images of a size (None: texts)."""
        if self.mix != "cutmix":
            return Mix(rows_BK, shares_BK)
        if size is None:
            raise IntaglioError("mix is cutmix, which needs images; texts take mixup or manifold")
        return cut_boxes(rows_BK, shares_BK, size, rng)

    def draw_layer(self, rng: torch.Generator) -> int:
        """Return the layer at which a batch is mixed: 0 but for `manifold`."""
        choices = range(DEFAULT_LAYERS) if self.layers is None else self.layers
        return choices[int(torch.randint(len(choices), (), generator=rng))] if self.mix == "manifold" else 0


def image_size(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images of a batch; None for texts."""
    return (inputs[PIXELS].shape[-2], inputs[PIXELS].shape[-1]) if PIXELS in inputs else None


def take_rows(batch: Mapping[str, Any], rows_B: Tensor) -> dict[str, Any]:
    """Return some rows of the tensors of a batch; numbers stay."""
    return {name: value[rows_B] if torch.is_tensor(value) and value.ndim else value for name, value in batch.items()}


def mixing_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Return the modules whose outputs ManifoldMix may mix, in order: blocks, or the children of a plain sequence."""
    return list(model.children())[:-1] if isinstance(model, nn.Sequential) else blocks(model)


def mixed_inputs(inputs: Mapping[str, Any], mix: Mix, layer: int = 0) -> dict[str, Any]:
    """Return the inputs of a mixed forward pass: mixed images at layer 0, and the tokens that are seen.

    Args:
        inputs: of the unmixed rows: `pixel_values` [B, C, H, W] (or [B, D]), or `input_ids` with `attention_mask`.
        mix: rows and shares, of as many rows as the inputs (images at layer 0: of any number).
        layer: 0 for the inputs (texts: embeddings), n for the output of block n. Default 0.
    """
    changed = dict(inputs)
    if "attention_mask" in inputs:
        changed["input_ids"] = mix.tokens(inputs["input_ids"], inputs["attention_mask"])
        changed["attention_mask"] = mix.visible(inputs["attention_mask"])
    if layer == 0 and PIXELS in inputs:
        changed[PIXELS] = mix.combine(inputs[PIXELS])
    return changed


@contextmanager
def mixed_forward(model: nn.Module, inputs: Mapping[str, Any], mix: Mix, layer: int = 0) -> Iterator[None]:
    """Average the rows at a layer in this context; nothing to do for images at layer 0. Arguments as `mixed_inputs`.

    Embeddings of padding count as zeros; above them, a row's padding holds tokens of its partners.

    Raises:
        IntaglioError: the model has no such layer, or recomputes it for the gradient.
    """
    if layer == 0 and PIXELS in inputs:
        yield
        return

    def average(module: nn.Module, args: Any, output: Any) -> Any:
        return (mix.average(output[0]), *output[1:]) if isinstance(output, tuple) else mix.average(output)

    def average_tokens(module: nn.Module, args: Any, embedded_BLD: Tensor) -> Tensor:
        return mix.average(embedded_BLD * inputs["attention_mask"][..., None].to(embedded_BLD))

    module = input_embeddings(model) if layer == 0 else _block(model, layer)
    handle = module.register_forward_hook(average if layer else average_tokens)
    try:
        yield
    finally:
        handle.remove()


def input_embeddings(model: nn.Module) -> nn.Module:
    """Return the embeddings at which texts are mixed."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    if getter is None:
        raise IntaglioError(f"{type(model).__name__} has no input embeddings at which texts could be mixed")
    embeddings: nn.Module = getter()
    return embeddings


def _block(model: nn.Module, layer: int) -> nn.Module:
    every = mixing_layers(model)
    if layer > len(every):
        raise IntaglioError(f"layers names {layer}; this model has blocks 1 to {len(every)}, and 0 for its inputs")
    if getattr(every[layer - 1], "gradient_checkpointing", False):
        raise IntaglioError("mix is manifold, but gradient checkpointing runs blocks again without the mix; give"
                            " layers: [0], or gradient_checkpointing: false")  # fmt: skip
    return every[layer - 1]


class MixingSession(ModifierSession):
    """Base of sessions that mix the rows of a batch; `mix`, `layer` and `unmixed` are those of the batch at hand.

    Args:
        run: the training run.
        name: slug of the method, the key of its draws.

    Raises:
        IntaglioError: the objective does not classify.
    """

    def __init__(self, run: TrainingRun, name: str) -> None:
        if getattr(run.objective, "trains_on", "") != "classes":
            raise IntaglioError(f"{name} mixes examples with classes; give the objective classification")
        self.run, self.name = run, name
        self.step = 1
        self.mix: Mix | None = None
        self.layer = 0
        self.unmixed: Batch = {}
        self.samples: list[dict[str, Any]] = []

    def before_step(self, step: int, batch: Batch) -> None:
        """Note the step, by which draws are keyed."""
        self.step = step

    def rng(self, batch: Batch) -> torch.Generator:
        """Return the generator of a batch, always in its first state."""
        return generator(self.run.seed, self.name, self.step, *batch["id"].tolist())

    @property
    def binary(self) -> bool:
        """Whether the objective's loss is binary cross-entropy."""
        return getattr(self.run.objective, "loss_type", "") == "binary_cross_entropy"

    def need_cross_entropy(self, what: str) -> None:
        """Refuse an objective whose loss is not 0 under targets of zero."""
        goal = self.run.objective
        smoothing = getattr(goal, "label_smoothing", 0.0)
        if self.binary or smoothing:
            given = "loss_type is binary_cross_entropy" if self.binary else f"label_smoothing is {smoothing}"
            raise IntaglioError(f"{given}; {what} need cross_entropy without label smoothing")

    def targets(self, model: nn.Module, batch: Batch, mix: Mix) -> Tensor:
        """Return the mixed targets of a batch; those of an earlier modifier are averaged as they are."""
        if "targets" in batch:
            return mix.average(batch["targets"])
        return mixed_targets(mix, batch["labels"], num_classes(model))

    def without_loss(self, model: nn.Module, batch: Batch) -> Batch:
        """Return a batch with targets of zero, so that the objective's own loss is 0."""
        labels_B = batch["labels"]
        return {**batch, "targets": torch.zeros(len(labels_B), num_classes(model), device=labels_B.device)}

    def forward_context(self, model: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
        """Mix hidden states or embeddings."""
        return nullcontext() if self.mix is None else mixed_forward(model, self.unmixed, self.mix, self.layer)

    def logits(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Return the logits of further inputs, in the run's precision."""
        rows = {name: value for name, value in self.without_loss(model, inputs).items() if name != "id"}
        logits_BC: Tensor = self.run.loss(rows).outputs.logits
        return logits_BC

    def state_dict(self) -> dict[str, Any]:
        """Return the samples for the report."""
        return {"samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the samples."""
        self.samples = list(state["samples"])

    def keep_samples(self, batch: Batch, mixed: Batch, mix: Mix) -> None:
        """Keep the first mixed rows of the run for the report, images as small PNG files."""
        if self.samples:
            return
        names = getattr(getattr(self.run.model, "config", None), "id2label", None) or {}
        labels_BK, ids_BK = mix.labels(batch["labels"]).tolist(), mix.labels(batch["id"]).tolist()
        shares_BK = mix.shares_BK.detach().tolist()
        for row in range(min(SHOWN, len(mix.rows_BK))):
            classes = [names.get(label, str(label)) for label in labels_BK[row]]
            caption = " + ".join(f"{share:.2f} {name}" for share, name in zip(shares_BK[row], classes, strict=True))
            sample = {"caption": caption, "ids": ids_BK[row], "layer": self.layer}
            if self.layer == 0 and PIXELS in mixed and mixed[PIXELS].ndim == 4:
                sample["png"] = pixels_png(mixed[PIXELS][row])
            self.samples.append(sample)

    def report(self) -> dict[str, Any]:
        """Return the kept samples: images with the share of each class, or a table of the mixed rows."""
        pictures = [[sample["png"], sample["caption"]] for sample in self.samples if "png" in sample]
        if pictures:
            return {"thumbnails": [{"title": "Mixed samples", "items": pictures}]}
        rows = [
            [sample["caption"], str(sample["layer"]), " | ".join(self._excerpt(row) for row in sample["ids"])]
            for sample in self.samples
        ]
        table = {"title": "Mixed samples", "headings": ["Shares", "Layer", "Examples"], "rows": rows}
        return {"tables": [table]} if rows else {}

    def _excerpt(self, row: int) -> str:
        example = self.run.examples[row] if row < len(self.run.examples) else {}
        text = shown_example(self.run.checkpoint, dict(example)).get("text") if "input_ids" in example else None
        return shorten(text or f"row {row}")


def num_classes(model: nn.Module) -> int:
    """Return the number of a classifier's logits."""
    layer = logits_layer(model)
    if layer is None:
        raise IntaglioError(f"{type(model).__name__} has no linear layer with logits of classes")
    return layer.out_features
