"""The trained maps and their loss: pseudo states of future tokens, refined by the model's own later blocks.

Let h_n^t be the residual stream after block t at place n. For step i = 1..k, with a transfer layer t_i,

    p_n,i = h_n^{t_i} + D_i h_n^{t_i}                 (W_i = I + D_i in the paper; D_i starts at 0)

enters block t_i + 1 at position n + i. There it sees what n sees, n itself, the earlier pseudo states p_n,j (j < i) of
its own that are there, and itself; real places never see it. After the last block the model's own norm and head turn it
into a guess of the model's prediction at n + i.

Dimension letters: B rows, T places, D width, S owners (places that have pseudo states), K slots, N pseudo rows.
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
from intaglio.modeling.anatomy import CACHE, Anatomy, BlockInputs, HeadOnly, after_blocks, anatomy, capture, run_block
from intaglio.speculative.heads.lm_head import Words
from intaglio.speculative.heads.multi_token_loss import Goal, ahead, ahead_loss, reachable
from intaglio.speculative.target_model import Reader
from intaglio.trainer.protocols import Batch, Loss


def default_layers(steps: int, blocks: int) -> tuple[int, ...]:
    """Transfer layers evenly spread from two thirds to five sixths of the stack.

    Args:
        steps: k.
        blocks: of the model.
    """
    low, high = 2 * blocks / 3, 5 * blocks / 6
    return tuple(round(low + (high - low) * i / max(1, steps - 1)) for i in range(steps))


def check_layers(layers: Sequence[int], steps: int, blocks: int) -> None:
    """Refuse transfer layers that the model does not have, or in the wrong order.

    Args:
        layers: t_1 <= ... <= t_k; t counts the blocks that come before the transfer.
        steps: k.
        blocks: of the model.

    Raises:
        IntaglioError: names what is wrong.
    """
    if len(layers) != steps:
        raise IntaglioError(f"layers has {len(layers)} transfer layers for {steps} steps; one a step is needed")
    outside = [layer for layer in layers if not 0 <= layer <= blocks]
    if outside:
        raise IntaglioError(
            f"layers has the transfer layer {outside[0]}; the model has {blocks} blocks, so 0 to {blocks} is accepted"
        )
    if list(layers) != sorted(layers):
        raise IntaglioError(f"layers is {list(layers)}; transfer layers do not fall, as a later step sees the earlier")


class TransferHeads(nn.Module):
    """The k maps.

    Args:
        model: the target.
        layers: transfer layers t_1 <= ... <= t_k.
        goal: `model` (KL divergence from the model's own distribution, as in the paper) or `text`.
        decay: each step weighs this much of the one before. Default 1.
        state: weight of the mean squared distance between pseudo state and true state. Default 0.
        tokens_K: the tokens that may be guessed; see `Words`. Default: all.
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
        self.words = Words(None if parts.head is None else parts.head.weight, tokens_K)  # type: ignore[arg-type]
        check_layers(layers, len(layers), len(parts.blocks))
        self.layers, self.goal, self.decay, self.state = tuple(layers), goal, decay, state
        self.ranks = 1  # of each step that `loss` looks at
        width = int(parts.config.hidden_size)
        self.change_kDD = nn.Parameter(torch.zeros(len(layers), width, width))

    @property
    def steps(self) -> int:
        """k."""
        return len(self.layers)

    def score(self, parts: Anatomy, states_RD: Tensor) -> Tensor:
        """Logits [R, W] of pseudo states after the last block, of the tokens that may be guessed.

        Args:
            parts: of the target.
            states_RD: the states.
        """
        if self.words.tokens_K is None:
            return after_blocks(parts, states_RD)
        bias: Tensor | None = getattr(parts.head, "bias", None)
        narrow = None if bias is None else self.words.narrow(bias)
        return after_blocks(parts, states_RD, lambda x: F.linear(x, self.words.weight_KD.to(x.dtype), narrow))

    def transfer(self, step: int, hidden: Tensor) -> Tensor:
        """The pseudo states of one step, of the shape and dtype of the states they come from.

        Args:
            step: from 0.
            hidden: states after block t of the step [..., D].
        """
        change_DD = self.change_kDD[step]
        return hidden + F.linear(hidden.to(change_DD.dtype), change_DD).to(hidden.dtype)

    def present(self, index: int) -> int:
        """How many steps have entered by the time block `index` runs.

        Args:
            index: of a block, from 0; the number of blocks for what comes after them.
        """
        return sum(layer <= index for layer in self.layers)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """KL(model at n + i || guess i at n), averaged over n and summed over i.

        The model reads the rows once, without gradient, and keeps its cache; then the pseudo states alone run through
        the later blocks against it.

        Args:
            model: frozen.
            batch: from `head_batch`.
        """
        reader = Reader(model, DynamicCache(), hidden=True)  # a stock cache: gradients pass through its rows
        parts = anatomy(model)
        with torch.no_grad(), recorded(parts, self.layers) as states:
            reader.prefill(batch["input_ids"])
        hidden_BTD = reader.hidden_BQD
        assert hidden_BTD is not None
        guesses = self.refine(parts, reader, states)
        head = HeadOnly(parts, frozen=False)

        def score(states_RKD: Tensor) -> Tensor:
            return self.score(parts, states_RKD.flatten(0, 1)).unflatten(0, states_RKD.shape[:2])

        loss = ahead_loss(
            batch,
            guesses,
            hidden_BTD,
            score,
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
        found = []
        for step, layer in enumerate(self.layers):
            scored_BT = reachable(batch, step + 1, "model")
            moved_BTD = ahead(self.transfer(step, states[layer]), step + 1)
            found.append(F.mse_loss(moved_BTD[scored_BT].float(), states[layer][scored_BT].float()))
        return torch.stack(found).mean()

    def refine(self, parts: Anatomy, reader: Reader, states: dict[int, Tensor]) -> list[Tensor]:
        """Pseudo states of every place after the last block, [B, T, D] a step.

        Args:
            parts: of the target.
            reader: has read the rows and nothing else.
            states: by transfer layer, of every place [B, T, D].
        """
        first = states[self.layers[0]]
        rows, places = first.shape[:2]
        device = first.device
        seen_STK = torch.ones((places, places), dtype=torch.bool, device=device).tril()[None].expand(rows, -1, -1)
        place_BS = torch.arange(places, device=device)[None].expand(rows, -1)
        stages: dict[int, BlockInputs] = {}
        for count in sorted({self.present(index) for index in range(self.layers[0], len(parts.blocks))}):
            visible_BNK = pseudo_visible(seen_STK, count)
            positions_BN = pseudo_positions(place_BS, count, reader)
            mask = reader.masks(visible_BNK, positions_BN)
            stages[count] = arguments(parts, reader, torch.zeros_like(positions_BN), positions_BN, mask)
        found_BND: Tensor | None = None
        for index in range(self.layers[0], len(parts.blocks) + 1):
            for step, layer in enumerate(self.layers):
                if layer == index:
                    new_BTD = self.transfer(step, states[layer])
                    found_BND = new_BTD if found_BND is None else torch.cat([found_BND, new_BTD], 1)
            if index < len(parts.blocks):
                assert found_BND is not None
                found_BND = run_block(parts.blocks[index], index, found_BND, stages[self.present(index)])
        assert found_BND is not None
        return list(found_BND.split(places, 1))


def pseudo_visible(seen_BSK: Tensor, count: int) -> Tensor:
    """What pseudo states see: the slots their owners see, and then the pseudo states, step by step [B, N, K + N].

    Args:
        seen_BSK: what each owner sees, itself included.
        count: steps that are there; N = count * S.
    """
    rows, owners, _ = seen_BSK.shape
    own_SS = torch.eye(owners, dtype=torch.bool, device=seen_BSK.device)
    earlier_kk = torch.ones((count, count), dtype=torch.bool, device=seen_BSK.device).tril()
    own_NN = (earlier_kk[:, None, :, None] & own_SS[None, :, None, :]).reshape(count * owners, count * owners)
    return torch.cat([seen_BSK.repeat(1, count, 1), own_NN[None].expand(rows, -1, -1)], -1)


def pseudo_positions(position_BS: Tensor, count: int, reader: Reader) -> Tensor:
    """Positions of the pseudo states: the owner's, and i more [B, N].

    Args:
        position_BS: of the owners.
        count: steps that are there.
        reader: whose model may have no position behind its context; what would lie there is of no use anyway.
    """
    found_BN = torch.cat([position_BS + step for step in range(1, count + 1)], 1)
    context = getattr(reader.model.config.get_text_config(), "max_position_embeddings", None)
    return found_BN if context is None else found_BN.clamp(max=int(context) - 1)


def arguments(parts: Anatomy, reader: Reader, ids_BQ: Tensor, positions_BQ: Tensor, mask: Any) -> BlockInputs:
    """What enters the first block, and what every block gets beside it, for tokens behind a cache.

    Args:
        parts: of the target.
        reader: its cache is what the blocks will fill.
        ids_BQ: token ids; of pseudo states any will do, as what enters the first block is not used.
        positions_BQ: position ids.
        mask: as the model takes it.
    """
    given = {"input_ids": ids_BQ, "position_ids": positions_BQ, "attention_mask": mask}
    return capture(parts, {**given, CACHE: reader.cache, "use_cache": True})


@contextmanager
def recorded(parts: Anatomy, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The residual stream after some numbers of blocks, noted as a pass goes by.

    Args:
        parts: of the model.
        layers: numbers of blocks, 0 for what enters the first.
    """
    states: dict[int, Tensor] = {}

    def before(layer: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[layer] = args[0] if args else kwargs["hidden_states"]

        return note

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
