"""A causal language model with its KV cache: reads prompts and trees, and keeps the accepted rows.

The target reads through one, and so does a draft model. Masks are made from slots and positions: slot k of row b holds
the token at position `k - pads[b]`, and the row's own slots are `pads[b] <= k < lengths[b]`, so rows of different
lengths need nothing else.

Dimension letters: B rows, Q tokens of a row in a pass, R pending slots (read, not yet kept), K slots, V vocabulary,
D width, P prompt tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError, first_line
from intaglio.masks import attention_functions, get_visibility
from intaglio.modeling.anatomy import CACHE, Anatomy, anatomy
from intaglio.speculative._utils import vocabulary_size
from intaglio.speculative.cache import check_cache, is_windowed, move_rows, other_layer, preallocated_cache, row_moves
from intaglio.speculative.prepacked_linear import Prepacked
from intaglio.speculative.tree import TokenTree
from intaglio.speculative.tree_attention import NAME, configs, grouped

_BOOL = ("sdpa", "intaglio_sdpa")
_ADDITIVE = ("eager", "intaglio_eager")


class TreeRefused(IntaglioError):
    """A model or its cache cannot read a tree; a chain may still be possible (`chain_model`)."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Model inputs of one pass over trees.

    Args:
        tokens_BQ: token ids, int64.
        positions_BQ: position ids, int64.
        visible_BQK: which slots each token may see, bool, before any window; K counts the slots of the cache and then
            the Q new ones.
        mask: the same in the model's format: [B, 1, Q, K] (bool under SDPA, additive under eager), a dict of them by
            layer type if the model has several, or None for one token that sees the whole cache.
    """

    tokens_BQ: Tensor
    positions_BQ: Tensor
    visible_BQK: Tensor
    mask: Any


@dataclass(frozen=True)
class _LayerType:
    """First layer of a type, and its window in tokens (None: it sees everything)."""

    layer: int
    window: int | None


def _layer_types(config: Any, windows: Sequence[int | None]) -> dict[str, _LayerType]:
    names = getattr(config, "layer_types", None) or ["full_attention"] * len(windows)
    for name in names:
        if name not in ("full_attention", "sliding_attention"):
            raise TreeRefused(
                f"the model has layers of the type {name!r}; speculative decoding needs full or sliding attention"
            )
    return {name: _LayerType(names.index(name), windows[names.index(name)]) for name in dict.fromkeys(names)}


class CachedModel:
    """A model, its cache, and how far each row has been read.

    Args:
        model: a stock causal language model.
        cache: a dynamic cache, empty or with rows; None makes one that keeps every row.
        hidden: whether to record the last hidden states of each pass (`hidden_BQD`). Default False.
        prepacked: context that its passes run in (`prepacked_linear.prepacked`). Default: none.

    Attributes:
        lengths: slots of each row that are in use, padding included.
        pads: empty slots in front of each row.
        pending: slots added since the last `keep_rows`.
        hidden_BQD: the last pass's hidden states after the final norm.
        linears: context that passes run in, for code that calls parts of the model itself.

    Raises:
        IntaglioError: an encoder or encoder-decoder, a model whose attention takes no mask (flash) or carries rules of
            its own, or a cache that cannot be kept by rows.
    """

    def __init__(
        self,
        model: Any,
        cache: DynamicCache | None = None,
        hidden: bool = False,
        prepacked: Prepacked | None = None,
    ) -> None:
        config = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise IntaglioError(f"{config.model_type} is an encoder-decoder; speculative decoding needs a decoder")
        parts = anatomy(model)
        if not parts.causal or parts.head is None:
            raise IntaglioError(
                f"{config.model_type} is no causal language model; speculative decoding needs a decoder"
            )
        # Another thread may be in a pass of the same model.
        self.implementation: str = "sdpa" if config._attn_implementation == NAME else config._attn_implementation
        if self.implementation not in (*_BOOL, *_ADDITIVE):
            raise IntaglioError(
                f"the model's attention is {self.implementation!r}, which takes no tree mask; load it with sdpa "
                "or eager"
            )
        if get_visibility(model):
            raise IntaglioError(
                "the model's layers carry visibility rules; speculative decoding makes masks of its own"
            )
        if attention_functions(model):
            raise IntaglioError(
                "the model's layers carry attention functions of their own; speculative decoding needs the stock ones"
            )
        self.model = model
        self.base = parts.base
        self.cache = preallocated_cache() if cache is None else cache
        check_cache(self.cache)
        self.lengths: list[int] = []
        self.pads: list[int] = []
        self.pending = 0
        self.hidden_BQD: Tensor | None = None
        self._hidden = hidden
        self.linears: AbstractContextManager[None] = prepacked or nullcontext()
        self._grouped: list[Any] = []
        self._prepare(parts)
        self._pending_positions_BR: list[Tensor] = []
        self._keeps_few = "logits_to_keep" in inspect.signature(model.forward).parameters

    def _prepare(self, parts: Anatomy) -> None:
        """Refuse caches whose rows cannot be reordered, and find the windows and the layers to switch."""
        other = other_layer(self.cache)
        if other is not None:
            raise TreeRefused(
                f"the cache holds a {other}; speculative decoding needs attention layers with dynamic keys and values"
            )
        self._grouped = configs(self.model, self.model.device)
        self._layer_types = _layer_types(parts.config, parts.windows)

    @property
    def vocabulary(self) -> int:
        """Number of token ids the model knows."""
        return vocabulary_size(self.model)

    @property
    def width(self) -> int:
        """Slots in use by the longest row, the pending ones not counted."""
        return max(self.lengths)

    def _call(self, **arguments: Any) -> Tensor:
        """Run one forward pass, and record the last hidden states if needed."""

        def record(module: Any, args: Any, output: Any) -> None:
            self.hidden_BQD = output.last_hidden_state

        handle = self.base.register_forward_hook(record) if self._hidden else None
        try:
            with grouped(self._grouped), self.linears:
                logits: Tensor = self.model(**arguments, **{CACHE: self.cache, "use_cache": True}).logits
            return logits
        finally:
            if handle is not None:
                handle.remove()

    def prefill(self, ids_BP: Tensor, mask_BP: Tensor | None = None) -> Tensor:
        """Read the prompts, except the tokens that the cache already holds.

        Args:
            ids_BP: token ids, padded on the left.
            mask_BP: 1 at real tokens; None if nothing is padded.

        Returns:
            the logits [B, V] after the last token, in the model's dtype.

        Raises:
            IntaglioError: padding that is not on the left, or a cache that holds the whole prompt or rows of a batch.
        """
        rows, length = ids_BP.shape
        past = self.cache.get_seq_length()
        if past >= length:
            raise IntaglioError(
                f"the cache holds {past} tokens and the input has {length}; give the whole sequence, with at least one "
                "token that the cache does not hold"
            )
        if past and rows > 1:
            raise IntaglioError(f"a cache that holds tokens was given with {rows} rows; it is accepted with one row")
        self.pads = [0] * rows
        arguments: dict[str, Any] = {"position_ids": torch.arange(past, length, device=ids_BP.device)[None]}
        if mask_BP is not None:
            real_BP = mask_BP.bool()
            if bool((real_BP[:, :-1] & ~real_BP[:, 1:]).any()) or not bool(real_BP[:, -1].all()):
                raise IntaglioError("the attention mask hides tokens after real ones; pad prompts on the left")
            self.pads = (length - real_BP.sum(1)).tolist()
            positions_BP = (torch.arange(length, device=ids_BP.device) - self._column(self.pads)).clamp(min=0)
            arguments = {"position_ids": positions_BP[:, past:], "attention_mask": mask_BP}
        if self._keeps_few:
            arguments["logits_to_keep"] = 1
        logits = self._call(input_ids=ids_BP[:, past:], **arguments)
        if is_windowed(self.cache):
            # Only now: with recording on, the prefill would hold every row.
            self.cache.activate_past_recording()
        self.lengths = [length] * rows
        return logits[:, -1]

    def _column(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.model.device)[:, None]

    def prepare_inputs(self, tokens_BQ: Any, depths_BQ: Any, seen_BQR: Any) -> Inputs:
        """Return positions and masks of tokens after the cache.

        Args:
            tokens_BQ: token ids [B, Q], as nested lists or an array.
            depths_BQ: how many tokens of its own path come before each, since the row's last kept one.
            seen_BQR: which pending slots, and then which of the Q new ones, each token sees: bool [B, Q, R + Q].
        """
        device = self.model.device
        tokens = torch.as_tensor(tokens_BQ, dtype=torch.long, device=device)
        rows, new = tokens.shape
        width = self.width
        starts = [length - pad for length, pad in zip(self.lengths, self.pads, strict=True)]
        positions = torch.as_tensor(depths_BQ, dtype=torch.long, device=device) + self._column(starts)
        visible = torch.ones((rows, new, width + self.pending + new), dtype=torch.bool, device=device)
        visible[:, :, width:] = torch.as_tensor(seen_BQR, device=device)
        if any(self.pads) or min(self.lengths) < width:
            slots = torch.arange(width, device=device)
            own_BK = (slots >= self._column(self.pads)) & (slots < self._column(self.lengths))
            visible[:, :, :width] = own_BK[:, None]
        elif rows == 1 and new == 1 and not self.pending:
            return Inputs(tokens, positions, visible, None)
        return Inputs(tokens, positions, visible, self.masks(visible, positions))

    def masks(self, visible_BQK: Tensor, positions_BQ: Tensor) -> Any:
        """Convert visibility to the model's `attention_mask`, windows included.

        Args:
            visible_BQK: which slots each token may see, K counting the cache's slots and then the Q new ones.
            positions_BQ: position ids of the new tokens.

        Returns:
            [B, 1, Q, K] for a model with one layer type, else a dict by layer type.
        """
        new = positions_BQ.shape[1]
        masks = {}
        for name, kind in self._layer_types.items():
            length, offset = self.cache.get_mask_sizes(new, kind.layer)
            seen = visible_BQK[:, :, offset : offset + length]
            if kind.window is not None:
                positions_BK = self._slot_positions(positions_BQ)[:, offset : offset + length]
                seen = seen & (positions_BQ[:, :, None] - positions_BK[:, None] < kind.window)
            masks[name] = format_mask(seen[:, None], self.implementation, self.model.dtype)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _slot_positions(self, positions_BQ: Tensor) -> Tensor:
        """Return the position that each slot holds: cache, pending and new."""
        slots = torch.arange(self.width, device=positions_BQ.device) - self._column(self.pads)
        return torch.cat([slots, *self._pending_positions_BR, positions_BQ], 1)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the logits [B, Q, V] of a pass, in the model's dtype; `commit` must follow."""
        return self._call(input_ids=inputs.tokens_BQ, attention_mask=inputs.mask, position_ids=inputs.positions_BQ)

    def commit(self, inputs: Inputs) -> None:
        """Count the slots that a pass over `inputs` has added to the cache as pending.

        Raises:
            IntaglioError: the cache has not grown by that many slots.
        """
        expected = self.width + self.pending + inputs.tokens_BQ.shape[1]
        length = self.cache.get_seq_length()
        if length != expected:
            raise IntaglioError(
                f"the cache holds {length} slots after a pass that should have left {expected}; a drafter that makes "
                "the pass itself leaves the trees' nodes in it and nothing else"
            )
        self.pending += inputs.tokens_BQ.shape[1]
        self._pending_positions_BR.append(inputs.positions_BQ)

    def extend(self, tokens_BQ: Any, depths_BQ: Any, seen_BQR: Any) -> Tensor:
        """Read tokens after the cache and the pending slots; arguments as `prepare_inputs`, logits as `forward`."""
        inputs = self.prepare_inputs(tokens_BQ, depths_BQ, seen_BQR)
        logits = self.forward(inputs)
        self.commit(inputs)
        return logits

    def fit(self, tree: TokenTree, unread: int, drafted: int) -> TokenTree:
        """Return a row's tree without levels that it cannot use; the first `unread` nodes are emitted tokens."""
        return tree.truncate(unread - 1 + drafted)

    def close(self) -> None:
        """Complete the cache for those who use it after the run."""

    def keep_rows(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep some pending slots of each row, along one path and in the order given, and drop the rest."""
        before, pending = self.width, self.pending
        moves = row_moves(kept, [before - length for length in self.lengths], pending)
        if moves is not None:
            move_rows(self.cache, *moves)
        self.lengths = [length + len(slots) for length, slots in zip(self.lengths, kept, strict=True)]
        self.cache.crop(self.width - before - pending)
        self.pending = 0
        self._pending_positions_BR.clear()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Continue with some of the present rows only, in increasing order."""
        before = self.width
        self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
        self.lengths = [self.lengths[row] for row in rows]
        self.pads = [self.pads[row] for row in rows]
        self.cache.crop(self.width - before)


class _CachedBaseModel(CachedModel):
    """Cached base model: its logits are hidden states."""

    def _call(self, **arguments: Any) -> Tensor:
        arguments.pop("logits_to_keep", None)
        with grouped(self._grouped):
            hidden: Tensor = self.base(**arguments, **{CACHE: self.cache, "use_cache": True}).last_hidden_state
        return hidden


_CHECKED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""Attention implementations with which a model has passed `check_tree_attention`."""


@torch.inference_mode()
def check_tree_attention(model: Any, longest: int) -> None:
    """Raise an `IntaglioError` if a branch of a tree gets other hidden states than the same tokens in a chain.

    `longest` is the most tokens of a row.

    Some families mask by cache slot, whatever mask they are given. The check is made once per model and attention
    implementation, with a few tokens through the base model.
    """
    kept = getattr(model.config, "keep_window_size", None)
    if kept is not None and kept < longest:
        # Equal tokens tie in the first layer, and a pass over several tokens breaks ties otherwise than one over one.
        raise IntaglioError(
            f"{model.config.model_type} keeps the {kept} keys with the highest scores, and these change with the size "
            f"of a pass; speculative decoding is lossless up to {kept} tokens, and {longest} were requested"
        )
    implementation = model.config._attn_implementation
    if implementation in _CHECKED.get(model, ()):
        return
    for block in anatomy(model).blocks:
        for name, buffer in block.named_buffers():
            if (
                buffer.dtype not in (torch.bool, torch.uint8)
                or buffer.dim() < 2
                or buffer.shape[-1] != buffer.shape[-2]
            ):
                continue
            if bool((~buffer.bool() & torch.ones_like(buffer, dtype=torch.bool).tril()).any()):
                raise TreeRefused(
                    f"the attention of {model.config.model_type} hides cache slots by its own buffer {name!r}, but the "
                    "nodes of a tree are not in the slots of their positions; speculative decoding needs attention "
                    "that follows the mask"
                )
    # Rounding may flip the router of a mixture or a threshold: one attempt of three within the tolerance is enough.
    tolerance = 0.01 + 12 * torch.finfo(model.dtype).eps
    errors: list[float] = []
    while not errors or not errors[-1] < tolerance:
        if len(errors) == 3:
            raise TreeRefused(
                f"the hidden states of {model.config.model_type} in a branch of a tree differ from those in a chain by "
                f"{min(errors):.1%}; speculative decoding needs attention that follows mask and position_ids"
            )
        errors.append(_branch_error(model, seed=len(errors)))
    _CHECKED.setdefault(model, set()).add(implementation)


def _branch_error(model: Any, seed: int) -> float:
    """Return the relative difference of a branch's last hidden state from that of the same tokens in a chain."""
    ids = torch.randint(vocabulary_size(model), (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    states = []
    for tree in (
        TokenTree([ids[8], ids[9], ids[10], ids[11]], (-1, 0, 0, 2)),
        TokenTree([ids[8], ids[10], ids[11]], (-1, 0, 1)),  # its second branch alone
    ):
        cached = _CachedBaseModel(model)
        try:
            cached.prefill(torch.tensor([ids[:8]], device=model.device))
            hidden_BQD = cached.forward(cached.prepare_inputs(*stack([tree])))
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
            if isinstance(error, IntaglioError):
                raise
            raise TreeRefused(
                f"{model.config.model_type} cannot read a tree, which takes a mask and position_ids of its own: "
                f"{first_line(error)}"
            ) from error
        states.append(hidden_BQD[0, -1].double())
    return float((states[0] - states[1]).norm() / states[1].norm())


def format_mask(seen: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Return bool visibility in the format of an attention implementation: unchanged, or additive for an eager one."""
    if implementation not in _ADDITIVE:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def stack(trees: Sequence[TokenTree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens [B, Q], depths [B, Q] and visibility [B, Q, Q] of trees, padded with nodes that see themselves."""
    most = max(map(len, trees))
    tokens = np.zeros((len(trees), most), dtype=np.int64)
    depths = np.zeros((len(trees), most), dtype=np.int64)
    seen = np.broadcast_to(np.eye(most, dtype=bool), (len(trees), most, most)).copy()
    for row, tree in enumerate(trees):
        tokens[row, : len(tree)] = tree.tokens
        depths[row, : len(tree)] = tree.depths
        seen[row, : len(tree), : len(tree)] = tree.ancestors
    return tokens, depths, seen
