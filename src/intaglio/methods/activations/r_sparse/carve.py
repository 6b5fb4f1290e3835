"""From calibration data to layers: one walk over the dense model, then the layers, then a search over their splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import SharedInputGroup, calibrate_blocks
from intaglio.data.segments import Segments
from intaglio.measures.language_modeling import quality
from intaglio.methods.activations.r_sparse import cats, greedy, surgery
from intaglio.methods.activations.r_sparse.linear import Rule, SparseLinear
from intaglio.methods.activations.r_sparse.search import Journal, Search
from intaglio.methods.activations.r_sparse.tables import Options, Table, summary
from intaglio.methods.activations.r_sparse.thresholds import Sample, scores, thresholds
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import Linear, anatomy

See = Callable[[str, Linear, Tensor], None]
"""Called with a projection's full name, itself, and what enters it on the calibration tokens [N, I]."""


def look(
    checkpoint: Checkpoint,
    data: Segments,
    names: Sequence[str],
    see: See,
    *,
    tokens: int,
    batch_size: int,
    progress: Progress = no_progress,
) -> None:
    """Show what enters projections of the dense model.

    Args:
        checkpoint: stays as it is.
        data: calibration segments.
        names: full names of the projections.
        see: called for each.
        tokens: that are shown, at the most.
        batch_size: sequences that pass at a time.
        progress: called after each batch.

    Raises:
        IntaglioError: a value is NaN or infinite.
    """
    wanted = set(names)

    def note(index: int, group: SharedInputGroup) -> None:
        for linear in group.linears:
            name = f"layers.{index}.{linear.name}"
            if name in wanted:
                see(name, linear, group.statistic.inputs(name))

    calibrate_blocks(
        checkpoint,
        data,
        statistic=lambda features, device: Sample(data.tokens, tokens),
        carve=note,
        batch_size=batch_size,
        what="r_sparse",
        progress=progress,
        edits=False,
    )


def tables_of(
    checkpoint: Checkpoint, data: Segments, alphas: Mapping[str, Sequence[float]], options: Options, **walking: Any
) -> dict[str, Table]:
    """What each projection would do at some alphas.

    Args:
        checkpoint: stays as it is.
        data: calibration segments.
        alphas: of each projection, by its full name.
        options: what else decides.
        walking: see `look`.
    """
    found: dict[str, Table] = {}

    def see(name: str, linear: Linear, x_NI: Tensor) -> None:
        found[name] = options.table(name, linear, x_NI, alphas[name])

    look(checkpoint, data, list(alphas), see, **walking)
    return {name: found[name] for name in alphas}


def split(
    checkpoint: Checkpoint,
    data: Segments,
    start: Mapping[str, float],
    options: Options,
    search: Search | None,
    *,
    seed: int,
    directory: Path | None,
    resume: bool,
    **walking: Any,
) -> tuple[dict[str, SparseLinear], dict[str, Any]]:
    """Put layers of R-Sparse, or of uniform TEAL, into a checkpoint.

    Args:
        checkpoint: changed in place.
        data: calibration segments.
        start: the alpha of each projection, by its full name, before any search.
        options: what else decides.
        search: over the alphas, or none.
        seed: of the search.
        directory: where it keeps what it knows, or nowhere.
        resume: whether it goes on with what is there.
        walking: see `look`.

    Returns:
        The layers by the same names, and what was chosen, for the record.
    """
    names, grid = list(start), () if search is None else search.grid
    tables = tables_of(checkpoint, data, {name: grid or (start[name],) for name in names}, options, **walking)
    first = {name: start[name] if search is None else grid[search.place(start[name])] for name in names}
    layers = surgery.put_layers(checkpoint, {name: tables[name].layer(first[name]) for name in names})
    alphas: Mapping[str, float] = first
    chosen: dict[str, Any] = {}
    if search is not None:
        some = first_of(data, search.segments)
        batch_size = walking["batch_size"]

        def fitness(candidate: Sequence[float]) -> float:
            for name, alpha in zip(names, candidate, strict=True):
                tables[name].set(layers[name], alpha)
            return fmean(quality(checkpoint, some, batch_size=batch_size).losses)

        about = [search.model_dump(), options.key, some.digest, data.digest, seed, surgery.weights_of(checkpoint.model)]
        key = hashlib.sha256(json.dumps([about, first]).encode()).hexdigest()
        found, best = search.run(
            [first[name] for name in names],
            fitness,
            seed=seed,
            journal=Journal(directory, key, resume),
            progress=walking.get("progress", no_progress),
        )
        alphas = dict(zip(names, found, strict=True))
        for name in names:
            tables[name].set(layers[name], alphas[name])
        chosen = {"evaluations": search.evaluations, "loss_by_generation": best}
    choices = {name: tables[name].choices[alphas[name]] for name in names}
    if search is not None or len(set(alphas.values())) > 1:
        chosen["grid"] = _grid("Share of the budget for channels", alphas)
    return layers, {**summary(choices), **chosen}


def allocated(
    checkpoint: Checkpoint, data: Segments, names: Sequence[str], sparsity: float, **walking: Any
) -> tuple[dict[str, SparseLinear], dict[str, Any]]:
    """Put layers of TEAL with its greedy allocation into a checkpoint.

    Args:
        checkpoint: changed in place.
        data: calibration segments.
        names: full names of the projections.
        sparsity: of the weights of each block.
        walking: see `look`.

    Returns:
        As `split`.
    """
    limits: dict[str, list[float]] = {}
    shares = [1 - place / greedy.GRID for place in range(greedy.GRID + 1)]

    def see(name: str, linear: Linear, x_NI: Tensor) -> None:
        limits[name] = thresholds(scores(x_NI, None), shares)

    look(checkpoint, data, names, see, **walking)
    layers = surgery.put_layers(checkpoint, {name: (Rule(limits[name][0], scaled=False), None) for name in names})
    found = greedy.allocate(
        checkpoint, layers, limits, first_of(data, greedy.SEGMENTS), sparsity, walking.get("progress", no_progress)
    )
    dense = sum(layer.weight.numel() for layer in layers.values())
    read = sum((1 - found[name]) * layer.weight.numel() for name, layer in layers.items())
    return layers, {"layers": len(layers), "read": read / dense, "grid": _grid("Inputs left out", found)}


def cut(
    checkpoint: Checkpoint, data: Segments, names: Sequence[str], sparsity: float, **walking: Any
) -> tuple[dict[str, SparseLinear], dict[str, float], dict[str, Any]]:
    """Put CATS into a checkpoint.

    Args:
        checkpoint: changed in place.
        data: calibration segments.
        names: full names of the projections that take part.
        sparsity: of their weights.
        walking: see `look`.

    Returns:
        The layers that stand for the down projections, thresholds by where activation functions stand, and what was
        chosen.
    """
    parts = anatomy(checkpoint.model)
    found, cuts = cats.gated(parts, names), {}
    shapes = {name: linear.shape for name, linear in parts.all_linears() if name in set(names)}
    off = cats.units_off(sparsity, shapes, found.values())

    def see(name: str, linear: Linear, x_NI: Tensor) -> None:
        one = found[name]
        cuts[one.activation] = cats.cut(one, checkpoint.model.get_submodule(one.activation), x_NI, off)

    with torch.no_grad():
        look(checkpoint, data, list(found), see, **walking)
    layers = surgery.put_layers(checkpoint, {one.down: cats.EXACT for one in found.values()})
    surgery.put_cuts(checkpoint.model, cuts)
    return layers, cuts, {"layers": len(found), "units_off": off, "read": 1 - sparsity}


def first_of(data: Segments, count: int) -> Segments:
    """The first segments.

    Args:
        data: at least one.
        count: of them, at the most.
    """
    return Segments(data.ids_NT[:count], None if data.mask_NT is None else data.mask_NT[:count])


def _grid(title: str, values: Mapping[str, float]) -> dict[str, Any]:
    """What the report draws, a share for each projection."""
    return {"title": title, "values": dict(values)}


__all__ = ["allocated", "cut", "look", "split", "tables_of"]
