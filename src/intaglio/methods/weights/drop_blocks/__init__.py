"""`drop_blocks`: a recipe step that removes whole transformer blocks, so that the checkpoint is smaller and faster.

steps:
  - drop_blocks: {count: 6}                          # the six of least influence
  - drop_blocks: {count: 6, contiguous: true}        # the six neighbours that change the hidden state least
  - drop_blocks: {count: 2, by: loss, keep: [0, -1]} # one after the other, by how much each lowers the loss
  - drop_blocks: {layers: "20:26"}                   # exactly these

- `influence`: the measures.
- `removal`: removes blocks from a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.masks import get_visibility, predicts_next, set_visibility
from intaglio.masks.method import SLUG as VISIBILITY
from intaglio.masks.method import keep as keep_visibility
from intaglio.masks.method import layer_numbers
from intaglio.measures.language_modeling import ELEMENTS
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.weights.drop_blocks.influence import BlockRun, OnBatch, distance, influence, loss_rise
from intaglio.methods.weights.drop_blocks.removal import apply_plan, atypical_blocks, plan_removal
from intaglio.methods.weights.one_shot import LENGTH, SAMPLES, describe
from intaglio.modeling.anatomy import Anatomy, anatomy

Layers = str | int | list[int]
_MeasureFn = Callable[[Anatomy, Segments, Sequence[int], Sequence[BlockRun], int, OnBatch], dict[BlockRun, float]]
_CHART_LABELS = {
    influence: ("Influence of each block", "1 - cosine of a block's input and output, mean over tokens"),
    distance: ("Angular distance over each run of blocks", "angle between input and output of the run, in half turns"),
    loss_rise: ("Rise of the loss without each block", "rise of the log-perplexity, nats per token"),
}


class DropBlocks(Method, slug="drop_blocks"):
    """Remove the transformer blocks that matter least, by a measure taken on the calibration texts.

    influence (default):      BI_i = 1 - E_t[cos(x_{i,t}, x_{i+1,t})]          x_{i,t}: input of block i at token t
    influence, contiguous:    d_l = E_T[arccos(cos(x_l, x_{l+n}))] / π         at each sequence's last token T
    loss:                     mean negative log-likelihood without the blocks, less that with them, nats per token

    The result is a stock checkpoint with fewer layers: size and time per token fall with them. It predicts worse, and
    regains much of that with further training. Per-layer lists of the config (`layer_types`), the blocks' key-value
    cache indices and `visibility` rules follow their blocks. The last block's output is taken before the final norm. A
    first block that is built unlike the others (ModernBERT's has no norm) always stays.

    Source: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024 (influence);
    Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024 (contiguous).

    Args:
        count: number of blocks to remove; alternative to `layers`.
        layers: indices of the blocks to remove, from 0: a number, numbers (negative ones count from the end), or a
            slice such as `"20:26"`. Needs no calibration data.
        by: `influence` (default), or `loss`, for models that predict the next token. Loss takes about half a pass over
            the data for every remaining block: calibrate on little.
        contiguous: remove one run of `count` neighbouring blocks. Default false.
        iterative: measure again after each removed block. Default: with `loss`, not with `influence`.
        keep: blocks that are never removed, as in `layers`, such as `[0, -1]`. Default: none.

    Raises:
        IntaglioError: the model has too few removable blocks; it does not predict the next token and `by` is `loss`; no
            calibration data; measures that are not finite; a family whose blocks depend on their position.
    """

    kinds = ("carving",)
    summary = "removes whole transformer blocks, by measured influence or by index"

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["count"], "properties": {"count": {"type": "integer"}}},
                {"required": ["layers"], "properties": {"layers": {"type": ["string", "integer", "array"]}}},
            ]
        }
    )

    storage: ClassVar[Literal["standalone"]] = "standalone"
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"depth"})

    count: Annotated[int, Field(ge=1, description="number of blocks to remove")] | None = None
    layers: Annotated[Layers, Field(description="blocks to remove")] | None = None
    by: Literal["influence", "loss"] = "influence"
    contiguous: bool = False
    iterative: bool | None = None
    keep: Layers = Field([], description="blocks that are never removed")

    @field_validator("layers", "keep")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if value not in (None, []):
            layer_numbers(value, 1 << 20)  # checks the format only: the depth is not known yet
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if (self.count is None) == (self.layers is None):
            raise ValueError("give either count or layers")
        measured = {"by": self.by != "influence", "contiguous": self.contiguous, "keep": self.keep != []}
        for name, given in (measured | {"iterative": self.iterative is not None}).items():
            if self.layers is not None and given:
                raise ValueError(f"{name} works with count only; layers names the blocks already")
        if self.contiguous and self.iterative:
            raise ValueError("iterative removes block by block, contiguous one run at once; set only one of them")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether blocks are measured."""
        return self.layers is None

    @property
    def requires(self) -> frozenset[Capability]:  # type: ignore[override]
        """A model that predicts the next token, where its loss is the measure."""
        return frozenset({"causal"} if self.by == "loss" else ())

    @property
    def _remeasures(self) -> bool:
        return not self.contiguous and (self.by == "loss" if self.iterative is None else self.iterative)

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: those that stay are not touched."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model that has too few blocks or blocks that cannot be removed."""
        if self.by == "loss" and not predicts_next(parts):
            raise IntaglioError("by: loss needs a model that predicts the next token; by: influence works on any")
        if self.layers is not None:
            removed = self._listed_blocks(parts)
        else:
            removed = (
                list(self._candidate_runs(parts, range(len(parts.blocks)))[0])
                if self.contiguous
                else self._removable(parts)
            )
            assert self.count is not None  # by the validator
            removed = removed[: self.count]  # not known yet; removing the first ones shifts most others
        plan_removal(parts, [index for index in range(len(parts.blocks)) if index not in removed])

    def anatomy_after(self, parts: Anatomy) -> Anatomy:
        """Return the anatomy after the step; without `layers` only the number of remaining blocks is known."""
        depth = len(parts.blocks)
        if self.layers is not None:
            kept = [index for index in range(depth) if index not in self._listed_blocks(parts)]
            windows = tuple(parts.windows[index] for index in kept)
        else:
            assert self.count is not None
            kept = list(range(depth - self.count))
            same = len(set(parts.windows)) == 1
            windows = tuple(parts.windows[index] if same else None for index in kept)
        return dataclasses.replace(parts, blocks=tuple(parts.blocks[index] for index in kept), windows=windows)

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of the measurements."""
        if self.count is None:
            return Cost()
        pass_, head = 2.0 * workload.block_parameters, 2.0 * (workload.parameters - workload.block_parameters)
        flops, depth = 0.0, workload.blocks
        for removed in range(min(self.count, depth) if self._remeasures else 1):
            remaining = depth - removed
            runs = remaining - self.count + 1 if self.contiguous else remaining
            # Without block i the blocks after it run again: half of them, on average.
            extra = runs * (pass_ * remaining / depth / 2 + head) + head if self.by == "loss" else 0.0
            flops += workload.tokens * (pass_ * remaining / depth + extra)
        widest = max(columns for _, columns in workload.linears)
        memory = workload.batch_tokens * (4 * workload.hidden + 6 * widest) * workload.element_size
        return Cost(flops=flops, extra_bytes=int(memory + (12 * ELEMENTS if self.by == "loss" else 0)))

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Remove blocks of `checkpoint` in place and return it."""
        parts = anatomy(checkpoint.model)
        self.check_model(parts)
        _refuse_runtime_state(checkpoint)
        depth, identity = len(parts.blocks), None
        chosen: dict[str, Any] = {"blocks": depth}
        if self.layers is not None:
            removed = self._listed_blocks(parts)
        else:
            data = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed)
            identity = describe(data, batch_size)
            removed, values = self._select(parts, data, batch_size, progress)
            chosen["bars"] = self._chart(values, removed)
        chosen["dropped"] = removed
        plan = plan_removal(parts, [index for index in range(depth) if index not in removed])
        rules = get_visibility(checkpoint.model)
        apply_plan(parts, plan)
        if rules:  # they are attached to the blocks
            rules = get_visibility(checkpoint.model)
            if any(part.get("slug") == VISIBILITY for part in checkpoint.record.live):
                keep_visibility(checkpoint, rules)
            else:
                set_visibility(checkpoint.model, rules)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, calibration=identity, chosen=chosen)
        return checkpoint

    def _listed_blocks(self, parts: Anatomy) -> list[int]:
        """Return the blocks that `layers` names."""
        assert self.layers is not None
        depth = len(parts.blocks)
        removed = layer_numbers(self.layers, depth)
        if len(removed) == depth:
            raise IntaglioError(f"layers names all {depth} blocks of the model; at least one must stay")
        for index in atypical_blocks(parts):
            if index in removed:
                raise IntaglioError(
                    f"layers names block {index}, which this {parts.config.model_type} builds unlike the others, so "
                    "no other block can replace it"
                )
        return removed

    def _removable(self, parts: Anatomy) -> list[int]:
        """Return the blocks that may be removed."""
        depth = len(parts.blocks)
        if self.count is None or self.count >= depth:
            raise IntaglioError(f"count is {self.count}; the model has {depth} blocks; accepted: 1 to {depth - 1}")
        kept = {*(layer_numbers(self.keep, depth) if self.keep != [] else ()), *atypical_blocks(parts)}
        free = [index for index in range(depth) if index not in kept]
        if len(free) < self.count:
            raise IntaglioError(f"count is {self.count}; only {len(free)} of the model's {depth} blocks may be removed")
        return free

    def _candidate_runs(self, parts: Anatomy, order: Sequence[int]) -> list[BlockRun]:
        """Return the candidates: single blocks, or runs of neighbours."""
        free = set(self._removable(parts))
        if not self.contiguous:
            return [(index,) for index in order if index in free]
        assert self.count is not None
        starts = range(len(order) - self.count + 1)
        runs = [run for start in starts for run in [tuple(order[start : start + self.count])] if free >= set(run)]
        if not runs:
            raise IntaglioError(
                f"no {self.count} neighbouring blocks may be removed: keep names a block in every such run"
            )
        return runs

    def _select(
        self, parts: Anatomy, data: Segments, batch_size: int, progress: Progress
    ) -> tuple[list[int], dict[BlockRun, float]]:
        """Return the blocks to remove, in order, and the last measured value of each run."""
        measure = self._measure
        rounds = self.count if self._remeasures and self.count is not None else 1
        total, done = rounds * math.ceil(data.n / batch_size), 0

        def on_batch() -> None:
            nonlocal done
            done += 1
            progress(done, total, f"{self.slug}: measuring {self.by}")

        values: dict[BlockRun, float] = {}
        order = list(range(len(parts.blocks)))
        was_training = parts.model.training
        parts.model.eval()
        try:
            with torch.no_grad():
                for _ in range(rounds):
                    measured = measure(parts, data, order, self._candidate_runs(parts, order), batch_size, on_batch)
                    _refuse_infinite(measured)
                    values |= measured
                    count = 1 if self._remeasures or self.contiguous else self.count
                    least = sorted(measured, key=lambda run: (measured[run], run))[:count]
                    order = [index for index in order if not any(index in run for run in least)]
        finally:
            parts.model.train(was_training)
        return sorted(set(range(len(parts.blocks))) - set(order)), values

    @property
    def _measure(self) -> _MeasureFn:
        if self.by == "loss":
            return loss_rise
        return distance if self.contiguous else influence

    def _chart(self, values: dict[BlockRun, float], removed: list[int]) -> dict[str, Any]:
        title, axis = _CHART_LABELS[self._measure]  # type: ignore[index]
        return {
            "title": title,
            "axis": axis + (", as last measured" if self._remeasures else "") + ": the lowest are removed",
            "items": {_name(run): value for run, value in sorted(values.items())},
            "marked": [
                _name(run) for run in sorted(values) if removed == list(run) or (len(run) == 1 and run[0] in removed)
            ],
            "mark": "dropped",
        }


def _name(run: BlockRun) -> str:
    return f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]} to {run[-1]}"


def _refuse_infinite(values: dict[BlockRun, float]) -> None:
    for run, value in values.items():
        if not math.isfinite(value):
            raise IntaglioError(
                f"the measure of {_name(run)} is not finite: the weights or the calibration data overflow; try "
                "another dtype, or list the block in keep"
            )


def _refuse_runtime_state(checkpoint: Checkpoint) -> None:
    """Refuse runtime state that refers to single blocks, except `visibility` rules."""
    for part in checkpoint.record.live:
        if part.get("slug") != VISIBILITY and part.keys() - {"slug"}:
            raise IntaglioError(
                f"drop_blocks cannot follow {part.get('slug')}, whose live part belongs to the blocks as they are; "
                "drop blocks first"
            )
