"""How much each block does: what the measures of `drop_blocks` are.

Every measure passes the calibration data through the model's blocks a batch at a time and returns one number for each
block, or each run of blocks, that may go. The least go.

Dimension letters: B batch, L sequence, D width, N sequences, S states (one more than blocks), R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from intaglio.checkpoint.calibration import run_blockwise
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.measures.language_modeling import ELEMENTS
from intaglio.modeling.anatomy import Anatomy, BlockInputs, after_blocks, capture, run_blocks

Tick = Callable[[], None]
"""Called after each batch."""
Run = tuple[int, ...]
"""Blocks that go together."""


def influence(
    parts: Anatomy, data: Segments, order: Sequence[int], runs: Sequence[Run], batch_size: int, tick: Tick
) -> dict[Run, float]:
    """Block Influence: BI_i = 1 - E_t[cos(x_{i,t}, x_{i+1,t})], x_{i,t} the input of block i at token t.

    Args:
        parts: the model's anatomy.
        data: the calibration segments; padding does not count.
        order: the blocks that the model still has.
        runs: single blocks.
        batch_size: segments that pass at a time.
        tick: called after each batch.

    Returns:
        The influence of each run, 0 (nothing is turned) to 2.

    Raises:
        IntaglioError: activations are not finite.
    """
    total, tokens = dict.fromkeys(order, 0.0), 0
    for batch in data.batches(batch_size):
        inputs = capture(parts, batch)
        mask_BL = inputs.mask_BL
        for index, before_BLD, after_BLD in run_blockwise(parts, inputs, order):
            cosine_BL = F.cosine_similarity(before_BLD.float(), after_BLD.float(), dim=-1)
            kept = cosine_BL if mask_BL is None else cosine_BL[mask_BL]
            total[index] += float(kept.cpu().double().sum())
        tokens += inputs.hidden_BLD[..., 0].numel() if mask_BL is None else int(mask_BL.sum())
        tick()
    return {run: 1.0 - total[run[0]] / tokens for run in runs}


def distance(
    parts: Anatomy, data: Segments, order: Sequence[int], runs: Sequence[Run], batch_size: int, tick: Tick
) -> dict[Run, float]:
    """Angular distance over a run of n blocks: d_l = E_N[arccos(cos(x_l, x_{l+n}))]/π at each sequence's last token.

    Args:
        parts: the model's anatomy.
        data: the calibration segments; of a padded one the last real token counts.
        order: the blocks that the model still has.
        runs: neighbouring blocks.
        batch_size: segments that pass at a time.
        tick: called after each batch.

    Returns:
        The distance over each run, 0 to 1.

    Raises:
        IntaglioError: activations are not finite.
    """
    place = {index: number for number, index in enumerate(order)}
    total = dict.fromkeys(runs, 0.0)
    for batch in data.batches(batch_size):
        inputs = capture(parts, batch)
        states = [_last(inputs.hidden_BLD, inputs.mask_BL)]
        states += [_last(after_BLD, inputs.mask_BL) for _, _, after_BLD in run_blockwise(parts, inputs, order)]
        for run in runs:
            cosine_B = F.cosine_similarity(states[place[run[0]]], states[place[run[-1]] + 1], dim=-1)
            total[run] += float(cosine_B.clamp(-1, 1).arccos().sum()) / math.pi
        tick()
    return {run: value / data.n for run, value in total.items()}


def _last(hidden_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The state at each row's last real token, float64 [B, D] on the CPU."""
    rows, length = hidden_BLD.shape[:2]
    if mask_BL is None:
        found = hidden_BLD[:, -1]
    else:
        places = torch.arange(length, device=mask_BL.device)
        last_B = (places * mask_BL).amax(1)
        found = hidden_BLD[torch.arange(rows, device=hidden_BLD.device), last_B]
    return found.cpu().double()


def loss_rise(
    parts: Anatomy, data: Segments, order: Sequence[int], runs: Sequence[Run], batch_size: int, tick: Tick
) -> dict[Run, float]:
    """By how much leaving a run out raises the log-perplexity: mean negative log-likelihood of a token, in nats.

    Args:
        parts: the anatomy of a model that predicts the next token.
        data: the calibration segments; padding is not predicted.
        order: the blocks that the model still has.
        runs: blocks that are left out together, neighbours among those that the model still has.
        batch_size: segments that pass at a time.
        tick: called after each batch.

    Returns:
        The rise for each run; below 0 where the model is better without it.

    Raises:
        IntaglioError: activations or losses are not finite.
    """
    total, whole, count = dict.fromkeys(runs, 0.0), 0.0, 0
    starts: dict[int, list[Run]] = {}
    for run in runs:
        starts.setdefault(run[0], []).append(run)
    for batch in data.batches(batch_size):
        inputs = capture(parts, batch)
        targets = _targets(batch, inputs)
        for index, before_BLD, _ in run_blockwise(parts, inputs, order):
            for run in starts.get(index, ()):
                short = BlockInputs(before_BLD, inputs.args, inputs.kwargs, inputs.mask_BL)
                for later in order[order.index(run[-1]) + 1 :]:
                    short.hidden_BLD = run_blocks(parts, later, later + 1, short)
                total[run] += _loss(parts, short.hidden_BLD, *targets)
        whole += _loss(parts, inputs.hidden_BLD, *targets)
        count += len(targets[1])
        tick()
    if not count:
        raise IntaglioError("no calibration token can be predicted: every segment has a single real token")
    return {run: (value - whole) / count for run, value in total.items()}


def _targets(batch: dict[str, Tensor], inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    """Which positions [B, L - 1] predict a real token, and those tokens [R]."""
    ids_BL = batch["input_ids"].to(inputs.hidden_BLD.device)
    if inputs.mask_BL is None:
        said_BL = torch.ones_like(ids_BL[:, 1:], dtype=torch.bool)
    else:
        said_BL = inputs.mask_BL[:, 1:] & inputs.mask_BL[:, :-1]
    return said_BL, ids_BL[:, 1:][said_BL]


def _loss(parts: Anatomy, hidden_BLD: Tensor, said_BL: Tensor, target_R: Tensor) -> float:
    """Summed negative log-likelihood of the targets, in nats."""
    rows_RD = hidden_BLD[:, :-1][said_BL]
    step = max(1, ELEMENTS // int(parts.config.vocab_size))
    total = 0.0
    for low in range(0, len(rows_RD), step):
        logits_RV = after_blocks(parts, rows_RD[low : low + step]).float()
        total += float(F.cross_entropy(logits_RV, target_R[low : low + step], reduction="sum"))
    return total
