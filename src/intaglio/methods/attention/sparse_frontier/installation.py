"""Installation of sparse attention in a model: an attention function in each layer, and hooks that place the cache.

Dimension letters: B rows of a batch, Q new tokens, H query heads, G key-value heads, D width of a head, N tokens of a
row without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, DynamicLayer

from intaglio.errors import IntaglioError
from intaglio.masks import RULE, SCORE, MaskRequest, clear_visibility, get_visibility, set_visibility
from intaglio.masks.attention_interface import ATTENTION, PREFIX, stock_attention
from intaglio.methods.attention.sparse_frontier.cache import Policy, SequenceCache, SparseLayer
from intaglio.methods.attention.sparse_frontier.prefill import Indices, Prefill
from intaglio.methods.attention.sparse_frontier.tiled_attention import Meter, tiled_attention
from intaglio.modeling.anatomy import CACHES, anatomy, attention

_STATE = "_intaglio_sparse_attention"
Observer = Callable[[int, int, Indices | SequenceCache, int], None]
"""Called with layer, row, what was selected for the row's prompt, and the prompt's length."""


class Installation:
    """Sparse attention of a model while it is installed.

    Args:
        base: the model without its head.
        prefill: pattern of the prompt; None for dense.
        policy: of the cache; None for dense decoding.
        prefill_layers: layers with the pattern.
        cache_layers: layers under the policy.

    Attributes:
        meter: counts of computed pairs.
        observer: called with the selections of each prompt; None for nothing.
    """

    def __init__(
        self,
        base: nn.Module,
        prefill: Prefill | None,
        policy: Policy | None,
        prefill_layers: Sequence[int],
        cache_layers: Sequence[int],
    ) -> None:
        self.prefill, self.policy = prefill, policy if cache_layers else None
        self.prefill_layers, self.cache_layers = frozenset(prefill_layers), frozenset(cache_layers)
        self.meter = Meter()
        self.observer: Observer | None = None
        self._cache: DynamicCache | None = None
        parameters = inspect.signature(base.forward).parameters
        self._parameters = tuple(parameters)
        self._cache_name = next((name for name in CACHES if name in parameters), None)
        if self._cache_name is None and self.policy is not None:
            raise IntaglioError(
                f"{type(base).__name__} takes no key-value cache, which the policy {self.policy.label} fills"
            )
        self._handles: list[RemovableHandle] = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def layer(self, index: int) -> SparseLayer | None:
        """Return the cache layer under the policy in the current pass."""
        layer = None if self._cache is None else self._cache.layers[index]
        return layer if isinstance(layer, SparseLayer) else None

    def new_cache(self, config: Any) -> DynamicCache:
        """Return an empty cache under the policy; layers with a sliding window keep their stock layers."""
        cache = DynamicCache(config=config)
        self._place(cache)
        return cache

    def _place(self, cache: DynamicCache) -> None:
        """Put empty layers under the policy, if there is one, into a cache."""
        if self.policy is None:
            return
        for index in self.cache_layers:
            while len(cache.layers) <= index:
                cache.layers.append(cache.layer_class_to_replicate())
            cache.layers[index] = SparseLayer(self.policy, index)

    def _before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = base.config._attn_implementation
        if not (name or "").startswith(PREFIX):
            raise IntaglioError(
                f"the attention implementation was set to {name!r}, which drops the sparse attention; apply it again"
            )
        values = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache_name = next((key for key in CACHES if values.get(key) is not None), self._cache_name)
        cache = values.get(cache_name) if cache_name else None
        use_cache = values.get("use_cache")
        if cache is not None:
            self._check_cache(cache)
        elif self.policy is not None and (base.config.use_cache if use_cache is None else use_cache):
            cache = values[str(cache_name)] = self.new_cache(base.config)
        if cache is not None and self.policy is not None and _is_stock(cache):
            self._place(cache)
        self._cache = cache
        _check_context(base.config, values, 0 if cache is None else cache.get_seq_length())
        return (), values

    def _check_cache(self, cache: Any) -> None:
        plain = type(cache) is DynamicCache and cache.layer_class_to_replicate in (None, DynamicLayer)
        if not plain or cache.offloading:
            raise IntaglioError(
                f"a {type(cache).__name__} was given; sparse attention needs a plain DynamicCache, so it is combined "
                "with neither a static, preallocated or quantized cache nor speculative decoding"
            )
        if self.policy is not None and _is_stock(cache) and cache.get_seq_length():
            raise IntaglioError(
                f"the cache holds {cache.get_seq_length()} tokens that were read without the policy "
                f"{self.policy.label}; give an empty cache"
            )

    def _after(self, *_: Any) -> None:
        self._cache = None


def _is_stock(cache: DynamicCache) -> bool:
    """Return whether a cache has no layer under a policy."""
    return not any(isinstance(layer, SparseLayer) for layer in cache.layers)


def _check_context(config: Any, values: dict[str, Any], seen: int) -> None:
    """Refuse tokens beyond the model's positions."""
    longest = getattr(config, "max_position_embeddings", None)
    tokens = next((values[key] for key in ("input_ids", "inputs_embeds") if values.get(key) is not None), None)
    if longest is not None and tokens is not None and seen + tokens.shape[1] > longest:
        raise IntaglioError(
            f"{seen + tokens.shape[1]} tokens are more than the {longest} positions of the model; shorten the context"
        )


class LayerAttention:
    """Attention function of a layer: a pattern for the prompt, and the policy's cache after it.

    The first pass over a sequence is its prompt. Padding takes no part: each row is attended to without it.
    """

    takes_request = True

    def __init__(self, installation: Installation, index: int) -> None:
        self.installation, self.index = installation, index

    def __call__(
        self,
        module: nn.Module,
        query_BHQD: Tensor,
        key_BGQD: Tensor,
        value_BGQD: Tensor,
        request: Any,
        base: str,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs [B, Q, H, D], and the stock function's weights if it returns any."""
        if not isinstance(request, MaskRequest):
            got = "no mask" if request is None else f"an attention_mask {tuple(request.shape)}"
            raise IntaglioError(
                f"{got} cannot be combined with sparse attention; pass a 2-D attention_mask [rows, tokens]"
            )
        if RULE in module.__dict__ or SCORE in module.__dict__:
            raise IntaglioError("sparse attention cannot be combined with visibility rules; clear one of them")
        installed = self.installation
        layer = installed.layer(self.index)
        pattern = installed.prefill if self.index in installed.prefill_layers else None
        prompt = request.start == 0
        if (layer is None or prompt) and (pattern is None or not prompt):
            mask, _ = request.mask(base, None, None, query_BHQD)
            stock = stock_attention(base, module)
            result = stock(module, query_BHQD, key_BGQD, value_BGQD, mask, **options)
            if layer is None:
                return result
        else:
            result = None
        scale = self._check(module, query_BHQD, key_BGQD, request, options)
        real_BQ = request.real_queries(query_BHQD.device)
        out_BHQD = query_BHQD.new_zeros((*query_BHQD.shape[:3], value_BGQD.shape[-1]))
        for row, states in enumerate(zip(query_BHQD, key_BGQD, value_BGQD, strict=True)):
            real = slice(None) if real_BQ is None or bool(real_BQ[row].all()) else real_BQ[row].nonzero()[:, 0]
            query, key, value = (state[:, real] for state in states)
            if not key.shape[1]:
                if prompt:
                    raise IntaglioError(f"row {row} of the batch has no tokens besides padding")
                continue
            if pattern is not None and prompt:
                indices = pattern.indices(query, key, scale, request.window, self.index)
                if installed.observer is not None:
                    installed.observer(self.index, row, indices, key.shape[1])
                attended = tiled_attention(query, key, value, indices, scale, request.window, installed.meter)
                out_BHQD[row][:, real] = attended
            if layer is not None and prompt:
                sequence = SequenceCache(layer.policy, query, key, value, scale, self.index)
                if installed.observer is not None:
                    installed.observer(self.index, row, sequence, key.shape[1])
                layer.sequences.append(sequence)
            elif layer is not None:
                out_BHQD[row][:, real] = layer.sequences[row].attend(query, key, value, installed.meter)
        return result or (out_BHQD.transpose(1, 2), None)

    def _check(
        self, module: nn.Module, query_BHQD: Tensor, key_BGQD: Tensor, request: MaskRequest, options: dict[str, Any]
    ) -> float:
        """Refuse attention that is more than softmax over keys; return the factor of the scores."""
        request.refuse_overlay()
        extra = next((key for key in ("softcap", "s_aux", "position_bias") if options.get(key) is not None), None)
        if extra is not None:
            raise IntaglioError(
                f"the attention of {type(module).__name__} has {extra}, which sparse attention does not compute"
            )
        if options.get("dropout") and module.training:
            raise IntaglioError("sparse attention has no dropout; put the model in evaluation mode")
        if key_BGQD.shape[2] != query_BHQD.shape[2] or query_BHQD.shape[1] % key_BGQD.shape[1]:
            raise IntaglioError(
                f"the queries and keys of {type(module).__name__} cannot be reached: it has "
                f"{tuple(query_BHQD.shape[1:3])} query heads and tokens, and {tuple(key_BGQD.shape[1:3])} of keys"
            )
        scaling = options.get("scaling")
        return float(query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling)


def install(
    model: nn.Module,
    prefill: Prefill | None,
    policy: Policy | None,
    prefill_layers: Sequence[int],
    cache_layers: Sequence[int],
) -> Installation:
    """Install sparse attention in a model, replacing an earlier one.

    Raises:
        IntaglioError: the model has visibility rules, or its attention cannot be replaced.
    """
    uninstall(model)
    if get_visibility(model):
        raise IntaglioError("sparse attention cannot be combined with visibility rules; clear one of them")
    parts = anatomy(model)
    modules = {index: attention(parts.blocks[index]) for index in {*prefill_layers, *cache_layers}}
    set_visibility(model, None)  # switches to our attention interface
    installation = Installation(parts.base, prefill, policy, prefill_layers, cache_layers)
    for index, module in modules.items():
        module.__dict__[ATTENTION] = LayerAttention(installation, index)
    parts.base.__dict__[_STATE] = installation
    return installation


def installed(model: nn.Module) -> Installation | None:
    """Return the sparse attention of a model, or None."""
    state: Installation | None = anatomy(model).base.__dict__.get(_STATE)
    return state


def uninstall(model: nn.Module) -> None:
    """Remove sparse attention from a model and restore its stock attention implementation."""
    installation = installed(model)
    if installation is None:
        return
    installation.remove()
    anatomy(model).base.__dict__.pop(_STATE)
    for module in model.modules():
        if isinstance(module.__dict__.get(ATTENTION), LayerAttention):
            del module.__dict__[ATTENTION]
    clear_visibility(model)
