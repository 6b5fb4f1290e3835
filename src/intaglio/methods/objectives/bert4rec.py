"""BERT4Rec: recommend the next item with a bidirectional encoder trained to fill in masked items (Sun et al., 2019).

Source: Sun et al., BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer,
CIKM 2019, arXiv 1904.06690; official code.

Dimension letters: B windows, T items of a window, M masked positions of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Capability, Method, ModelAspect, TrainingData
from intaglio.methods.objectives.meap import draw_positions, masked
from intaglio.methods.objectives.next_item import draw_items, head_on, item_ids, window_rows
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.causal_lm import IGNORED, row_length
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.special_token import reserve_token
from intaglio.trainer.stock_trainer import EpochCollator
from intaglio.trainer.token_classification import padded

LAST_ONLY = 1 / 11
"""Share of windows in which the last item alone is masked: one static copy beside ten in the official code."""
PAPER: dict[str, dict[str, Any]] = {
    "ml-1m": {"mask_ratio": 0.2, "max_predictions": 40, "length": 200, "window_step": 0.5},
    "ml-20m": {"mask_ratio": 0.2, "max_predictions": 20, "length": 200, "window_step": 0.5},
    "beauty": {"mask_ratio": 0.6, "max_predictions": 30, "length": 50, "window_step": 0.1},
    "steam": {"mask_ratio": 0.4, "max_predictions": 20, "length": 50, "window_step": 0.5},
}
"""The authors' settings by data set."""


def mask_count(items: int, ratio: float, most: int | None = None) -> int:
    """Return m = min(max_predictions, max(1, round(n rho))); a half is rounded up, as in the official Python 2 code."""
    count = max(1, math.floor(items * ratio + 0.5))
    return count if most is None else min(count, most)


class BERT4Rec(Method, slug="bert4rec"):
    """Masked-item (Cloze) training of a bidirectional encoder for next-item recommendation.

        L = -(1 / (|M| + 1e-5)) sum_{t in M} log softmax(logits_t)[x_t]        logits = W(m(x)): full softmax over items

    `m` puts [MASK] on the positions M of a window of n items. With probability 1/11 only the last item is masked, as in
    inference; otherwise m = min(max_predictions, max(1, round(n rho))) positions drawn uniformly. The next item is
    ranked by the logits at a [MASK] after the last L - 1 items of a history.

    On the command line: `intaglio train --interactions log.csv -o model`, then
    `intaglio recommend model --history A,B`. From Python:

        items = ItemSequences.from_interactions(load_interactions("log.csv"))    # intaglio.data.item_sequences
        checkpoint = new_recommender(items, "bert", context=50)    # intaglio.methods.objectives.next_item
        rows = [{"input_ids": ids} for ids in items.training().values()]
        intaglio.train(checkpoint, rows, objective=intaglio.BERT4Rec(), steps=2000, learning_rate=1e-3)

    In a stock `transformers.Trainer`, on any masked language model:

        objective = intaglio.BERT4Rec(length=50)
        windows = objective.windows(rows)
        collate = objective.data_collator(checkpoint.tokenizer.mask_token_id)
        arguments = transformers.TrainingArguments("out", max_steps=100, remove_unused_columns=False)
        transformers.Trainer(checkpoint.model, arguments, collate, windows).train()

    The authors train with AdamW without bias correction (learning rate 1e-4, weight decay .01, 100 warm-up steps,
    linear decay, gradient norm 5) for 400,000 steps of 256; here these are settings of the run, and AdamW corrects its
    bias. Windows are masked anew in each epoch unless `static_copies` is given.

    Source: Sun et al., BERT4Rec, CIKM 2019, sections 3.2 to 3.7; the official code for windows and last-item samples.

    Args:
        mask_ratio: share rho of masked items of a window, in (0, 1]; larger for short sequences. Default 0.2.
        max_predictions: most masked items of a window. Default: no limit.
        mask_prob: probability that a chosen item becomes [MASK]; otherwise it stays or becomes a random item, with
            equal chances. Default 1, as in the official runs.
        last_only_ratio: probability that only the last item of a window is masked. Default 1/11.
        static_copies: number of masked copies of each window, drawn once, beside a copy with its last item masked, as
            `dupe_factor` in the official code. Default: none; windows are masked anew in each epoch.
        length: items of a window, L in the paper. Default: the model's context, at most 1,024.
        window_step: distance between windows of a longer sequence, as a share of `length`, in (0, 1]. Default 0.5.
        mask_token: the mask token, by name or id. Default: the tokenizer's.
    """

    kinds = ("objective",)
    summary = "recommends the next item with a bidirectional encoder trained to fill in masked items"
    citation = (
        "Sun et al., BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer, "
        "CIKM 2019"
    )
    url = "https://arxiv.org/abs/1904.06690"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"tokenizer"})
    trains_on: ClassVar[TrainingData] = "interactions"

    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    max_predictions: Annotated[int, Field(ge=1)] | None = None
    mask_prob: Annotated[float, Field(ge=0, le=1)] = 1.0
    last_only_ratio: Annotated[float, Field(ge=0, le=1)] = LAST_ONLY
    static_copies: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    window_step: Annotated[float, Field(gt=0, le=1)] = 0.5
    mask_token: str | int | None = None

    _mask_id: int = PrivateAttr(-1)
    _items: tuple[int, ...] = PrivateAttr(())

    @classmethod
    def paper(cls, data: Literal["ml-1m", "ml-20m", "beauty", "steam"] = "ml-1m", **overrides: Any) -> Self:
        """Return the authors' settings for a data set, with ten static copies of each window.

        Args:
            data: `ml-1m` (default), `ml-20m`, `beauty` or `steam`.
            overrides: fields that the caller sets.
        """
        if data not in PAPER:
            raise IntaglioError(f"data is {data!r}; {did_you_mean(str(data), PAPER)}")
        return cls(**{**PAPER[data], "static_copies": 10, **overrides})

    @property
    def mask_id(self) -> int:
        """The id of the mask token, after `prepare`."""
        return self._mask_id

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Find the mask token, and cut the sequences into windows."""
        parts, name = anatomy(checkpoint.model), type(checkpoint.model).__name__
        if parts.causal or parts.head is None:
            what = "is a causal decoder; sasrec trains those" if parts.causal else "has no language-model head"
            raise IntaglioError(f"bert4rec needs a bidirectional encoder that fills in masks; {name} {what}")
        length = row_length(checkpoint, self.length)
        self._mask_id = reserve_token(
            checkpoint, self.mask_token, name="[MASK]", field="mask_token", grow=False, seed=rng.seed, role="mask_token"
        )
        self._items = item_ids(checkpoint, self._mask_id)
        rows = window_rows(examples, length, self.window_step, training=rng.training)
        return rows if self.static_copies is None or not rng.training else self._static(rows, rng)

    def _static(self, rows: Iterable[Example], rng: KeyedRNG) -> Iterator[Example]:
        """Yield the masked copies of each window, and a copy whose last item is masked."""
        for row in rows:
            for copy in range(self.static_copies or 0):
                draws = rng(row, f"bert4rec {row['start']} {copy}")
                yield self._hidden(row, self._positions(len(row["input_ids"]), draws), draws)
            yield self._last_only(row)

    def _positions(self, items: int, draws: torch.Generator) -> Tensor:
        """Return positions drawn uniformly, int64 [m], in order."""
        return draw_positions(torch.arange(items), mask_count(items, self.mask_ratio, self.max_predictions), draws)

    def _last_only(self, row: Example) -> Example:
        """Return a window whose last item is masked, whatever `mask_prob` is: the layout of inference."""
        ids_T = row["input_ids"]
        last = torch.tensor([len(ids_T) - 1])
        return {"input_ids": masked(ids_T, last, self._mask_id), "positions": last, "target": ids_T[last]}

    def _hidden(self, row: Example, positions: Tensor, draws: torch.Generator) -> Example:
        """Return a window with some positions masked, int64 `input_ids` [T], `positions` [m] and `target` [m]."""
        ids_T = row["input_ids"]
        hidden_T = masked(ids_T, positions, self._mask_id)
        if self.mask_prob < 1:
            kind = torch.rand(len(positions), generator=draws)
            random = draw_items(self._items, (len(positions),), draws)
            kept = torch.where(kind < (1 + self.mask_prob) / 2, ids_T[positions], random)
            hidden_T[positions] = torch.where(kind < self.mask_prob, self._mask_id, kept)
        return {"input_ids": hidden_T, "positions": positions, "target": ids_T[positions]}

    def hide(self, row: Example, rng: KeyedRNG) -> Example:
        """Return a window as it enters the model; while evaluating only its last item is masked."""
        if "target" in row:
            return row
        draws = rng(row, "bert4rec")
        if not rng.training or float(torch.rand((), generator=draws)) < self.last_only_ratio:
            return self._last_only(row)
        return self._hidden(row, self._positions(len(row["input_ids"]), draws), draws)

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return `input_ids` and `attention_mask` [B, T], flat `positions` [M] and their `target` [M]."""
        rows = [self.hide(example, rng) for example in examples]
        batch = padded([row["input_ids"] for row in rows])
        width = batch["input_ids"].shape[1]
        if bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        flat_M = torch.cat([row["positions"] + number * width for number, row in enumerate(rows)])
        return {**batch, "positions": flat_M, "target": torch.cat([row["target"] for row in rows]),
                "weight": len(flat_M)}  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean negative log-likelihood of the masked items, in nats, by a softmax over all rows."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        with head_on(model, batch["positions"]):
            logits_MV = model(**inputs).logits[0].float()
        total = F.cross_entropy(logits_MV, batch["target"], reduction="sum")
        return Loss(total / (len(batch["target"]) + 1e-5), outputs=logits_MV)

    def windows(self, examples: Iterable[Example], *, training: bool = True) -> list[Example]:
        """Return the windows of sequences of `input_ids`, for a data collator."""
        if self.length is None:
            raise IntaglioError("length is missing; without a model it gives the items of a window")
        numbered = ({**example, "id": number} for number, example in enumerate(examples))
        return list(window_rows(numbered, self.length, self.window_step, training=training))

    def data_collator(self, mask_id: int, seed: int = 0, vocabulary: int | None = None) -> Callable[..., Batch]:
        """Return a collator for a stock `transformers.Trainer`: `input_ids`, `attention_mask` and `labels` [B, T].

        Masks follow from the seed, a sequence and how often its windows were collated before.

        Args:
            mask_id: id of the mask token.
            seed: of the masks. Default 0.
            vocabulary: number of ids from which random items are drawn, padding (0) and mask excluded; needed where
                `mask_prob` is below 1.
        """
        if self.mask_prob < 1 and vocabulary is None:
            raise IntaglioError("vocabulary is missing; random items are drawn where mask_prob is below 1")
        own = self.model_copy()
        own._mask_id = mask_id
        own._items = tuple(index for index in range(1, vocabulary or 1) if index != mask_id)

        masks = EpochCollator(own, KeyedRNG(seed))

        def collate(features: Sequence[Example]) -> Batch:
            batch = masks(features)
            labels_BT = torch.full_like(batch["input_ids"], IGNORED)
            labels_BT.view(-1)[batch.pop("positions")] = batch.pop("target")
            del batch["weight"]
            return {**batch, "labels": labels_BT}

        return collate
