"""Calibration: one pass over the dense model, then the sparse layers, then a search over their splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import SharedInputGroup, calibrate_blocks
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.segments import Segments
from intaglio.measures.language_modeling import quality
from intaglio.methods.activations.r_sparse import cats, teal
from intaglio.methods.activations.r_sparse.layer_options import ALPHAS, LayerOptions, OptionSpec, summary
from intaglio.methods.activations.r_sparse.layers import InputRule, LayerOption, SparseLinear
from intaglio.methods.activations.r_sparse.search import LossCache, Search
from intaglio.methods.activations.r_sparse.thresholds import InputSample, scores, thresholds
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import Linear, anatomy
from intaglio.modeling.targets import replace_linears

OnInputs = Callable[[str, Linear, Tensor], None]
"""Called with a projection's full name, itself, and its inputs on the calibration tokens [N, I]."""
Applied = tuple[dict[str, SparseLinear], dict[str, Any]]
"""The layers by the full names of their projections, and the chosen values for the record."""


def capture_inputs(
    checkpoint: Checkpoint,
    data: Segments,
    names: Sequence[str],
    on_inputs: OnInputs,
    *,
    tokens: int,
    batch_size: int,
    progress: Progress = no_progress,
) -> None:
    """Pass the inputs of projections of the dense model, at most `tokens` rows of each, to a function.

    Raises:
        IntaglioError: a value is NaN or infinite.
    """
    targets = set(names)

    def visit(index: int, group: SharedInputGroup) -> None:
        for linear in group.linears:
            name = f"layers.{index}.{linear.name}"
            if name in targets:
                on_inputs(name, linear, group.statistic.inputs(name))

    calibrate_blocks(
        checkpoint,
        data,
        statistic=lambda features, device: InputSample(data.tokens, tokens),
        carve=visit,
        batch_size=batch_size,
        what="r_sparse",
        progress=progress,
        edits=False,
    )


def apply_rsparse(
    checkpoint: Checkpoint,
    data: Segments,
    start: Mapping[str, float],
    spec: OptionSpec,
    chooser: Search | Literal["error"] | None,
    *,
    seed: int,
    directory: Path | None,
    resume: bool,
    **capture: Any,
) -> Applied:
    """Put layers of R-Sparse, or of uniform TEAL, into a checkpoint.

    `start` gives the alpha of each projection, by its full name, unless `chooser` chooses it by output error, or
    searches for it from there. A search caches its losses in `directory`.
    """
    search = None if chooser == "error" else chooser
    names, grid, alphas = list(start), ALPHAS if search is None else search.grid, dict(start)
    options: dict[str, LayerOptions] = {}

    def on_inputs(name: str, linear: Linear, x_NI: Tensor) -> None:
        options[name] = spec.options(name, linear, x_NI, grid if chooser else (start[name],))
        if chooser == "error":
            alphas[name] = options[name].least_error(linear, x_NI)

    capture_inputs(checkpoint, data, names, on_inputs, **capture)
    if search is not None:
        alphas = {name: grid[search.grid_index(start[name])] for name in names}
    layers = _put_layers(checkpoint, {name: options[name].at(alphas[name]) for name in names})
    chosen: dict[str, Any] = {}
    if search is not None:
        subset, batch_size = _first(data, search.segments), capture["batch_size"]

        def fitness(candidate: Sequence[float]) -> float:
            for name, alpha in zip(names, candidate, strict=True):
                layers[name].set_option(options[name].at(alpha))
            return fmean(quality(checkpoint, subset, batch_size=batch_size).losses)

        weights = weight_fingerprints(checkpoint.model)
        identity = [search.model_dump(), spec.key, subset.digest, data.digest, seed, weights]
        key = hashlib.sha256(json.dumps([identity, alphas]).encode()).hexdigest()
        best, losses = search.run(
            list(alphas.values()),
            fitness,
            seed=seed,
            cache=LossCache(directory, key, resume),
            progress=capture.get("progress", no_progress),
        )
        alphas = dict(zip(names, best, strict=True))
        for name in names:
            layers[name].set_option(options[name].at(alphas[name]))
        chosen = {"evaluations": search.evaluations, "loss_by_generation": losses}
    if chooser or len(set(alphas.values())) > 1:
        chosen["grid"] = _grid("Share of the budget for channels", alphas)
    return layers, {**summary({name: options[name].choices[alphas[name]] for name in names}), **chosen}


def apply_teal(
    checkpoint: Checkpoint, data: Segments, names: Sequence[str], sparsity: float, **capture: Any
) -> Applied:
    """Put layers of TEAL with its greedy allocation into a checkpoint; `sparsity` is that of each block's weights."""
    limits: dict[str, list[float]] = {}
    shares = [1 - step / teal.GRID for step in range(teal.GRID + 1)]

    def on_inputs(name: str, linear: Linear, x_NI: Tensor) -> None:
        limits[name] = thresholds(scores(x_NI, None), shares)

    capture_inputs(checkpoint, data, names, on_inputs, **capture)
    layers = _put_layers(checkpoint, {name: (InputRule(limits[name][0], scaled=False), None) for name in names})
    subset = _first(data, teal.SEGMENTS)
    sparsities = teal.allocate(checkpoint, layers, limits, subset, sparsity, capture.get("progress", no_progress))
    dense = sum(layer.weight.numel() for layer in layers.values())
    read = sum((1 - sparsities[name]) * layer.weight.numel() for name, layer in layers.items())
    return layers, {"layers": len(layers), "read": read / dense, "grid": _grid("Inputs left out", sparsities)}


def apply_cats(
    checkpoint: Checkpoint, data: Segments, names: Sequence[str], sparsity: float, **capture: Any
) -> tuple[dict[str, SparseLinear], dict[str, float], dict[str, Any]]:
    """Put CATS into a checkpoint; `sparsity` is that of the weights of all named projections.

    Returns:
        The replacements of the down projections, thresholds by the module names of activation functions, and the
        chosen values for the record.
    """
    parts, model = anatomy(checkpoint.model), checkpoint.model
    mlps, limits = cats.gated_mlps(parts, names), {}
    shapes = {name: linear.shape for name, linear in parts.all_linears() if name in set(names)}
    off = cats.unit_sparsity(sparsity, shapes, mlps.values())

    def on_inputs(name: str, linear: Linear, x_NI: Tensor) -> None:
        mlp = mlps[name]
        limits[mlp.activation] = mlp.threshold(model.get_submodule(mlp.activation), x_NI, off)

    with torch.no_grad():
        capture_inputs(checkpoint, data, list(mlps), on_inputs, **capture)
    layers = _put_layers(checkpoint, {mlp.down: cats.EXACT for mlp in mlps.values()})
    cats.put_thresholds(model, limits)
    return layers, limits, {"layers": len(mlps), "units_off": off, "read": 1 - sparsity}


def _put_layers(checkpoint: Checkpoint, options: Mapping[str, LayerOption]) -> dict[str, SparseLinear]:
    """Replace projections, by full name, by sparse layers."""

    def make(name: str, linear: Linear) -> SparseLinear:
        return SparseLinear.from_weight(linear.read(), linear.read_bias(), *options[name], transposed(linear))

    layers = replace_linears(checkpoint.model, options, make)
    return {name: layers[name] for name in options}


def transposed(linear: Linear) -> bool:
    """Return whether a projection's weight lies as [I, O]."""
    return linear.rows is None and isinstance(linear.module, Conv1D)


def weight_fingerprints(model: nn.Module) -> list[str]:
    """Return fingerprints of the sparse layers' weights, as they are and in float16: what thresholds belong to."""
    holder = nn.Module()
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            holder.register_parameter(name.replace(".", "/"), module.weight)
    return [fingerprint(holder), fingerprint(holder, through=torch.float16)]


def _first(data: Segments, count: int) -> Segments:
    """Return the first segments, at most `count`."""
    return Segments(data.ids_NT[:count], None if data.mask_NT is None else data.mask_NT[:count])


def _grid(title: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return a share for each projection, for the report's picture."""
    return {"title": title, "values": dict(values)}
