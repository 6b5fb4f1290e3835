"""Set, read and clear the rules of a model's layers, and compute each layer's mask.

Dimension letters: N layers, H heads, Q query positions, K key positions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from intaglio.errors import IntaglioError, first_line
from intaglio.masks.attention_interface import ATTENTION, BASES, PREFIX, RULE, SCORE, MaskRequest
from intaglio.masks.rules import Rule, Score
from intaglio.modeling.anatomy import CACHES, Anatomy, anatomy, attention, blocks
from intaglio.modeling.partial_pass import capture

_STATE = "_intaglio_masks"
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass
class _State:
    """State of the guard, an attribute of the base model; restored by `clear_visibility`.

    `stock` is the attention implementation below ours, `parameters` are the base model's positional parameters.
    """

    stock: str
    guard: RemovableHandle
    parameters: tuple[str, ...]
    ruled: bool = False
    is_noncausal: bool = False


def _base(model: nn.Module) -> Any:
    """Return the innermost pretrained model that holds the blocks, which makes the masks."""
    first = blocks(model)[0]
    holders = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(inner is first for inner in module.modules())
    ]
    if not holders:
        raise IntaglioError(f"{type(model).__name__} is not a Hugging Face model, so its attention cannot be set")
    return holders[-1]


def _guard(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuse, before each forward, arguments that would drop the rules or give wrong results under them."""
    state: _State = getattr(base, _STATE)
    name = base.config._attn_implementation
    if state.ruled and not (name or "").startswith(PREFIX):
        raise IntaglioError(
            f"the attention implementation was set to {name!r}, which drops the visibility rules and "
            "attention functions; call set_visibility or set_attention again, or clear_visibility before"
        )
    if not state.is_noncausal:
        return args, kwargs
    values = {**dict(zip(state.parameters, args, strict=False)), **kwargs}
    if any(values.get(name) is not None for name in CACHES):
        raise IntaglioError(
            "a visibility rule that looks right cannot be used with a KV cache, since earlier keys would depend on "
            "later tokens; pass use_cache=False"
        )
    return (), ({**values, "use_cache": False} if "use_cache" in state.parameters else values)


def _set_implementation(base: Any, name: str) -> None:
    try:
        if base._can_set_attn_implementation():  # else transformers logs a warning and changes nothing
            base.set_attn_implementation(name)
    except ValueError as error:
        raise IntaglioError(
            f"the attention of {type(base).__name__} cannot be set to {name}: {first_line(error)}"
        ) from error
    if base.config._attn_implementation != name:
        raise IntaglioError(
            f"{type(base).__name__} does not call transformers' attention interface, so its attention cannot be changed"
        )


def _install(model: nn.Module) -> _State:
    """Switch the model to our attention and install the guard, once."""
    base = _base(model)
    current = base.config._attn_implementation
    stock = current.removeprefix(PREFIX) if isinstance(current, str) else current
    if stock not in BASES:
        raise IntaglioError(
            f"visibility rules do not work with the attention implementation {stock!r}, which reads no mask function; "
            f"load the model with attn_implementation set to {', '.join(BASES[:-1])} or {BASES[-1]}"
        )
    state: _State | None = getattr(base, _STATE, None)
    if state is None:
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(base.forward).parameters.values()
        names = tuple(parameter.name for parameter in parameters if parameter.kind in positional)
        state = _State(stock, base.register_forward_pre_hook(_guard, with_kwargs=True), names)
        setattr(base, _STATE, state)
    state.stock = stock
    _set_implementation(base, PREFIX + stock)
    return state


def _by_layer(model: nn.Module, values: Any, what: str) -> dict[int, Any]:
    """Return the rule of each layer that has one, from the user's argument."""
    count = len(blocks(model))
    if not isinstance(values, Mapping):
        return {} if values is None else dict.fromkeys(range(count), values)
    wrong = [
        layer for layer in values if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count
    ]
    if wrong:
        raise IntaglioError(f"{what} names the layer {wrong[0]!r}; the model has the layers 0 to {count - 1}")
    return {layer: value for layer, value in values.items() if value is not None}


def _check_layer(config: Any, layer: int) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] not in _LAYER_TYPES:
        raise IntaglioError(
            f"layer {layer} is {kinds[layer]!r} and cannot have a visibility rule; {' and '.join(_LAYER_TYPES)} can"
        )


def _set_on_layers(model: nn.Module, attribute: str, values: Mapping[int, Any]) -> None:
    """Replace all values on the attention modules of their layers."""
    base = _base(model)
    for layer in values:
        _check_layer(base.config, layer)
    # Located before any change, so that a refusal leaves the model unchanged.
    targets = {layer: attention(blocks(model)[layer]) for layer in values}
    state = _install(model)
    for module in list(model.modules()):
        if _has(module, attribute):
            delattr(module, attribute)
    for layer, module in targets.items():
        setattr(module, attribute, values[layer])
    rules = get_visibility(model).values()
    state.ruled = any(_has(module, name) for module in model.modules() for name in (RULE, SCORE, ATTENTION))
    state.is_noncausal = any(rule.is_noncausal for rule in rules)
    _guard_generate(model, state.is_noncausal)


def _has(module: nn.Module, attribute: str) -> bool:
    """Return whether a module has an attribute or submodule of its own."""
    return attribute in module.__dict__ or attribute in module._modules


def _guard_generate(model: nn.Module, wanted: bool) -> None:
    """Guard the model's `generate` while a rule sees later tokens; remove the guard when none does."""
    model.__dict__.pop("generate", None)
    if wanted and hasattr(model, "generate"):
        # A partial, unlike a bound method, is copied and pickled with its model.
        model.__dict__["generate"] = functools.partial(_generate, model)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate under a rule that sees later tokens: without a cache where that is correct, else refuse."""
    refuse_to_generate(model, _shortest_prompt(args, kwargs))
    return type(model).generate(model, *args, **{"use_cache": False, **kwargs})


def _shortest_prompt(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the real tokens of the shortest prompt, as far as the arguments of `generate` show."""
    values = kwargs.get("attention_mask")
    if isinstance(values, Tensor) and values.dim() == 2:
        return int(values.sum(-1).min())
    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
    return int(inputs.shape[1]) if isinstance(inputs, Tensor) else None


def refuse_to_generate(model: nn.Module, tokens: int | None = None) -> None:
    """Refuse to generate under rules by which a new token would change what earlier tokens saw."""
    for layer, rule in get_visibility(model).items():
        if rule.prefix_stable_after is None:
            raise IntaglioError(
                f"this model cannot generate: layer {layer} sees later tokens, so each new token would change what"
                " earlier ones saw; use it to read whole texts, or clear_visibility first"
            )
        if tokens is not None and tokens < rule.prefix_stable_after:
            raise IntaglioError(
                f"layer {layer} sees both ways among the first {rule.prefix_stable_after} tokens, and the prompt has"
                f" {tokens}; give a longer prompt or a rule with a shorter prefix"
            )


def is_noncausal(model: nn.Module) -> bool:
    """Return whether some layer of a model has a rule that sees later tokens."""
    return any(rule.is_noncausal for rule in get_visibility(model).values())


def predicts_next(parts: Anatomy) -> bool:
    """Return whether a model predicts the next token: a decoder with its head that sees no later tokens."""
    causal = parts.causal and getattr(parts.config, "is_causal", True) is not False
    return causal and parts.head is not None and not is_noncausal(parts.model)


def set_visibility(model: nn.Module, rules: Mapping[int, Rule | None] | Rule | None) -> None:
    """Set the attention mask of each layer of a model, replacing all earlier rules.

    A layer without a rule keeps the model's own mask. Padding (2-D `attention_mask`, left or right) always applies. So
    does a layer's sliding window: a rule is intersected with the window, which extends to both sides. Rules are not
    written into the model's config: a reloaded model has stock masks.

    A rule that sees later tokens has no KV cache: the model runs with `use_cache=False`, and a given cache is refused.
    `generate` is refused too, unless `Rule.prefix_stable_after` lies within the prompt, as a prefix does; then it
    runs without a cache. Under a rule, a 4-D `attention_mask` and packed `position_ids` are refused.

    Args:
        model: a Hugging Face model, loaded with the attention implementation sdpa, eager or flex_attention.
        rules: layer -> rule, from 0; other layers, or those with None, keep the model's own mask. A single rule applies
            to every layer. `{}` or None restores the stock masks.

    Raises:
        IntaglioError: the attention implementation reads no mask function, a layer does not exist or has no such mask,
            or a value is not a rule.
    """
    values = _by_layer(model, rules, "rules")
    device = next(model.parameters()).device
    shared: list[Rule] = []  # equal rules become one object, so that their layers share a mask
    for layer, rule in values.items():
        if not isinstance(rule, Rule):
            raise IntaglioError(f"layer {layer} was given {rule!r}, which is not a visibility rule")
        same = next((other for other in shared if other == rule), None)
        if same is None:
            same = rule.to(device)
            shared.append(same)
        values[layer] = same
    _set_on_layers(model, RULE, values)


def set_scores(model: nn.Module, scores: Mapping[int, Score | None] | Score | None) -> None:
    """Set the bias added to each layer's attention scores before the softmax, replacing all earlier score rules.

    Args:
        model: as for `set_visibility`, with which this can be combined.
        scores: layer -> `score(b, h, q, kv) -> float tensor`, such as `Alibi`, or one for every layer. Positions count
            from a row's first real token. Scores are constants: they receive no gradient.

    Raises:
        IntaglioError: as `set_visibility`.
    """
    values = _by_layer(model, scores, "scores")
    for layer, score in values.items():
        if not callable(score):
            raise IntaglioError(f"layer {layer} was given {score!r}, which is not a score rule")
    _set_on_layers(model, SCORE, values)


def set_attention(model: nn.Module, functions: Mapping[int, Any]) -> None:
    """Replace the attention function of layers, and restore the stock one in all others.

    Args:
        model: as for `set_visibility`.
        functions: layer -> `function(attention_module, query, key, value, mask, **kwargs)`, called as transformers
            calls its own; see `attention_interface.ATTENTION`. A module becomes a submodule of the layer's attention.

    Raises:
        IntaglioError: as `set_visibility`.
    """
    _set_on_layers(model, ATTENTION, _by_layer(model, functions, "layers"))


def attention_functions(model: nn.Module) -> dict[int, Any]:
    """Return the attention function of every layer that does not use the stock one."""
    modules = ((layer, module) for layer, block in enumerate(blocks(model)) for module in block.modules())
    return {layer: getattr(module, ATTENTION) for layer, module in modules if _has(module, ATTENTION)}


def get_visibility(model: nn.Module) -> dict[int, Rule]:
    """Return the rule of every layer that has one."""
    rules: dict[int, Rule] = {}
    for layer, block in enumerate(blocks(model)):
        for module in block.modules():
            if RULE in module.__dict__:
                rules[layer] = module.__dict__[RULE]
    return rules


def clear_visibility(model: nn.Module) -> None:
    """Remove every rule and score rule from a model and restore its stock attention implementation.

    Layers whose attention function is replaced keep it, and the model our implementation.
    """
    base = _base(model)
    state: _State | None = getattr(base, _STATE, None)
    if state is None:
        return
    for module in model.modules():
        module.__dict__.pop(RULE, None)
        module.__dict__.pop(SCORE, None)
    _guard_generate(model, False)
    if attention_functions(model):
        state.is_noncausal = False
        return
    state.guard.remove()
    delattr(base, _STATE)
    if (base.config._attn_implementation or "").startswith(PREFIX):  # the user may have set another since
        base.set_attn_implementation(state.stock)


@contextmanager
def temporary_visibility(model: nn.Module, rules: Mapping[int, Rule | None] | Rule) -> Iterator[None]:
    """Set rules for a block of code, such as the forward pass of a loss, and restore the earlier ones.

    Raises:
        IntaglioError: as `set_visibility`, or gradient checkpointing is on: it would repeat layers without the rules.
    """
    # The first name is that of newer releases, which deprecate the second.
    names = (name for name in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(model, name))
    if getattr(model, next(names, ""), False):
        raise IntaglioError(
            "gradient checkpointing repeats layers after their attention rules are removed; leave it out here"
        )
    earlier, scores = get_visibility(model), any(SCORE in module.__dict__ for module in model.modules())
    set_visibility(model, rules)
    try:
        yield
    finally:
        if earlier or scores:
            set_visibility(model, earlier)
        else:
            clear_visibility(model)


@contextmanager
def _requesting(base: Any) -> Iterator[None]:
    """Make the model return mask requests, whatever its attention implementation."""
    before = base.config._attn_implementation
    if not (before or "").startswith(PREFIX):
        _set_implementation(base, f"{PREFIX}{'eager' if before == 'eager' else 'sdpa'}")
    try:
        yield
    finally:
        if base.config._attn_implementation != before:
            base.set_attn_implementation(before)


@torch.no_grad()
def visible(model: nn.Module, length: int) -> Tensor:
    """Return the mask of each layer for a row without padding, bool [N, H, Q, K] with Q = K = length, on the CPU.

    H is 1 where all heads of all layers agree. Without rules these are the stock masks with their windows. The model's
    own code makes the masks; no block is run.

    Args:
        model: a Hugging Face text model, decoder or encoder.
        length: number of tokens; at least 1.

    Raises:
        IntaglioError: the length is out of range, or the model does not ask transformers for its masks.
    """
    masks = stock_masks(model, length)
    missing = next((layer for layer, seen_HQK in enumerate(masks) if seen_HQK is None), None)
    if missing is not None:
        raise IntaglioError(f"layer {missing} of {type(_base(model)).__name__} does not ask transformers for its mask")
    known = [seen_HQK for seen_HQK in masks if seen_HQK is not None]
    most = max(map(len, known))
    return torch.stack([seen_HQK.expand(most, -1, -1) for seen_HQK in known])


@torch.no_grad()
def stock_masks(model: nn.Module, length: int) -> list[Tensor | None]:
    """Return the mask of each layer as `visible` does, bool [1 or H, Q, K]; None for a layer without attention."""
    base, parts = _base(model), anatomy(model)
    longest = getattr(base.config, "max_position_embeddings", None) or length
    if not 1 <= length <= longest:
        raise IntaglioError(f"length is {length}; 1 to {longest} tokens are accepted for this model")
    rules, heads = get_visibility(model), int(getattr(base.config, "num_attention_heads", None) or 1)
    with _requesting(base):
        try:
            inputs = capture(parts, {"input_ids": torch.zeros(1, length, dtype=torch.long)})
        except IntaglioError as error:
            if MaskRequest.__name__ not in str(error):
                raise
            raise IntaglioError(
                f"{type(base).__name__} changes its masks in its own code, so they cannot be shown"
            ) from error
    requests = [
        next((value for value in (*args, *kwargs.values()) if isinstance(value, MaskRequest)), None)
        for args, kwargs in zip(inputs.args, inputs.kwargs, strict=True)
    ]
    return [
        None if request is None else request.visible(rules.get(layer), heads)[0].cpu()
        for layer, request in enumerate(requests)
    ]
