"""SASRec: predict each next item with a causal decoder (Kang and McAuley, ICDM 2018), the baseline of BERT4Rec.

Source: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, arXiv 1808.09781. The full softmax is
that of Klenitskiy and Vasilev, arXiv 2309.07602, who report it above BERT4Rec.

Dimension letters: B windows, T items of a window, M targets of a batch, J negatives of a target, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, ModelAspect, TrainingData
from intaglio.methods.objectives.next_item import draw_items, item_ids, window_rows
from intaglio.trainer.causal_lm import IGNORED, causal_batch, check_causal, next_token_loss, row_length
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG


class SASRec(Method, slug="sasrec"):
    """Next-item training of a causal decoder, by binary cross-entropy with sampled negatives or a full softmax.

        bce:      L = -mean_t [ log s(h_t . e_{x_{t+1}}) + sum_j log(1 - s(h_t . e_{n_tj})) ]      s: logistic function
        softmax:  L = -mean_t log softmax(E h_t)[x_{t+1}]

    `h_t` is the decoder's final state at item t, `e_v` the output row of item v, tied to its input row; n_tj are
    negatives drawn uniformly from the items that the user's sequence does not have.

    On the command line: `intaglio train --interactions log.csv --objective sasrec -o model`. From Python as `BERT4Rec`,
    with `new_recommender(items, "gpt2")`.

    Source: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, sections 3.1 to 3.6.

    Args:
        loss_type: `bce` (default, the paper's) or `softmax`, the cross-entropy over all items.
        negatives: sampled items of each target, for `bce`. Default 1.
        length: items of a window. Default: the model's context, at most 1,024.
        window_step: distance between windows of a longer sequence, as a share of `length`, in (0, 1]. Default 0.5; the
            authors train on the last window alone.
    """

    kinds = ("objective",)
    summary = "predicts each next item with a causal decoder, by sampled negatives or a full softmax"
    citation = "Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018"
    url = "https://arxiv.org/abs/1808.09781"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "tokenizer"})
    trains_on: ClassVar[TrainingData] = "interactions"

    loss_type: Literal["bce", "softmax"] = "bce"
    negatives: Annotated[int, Field(ge=1)] = 1
    length: Annotated[int, Field(ge=2)] | None = None
    window_step: Annotated[float, Field(gt=0, le=1)] = 0.5

    _items: tuple[int, ...] = PrivateAttr(())

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut the sequences into windows."""
        check_causal(checkpoint, packing=False)
        self._items = item_ids(checkpoint)
        length = row_length(checkpoint, self.length)
        return window_rows(examples, length, self.window_step, training=rng.training)

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a causal batch, for `bce` with `negatives` [B, T, J]; while evaluating it is the last target's."""
        rows = list(examples) if rng.training else [_last_target(example) for example in examples]
        batch = causal_batch(rows)
        if self.loss_type == "bce" and rng.training:
            drawn = [self.draw_negatives(example, rng) for example in examples]
            batch["negatives"] = nn.utils.rnn.pad_sequence(drawn, batch_first=True)
        return batch

    def draw_negatives(self, row: Example, rng: KeyedRNG) -> Tensor:
        """Return items drawn uniformly from those that the sequence does not have, int64 [T, J]."""
        draws, seen = rng(row, "sasrec"), row["seen"]
        if len(seen.unique()) >= len(self._items):
            raise IntaglioError("a sequence has every item, so bce has no negatives; use loss_type: softmax")
        drawn_TJ = draw_items(self._items, (len(row["input_ids"]), self.negatives), draws)
        while bool((again_TJ := torch.isin(drawn_TJ, seen)).any()):
            drawn_TJ[again_TJ] = draw_items(self._items, (int(again_TJ.sum()),), draws)
        return drawn_TJ

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean loss over targets, in nats; while evaluating that of the softmax, whatever the training."""
        if "negatives" not in batch:
            return next_token_loss(model, batch)
        whole: Any = model
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        states_BTD = whole.base_model(**inputs, use_cache=False).last_hidden_state
        known_BT = batch["target"] != IGNORED
        states_MD, head = states_BTD[known_BT], whole.get_output_embeddings()
        items_MJ = torch.cat([batch["target"][known_BT][:, None], batch["negatives"][known_BT]], 1)
        scores_MJ = torch.einsum("md,mjd->mj", states_MD, head.weight[items_MJ]).float()
        if head.bias is not None:
            scores_MJ = scores_MJ + head.bias[items_MJ]
        # Loss of a target and its negatives: their sum, as in the paper.
        total = F.softplus(-scores_MJ[:, 0]) + F.softplus(scores_MJ[:, 1:]).sum(1)
        return Loss(total.mean(), outputs=scores_MJ)


def _last_target(row: Example) -> Example:
    labels_T = torch.full_like(row["input_ids"], IGNORED)
    labels_T[-1] = row["input_ids"][-1]
    return {**row, "labels": labels_T}
