"""Token classification: the objective, prediction and evaluation.

    -mean_w log softmax(W dropout(h_t(w)) + b)[label_w]     t(w): the first or the last token of word w

The model becomes transformers' own token classifier (`AutoModelForTokenClassification` loads it), so pipelines work.

Dimension letters: B rows, T tokens of a row, L labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.token_classification import Labelled, Place, Row, as_labelled, found_labels, rows
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.measures.token_classification import scores
from intaglio.methods.base import Capability, Method, ModelAspect, TrainingData
from intaglio.modeling.token_classifier import PLACE, SLUG, classification_head, label_names, to_classifier
from intaglio.trainer.causal_lm import IGNORED, row_length
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG


class TokenClassification(Method, slug=SLUG):
    """Token classification (named entities, parts of speech, roles): cross-entropy on one token of each word.

    Args:
        place: the token of a word that carries its label: `first` (default), or `last`, which under a causal mask is
            the only one that sees the whole word.
        labels: their names in the order of the logits. Default: those of the training examples, sorted.
        dropout: before the head, while training. Default 0.1.
        length: maximum tokens of a row; longer texts are cut between words. Default: the model's context, at most
            1,024.
    """

    kinds = ("objective",)
    summary = "labels words by cross-entropy on one token of each"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"causal"})
    storage: ClassVar[str] = "standalone"
    trains_on: ClassVar[TrainingData] = "labels"

    place: Place = "first"
    labels: list[str] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    length: Annotated[int, Field(ge=2)] | None = None

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Make the model a token classifier, unless it is one, and align labels with tokens.

        `rng` seeds the head. While evaluating, labels that training has not seen are refused.
        """
        if checkpoint.tokenizer is None:
            raise IntaglioError("the checkpoint has no tokenizer, so words cannot be labelled")
        length = row_length(checkpoint, self.length)
        texts: Iterable[Labelled] = (_labelled(number, example) for number, example in enumerate(examples))
        if self.labels is None and classification_head(checkpoint.model) is None:
            texts = list(texts)
            names = found_labels(texts)
        else:
            names = tuple(self.labels or label_names(checkpoint.model))
        to_classifier(checkpoint, names, dropout=self.dropout, place=self.place, seed=rng.seed)
        return self._rows(checkpoint, texts, names, length)

    def _rows(
        self, checkpoint: Checkpoint, texts: Iterable[Labelled], names: Sequence[str], length: int
    ) -> Iterator[Example]:
        number = {name: index for index, name in enumerate(names)}
        for index, text in enumerate(texts):
            unknown = next((label for label in text.labels if label is not None and label not in number), None)
            if unknown is not None:
                raise IntaglioError(f"example {index} has the label {unknown!r}; {did_you_mean(unknown, number)}")
            ids_W = torch.tensor([IGNORED if label is None else number[label] for label in text.labels] + [IGNORED])
            for row in rows(checkpoint.tokenizer, text, length, self.place):
                target_T = ids_W[row.word_T]  # the last one stands for no word
                if (target_T != IGNORED).any():
                    yield {"input_ids": row.ids_T, "target": target_T}

    def modules(self) -> nn.ModuleDict:
        """Return no modules: the head belongs to the model."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return `input_ids`, `attention_mask` and `target` [B, T], padded on the right."""
        batch = padded([example["input_ids"] for example in examples])
        target_BT = nn.utils.rnn.pad_sequence(
            [example["target"] for example in examples], batch_first=True, padding_value=IGNORED
        )
        return {**batch, "target": target_BT, "weight": int((target_BT != IGNORED).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean negative log-likelihood of the labels, in nats a word, with the accuracy."""
        logits_BTL = label_logits(model, batch).float()
        target_BT = batch["target"]
        total = F.cross_entropy(logits_BTL.flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        known_BT = target_BT != IGNORED
        count = known_BT.sum().clamp(min=1)
        right = ((logits_BTL.argmax(-1) == target_BT) & known_BT).sum() / count
        return Loss(total / count, {"accuracy": right.detach()}, outputs=logits_BTL)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Do nothing: loading only needs the class."""


def _labelled(number: int, example: Example) -> Labelled:
    return as_labelled(example, f"example {number} of the labelled data")


def padded(ids: Sequence[Tensor]) -> Batch:
    """Return `input_ids` and `attention_mask` [B, T], padded on the right."""
    lengths_B = torch.tensor([len(ids_T) for ids_T in ids])
    ids_BT = nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=0)
    mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).to(torch.int64)
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def label_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [B, T, L] of a token classifier."""
    # Decoders would fill an unused cache; encoders do not have the argument.
    extra = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra).logits
    return logits


@torch.no_grad()
def predict(
    checkpoint: Checkpoint, examples: Iterable[Mapping[str, Any]], *, batch_size: int = 16, length: int | None = None
) -> list[list[str | None]]:
    """Label the words of some texts.

    Args:
        checkpoint: a token classifier.
        examples: words, or passage and spans; labels are ignored and may be missing.
        batch_size: rows of a batch. Default 16.
        length: maximum tokens of a row. Default: the model's context, at most 1,024.

    Returns:
        A label for every word of every example; None where a word has no token of its own.

    Raises:
        IntaglioError: the model is no token classifier, or an example is malformed.
    """
    if classification_head(checkpoint.model) is None:
        raise IntaglioError(
            f"{type(checkpoint.model).__name__} does not label tokens; train it by token_classification"
        )
    place: Place = "last" if getattr(checkpoint.model.config, PLACE, "first") == "last" else "first"
    names = label_names(checkpoint.model)
    most = row_length(checkpoint, length)
    texts = [_labelled(number, _unlabelled(example)) for number, example in enumerate(examples)]
    cut = [(number, row) for number, text in enumerate(texts) for row in rows(checkpoint.tokenizer, text, most, place)]
    cut.sort(key=lambda item: len(item[1].ids_T), reverse=True)  # rows of similar length share a batch
    result: list[list[str | None]] = [[None] * len(text.spans) for text in texts]
    for start in range(0, len(cut), batch_size):
        part = cut[start : start + batch_size]
        batch = {name: value.to(checkpoint.device) for name, value in padded([row.ids_T for _, row in part]).items()}
        chosen_BT = label_logits(checkpoint.model, batch).argmax(-1).cpu()
        for (number, row), chosen_T in zip(part, chosen_BT, strict=True):
            _read_off(result[number], row, chosen_T, names)
    return result


def _unlabelled(example: Mapping[str, Any]) -> dict[str, Any]:
    words = example.get("words", example.get("tokens", example.get("spans")))
    count = len(words) if isinstance(words, (list, tuple)) else 0
    return {**{key: value for key, value in example.items() if key != "tags"}, "labels": [None] * count}


def _read_off(result: list[str | None], row: Row, chosen_T: Tensor, names: Sequence[str]) -> None:
    for token in (row.word_T >= 0).nonzero().flatten().tolist():
        result[int(row.word_T[token])] = names[int(chosen_T[token])]


def make_evaluator(
    examples: Sequence[Mapping[str, Any]], *, batch_size: int = 16, length: int | None = None
) -> Callable[[Checkpoint], dict[str, float]]:
    """Return a function that scores a token classifier on labelled texts, for `train(evaluate=...)` or on its own.

    Args:
        examples: labelled.
        batch_size: rows of a batch. Default 16.
        length: maximum tokens of a row. Default: as `predict`.

    Returns:
        A function of the checkpoint: `macro_f1`, `accuracy`, `error`, and `strict_f1` for IOB2 tags.
    """
    gold = [_labelled(number, dict(example)).labels for number, example in enumerate(examples)]

    def evaluator(checkpoint: Checkpoint) -> dict[str, float]:
        return scores(gold, predict(checkpoint, examples, batch_size=batch_size, length=length))

    return evaluator
