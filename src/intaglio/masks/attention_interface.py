"""Three attention implementations, registered with transformers, that apply rules through a lazy mask.

A model requests its mask once, before its layers, and passes the same object to all of them, but layers' rules differ.
So the mask function registered here only records its arguments in a `MaskRequest`. The attention function registered
under the same name looks up its layer's rule, lets the request build the mask (once for all layers with that rule) and
calls the stock attention function.

Dimension letters: B batch rows, H query heads, Q query positions, K key positions, D width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, prepare_padding_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intaglio.errors import IntaglioError
from intaglio.masks.rules import Rule, Score

PREFIX = "intaglio_"
BASES = ("sdpa", "eager", "flex_attention")
# Attributes of a layer's attention module, so that a copied or pickled model keeps its rules.
RULE, SCORE = "intaglio_rule", "intaglio_score"
ATTENTION = "intaglio_attention"
"""Attribute of an attention module: an attention function that replaces the stock one under our interface.

With an attribute `takes_request` that is true, it receives the `MaskRequest` and the base's name instead of a mask."""

_MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskRequest:
    """A model's request for a mask, deferred until the layer with its rule is reached.

    It holds the arguments of the mask function, and travels through the model instead of a mask, so it has the few
    attributes of a 4-D tensor that are read on the way.
    """

    ndim: ClassVar[int] = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._built: dict[Any, Any] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, 1, Q, K)`."""
        arguments = self.arguments
        return (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])

    def contiguous(self) -> MaskRequest:
        """Return the request itself; `generate` calls this on the masks it prepares."""
        return self

    @property
    def stock_looks_right(self) -> bool:
        """Whether the model's own mask is bidirectional (only those requests allow skipping a bidirectional mask)."""
        return "allow_is_bidirectional_skip" in self.arguments

    @property
    def _is_plain(self) -> bool:
        """Whether the mask consists of causality, a window and padding."""
        arguments = self.arguments
        skips = arguments.get("allow_is_causal_skip") or arguments.get("allow_is_bidirectional_skip")
        return not arguments.get("use_vmap") and bool(skips or arguments["q_length"] == 1)

    def refuse_overlay(self) -> None:
        """Refuse masks with more than causality, a window and padding, which a rule would silently drop."""
        if not self._is_plain:
            raise IntaglioError(
                "a visibility rule or sparse attention cannot be combined with packed position_ids or the model's own "
                "mask function; pass an attention_mask of ones, and BlockDiagonal as the rule for packed rows"
            )

    @property
    def start(self) -> int:
        """Position of the first query, padding counted."""
        return int(self.arguments.get("q_offset", 0))

    @property
    def window(self) -> int | None:
        """Sliding window of the layer in tokens."""
        window: int | None = self.arguments.get("local_size")
        return window

    def real_queries(self, device: torch.device) -> Tensor | None:
        """Return which queries are no padding, bool [B, Q], or None without padding."""
        padding_BK = self._padding(device)
        return None if padding_BK is None else padding_BK[:, self.start : self.start + self.shape[2]]

    def _padding(self, device: torch.device) -> Tensor | None:
        """Return the mask of real keys, bool [B, at least K + offset], or None without padding."""
        arguments = self.arguments
        padding = prepare_padding_mask(
            arguments.get("attention_mask"), arguments["kv_length"], arguments.get("kv_offset", 0)
        )
        return None if padding is None else padding.to(device=device, dtype=torch.bool)

    def documents(self, device: torch.device) -> Tensor | None:
        """Return the number of each new token's document in its row, int64 [B, Q], -1 for padding.

        None stands for rows of one document without padding. Packed documents are separated by their positions.

        Raises:
            IntaglioError: the mask has more than causality, a window, padding and packed documents.
        """
        arguments = self.arguments
        count = arguments["q_length"]
        numbers_BQ = torch.zeros(arguments["batch_size"], count, dtype=torch.int64, device=device)
        if not self._is_plain:
            function = arguments["mask_function"]
            b, q = torch.arange(len(numbers_BQ), device=device)[:, None], torch.arange(1, count, device=device)[None]
            if arguments.get("use_vmap") or function(b, torch.zeros_like(b), q - 1, q).any():
                raise IntaglioError("the model's own mask function cannot be combined with a replaced attention")
            numbers_BQ[:, 1:] = (~function(b, torch.zeros_like(b), q, q - 1)).cumsum(-1)
        real_BQ = self.real_queries(device)
        if real_BQ is not None:
            numbers_BQ = numbers_BQ.masked_fill(~real_BQ, -1)
        return numbers_BQ if numbers_BQ.any() else None

    def _visible(self, rule: Rule, heads: int, device: torch.device) -> _MaskFunction:
        """Return rule, window and padding as a function of row, head and absolute positions."""
        self.refuse_overlay()
        arguments = self.arguments
        rule, padding_BK = rule.to(device), self._padding(device)
        shift_B = None if rule.shift_invariant else _left_padding(padding_BK)
        last = 0
        if rule.bounded:
            skipped = 0 if shift_B is None else int(shift_B.min())
            last = int(arguments.get("q_offset", 0)) + arguments["q_length"] - skipped
        rule.check(arguments["batch_size"], heads, last)
        window = None if rule.ignores_window else arguments.get("local_size")
        inclusive = self.stock_looks_right

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            shift = 0 if shift_B is None else shift_B[b]
            seen = rule(b, h, q - shift, kv - shift)
            if window is not None:
                # Encoders include the token at the window's distance, decoders exclude it.
                seen = seen & ((q - kv).abs() < window + inclusive)
            return seen if padding_BK is None else seen & padding_BK[b, kv]

        return visible

    def _indices(self, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return row, head and absolute positions as tensors that broadcast to [B, H, Q, K]."""
        arguments = self.arguments
        b, h = torch.arange(arguments["batch_size"], device=device), torch.arange(heads, device=device)
        q = torch.arange(arguments["q_length"], device=device) + arguments.get("q_offset", 0)
        kv = torch.arange(arguments["kv_length"], device=device) + arguments.get("kv_offset", 0)
        return b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], kv[None, None, None, :]

    def _stock(self, base: str, device: torch.device, dense: bool = False) -> Any:
        """Return the model's own mask for `base`, or None where its kernel needs none; `dense` forces a bool tensor."""
        arguments = {**self.arguments, "device": device}
        if isinstance(arguments.get("attention_mask"), Tensor):
            arguments["attention_mask"] = arguments["attention_mask"].to(device)
        if dense:
            arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if dense else base](**arguments)

    def _dense(self, rule: Rule | None, heads: int, device: torch.device) -> Tensor:
        """Return the mask, bool [B, 1 or H, Q, K]."""
        if rule is None:
            stock: Tensor = self._stock("sdpa", device, dense=True)
            return stock
        batch, _, queries, keys = self.shape
        seen = self._visible(rule, heads, device)(*self._indices(heads, device))
        return seen.expand(batch, -1, queries, keys)

    def _blocks(self, rule: Rule, heads: int, device: torch.device) -> BlockMask:
        arguments, visible = self.arguments, self._visible(rule, heads, device)
        q_offset, kv_offset = arguments.get("q_offset", 0), arguments.get("kv_offset", 0)

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return visible(b, h, q + q_offset, kv + kv_offset)

        return create_block_mask(
            mask_mod,
            B=arguments["batch_size"],
            H=heads if rule.per_head else None,
            Q_LEN=arguments["q_length"],
            KV_LEN=arguments["kv_length"],
            device=device,
            _compile=device.type == "cuda",
        )

    def _bias(self, score: Score, heads: int, device: torch.device) -> Tensor:
        """Return the score rule's values [B or 1, H or 1, Q, K]; positions count from after left padding."""
        b, h, q, kv = self._indices(heads, device)
        first_B = _left_padding(self._padding(device))
        shift = 0 if first_B is None else first_B[b]
        return score(b, h, q - shift, kv - shift).to(self.arguments.get("dtype", torch.float32))

    def _build(self, base: str, rule: Rule | None, heads: int, device: torch.device) -> Any:
        if rule is None:
            return self._stock(base, device)
        if base == "flex_attention":
            return self._blocks(rule, heads, device)
        seen = self._dense(rule, heads, device)
        # Eager attention adds its mask, and would add a bool mask as 0 and 1.
        return seen if base == "sdpa" else _additive_mask(seen, 0.0, self.arguments.get("dtype", torch.float32))

    def visible(self, rule: Rule | None, heads: int) -> Tensor:
        """Return the mask under a rule, padding and windows included, bool [B, 1 or H, Q, K]."""
        return self._dense(rule, heads, torch.device(self.arguments.get("device", "cpu")))

    def mask(self, base: str, rule: Rule | None, score: Score | None, query_BHQD: Tensor) -> tuple[Any, Any]:
        """Return `(mask, bias)` for the attention function of `base`, cached for equal arguments."""
        heads, device = query_BHQD.shape[1], query_BHQD.device
        # By identity: `set_visibility` gives layers with equal rules the same object and keeps it alive.
        key = (base, id(rule), id(score), heads, device)
        if key not in self._built:
            if score is None:
                self._built[key] = (self._build(base, rule, heads, device), None)
            elif base == "flex_attention":
                batch, _, queries, keys = self.shape
                bias = self._bias(score, heads, device).expand(batch, heads, queries, keys)
                self._built[key] = (self._build(base, rule, heads, device), bias)
            else:
                bias = self._bias(score, heads, device)
                self._built[key] = (_additive_mask(self._dense(rule, heads, device), bias, bias.dtype), None)
        return self._built[key]


def _additive_mask(seen: Tensor, bias: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Return `added` where a key is visible, else the dtype's minimum (so that empty rows stay finite)."""
    return torch.where(seen, bias, torch.finfo(dtype).min).to(dtype)


def _left_padding(padding_BK: Tensor | None) -> Tensor | None:
    """Return the number of left padding positions of each row, int64 [B]."""
    return None if padding_BK is None else padding_BK.int().argmax(-1)


def request(**arguments: Any) -> MaskRequest:
    """Make a mask request; registered with `AttentionMaskInterface`."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, MaskRequest):  # `generate` already made it, for a StaticCache
        return mask
    for name in ("q_offset", "kv_offset"):
        if isinstance(arguments.get(name), Tensor):
            # A StaticCache passes its own length tensor, which the first layer updates before a mask is built.
            arguments[name] = arguments[name].clone()
    return MaskRequest(arguments)


def stock_attention(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the attention function of `base`; the eager one is private to each modelling file."""
    if base != "eager":
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[base]
        return function
    for cls in type(module).__mro__:  # a subclass may be defined elsewhere
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise IntaglioError(f"{type(module).__name__} has no eager attention function; load the model with sdpa")


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        rule, score = getattr(module, RULE, None), getattr(module, SCORE, None)
        attention = getattr(module, ATTENTION, None)
        if attention is not None and getattr(attention, "takes_request", False):
            return attention(module, query, key, value, attention_mask, base, **kwargs)
        if isinstance(attention_mask, MaskRequest):
            attention_mask, bias = attention_mask.mask(base, rule, score, query)
            if bias is not None:
                kwargs["position_bias"] = bias
        elif rule is not None or score is not None:
            got = "no mask" if attention_mask is None else f"an attention_mask {tuple(attention_mask.shape)}"
            raise IntaglioError(
                f"{got} cannot be combined with a visibility rule; pass a 2-D attention_mask [rows, tokens]"
            )
        attention = attention or stock_attention(base, module)
        return attention(module, query, key, value, attention_mask, **kwargs)

    attend.__name__ = PREFIX + base
    return attend


def register() -> None:
    """Register the three implementations with transformers; called when `intaglio.masks` is imported."""
    for base in BASES:
        AttentionInterface.register(PREFIX + base, _attention(base))
        AttentionMaskInterface.register(PREFIX + base, request)
