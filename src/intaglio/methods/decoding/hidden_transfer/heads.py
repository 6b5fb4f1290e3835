"""Trained maps and their loss: pseudo states of future tokens, refined by the model's own later blocks.

Let h_n^t be the residual stream after block t at position n. For step i = 1..k, with a transfer layer t_i,

    p_n,i = h_n^{t_i} + D_i h_n^{t_i}                 (W_i = I + D_i in the paper; D_i starts at 0)

enters block t_i + 1 at position n + i. There it sees what n sees, n itself, the earlier pseudo states p_n,j (j < i) of
its own that are present, and itself; real positions never see it. After the last block the model's own norm and head
turn it into a guess of the model's prediction at n + i.

Dimension letters: B rows, T positions, D width, S owners (positions that have pseudo states), K slots, N pseudo rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHE, Anatomy, anatomy
from intaglio.modeling.partial_pass import BlockInputs, HeadOnly, after_blocks, capture, run_block
from intaglio.speculative._utils import context_length
from intaglio.speculative.heads.lm_head import DraftVocabulary
from intaglio.speculative.heads.multi_token_loss import Goal, multi_token_loss, shift_states, valid_targets
from intaglio.speculative.target_model import CachedModel
from intaglio.trainer.protocols import Batch, Loss


def default_layers(steps: int, blocks: int) -> tuple[int, ...]:
    """Spread transfer layers evenly from two thirds to five sixths of the stack."""
    low, high = 2 * blocks / 3, 5 * blocks / 6
    return tuple(round(low + (high - low) * i / max(1, steps - 1)) for i in range(steps))


def check_layers(layers: Sequence[int], steps: int, blocks: int) -> None:
    """Raise an `IntaglioError` if transfer layers t_1 <= ... <= t_k are out of order or not in the model."""
    if len(layers) != steps:
        raise IntaglioError(f"layers has {len(layers)} transfer layers for {steps} steps; one per step is needed")
    outside = [layer for layer in layers if not 0 <= layer <= blocks]
    if outside:
        raise IntaglioError(
            f"layers has the transfer layer {outside[0]}; the model has {blocks} blocks, so 0 to {blocks} is accepted"
        )
    if list(layers) != sorted(layers):
        raise IntaglioError(
            f"layers is {list(layers)}; transfer layers must not decrease, as a later step sees the earlier"
        )


class TransferHeads(nn.Module):
    """The k maps.

    Args:
        model: the target.
        layers: transfer layers t_1 <= ... <= t_k.
        goal: `model` (KL divergence from the model's own distribution, as in the paper) or `text`.
        decay: weight of each step relative to the one before. Default 1.
        state: weight of the mean squared distance between pseudo state and true state. Default 0.
        tokens_K: tokens that may be guessed; see `DraftVocabulary`. Default: all.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        *,
        goal: Goal = "model",
        decay: float = 1.0,
        state: float = 0.0,
        tokens_K: Tensor | None = None,
    ) -> None:
        super().__init__()
        parts = anatomy(model)
        self.words = DraftVocabulary(None if parts.head is None else parts.head.weight, tokens_K)  # type: ignore[arg-type]
        check_layers(layers, len(layers), len(parts.blocks))
        self.layers, self.goal, self.decay, self.state = tuple(layers), goal, decay, state
        self.ranks = 1  # candidates of each step that `loss` counts
        width = int(parts.config.hidden_size)
        self.change_kDD = nn.Parameter(torch.zeros(len(layers), width, width))

    @property
    def steps(self) -> int:
        """k."""
        return len(self.layers)

    def score(self, parts: Anatomy, states_RD: Tensor) -> Tensor:
        """Return logits [R, W] of the tokens that may be guessed from pseudo states after the last block."""
        if self.words.tokens_K is None:
            return after_blocks(parts, states_RD)
        bias: Tensor | None = getattr(parts.head, "bias", None)
        narrow = None if bias is None else self.words.narrow(bias)
        return after_blocks(parts, states_RD, lambda x: F.linear(x, self.words.weight_KD.to(x.dtype), narrow))

    def transfer(self, step: int, hidden: Tensor) -> Tensor:
        """Return the pseudo states of a step (from 0) from states after its transfer layer [..., D]."""
        change_DD = self.change_kDD[step]
        return hidden + F.linear(hidden.to(change_DD.dtype), change_DD).to(hidden.dtype)

    def present(self, index: int) -> int:
        """Return how many steps have entered before block `index` (from 0) runs."""
        return sum(layer <= index for layer in self.layers)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Compute KL(model at n + i || guess i at n), averaged over n and summed over i.

        The model reads the rows once, without gradient, and keeps its cache; then only the pseudo states run through
        the later blocks against it.
        """
        cached = CachedModel(model, DynamicCache(), hidden=True)  # a stock cache: gradients pass through its rows
        parts = anatomy(model)
        with torch.no_grad(), record_states(parts, self.layers) as states:
            cached.prefill(batch["input_ids"])
        hidden_BTD = cached.hidden_BQD
        assert hidden_BTD is not None
        guesses = self.refine(parts, cached, states)
        head = HeadOnly(parts, frozen=False)
        loss = multi_token_loss(
            batch,
            guesses,
            hidden_BTD,
            lambda states_RKD: self.score(parts, states_RKD.flatten(0, 1)).unflatten(0, states_RKD.shape[:2]),
            lambda hidden_RD: head.logits(hidden_RD[:, None])[:, 0],
            [],
            goal=self.goal,
            ranks=self.ranks,
            weights=[self.decay**step for step in range(self.steps)],
            words=self.words,
        )
        if not self.state:
            return loss
        distance = self._distance(batch, states)
        return Loss(loss.total + self.state * distance, {**loss.parts, "state": distance}, loss.outputs)

    def _distance(self, batch: Batch, states: dict[int, Tensor]) -> Tensor:
        distances = []
        for step, layer in enumerate(self.layers):
            scored_BT = valid_targets(batch, step + 1, "model")
            moved_BTD = shift_states(self.transfer(step, states[layer]), step + 1)
            distances.append(F.mse_loss(moved_BTD[scored_BT].float(), states[layer][scored_BT].float()))
        return torch.stack(distances).mean()

    def refine(self, parts: Anatomy, cached: CachedModel, states: dict[int, Tensor]) -> list[Tensor]:
        """Return the pseudo states of every position after the last block, [B, T, D] per step.

        Args:
            parts: of the target.
            cached: has read the rows and nothing else.
            states: by transfer layer, of every position [B, T, D].
        """
        first = states[self.layers[0]]
        if first.dim() != 3:
            raise IntaglioError(
                f"the model family {parts.config.model_type!r} is not supported: its blocks pass on hidden states of "
                f"shape {tuple(first.shape)}, and a transfer needs rows, tokens and width"
            )
        rows, length = first.shape[:2]
        device = first.device
        seen_BSK = torch.ones((length, length), dtype=torch.bool, device=device).tril()[None].expand(rows, -1, -1)
        position_BS = torch.arange(length, device=device)[None].expand(rows, -1)
        stages: dict[int, BlockInputs] = {}
        for count in sorted({self.present(index) for index in range(self.layers[0], len(parts.blocks))}):
            visible_BNK = pseudo_visible(seen_BSK, count)
            positions_BN = pseudo_positions(position_BS, count, cached)
            mask = cached.masks(visible_BNK, positions_BN)
            stages[count] = block_inputs(parts, cached, torch.zeros_like(positions_BN), positions_BN, mask)
        pseudo_BND = first[:, :0]
        for index in range(self.layers[0], len(parts.blocks) + 1):
            for step, layer in enumerate(self.layers):
                if layer == index:
                    pseudo_BND = torch.cat([pseudo_BND, self.transfer(step, states[layer])], 1)
            if index < len(parts.blocks):
                pseudo_BND = run_block(parts.blocks[index], index, pseudo_BND, stages[self.present(index)])
        return list(pseudo_BND.split(length, 1))


def pseudo_visible(seen_BSK: Tensor, count: int) -> Tensor:
    """Return the visibility of pseudo states: the owners' slots, then the pseudo states, step by step [B, N, K + N].

    Args:
        seen_BSK: what each owner sees, itself included.
        count: steps present; N = count * S.
    """
    rows, owners, _ = seen_BSK.shape
    own_SS = torch.eye(owners, dtype=torch.bool, device=seen_BSK.device)
    earlier_kk = torch.ones((count, count), dtype=torch.bool, device=seen_BSK.device).tril()
    own_NN = (earlier_kk[:, None, :, None] & own_SS[None, :, None, :]).reshape(count * owners, count * owners)
    return torch.cat([seen_BSK.repeat(1, count, 1), own_NN[None].expand(rows, -1, -1)], -1)


def pseudo_positions(position_BS: Tensor, count: int, cached: CachedModel) -> Tensor:
    """Return the positions of the pseudo states, the owner's and i more [B, N], clamped to the model's context.

    Guesses beyond the context are never used.
    """
    positions_BN = torch.cat([position_BS + step for step in range(1, count + 1)], 1)
    context = context_length(cached.model)
    return positions_BN if context is None else positions_BN.clamp(max=context - 1)


def block_inputs(parts: Anatomy, cached: CachedModel, ids_BQ: Tensor, positions_BQ: Tensor, mask: Any) -> BlockInputs:
    """Return the state that enters the first block, and the other inputs of every block, for tokens after a cache.

    The ids of pseudo states are arbitrary, as the state that enters the first block is not used.
    """
    batch = {"input_ids": ids_BQ, "position_ids": positions_BQ, "attention_mask": mask}
    return capture(parts, {**batch, CACHE: cached.cache, "use_cache": True})


@contextmanager
def record_states(parts: Anatomy, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record the residual stream after some numbers of blocks (0: before the first) during a pass."""
    states: dict[int, Tensor] = {}

    def before(layer: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[layer] = args[0] if args else kwargs["hidden_states"]

        return record

    def after(module: nn.Module, args: Any, output: Any) -> None:
        states[len(parts.blocks)] = output[0] if isinstance(output, tuple) else output

    handles = [
        parts.blocks[-1].register_forward_hook(after)
        if layer == len(parts.blocks)
        else parts.blocks[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
        for layer in set(layers)
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
