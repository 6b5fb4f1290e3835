"""ELR (Liu et al., NeurIPS 2020): predictions are pulled to their running averages, so that wrong labels stay out.

Differences from the released code, in which the two networks are trained in turn, an epoch each: here both take each
step, on the same rows with mixtures of their own; the averages begin as copies of their networks (there: as networks
drawn apart, which the first step all but replaces). The released schedule of the average counts from s + 1.

Source: Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, NeurIPS 2020, arXiv 2007.00151;
code shengliu66/ELR.

Dimension letters: N examples, B rows, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.soup import ema_update
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Method, TrainingData, Workload
from intaglio.modeling.classifier import head_modules, logits_layer
from intaglio.trainer import classification
from intaglio.trainer.classification import Classified, class_targets, classifier_outputs
from intaglio.trainer.fsdp import is_sharded
from intaglio.trainer.gathering import gather_rows
from intaglio.trainer.hf_trainer import decay_groups
from intaglio.trainer.label_report import label_report, suspicious_labels
from intaglio.trainer.mixing import Mix, draw_rows, draw_shares, mixed_forward, mixed_inputs
from intaglio.trainer.protocols import Batch, Loss, ModifierSession, TrainingRun
from intaglio.trainer.rng import generator

CLAMP = 1e-4
NETWORK = "network."
"""Prefix of the second network's tensors in the attachment."""


class ELR(Method, slug="elr"):
    """Early-learning regularisation: a training modifier for classifiers of texts and images with wrong labels.

        p_i = softmax(z_i), clamped to [1e-4, 1 - 1e-4]
        t_i <- beta t_i + (1 - beta) p_i / sum p_i                    (no gradient; before the loss)
        L = mean CE(z_i, y_i) + lambda mean log(1 - <t_i, p_i>)

    With two networks (ELR+), each has a weight average (EMA), a table of targets of its own and mixup:

        t_i <- beta t_i + (1 - beta) softmax(EMA of the other network on x_i)
        x' = l x + (1 - l) x[pairs],   y' and q likewise, from one-hot labels and t;   l ~ Beta(alpha, alpha), l >= 1/2
        L = mean CE(f(x'), y') + r(s) lambda mean log(1 - <q, p'>)     r(s) = exp(-5 (1 - s / S)^2) up to step S, then 1

    In a recipe: `train: {classes: FOLDER, validation: OTHER, epochs: 30, modifiers: [elr: {}]}`. The attachment `elr`
    holds the table `targets`, float32 [N, K]; the report names the labels that it contradicts, argmax t_i != y_i, with
    argmax t_i as the proposal. A table costs N K 4 bytes. In a stock `Trainer`:

        rows = training_rows(Classification(), checkpoint, examples, KeyedRNG(0))
        module = ObjectiveModule(checkpoint, Classification(), [ELR()], rows)
        collate = EpochCollator(Classification(), KeyedRNG(0), ids=True)
        Trainer(module, arguments, collate, rows, callbacks=[module.callback]).train()
        suspicious = module.detach()["elr"]["flagged"]

    with `remove_unused_columns=False` in its arguments.

    Args:
        beta: share of the old target in the new one; robust from 0.7 to 0.99. Default 0.7.
        regularization_weight: lambda in the paper, 3 by default; 7 for a hundred classes, 1 where classes are mistaken
            for similar ones. The larger, the longer wrong labels stay out, and the more early mistakes stay.
        ramp_steps: S, steps in which that weight rises from 0.7 % to its full value. Default 0: none.
        warmup_steps: steps at the start with cross-entropy alone, which fill the table. Default 0.
        networks: 1 (default), or 2 for ELR+, which trains a second network, averages the weights of both, and keeps the
            four in memory; the fields below are for it.
        mixup_alpha: of the Beta distribution of the mixing rate; 0: no mixing. Texts mix at their embeddings.
            Default 1.
        ema_decay: of the averages. Default 0.997.
        ema_schedule: `ramp` (default), in which the decay rises as r does; or `average`, min(1 - 1/(s + 1), decay).
        ema_ramp_steps: S of that ramp. Default: half of the steps; 40,000 in the paper.
        refine_targets: whether y' is multiplied by q and scaled to the sum 1 before the cross-entropy, as for
            CIFAR-100; needs beta below 1. Default False.
        second_network: random weights of the second network: its `head` (default, for pretrained models) or `all`.

    Raises:
        IntaglioError: (when training begins) the examples are a stream or may be unlabelled, the loss is binary
            cross-entropy, there is no linear layer, or two networks are trained under LoRA; (while training) the
            objective does not classify, or FSDP shards two networks.

    Source: Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, NeurIPS 2020.
    """

    kinds = ("modifier",)
    summary = "keeps wrong labels from being memorised, and names them, by a running average of each prediction"
    citation = "Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, NeurIPS 2020"
    url = "https://arxiv.org/abs/2007.00151"

    trains_on: ClassVar[TrainingData] = "classes"
    sets_targets: ClassVar[bool] = True

    beta: Annotated[float, Field(ge=0, le=1)] = 0.7
    regularization_weight: Annotated[float, Field(ge=0)] = 3.0
    ramp_steps: Annotated[int, Field(ge=0)] = 0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    networks: Literal[1, 2] = 1
    mixup_alpha: Annotated[float, Field(ge=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.997
    ema_schedule: Literal["ramp", "average"] = "ramp"
    ema_ramp_steps: Annotated[int, Field(ge=0)] | None = None
    refine_targets: bool = False
    second_network: Literal["head", "all"] = "head"

    @model_validator(mode="after")
    def _table_moves(self) -> Self:
        if self.refine_targets and self.beta == 1:
            raise ValueError("beta is 1, at which the table stays empty; refine_targets needs a smaller one")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the paper's length of the averages' ramp."""
        return cls(**{"ema_ramp_steps": 40_000, **overrides})

    @classmethod
    def plus(cls, **overrides: Any) -> Self:
        """Return ELR+: two networks."""
        return cls(**{"networks": 2, **overrides})

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost of ELR+: a second network, and a pass without gradient of the average of each."""
        if self.networks == 1:
            return Cost()
        return Cost(flops=steps * pass_flops * (1 + 2 / 3), extra_bytes=20 * workload.parameters)

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Begin with empty tables, and with two networks draw the second."""
        if run.rows is None:
            raise IntaglioError("elr keeps a target for each example; give examples in memory, not a stream")
        if logits_layer(run.model) is None:
            raise IntaglioError(f"elr needs a classifier; {type(run.model).__name__} has no linear layer")
        if getattr(run.objective, "loss_type", "") == "binary_cross_entropy":
            raise IntaglioError("loss_type is binary_cross_entropy; elr needs cross_entropy")
        if getattr(run.objective, "unlabelled", None) is not None:
            raise IntaglioError("elr takes no unlabelled examples; leave unlabelled out of the objective")
        if self.networks == 1:
            return _Session(self, run)
        if hasattr(run.model, "peft_config"):
            raise IntaglioError("elr with two networks trains a second one in full; leave lora out, or set networks: 1")
        return _PlusSession(self, run)


def ramp(step: float, length: float) -> float:
    """Return r(step) = exp(-5 (1 - step / length)^2), 1 from `length` on and where it is 0."""
    return 1.0 if length == 0 else math.exp(-5.0 * (1.0 - min(max(step, 0.0), length) / length) ** 2)


def clamped_softmax(logits_BK: Tensor) -> Tensor:
    """Return the probabilities, clamped to [1e-4, 1 - 1e-4]."""
    return logits_BK.softmax(1).clamp(CLAMP, 1.0 - CLAMP)


def regularizer(targets_BK: Tensor, probs_BK: Tensor) -> Tensor:
    """Return the mean of log(1 - <t, p>), the term that is minimised."""
    return (1.0 - (targets_BK * probs_BK).sum(1)).log().mean()


@dataclass
class Targets:
    """The table of targets [N, K], in float32 on the model's device; empty until its first update."""

    rows: int
    beta: float
    table: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    @torch.no_grad()
    def update(self, ids_B: Tensor, probs_BK: Tensor) -> Tensor:
        """Move the targets of a batch, of all processes, to its probabilities; return those of the own rows [B, K]."""
        probs_BK = probs_BK.detach().float()
        probs_BK = probs_BK / probs_BK.sum(1, keepdim=True)
        if not self.table.numel():
            self.table = torch.zeros(self.rows, probs_BK.shape[1])
        self.table = self.table.to(probs_BK.device)
        every_ids, every_probs = gather_rows(ids_B), gather_rows(probs_BK)
        self.table[every_ids] = self.beta * self.table[every_ids] + (1 - self.beta) * every_probs
        return self.table[ids_B]


def _check(outputs: Any) -> None:
    """Refuse objectives that do not classify."""
    if not isinstance(outputs, Classified):
        raise IntaglioError("elr needs an objective that classifies whole texts or images: classification")


class _Session(ModifierSession):
    """ELR with one network."""

    def __init__(self, method: ELR, run: TrainingRun) -> None:
        assert run.rows is not None
        self.method, self.run, self.step = method, run, 0
        self.tables = [Targets(run.rows, method.beta)]

    def before_step(self, step: int, batch: Batch) -> None:
        self.step = step

    @property
    def warm(self) -> bool:
        """True in a warm-up step."""
        return self.step <= self.method.warmup_steps

    @property
    def own_step(self) -> int:
        """The step, counted from 1 after the warm-up."""
        return self.step - self.method.warmup_steps

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        _check(outputs)
        probs_BK = clamped_softmax(outputs.logits)
        targets_BK = self.tables[0].update(batch["id"], probs_BK)
        return None if self.warm else self._term(targets_BK, probs_BK)

    def _term(self, targets_BK: Tensor, probs_BK: Tensor) -> Loss:
        value = regularizer(targets_BK, probs_BK)
        factor = self.method.regularization_weight * ramp(self.own_step, self.method.ramp_steps)
        return Loss(factor * value, {"elr": value})

    def state_dict(self) -> dict[str, Any]:
        return {"tables": [targets.table for targets in self.tables]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for targets, table in zip(self.tables, state["tables"], strict=True):
            targets.table = table.clone()

    def attachment(self) -> dict[str, Tensor]:
        return {"targets": self._targets()}

    def _targets(self) -> Tensor:
        """Return the mean of the tables, on the CPU."""
        return torch.stack([targets.table.cpu() for targets in self.tables]).mean(0)

    def report(self) -> dict[str, Any]:
        targets_NK = self._targets()
        if not targets_NK.numel() or not self.run.examples:
            return {}
        labels_N = torch.tensor([int(row["label"]) for row in self.run.examples])
        return label_report(self.run.checkpoint, self.run.examples, suspicious_labels(targets_NK, labels_N), labels_N)


class _PlusSession(_Session):
    """ELR+: the run's network and a second one, each taught by the average of the other."""

    def __init__(self, method: ELR, run: TrainingRun) -> None:
        super().__init__(method, run)
        self.checked = False
        self.second = second_network(run.model, run.seed, method.second_network)
        self.networks: tuple[nn.Module, nn.Module] = (run.model, self.second)
        self.averages = [copy.deepcopy(network).requires_grad_(False) for network in self.networks]
        self.tables = [Targets(self.tables[0].rows, method.beta) for _ in range(2)]

    def param_groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.second.parameters() if parameter.requires_grad]
        return decay_groups(trained, self.run.weight_decay)

    def before_step(self, step: int, batch: Batch) -> None:
        super().before_step(step, batch)
        if not self.checked and is_sharded(self.run.model):
            raise IntaglioError("elr with two networks needs whole weights, and FSDP has sharded them; set networks: 1")
        self.checked = True
        for network in (self.second, *self.averages):
            network.train()  # batch statistics in the averages, as in the released code

    def change_batch(self, model: nn.Module, batch: Batch) -> Batch:
        self.plain = batch
        if self.warm:
            return batch
        mixed, self.mixture, self.q_BK = self._prepared(0, batch)
        return mixed

    def _prepared(self, network: int, batch: Batch) -> tuple[Batch, Mix, Tensor]:
        """Update a network's table by the other's average; return the mixed batch, its mix and q [B, K]."""
        rng = generator(self.run.seed, "elr", network, self.step, *batch["id"].tolist())
        rows, alpha = len(batch["id"]), self.method.mixup_alpha
        mixture = Mix.unmixed(rows)
        if alpha:
            mixture = Mix(draw_rows(rows, 2, rng), draw_shares(rows, 2, alpha, rng, largest_first=True))
        with torch.no_grad():
            logits_BK, _ = classifier_outputs(self.averages[1 - network], batch)
        q_BK = mixture.average(self.tables[network].update(batch["id"], logits_BK.softmax(1)))
        targets_BK = mixture.average(class_targets(batch, logits_BK.shape[1]))
        if self.method.refine_targets:
            targets_BK = targets_BK * q_BK
            targets_BK = targets_BK / targets_BK.sum(1, keepdim=True)
        return {**mixed_inputs(batch, mixture), "targets": targets_BK}, mixture, q_BK

    def forward_context(self, model: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
        return nullcontext() if self.warm else mixed_forward(model, self.plain, self.mixture)

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        _check(outputs)
        if self.warm:
            other = self.run.loss(self.plain, self.second)
            for targets, classified in zip(self.tables, (outputs, other.outputs), strict=True):
                targets.update(batch["id"], classified.logits.softmax(1))
            return Loss(other.total, {"second_network": other.total})
        first = self._term(self.q_BK, clamped_softmax(outputs.logits))
        mixed, mixture, q_BK = self._prepared(1, self.plain)
        with mixed_forward(self.second, self.plain, mixture):
            other = self.run.loss(mixed, self.second)
        second = self._term(q_BK, clamped_softmax(other.outputs.logits))
        total = first.total + other.total + second.total
        return Loss(total, {**first.parts, "second_network": other.total})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.warm:
            return
        decay = self.ema_decay()
        for average, network in zip(self.averages, self.networks, strict=True):
            own = dict(network.named_parameters())
            ema_update({name: p.data for name, p in average.named_parameters()}, {n: own[n].data for n in own}, decay)

    def ema_decay(self) -> float:
        """Return the decay of the averages at the step."""
        method, step = self.method, self.own_step
        if method.ema_schedule == "average":
            return min(1 - 1 / (step + 1), method.ema_decay)
        length = max(1, self.run.steps // 2) if method.ema_ramp_steps is None else method.ema_ramp_steps
        return ramp(step + 1, length) * method.ema_decay

    def state_dict(self) -> dict[str, Any]:
        averages = [dict(average.state_dict()) for average in self.averages]
        return {**super().state_dict(), "averages": averages, "buffers": dict(self.second.named_buffers())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved)
        buffers = dict(self.second.named_buffers())
        with torch.no_grad():
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)

    def attachment(self) -> dict[str, Tensor]:
        second = {f"{NETWORK}{name}": value for name, value in self.second.state_dict().items()}
        return {**super().attachment(), **second}


def second_network(model: Any, seed: int, drawn: Literal["head", "all"]) -> nn.Module:
    """Return a copy of a network whose head, or all of whose weights, are random."""
    result: Any = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "elr", "second network").initial_seed() % 2**63))
        if hasattr(model, "config"):
            fresh = type(model)(model.config).state_dict()
            heads = {id(p) for module in head_modules(result) for p in module.state_dict(keep_vars=True).values()}
            with torch.no_grad():
                for name, value in result.state_dict(keep_vars=True).items():
                    if name in fresh and (drawn == "all" or id(value) in heads):
                        value.copy_(fresh[name])
        else:
            last = logits_layer(result)
            for module in result.modules():
                if hasattr(module, "reset_parameters") and (drawn == "all" or module is last):
                    module.reset_parameters()
    network: nn.Module = result
    return network


def predict(checkpoint: Checkpoint, examples: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> Tensor:
    """Return the probabilities [N, K] of both networks of ELR+, their logits averaged.

    Args:
        checkpoint: trained by `elr` with two networks, whose attachment holds the second.
        examples: texts or images, as `classification.predict` takes them.
        batch_size: rows of a batch. Default 32.

    Raises:
        IntaglioError: no second network is attached.
    """
    attached = checkpoint.attachments.get(ELR.slug)
    tensors = {} if attached is None else attached.tensors
    weights = {name.removeprefix(NETWORK): value for name, value in tensors.items() if name.startswith(NETWORK)}
    if not weights:
        raise IntaglioError(f"{checkpoint.source or 'this checkpoint'} has no second network; train with networks: 2")
    second = copy.deepcopy(checkpoint.model)
    second.load_state_dict(weights)
    other = Checkpoint(second, checkpoint.tokenizer, image_processor=checkpoint.image_processor)
    # The mean of the logarithms differs from that of the logits by a constant of each row.
    logs = [classification.predict(c, examples, batch_size=batch_size).log() for c in (checkpoint, other)]
    return torch.stack(logs).mean(0).softmax(1)
