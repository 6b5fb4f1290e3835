"""Next-token prediction: packing of documents without leaks, and the objective `CausalLM`.

A packed row holds several documents. Positions restart with each, from which the stock models of transformers make a
mask that separates documents (windows included); a probe checks that the model at hand does so.

Dimension letters: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.dataset import as_ids
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG, generator

IGNORED = -100
"""Target of a position without a loss, as in torch."""

LENGTH = 1024
"""Default row length in tokens; a shorter context of the model wins."""


def row_length(checkpoint: Checkpoint, length: int | None) -> int:
    """Return the row length in tokens: as given, or the context, at most 1,024."""
    if length is None:
        return min(checkpoint.context, LENGTH)
    if not 2 <= length <= checkpoint.context:
        raise IntaglioError(f"length is {length}; from 2 tokens to the model's context of {checkpoint.context}")
    return length


def documents(examples: Iterable[Example], vocabulary: int) -> Iterator[Example]:
    """Yield each example as a document: `input_ids` and `labels`, int64 [T]; the label -100 has no loss."""
    for number, example in enumerate(examples):
        what = f"example {number} of the training data"
        if "input_ids" not in example:
            known = ", ".join(sorted(key for key in example if key != "id")) or "nothing"
            raise IntaglioError(f"{what} has no input_ids and no text; it has: {known}")
        ids_T = as_ids(example["input_ids"], what)
        labels_T = ids_T if example.get("labels") is None else as_ids(example["labels"], f"{what}, labels")
        if labels_T.shape != ids_T.shape:
            raise IntaglioError(f"{what} has {len(labels_T)} labels for {len(ids_T)} tokens; one a token is needed")
        outside = ids_T[(ids_T < 0) | (ids_T >= vocabulary)]
        if outside.numel():
            raise IntaglioError(f"{what} has the token id {int(outside[0])}; from 0 to {vocabulary - 1} is accepted")
        bad = labels_T[(labels_T != IGNORED) & ((labels_T < 0) | (labels_T >= vocabulary))]
        if bad.numel() and labels_T is not ids_T:
            raise IntaglioError(f"{what} has the label {int(bad[0])}; from 0 to {vocabulary - 1}, or -100 for none")
        yield {**example, "input_ids": ids_T, "labels": labels_T}


def packed(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Yield rows of exactly `length` tokens (the last may be shorter), documents one after the other.

    A document that does not fit continues in the next row as a document of its own: it does not see its first part.
    """
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    room = length
    for example in examples:
        ids_T, labels_T = example["input_ids"], example["labels"]
        while len(ids_T):
            ids.append(ids_T[:room])
            labels.append(labels_T[:room])
            room -= len(ids[-1])
            ids_T, labels_T = ids_T[len(ids[-1]) :], labels_T[len(labels[-1]) :]
            if not room:
                yield packed_row(ids, labels)
                ids, labels, room = [], [], length
    if ids and any(len(piece) > 1 for piece in ids):
        yield packed_row(ids, labels)


def filled(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Yield rows of at most `length` tokens that hold whole documents, as many as fit one after the other."""
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    for example in examples:
        if ids and sum(map(len, ids)) + len(example["input_ids"]) > length:
            yield packed_row(ids, labels)
            ids, labels = [], []
        ids.append(example["input_ids"])
        labels.append(example["labels"])
    if ids:
        yield packed_row(ids, labels)


def packed_row(ids: Sequence[Tensor], labels: Sequence[Tensor]) -> Example:
    """Return documents one after the other as a row."""
    lengths = torch.tensor([len(piece) for piece in ids])
    return {"input_ids": torch.cat(list(ids)), "labels": torch.cat(list(labels)), "lengths": lengths}


def cut(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Yield one document a row, in pieces of at most `length` tokens; a piece of one token has nothing to predict."""
    for example in examples:
        ids_T, labels_T = example["input_ids"], example["labels"]
        for start in range(0, len(ids_T), length):
            piece = slice(start, start + length)
            if len(ids_T[piece]) > 1:
                yield packed_row([ids_T[piece]], [labels_T[piece]])


def starts(row: Example) -> Tensor:
    """Return the start positions of the documents of a row, int64 [documents]."""
    lengths = row.get("lengths")
    if lengths is None:
        return torch.zeros(1, dtype=torch.int64)
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])


def targets(row: Example) -> Tensor:
    """Return the target of each position, int64 [T]: the next token's label, -100 at a document's end."""
    labels_T = row["labels"] if row.get("labels") is not None else row["input_ids"]
    target_T = F.pad(labels_T[1:], (0, 1), value=IGNORED)
    lengths = row.get("lengths")
    if lengths is not None and len(lengths) > 1:
        target_T[starts(row)[1:] - 1] = IGNORED
    return target_T


def positions(row: Example) -> Tensor:
    """Return each token's position in its own document, int64 [T]."""
    position_T = torch.arange(len(row["input_ids"]))
    if row.get("lengths") is None:
        return position_T
    return position_T - torch.repeat_interleave(starts(row), row["lengths"])


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    if len({len(row) for row in rows}) == 1:
        return torch.stack(list(rows))
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def causal_batch(rows: Sequence[Example]) -> Batch:
    """Return the batch of a causal model, padded on the right, with `weight`, the number of targets.

    `input_ids` [B, T] and `target` [B, T]; `position_ids` [B, T] if a row holds several documents (padding is then a
    document of its own), else `attention_mask` [B, T] if there is padding.
    """
    target_BT = _padded([targets(row) for row in rows], IGNORED)
    batch: Batch = {
        "input_ids": _padded([row["input_ids"] for row in rows], 0),
        "target": target_BT,
        "weight": int(torch.count_nonzero(target_BT != IGNORED)),
    }
    lengths = [len(row["input_ids"]) for row in rows]
    several = any(row.get("lengths") is not None and len(row["lengths"]) > 1 for row in rows)
    if several or len(set(lengths)) > 1:
        after_BT = torch.arange(max(lengths)) - torch.tensor(lengths)[:, None]
        if several:
            # Padding counts from 0 again, so that it begins a document.
            batch["position_ids"] = torch.where(after_BT >= 0, after_BT, _padded([positions(row) for row in rows], 0))
        else:
            batch["attention_mask"] = (after_BT < 0).to(torch.int64)
    return batch


def next_token_loss(model: nn.Module, batch: Batch) -> Loss:
    """Return the mean negative log-likelihood, in nats, of the targets of a causal batch."""
    inputs = {name: value for name, value in batch.items() if name not in ("target", "weight")}
    # With a cache the stock models do not detect packed documents.
    logits_BTV = model(**inputs, use_cache=False).logits
    return Loss(cross_entropy(logits_BTV, batch["target"]), outputs=logits_BTV)


def cross_entropy(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Return the mean negative log-likelihood in nats; 0 where there is no target."""
    total = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (target_BT != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def check_causal(checkpoint: Checkpoint, *, packing: bool) -> None:
    """Refuse a model that, in a trial pass, sees the tokens to predict or, in packed rows, other documents."""
    model, name = checkpoint.model, type(checkpoint.model).__name__
    parts = anatomy(model)
    if not parts.causal:
        raise IntaglioError(f"next-token training needs a causal decoder; {name} is an encoder")
    if parts.head is None:
        raise IntaglioError(f"next-token training needs a language-model head; {name} has none")
    with preserve_modes(model):
        model.eval()
        _probe(checkpoint, packing, name)


def _probe(checkpoint: Checkpoint, packing: bool, name: str) -> None:
    half = min(4, checkpoint.context // 2)
    rows = checkpoint.vocabulary
    first_T, second_T = torch.randint(rows, (2, half), generator=generator("probe"))
    other_T = (first_T + 1) % rows

    def logits(*halves: Tensor, **more: Tensor) -> Any:
        ids = torch.cat(halves)[None].to(checkpoint.device)
        return checkpoint.model(input_ids=ids, use_cache=False, **more).logits[0].float()

    def differs(a: Tensor, b: Tensor) -> bool:
        return not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))

    if differs(logits(first_T, second_T)[:half], logits(first_T, (second_T + 1) % rows)[:half]):
        raise IntaglioError(f"next-token training needs a causal decoder; this {name} sees later tokens")
    if packing:
        places = torch.arange(half).repeat(2)[None].to(checkpoint.device)
        a, b = (logits(front_T, second_T, position_ids=places) for front_T in (first_T, other_T))
        if differs(a[half:], b[half:]):
            raise IntaglioError(f"{name} does not separate packed documents; train it with pack=False")


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction, `-mean_t log p(x_{t+1} | x_1..x_t)` over the tokens of each document.

    Args:
        length: tokens of a row. Default: the model's context, at most 1,024.
        pack: whether rows are filled with several documents, which do not see each other; otherwise a row is one
            document or a piece of one, padded to the longest of its batch. Default True.
    """

    length: int | None = None
    pack: bool = True

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut or pack the examples into rows."""
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        vocabulary = checkpoint.vocabulary
        whole = documents(examples, vocabulary)
        return packed(whole, length) if self.pack else cut(whole, length)

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return `causal_batch(examples)`."""
        return causal_batch(examples)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the next-token loss."""
        return next_token_loss(model, batch)
