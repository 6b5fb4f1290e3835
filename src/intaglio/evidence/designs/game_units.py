"""Neurons that report the state of a board game: the start of dense and mixture models, and their measure.

A small GPT-2 is trained on games whose board is known at every token, and every arm continues from it: its MLPs of D
units become k D units in a dense arm, k noisy copies side by side, and E noisy copies of which a token uses k in a
mixture of experts. What one unit reported is then split over its copies, so a property may be read from a unit (times
the gate of its expert) or from the sum of a unit's copies, in every arm.

Dimension letters: N games, T tokens, P positions after moves, U units of all layers, C units and sums of copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import Measured, Settings, Values
from intaglio.evidence.engine.claim import Metric
from intaglio.evidence.testbeds.board_game import PAD, BoardGame, Boards
from intaglio.measures.feature_coverage import Counts, coverage, cuts, reconstruction
from intaglio.methods.activations.moe_x import MoELayer, MoELayerConfig, MoEX
from intaglio.methods.activations.moe_x.upcycling import UpcycleConfig
from intaglio.modeling.anatomy import anatomy

COVERAGE = Metric("coverage", "mean F1", "higher", continuous=False)
SINGLE_COVERAGE = Metric("coverage of single units", "mean F1", "higher", continuous=False)
RECONSTRUCTION = Metric("reconstruction", "F1", "higher", continuous=False)
GAME_LOSS = Metric("loss", "nats a token")
FIRING = Metric("units of a layer that fire for a token", "units", continuous=False)
BATCH = 128
"""Games measured at a time."""


def upcycled(bed: BoardGame, seed: int, model: Settings) -> Checkpoint:
    """Return the start of an arm: the test bed's dense model with `experts`, or `copies` of its units side by side.

    `model` is `{"activation": ..., "experts": MoEX(...)}` or `{"activation": ..., "copies": k, "noise": ...}`.
    """
    base = bed.base(seed, model["activation"])
    experts: MoEX | None = model.get("experts")
    if experts is not None:
        return experts.apply(base, seed=seed)
    wide = bed.new(seed % 2**32, model["activation"], model["copies"] * bed.inner)
    return widened(base, wide, model["copies"], model["noise"], seed)


@torch.no_grad()
def widened(base: Checkpoint, wide: Checkpoint, copies: int, noise: float, seed: int) -> Checkpoint:
    """Return `wide` with the weights of `base`, each MLP as noisy copies side by side, drawn as for experts."""
    parts, into = anatomy(base.model), anatomy(wide.model)
    own = wide.model.state_dict()
    same = {name: t for name, t in base.model.state_dict().items() if own[name].shape == t.shape}
    wide.model.load_state_dict(same, strict=False)
    for index in range(len(parts.blocks)):
        narrow, broad = parts.mlp(index), into.mlp(index)
        units, hidden = narrow.into.shape
        config = MoELayerConfig(hidden, units, copies, copies, narrow.activation, biases=(True, False, True))
        start = UpcycleConfig(noise=noise, seed=seed)
        layer = start.build(f"layers.{index}.{narrow.where.place}", narrow, config)
        assert layer.encoder_bias is not None  # GPT-2 has biases
        broad.into.write(layer.encoder.flatten(0, 1))
        broad.into.module.bias.copy_(layer.encoder_bias)  # type: ignore[operator]
        broad.out.write(layer.wide_decoder() / copies)
    return wide


def board_units(measured: Measured) -> Values:
    """Return how well units report the board: chosen on training games, judged on the run's; and the loss."""
    bed, seed = measured.bed, measured.key.seed
    read, judged = bed.boards("train", seed), bed.boards(measured.key.split, measured.key.base)
    (read_PU, _), (z_PU, nats) = (activations(measured.checkpoint, boards) for boards in (read, judged))
    if not math.isfinite(nats):
        return dict.fromkeys((COVERAGE.name, SINGLE_COVERAGE.name, RECONSTRUCTION.name, GAME_LOSS.name, FIRING.name))
    read_PC, z_PC = (torch.cat([z, _summed(z, bed.inner, bed.depth)], dim=1) for z in (read_PU, z_PU))
    cells = bed.cells
    return {
        COVERAGE.name: _coverage(read_PC, read, z_PC, judged),
        SINGLE_COVERAGE.name: _coverage(read_PU, read, z_PU, judged),
        RECONSTRUCTION.name: reconstruction(
            read_PC, read.properties_PK[:, :cells], z_PC, judged.properties_PK[:, :cells]
        ),
        GAME_LOSS.name: nats,
        FIRING.name: float((z_PU > 0).sum(1).double().mean()) / bed.depth,
    }


def _coverage(read_PU: Tensor, read: Boards, judged_PU: Tensor, judged: Boards) -> float:
    """Mean over properties of the F1 of the best unit."""
    thresholds = cuts(read_PU)
    chosen = Counts.of(read_PU, read.properties_PK, thresholds)
    return float(coverage(chosen, Counts.of(judged_PU, judged.properties_PK, thresholds)).nanmean())


def _summed(z_PU: Tensor, units: int, depth: int) -> Tensor:
    """Sum the copies of each unit: of every layer, U / (depth F) copies of F units side by side."""
    return z_PU.unflatten(1, (depth, -1, units)).sum(2).flatten(1)


@torch.no_grad()
def activations(checkpoint: Checkpoint, boards: Boards) -> tuple[Tensor, float]:
    """Return the units of all layers after every move [P, U], times their gates, and the loss in nats a token."""
    model, games = checkpoint.model.eval(), boards.games
    parts: list[Tensor] = []
    total = count = 0.0
    for start in range(0, len(games.ids_NT), BATCH):
        rows = slice(start, start + BATCH)
        ids_NT, mask_NT = games.ids_NT[rows], games.mask_NT[rows]
        with _units(checkpoint) as seen:
            logits_NTV = model(input_ids=ids_NT, attention_mask=mask_NT.long()).logits
        parts.append(torch.cat([z_NTF[games.is_move_NT[rows]] for z_NTF in seen], dim=-1))
        target_NT = ids_NT[:, 1:].masked_fill(ids_NT[:, 1:] == PAD, -100)
        total += float(F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), target_NT.flatten(), reduction="sum"))
        count += int((target_NT != -100).sum())
    return torch.cat(parts), total / count


@contextmanager
def _units(checkpoint: Checkpoint) -> Iterator[list[Tensor]]:
    """Yield a list that a pass fills with the units of each layer's MLP, times the gates of their experts."""
    seen: list[Tensor] = []

    def gated(layer: MoELayer, args: tuple[Tensor, ...]) -> None:
        seen.append(layer.features(args[0]))

    def plain(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    with ExitStack() as hooks:
        for block in anatomy(checkpoint.model).blocks:
            mlp: Any = block.mlp
            experts = isinstance(mlp, MoELayer)
            hook = mlp.register_forward_pre_hook(gated) if experts else mlp.act.register_forward_hook(plain)
            hooks.enter_context(hook)
        yield seen
