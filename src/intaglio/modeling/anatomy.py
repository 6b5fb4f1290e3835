"""The only module that knows model families: blocks, linears (fused ones as views), norms, embedding, head, windows.

Nothing here names a model class. Blocks are the only `ModuleList` whose items are all `GradientCheckpointingLayer`,
which every family of transformers 5 has; a model where that is not unique is refused.

Dimension letters: B batch, L sequence, D width, O output features, I input features, F hidden features of an MLP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.modeling.replacement import REPLACED, ReplacedLinear, module_names

Part = Literal["attention", "mlp"]

CACHES = ("cache", "past_key_values")
"""What the key-value cache is called, as a model's argument and in what it returns: since transformers 5.24, before."""
CACHE = CACHES[0 if "cache" in {f.name for f in fields(BaseModelOutputWithPastAndCrossAttentions)} else 1]
"""What the installed version calls it."""

_ATTENTION_WORDS = ("attn", "attention")
# Last name of a projection -> the roles of the parts fused in it, in the order of its rows.
_FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q", "k", "v"),
    "Wqkv": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "query_key_value": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
    "Wi": ("up", "gate"),
}
# Families whose fused rows are grouped by head (q, k and v of head 0, then of head 1, ...), by `model_type`.
_INTERLEAVED = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom"})
_ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "query": "q", "key": "k", "value": "v", "Wo": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True, eq=False)
class Linear:
    """A projection of a block as a matrix [O, I], whether the stored weight is plain, transposed or fused.

    Args:
        name: name in the block, such as `self_attn.q_proj`; a part of a fused weight has its role appended, as in
            `self_attn.qkv_proj[k]`.
        part: `attention` or `mlp`.
        role: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, or the module's own name for other projections.
        module: the `nn.Linear` or `Conv1D` that holds the weight.
        rows: the module's output rows that belong to this projection, int64 [O]; None for all of them.
    """

    name: str
    part: Part
    role: str
    module: nn.Module
    rows: Tensor | None = None

    @property
    def _stored(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)`."""
        out, into = self._stored.shape
        return (out if self.rows is None else len(self.rows), into)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the matrix [O, I] in the module's dtype, as a view where possible; do not edit it."""
        return self._stored.detach() if self.rows is None else self._stored.detach()[self.rows.to(self._stored.device)]

    @torch.no_grad()
    def read_bias(self) -> Tensor | None:
        """Return the bias [O] in the module's dtype, or None; do not edit it."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        if bias is None or self.rows is None:
            return bias if bias is None else bias.detach()
        return bias.detach()[self.rows.to(bias.device)]

    @torch.no_grad()
    def write(self, weight_OI: Tensor) -> None:
        """Replace the matrix."""
        if self.rows is None:
            self._stored.copy_(weight_OI)
        else:
            stored = self._stored
            stored[self.rows.to(stored.device)] = weight_OI.to(stored.dtype)


def block_list(model: nn.Module) -> nn.ModuleList:
    """Return the model's own list of transformer blocks."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(item, GradientCheckpointingLayer) for item in module)
    ]
    if len(lists) != 1:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        what = "no list of transformer blocks" if not lists else f"{len(lists)} lists of transformer blocks"
        raise IntaglioError(f"the model family {kind!r} is not supported: {what} could be identified in it")
    return lists[0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, in order."""
    return list(block_list(model))


def attention(block: nn.Module) -> nn.Module:
    """Return the self-attention module of a block: the module that calls the attention interface."""
    candidates = [
        module
        for name, module in block.named_modules()
        if name
        and any(word in name.lower().rpartition(".")[2] or name.endswith(".self") for word in _ATTENTION_WORDS)
        and any(isinstance(child, (nn.Linear, Conv1D, ReplacedLinear)) for child in module.children())
        and (hasattr(module, "is_causal") or hasattr(module, "scaling"))
    ]
    if not candidates:
        raise IntaglioError(f"no self-attention could be identified in a {type(block).__name__}")
    return candidates[0]


def _part(name: str) -> Part:
    return "attention" if any(word in name.lower() for word in _ATTENTION_WORDS) else "mlp"


def _fused_rows(name: str, module: nn.Module, config: Any) -> list[tuple[str, Tensor]]:
    """Return the `(role, rows)` parts of a fused projection; empty for any other."""
    roles = _FUSED.get(name.rpartition(".")[2])
    if roles is None:
        return []
    weight: Tensor = module.weight  # type: ignore[assignment]
    out = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
    rows = torch.arange(out)
    if roles[0] != "q":
        return list(zip(roles, rows.chunk(len(roles)), strict=True))
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if out % (heads + 2 * groups):
        return []
    width = out // (heads + 2 * groups)
    if config.model_type in _INTERLEAVED:
        by_head = rows.view(heads, 3, width)
        return [(role, by_head[:, index].reshape(-1)) for index, role in enumerate(roles)]
    return list(zip(roles, rows.split([heads * width, groups * width, groups * width]), strict=True))


def linears(block: nn.Module, config: Any) -> list[Linear]:
    """Return the projections of a block in module order, fused projections split.

    Replaced projections (`intaglio.modeling.replacement`) are excluded: they have no plain weight.
    """
    result: list[Linear] = []
    covered: set[int] = set()
    inside: set[int] = set()
    for name, module in block.named_modules():
        if isinstance(module, REPLACED):
            inside.update(map(id, module.modules()))
            covered.update(map(id, module.parameters()))
        if id(module) in inside or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        covered.add(id(module.weight))
        part = _part(name)
        fused = _fused_rows(name, module, config)
        for role, rows in fused:
            result.append(Linear(f"{name}[{role}]", part, role, module, rows))
        if not fused:
            last = name.rpartition(".")[2]
            result.append(Linear(name, part, _ROLES.get(last, last), module))
    for name, parameter in block.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in covered:
            raise IntaglioError(
                f"the model family {config.model_type!r} is not supported: its blocks hold {name} "
                f"{tuple(parameter.shape)}, which is not a linear layer"
            )
    if not result and not inside:
        raise IntaglioError(
            f"the model family {config.model_type!r} is not supported: its blocks have no linear layers"
        )
    return result


@dataclass(frozen=True)
class FeedForward:
    """Location of a block's feed-forward part, which a whole MLP can replace.

    `place` is the name in the block of a module from D to D. `passed` is an earlier module that would do part of the
    work and becomes the identity. BERT has one: its two projections are in two modules, the second of which also adds
    and normalises.
    """

    place: str
    passed: str | None = None

    def puts(self, prefix: str, module: nn.Module) -> dict[str, nn.Module]:
        """Return the argument of `intaglio.modeling.replacement.replace_modules` that inserts a module."""
        other = {} if self.passed is None else {f"{prefix}.{self.passed}": nn.Identity()}
        return {**other, f"{prefix}.{self.place}": module}


def feed_forward(block: nn.Module, config: Any) -> FeedForward:
    """Locate the feed-forward part of a block."""
    for name, module in block.named_modules():
        if isinstance(module, REPLACED) and _part(name) == "mlp":
            raise IntaglioError(
                f"the feed-forward part of a block is not the model's own: {module.slug} replaced {name}"
            )
    mlp_linears = [linear for linear in linears(block, config) if linear.part == "mlp"]
    names = list(dict.fromkeys(linear.name.partition("[")[0] for linear in mlp_linears))
    width = int(config.hidden_size)
    fits = bool(mlp_linears) and mlp_linears[0].shape[1] == width == mlp_linears[-1].shape[0]
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    if fits and common:
        return FeedForward(".".join(common))
    if fits and len(names) == 2 and names[0].partition(".")[0] != names[1].partition(".")[0]:
        return FeedForward(names[1], names[0].partition(".")[0])
    raise IntaglioError(
        f"the model family {config.model_type!r} is not supported: the feed-forward part of its blocks is not a "
        "replaceable module"
    )


@dataclass(frozen=True, eq=False)
class MLP:
    """The MLP of a block: out(act(into x)), or out(act(into x) * factor x) where it is gated.

    `into` and `factor` are [F, D], `out` is [D, F]; `activation` is named as in transformers, `dropout` is that of the
    output.
    """

    where: FeedForward
    into: Linear
    factor: Linear | None
    out: Linear
    activation: str
    dropout: float = 0.0


def mlp(block: nn.Module, config: Any) -> MLP:
    """Return the MLP of a block."""
    where = feed_forward(block, config)
    mlp_linears = [linear for linear in linears(block, config) if linear.part == "mlp"]
    parts = _mlp_parts(mlp_linears)
    activations = [getattr(config, name, None) for name in _ACTIVATIONS]
    activation = next((value for value in activations if isinstance(value, str)), None)
    if parts is not None and activation is not None:
        home = parts[0].name.partition("[")[0].rpartition(".")[0]
        module = block.get_submodule(home)
        known = {id(parameter) for linear in mlp_linears for parameter in linear.module.parameters()}
        if home and all(id(parameter) in known for parameter in module.parameters()):
            dropout = max((float(value.p) for value in module.modules() if isinstance(value, nn.Dropout)), default=0.0)
            return MLP(where, *parts, activation, dropout)
    raise IntaglioError(
        f"the MLP of the model family {config.model_type!r} is not understood: it must be two projections, or three of"
        " which one is a gate, and nothing else with weights"
    )


def _mlp_parts(mlp_linears: Sequence[Linear]) -> tuple[Linear, Linear | None, Linear] | None:
    """Return the activated projection, its factor and the down projection, or None for any other structure."""
    roles = {linear.role: linear for linear in mlp_linears}
    into, factor = (mlp_linears[0], None) if len(mlp_linears) == 2 else (roles.get("gate"), roles.get("up"))
    if mlp_linears and mlp_linears[0].name.endswith("Wi[up]"):  # its first half is activated
        into, factor = factor, into
    if into is None or len(mlp_linears) != (2 if factor is None else 3):
        return None
    shapes = {into.shape, (factor or into).shape, mlp_linears[-1].shape[::-1]}
    return (into, factor, mlp_linears[-1]) if len(shapes) == 1 else None


def norms(block: nn.Module) -> dict[str, nn.Module]:
    """Return the normalisations of a block by name."""
    result = {name: m for name, m in block.named_modules() if "norm" in type(m).__name__.lower()}
    if not result:
        raise IntaglioError(f"no normalisation could be identified in a {type(block).__name__}")
    return result


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a model, from `anatomy(model)`.

    Args:
        model: the whole model.
        base: the model without its head.
        config: the text config.
        blocks: the transformer blocks.
        embedding: the token embedding.
        head: the output projection onto the vocabulary, or None.
        tied: whether head and embedding share a tensor.
        causal: whether it is a decoder.
        windows: the sliding window of each block in tokens, None for full attention.
    """

    model: nn.Module
    base: nn.Module
    config: Any
    blocks: tuple[nn.Module, ...]
    embedding: nn.Module
    head: nn.Module | None
    tied: bool
    causal: bool
    windows: tuple[int | None, ...]

    def linears(self, index: int) -> list[Linear]:
        """Return the projections of block `index`."""
        return linears(self.blocks[index], self.config)

    def mlp(self, index: int) -> MLP:
        """Return the MLP of block `index`."""
        return mlp(self.blocks[index], self.config)

    def all_linears(self) -> list[tuple[str, Linear]]:
        """Return every projection of every block with its full name, such as `layers.3.self_attn.q_proj`."""
        return [(f"layers.{i}.{linear.name}", linear) for i in range(len(self.blocks)) for linear in self.linears(i)]

    def feed_forwards(self) -> list[tuple[str, FeedForward]]:
        """Return the feed-forward location of every block, with the block's name in the model."""
        names = module_names(self.model)
        return [(names[id(block)], feed_forward(block, self.config)) for block in self.blocks]

    @property
    def final_norm(self) -> nn.Module | None:
        """The normalisation after the last block, or None (encoders that normalise inside their blocks)."""
        inside = {id(m) for block in self.blocks for m in block.modules()}
        after = False
        for module in self.base.modules():
            after = after or module is self.blocks[-1]
            if after and id(module) not in inside and "norm" in type(module).__name__.lower():
                return module
        return None


def _window(block: nn.Module, config: Any, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] == "full_attention":
        return None
    window = getattr(attention(block), "sliding_window", None)
    if window is None and kinds is not None and kinds[index] == "sliding_attention":
        window = getattr(config, "sliding_window", None)
    if window is None and kinds is None:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return int(window) if window else None


def _refuse_shared(block_modules: Sequence[nn.Module], config: Any) -> None:
    """Refuse blocks with shared weights: editing a weight would edit it for other inputs."""
    owners: dict[int, nn.Module] = {}
    for block in block_modules:
        norms(block)
        for linear in linears(block, config):
            if (
                owners.setdefault(id(linear.module.weight), linear.module) is not linear.module
                or block_modules.count(block) > 1
            ):
                raise IntaglioError(
                    f"the model family {config.model_type!r} is not supported: its blocks share weights ({linear.name})"
                )


def anatomy(model: nn.Module) -> Anatomy:
    """Identify the parts of a model."""
    block_modules = blocks(model)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    base: nn.Module = getattr(model, "base_model", model)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if embedding is None:
        raise IntaglioError(f"the model family {config.model_type!r} is not supported: it has no token embedding")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    _refuse_shared(block_modules, config)
    return Anatomy(
        model=model,
        base=base,
        config=config,
        blocks=tuple(block_modules),
        embedding=embedding,
        head=head,
        tied=head is not None and head.weight is embedding.weight,
        causal=any(getattr(module, "is_causal", False) for module in block_modules[0].modules()),
        windows=tuple(_window(block, config, index) for index, block in enumerate(block_modules)),
    )


@dataclass
class BlockInputs:
    """Inputs of the blocks for a batch: the hidden state of the next block to run, and each block's other arguments.

    Layers share tensors, so `kwargs` holds references. `mask_BL` is True at real tokens, None without padding.
    """

    hidden_BLD: Tensor
    args: list[tuple[Any, ...]] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    mask_BL: Tensor | None = None


@contextmanager
def _pass_through(parts: Anatomy, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """Make every block return its input and record the arguments of its call."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in parts.blocks]
    for block in parts.blocks:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in parts.blocks:
            del block.forward


@torch.no_grad()
def capture(parts: Anatomy, batch: Mapping[str, Any]) -> BlockInputs:
    """Run the model around its blocks to record the input of block 0 and every block's masks and positions.

    Arguments are recorded per block, since layers may differ (sliding and full attention).
    """
    device = next(parts.base.parameters()).device
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    extra: dict[str, Any] = {"use_cache": False} if parts.causal else {}
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with _pass_through(parts, calls):
        parts.base(**extra | inputs)
    mask = inputs.get("attention_mask")
    padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    hidden = calls[0][0][0] if calls[0][0] else calls[0][1]["hidden_states"]
    return BlockInputs(
        hidden_BLD=hidden,
        args=[args[1:] for args, _ in calls],
        kwargs=[{k: v for k, v in kwargs.items() if k != "hidden_states"} for _, kwargs in calls],
        mask_BL=None if padding is None else padding.bool(),
    )


@torch.no_grad()
def run_blocks(parts: Anatomy, low: int, high: int, inputs: BlockInputs) -> Tensor:
    """Run blocks `low` to `high - 1` on `inputs.hidden_BLD` and return the hidden state [B, L, D]."""
    hidden = inputs.hidden_BLD
    for index in range(low, high):
        hidden = run_block(parts.blocks[index], index, hidden, inputs)
    return hidden


def run_block(block: nn.Module, index: int, hidden_BLD: Tensor, inputs: BlockInputs) -> Tensor:
    """Run a block on a hidden state and return the next [B, L, D]; differentiable."""
    output = block(hidden_BLD, *inputs.args[index], **inputs.kwargs[index])
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def after_blocks(parts: Anatomy, hidden_RD: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return logits [R, V] from the last block's output, through final norm, head and scalings; differentiable.

    The model's own `forward` runs around blocks that return their inputs, the last of them `hidden_RD`.
    """
    ids = torch.zeros((len(hidden_RD), 1), dtype=torch.long, device=hidden_RD.device)
    with _pass_through(parts, []), _forward(parts.head, head):
        parts.blocks[-1].forward = lambda *args, **kwargs: hidden_RD[:, None]
        logits: Tensor = parts.model(input_ids=ids, use_cache=False).logits
    return logits[:, 0]


@contextmanager
def _forward(module: nn.Module | None, call: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Replace a module's `forward` inside the context; do nothing where either is None."""
    if module is None or call is None:
        yield
        return
    before = vars(module).get("forward")
    module.forward = call
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class HeadOnly:
    """The part of a model after its last hidden state, from hidden states to logits.

    Frozen, it keeps a copy of the head's parameters (not of the blocks), so the original's predictions can be
    recomputed from its final hidden states after the blocks were edited. Scalings and soft caps after the head are the
    model's own, since the model's own `forward` runs around a stand-in for its base.

    Args:
        parts: the model's anatomy; it must have a head.
        frozen: copy the head (default); False follows the model.

    Raises:
        IntaglioError: the model has no output head.
    """

    def __init__(self, parts: Anatomy, frozen: bool = True) -> None:
        if parts.head is None:
            raise IntaglioError(f"{type(parts.model).__name__} has no output head, so it predicts no tokens")
        model = parts.model
        self._base = _Given(parts.base.config)
        self._shell = copy.copy(model)
        self._shell.__dict__["_modules"] = {
            name: self._base if module is parts.base else (copy.deepcopy(module) if frozen else module)
            for name, module in model._modules.items()
        }

    @torch.no_grad()
    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Return logits [B, L, V] of final hidden states, in the model's dtype."""
        self._base.hidden = hidden_BLD
        ids = torch.zeros(hidden_BLD.shape[:2], dtype=torch.long, device=hidden_BLD.device)
        logits: Tensor = self._shell(input_ids=ids).logits
        return logits


class _Given(nn.Module):
    """Stand-in for the base model that returns a given hidden state."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


@torch.no_grad()
def final_hidden(parts: Anatomy, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the base model's `last_hidden_state` [B, L, D] for a batch."""
    device = next(parts.base.parameters()).device
    extra = {"use_cache": False} if parts.causal else {}
    output = parts.base(**{name: value.to(device) for name, value in batch.items()}, **extra)
    hidden: Tensor = output.last_hidden_state
    return hidden


def check_widths(named: Sequence[tuple[str, int, int]], group: int, what: str) -> None:
    """Refuse a group size that does not divide the input width of every projection."""
    for name, _, columns in named:
        if columns % group:
            raise IntaglioError(f"{what} does not fit {name}: its {columns} inputs are not a multiple of {group}")
