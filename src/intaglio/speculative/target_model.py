"""A causal language model with its cache: reads prompts and trees, and keeps the rows that turn out to be wanted.

The target reads through one, and so does a smaller model that drafts. Masks are made from slots and positions: slot k
of row b holds the token at position `k - pads[b]`, and the row's own slots are `pads[b] <= k < lengths[b]`. So rows of
different lengths need nothing else.

Dimension letters: B rows, Q tokens of a row in a pass, R pending slots (read, not yet kept), K slots, V vocabulary,
D width, P prompt tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.masks import get_visibility
from intaglio.modeling.anatomy import CACHE, anatomy
from intaglio.speculative.cache import check_cache, is_windowed, move_rows, moves, roomy
from intaglio.speculative.prepacked_linear import Prepacked
from intaglio.speculative.tree import TokenTree
from intaglio.speculative.tree_attention import NAME, configs, grouped

_BOOL = ("sdpa", "intaglio_sdpa")
_ADDITIVE = ("eager", "intaglio_eager")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the model is called with for one pass over trees.

    Args:
        tokens_BQ: token ids, int64.
        positions_BQ: position ids, int64.
        visible_BQK: which slots each token may see, bool, before any window; K counts the slots of the cache and then
            the Q new ones.
        mask: the same as the model takes it: [B, 1, Q, K] (bool under SDPA, additive under eager), a dict of them by
            layer type where the model has several, or None for one token that sees the whole cache.
    """

    tokens_BQ: Tensor
    positions_BQ: Tensor
    visible_BQK: Tensor
    mask: Any


@dataclass(frozen=True)
class _Kind:
    """A layer type: its first layer, and its window in tokens (None: it sees everything)."""

    layer: int
    window: int | None


def _kinds(config: Any, windows: Sequence[int | None]) -> dict[str, _Kind]:
    names = getattr(config, "layer_types", None) or ["full_attention"] * len(windows)
    for name in names:
        if name not in ("full_attention", "sliding_attention"):
            raise IntaglioError(
                f"the model has layers of the type {name!r}; speculative decoding needs full or sliding attention"
            )
    return {name: _Kind(names.index(name), windows[names.index(name)]) for name in dict.fromkeys(names)}


class Reader:
    """A model, its cache, and how far each row has been read.

    Args:
        model: a stock causal language model.
        cache: a dynamic cache, empty or with rows; None makes one that keeps every row.
        hidden: whether the last hidden states of each pass are wanted (`hidden_BQD`). Default False.
        prepacked: the context that its passes are made in (`prepack.prepacked`). Default: none.

    Attributes:
        lengths: slots of each row that are in use, padding included.
        pads: empty slots in front of each row.
        pending: slots added by `extend` since the last `keep`.
        hidden_BQD: the last pass's hidden states after the final norm.
        linears: the context that passes are made in, for what calls parts of the model itself.

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
        self.model = model
        self.base = parts.base
        self.cache = roomy() if cache is None else cache
        check_cache(self.cache)
        self.lengths: list[int] = []
        self.pads: list[int] = []
        self.pending = 0
        self.hidden_BQD: Tensor | None = None
        self._hidden = hidden
        self.linears: AbstractContextManager[None] = prepacked or nullcontext()
        self._grouped = configs(model, model.device)
        self._kinds = _kinds(parts.config, parts.windows)
        self._seen_positions_BR: list[Tensor] = []
        self._keeps_few = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def vocabulary(self) -> int:
        """The number of token ids the model knows."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def width(self) -> int:
        """Slots in use by the longest row, the pending ones not counted."""
        return max(self.lengths)

    def _call(self, **arguments: Any) -> Tensor:
        """One forward pass; the last hidden state is noted on the way where it is wanted."""
        arguments |= {CACHE: self.cache, "use_cache": True}
        if not self._hidden:
            with grouped(self._grouped), self.linears:
                logits: Tensor = self.model(**arguments).logits
            return logits

        def note(module: Any, args: Any, output: Any) -> None:
            self.hidden_BQD = output.last_hidden_state

        handle = self.base.register_forward_hook(note)
        try:
            with grouped(self._grouped), self.linears:
                logits = self.model(**arguments).logits
            return logits
        finally:
            handle.remove()

    def prefill(self, ids_BP: Tensor, mask_BP: Tensor | None = None) -> Tensor:
        """Read the prompts; what the cache already holds of them is not read again.

        Args:
            ids_BP: token ids, padded in front.
            mask_BP: 1 at real tokens; None where nothing is padded.

        Returns:
            the logits [B, V] after the last token, in the model's dtype.

        Raises:
            IntaglioError: padding that is not in front, or a cache that holds the whole prompt or rows of a batch.
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
                raise IntaglioError("the attention mask hides tokens behind real ones; pad prompts on the left")
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

    def lay(self, tokens_BQ: Any, depths_BQ: Any, seen_BQR: Any) -> Inputs:
        """Lay tokens out behind the cache: their positions and what each may see.

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
        """Turn visibility into what the model takes as `attention_mask`, windows included.

        Args:
            visible_BQK: which slots each token may see, K counting the cache's slots and then the Q new ones.
            positions_BQ: position ids of the new tokens.

        Returns:
            [B, 1, Q, K] for a model with one layer type, else a dict by layer type.
        """
        new = positions_BQ.shape[1]
        found = {}
        for name, kind in self._kinds.items():
            length, offset = self.cache.get_mask_sizes(new, kind.layer)
            seen = visible_BQK[:, :, offset : offset + length]
            if kind.window is not None:
                positions_BK = self._slot_positions(positions_BQ)[:, offset : offset + length]
                seen = seen & (positions_BQ[:, :, None] - positions_BK[:, None] < kind.window)
            found[name] = as_taken(seen[:, None], self.implementation, self.model.dtype)
        return found if len(found) > 1 else next(iter(found.values()))

    def _slot_positions(self, positions_BQ: Tensor) -> Tensor:
        """The position that each slot holds: cache, pending and new."""
        slots = torch.arange(self.width, device=positions_BQ.device) - self._column(self.pads)
        return torch.cat([slots, *self._seen_positions_BR, positions_BQ], 1)

    def run(self, inputs: Inputs) -> Tensor:
        """Call the model; the new slots are pending from `added` on.

        Args:
            inputs: from `lay`.

        Returns:
            logits [B, Q, V] in the model's dtype.
        """
        return self._call(input_ids=inputs.tokens_BQ, attention_mask=inputs.mask, position_ids=inputs.positions_BQ)

    def added(self, inputs: Inputs) -> None:
        """Note that a pass over `inputs` has put its slots into the cache.

        Args:
            inputs: from `lay`.

        Raises:
            IntaglioError: the cache has not grown by that many slots.
        """
        expected = self.width + self.pending + inputs.tokens_BQ.shape[1]
        found = self.cache.get_seq_length()
        if found != expected:
            raise IntaglioError(
                f"the cache holds {found} slots after a pass that should have left {expected}; a drafter that makes "
                "the pass itself leaves the trees' nodes in it and nothing else"
            )
        self.pending += inputs.tokens_BQ.shape[1]
        self._seen_positions_BR.append(inputs.positions_BQ)

    def extend(self, tokens_BQ: Any, depths_BQ: Any, seen_BQR: Any) -> Tensor:
        """Read tokens behind the cache and the pending slots, as `lay` lays them out.

        Args:
            tokens_BQ: as `lay`.
            depths_BQ: as `lay`.
            seen_BQR: as `lay`.

        Returns:
            logits [B, Q, V] in the model's dtype.
        """
        inputs = self.lay(tokens_BQ, depths_BQ, seen_BQR)
        logits = self.run(inputs)
        self.added(inputs)
        return logits

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep some of the pending slots behind each row, in the order given, and drop the rest.

        Args:
            kept: for each row, indices of pending slots along one path, the first first.
        """
        before, pending = self.width, self.pending
        moved = moves(kept, [before - length for length in self.lengths], pending)
        if moved is not None:
            source, target = moved
            move_rows(self.cache, source, target)
        self.lengths = [length + len(slots) for length, slots in zip(self.lengths, kept, strict=True)]
        self.cache.crop(self.width - before - pending)
        self.pending = 0
        self._seen_positions_BR.clear()

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some rows only.

        Args:
            rows: which of the present rows stay, increasing.
        """
        before = self.width
        self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
        self.lengths = [self.lengths[row] for row in rows]
        self.pads = [self.pads[row] for row in rows]
        self.cache.crop(self.width - before)


def as_taken(seen: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Visibility as an attention implementation takes it: as it is, or additive for an eager one.

    Args:
        seen: what each token may see, bool, of any shape.
        implementation: name of the attention, as in the model's configuration.
        dtype: of the model.
    """
    if implementation not in _ADDITIVE:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def stack(trees: Sequence[TokenTree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trees of several rows as arrays, padded with nodes that see only themselves.

    Args:
        trees: one a row.

    Returns:
        tokens [B, Q], depths [B, Q] and, bool, who sees whom [B, Q, Q].
    """
    most = max(map(len, trees))
    tokens = np.zeros((len(trees), most), dtype=np.int64)
    depths = np.zeros((len(trees), most), dtype=np.int64)
    seen = np.broadcast_to(np.eye(most, dtype=bool), (len(trees), most, most)).copy()
    for row, tree in enumerate(trees):
        tokens[row, : len(tree)] = tree.tokens
        depths[row, : len(tree)] = tree.depths
        seen[row, : len(tree), : len(tree)] = tree.ancestors
    return tokens, depths, seen
