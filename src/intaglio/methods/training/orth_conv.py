"""OrthConv (Achour et al. 2022): a regulariser of kernels that makes whole convolutions orthogonal.

- `modeling.convolutions`: kernels, autocorrelation, L_orth, singular values by FFT.
- `measures.conv_spectrum`, `intaglio inspect MODEL --spectrum`: the audit of a model.

The authors' code is not known; the code of Wang et al. (2020), from whom the regulariser comes, takes the unsquared
norm and the fixed padding 1, incomplete for a 3 x 3 kernel of stride 1, and leaves the first convolution out:
`OrthConv.wang`.

Source: Achour, Malgouyres and Mamalet, Existence, Stability and Scalability of Orthogonal Convolutional Neural
Networks, JMLR 23(347), 2022; Wang et al., Orthogonal Convolutional Neural Networks, CVPR 2020, code
samaonline/Orthogonal-Convolutional-Neural-Networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from intaglio.errors import IntaglioError
from intaglio.measures.conv_spectrum import layer_spectrum
from intaglio.methods.base import Method, ModelAspect
from intaglio.modeling.convolutions import CONVOLUTIONS, Kernel, convolutions, gram_distance
from intaglio.modeling.targets import check_patterns, select_layers
from intaglio.trainer.protocols import Batch, Loss, ModifierSession, TrainingRun
from intaglio.trainer.sparsity_mask import linear_modules

Form = Literal["convolution", "kernel", "spectral_norm"]
LARGEST, SIDE = 1 << 16, 8
"""Parameters of the largest layer whose singular values a report has, and the side of its input."""


class OrthConv(Method, slug="orth_conv"):
    """Training modifier that keeps the singular values of convolutions near 1.

        L = task loss + lambda sum_l L_orth(K_l)
        L_orth(K) = ||A - I0||_F^2 - max(0, M - C S^2),    A = conv(K, K), stride S, zero padding floor((k - 1) / S) S

    A is the autocorrelation of a kernel of M filters with C channels, I0 an identity at its centre. For circular
    padding and an N x N output, N^2 L_orth is the squared distance of the convolution's matrix from orthogonality, so a
    small L_orth keeps all singular values near 1 at any image size. The Gram matrix of the reshaped kernel, ||W W^T -
    I||, does not.

    In a recipe: `train: {modifiers: [{orth_conv: {regularization_weight: 0.1}}], ...}`; the loss has the part `orth`,
    the sum without lambda, and the report has the singular values of small layers. In a stock `Trainer`, with one batch
    an optimizer step:

        class Regularized(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **more):
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
                loss = loss + regularizer.regularization_weight * regularizer.penalty(model)
                return (loss, outputs) if return_outputs else loss

    The identity with the convolution's matrix needs circular padding (`padding_mode="circular"`) and inputs of at least
    2 k - 1 pixels; with zero padding an orthogonal convolution is essentially 1 x 1, and the singular values leave out
    the borders. No orthogonal convolution exists for M >= C S^2 where S > k, or for M <= C S^2 where M > C k^2. Where
    M = C S^2 descent often ends in local minima. Groups are regularised one by one, dilated kernels with zeros between
    their taps. Weight decay on the same kernels pulls against L_orth, and batch normalisation rescales what it made.

    Args:
        regularization_weight: lambda, at least 0. Default 0.1; the paper varies it over orders of magnitude to trade
            accuracy for orthogonality.
        form: `convolution` (default, L_orth), or a baseline: `kernel`, ||W W^T - I||_F^2 of the kernel reshaped to
            M x C k^2 (of its smaller Gram matrix), or `spectral_norm`, torch's division of the reshaped kernel by its
            largest singular value, which has no lambda.
        squared: whether the norm of a layer is squared. Default True; Wang et al. do not square, and the gradient of
            the norm itself is undefined at 0 (0 is taken).
        linear: whether linear layers are regularised too, by ||W^T W - I||_F^2 of the smaller Gram matrix, or divided
            by their largest singular value; heads are not. Default False.
        padding: zero padding of the autocorrelation. Default: floor((k - 1) / S) S of each dimension; Wang et al.'s is
            1, which for a stride of 2 leaves out the shift 0, so that their identity stands at another shift.
        skip_first: whether the first convolution is left out. Default False.
        ignore: layers that are left out, by name or shell pattern. Default: none.

    Raises:
        IntaglioError: (when a run begins) no layer is left to regularise, or none of them is trained.

    Source: Achour et al., Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks, JMLR
    23(347), 2022.
    """

    kinds = ("modifier",)
    summary = "regularises kernels so that convolutions neither amplify nor shrink their inputs, at any image size"
    citation = (
        "Achour et al., Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks, JMLR 23(347),"
        " 2022"
    )
    url = "https://arxiv.org/abs/2108.05623"

    trains_weights: ClassVar[bool] = True

    regularization_weight: Annotated[float, Field(ge=0)] = 0.1
    form: Form = "convolution"
    squared: bool = True
    linear: bool = False
    padding: Annotated[int, Field(ge=0)] | None = None
    skip_first: bool = False
    ignore: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.padding is not None and self.form != "convolution":
            raise ValueError(f"padding belongs to the form convolution; the form {self.form} has no autocorrelation")
        if self.form == "spectral_norm" and not self.squared:
            raise ValueError("squared belongs to a penalty; the form spectral_norm has none")
        return self

    @classmethod
    def wang(cls, **overrides: Any) -> Self:
        """Return the settings of Wang et al.'s code: unsquared, padding 1, without the first convolution."""
        return cls(**{"squared": False, "padding": 1, "skip_first": True, **overrides})

    @property
    def changes(self) -> frozenset[ModelAspect]:  # type: ignore[override]
        """The weights for the form that divides them; a penalty leaves them to the optimizer."""
        return frozenset({"weights"} if self.form == "spectral_norm" else ())

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers that are regularised, convolutions first.

        Raises:
            IntaglioError: there are none.
        """
        named = [*list(convolutions(model))[self.skip_first :], *(linear_modules(model).items() if self.linear else ())]
        names = [name for name, _ in named]
        if named:
            check_patterns(names, {"ignore": self.ignore})
        kept = [named[index] for index in select_layers(names, None, self.ignore)]
        if not kept:
            accepted = "a convolution or a linear layer" if self.linear else "a convolution, or linear: true,"
            raise IntaglioError(
                f"orth_conv has nothing to regularise in {type(model).__name__}; {accepted} that ignore and skip_first"
                " do not leave out is needed"
            )
        return kept

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the sum of the layers' penalties without lambda, a scalar with a gradient."""
        return torch.stack([self.layer_penalty(module) for _, module in self.layers(model)]).sum()

    def layer_penalty(self, module: nn.Module) -> Tensor:
        """Return the penalty of a layer: L_orth, or the distance of its Gram matrix from the identity."""
        if not isinstance(module, CONVOLUTIONS):
            value = gram_distance(module.weight)  # type: ignore[arg-type]
        elif self.form == "convolution":
            value = Kernel.from_module(module).orthogonality_loss(self.padding)
        else:
            value = torch.stack([gram_distance(own) for own in _reshaped(module)]).sum()
        # Rounding can leave a vanishing L_orth below zero; the root has no gradient there.
        return value if self.squared else torch.where(value > 0, value, 1.0).sqrt() * (value > 0)

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Return the session of a run."""
        layers = self.layers(run.model)
        if not any(parameter.requires_grad for _, module in layers for parameter in module.parameters()):
            raise IntaglioError("orth_conv regularises weights that are not trained; leave lora and freeze out")
        if self.form == "spectral_norm":
            return _SpectralNorm(layers, run.seed)
        return _Penalty(layers, self)


class _Spectra(ModifierSession):
    """Reports the singular values of the layers, those of large layers left out."""

    def __init__(self, layers: list[tuple[str, nn.Module]]) -> None:
        self.layers = layers

    def report(self) -> dict[str, Any]:
        spectra = [
            layer_spectrum(n, m, SIDE) for n, m in self.layers if sum(p.numel() for p in m.parameters()) <= LARGEST
        ]
        rows = [[s.name, *(f"{value:.3f}" for value in (s.loss, s.minimum, s.median, s.maximum))] for s in spectra]
        headings = ["layer", "L_orth", "least", "median", "largest"]
        title = f"Singular values after training, for inputs of side {SIDE}"
        return {"tables": [{"title": title, "headings": headings, "rows": rows}]} if rows else {}


class _Penalty(_Spectra):
    """Adds the penalty to the loss of every batch."""

    def __init__(self, layers: list[tuple[str, nn.Module]], method: OrthConv) -> None:
        super().__init__(layers)
        self.method = method

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        penalty = self.method.penalty(model)
        return Loss(self.method.regularization_weight * penalty, {"orth": penalty})


class _SpectralNorm(_Spectra):
    """Divides the reshaped kernels by their largest singular values, and bakes the quotients at the end."""

    def __init__(self, layers: list[tuple[str, nn.Module]], seed: int) -> None:
        super().__init__(layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the power iteration's vectors
            for _, module in layers:
                parametrizations.spectral_norm(module)

    def detach(self) -> None:
        for _, module in self.layers:
            module.eval()  # no further power iteration
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _reshaped(module: nn.Module) -> Iterator[Tensor]:
    """Yield the reshaped kernel of each group, M x C k^2."""
    weight, groups = module.weight, module.groups
    assert isinstance(weight, Tensor)
    assert isinstance(groups, int)
    yield from weight.unflatten(0, (groups, -1)).flatten(2)
