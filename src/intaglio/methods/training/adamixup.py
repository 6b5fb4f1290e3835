"""AdaMixUp (Guo et al., AAAI 2019): mixup with shares from a region that a network chooses for each pair of examples.

The authors' code passes each kept row through the network twice, for classifier and psi; here all rows share a pass.

Source: Guo, Mao and Zhang, MixUp as Locally Linear Out-Of-Manifold Regularization, AAAI 2019, arXiv 1809.02499; code
SITE5039/AdaMixUp.

Dimension letters: B rows of a batch, P = B // 2 mixed rows, M = P + B rows of the pass, K folds, C classes, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Method, TrainingData, Workload
from intaglio.modeling.classifier import logits_layer
from intaglio.modeling.replacement import module_names, replace_modules
from intaglio.trainer.classification import classifier_outputs
from intaglio.trainer.fsdp import is_sharded
from intaglio.trainer.mixing import (
    Mix,
    MixingSession,
    draw_rows,
    draw_shares,
    input_embeddings,
    mixed_inputs,
    take_rows,
)
from intaglio.trainer.protocols import Batch, Loss, TrainingRun
from intaglio.trainer.rng import generator
from intaglio.trainer.shown_examples import PIXELS

CHANNELS, POLICY_UNITS = 32, 100
"""Channels of the small policy network, and units before its softmax."""
INITIAL_STD = 1e-3
"""Standard deviation of the first weights of the policy's and the discriminator's last layers."""
DELTA = 1
"""Position of delta in the softmax."""


def region_shares(region_PR: Tensor, uniform_PK: Tensor) -> Tensor:
    """Return shares s = a + delta u, float [P, K], differentiable in the region.

    Args:
        region_PR: (a_1, delta, a_2, ...), float [P, K + 1], each row with the sum 1.
        uniform_PK: points of the simplex, float [P, K].
    """
    delta_P1 = region_PR[:, DELTA : DELTA + 1]
    least_PK = torch.cat([region_PR[:, :DELTA], region_PR[:, DELTA + 1 :]], 1)
    return least_PK + delta_P1 * uniform_PK


class AdaMixUp(Method, slug="adamixup"):
    """Mixup with a learned region of shares, for classifiers of images and of texts, which mix at their embeddings.

        (a_1, delta, a_2, ..., a_K) = softmax(pi(x_1, ..., x_K)),     s = a + delta u,    u uniform on the simplex
        L = L_cls + w L_intr,    L_intr = -mean log psi(real or mixed)

    s_k is the share of example k in a mix, drawn from the region that the policy pi chooses; the discriminator psi
    tells real from mixed points. Policy, classifier and discriminator minimise L together; none is adversarial. Of a
    batch, the first half is mixed with partners and also kept as it is, the second half is only seen by psi, as further
    real examples. The classifier's loss is the mean over mixed and kept rows, psi's over all: a mixed point that looks
    real may lie on the data of another class, so pi learns to avoid it. Of two folds, s_1 = a_1 + delta u lies in [a_1,
    1 - a_2], u uniform in [0, 1]. The paper's parameters for three folds are not in its code; the same rule on the
    simplex is used here.

    In a recipe: `train: {classes: images/, modifiers: [{adamixup: {}}], epochs: 20}`. Policy and discriminator are
    dropped at the end. The log has the means of a_1 (`least share`), delta (`width`) and the smallest share (`smallest
    share`): near 0, the policy has stopped mixing. A discriminator that always answers "real" has an intrusion loss of
    0.6365.

    In a stock Trainer, with `rows = training_rows(objective, checkpoint, examples, rng)`:

        module = ObjectiveModule(checkpoint, objective, [AdaMixUp()], rows, steps=100)
        collate = EpochCollator(objective, rng, ids=True)
        arguments = TrainingArguments("out", max_steps=100, remove_unused_columns=False)
        Trainer(module, arguments, collate, rows, callbacks=[module.callback]).train()
        module.detach()

    Source: Guo, Mao and Zhang, MixUp as Locally Linear Out-Of-Manifold Regularization, AAAI 2019.

    Args:
        folds: examples K in a mix, 2 or 3. Default 2.
        intrusion_weight: weight w of the discriminator's loss, at least 0; 0 trains without it. Default 1.
        policy: network of the policy: `small` (four convolutions; of texts, a perceptron on mean embeddings) or `copy`
            (a copy of the classifier with weights of its own, which begin as the classifier's). Default `small`.
        region: (a_1, delta, a_2, ...), K + 1 numbers with the sum 1, instead of a policy. Default: learned.
        hidden_size: units of the small policy's hidden layer. Default 512.
        dropout: dropout rate after that layer, 0 to below 1. Default 0.5.

    Raises:
        IntaglioError: (in training) the objective is not classification by plain cross-entropy, the data is a stream,
            or rows have no label.
    """

    kinds = ("modifier",)
    summary = "learns how far each pair of training examples may be mixed before it runs into other data"
    citation = "Guo et al., MixUp as Locally Linear Out-Of-Manifold Regularization, AAAI 2019"
    url = "https://arxiv.org/abs/1809.02499"

    trains_on: ClassVar[TrainingData] = "classes"
    sets_targets: ClassVar[bool] = True

    folds: Annotated[int, Field(ge=2, le=3)] = 2
    intrusion_weight: Annotated[float, Field(ge=0)] = 1.0
    policy: Literal["small", "copy"] = "small"
    region: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    hidden_size: Annotated[int, Field(ge=1)] = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _whole_region(self) -> Self:
        if self.region is not None and (len(self.region) != self.folds + 1 or abs(sum(self.region) - 1) > 1e-6):
            raise ValueError(f"region is {self.region}; {self.folds + 1} numbers with the sum 1 are accepted")
        return self

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost of the mixed rows, half a batch more, and of a policy as large as the classifier."""
        copied = self.policy == "copy" and self.region is None
        return Cost(flops=steps * pass_flops * (1.0 if copied else 0.5), extra_bytes=16 * workload.parameters * copied)

    def attach(self, run: TrainingRun) -> AdaMixUpSession:
        """Create policy and discriminator."""
        return AdaMixUpSession(self, run)


class AdaMixUpSession(MixingSession):
    """Policy and discriminator at work."""

    def __init__(self, method: AdaMixUp, run: TrainingRun) -> None:
        super().__init__(run, method.slug)
        self.need_cross_entropy("the unmixed rows of adamixup")
        self.method, self.checked, layer = method, False, logits_layer(run.model)
        if not run.examples or layer is None:
            raise IntaglioError("adamixup needs its training data in memory, and a model with a linear layer of logits")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(run.seed, method.slug).initial_seed())
            self.policy = None if method.region is not None else _policy(method, run.model, run.examples[0])
            # As in the authors' code, as many hidden units as classes.
            self.discriminator = nn.Sequential(
                _flat_linear(layer.in_features, layer.out_features), _flat_linear(layer.out_features, 2)
            )
        self.networks = nn.ModuleList([self.discriminator, *([] if self.policy is None else [self.policy])])
        self.networks.to(run.checkpoint.device).train()

    def before_step(self, step: int, batch: Batch) -> None:
        """Refuse sharded weights at the first step."""
        super().before_step(step, batch)
        if not self.checked and is_sharded(self.run.model):
            raise IntaglioError("adamixup needs whole weights, and FSDP has sharded them")
        self.checked = True

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the parameters of policy and discriminator; all decay, as in the authors' code."""
        return [{"params": list(self.networks.parameters()), "weight_decay": self.run.weight_decay}]

    def state_dict(self) -> dict[str, Any]:
        """Return samples and the policy's buffers, such as means of its normalisation layers."""
        return {**super().state_dict(), "buffers": dict(self.networks.named_buffers())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore samples and buffers."""
        super().load_state_dict(state)
        for name, value in self.networks.named_buffers():
            value.copy_(state["buffers"][name])

    def change_batch(self, model: nn.Module, batch: Batch) -> Batch:
        """Return mixed rows [P], then all rows [B]; targets of those that only the discriminator sees are 0."""
        count, labels_B = len(batch["labels"]), batch["labels"]
        self.mix, self._pairs, pairs = None, 0, count // 2
        if bool((labels_B < 0).any()):
            raise IntaglioError("the batch has rows without a label, which adamixup does not take; see decoupled_mixup")
        if not pairs:
            return batch
        rng, folds, device = self.rng(batch), self.method.folds, labels_B.device
        rows_PK = draw_rows(count, folds, rng)[:pairs].to(device)
        uniform_PK = draw_shares(pairs, folds, 1.0, rng, per_example=True).to(device)
        self._region = self._regions(model, batch, rows_PK, rng)
        self._pairs, order = pairs, torch.cat([torch.arange(pairs), torch.arange(count)]).to(device)
        # Row n of the batch is row pairs + n of the pass, where its embeddings are.
        rows_PK = torch.cat([rows_PK[:, :1], rows_PK[:, 1:] + pairs], 1)
        self.mix = Mix(rows_PK, region_shares(self._region, uniform_PK)).padded(len(order))
        self.unmixed = whole = take_rows(batch, order)
        changed = mixed_inputs(whole, self.mix)
        self.keep_samples(whole, changed, self.mix)
        seen_M = torch.arange(len(order), device=device) < 2 * pairs
        scale = len(order) / (2 * pairs)  # the objective divides by all rows, the paper by mixed and kept ones
        return {**changed, "targets": self.targets(model, whole, self.mix) * seen_M[:, None] * scale}

    def _regions(self, model: nn.Module, batch: Batch, rows_PK: Tensor, rng: torch.Generator) -> Tensor:
        """Return the region of each pair, float [P, K + 1]."""
        if self.policy is None:
            return torch.tensor(self.method.region, device=rows_PK.device).expand(len(rows_PK), -1)
        if PIXELS in batch:
            gated = self._gated(batch[PIXELS], rows_PK, rng)
            return self._softmax(gated if self.method.policy == "small" else {PIXELS: gated})
        with torch.no_grad():  # the policy has weights of its own
            hidden_BLD = input_embeddings(model)(batch["input_ids"]) * batch["attention_mask"][..., None]
        gated = self._gated(hidden_BLD, rows_PK, rng)
        pair = mixed_inputs(batch, Mix(rows_PK, torch.ones_like(rows_PK)))
        if self.method.policy == "small":
            return self._softmax(gated.sum(1) / pair["attention_mask"].sum(1, keepdim=True))
        handle = input_embeddings(self.policy).register_forward_hook(lambda module, args, output: gated)
        try:
            return self._softmax(pair)
        finally:
            handle.remove()

    def _gated(self, x: Tensor, rows_PK: Tensor, rng: torch.Generator) -> Tensor:
        """Return (1 / K) sum_k m_k x_k, the policy's view of each pair; m has truncated standard normal entries."""
        seed = int(torch.randint(2**62, (), generator=rng))
        source, gated = torch.Generator(x.device).manual_seed(seed), torch.zeros_like(x[rows_PK[:, 0]])
        for k in range(rows_PK.shape[1]):
            gate = nn.init.trunc_normal_(torch.empty_like(gated), generator=source)
            gated = gated + gate * x[rows_PK[:, k]]
        return gated / rows_PK.shape[1]

    def _softmax(self, view: Any) -> Tensor:
        assert self.policy is not None
        scores = classifier_outputs(self.policy, view)[0] if isinstance(view, dict) else self.policy(view)
        region_PR: Tensor = scores.float().softmax(-1)
        return region_PR

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        """Return the weighted intrusion loss."""
        if self.mix is None:
            return None
        pairs, shares_PK = self._pairs, self.mix.shares_BK[: self._pairs]
        right = outputs.logits[: 2 * pairs].argmax(1) == batch["targets"][: 2 * pairs].argmax(1)
        parts = {
            "accuracy": right.float().mean(),
            "least share": self._region[:, 0].mean(),
            "width": self._region[:, DELTA].mean(),
            "smallest share": shares_PK.min(1).values.mean(),
        }
        if not self.method.intrusion_weight:
            return Loss(outputs.logits.new_zeros(()), parts)
        real_M = (torch.arange(len(outputs.features), device=outputs.features.device) >= pairs).long()
        intrusion = F.cross_entropy(self.discriminator(outputs.features.float()), real_M)
        return Loss(self.method.intrusion_weight * intrusion, {**parts, "intrusion": intrusion})


def _flat_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer whose outputs begin near 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=INITIAL_STD)
    nn.init.zeros_(layer.bias)
    return layer


def _policy(method: AdaMixUp, model: nn.Module, example: Mapping[str, Any]) -> nn.Module:
    """Return the policy network for examples like the given one."""
    units = method.folds + 1
    if method.policy == "copy":
        network = copy.deepcopy(model).requires_grad_(True)
        last = logits_layer(network)
        assert last is not None
        head = nn.Sequential(_flat_linear(last.in_features, POLICY_UNITS), _flat_linear(POLICY_UNITS, units))
        replace_modules(network, {module_names(network)[id(last)]: head})
        return network
    pixels = example.get(PIXELS)
    if pixels is not None and pixels.ndim == 3:
        body, width = [*_convolutions(pixels.shape[0]), nn.AdaptiveAvgPool2d(4), nn.Flatten()], 16 * CHANNELS
    else:
        body = [nn.Flatten()]
        width = int(input_embeddings(model).weight.shape[1] if pixels is None else pixels.numel())  # type: ignore[index]
    return nn.Sequential(
        *body,
        *(nn.Linear(width, method.hidden_size), nn.ReLU(), nn.Dropout(method.dropout)),
        *(_flat_linear(method.hidden_size, POLICY_UNITS), _flat_linear(POLICY_UNITS, units)),
    )


def _convolutions(channels: int) -> list[nn.Module]:
    """Return four convolutions with ReLU, the first and the third followed by pooling."""
    layers: list[nn.Module] = []
    for number in range(4):
        layers += [nn.Conv2d(CHANNELS if number else channels, CHANNELS, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if number in (0, 2) else []
    return layers
