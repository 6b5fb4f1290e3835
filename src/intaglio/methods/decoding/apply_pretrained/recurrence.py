"""Recurrence by fine-tuning: windows of T tokens that hand on a state of fixed size instead of a cache.

    z = mean over the window's tokens of h at the output of block l_out
    r = LN(MLP(z))      or, with the earlier state, LN(MLP([z; r_before]))
    attention of block l_ins in the next window:  softmax([q K^T / sqrt(d), q (W_k r)^T / sqrt(d) + b]) [V; W_v r]

The state is a further position of that block's attention, with its own projections, seen by every token of the window
and without an output. Positions restart in each window.

Dimension letters: B rows, T tokens, L tokens of a window, S state slots, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intaglio.errors import IntaglioError
from intaglio.methods.decoding.apply_pretrained.init import draw_linears
from intaglio.modeling.anatomy import Anatomy, anatomy, attention


class WindowRecurrence(nn.Module):
    """Network from a window's mean hidden state to the state of the next, and the bias of its attention slots.

    Args:
        width: D.
        slots: S. Default 1.
        feed_state: whether the earlier state is a further input. Default False.
        bias: start of b, the bias on the slots' attention logits. Default -5; None: no slot, as b = -inf.
        seed: of the initial weights. Default 0.
    """

    def __init__(
        self, width: int, slots: int = 1, feed_state: bool = False, bias: float | None = -5.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.slots, self.feed_state, self.width = slots, feed_state, width
        inputs = width * (1 + slots * feed_state)
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, slots * width)
        )
        self.norm = nn.LayerNorm(width)
        draw_linears(self.layers, seed, "recurrence")
        self.bias = None if bias is None else nn.Parameter(torch.full((slots,), bias))

    def forward(self, mean_BD: Tensor, state_BSD: Tensor | None = None) -> Tensor:
        """Return the next state [B, S, D]; the state before the first window is zero."""
        if self.feed_state:
            before = mean_BD.new_zeros(len(mean_BD), self.slots * self.width)
            mean_BD = torch.cat([mean_BD, before if state_BSD is None else state_BSD.flatten(1)], -1)
        state: Tensor = self.norm(self.layers(mean_BD).unflatten(-1, (self.slots, self.width)))
        return state


def check_layers(parts: Anatomy, state_layer: int | None, insert_layer: int | None) -> list[int]:
    """Return the block indices l_out and l_ins: by default the last and the middle block.

    Raises:
        IntaglioError: an index that no block has.
    """
    count = len(parts.blocks)
    chosen = {
        "state_layer": count - 1 if state_layer is None else state_layer,
        "insert_layer": count // 2 if insert_layer is None else insert_layer,
    }
    for name, layer in chosen.items():
        if not 0 <= layer < count:
            raise IntaglioError(f"{name} is {layer}; the model has blocks 0 to {count - 1}")
    return list(chosen.values())


def _mask_with_slots(mask: Tensor | None, hidden_BLD: Tensor, bias_S: Tensor) -> Tensor:
    """Return an additive mask [B, 1, L+S, L+S]: the model's own, and slots that every token sees."""
    (batch, length, _), slots, lowest = hidden_BLD.shape, len(bias_S), torch.finfo(hidden_BLD.dtype).min
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden_BLD.device).tril()[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=hidden_BLD.dtype, device=mask.device).masked_fill(~mask, lowest)
    mask = mask.to(hidden_BLD.dtype).expand(batch, -1, -1, -1)
    column = bias_S.to(hidden_BLD.dtype).expand(batch, mask.shape[1], length, slots)
    wide = torch.cat([mask, column], -1)
    # The slots' own queries see everything, and their outputs are dropped.
    return torch.cat([wide, wide.new_zeros(batch, mask.shape[1], slots, length + slots)], -2)


@contextmanager
def _inserted(block: nn.Module, state_BSD: Tensor, bias_S: Tensor) -> Iterator[None]:
    """Add the state as further positions to the attention of a block."""
    slots = len(bias_S)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_BLD = args[0] if args else kwargs["hidden_states"]
        longer = torch.cat([hidden_BLD, state_BSD.to(hidden_BLD.dtype)], 1)
        kwargs = {**kwargs, "attention_mask": _mask_with_slots(kwargs.get("attention_mask"), hidden_BLD, bias_S)}
        if kwargs.get("position_embeddings") is not None:  # the slots are not rotated
            cos, sin = kwargs["position_embeddings"]
            one = cos.new_ones(*cos.shape[:-2], slots, cos.shape[-1])
            kwargs["position_embeddings"] = (torch.cat([cos, one], -2), torch.cat([sin, torch.zeros_like(one)], -2))
        return ((longer, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": longer})

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, :-slots], *output[1:])
        return output[:, :-slots]

    module = attention(block)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _captured(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states that a block returns."""
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield outputs
    finally:
        handle.remove()


class WindowedModel:
    """A causal language model read in windows that hand on a state.

    Args:
        model: the model.
        network: the recurrence.
        layers: block indices l_out and l_ins.
        detach: whether no gradient flows into earlier windows. Default False.
        recompute: whether each window's activations are recomputed for the gradient. Default False.
    """

    def __init__(
        self,
        model: Any,
        network: WindowRecurrence,
        layers: list[int],
        *,
        detach: bool = False,
        recompute: bool = False,
    ) -> None:
        parts = anatomy(model)
        if parts.config._attn_implementation not in ("eager", "sdpa"):
            raise IntaglioError(
                f"recurrence needs eager or sdpa attention; the model has {parts.config._attn_implementation}"
            )
        self.model, self.network, self.detach, self.recompute = model, network, detach, recompute
        self.source, self.target = parts.blocks[layers[0]], parts.blocks[layers[1]]

    def read(self, ids_BL: Tensor, state_BSD: Tensor | None, mask_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits [B, L, V] of a window, and the state that the next one gets, [B, S, D]."""
        bias_S = self.network.bias
        inputs: dict[str, Any] = {} if mask_BL is None else {"attention_mask": mask_BL}
        with _captured(self.source) as hidden:
            if state_BSD is None or bias_S is None:
                logits_BLV = self.model(input_ids=ids_BL, use_cache=False, **inputs).logits
            else:
                with _inserted(self.target, state_BSD, bias_S):
                    logits_BLV = self.model(input_ids=ids_BL, use_cache=False, **inputs).logits
        weight_BL1 = (torch.ones_like(ids_BL) if mask_BL is None else mask_BL)[..., None].to(hidden[0].dtype)
        mean_BD = (hidden[0] * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)
        dtype = self.network.norm.weight.dtype
        return logits_BLV, self.network(mean_BD.to(dtype), state_BSD)

    def logits(self, ids_BT: Tensor, window: int, mask_BT: Tensor | None = None) -> Tensor:
        """Return the logits [B, T, V] of rows read window by window."""
        state_BSD: Tensor | None = None
        pieces = []
        for start in range(0, ids_BT.shape[1], window):
            mask_BL = None if mask_BT is None else mask_BT[:, start : start + window]
            if mask_BL is not None and bool(mask_BL.all()):
                mask_BL = None
            elif mask_BL is not None:  # a row that has ended shows its first padding to itself
                mask_BL = torch.cat([torch.ones_like(mask_BL[:, :1]), mask_BL[:, 1:]], 1)
            given = state_BSD.detach() if self.detach and state_BSD is not None else state_BSD
            inputs = (ids_BT[:, start : start + window], given, mask_BL)
            if self.recompute and torch.is_grad_enabled():
                piece, state_BSD = checkpoint(self.read, *inputs, use_reentrant=False)
            else:
                piece, state_BSD = self.read(*inputs)
            pieces.append(piece)
        return torch.cat(pieces, 1)

    def next_logits(self, window: int) -> Any:
        """Return a function from growing rows [B, T] to the logits [B, V] of their next token.

        Only the current window and a state are kept, whatever the length; the window is read again for each token.
        """
        done, state_BSD = 0, None

        def step(ids_BT: Tensor) -> Tensor:
            nonlocal done, state_BSD
            while ids_BT.shape[1] - done > window:
                state_BSD = self.read(ids_BT[:, done : done + window], state_BSD)[1]
                done += window
            return self.read(ids_BT[:, done:], state_BSD)[0][:, -1]

        return step
