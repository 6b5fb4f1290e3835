"""BlockFFN (Song et al., COLM 2025): experts that tokens in a row take together, and few of them.

- `routing`: scores from the router's output; `layer`: the layer; `surgery`: layers in a checkpoint.
- `losses`: what makes tokens take few experts, and neighbours the same; `places`: who is whose neighbour.
- `schedule`: weights of losses that follow what comes of them.

`intaglio.measures.activation_sparsity` says how sparse it came out, `intaglio.kernels.sparse_experts` multiplies with what a chunk takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.activations.blockffn import losses, surgery
from intaglio.methods.activations.blockffn.layer import BlockFFNLayer
from intaglio.methods.activations.blockffn.places import Places
from intaglio.methods.activations.blockffn.routing import Form, Norm, Router
from intaglio.methods.activations.blockffn.schedule import Adaptive, Controlled
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Workload
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.trainer import Batch, Loss, ModifierSession, TrainingRun

__all__ = ["BlockFFN", "BlockFFNLayer", "Form", "Places", "losses"]

EXPERTS = 48
"""E by default; the paper's models have 40 to 56."""
SPREAD = 1.6
"""Standard deviation of a router's output at first, for inputs of mean square 1."""
SHORTEST, LONGEST = 8, 64
"""Tokens of a chunk by default: a sixteenth of the context, between these; the longest is the paper's."""
HOLD, WINDOW, FEWEST = 0.05, 0.01, 10
"""Shares of the steps, of which the paper's 1,000 and 100 of 10,000 to 40,000 are about these; steps at the least."""

Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
_OF_ROUTERS: dict[str, tuple[Router, ...]] = {
    "norm": ("relu",),
    "locality": ("relu",),
    "chunk_weight": ("relu",),
    "k": ("topk", "remoe"),
    "balance": ("topk",),
    "l1": ("remoe",),
    "router_rate": ("relu", "topk", "remoe"),
    "router_std": ("relu", "topk", "remoe"),
}
"""Fields that belong to some routers alone."""


class BlockFFN(Method, slug="blockffn"):
    """Puts experts in the place of each block's MLP and trains them so that few fire, for runs of tokens the same.

    In the `shape` of a training step. Each MLP becomes E experts of width h without a gate, with random weights:

        score = RMSNorm(ReLU(x Wr^T)) with a learned gain;   y = (SiLU(x Wup^T) score) Wdown^T

    How many experts a token takes is what its router says, none to all. Two losses are added to the objective's, each
    the mean over layers: activation locality, the cross-entropy between the patterns of neighbouring tokens (`losses`),
    and chunk sparsification, the chance that an expert is needed somewhere in a chunk of tokens. The weight of the
    latter is held at first and then follows the loss: up with it, down with it, at most to four times what it was.
    Neighbours and chunks are those within a document; padding counts nowhere.

    What was in the MLPs is gone: this is for models that are trained from scratch (`new`), or trained on long enough to
    be made anew. Nothing turns a trained MLP into such experts without training, so it is no step by itself. Behind
    the training the checkpoint is a live one (`intaglio.load` reads it); a later training step with the same modifier
    trains the layers that are there. Decoding, and the verify passes of drafting, read the weights of the experts that
    some token of the pass takes. Attention's projections stay plain.

    The routers that it is held against are here with the same experts: `topk` (a softmax, the K largest divided by
    their sum, an auxiliary loss for balance), `remoe` (ReLU alone, with a penalty that a controller holds at K experts
    a token), `relu` with `norm: none`, and `none`: every score is 1, a plain MLP of width E h.

    Args:
        experts: E. Default: 48, or as many as are there.
        expert_width: h, inner features of an expert. Default: such that a layer has about as many numbers as the MLP
            that it replaces, which gives the paper's sizes.
        width: in its place E h, the inner features of all experts together, a multiple of E.
        router: `relu` (default), `topk`, `remoe` or `none`.
        norm: of the router `relu`: `rms` (default), `sum` or `none`.
        k: K, experts of a token, for `topk` and `remoe`.
        locality: weight of the first loss. Default 2e-3 for `relu`, the paper's for most of its models.
        steep: of the sigmoid in it. Default 100.
        chunk_weight: weight of the second loss at first. Default 5e-2 for `relu`.
        chunk: L, tokens of a chunk. Default: a sixteenth of the model's context, from 8 to 64.
        adapt: whether the second weight follows its loss. Default true.
        hold: steps, or a share of them, that it is held for. Default 0.05, the paper's 1,000 steps of 20,000.
        window: steps, or a share of them, of which the loss is averaged, and in which the weight moves. Default 0.01,
            at least 10 steps.
        balance: weight of the auxiliary loss of `topk`. Default 1e-2.
        l1: weight of the penalty of `remoe` at first. Default 1e-8, ReMoE's.
        init_std: standard deviation of the experts' weights at first. Default 0.02, the habit of stock models.
        router_std: of the routers' weights. Default: 1.6 / √(the model's width) for `relu`, which is the authors' 0.1
            over the root of the width's scale, the width over 256 (assumed: their models' family has that base), so
            that a router's output has one scale at every width, on which `steep` rests; else as the experts'.
        eps: in the norm. Default 1e-5.
        router_rate: highest learning rate of the routers, which are a group of their own then. Default: the run's.
        router_decay: weight decay of that group. Default 0.

    Raises:
        IntaglioError: (when training begins) the MLPs cannot be told or were replaced, the layers that are there have
            other sizes, adapters or frozen weights beside it; (at the first batch) a chunk longer than the rows.

    Source: Song et al., BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation
    Sparsity, COLM 2025; code thunlp/BlockFFN. Departures: the weight of the chunk loss counts optimizer steps, where
    the code counts batches; chunks of padding alone are left out of the mean. The trainer has no
    warm-up-stable-decay schedule; `schedule: constant` with a warm-up is that without the decay.
    """

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "activations"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"zeros"})
    storage: ClassVar[Literal["runtime"]] = "runtime"
    trains_weights: ClassVar[bool] = True

    experts: Count | None = None
    expert_width: Count | None = None
    width: Count | None = None
    router: Router = "relu"
    norm: Norm | None = None
    k: Count | None = None
    locality: Weight | None = None
    steep: Annotated[float, Field(gt=0)] = 100.0
    chunk_weight: Weight | None = None
    chunk: Count | None = None
    adapt: bool = True
    hold: Steps = HOLD
    window: Steps = WINDOW
    balance: Weight | None = None
    l1: Annotated[float, Field(gt=0)] | None = None
    init_std: Annotated[float, Field(gt=0)] = 0.02
    router_std: Annotated[float, Field(gt=0)] | None = None
    eps: Annotated[float, Field(gt=0)] = 1e-5
    router_rate: Annotated[float, Field(gt=0)] | None = None
    router_decay: Weight = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        experts = self.experts or EXPERTS
        if self.width is not None:
            if self.expert_width is not None:
                raise ValueError("width and expert_width are given; width is that of all experts together, give one")
            if self.width % experts:
                below = self.width // experts * experts
                near = f"{below} or {below + experts}" if below else f"{experts}"
                raise ValueError(f"width is {self.width}, which {experts} experts do not divide; {near} would do")
        if self.k is not None and self.k > experts:
            raise ValueError(f"k is {self.k}, more than the {experts} experts")
        for name, routers in _OF_ROUTERS.items():
            if getattr(self, name) is not None and self.router not in routers:
                raise ValueError(f"{name} belongs to the router {' or '.join(routers)}, and router is {self.router}")
        if self.router in ("topk", "remoe") and self.k is None:
            raise ValueError(f"router is {self.router}, which needs k, the experts of a token")
        if self.router_decay and self.router_rate is None:
            raise ValueError("router_decay belongs to a router_rate; add one")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The constants of the paper's model of 0.1B parameters, width 768; of the weights see `router_std`.

        Args:
            overrides: fields that the caller sets.
        """
        spread = {"init_std": 0.1 / math.sqrt(768 / 256)}
        sizes = {"experts": 48, "expert_width": 64, "chunk": 64, "hold": 1000, "window": 100}
        return cls(**{**sizes, **spread, **overrides})

    @property
    def _locality(self) -> float:
        return (2e-3 if self.router == "relu" else 0.0) if self.locality is None else self.locality

    @property
    def _chunk_weight(self) -> float:
        return (5e-2 if self.router == "relu" else 0.0) if self.chunk_weight is None else self.chunk_weight

    def _asked(self) -> dict[str, Any]:
        """Fields of the form, as far as they are said."""
        h = self.width // (self.experts or EXPERTS) if self.width is not None else self.expert_width
        norm = self.norm or ("rms" if self.router == "relu" else None)
        return {
            "experts": self.experts, "expert_width": h, "router": self.router, "norm": norm, "k": self.k,
            "eps": self.eps,
        }  # fmt: skip

    def form(self, parts: Anatomy) -> Form:
        """What the layers compute in a model whose MLPs are its own.

        Args:
            parts: of the model.
        """
        asked = self._asked()
        asked["experts"] = asked["experts"] or EXPERTS
        asked["expert_width"] = asked["expert_width"] or surgery.expert_width(parts, asked["experts"])
        return Form(**{name: value for name, value in asked.items() if value is not None})

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model whose MLPs cannot be replaced, or were replaced otherwise.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: says which.
        """
        there = surgery.layers_of(parts.model)
        if there:
            surgery.check_fits(there, self._asked())
        else:
            parts.feed_forwards()

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """What routers take, and the inner features with their scores that are kept for the gradient.

        A layer has about as many numbers as the MLP that it replaces, so its products are counted already.

        Args:
            workload: of the model.
            steps: optimizer steps.
            batch_tokens: of a batch.
            pass_flops: not looked at.
        """
        experts = self.experts or EXPERTS
        outputs = experts * batch_tokens * workload.blocks
        h = self.expert_width or max(1, (self.width or 4 * workload.hidden) // experts)
        return Cost(flops=6.0 * steps * outputs * workload.hidden, extra_bytes=4 * outputs * (h + 8))

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put the layers in, unless they are there, and watch them."""
        model = run.model
        if getattr(model, "peft_config", None) or not any(p.requires_grad for p in model.parameters()):
            raise IntaglioError("blockffn trains layers of its own and all around them; leave lora and freeze out")
        parts = anatomy(model)
        self.check_model(parts)
        if not surgery.layers_of(model):
            width = int(parts.config.hidden_size)
            spread = self.router_std or (SPREAD / math.sqrt(width) if self.router == "relu" else None)
            surgery.put_layers(parts, self.form(parts), self.init_std, run.seed, spread)
        return _Session(self, run)

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

        Raises:
            IntaglioError: it was loaded without them.
        """
        if not surgery.layers_of(checkpoint.model):
            raise IntaglioError("the model has no layers of blockffn where its record names them")


class _Session(ModifierSession):
    def __init__(self, method: BlockFFN, run: TrainingRun) -> None:
        self.method, self.run, self.step = method, run, 1
        self.layers = list(surgery.layers_of(run.model).values())
        self.seen: list[Tensor] = []
        form = self.layers[0].form
        for layer in self.layers:
            layer.watched = True
        self.length = method.chunk or min(LONGEST, max(SHORTEST, run.checkpoint.context // 16))
        self.follows: Adaptive | Controlled | None = None
        if method.router == "remoe":
            assert form.k is not None  # needed by the router
            self.follows = Controlled(1e-8 if method.l1 is None else method.l1, 1 - form.k / form.experts)
        elif method.router == "relu":
            hold, window = (
                value if isinstance(value, int) else max(FEWEST, round(value * run.steps))
                for value in (method.hold, method.window)
            )
            self.follows = Adaptive(method._chunk_weight, hold, window)

    def before_step(self, step: int, batch: Batch) -> None:
        tokens = int(batch["input_ids"].shape[1])
        if step == 1 and self.method._chunk_weight and self.length > tokens:
            raise IntaglioError(f"chunk is {self.length} tokens, longer than the rows of {tokens}; set a shorter one")
        self.step = step

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        method, form = self.method, self.layers[0].form
        raws = [layer.raw for layer in self.layers if layer.raw is not None]
        ids: Tensor = batch["input_ids"]
        if len(raws) != len(self.layers) or any(raw.shape[:-1] != ids.shape for raw in raws):
            raise IntaglioError("blockffn needs an objective that passes the batch's own rows through the model, once")
        raw_NKE = torch.stack([raw.flatten(0, -2) for raw in raws], 1).float()
        places = Places.of(batch, self.length)
        with torch.no_grad():
            token, together = losses.resting(raw_NKE, places, form)
        total = raw_NKE.new_zeros(())
        parts: dict[str, Tensor | float] = {"token sparsity": token, "chunk sparsity": together}
        if method._locality:
            parts["locality"] = close = losses.locality(raw_NKE, places, method.steep)
            total = total + method._locality * close
        if isinstance(self.follows, Adaptive) and method._chunk_weight:
            parts["chunk firing"] = fired = losses.chunk_firing(raw_NKE, places, form)
            weight = self.follows.weight(self.step) if method.adapt else method._chunk_weight
            parts["chunk weight"] = weight
            total = total + weight * fired
            self.seen.append(fired.detach())
        if isinstance(self.follows, Controlled):
            assert form.k is not None  # needed by the router
            parts["penalty"] = penalty = losses.l1(raw_NKE, places, form.k)
            parts["penalty weight"] = self.follows.weight(self.step)
            total = total + self.follows.weight(self.step) * penalty
            self.seen.append(token)
        if form.router == "topk" and (method.balance is None or method.balance):
            assert form.k is not None  # needed by the router
            parts["balance"] = even = losses.balance(raw_NKE, places, form.k)
            total = total + (1e-2 if method.balance is None else method.balance) * even
        return Loss(total, parts)

    def after_step(self, step: int) -> None:
        if self.follows is not None and self.seen:
            seen = torch.stack(self.seen).mean()
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(seen)
                seen = seen / torch.distributed.get_world_size()
            self.follows.observe(step, float(seen))
        self.seen = []
        for layer in self.layers:
            layer.raw = None

    def param_groups(self) -> list[dict[str, Any]]:
        if self.method.router_rate is None:
            return []
        routers = [layer.router for layer in self.layers if layer.router is not None]
        return [{"params": routers, "lr": self.method.router_rate, "weight_decay": self.method.router_decay}]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.follows is None else self.follows.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.follows is not None:
            self.follows.load(state)

    def detach(self) -> None:
        for layer in self.layers:
            layer.watched, layer.raw = False, None
        self.run.checkpoint.set_runtime_state(self.method.slug, surgery.part_of(self.layers[0].form))
