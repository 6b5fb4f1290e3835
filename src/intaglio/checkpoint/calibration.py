"""Block-by-block calibration: edit a model with the activations of one block in memory.

For each block: run it on the outputs of the edited blocks before it and collect statistics of its linears' inputs; edit
it; run it again for the inputs of the next block. Two passes over each block, no backward, and the memory of one hidden
state a batch, whatever the depth. `through_blocks` passes one batch through the blocks without edits.

Dimension letters: B batch, L sequence, N tokens, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments, segments
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.partial_pass import BlockInputs, capture, run_blocks


class Statistic(Protocol):
    """A value accumulated over the inputs of a linear."""

    def update(self, x_NI: Tensor, sequences: int) -> None:
        """Add `N` tokens (without padding) of `sequences` sequences."""


# Columns of a tile of X^T X: small enough to save a third of the product, large enough for a fast one.
_TILE = 384


class InputStatistics:
    """Moments of a linear's inputs over N tokens x_t of S sequences, in float32 within a batch and float64 across.

    `square_I` = (Σ_t x_t²)/S, `sum_I` = (Σ_t x_t)/S, `variance_I` the biased variance over tokens (pooled exactly:
    within and between batches), `hessian_II` = (2/S) Σ_t x_t x_tᵀ. All over sequences, as the pruning papers have it,
    so that `sum_I` is mean length times E[x].

    Args:
        features: I.
        device: of the activations.
        moments: collect `sum_I` and `variance_I` too. Default False.
        hessian: collect `hessian_II` too, float32 [I, I]. Default False.
    """

    def __init__(self, features: int, device: torch.device, moments: bool = False, hessian: bool = False) -> None:
        self.sequences = 0
        self.tokens = 0
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._square = torch.zeros(features, dtype=wide, device=device)
        self._mean = torch.zeros(features, dtype=wide, device=device) if moments else None
        self._m2 = torch.zeros(features, dtype=wide, device=device) if moments else None
        self._gram = torch.zeros(features, features, dtype=torch.float32, device=device) if hessian else None

    @torch.no_grad()
    def update(self, x_NI: Tensor, sequences: int) -> None:
        """Add one batch, a row a token, of `sequences` sequences."""
        x_NI = x_NI.float()
        new = x_NI.shape[0]
        if self._mean is not None and self._m2 is not None and new:
            mean = x_NI.mean(0)
            m2 = (x_NI - mean).square_().sum(0).to(self._m2)
            delta = mean.to(self._mean) - self._mean
            total = self.tokens + new
            self._m2 += m2 + delta.square() * (self.tokens * new / total)
            self._mean += delta * (new / total)
        if self._gram is not None:
            # The product is symmetric: tiles on and above the diagonal suffice, `hessian_II` mirrors them.
            for low in range(0, x_NI.shape[1], _TILE):
                self._gram[low : low + _TILE, low:].addmm_(x_NI[:, low : low + _TILE].T, x_NI[:, low:])
        self._square += x_NI.square().sum(0).to(self._square)
        self.tokens += new
        self.sequences += sequences

    @property
    def square_I(self) -> Tensor:
        """Sum of squares over tokens, averaged over sequences, float32 [I]."""
        return (self._square / max(self.sequences, 1)).float()

    @property
    def sum_I(self) -> Tensor:
        """Sum over tokens, averaged over sequences, float32 [I]."""
        assert self._mean is not None, "moments were not collected"
        return (self._mean * (self.tokens / max(self.sequences, 1))).float()

    @property
    def variance_I(self) -> Tensor:
        """Biased variance over tokens, float32 [I]."""
        assert self._m2 is not None, "moments were not collected"
        return (self._m2 / max(self.tokens, 1)).float()

    @property
    def hessian_II(self) -> Tensor:
        """(2 / sequences) X Xᵀ, a new float32 [I, I]."""
        assert self._gram is not None, "the Hessian was not collected"
        upper = self._gram.triu() * (2.0 / max(self.sequences, 1))
        return upper + upper.triu(1).T

    @property
    def mean_length(self) -> float:
        """Mean number of tokens of a sequence."""
        return self.tokens / max(self.sequences, 1)


@dataclass
class SharedInputGroup:
    """Linears of one block that read the same input (q, k, v; gate, up), with the statistic of that input."""

    linears: list[Linear]
    statistic: Any


class _AllInputsKnown(Exception):
    """Ends a pass early: the inputs of all linears of the block are known."""


class _ExpertInputs(TorchFunctionMode):
    """Calls `record(linear, input)` for every product with the matrix of one expert in a stacked parameter."""

    _PRODUCTS = frozenset({nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__})

    def __init__(self, experts: Sequence[Linear], record: Callable[[Linear, Tensor], None]) -> None:
        super().__init__()
        self._record = record
        self._matrices = {linear.weight[linear.expert].data_ptr(): linear for linear in experts}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS and len(args) > 1:
            linear = self._matrices.get(args[1].data_ptr())
            if linear is not None and args[1].dim() == 2:
                self._record(linear, args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _eager_experts(model: Any) -> Iterator[None]:
    """Run experts one after the other, each by products of its own."""
    before = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}
    if not any(before.values()):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _Collector:
    """Forward pre-hooks on a block's linears; linears called with the same tensor object share one statistic.

    An expert's matrix has a statistic of its own, of the tokens that are routed to it.
    """

    def __init__(
        self, linears: Sequence[Linear], make: Callable[[int, torch.device], Statistic], whole: bool = False
    ) -> None:
        self.groups: dict[nn.Module | Linear, SharedInputGroup] = {}
        self._make_statistic = make
        self._linears: dict[nn.Module, list[Linear]] = {}
        self._experts = [linear for linear in linears if linear.expert is not None]
        for linear in linears:
            if linear.expert is None:
                self._linears.setdefault(linear.module, []).append(linear)
        self._whole = whole
        self._sequences = 0
        self._leader: dict[nn.Module, nn.Module] = {}
        self._inputs: dict[nn.Module, Tensor] = {}
        self._mask_BL: Tensor | None = None
        self._handles = [module.register_forward_pre_hook(self._on_input) for module in self._linears]

    def run(self, parts: Anatomy, index: int, inputs: BlockInputs) -> Tensor | None:
        """Run block `index` on one batch up to its last linear's input, or wholly, and then return its output."""
        self._mask_BL = inputs.mask_BL
        self._sequences = inputs.hidden_BLD.shape[0]
        self._inputs.clear()
        if self._experts and self._mask_BL is not None and not self._mask_BL.all():
            raise IntaglioError(
                "the calibration data are padded, and padding is routed to experts like tokens; give segments of equal "
                "length"
            )
        experts = _ExpertInputs(self._experts, self._record_expert) if self._experts else nullcontext()
        with suppress(_AllInputsKnown), experts:
            output_BLD = run_blocks(parts, index, index + 1, inputs)
            return output_BLD if self._whole else None
        return None

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._record(module, args[0])
        if len(self._inputs) == len(self._linears) and not self._whole and not self._experts:
            raise _AllInputsKnown

    def _record_expert(self, linear: Linear, x: Tensor) -> None:
        if linear not in self.groups:
            self.groups[linear] = SharedInputGroup([linear], self._make_statistic(x.shape[-1], x.device))
        self.groups[linear].statistic.update(x.reshape(-1, x.shape[-1]), self._sequences)

    def _record(self, module: nn.Module, x: Tensor) -> None:
        leader = self._leader.get(module)
        if leader is None:
            # The tensors seen in this batch are held in _inputs, so an identity cannot be another tensor's, reused.
            leader = next((m for m, seen in self._inputs.items() if seen is x), module)
            self._leader[module] = leader
            if leader is module:
                self.groups[module] = SharedInputGroup([], self._make_statistic(x.shape[-1], x.device))
            self.groups[leader].linears += self._linears[module]
        self._inputs[module] = x
        if leader is not module:
            if self._inputs.get(leader) is not x:
                raise IntaglioError(
                    f"{self._linears[module][0].name} reads another input than in the first batch: layers whose data "
                    "flow depends on the data cannot be calibrated"
                )
            return
        mask = self._mask_BL
        if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
            self.groups[module].statistic.update(x[mask], x.shape[0])
        else:
            sequences = x.shape[0] if x.dim() == 3 else (1 if mask is None else mask.shape[0])
            self.groups[module].statistic.update(x.reshape(-1, x.shape[-1]), sequences)

    def end(self) -> list[SharedInputGroup]:
        """Remove the hooks and return the groups in the order in which the block ran them."""
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()
        unseen = [linears[0].name for module, linears in self._linears.items() if module not in self._leader]
        unseen += [linear.name for linear in self._experts if linear not in self.groups]
        if unseen:
            what = f"{', '.join(unseen[:4])}{f' and {len(unseen) - 4} more' if len(unseen) > 4 else ''}"
            raise IntaglioError(f"no calibration token reached {what}; give more calibration data or leave it out")
        return list(self.groups.values())


def as_segments(checkpoint: Checkpoint, calibration: Any, samples: int, length: int, seed: int) -> Segments:
    """Return calibration data as segments of token ids.

    Args:
        checkpoint: gives the tokenizer.
        calibration: `Segments`, token ids [N, L] (int64), a `Corpus`, a list of strings, a bundled name, a file or
            folder.
        samples: segments to cut out of text.
        length: tokens of a segment cut out of text; never above the model's context.
        seed: chooses the documents of text.

    Raises:
        IntaglioError: there is no data, ids are outside the vocabulary, or the text is too short.
    """
    if calibration is None:
        raise IntaglioError("calibration data is missing: give texts, a corpus or token ids")
    if isinstance(calibration, Tensor):
        calibration = Segments.of(calibration)
    if not isinstance(calibration, Segments):
        corpus: Corpus = load_texts(calibration)
        if checkpoint.tokenizer is None:
            raise IntaglioError("the checkpoint has no tokenizer, so it can only be calibrated with token ids")
        calibration = segments(checkpoint.tokenizer, corpus, samples, min(length, checkpoint.context), seed)
    checkpoint.check_ids(calibration.ids_NT)
    return calibration


def calibrate_blocks(
    checkpoint: Checkpoint,
    calibration: Segments,
    *,
    statistic: Callable[[int, torch.device], Statistic],
    carve: Callable[[int, SharedInputGroup], None],
    linears: Callable[[int], Sequence[Linear]] | None = None,
    batch_size: int = 4,
    what: str = "carving",
    progress: Progress = no_progress,
    edits: bool = True,
) -> None:
    """Edit every block in order, each on the outputs of the edited blocks before it.

    Args:
        checkpoint: edited in place by `carve`.
        calibration: the token ids.
        statistic: makes an empty statistic for `(features, device)`.
        carve: called as `carve(block index, group)` for each group of linears that share an input; it writes weights.
        linears: the projections of a block to collect statistics of, by its index. Default: all that are modules.
        batch_size: sequences of a pass. Equal bytes need an equal batch size, since sums are grouped by it.
        what: label of the progress.
        progress: called after each batch of each pass.
        edits: whether `carve` writes weights. False: it only reads, and each block runs once. Default True.

    Raises:
        IntaglioError: activations are not finite, or the data flow depends on the data.
    """
    parts = anatomy(checkpoint.model)
    was_training = checkpoint.model.training
    checkpoint.model.eval()
    try:
        with torch.no_grad(), _eager_experts(checkpoint.model):
            _walk(parts, calibration, statistic, carve, linears or parts.linears, batch_size, what, progress, edits)
    finally:
        checkpoint.model.train(was_training)


def _walk(
    parts: Anatomy,
    calibration: Segments,
    statistic: Callable[[int, torch.device], Statistic],
    carve: Callable[[int, SharedInputGroup], None],
    linears: Callable[[int], Sequence[Linear]],
    batch_size: int,
    what: str,
    progress: Progress,
    edits: bool,
) -> None:
    batches: list[BlockInputs] = [capture(parts, batch) for batch in calibration.batches(batch_size)]
    last = len(parts.blocks) - 1
    # The last block's new outputs are not needed: one pass less.
    total = len(batches) * (2 * len(parts.blocks) - 1 if edits else len(parts.blocks))
    done = 0
    for index in range(len(parts.blocks)):
        collector = _Collector(linears(index), statistic, whole=not edits)
        outputs: list[Tensor | None] = []
        for inputs in batches:
            outputs.append(collector.run(parts, index, inputs))
            done += 1
            progress(done, total, f"{what}: block {index + 1}/{last + 1}")
        for group in collector.end():
            carve(index, group)
        if index == last:
            break
        for inputs, output_BLD in zip(batches, outputs, strict=True):
            if output_BLD is not None:
                inputs.hidden_BLD = output_BLD
                continue
            inputs.hidden_BLD = run_blocks(parts, index, index + 1, inputs)
            done += 1
            progress(done, total, f"{what}: block {index + 1}/{last + 1}")
        for inputs in batches:
            _refuse_overflow(inputs.hidden_BLD, index)


def _refuse_overflow(hidden_BLD: Tensor, index: int) -> None:
    if not torch.isfinite(hidden_BLD).all():
        raise IntaglioError(
            f"the activations after block {index} are not finite: the weights or the calibration data overflow"
        )


def run_blockwise(parts: Anatomy, inputs: BlockInputs, order: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run blocks one after the other on one batch and yield the input and output of each.

    Args:
        parts: the model's anatomy.
        inputs: from `capture`; its hidden state is the next block's input whenever this yields.
        order: the blocks to run; the others are skipped.

    Yields:
        `(block, input [B, L, D], output [B, L, D])`.

    Raises:
        IntaglioError: an output is not finite.
    """
    for index in order:
        before_BLD = inputs.hidden_BLD
        after_BLD = run_blocks(parts, index, index + 1, inputs)
        _refuse_overflow(after_BLD, index)
        yield index, before_BLD, after_BLD
        inputs.hidden_BLD = after_BLD
