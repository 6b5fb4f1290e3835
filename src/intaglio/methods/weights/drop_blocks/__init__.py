"""`drop_blocks` as a step of a recipe: whole transformer blocks go, and the checkpoint is smaller and faster.

steps:
  - drop_blocks: {count: 6}                          # the six of least influence
  - drop_blocks: {count: 6, contiguous: true}        # the run of six that turns the hidden state least
  - drop_blocks: {count: 2, by: loss, keep: [0, -1]} # one after the other, by what each adds to the loss
  - drop_blocks: {layers: "20:26"}                   # these

- `influence`: the measures.
- `surgery`: how blocks are taken out of a model.
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
from intaglio.methods.weights.drop_blocks.influence import Run, Tick, distance, influence, loss_rise
from intaglio.methods.weights.drop_blocks.surgery import carry_out, plan_cut, unlike
from intaglio.methods.weights.one_shot import LENGTH, SAMPLES, describe
from intaglio.modeling.anatomy import Anatomy, anatomy

Layers = str | int | list[int]
_Measure = Callable[[Anatomy, Segments, Sequence[int], Sequence[Run], int, Tick], dict[Run, float]]
_TOLD = {
    influence: ("Influence of each block", "1 - cosine of a block's input and output, mean over tokens"),
    distance: ("Angular distance over each run of blocks", "angle between input and output of the run, in half turns"),
    loss_rise: ("What leaving blocks out adds to the loss", "rise of the log-perplexity, nats a token"),
}


class DropBlocks(Method, slug="drop_blocks"):
    """Drops the transformer blocks that do least, by a measure that is taken on the calibration texts.

    influence (default):      BI_i = 1 - E_t[cos(x_{i,t}, x_{i+1,t})]          x_{i,t}: input of block i at token t
    influence, contiguous:    d_l = E_T[arccos(cos(x_l, x_{l+n}))] / π         at each sequence's last token T
    loss:                     mean negative log-likelihood without the blocks, less that with them, nats a token

    The result is a stock checkpoint with fewer layers: bytes and the time of a token fall with them. It predicts worse,
    and gets much of that back by training on. Lists with an entry a layer (`layer_types`), the numbers by which blocks
    find their key-value cache and rules of `visibility` follow their blocks. The last block's output is taken before
    the final norm. A first block that is built unlike the others (ModernBERT's has no norm) always stays.

    Source: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024 (influence);
    Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024 (contiguous).

    Args:
        count: how many blocks go; in place of `layers`.
        layers: the very blocks that go, counted from 0: a number, numbers (negative ones count from the end), or a
            slice such as `"20:26"`. No calibration data is needed then.
        by: `influence` (default), or `loss`, for models that predict the next token. Loss takes about half a pass over
            the data for every block that is left: calibrate on little.
        contiguous: take one run of `count` neighbouring blocks. Default false.
        iterative: measure anew after each block that went. Default: with `loss`, not with `influence`.
        keep: blocks that never go, named as in `layers`, such as `[0, -1]`. Default: none.

    Raises:
        IntaglioError: the model has not enough blocks, or none may go; it predicts no next token and `by` is `loss`;
            no calibration data; measures that are not finite; a family that ties blocks to their places.
    """

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

    count: Annotated[int, Field(ge=1, description="how many blocks go")] | None = None
    layers: Annotated[Layers, Field(description="the very blocks that go")] | None = None
    by: Literal["influence", "loss"] = "influence"
    contiguous: bool = False
    iterative: bool | None = None
    keep: Layers = Field([], description="blocks that never go")

    @field_validator("layers", "keep")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if value not in (None, []):
            layer_numbers(value, 1 << 20)  # its form; the depth is not known yet
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.count is None) == (self.layers is None):
            raise ValueError("give either count or layers")
        measured = {"by": self.by != "influence", "contiguous": self.contiguous, "keep": self.keep != []}
        for name, given in (measured | {"iterative": self.iterative is not None}).items():
            if self.layers is not None and given:
                raise ValueError(f"{name} belongs to count, where blocks are measured; layers names them already")
        if self.contiguous and self.iterative:
            raise ValueError("iterative goes block by block, and contiguous takes one run at once; set one of them")
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
    def _again(self) -> bool:
        """Whether measures are taken anew after each block."""
        return not self.contiguous and (self.by == "loss" if self.iterative is None else self.iterative)

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: those that stay are not touched."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, a model that has too few blocks, or that cannot do without some of them.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: see the class.
        """
        if self.by == "loss" and not predicts_next(parts):
            raise IntaglioError("by: loss needs a model that predicts the next token; by: influence works on any")
        if self.layers is not None:
            gone = self._named(parts)
        else:
            gone = list(self._runs(parts, range(len(parts.blocks)))[0]) if self.contiguous else self._free(parts)
            assert self.count is not None  # checked when the step was read
            gone = gone[: self.count]  # which they will be is not known; without the first ones, most others move
        plan_cut(parts, [index for index in range(len(parts.blocks)) if index not in gone])

    def anatomy_after(self, parts: Anatomy) -> Anatomy:
        """The anatomy behind the step; which blocks are left is not known before they are measured, only how many.

        Args:
            parts: of the model before it.
        """
        depth = len(parts.blocks)
        if self.layers is not None:
            kept = [index for index in range(depth) if index not in self._named(parts)]
            windows = tuple(parts.windows[index] for index in kept)
        else:
            assert self.count is not None
            kept = list(range(depth - self.count))
            same = len(set(parts.windows)) == 1
            windows = tuple(parts.windows[index] if same else None for index in kept)
        return dataclasses.replace(parts, blocks=tuple(parts.blocks[index] for index in kept), windows=windows)

    def estimate(self, workload: Workload) -> Cost:
        """Return what the measuring takes.

        Args:
            workload: of the model and the calibration data.
        """
        if self.count is None:
            return Cost()
        pass_, head = 2.0 * workload.block_parameters, 2.0 * (workload.parameters - workload.block_parameters)
        flops, depth = 0.0, workload.blocks
        for gone in range(min(self.count, depth) if self._again else 1):
            here = depth - gone
            runs = here - self.count + 1 if self.contiguous else here
            # Without block i those behind it run again: half of them, on average.
            extra = runs * (pass_ * here / depth / 2 + head) + head if self.by == "loss" else 0.0
            flops += workload.tokens * (pass_ * here / depth + extra)
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
        """Drop blocks of `checkpoint` in place and return it.

        Args:
            checkpoint: what to shorten; what is live in it must not hang on its blocks, rules of `visibility` excepted.
            calibration: segments, token ids [N, L], texts, a bundled name, a file or a folder; not looked at where
                `layers` names the blocks.
            seed: chooses the calibration documents, where text is given. Default 0.
            batch_size: sequences that pass at a time. Default 4.
            progress: called after each batch.

        Raises:
            IntaglioError: see the class.
        """
        parts = anatomy(checkpoint.model)
        self.check_model(parts)
        _refuse_live(checkpoint)
        depth, identity = len(parts.blocks), None
        chosen: dict[str, Any] = {"blocks": depth}
        if self.layers is not None:
            gone = self._named(parts)
        else:
            data = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed)
            identity = describe(data, batch_size)
            gone, values = self._measured(parts, data, batch_size, progress)
            chosen["bars"] = self._bars(values, gone)
        chosen["dropped"] = gone
        cut = plan_cut(parts, [index for index in range(depth) if index not in gone])
        rules = get_visibility(checkpoint.model)
        carry_out(parts, cut)
        if rules:  # they stand on the blocks, and went or stayed with them
            rules = get_visibility(checkpoint.model)
            if any(part.get("slug") == VISIBILITY for part in checkpoint.record.live):
                keep_visibility(checkpoint, rules)
            else:
                set_visibility(checkpoint.model, rules)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, calibration=identity, chosen=chosen)
        return checkpoint

    def _named(self, parts: Anatomy) -> list[int]:
        """The blocks that `layers` names."""
        assert self.layers is not None
        depth = len(parts.blocks)
        gone = layer_numbers(self.layers, depth)
        if len(gone) == depth:
            raise IntaglioError(f"layers names all {depth} blocks of the model; at least one must stay")
        for index in unlike(parts):
            if index in gone:
                raise IntaglioError(
                    f"layers names block {index}, which this {parts.config.model_type} builds unlike the others, so "
                    "that none of them can take its place"
                )
        return gone

    def _free(self, parts: Anatomy) -> list[int]:
        """The blocks that may go."""
        depth = len(parts.blocks)
        if self.count is None or self.count >= depth:
            raise IntaglioError(f"count is {self.count}, and the model has {depth} blocks; accepted: 1 to {depth - 1}")
        kept = {*(layer_numbers(self.keep, depth) if self.keep != [] else ()), *unlike(parts)}
        free = [index for index in range(depth) if index not in kept]
        if len(free) < self.count:
            raise IntaglioError(f"count is {self.count}, and only {len(free)} of the model's {depth} blocks may go")
        return free

    def _runs(self, parts: Anatomy, order: Sequence[int]) -> list[Run]:
        """What can go at once: single blocks, or runs of neighbours."""
        free = set(self._free(parts))
        if not self.contiguous:
            return [(index,) for index in order if index in free]
        assert self.count is not None
        starts = range(len(order) - self.count + 1)
        found = [run for start in starts for run in [tuple(order[start : start + self.count])] if free >= set(run)]
        if not found:
            raise IntaglioError(f"no {self.count} neighbouring blocks may go: keep names one in every run of them")
        return found

    def _measured(
        self, parts: Anatomy, data: Segments, batch_size: int, progress: Progress
    ) -> tuple[list[int], dict[Run, float]]:
        """The blocks that go, in order, and the value of each run, as it was when last measured."""
        measure = self._measure
        rounds = self.count if self._again and self.count is not None else 1
        total, done = rounds * math.ceil(data.n / batch_size), 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress(done, total, f"{self.slug}: measuring {self.by}")

        values: dict[Run, float] = {}
        order = list(range(len(parts.blocks)))
        was = parts.model.training
        parts.model.eval()
        try:
            with torch.no_grad():
                for _ in range(rounds):
                    now = measure(parts, data, order, self._runs(parts, order), batch_size, tick)
                    _refuse_infinite(now)
                    values |= now
                    taken = 1 if self._again or self.contiguous else self.count
                    least = sorted(now, key=lambda run: (now[run], run))[:taken]
                    order = [index for index in order if not any(index in run for run in least)]
        finally:
            parts.model.train(was)
        return sorted(set(range(len(parts.blocks))) - set(order)), values

    @property
    def _measure(self) -> _Measure:
        if self.by == "loss":
            return loss_rise
        return distance if self.contiguous else influence

    def _bars(self, values: dict[Run, float], gone: list[int]) -> dict[str, Any]:
        """What the report draws."""
        title, axis = _TOLD[self._measure]  # type: ignore[index]
        return {
            "title": title,
            "axis": axis + (", when it was last measured" if self._again else "") + ": the least go",
            "items": {_name(run): value for run, value in sorted(values.items())},
            "marked": [_name(run) for run in sorted(values) if gone == list(run) or (len(run) == 1 and run[0] in gone)],
            "mark": "dropped",
        }


def _name(run: Run) -> str:
    return f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]} to {run[-1]}"


def _refuse_infinite(values: dict[Run, float]) -> None:
    for run, value in values.items():
        if not math.isfinite(value):
            raise IntaglioError(
                f"the measure of {_name(run)} is not finite: the weights or the calibration data overflow; another "
                "dtype may help, or naming it in keep"
            )


def _refuse_live(checkpoint: Checkpoint) -> None:
    """Refuse what is live and says something of single blocks, but for rules of visibility."""
    for part in checkpoint.record.live:
        if part.get("slug") != VISIBILITY and part.keys() - {"slug"}:
            raise IntaglioError(
                f"drop_blocks cannot follow {part.get('slug')}, whose live part belongs to the blocks as they are; "
                "drop blocks first"
            )
