"""Training of text encoders on pairs: the base `EncoderObjective`; see `ranking_losses` for its losses.

Chunks are recomputed for the gradient, so memory depends on the chunk and not on the batch: the gradient caching of
Gao et al. (2021, arXiv 2101.06983) by autograd itself.

Dimension letters: B queries, N documents, L tokens of a text, D dimensions of a vector, R relevant texts of a query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.checkpoint.resolve import ITEMS
from intaglio.data.text_pairs import TextPair, as_pair
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, ModelAspect, TrainingData, validation_sentence
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.bidirectional import make_bidirectional
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.ranking_losses import accuracy, distillation, excluded_documents, info_nce, margin_mse
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.sentence_transformer import wrap
from intaglio.trainer.text_batches import Read, chunks_of, plain_tokens, side, special_tokens, text_batch

SIDES = ("query", "document")
ECHO = {"query": "Query: {text}\nQuery again: {text}", "document": "Document: {text}\nDocument again: {text}"}
"""Templates of Springer et al. (2024), in which a text is read twice."""

LENGTHS = {"query": 64, "document": 256}
"""Most tokens of each side's texts by default."""


class EncoderObjective(Method):
    """Base of objectives that train a text encoder on pairs; a subclass gives `embed` and may replace `compare`.

    Data: `{query, positive, negatives, scores}`, see `intaglio.data.text_pairs`. After training,
    `checkpoint.encoder()` returns the method, ready to `encode`; `intaglio index --encoder OUT` uses it.

    Args:
        variant: `plain` reads a text as it is, `echo` reads it twice and pools the second copy alone, `bidirectional`
            lets a decoder see later tokens, by `is_causal=False` in its config. Default `plain`.
        loss_type: `info_nce`, or `margin_mse` or `distillation`, which need negatives and a teacher's scores. Default
            `info_nce`.
        temperature: T of info_nce and distillation. Default 0.05.
        teacher_temperature: T_t of distillation. Default: T, for a teacher whose scores are cosines too.
        num_negatives: negatives of a pair in a batch, drawn anew each epoch. Default: all.
        chunk_size: most texts of a forward pass; activations of other texts are recomputed. Default: a whole side.
        query_length: most tokens of a query, which is cut before it is doubled. Default: 64, or what the context holds.
        document_length: most tokens of a document, likewise. Default: 256, or what the context holds.
        query_prompt: text before each query. Default "".
        document_prompt: text before each document. Default "".
    """

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"causal"})
    storage: ClassVar[Literal["standalone"]] = "standalone"
    trains_on: ClassVar[TrainingData] = "pairs"
    sparse: ClassVar[bool] = False
    """Whether dimensions are ids of the vocabulary."""
    leaves_parameters: ClassVar[bool] = True

    variant: Literal["plain", "echo", "bidirectional"] = "plain"
    loss_type: Literal["info_nce", "margin_mse", "distillation"] = "info_nce"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    teacher_temperature: Annotated[float, Field(gt=0)] | None = None
    num_negatives: Annotated[int, Field(ge=1)] | None = None
    chunk_size: Annotated[int, Field(ge=1)] | None = None
    query_length: Annotated[int, Field(ge=1)] | None = None
    document_length: Annotated[int, Field(ge=1)] | None = None
    query_prompt: str = ""
    document_prompt: str = ""

    _parts: Anatomy = PrivateAttr(None)  # type: ignore[assignment]
    _checkpoint: Checkpoint = PrivateAttr(None)  # type: ignore[assignment]
    _lengths: dict[str, int] = PrivateAttr(default_factory=dict)
    _owned: nn.ModuleDict = PrivateAttr(None)  # type: ignore[assignment]

    def pair_tokens(self, mined: int) -> int:
        """Return the tokens of a pair at full length, with `mined` negatives where the number is not given."""
        query, document = self.query_length or LENGTHS["query"], self.document_length or LENGTHS["document"]
        tokens = query + (1 + (self.num_negatives or mined)) * document
        return 2 * tokens if self.variant == "echo" else tokens

    @property
    def default_pooling(self) -> Literal["last", "mean"]:
        """`last` for a causal decoder that reads a text as it is, else `mean`."""
        return "last" if self._parts.causal and self.variant == "plain" else "mean"

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the vectors [N, D] of texts, for training.

        Args:
            model: the model.
            inputs: see `side`.
            side: `query` or `document`.
        """
        raise NotImplementedError

    def searched(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the vectors as they are searched; by default those of `embed`."""
        return self.embed(model, inputs, side)

    def compare(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> Loss:
        """Return the loss of a batch from its vectors."""
        scores_BN = query_BD.float() @ document_ND.float().T
        return Loss(self.ranking_loss(scores_BN, batch), {"accuracy": accuracy(scores_BN)}, outputs=scores_BN)

    def ranking_loss(self, scores_BN: Tensor, batch: Batch, *, symmetric: bool = False) -> Tensor:
        """Return the loss of `loss_type` from scores that are not yet divided by the temperature."""
        if self.loss_type == "margin_mse":
            return margin_mse(scores_BN, batch["owner"], batch["teacher"])
        if self.loss_type == "distillation":
            teacher_N = batch["teacher"] / (self.teacher_temperature or self.temperature)
            return distillation(scores_BN / self.temperature, batch["owner"], teacher_N)
        return info_nce(scores_BN / self.temperature, batch["excluded"], symmetric=symmetric)

    def build(self, checkpoint: Checkpoint, seed: int) -> nn.ModuleDict:
        """Return the method's own modules for a checkpoint, untrained; by default none."""
        return nn.ModuleDict()

    @property
    def lr_ratios(self) -> dict[str, float]:
        """Learning rates of own modules by name, over that of the run; by default none differs."""
        return {}

    def attachment_data(self) -> dict[str, Any]:
        """Return what `build` needs beside the fields after loading, as JSON values; by default nothing."""
        return {}

    def restore_data(self, data: Mapping[str, Any]) -> None:
        """Take over the result of `attachment_data`, before `build`."""

    def check_parts(self, parts: Anatomy) -> None:
        """Refuse a model that cannot be trained so; by default none."""

    def setup(self, checkpoint: Checkpoint, seed: int = 0) -> Self:
        """Prepare the method for a checkpoint, once; modules of its own are drawn from the seed."""
        if self._checkpoint is checkpoint and self._parts.model is checkpoint.model:
            return self
        if checkpoint.tokenizer is None:
            raise IntaglioError("the checkpoint has no tokenizer, so texts cannot be encoded")
        parts = anatomy(checkpoint.model)
        self.check_parts(parts)
        self._lengths = {name: self._checked_length(checkpoint, name) for name in SIDES}
        if self.variant == "bidirectional":
            make_bidirectional(parts)
        self._parts, self._checkpoint = parts, checkpoint
        self._owned = self.build(checkpoint, seed).to(checkpoint.device)
        return self

    def _checked_length(self, checkpoint: Checkpoint, name: str) -> int:
        """Return the most tokens of a side's texts; refuse more than the context holds, and too few for any text."""
        given = self.query_length if name == "query" else self.document_length
        room = self.room(checkpoint, name)
        if room < (given or 1):
            raise IntaglioError(
                f"{name}_length is {given or 1}, and the model's context of {checkpoint.context} tokens holds {room} in"
                f" the variant {self.variant}"
            )
        length = given or min(LENGTHS[name], room)
        taken = 0 if self.variant == "echo" else len(checkpoint.tokenizer(self._prompt(name))["input_ids"])
        if taken >= length:
            raise IntaglioError(
                f"{name}_length is {length}, and prompt and special tokens take {taken}; a length that holds the text"
                " too is needed"
            )
        return length

    def room(self, checkpoint: Checkpoint, name: str) -> int:
        """Return the most tokens of a side's texts that the context holds."""
        if self.variant == "echo":
            return (checkpoint.context - sum(map(len, self._echo(checkpoint.tokenizer, name)))) // 2
        return checkpoint.context

    def length(self, name: str) -> int:
        """Return the most tokens of a side's texts for the checkpoint at hand."""
        return self._lengths[name]

    def _prompt(self, name: str, pair: TextPair | None = None) -> str:
        """Return the text before a text of a side, of a training pair if one is given."""
        return self.query_prompt if name == "query" else self.document_prompt

    def read(self, text: str, name: str, pair: TextPair | None = None) -> Read:
        """Return the tokens of a text of a side, of a training pair if one is given, as the model reads them."""
        tokenizer, length = self._checkpoint.tokenizer, self._lengths[name]
        prompt = self._prompt(name, pair)
        if self.variant != "echo":
            ids = list(tokenizer(prompt + text, truncation=True, max_length=length, verbose=False)["input_ids"])
            start, stop = 0, len(ids)
        else:
            before, again, after = self._echo(tokenizer, name)
            copy = plain_tokens(tokenizer, f" {text}")[:length]
            ids = [*before, *copy, *again, *copy, *after]
            start = len(before) + len(copy) + len(again)
            stop = start + len(copy)
        if start == stop:
            raise IntaglioError(f"the {name} {text[:40]!r} has no tokens; both sides of a pair need text")
        return Read(ids, start, stop)

    def count_tokens(self, text: str, name: str) -> int:
        """Return the tokens of a text of a side, before it is cut."""
        prompt, tokenizer = self._prompt(name), self._checkpoint.tokenizer
        if self.variant == "echo":
            return len(plain_tokens(tokenizer, f" {text}"))
        return len(tokenizer(prompt + text, verbose=False)["input_ids"])

    def _echo(self, tokenizer: Any, name: str) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens before, between and after the two copies of a text."""
        begin, end = special_tokens(tokenizer)
        before, again, after = (part.removesuffix(" ") for part in (self._prompt(name) + ECHO[name]).split("{text}"))
        first, second, third = (plain_tokens(tokenizer, part) for part in (before, again, after))
        return [*begin, *first], second, [*third, *end]

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Tokenise the pairs; equal texts get equal numbers, by which relevant documents of a batch are known.

        Files by which sentence-transformers loaded the checkpoint before describe another encoder, and are dropped.
        sentence-transformers needs a padding token, so a tokenizer without takes its end token.
        """
        self.setup(checkpoint, rng.seed)
        if rng.training:
            checkpoint.companions = {name: file for name, file in checkpoint.companions.items() if name == ITEMS}
            if checkpoint.tokenizer.pad_token is None:
                checkpoint.tokenizer.pad_token = checkpoint.tokenizer.eos_token
        pairs = [as_pair(example, f"example {number} of the pairs") for number, example in enumerate(examples)]
        numbers: dict[str, int] = {}
        relevant: dict[str, set[int]] = {}
        for pair in pairs:
            for text in (pair.positive, *pair.negatives):
                numbers.setdefault(text, len(numbers))
            relevant.setdefault(pair.query, set()).add(numbers[pair.positive])
        contrasted = any(len(own) < len(numbers) for own in relevant.values())
        if pairs and not contrasted and rng.training and self.loss_type == "info_nce":
            raise IntaglioError(
                "every text of the pairs is relevant to every query, so there is nothing to contrast; give more pairs,"
                " or negatives"
            )
        rows = []
        for number, pair in enumerate(pairs):
            if self.loss_type != "info_nce" and (pair.scores is None or not pair.negatives):
                raise IntaglioError(
                    f"example {number} of the pairs has no negatives with scores; {self.loss_type} needs both"
                )
            texts = (pair.positive, *pair.negatives)
            rows.append(
                {
                    "query": self.read(pair.query, "query", pair),
                    "documents": [self.read(text, "document", pair) for text in texts],
                    "numbers": [numbers[text] for text in texts],
                    "relevant": sorted(relevant[pair.query]),
                    "scores": list(pair.scores or ()),
                    **({} if pair.task is None else {"task": pair.task}),
                }
            )
        return rows

    def modules(self) -> nn.ModuleDict:
        """Return the method's own modules."""
        return nn.ModuleDict() if self._owned is None else self._owned

    def digest(self, model: nn.Module) -> str:
        """Return 64 hexadecimal digits that identify the weights of a model and of the method's own modules."""
        weights, owned = fingerprint(model), self.modules()
        if not owned.state_dict():
            return weights
        return hashlib.sha256(f"{weights} {fingerprint(owned)}".encode()).hexdigest()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return both sides of a batch (see `side`), the positives before the negatives.

        Also `owner` and `number` (of the text), int64 [N]; `place` of a document among those of its pair, int64 [N];
        `relevant`, numbers of the texts that are relevant to a query, int64 [B, R] filled up with -1; `excluded`, bool
        [B, N]; `teacher`, float32 [N], where the loss needs it; `step` and `steps`.

        Raises:
            IntaglioError: a training batch for info_nce has one pair and no negative.
        """
        drawn = [self._negatives(example, rng) for example in examples]
        owner = [*range(len(examples)), *(row for row, own in enumerate(drawn) for _ in own)]
        place = [0] * len(examples) + [index for own in drawn for index in own]
        if len(owner) == 1 and rng.training and self.loss_type == "info_nce":
            raise IntaglioError(
                "a batch of one pair has nothing to contrast; raise batch_size to 2 or more, or give negatives"
            )
        number_N = torch.tensor([examples[row]["numbers"][index] for row, index in zip(owner, place, strict=True)])
        relevant = [torch.tensor(row["relevant"]) for row in examples]
        relevant_BR = nn.utils.rnn.pad_sequence(relevant, batch_first=True, padding_value=-1)
        texts = {
            "query": [row["query"] for row in examples],
            "document": [examples[row]["documents"][index] for row, index in zip(owner, place, strict=True)],
        }
        batch: Batch = {f"{name}_{key}": value for name in SIDES for key, value in text_batch(texts[name]).items()}
        batch |= {"owner": torch.tensor(owner), "place": torch.tensor(place), "number": number_N}
        batch |= {"relevant": relevant_BR, "weight": len(examples)}
        batch["excluded"] = excluded_documents(relevant_BR, number_N)
        if self.loss_type != "info_nce":
            batch["teacher"] = torch.tensor([examples[r]["scores"][i] for r, i in zip(owner, place, strict=True)])
        first = examples[0]
        return {**batch, "step": int(first.get("step", 0)), "steps": int(first.get("steps", 0))}

    def _negatives(self, example: Example, rng: KeyedRNG) -> list[int]:
        """Return the places of a pair's negatives in this batch, in order."""
        count = len(example["documents"]) - 1
        if self.num_negatives is None or self.num_negatives >= count:
            return list(range(1, count + 1))
        order = torch.randperm(count, generator=rng(example, "negatives"))[: self.num_negatives]
        return sorted((order + 1).tolist())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch of pairs."""
        query_BD, document_ND = (self.vectors(model, side(batch, name), name) for name in SIDES)
        # In half precision scores over a small temperature would be off by a good part of a nat.
        with torch.autocast(query_BD.device.type, enabled=False):
            return self.compare(query_BD, document_ND, batch)

    def vectors(self, model: nn.Module, inputs: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the vectors [N, D] of a side, in chunks whose activations are recomputed for the gradient."""
        if self.chunk_size is None or self.chunk_size >= len(inputs["input_ids"]):
            return self.embed(model, inputs, name)
        return torch.cat([recomputed(self.embed, model, chunk, name) for chunk in chunks_of(inputs, self.chunk_size)])

    @torch.no_grad()
    def encode(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[str],
        side: str,
        batch_size: int = 32,
        pairs: Sequence[TextPair | None] | None = None,
    ) -> Tensor:
        """Return the vectors of texts as they are searched, float32 [N, D] on the CPU.

        Args:
            checkpoint: the encoder.
            texts: at least one.
            side: `query` or `document`.
            batch_size: texts of a batch. Default 32.
            pairs: the pair of each text, for methods that read its `instruction`. Default: none.
        """
        self.setup(checkpoint)
        pair_of: Sequence[TextPair | None] = pairs or [None] * len(texts)
        read = [self.read(text, side, pair) for text, pair in zip(texts, pair_of, strict=True)]
        order = sorted(range(len(read)), key=lambda number: len(read[number].ids))
        rows: list[Any] = [None] * len(read)
        with preserve_modes(checkpoint.model), preserve_modes(self._owned):
            checkpoint.model.eval()
            self._owned.eval()
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                made = text_batch([read[number] for number in chosen])
                inputs = {name: value.to(checkpoint.device) for name, value in made.items()}
                vectors_ND = self.searched(checkpoint.model, inputs, side).float().cpu()
                for number, vector_D in zip(chosen, vectors_ND, strict=True):
                    rows[number] = vector_D
        return torch.stack(rows)

    def dimensions(self, checkpoint: Checkpoint) -> int:
        """Return D."""
        return checkpoint.vocabulary if self.sparse else int(checkpoint.config.hidden_size)

    def as_sentence_transformer(self) -> Any:
        """Return the encoder as a `SentenceTransformer`, or a `SparseEncoder` if it is sparse.

        Raises:
            IntaglioError: sentence-transformers is not installed.
        """
        return wrap(self, self._checkpoint)

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the trained method from its attachment; `fields` override those it was trained with.

        Raises:
            IntaglioError: a field is wrong, or the model's vocabulary or width has changed since.
        """
        given = {**attachment.parameters, **fields}
        try:
            method = cls(**given)
        except ValidationError as error:
            raise IntaglioError(validation_sentence(error, cls, given)) from None
        method.restore_data(attachment.about)
        own = method.setup(checkpoint)._owned.state_dict()
        if own.keys() != attachment.tensors.keys():
            name = min(own.keys() ^ attachment.tensors.keys())
            raise IntaglioError(
                f"{cls.slug} was trained {'without' if name in own else 'with'} {name}; leave out fields that differ"
                " from those of the training"
            )
        for name, value in attachment.tensors.items():
            if own[name].shape != value.shape:
                raise IntaglioError(
                    f"{cls.slug} was trained with {name} of {'x'.join(map(str, value.shape))}, and this model needs"
                    f" {'x'.join(map(str, own[name].shape))}: its vocabulary or width has changed; train it again"
                )
        method._owned.load_state_dict(attachment.tensors)
        return method


def check_embedding_width(parts: Anatomy, what: str) -> None:
    """Refuse input embeddings of another width than the hidden states; `what` compares the two."""
    width, embedding = int(parts.config.hidden_size), parts.embedding.get_parameter("weight")
    if embedding.shape[1] != width:
        raise IntaglioError(
            f"{what} scores hidden states of {width} numbers against embeddings of {embedding.shape[1]}; a model whose"
            " widths agree is needed"
        )


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return the result of a function whose activations are recomputed for the gradient."""
    result: Tensor = checkpointed(function, *arguments, use_reentrant=False)
    return result
