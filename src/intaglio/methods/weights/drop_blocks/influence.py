"""Measures of how much each block, or run of blocks, contributes.

Every measure passes the calibration data through the model's blocks a batch at a time and returns a number for each run
of blocks that may be removed. The lowest are removed.

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
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.partial_pass import BlockInputs, after_blocks, capture, run_blocks

OnBatch = Callable[[], None]
"""Callback after each batch."""
BlockRun = tuple[int, ...]
"""Blocks that are removed together."""


def influence(
    parts: Anatomy, data: Segments, order: Sequence[int], runs: Sequence[BlockRun], batch_size: int, on_batch: OnBatch
) -> dict[BlockRun, float]:
    """Compute Block Influence: BI_i = 1 - E_t[cos(x_{i,t}, x_{i+1,t})], x_{i,t} the input of block i at token t.

    The influence of a run is from 0 (its direction is unchanged) to 2.
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
        on_batch()
    return {run: 1.0 - total[run[0]] / tokens for run in runs}


def distance(
    parts: Anatomy, data: Segments, order: Sequence[int], runs: Sequence[BlockRun], batch_size: int, on_batch: OnBatch
) -> dict[BlockRun, float]:
    """Compute the angular distance over runs of n blocks: d_l = E_N[arccos(cos(x_l, x_{l+n}))] / π, from 0 to 1.

    States are those of each sequence's last token.
    """
    position = {index: number for number, index in enumerate(order)}
    total = dict.fromkeys(runs, 0.0)
    for batch in data.batches(batch_size):
        inputs = capture(parts, batch)
        states = [_last(inputs.hidden_BLD, inputs.mask_BL)]
        states += [_last(after_BLD, inputs.mask_BL) for _, _, after_BLD in run_blockwise(parts, inputs, order)]
        for run in runs:
            cosine_B = F.cosine_similarity(states[position[run[0]]], states[position[run[-1]] + 1], dim=-1)
            total[run] += float(cosine_B.clamp(-1, 1).arccos().sum()) / math.pi
        on_batch()
    return {run: value / data.n for run, value in total.items()}


def _last(hidden_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Return the state at each row's last real token, float64 [B, D] on the CPU."""
    rows, length = hidden_BLD.shape[:2]
    if mask_BL is None:
        last_BD = hidden_BLD[:, -1]
    else:
        positions = torch.arange(length, device=mask_BL.device)
        last_B = (positions * mask_BL).amax(1)
        last_BD = hidden_BLD[torch.arange(rows, device=hidden_BLD.device), last_B]
    return last_BD.cpu().double()


def loss_rise(
    parts: Anatomy, data: Segments, order: Sequence[int], runs: Sequence[BlockRun], batch_size: int, on_batch: OnBatch
) -> dict[BlockRun, float]:
    """Compute the rise of the log-perplexity (nats per token) without each run; negative where the loss falls."""
    total, base_loss, count = dict.fromkeys(runs, 0.0), 0.0, 0
    starts: dict[int, list[BlockRun]] = {}
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
        base_loss += _loss(parts, inputs.hidden_BLD, *targets)
        count += len(targets[1])
        on_batch()
    if not count:
        raise IntaglioError("no calibration token can be predicted: every segment has a single real token")
    return {run: (value - base_loss) / count for run, value in total.items()}


def _targets(batch: dict[str, Tensor], inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    """Return the mask of positions [B, L - 1] that predict a real token, and those tokens [R]."""
    ids_BL = batch["input_ids"].to(inputs.hidden_BLD.device)
    if inputs.mask_BL is None:
        predicts_BL = torch.ones_like(ids_BL[:, 1:], dtype=torch.bool)
    else:
        predicts_BL = inputs.mask_BL[:, 1:] & inputs.mask_BL[:, :-1]
    return predicts_BL, ids_BL[:, 1:][predicts_BL]


def _loss(parts: Anatomy, hidden_BLD: Tensor, predicts_BL: Tensor, target_R: Tensor) -> float:
    """Return the summed negative log-likelihood of the targets, in nats."""
    rows_RD = hidden_BLD[:, :-1][predicts_BL]
    step = max(1, ELEMENTS // int(parts.config.vocab_size))
    total = 0.0
    for low in range(0, len(rows_RD), step):
        logits_RV = after_blocks(parts, rows_RD[low : low + step]).float()
        total += float(F.cross_entropy(logits_RV, target_R[low : low + step], reduction="sum"))
    return total
