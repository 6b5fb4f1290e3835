"""How a rule gets into stock attention layers: three registered attention implementations and a lazy mask.

A model asks for its mask once, before its layers, and hands the same object to all of them; the layers' rules differ.
So the mask function registered here builds nothing: it notes what was asked in a `MaskRequest`. The attention function
registered under the same name finds the rule of its own layer, has the request build the mask for it (once for all
layers with that rule) and calls the stock attention function.

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
# Where a layer's rules stand: plain attributes of its attention module, so that a copied or pickled model keeps them.
RULE, SCORE = "intaglio_rule", "intaglio_score"

_MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskRequest:
    """What a model asked its masks to be, kept until a layer with its rule comes along.

    It travels through the model in the place of a mask, so it has the few attributes of a 4-D tensor that are looked at
    on the way.

    Args:
        arguments: what transformers passed to the mask function, by name.
    """

    ndim: ClassVar[int] = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._built: dict[Any, Any] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, 1, Q, K)`."""
        given = self.arguments
        return (given["batch_size"], 1, given["q_length"], given["kv_length"])

    def contiguous(self) -> MaskRequest:
        """Return the request itself; `generate` calls this on the masks it prepares."""
        return self

    @property
    def stock_looks_right(self) -> bool:
        """Whether the model's own mask is bidirectional: only those come with leave to skip a bidirectional mask."""
        return "allow_is_bidirectional_skip" in self.arguments

    def _refuse_overlay(self) -> None:
        """Refuse masks that carry more than causality, a window and padding: a rule would drop the rest in silence."""
        given = self.arguments
        plain = given.get("allow_is_causal_skip") or given.get("allow_is_bidirectional_skip") or given["q_length"] == 1
        if given.get("use_vmap") or not plain:
            raise IntaglioError(
                "a visibility rule cannot be joined with packed position_ids or a mask function of the model's own; "
                "pass an attention_mask of ones, and BlockDiagonal as the rule for packed rows"
            )

    def _padding(self, device: torch.device) -> Tensor | None:
        """True at real keys, bool [B, at least K + offset], or None without padding."""
        given = self.arguments
        padding = prepare_padding_mask(given.get("attention_mask"), given["kv_length"], given.get("kv_offset", 0))
        return None if padding is None else padding.to(device=device, dtype=torch.bool)

    def _visible(self, rule: Rule, heads: int, device: torch.device) -> _MaskFunction:
        """Rule, window and padding as one function of row, head and absolute positions."""
        self._refuse_overlay()
        given = self.arguments
        rule, padding_BK = rule.to(device), self._padding(device)
        shift_B = None if rule.shift_invariant else _first_real(padding_BK)
        last = 0
        if rule.bounded:
            skipped = 0 if shift_B is None else int(shift_B.min())
            last = int(given.get("q_offset", 0)) + given["q_length"] - skipped
        rule.check(given["batch_size"], heads, last)
        window = None if rule.ignores_window else given.get("local_size")
        inclusive = self.stock_looks_right

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            shift = 0 if shift_B is None else shift_B[b]
            seen = rule(b, h, q - shift, kv - shift)
            if window is not None:
                # Encoders count the farthest token that is seen, decoders the first that is not.
                seen = seen & ((q - kv).abs() < window + inclusive)
            return seen if padding_BK is None else seen & padding_BK[b, kv]

        return visible

    def _indices(self, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, head and absolute positions as tensors that broadcast to [B, H, Q, K]."""
        given = self.arguments
        b, h = torch.arange(given["batch_size"], device=device), torch.arange(heads, device=device)
        q = torch.arange(given["q_length"], device=device) + given.get("q_offset", 0)
        kv = torch.arange(given["kv_length"], device=device) + given.get("kv_offset", 0)
        return b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], kv[None, None, None, :]

    def _stock(self, base: str, device: torch.device, dense: bool = False) -> Any:
        """The model's own mask for `base`, None where its kernel needs none; with `dense` always a bool tensor."""
        given = {**self.arguments, "device": device}
        if isinstance(given.get("attention_mask"), Tensor):
            given["attention_mask"] = given["attention_mask"].to(device)
        if dense:
            given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if dense else base](**given)

    def _dense(self, rule: Rule | None, heads: int, device: torch.device) -> Tensor:
        """What is seen, bool [B, 1 or H, Q, K]."""
        if rule is None:
            stock: Tensor = self._stock("sdpa", device, dense=True)
            return stock
        batch, _, queries, keys = self.shape
        seen = self._visible(rule, heads, device)(*self._indices(heads, device))
        return seen.expand(batch, -1, queries, keys)

    def _blocks(self, rule: Rule, heads: int, device: torch.device) -> BlockMask:
        given, visible = self.arguments, self._visible(rule, heads, device)
        q_offset, kv_offset = given.get("q_offset", 0), given.get("kv_offset", 0)

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return visible(b, h, q + q_offset, kv + kv_offset)

        return create_block_mask(
            mask_mod,
            B=given["batch_size"],
            H=heads if rule.per_head else None,
            Q_LEN=given["q_length"],
            KV_LEN=given["kv_length"],
            device=device,
            _compile=device.type == "cuda",
        )

    def _added(self, score: Score, heads: int, device: torch.device) -> Tensor:
        """The score rule, in the model's dtype [B or 1, H or 1, Q, K]; left padding is subtracted from positions."""
        b, h, q, kv = self._indices(heads, device)
        first_B = _first_real(self._padding(device))
        shift = 0 if first_B is None else first_B[b]
        return score(b, h, q - shift, kv - shift).to(self.arguments.get("dtype", torch.float32))

    def _build(self, base: str, rule: Rule | None, heads: int, device: torch.device) -> Any:
        if rule is None:
            return self._stock(base, device)
        if base == "flex_attention":
            return self._blocks(rule, heads, device)
        seen = self._dense(rule, heads, device)
        # Eager attention adds its mask: a bool mask would be added as 0 and 1, which is no mask at all.
        return seen if base == "sdpa" else _additive(seen, 0.0, self.arguments.get("dtype", torch.float32))

    def visible(self, rule: Rule | None, heads: int) -> Tensor:
        """Return what is seen under a rule, padding and windows included, bool [B, 1 or H, Q, K].

        Args:
            rule: the rule; None for the model's own mask.
            heads: number of query heads.
        """
        return self._dense(rule, heads, torch.device(self.arguments.get("device", "cpu")))

    def mask(self, base: str, rule: Rule | None, score: Score | None, query_BHQD: Tensor) -> tuple[Any, Any]:
        """Return `(mask, bias)` as the attention function of `base` takes them, built once for equal arguments.

        Args:
            base: `sdpa`, `eager` or `flex_attention`.
            rule: the layer's rule, or None for the model's own mask.
            score: the layer's score rule, or None.
            query_BHQD: the queries; their heads and device are used.
        """
        heads, device = query_BHQD.shape[1], query_BHQD.device
        # By identity: `set_visibility` gives layers with equal rules the same object, and keeps it alive.
        key = (base, id(rule), id(score), heads, device)
        if key not in self._built:
            if score is None:
                self._built[key] = (self._build(base, rule, heads, device), None)
            elif base == "flex_attention":
                batch, _, queries, keys = self.shape
                bias = self._added(score, heads, device).expand(batch, heads, queries, keys)
                self._built[key] = (self._build(base, rule, heads, device), bias)
            else:
                added = self._added(score, heads, device)
                self._built[key] = (_additive(self._dense(rule, heads, device), added, added.dtype), None)
        return self._built[key]


def _additive(seen: Tensor, added: Tensor | float, dtype: torch.dtype) -> Tensor:
    """`added` where a key is seen, the dtype's least number elsewhere (a row that sees nothing stays finite)."""
    return torch.where(seen, added, torch.finfo(dtype).min).to(dtype)


def _first_real(padding_BK: Tensor | None) -> Tensor | None:
    """Number of padded positions on the left of each row, int64 [B]."""
    return None if padding_BK is None else padding_BK.int().argmax(-1)


def request(**arguments: Any) -> MaskRequest:
    """Note a model's request for a mask; registered with `AttentionMaskInterface`.

    Args:
        **arguments: as transformers passes them to mask functions.
    """
    given = arguments.get("attention_mask")
    if isinstance(given, MaskRequest):  # generate prepares the masks of a StaticCache itself
        return given
    for name in ("q_offset", "kv_offset"):
        if isinstance(arguments.get(name), Tensor):
            # A StaticCache hands out its own length, which the first layer moves on before any mask is built.
            arguments[name] = arguments[name].clone()
    return MaskRequest(arguments)


def _stock_attention(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of `base`; the eager one is private to each modelling file."""
    if base != "eager":
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[base]
        return function
    for kind in type(module).__mro__:  # a subclass may be defined elsewhere
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise IntaglioError(f"{type(module).__name__} has no eager attention function; load the model with sdpa")


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        rule, score = getattr(module, RULE, None), getattr(module, SCORE, None)
        if isinstance(attention_mask, MaskRequest):
            attention_mask, bias = attention_mask.mask(base, rule, score, query)
            if bias is not None:
                more["position_bias"] = bias
        elif rule is not None or score is not None:
            got = "no mask" if attention_mask is None else f"an attention_mask {tuple(attention_mask.shape)}"
            raise IntaglioError(
                f"{got} cannot be joined with a visibility rule; pass a 2-D attention_mask [rows, tokens]"
            )
        return _stock_attention(base, module)(module, query, key, value, attention_mask, **more)

    attend.__name__ = PREFIX + base
    return attend


def register() -> None:
    """Make the three implementations known to transformers; done when `intaglio.masks` is imported."""
    for base in BASES:
        AttentionInterface.register(PREFIX + base, _attention(base))
        AttentionMaskInterface.register(PREFIX + base, request)
