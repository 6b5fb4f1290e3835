"""DecoupledMixup (Liu et al., NeurIPS 2023): mixup loss with a term for each mixed class against all but its partners.

The paper's terms have no factor r; the authors' code has r(lam) = lam by default, used here (`paper()` has r = 1).
Unlike the code, which reads classes off the targets and so may swap the factors of two classes, each class has its own
factor; a share of exactly one half keeps its terms, and every row may have shares of its own.

Source: Liu et al., Harnessing Hard Mixed Samples with Decoupled Regularizer, NeurIPS 2023, arXiv 2203.10761; code
Westlake-AI/openmixup.

Dimension letters: B rows, U unlabelled rows, K mixed examples, C classes.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.trainer.mixing import (
    Mix,
    Mixing,
    MixingSession,
    draw_shares,
    image_size,
    mixed_forward,
    mixed_inputs,
    mixed_targets,
    num_classes,
    soft_cross_entropy,
    take_rows,
)
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Batch, Loss, TrainingRun
from intaglio.trainer.shown_examples import PIXELS

Rescale = Literal["none", "power", "exponential"]
Group = Literal["labelled", "unlabelled", "both", "none"]
BCE_THRESHOLD = 0.8
"""Share from which a class is a full target of binary cross-entropy, by default."""


def decoupled_terms(logits_BC: Tensor, classes_BK: Tensor) -> Tensor:
    """Return -log phi of each mixed class without its partners, float [B, K]; 0 where a row has one class.

    Args:
        logits_BC: logits, float [B, C].
        classes_BK: mixed classes, int64 [B, K]; of equal ones in a row, the first has the term and the others 0.
    """
    mixed_BKC = F.one_hot(classes_BK, logits_BC.shape[-1]).bool()
    partners_BKC = mixed_BKC.any(1, keepdim=True) & ~mixed_BKC
    rest_BKC = logits_BC[:, None].masked_fill(partners_BKC, -math.inf)
    terms_BK = rest_BKC.logsumexp(-1) - logits_BC.gather(1, classes_BK)
    first_BK = ~_equal(classes_BK).tril(-1).any(-1)
    return torch.where(first_BK & (first_BK.sum(-1, keepdim=True) > 1), terms_BK, 0.0)


def class_shares(classes_BK: Tensor, shares_BK: Tensor) -> Tensor:
    """Return the share of each example's class: the sum over the examples of that class in its row, float [B, K]."""
    return (_equal(classes_BK) * shares_BK[:, None]).sum(-1).clamp(max=1)


def _equal(classes_BK: Tensor) -> Tensor:
    return classes_BK[:, :, None] == classes_BK[:, None, :]


def rescaled(shares: Tensor, how: Rescale, threshold: float, exponent: float) -> Tensor:
    """Return r of shares: 1 from the threshold xi on; below, (share / xi)^t or a rising exponential from r(0) = 0.

    Args:
        shares: shares in [0, 1], of any shape.
        how: `none` returns ones, `power` (share / xi)^t, `exponential` (t^(2 share) - 1) / (t^(2 xi) - 1).
        threshold: xi, in (0, 1].
        exponent: t, above 0; for `exponential` the base, not 1.
    """
    if how == "none":
        return torch.ones_like(shares)
    if how == "power":
        below = (shares / threshold) ** exponent
    else:
        below = (exponent ** (2 * shares) - 1) / (exponent ** (2 * threshold) - 1)
    return torch.where(shares >= threshold, 1.0, below)


class DecoupledMixup(Mixing, slug="decoupled_mixup"):
    """Mixup, CutMix or ManifoldMix with the decoupled loss, for classifiers of images and of texts.

        phi_ab = exp(z_a) / sum_{c != b} exp(z_c)                    softmax without the partner's class
        L = -[lam log p_a + (1 - lam) log p_b] - eta r(lam) log phi_ab - eta r(1 - lam) log phi_ba

    Softmax couples the mixed classes: raising p_a lowers p_b. The added terms do not, so both classes may be confident,
    while the first part keeps their ratio. Of K mixed classes, each term leaves out the K - 1 others. A row whose
    examples have one class is plain cross-entropy. Under binary cross-entropy the classes are not coupled, and the
    targets become r(lam) y_a + r(1 - lam) y_b.

    In a recipe: `train: {classes: images/, modifiers: [{decoupled_mixup: {mix: cutmix}}], epochs: 20}`. Partners are
    rows of one batch, in a distributed run of one process. Under the objective `classification: {loss_type:
    binary_cross_entropy}` targets are rescaled instead.

    With rows that have no label (`classification: {unlabelled: NAME}`), the loss has four parts: cross-entropy of the
    labelled rows; the mixed loss among them; the mixed loss of each labelled row with an unlabelled row; and FixMatch's
    cross-entropy of unlabelled rows. Labels of unlabelled rows are the model's predictions in evaluation mode, where
    they are confident. The third part rises with step n of N by (1 - cos(pi n / N)) / 2.

    In a stock Trainer, with `rows = training_rows(objective, checkpoint, examples, rng)`:

        module = ObjectiveModule(checkpoint, objective, [DecoupledMixup()], rows, steps=100)
        collate = EpochCollator(objective, rng, ids=True)
        arguments = TrainingArguments("out", max_steps=100, remove_unused_columns=False)
        Trainer(module, arguments, collate, rows, callbacks=[module.callback]).train()
        module.detach()

    Source: Liu et al., Harnessing Hard Mixed Samples with Decoupled Regularizer, NeurIPS 2023; semi-supervised parts
    from the authors' DMixMatch, without its moving average of weights.

    Args:
        eta: weight of the decoupled terms, at least 0. Default 0.1.
        terms: `both` mixed classes have a term; `more`: only the first if its share reaches `terms_threshold`, else
            only the second; `less`: the opposite; the latter two for two folds. Default `both`.
        terms_threshold: share at which `more` and `less` switch, 0 to 1. Default 0.5.
        rescale: factor r of each term (of each target of binary cross-entropy) as a function of its share: `none` (1),
            `power` or `exponential`. Default `power`.
        rescale_threshold: share xi from which r is 1, in (0, 1]. Default 1; with binary cross-entropy 0.8.
        rescale_exponent: t of the power, or the base of the exponential, above 0. Default 1: linear.
        two_hot_scale: factor of the targets of binary cross-entropy, in (0, 1]. Default 1.
        negative_weight: weight of absent classes in binary cross-entropy, 0 to 1. Default 1.
        decoupled: which class of a labelled and an unlabelled row has a term: `labelled`, `unlabelled`, `both` or
            `none`. Default `labelled`.
        larger_share: which of them gets the larger share: `labelled`, `unlabelled` or `random`. Default `labelled`.
        confidence: least probability of a prediction that becomes a label, in (0, 1]. Default 0.95.
        mix_confidence: the same for mixes, at most `confidence`; where the unlabelled share is larger, the probability
            must reach that share, or `confidence`. Default 0.95.
        labelled_mix_weight: weight of the mixed loss among labelled rows, at least 0. Default 1.
        unlabelled_mix_weight: final weight of the mixed loss of labelled with unlabelled rows, at least 0. Default 1.
        unlabelled_weight: weight of the cross-entropy of unlabelled rows, at least 0. Default 1.

    Raises:
        IntaglioError: (in training) the objective classifies nothing, `cutmix` meets texts, `layers` names a missing
            block or one that is recomputed for the gradient, or unlabelled rows meet another loss than cross-entropy.
    """

    kinds = ("modifier",)
    summary = "mixes training examples, and lets the model be sure of both mixed classes at once"
    citation = "Liu et al., Harnessing Hard Mixed Samples with Decoupled Regularizer, NeurIPS 2023"
    url = "https://arxiv.org/abs/2203.10761"

    eta: Annotated[float, Field(ge=0)] = 0.1
    terms: Literal["both", "more", "less"] = "both"
    terms_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    rescale: Rescale = "power"
    rescale_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    rescale_exponent: Annotated[float, Field(gt=0)] = 1.0
    two_hot_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    negative_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    decoupled: Group = "labelled"
    larger_share: Literal["labelled", "unlabelled", "random"] = "labelled"
    confidence: Annotated[float, Field(gt=0, le=1)] = 0.95
    mix_confidence: Annotated[float, Field(gt=0, le=1)] = 0.95
    labelled_mix_weight: Annotated[float, Field(ge=0)] = 1.0
    unlabelled_mix_weight: Annotated[float, Field(ge=0)] = 1.0
    unlabelled_weight: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.terms != "both" and self.folds != 2:
            raise ValueError(f"terms is {self.terms!r}, which compares two classes; folds is {self.folds}")
        if self.rescale == "exponential" and self.rescale_exponent == 1:
            raise ValueError("rescale_exponent is 1, at which the exponential is flat; another base is accepted")
        if self.mix_confidence > self.confidence:
            raise ValueError(f"mix_confidence is {self.mix_confidence}; at most confidence, {self.confidence}, fits")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's terms, which do not depend on the share."""
        return cls(**{"rescale": "none", **overrides})

    def terms_loss(self, logits_BC: Tensor, mix: Mix, labels_B: Tensor, decoupled_K: Tensor | None = None) -> Tensor:
        """Return eta times the weighted decoupled terms of each mixed row, float [B].

        Args:
            logits_BC: logits of the mixed rows.
            mix: rows and shares; its rows index `labels_B`.
            labels_B: class of each unmixed row, int64.
            decoupled_K: which of the mixed examples have terms, bool [K]. Default: all.
        """
        classes_BK = mix.labels(labels_B)
        shares_BK = class_shares(classes_BK, mix.shares_BK.to(logits_BC))
        weights_BK = rescaled(shares_BK, self.rescale, self.rescale_threshold or 1.0, self.rescale_exponent)
        if self.terms != "both":
            first_B = (shares_BK[:, 0] >= self.terms_threshold) == (self.terms == "more")
            weights_BK = weights_BK * torch.stack([first_B, ~first_B], 1)
        if decoupled_K is not None:
            weights_BK = weights_BK * decoupled_K.to(weights_BK.device)
        return self.eta * (weights_BK * decoupled_terms(logits_BC, classes_BK)).sum(-1)

    def mixed_losses(self, logits_BC: Tensor, mix: Mix, labels_B: Tensor, decoupled_K: Tensor | None = None) -> Tensor:
        """Return mixup cross-entropy plus decoupled terms of each mixed row, float [B]; arguments as `terms_loss`."""
        targets_BC = mixed_targets(mix, labels_B, logits_BC.shape[-1]).to(logits_BC)
        return soft_cross_entropy(logits_BC, targets_BC) + self.terms_loss(logits_BC, mix, labels_B, decoupled_K)

    def two_hot_targets(self, mix: Mix, labels_B: Tensor, classes: int) -> Tensor:
        """Return targets of binary cross-entropy, scale * sum_k r(share) y_k, at most 1, float [B, C]."""
        classes_BK = mix.labels(labels_B)
        shares_BK = class_shares(classes_BK, mix.shares_BK.to(classes_BK.device))
        threshold = self.rescale_threshold or BCE_THRESHOLD
        targets_BK = rescaled(shares_BK, self.rescale, threshold, self.rescale_exponent)
        targets_BC = torch.zeros(len(classes_BK), classes, device=labels_B.device)
        # Of equal classes the first counts, with the sum of the shares.
        targets_BK = targets_BK * ~_equal(classes_BK).tril(-1).any(-1)
        return (targets_BC.scatter_add(1, classes_BK, targets_BK) * self.two_hot_scale).clamp(max=1)

    def attach(self, run: TrainingRun) -> DecoupledSession:
        """Begin mixing."""
        return DecoupledSession(self, run)


class DecoupledSession(MixingSession):
    """Mixing at work: the objective computes the loss with mixed targets, `extra_loss` adds everything else."""

    def __init__(self, method: DecoupledMixup, run: TrainingRun) -> None:
        super().__init__(run, method.slug)
        self.method = method

    def change_batch(self, model: nn.Module, batch: Batch) -> Batch:
        """Return the mixed batch; of a batch with unlabelled rows, the labelled ones unmixed."""
        self.mix, self._rng, self.unmixed = None, self.rng(batch), batch
        known_B = batch["labels"] >= 0
        self._labelled, self._unlabelled = known_B.nonzero().flatten(), (~known_B).nonzero().flatten()
        if len(self._unlabelled):
            self.need_cross_entropy("unlabelled rows")
            return take_rows(batch, self._labelled) if len(self._labelled) else self.without_loss(model, batch)
        self._draw(batch)
        if self.mix is None:
            return batch
        changed = mixed_inputs(batch, self.mix, self.layer)
        self.keep_samples(batch, changed, self.mix)
        return {**changed, "targets": self._targets(model, batch, self.mix)}

    def _targets(self, model: nn.Module, batch: Batch, mix: Mix) -> Tensor:
        if self.binary:
            return self.method.two_hot_targets(mix, batch["labels"], num_classes(model))
        return self.targets(model, batch, mix)

    def _draw(self, batch: Batch) -> None:
        self.mix = self.method.draw(len(batch["labels"]), self._rng, image_size(batch))
        self.layer = self.method.draw_layer(self._rng)

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        """Return the decoupled terms; with unlabelled rows, also their parts of the loss."""
        method = self.method
        if len(self._unlabelled):
            return self._semi_supervised(model)
        if self.binary:
            absent_BC = outputs.targets == 0
            less = (method.negative_weight - 1) * (F.softplus(outputs.logits) * absent_BC).sum(-1).mean()
            return Loss(less) if method.negative_weight < 1 else None
        if self.mix is None:
            return None
        terms = method.terms_loss(outputs.logits, self.mix, batch["labels"]).mean()
        return Loss(terms, {"decoupled": terms})

    def _semi_supervised(self, model: nn.Module) -> Loss:
        """Return the weighted parts of a batch with unlabelled rows, but for the plain loss of labelled rows."""
        method, rest = self.method, take_rows(self.unmixed, self._unlabelled)
        done = min(1.0, self.step / max(1, self.run.steps))
        probs_U, guesses_U = self._predicted(model, rest)
        sure_U = (probs_U >= method.confidence).float()
        losses_U = F.cross_entropy(self.logits(model, rest), guesses_U, reduction="none")
        parts = {"unlabelled": (losses_U * sure_U).mean()}
        total = method.unlabelled_weight * parts["unlabelled"]
        if len(self._labelled):
            parts["mixed"] = self._mixed(model, take_rows(self.unmixed, self._labelled))
            parts["mixed with unlabelled"] = self._with_unlabelled(model, probs_U, guesses_U)
            rising = method.unlabelled_mix_weight * (1 - math.cos(math.pi * done)) / 2
            total = total + method.labelled_mix_weight * parts["mixed"] + rising * parts["mixed with unlabelled"]
        return Loss(total, {**parts, "confident": sure_U.mean()})

    def _mixed(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mixed loss of labelled rows."""
        self._draw(batch)
        mix, changed = self.mix, batch
        if mix is None:
            return F.cross_entropy(self.logits(model, batch), batch["labels"])
        changed = mixed_inputs(batch, mix, self.layer)
        self.keep_samples(batch, changed, mix)
        with mixed_forward(model, batch, mix, self.layer):
            logits_BC = self.logits(model, changed)
        return self.method.mixed_losses(logits_BC, mix, batch["labels"]).mean()

    @torch.no_grad()
    def _predicted(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return probability and index of the likeliest class of unlabelled rows, in evaluation mode."""
        with preserve_modes(model):
            model.eval()
            best = self.logits(model, batch).softmax(-1).max(-1)
        return best.values, best.indices

    def _with_unlabelled(self, model: nn.Module, probs_U: Tensor, guesses_U: Tensor) -> Tensor:
        """Return the mean mixed loss of each labelled row with an unlabelled row, 0 where that is uncertain."""
        method, count, others = self.method, len(self._labelled), len(self._unlabelled)
        partner_B = torch.randperm(others, generator=self._rng).repeat(-(-count // others))[:count]
        partner_B = partner_B.to(guesses_U.device)
        rows, known_B = torch.cat([self._labelled, self._unlabelled[partner_B]]), self.unmixed["labels"][self._labelled]
        pairs = {**take_rows(self.unmixed, rows), "labels": torch.cat([known_B, guesses_U[partner_B]])}
        mix, layer = self._draw_pairs(pairs, count), method.draw_layer(self._rng)
        if layer == 0 and PIXELS in pairs:
            changed = {PIXELS: mix.combine(pairs[PIXELS]), "labels": pairs["labels"][:count]}
            logits_BC = self.logits(model, changed)
        else:  # hidden states are mixed within the rows of a forward pass
            whole = mix.padded(2 * count)
            with mixed_forward(model, pairs, whole, layer):
                logits_BC = self.logits(model, mixed_inputs(pairs, whole, layer))[:count]
        kept_K = torch.tensor([method.decoupled in (name, "both") for name in ("labelled", "unlabelled")])
        losses_B = method.mixed_losses(logits_BC, mix, pairs["labels"], kept_K)
        least_B = mix.shares_BK[:, 1].clamp(min=method.mix_confidence, max=method.confidence).to(probs_U)
        return (losses_B * (probs_U[partner_B] >= least_B)).mean()

    def _draw_pairs(self, pairs: Batch, count: int) -> Mix:
        """Return mixes of row n with row count + n, the larger share as the method says."""
        method, ordered = self.method, self.method.larger_share != "random"
        shares_BK = draw_shares(
            count, 2, method.alpha, self._rng, per_example=method.per_example, largest_first=ordered
        )
        if method.larger_share == "unlabelled":
            shares_BK = shares_BK.flip(1)
        return method.place(torch.arange(2 * count).reshape(2, count).T, shares_BK, image_size(pairs), self._rng)
