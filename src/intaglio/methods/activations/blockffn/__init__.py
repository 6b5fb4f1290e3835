"""BlockFFN (Song et al., COLM 2025): experts that consecutive tokens share, few at a time.

- `router`: scores from the router's output; `layers`: the layer.
- `losses`: sparsity and locality losses; `chunk_index`: documents, neighbours and chunks of a batch.
- `adaptive_weight`: loss weights that follow their loss.

`intaglio.measures.activation_sparsity` measures the sparsity, `intaglio.kernels.sparse_experts`
multiplies with the experts of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.replacement import ReplacesMLPs
from intaglio.errors import IntaglioError
from intaglio.methods.activations.blockffn import losses
from intaglio.methods.activations.blockffn.adaptive_weight import AdaptiveWeight, SparsityController
from intaglio.methods.activations.blockffn.chunk_index import ChunkIndex
from intaglio.methods.activations.blockffn.layers import BlockFFNLayer
from intaglio.methods.activations.blockffn.router import BlockFFNConfig, Norm, Router
from intaglio.methods.base import Capability, Cost, Method, Workload
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.targets import replace_mlps
from intaglio.trainer import Batch, Loss, ModifierSession, TrainingRun
from intaglio.trainer.rng import generator

__all__ = ["BlockFFN", "BlockFFNConfig", "BlockFFNLayer", "ChunkIndex", "losses"]

EXPERTS = 48
"""Default E; the paper's models have 40 to 56."""
ROUTER_STD = 1.6
"""Initial standard deviation of a router's output, for inputs of mean square 1."""
MIN_CHUNK, MAX_CHUNK = 8, 64
"""Bounds of the default chunk, a sixteenth of the context in tokens; the upper one is the paper's."""
HOLD, WINDOW, MIN_STEPS = 0.05, 0.01, 10
"""Shares of the steps, about the paper's 1,000 and 100 of 10,000 to 40,000; and the smallest number of steps."""

Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
_ROUTERS_OF: dict[str, tuple[Router, ...]] = {
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


class BlockFFN(ReplacesMLPs, Method, slug="blockffn"):
    """Replaces each block's MLP by experts and trains them so that few fire, for runs of tokens the same.

    A modifier of a training step. Each MLP becomes E experts of width h without a gate, with random weights:

        score = RMSNorm(ReLU(x Wr^T)) with a learned gain;   y = (SiLU(x Wup^T) score) Wdown^T

    The router decides how many experts a token takes, none to all. Two losses are added to the objective's, each
    the mean over layers: activation locality, the cross-entropy between the patterns of neighbouring tokens (`losses`),
    and chunk sparsification, the chance that an expert is needed somewhere in a chunk of tokens. The weight of the
    latter is held at first and then follows the loss: up with it, down with it, at most to four times what it was.
    Neighbours and chunks are those within a document; padding counts nowhere.

    The weights of the MLPs are lost: this is for models that are trained from scratch (`new`), or trained on for long.
    Nothing turns a trained MLP into such experts without training, so it is no step by itself. After the training the
    checkpoint needs `intaglio.load`; a later training step with the same modifier trains the layers that are there.
    Decoding, and the verify passes of drafting, read the weights of the experts that some token of the pass takes.
    Attention's projections stay plain.

    Its baselines have the same experts and another router: `topk` (a softmax, the K largest divided by their sum, an
    auxiliary loss for balance), `remoe` (ReLU alone, with a penalty that a controller holds at K experts a token),
    `relu` with `norm: none`, and `none`: every score is 1, a plain MLP of width E h.

    Args:
        experts: E, number of experts of a layer. Default: 48, or as many as are there.
        expert_width: h, inner features of an expert. Default: such that a layer has about as many numbers as the MLP
            that it replaces, which gives the paper's sizes.
        width: instead of `expert_width`, E h, the inner features of all experts together, a multiple of E.
        router: `relu` (default), `topk`, `remoe` or `none`.
        norm: of the router `relu`: `rms` (default), `sum` or `none`.
        k: K, experts of a token, required by `topk` and `remoe`.
        locality: weight of the first loss. Default 2e-3 for `relu`, the paper's for most of its models.
        steep: steepness of the sigmoid in that loss. Default 100.
        chunk_weight: initial weight of the second loss. Default 5e-2 for `relu`.
        chunk: L, tokens of a chunk. Default: a sixteenth of the model's context, from 8 to 64.
        adapt: whether the second weight follows its loss. Default true.
        hold: steps, or a share of them, for which it is held. Default 0.05, the paper's 1,000 steps of 20,000.
        window: steps, or a share of them, over which the loss is averaged and the weight moves. Default 0.01,
            at least 10 steps.
        balance: weight of the auxiliary loss of `topk`. Default 1e-2.
        l1: initial weight of the penalty of `remoe`. Default 1e-8, ReMoE's.
        init_std: initial standard deviation of the experts' weights. Default 0.02, as in stock models.
        router_std: initial standard deviation of the routers' weights. Default: 1.6 / √(the model's width) for `relu`,
            the authors' 0.1 over the root of the width's scale, the width over 256 (assumed: their models' family has
            that base), so that a router's output has one scale at every width, which `steep` relies on; else as the
            experts'.
        eps: of the norm. Default 1e-5.
        router_rate: highest learning rate of the routers, in a parameter group of their own. Default: the run's.
        router_decay: weight decay of that group. Default 0.

    Raises:
        IntaglioError: (when training begins) the MLPs cannot be identified or were replaced, layers that are there have
            other sizes, adapters or frozen weights; (at the first batch) a chunk longer than the rows.

    Source: Song et al., BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation
    Sparsity, COLM 2025; code thunlp/BlockFFN. Departures: the weight of the chunk loss counts optimizer steps, where
    the code counts batches; chunks of padding alone are left out of the mean. The trainer has no
    warm-up-stable-decay schedule; `schedule: constant` with a warm-up is that without the decay.
    """

    kinds = ("modifier",)
    summary = "trains experts behind a ReLU router instead of MLPs; few fire, and neighbouring tokens share them"
    citation = (
        "Song et al., BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level "
        "Activation Sparsity, COLM 2025"
    )
    url = "https://arxiv.org/abs/2507.08771"
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"zeros"})
    trains_weights: ClassVar[bool] = True
    module_types: ClassVar[tuple[type[BlockFFNLayer], ...]] = (BlockFFNLayer,)

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
    def _check_combinations(self) -> Self:
        experts = self.experts or EXPERTS
        if self.width is not None:
            if self.expert_width is not None:
                raise ValueError("width and expert_width are given; width is that of all experts together, give one")
            if self.width % experts:
                below = self.width // experts * experts
                nearest = f"{below} or {below + experts}" if below else f"{experts}"
                raise ValueError(f"width is {self.width}, which {experts} experts do not divide; {nearest} would do")
        if self.k is not None and self.k > experts:
            raise ValueError(f"k is {self.k}, more than the {experts} experts")
        for name, routers in _ROUTERS_OF.items():
            if getattr(self, name) is not None and self.router not in routers:
                raise ValueError(f"{name} belongs to the router {' or '.join(routers)}, and router is {self.router}")
        if self.router in ("topk", "remoe") and self.k is None:
            raise ValueError(f"router is {self.router}, which needs k, the experts of a token")
        if self.router_decay and self.router_rate is None:
            raise ValueError("router_decay belongs to a router_rate; add one")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the constants of the paper's model of 0.1B parameters, width 768."""
        spread = {"init_std": 0.1 / math.sqrt(768 / 256)}
        sizes = {"experts": 48, "expert_width": 64, "chunk": 64, "hold": 1000, "window": 100}
        return cls(**{**sizes, **spread, **overrides})

    @property
    def _locality(self) -> float:
        return (2e-3 if self.router == "relu" else 0.0) if self.locality is None else self.locality

    @property
    def _chunk_weight(self) -> float:
        return (5e-2 if self.router == "relu" else 0.0) if self.chunk_weight is None else self.chunk_weight

    def _layer_fields(self) -> dict[str, Any]:
        """Return the fields of the layers' config, None where they are left open."""
        h = self.width // (self.experts or EXPERTS) if self.width is not None else self.expert_width
        norm = self.norm or ("rms" if self.router == "relu" else None)
        return {
            "experts": self.experts, "expert_width": h, "router": self.router, "norm": norm, "k": self.k,
            "eps": self.eps,
        }  # fmt: skip

    def layer_config(self, parts: Anatomy) -> BlockFFNConfig:
        """Return the config of the layers for a model whose MLPs are its own."""
        fields = self._layer_fields()
        experts = fields["experts"] = fields["experts"] or EXPERTS
        if fields["expert_width"] is None:
            # As many numbers as the first block's MLP, 2 D E H: at the sizes of the paper's models, whose MLPs would be
            # of width 8/3 D, this gives the paper's sizes.
            shapes = [linear.shape for linear in parts.linears(0) if linear.part == "mlp"]
            numbers = sum(rows * columns for rows, columns in shapes)
            fields["expert_width"] = max(1, round(numbers / (2 * int(parts.config.hidden_size) * experts)))
        return BlockFFNConfig(**{name: value for name, value in fields.items() if value is not None})

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model whose MLPs cannot be replaced, or were replaced otherwise."""
        layers = list(self.modules_of(parts.model).values())
        if not layers:
            parts.feed_forwards()
            return
        for name, value in self._layer_fields().items():
            there = getattr(layers[0].config, name)
            if value is not None and value != there:
                raise IntaglioError(f"{name} is {value}, and the layers of the model were made with {name}: {there}")

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost of the routers, and of the inner features and scores that are kept for the gradient.

        A layer has about as many numbers as the MLP that it replaces, so its products are counted already.
        """
        experts = self.experts or EXPERTS
        outputs = experts * batch_tokens * workload.blocks
        h = self.expert_width or max(1, (self.width or 4 * workload.hidden) // experts)
        return Cost(flops=6.0 * steps * outputs * workload.hidden, extra_bytes=4 * outputs * (h + 8))

    def replace(self, model: nn.Module, *, seed: int = 0) -> dict[int, BlockFFNLayer]:
        """Replace the MLP of every block by a layer with random weights, and return the layers by block.

        Args:
            model: a transformer, changed in place.
            seed: of the weights. Default 0.

        Raises:
            IntaglioError: see the class.
        """
        config = self.layer_config(anatomy(model))

        def make(index: int, parts: Anatomy) -> BlockFFNLayer:
            width, like = int(parts.config.hidden_size), next(parts.blocks[0].parameters())
            router_std = self.router_std or (ROUTER_STD / math.sqrt(width) if self.router == "relu" else None)
            with torch.device("meta"):  # nothing is drawn from the global generator
                layer = BlockFFNLayer(width, config)
            layer.to(like.dtype).to_empty(device=like.device)
            layer.draw(self.init_std, generator(seed, self.slug, index), router_std)
            return layer

        return replace_mlps(model, make)

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty layers into a model without weights."""
        config = BlockFFNConfig(**{name: value for name, value in part.items() if name != "slug"})

        def empty(index: int, parts: Anatomy) -> BlockFFNLayer:
            with torch.device("meta"):
                layer = BlockFFNLayer(int(parts.config.hidden_size), config)
            return layer.to(next(parts.blocks[0].parameters()).dtype)

        replace_mlps(model, empty)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Check that the layers are in a loaded model."""
        cls.check_restored(checkpoint.model, len(anatomy(checkpoint.model).blocks))

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put the layers into the model, unless they are there, and watch them.

        Raises:
            IntaglioError: see the class.
        """
        self.refuse_frozen(run.model)
        self.check_model(anatomy(run.model))
        if not self.modules_of(run.model):
            self.replace(run.model, seed=run.seed)
        return _Session(self, run)


class _Session(ModifierSession):
    """A training of BlockFFN layers: their losses, whose weights adapt."""

    def __init__(self, method: BlockFFN, run: TrainingRun) -> None:
        self._method, self._run, self._step = method, run, 1
        self._layers: list[BlockFFNLayer] = list(method.modules_of(run.model).values())
        self._config = self._layers[0].config
        self._chunk = method.chunk or min(MAX_CHUNK, max(MIN_CHUNK, run.checkpoint.context // 16))
        self._observed: list[Tensor] = []
        self._weight: AdaptiveWeight | SparsityController | None = None
        if method.router == "remoe":
            assert self._config.k is not None  # required by the router
            target = 1 - self._config.k / self._config.experts
            self._weight = SparsityController(1e-8 if method.l1 is None else method.l1, target)
        elif method.router == "relu":
            hold, window = (
                value if isinstance(value, int) else max(MIN_STEPS, round(value * run.steps))
                for value in (method.hold, method.window)
            )
            self._weight = AdaptiveWeight(method._chunk_weight, hold, window)
        for layer in self._layers:
            layer.watched = True

    def before_step(self, step: int, batch: Batch) -> None:
        tokens = int(batch["input_ids"].shape[1])
        if step == 1 and self._method._chunk_weight and self._chunk > tokens:
            raise IntaglioError(f"chunk is {self._chunk} tokens, longer than the rows of {tokens}; set a shorter one")
        self._step = step

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        method, config = self._method, self._config
        raws = [layer.raw for layer in self._layers if layer.raw is not None]
        ids: Tensor = batch["input_ids"]
        if len(raws) != len(self._layers) or any(raw.shape[:-1] != ids.shape for raw in raws):
            raise IntaglioError("blockffn needs an objective that passes the batch's own rows through the model, once")
        raw_NKE = torch.stack([raw.flatten(0, -2) for raw in raws], 1).float()
        index = ChunkIndex.from_batch(batch, self._chunk)
        with torch.no_grad():
            by_token, by_chunk = losses.inactive_fraction(raw_NKE, index, config)
        total = raw_NKE.new_zeros(())
        parts: dict[str, Tensor | float] = {"token sparsity": by_token, "chunk sparsity": by_chunk}
        if method._locality:
            parts["locality"] = locality = losses.locality(raw_NKE, index, method.steep)
            total = total + method._locality * locality
        if isinstance(self._weight, AdaptiveWeight) and method._chunk_weight:
            parts["chunk firing"] = firing = losses.chunk_firing(raw_NKE, index, config)
            weight = self._weight.weight(self._step) if method.adapt else method._chunk_weight
            parts["chunk weight"] = weight
            total = total + weight * firing
            self._observed.append(firing.detach())
        if isinstance(self._weight, SparsityController):
            assert config.k is not None  # required by the router
            parts["penalty"] = penalty = losses.l1(raw_NKE, index, config.k)
            parts["penalty weight"] = self._weight.weight(self._step)
            total = total + self._weight.weight(self._step) * penalty
            self._observed.append(by_token)
        if config.router == "topk" and (method.balance is None or method.balance):
            assert config.k is not None  # required by the router
            parts["balance"] = balance = losses.balance(raw_NKE, index, config.k)
            total = total + (1e-2 if method.balance is None else method.balance) * balance
        return Loss(total, parts)

    def after_step(self, step: int) -> None:
        if self._weight is not None and self._observed:
            observed = torch.stack(self._observed).mean()
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(observed)
                observed = observed / torch.distributed.get_world_size()
            self._weight.observe(step, float(observed))
        self._observed = []
        for layer in self._layers:
            layer.raw = None

    def param_groups(self) -> list[dict[str, Any]]:
        if self._method.router_rate is None:
            return []
        routers = [layer.router for layer in self._layers if layer.router is not None]
        return [{"params": routers, "lr": self._method.router_rate, "weight_decay": self._method.router_decay}]

    def state_dict(self) -> dict[str, Any]:
        return {} if self._weight is None else self._weight.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._weight is not None:
            self._weight.load_state_dict(state)

    def detach(self) -> None:
        for layer in self._layers:
            layer.watched, layer.raw = False, None
        self._run.checkpoint.set_runtime_state(self._method.slug, asdict(self._config))
