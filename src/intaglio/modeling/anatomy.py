"""The only module that knows model families: blocks, linears (fused ones as views), norms, embedding, head, windows.

Nothing here names a model class. Blocks are the only `ModuleList` whose items are all `GradientCheckpointingLayer`,
which every family of transformers 5 has; a model where that is not unique is refused. Convolutional models of images
(ResNet, ConvNeXt) have stages instead, whose residual layers are the blocks; methods that need linear projections or
attention refuse them.

Dimension letters: B batch, L sequence, D width, O output features, I input features, F hidden features of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.modeling.replacement import REPLACED, ReplacedLinear, module_names

Part = Literal["attention", "mlp"]

CACHES = ("cache", "past_key_values")
"""What the key-value cache is called, as a model's argument and in what it returns: since transformers 5.24, before."""
CACHE = CACHES[0 if "cache" in {f.name for f in fields(BaseModelOutputWithPastAndCrossAttentions)} else 1]
"""What the installed version calls it."""

_ATTENTION_WORDS = ("attn", "attention")
_CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention")
_ELEMENTWISE = ("A_log",)
"""Parameters with several dimensions that no matrix product reads."""
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
_INTERLEAVED = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "gpt_bigcode"})
_CODEGEN_SHARDS = 4
"""CodeGen's fused rows are grouped by shards of the machines it was trained on, each of q, v and k."""
_ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "query": "q", "key": "k", "value": "v", "Wo": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


@dataclass(frozen=True, eq=False)
class Linear:
    """A projection of a block as a matrix [O, I], whether the stored weight is plain, transposed or fused.

    Args:
        name: name in the block, such as `self_attn.q_proj`; a part of a fused weight has its role appended, as in
            `self_attn.qkv_proj[k]`.
        part: `attention` or `mlp`.
        role: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, or the module's own name for other projections.
        module: the `nn.Linear` or `Conv1D` that holds the weight, or the module of stacked experts.
        rows: the module's output rows that belong to this projection, int64 [O]; None for all of them.
        parameter: name of the weight in the module.
        expert: index of the matrix in a stacked parameter [E, O, I]; None for a plain weight. Its name has the index
            appended, as in `mlp.experts.down_proj[3]`.
    """

    name: str
    part: Part
    role: str
    module: nn.Module
    rows: Tensor | None = None
    parameter: str = "weight"
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The parameter that holds the matrix: plain, transposed, fused or stacked."""
        weight: Tensor = getattr(self.module, self.parameter)
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the parameter holds the matrix as [I, O]."""
        return isinstance(self.module, Conv1D) or (self.expert is not None and _is_transposed(self.module))

    @property
    def _stored(self) -> Tensor:
        weight = self.weight if self.expert is None else self.weight[self.expert]
        return weight.T if self.transposed else weight

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
    config = getattr(model, "config", None)
    if len(lists) > 1 and hasattr(model, "get_decoder") and not getattr(config, "is_encoder_decoder", False):
        decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        own = set(map(id, decoder.modules()))  # without those of an image or audio encoder
        lists = [module for module in lists if id(module) in own]
    if len(lists) != 1:
        kind = getattr(config, "model_type", type(model).__name__)
        what = "no list of transformer blocks" if not lists else f"{len(lists)} lists of transformer blocks"
        raise IntaglioError(f"the model family {kind!r} is not supported: {what} could be identified in it")
    return lists[0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, or the residual layers of all stages, in order."""
    staged = _stage_layers(model)
    return list(block_list(model)) if staged is None else staged


def context_length(model: nn.Module) -> int:
    """Return the longest input in tokens; RoBERTa's positions begin after its padding id, so its table holds fewer."""
    config: Any = model.config
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
    tables: list[Any] = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    first = (table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None)
    return positions - next(first, 0)


def _stage_depths(config: Any) -> list[int] | None:
    """Return the number of residual layers of each stage; None for models without stages."""
    depths = getattr(config, "depths", None)
    return None if depths is None else list(depths)


def _stage_layers(model: nn.Module) -> list[nn.Module] | None:
    """Return the residual layers of a model with stages, whose numbers its config has; None for others."""
    depths = _stage_depths(getattr(model, "config", None))
    if depths is None:
        return None
    for name, stages in model.named_modules():
        if name.rpartition(".")[2] == "stages" and isinstance(stages, nn.ModuleList):
            layers = [list(getattr(stage, "layers", ())) for stage in stages]
            if [len(items) for items in layers] == depths:
                return [layer for items in layers for layer in items]
    return None


def attention(block: nn.Module) -> nn.Module:
    """Return the self-attention module of a block: the module that calls the attention interface."""
    module = _self_attention(block)
    if module is None:
        raise IntaglioError(f"no self-attention could be identified in a {type(block).__name__}")
    return module


def has_plain_scores(parts: Anatomy, layer: int) -> bool:
    """Return whether the attention of a layer neither caps its scores nor has learned sinks."""
    capped = getattr(parts.config, "attn_logit_softcapping", None)
    return not capped and not hasattr(attention(parts.blocks[layer]), "sinks")


def _self_attention(block: nn.Module) -> nn.Module | None:
    candidates = [
        module
        for name, module in block.named_modules()
        if name
        and any(word in name.lower().rpartition(".")[2] or name.endswith(".self") for word in _ATTENTION_WORDS)
        # An adapter of PEFT keeps its linear layer as `base_layer`.
        and any(isinstance(getattr(c, "base_layer", c), (nn.Linear, Conv1D, ReplacedLinear)) for c in module.children())
    ]
    # Families that do not call the attention interface have neither attribute.
    marked = [module for module in candidates if hasattr(module, "is_causal") or hasattr(module, "scaling")]
    return next(iter(marked or candidates), None)


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
    if config.model_type == "codegen":
        by_shard = rows.view(_CODEGEN_SHARDS, 3, -1)
        return [(role, by_shard[:, place].reshape(-1)) for role, place in zip(roles, (0, 2, 1), strict=True)]
    groups = _key_heads(config)
    if out % (heads + 2 * groups):
        return []
    width = out // (heads + 2 * groups)
    if config.model_type in _INTERLEAVED:
        by_group = rows.view(groups, heads // groups + 2, width)
        parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
        return [(role, part.reshape(-1)) for role, part in zip(roles, parts, strict=True)]
    return list(zip(roles, rows.split([heads * width, groups * width, groups * width]), strict=True))


def _key_heads(config: Any) -> int:
    """Return the number of key and value heads."""
    heads = int(config.num_attention_heads)
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else heads  # its other field is then ignored
    if getattr(config, "multi_query", False) and config.model_type == "gpt_bigcode":
        return 1
    return int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads)


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


def stacked_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's stacked matrices, one per expert: [E, O, I], or [E, I, O] where transposed.

    Known are the experts that transformers' experts interface runs, and modules with the sizes of a linear layer.
    """
    sizes = tuple(getattr(module, name, None) for name in ("num_experts", "output_size", "input_size"))
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and (hasattr(module, "is_transposed") or tuple(parameter.shape) == sizes)
    ]


def _routers(block: nn.Module, experts: set[int]) -> set[int]:
    """Return the ids of a block's router parameters; `experts` holds the numbers of experts."""
    routers = [
        list(module.parameters())
        for name, module in block.named_modules()
        if name.rpartition(".")[2] in ("gate", "router")
    ]
    return {id(p) for weights in routers for p in weights if any(weight.shape[0] in experts for weight in weights)}


def linears(block: nn.Module, config: Any, experts: bool = False) -> list[Linear]:
    """Return the projections of a block in module order, fused projections split.

    Replaced projections (`intaglio.modeling.replacement`) are excluded: they have no plain weight. So are
    cross-attention in a decoder without an encoder, which never runs, and the routers of a mixture of experts.

    Args:
        block: a transformer block.
        config: the model's text config.
        experts: whether each matrix of stacked experts is a projection too. Default False: a block with such is
            refused, for callers that replace modules.
    """
    result: list[Linear] = []
    covered: set[int] = set()
    inside: set[int] = set()
    stacks = {module: stacked_parameters(module) for module in block.modules()} if experts else {}
    sizes = {getattr(module, name).shape[0] for module, names in stacks.items() for name in names}
    routers = _routers(block, sizes)
    covered |= routers
    for name, module in block.named_modules():
        if isinstance(module, REPLACED):
            inside.update(map(id, module.modules()))
            covered.update(map(id, module.parameters()))
        elif isinstance(module, nn.Conv1d) or _is_norm(module):  # a norm by head has a matrix of weights
            covered.update(map(id, module.parameters()))
        elif not getattr(config, "is_encoder_decoder", False) and name.rpartition(".")[2] in _CROSS_ATTENTION:
            inside.update(map(id, module.modules()))
            covered.update(map(id, module.parameters()))
        for stacked in stacks.get(module, ()):
            covered.update(id(parameter) for parameter in module.parameters(recurse=False))
            result += [
                Linear(f"{name}.{stacked}[{expert}]", _part(name), stacked, module, None, stacked, expert)
                for expert in range(len(getattr(module, stacked)))
            ]
        if id(module) in inside or not isinstance(module, (nn.Linear, Conv1D)) or id(module.weight) in routers:
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
        if parameter.dim() > 1 and id(parameter) not in covered and not name.endswith(_ELEMENTWISE):
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
        f"the MLP of the model family {config.model_type!r} is not understood: it must be a module of two projections,"
        " or three of which one is a gate, and nothing else with weights, with an activation that the config names"
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


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(module.children())


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
        blocks: the transformer blocks, or the residual layers of all stages.
        embedding: the token embedding; of images, that of patches or the stem.
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

    @cached_property
    def _editable(self) -> bool:
        _refuse_shared(self.blocks, self.config)
        return True

    def linears(self, index: int, experts: bool = False) -> list[Linear]:
        """Return the projections of block `index`; refuse blocks with shared weights or matrices of other kinds."""
        assert self._editable
        return linears(self.blocks[index], self.config, experts)

    def mlp(self, index: int) -> MLP:
        """Return the MLP of block `index`."""
        assert self._editable
        return mlp(self.blocks[index], self.config)

    def all_linears(self, experts: bool = False) -> list[tuple[str, Linear]]:
        """Return every projection of every block with its full name, such as `layers.3.self_attn.q_proj`."""
        return [
            (f"layers.{index}.{linear.name}", linear)
            for index in range(len(self.blocks))
            for linear in self.linears(index, experts)
        ]

    def feed_forward(self, index: int) -> FeedForward:
        """Return the feed-forward location of block `index`."""
        assert self._editable
        return feed_forward(self.blocks[index], self.config)

    def feed_forwards(self) -> list[tuple[str, FeedForward]]:
        """Return the feed-forward location of every block, with the block's name in the model."""
        names = module_names(self.model)
        return [(names[id(block)], self.feed_forward(index)) for index, block in enumerate(self.blocks)]

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
    if _stage_depths(config) is not None:  # ResNet's `layer_types` are not those of its layers
        return None
    if kinds is not None and kinds[index] == "full_attention":
        return None
    window = getattr(_self_attention(block), "sliding_window", None)
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
        for linear in linears(block, config, experts=True):
            if (
                owners.setdefault(id(linear.weight), linear.module) is not linear.module
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
    decoder = getattr(base, "decoder", None)
    if isinstance(decoder, PreTrainedModel):  # OPT's and Bart's heads call it themselves, past the base
        base = decoder
    embedding = _embedding(model, base)
    if embedding is None:
        raise IntaglioError(f"the model family {config.model_type!r} is not supported: it has no token embedding")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return Anatomy(
        model=model,
        base=base,
        config=config,
        blocks=tuple(block_modules),
        embedding=embedding,
        head=head,
        tied=head is not None and head.weight is getattr(embedding, "weight", None),
        causal=_causal(block_modules, config),
        windows=tuple(_window(block, config, index) for index, block in enumerate(block_modules)),
    )


def _embedding(model: Any, base: nn.Module) -> nn.Module | None:
    """Return the token or patch embedding; of a model with stages, the stem."""
    try:
        embedding: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # raised for ResNet and ConvNeXt
        embedding = next(base.children(), None)
    return embedding


def _causal(block_modules: Sequence[nn.Module], config: Any) -> bool:
    marks = [m.is_causal for block in block_modules for m in block.modules() if hasattr(m, "is_causal")]
    if any(marks) or getattr(config, "is_decoder", False):
        return True
    # Families whose attention has no such attribute.
    kind = config.model_type
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return decoder and not marks


def check_widths(named: Sequence[tuple[str, int, int]], group: int, what: str) -> None:
    """Refuse a group size that does not divide the input width of every projection."""
    for name, _, columns in named:
        if columns % group:
            raise IntaglioError(f"{what} does not fit {name}: its {columns} inputs are not a multiple of {group}")
