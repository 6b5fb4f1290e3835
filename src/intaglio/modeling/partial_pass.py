"""Passes over parts of a model: its base, single blocks, and what follows its last hidden state.

Dimension letters: B batch, L sequence, R rows, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from intaglio.errors import IntaglioError, first_line
from intaglio.modeling.anatomy import Anatomy


@dataclass
class BlockInputs:
    """Inputs of the blocks for a batch: the hidden state of the next block to run, and each block's other arguments.

    Layers share tensors, so `kwargs` holds references. `mask_BL` is True at real tokens, None without padding.
    """

    hidden_BLD: Tensor
    args: list[tuple[Any, ...]] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    mask_BL: Tensor | None = None


class _BlockOutput(Exception):
    """Stops a pass after the first block."""


_EXTRA_OUTPUTS: dict[type[nn.Module], int | None] = {}
"""Further values that blocks of a class return beside the hidden state, in a tuple; None: the bare hidden state."""


@torch.no_grad()
def _extra_outputs(parts: Anatomy) -> int | None:
    """Return `_EXTRA_OUTPUTS` of a model's blocks, measured with a pass that ends after the first of them."""
    kind = type(parts.blocks[0])
    if kind not in _EXTRA_OUTPUTS:

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            _EXTRA_OUTPUTS[kind] = len(output) - 1 if isinstance(output, tuple) else None
            raise _BlockOutput

        device = next(parts.base.parameters()).device
        handle = parts.blocks[0].register_forward_hook(stop)
        try:
            run_base(parts, {"input_ids": torch.zeros((1, 2), dtype=torch.long, device=device)})
        except _BlockOutput:
            pass
        finally:
            handle.remove()
    return _EXTRA_OUTPUTS[kind]


@contextmanager
def _family_errors(config: Any, what: str) -> Iterator[None]:
    """Turn what a family's own code raises for inputs it does not take into a sentence."""
    try:
        yield
    except (IntaglioError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise IntaglioError(
            f"the model family {config.model_type!r} is not supported: {what} fails with {first_line(error)}"
        ) from error


def run_base(parts: Anatomy, batch: Mapping[str, Any]) -> Any:
    """Run the model without its head, by default without a cache."""
    with _family_errors(parts.config, f"reading {' and '.join(batch)}"):
        return parts.base(**({"use_cache": False} if parts.causal else {}) | dict(batch))


@contextmanager
def _pass_through(parts: Anatomy, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """Make every block return its input and record the arguments of its call."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))

    more = _extra_outputs(parts)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if more is None else (hidden_states, *[None] * more)

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in parts.blocks]
    for block in parts.blocks:
        block.forward = forward
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in parts.blocks:
            vars(block).pop("forward", None)


@torch.no_grad()
def capture(parts: Anatomy, batch: Mapping[str, Any]) -> BlockInputs:
    """Run the model around its blocks to record the input of block 0 and every block's masks and positions.

    Arguments are recorded per block, since layers may differ (sliding and full attention).
    """
    device = next(parts.base.parameters()).device
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with _pass_through(parts, calls):
        run_base(parts, inputs)
    if len(calls) != len(parts.blocks):
        raise IntaglioError(
            f"the model family {parts.config.model_type!r} is not supported: it runs its {len(parts.blocks)} blocks in "
            f"{len(calls)} calls, not once each"
        )
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
        with _family_errors(parts.config, f"running block {index} alone"):
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
        through = parts.blocks[-1].forward
        parts.blocks[-1].forward = lambda hidden_states, *args, **kwargs: through(hidden_RD[:, None])
        with _family_errors(parts.config, "running final norm and head alone"):
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
            name: self._base
            if module is not None and any(part is parts.base for part in module.modules())
            else (copy.deepcopy(module) if frozen else module)
            for name, module in model._modules.items()
        }

    @torch.no_grad()
    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Return logits [B, L, V] of final hidden states, in the model's dtype."""
        return self(hidden_BLD)

    def __call__(self, hidden_BLD: Tensor) -> Tensor:
        """Return `logits`, differentiable."""
        self._base.hidden = hidden_BLD
        ids = torch.zeros(hidden_BLD.shape[:2], dtype=torch.long, device=hidden_BLD.device)
        logits: Tensor = self._shell(input_ids=ids).logits
        return logits


@dataclass
class _BaseOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of a base model of any kind; mixtures of experts read router logits from it."""

    router_logits: Any = None


class _Given(nn.Module):
    """Stand-in for the base model, or one that holds it as `decoder`, that returns a given hidden state."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.hidden: Tensor | None = None

    @property
    def decoder(self) -> _Given:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _BaseOutput:
        return _BaseOutput(last_hidden_state=self.hidden)


@torch.no_grad()
def final_hidden(parts: Anatomy, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the base model's `last_hidden_state` [B, L, D] for a batch."""
    device = next(parts.base.parameters()).device
    return base_hidden(parts, {name: value.to(device) for name, value in batch.items()})


def base_hidden(parts: Anatomy, batch: Mapping[str, Tensor]) -> Tensor:
    """Return `final_hidden` of a batch on the model's device, differentiable."""
    hidden: Tensor = run_base(parts, batch).last_hidden_state
    return hidden
