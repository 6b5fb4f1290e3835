"""DKVB (Träuble et al., ICML 2023): a classifier of discrete key-value pairs on a frozen encoder of texts or images.

    intaglio.DKVB().fit(ckpt, [{"text": ..., "label": ...}, ...])      # or a recipe with fit: {dkvb: {labels: FILE}}
    dkvb = ckpt.fitted("dkvb")
    dkvb.classify(ckpt, texts)
    dkvb.learn(ckpt, more)                                             # further texts, also of new classes

With an image classifier as `ckpt`, `{"image": ...}` takes the place of `{"text": ...}`, and a folder with a folder of
images for each class that of the file.

- `bottleneck.py`: `DiscreteKeyValueBottleneck`, its splitters and decoders
- `training.py`: training of the values, and of a decoder with weights
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment, to_store
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.labelled_examples import LabelledExamples, load_labelled_examples
from intaglio.data.labelled_images import LabelledImages
from intaglio.data.labelled_texts import LabelledTexts
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import Pooling, embed_texts
from intaglio.methods.activations.dkvb.bottleneck import (
    DiscreteKeyValueBottleneck,
    HeadName,
    KeyInit,
    ProbeHead,
    SplitterName,
    VotingHead,
)
from intaglio.methods.activations.dkvb.training import train_values
from intaglio.methods.base import Cost, Method, Progress, Workload, no_progress
from intaglio.modeling.classifier import is_image_model
from intaglio.trainer.classification import embed_images, embedding_width
from intaglio.trainer.rng import generator

OVERRIDABLE = frozenset(
    {"labels", "epochs", "batch_size", "learning_rate", "label_smoothing", "max_grad_norm", "restrict_to_used"}
)
"""Fields that may change after the fit."""


class DKVB(Method, slug="dkvb"):
    """Discrete key-value bottleneck: frozen encoder, frozen discrete keys, sparsely updated values.

        z = pool(encoder(input)),  h_c = z P_c,  j*_c = argmin_j |h_c - key_cj|²,  logits = 1/C sum_c value_{c, j*_c}

    Keys are fitted to unlabelled embeddings and frozen; then the values are trained by plain SGD. A batch changes the
    fetched values alone, so later classes leave inputs with other pairs as they were: classes can be learned one after
    another without rehearsal, task boundaries or ids. Momentum, Adam and weight decay would move older values too.

    Args:
        labels: file of labelled texts, or `newsgroups`, or a folder or `.npz` file of labelled images; see
            `load_labelled_examples`. Default: those given to `fit`.
        pooling: of the encoder's last hidden states: `mean`, `cls` or `last`. Default: `last` for causal models, else
            `mean`; of an image classifier the inputs of its head.
        length: tokens of a text that are read. Default 256.
        num_codebooks: codebooks C. Default 64.
        num_pairs: key-value pairs K of a codebook. Default 512.
        key_dim: width H of keys and heads. Default 14.
        splitter: `random_projection` (default), `chunk` (C H must be the encoder's width), or `learned_projection`, a
            linear map with its initial weights, as the official `prepare` freezes it.
        key_init: `random` (default) or `kmeans` of the first batch.
        key_texts: texts to fit the keys to: `labelled` (default; their labels are not used), or `recipe`, the recipe's
            calibration texts (other data than the classes, as in the paper), or the images given to `fit`.
        init_epochs: passes over these texts. Default 10.
        ema_decay: g of the keys' moving averages. Default 0.95.
        ema_eps: smoothing of their counts. Default 1e-5.
        threshold_factor: share of uniform use below which a key is replaced; 0 keeps all. Default 0.1.
        topk: pairs that a head fetches, with weights of 1. Default 1.
        temperature: of Gumbel sampling of pairs while training and classifying; 0 (default): the nearest.
        head: `voting` (default, no weights; values are logits), `linear` or `mlp` over the codebooks' values side by
            side, trained in `fit` and frozen in `learn`.
        value_dim: width of the values under `linear` and `mlp`. Default 8.
        mlp_width: hidden width of `mlp`. Default 128.
        value_std: standard deviation of the initial values; 0 (default): zeros.
        restrict_to_used: whether classifying only fetches pairs that training fetched. Default true.
        max_classes: classes allocated from the start, known or to come. Default: those of the labels; voting grows when
            `learn` brings more.
        epochs: passes over the labelled texts, in `fit` and in `learn`. Default 20.
        batch_size: texts of a step. Default 64.
        learning_rate: of the values, whose gradients are divided by C: it grows with `num_codebooks`. Default 100.
        head_learning_rate: of the weights of `linear` and `mlp`. Default 0.05.
        label_smoothing: of the cross-entropy. Default 0.1.
        max_grad_norm: joint norm that gradients are clipped to; 0: none. Default 1.

    Raises:
        IntaglioError: (in `fit`, `learn`, `classify`) no labelled texts or images, fewer than two classes, more
            classes than `max_classes`, images for a model of texts or the reverse, or an encoder of another width.

    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023, sections 2 and 3, and its code.
    """

    kinds = ("classifier",)
    summary = "learns classes one after another in sparsely updated values of frozen keys"
    citation = "Träuble et al., Discrete Key-Value Bottleneck, ICML 2023"
    url = "https://arxiv.org/abs/2207.11240"
    fitted: ClassVar[bool] = True

    labels: Annotated[str, Field(min_length=1)] | None = None
    pooling: Pooling | None = None
    length: Annotated[int, Field(ge=2)] = 256
    num_codebooks: Annotated[int, Field(ge=1)] = 64
    num_pairs: Annotated[int, Field(ge=1)] = 512
    key_dim: Annotated[int, Field(ge=1)] = 14
    splitter: SplitterName = "random_projection"
    key_init: KeyInit = "random"
    key_texts: Literal["labelled", "recipe"] = "labelled"
    init_epochs: Annotated[int, Field(ge=0)] = 10
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    ema_eps: Annotated[float, Field(gt=0)] = 1e-5
    threshold_factor: Annotated[float, Field(ge=0)] = 0.1
    topk: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    head: HeadName = "voting"
    value_dim: Annotated[int, Field(ge=1)] = 8
    mlp_width: Annotated[int, Field(ge=1)] = 128
    value_std: Annotated[float, Field(ge=0)] = 0.0
    restrict_to_used: bool = True
    max_classes: Annotated[int, Field(ge=2)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 100.0
    head_learning_rate: Annotated[float, Field(gt=0)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0

    _bottleneck: Any = PrivateAttr(None)
    _decoder: Any = PrivateAttr(None)
    _classes: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.topk > self.num_pairs:
            raise ValueError(f"topk is {self.topk}; a codebook has {self.num_pairs} pairs")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the sizes and the training of the paper's image classes (one split of two classes)."""
        sizes = {"num_codebooks": 256, "num_pairs": 4096, "key_texts": "recipe"}
        return cls(**{**sizes, "learning_rate": 0.3, "batch_size": 256, "epochs": 2000, **overrides})

    # --- networks ---------------------------------------------------------------------------------------------------

    def make(self, width: int, classes: int, seed: int = 0) -> tuple[DiscreteKeyValueBottleneck, nn.Module]:
        """Return an untrained bottleneck for embeddings of a width, and its decoder."""
        draws = generator(seed, "dkvb")
        columns = self.max_classes or classes
        voting = self.head == "voting"
        bottleneck = DiscreteKeyValueBottleneck(
            width,
            self.num_codebooks,
            self.num_pairs,
            self.key_dim,
            columns if voting else self.value_dim,
            topk=self.topk,
            splitter=self.splitter,
            key_init=self.key_init,
            decay=self.ema_decay,
            eps=self.ema_eps,
            threshold_factor=self.threshold_factor,
            temperature=self.temperature,
            value_std=self.value_std,
            restrict_to_used=self.restrict_to_used,
            generator=draws,
        )
        if voting:
            return bottleneck, VotingHead()
        hidden = self.mlp_width if self.head == "mlp" else 0
        return bottleneck, ProbeHead(self.num_codebooks, self.value_dim, columns, hidden, draws)

    def fit_embeddings(
        self,
        z_ND: Tensor,
        labels: Sequence[str],
        *,
        keys_ND: Tensor | None = None,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> Self:
        """Fit keys, values and decoder to embeddings, and return the method ready to use.

        Args:
            z_ND: embeddings of the labelled texts, float32 [N, D].
            labels: their classes.
            keys_ND: embeddings that the keys are fitted to. Default: `z_ND`.
            seed: of all random numbers. Default 0.
            progress: called after each epoch.

        Raises:
            IntaglioError: one class, or more than `max_classes`.
        """
        ready = self.start(z_ND if keys_ND is None else keys_ND, sorted(set(labels)), seed=seed)
        ready._train(z_ND, labels, seed, progress, decoder=True)
        return ready

    def start(self, keys_ND: Tensor, classes: Sequence[str], *, seed: int = 0) -> Self:
        """Return the method with fitted and frozen keys and untrained values, for classes that may still grow.

        Raises:
            IntaglioError: fewer than two classes (or `max_classes`), or more than `max_classes`.
        """
        if len(classes) < 2 and self.max_classes is None:
            raise IntaglioError(f"the examples have {len(classes)} class; at least two are needed")
        ready = self.model_copy()
        ready._bottleneck, ready._decoder = self.make(keys_ND.shape[1], len(classes), seed)
        ready._bottleneck.to(keys_ND.device)
        ready._decoder.to(keys_ND.device)
        ready._classes = ()
        ready._classes = ready._extended(classes)
        ready._bottleneck.freeze_splitter()
        for epoch in range(self.init_epochs):
            order_N = torch.randperm(len(keys_ND), generator=generator(seed, "keys", epoch))
            ready._bottleneck.init_keys(keys_ND[rows] for rows in order_N.split(self.batch_size))
        ready._bottleneck.freeze_keys()
        return ready

    def learn_embeddings(
        self, z_ND: Tensor, labels: Sequence[str], *, seed: int = 0, progress: Progress = no_progress
    ) -> None:
        """Train the values on further examples, also of new classes; encoder, keys and decoder stay as they are."""
        self._classes = self._extended(labels)
        self._train(z_ND, labels, seed, progress, decoder=False)

    def _extended(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Return the classes with those of more labels after them; voting gets columns for them."""
        classes = tuple(dict.fromkeys([*self._classes, *sorted(set(labels))]))
        place = self.max_classes
        if place is None and self.head != "voting":
            place = int(self._decoder.layers[-1].out_features)
        if place is not None and len(classes) > place:
            raise IntaglioError(
                f"the examples make {len(classes)} classes with those known; there is place for {place}, which "
                "max_classes sets when dkvb is fitted"
            )
        if self.head == "voting" and len(classes) > self._bottleneck.values.shape[1]:
            self._bottleneck.widen(len(classes))
        return classes

    def _train(self, z_ND: Tensor, labels: Sequence[str], seed: int, progress: Progress, *, decoder: bool) -> None:
        number = {name: index for index, name in enumerate(self._classes)}
        train_values(
            self._bottleneck,
            self._decoder,
            z_ND,
            torch.tensor([number[label] for label in labels], device=z_ND.device),
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            head_learning_rate=self.head_learning_rate if decoder else 0.0,
            label_smoothing=self.label_smoothing,
            max_grad_norm=self.max_grad_norm,
            seed=seed,
            progress=progress,
        )

    @torch.no_grad()
    def probs(self, z_ND: Tensor) -> Tensor:
        """Return the probabilities [N, L] of the known classes for embeddings."""
        self._require_fit()
        self._bottleneck.eval()
        logits_NL = torch.cat([self._decoder(self._bottleneck(z).values) for z in z_ND.split(self.batch_size)])
        return logits_NL[:, : len(self._classes)].softmax(-1)

    @property
    def classes(self) -> tuple[str, ...]:
        """The known classes, in the order of the probabilities."""
        return self._classes

    def _require_fit(self) -> None:
        if self._bottleneck is None:
            raise IntaglioError(
                "dkvb has not been fitted; a recipe with fit: {dkvb: {labels: FILE}} does that, and "
                "load(...).fitted('dkvb') returns it"
            )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def embed(
        self, checkpoint: Checkpoint, inputs: Sequence[Any], batch_size: int = 32, progress: Progress = no_progress
    ) -> Tensor:
        """Return the pooled embeddings [N, D] of texts, or of images (files, arrays or PIL images)."""
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "label": "dkvb: embedding"}
        if is_image_model(checkpoint.config):
            examples = [item if isinstance(item, Mapping) else {"image": item} for item in inputs]
            return embed_images(checkpoint, examples, self.pooling, **options)
        return embed_texts(checkpoint, inputs, self.pooling, max_length=self.length, **options)

    def _embed(self, checkpoint: Checkpoint, examples: LabelledExamples, batch_size: int, progress: Progress) -> Tensor:
        """Return the embeddings of labelled examples; refuse those of another kind than the model takes."""
        takes = "image" if is_image_model(checkpoint.config) else "text"
        if examples.kind != takes:
            raise IntaglioError(f"{checkpoint.source} takes {takes}s; {examples.name} holds {examples.kind}s")
        inputs = [row if takes == "image" else row["text"] for row in examples.rows]
        return self.embed(checkpoint, inputs, batch_size, progress)

    def fit(
        self,
        checkpoint: Checkpoint,
        texts: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Fit keys and values to labelled texts or images of the frozen encoder, and attach them.

        Args:
            checkpoint: any text encoder or decoder with its tokenizer, or an image classifier with its processor.
            texts: labelled examples (objects with `text` or `image`, and `label`) where `labels` is not set; otherwise
                texts or images for `key_texts: recipe`.
            seed: of all random numbers.
            batch_size: examples that are embedded at a time.
            directory: ignored; kept for API compatibility.
            resume: ignored; kept for API compatibility.
            progress: called after each batch and epoch.

        Raises:
            IntaglioError: see the class.
        """
        examples = self._labelled(texts)
        if len(examples.classes) < 2:
            kind, name = examples.kind, examples.name
            raise IntaglioError(f"the labelled {kind}s {name!r} have one class; at least two are needed")
        keys_ND = None
        if self.key_texts == "recipe":
            if self.labels is None or texts is None:
                raise IntaglioError("key_texts is recipe; give labels: FILE, and the texts that the keys are fitted to")
            if is_image_model(checkpoint.config):
                keys_ND = self._embed(checkpoint, load_labelled_examples(texts), batch_size, progress)
            else:
                keys_ND = self.embed(checkpoint, load_texts(texts).documents, batch_size, progress)
        z_ND = self._embed(checkpoint, examples, batch_size, progress)
        labels = [row["label"] for row in examples.rows]
        ready = self.fit_embeddings(z_ND, labels, keys_ND=keys_ND, seed=seed, progress=progress)
        right = ready._accuracy(z_ND, labels)
        chosen = {f"{examples.kind}s": len(examples), "classes": list(ready.classes), "accuracy": right}
        return ready._attach(checkpoint, seed, chosen)

    def learn(
        self, checkpoint: Checkpoint, examples: Any, *, seed: int = 0, progress: Progress = no_progress
    ) -> Checkpoint:
        """Learn further labelled texts or images, also of new classes, and replace the attachment.

        Args:
            checkpoint: the encoder that the method was fitted to.
            examples: a file, a folder or objects; see `load_labelled_examples`.
            seed: of the order of the examples. Default 0.
            progress: called after each batch and epoch.

        Raises:
            IntaglioError: see the class.
        """
        self._require_fit()
        read = load_labelled_examples(examples)
        z_ND = self._embed(checkpoint, read, 32, progress)
        known, labels = self.classes, [row["label"] for row in read.rows]
        self.learn_embeddings(z_ND, labels, seed=seed, progress=progress)
        added = [name for name in self.classes if name not in known]
        chosen = {f"{read.kind}s": len(read), "new_classes": added, "accuracy": self._accuracy(z_ND, labels)}
        return self._attach(checkpoint, seed, chosen)

    def classify(
        self, checkpoint: Checkpoint, texts: Sequence[Any], *, batch_size: int = 32, progress: Progress = no_progress
    ) -> list[dict[str, float]]:
        """Return the probability of every class for each text or image; see `Classifier`."""
        self._require_fit()
        if not texts:
            return []
        probs_NL = self.probs(self.embed(checkpoint, texts, batch_size, progress))
        return [dict(zip(self.classes, row, strict=True)) for row in probs_NL.tolist()]

    def _labelled(self, texts: Any) -> LabelledExamples:
        if self.labels is not None:
            return load_labelled_examples(self.labels)
        if isinstance(texts, (LabelledTexts, LabelledImages)) or (
            isinstance(texts, Sequence) and texts and all(isinstance(item, Mapping) for item in texts)
        ):
            return load_labelled_examples(texts)
        raise IntaglioError("labels is missing; dkvb is fitted to labelled texts or images, so give labels: FILE")

    def _accuracy(self, z_ND: Tensor, labels: Sequence[str]) -> float:
        """Return the accuracy on the examples just learned."""
        chosen = self.probs(z_ND).argmax(-1).tolist()
        hits = sum(self.classes[index] == label for index, label in zip(chosen, labels, strict=True))
        return hits / len(labels)

    def _attach(self, checkpoint: Checkpoint, seed: int, chosen: dict[str, Any]) -> Checkpoint:
        networks = {"bottleneck": self._bottleneck, "decoder": self._decoder}
        tensors = to_store(nn.ModuleDict(networks).state_dict())
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen, verb="fit")
        about = {"classes": list(self._classes), "model": fingerprint(checkpoint.model)}
        checkpoint.attach(self.slug, tensors, self.model_dump(), about)
        return checkpoint

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the method, ready to use, from its attachment.

        Args:
            attachment: of the checkpoint.
            checkpoint: the encoder.
            **fields: override those of the fit; see `OVERRIDABLE`.

        Raises:
            IntaglioError: a field that cannot change after the fit, or an attachment of another model.
        """
        method = attachment.restored(cls, fields, OVERRIDABLE)
        classes, tensors = tuple(attachment.about.get("classes", ())), attachment.tensors
        width = embedding_width(checkpoint)
        bottleneck, decoder = method.make(width, max(2, len(classes)))
        parts = {f"bottleneck.{n}": v for n, v in bottleneck.state_dict().items()}
        parts |= {f"decoder.{n}": v for n, v in decoder.state_dict().items()}
        if {n: v.shape for n, v in parts.items()} != {n: v.shape for n, v in tensors.items()}:
            raise IntaglioError(
                f"the attachment dkvb does not fit {type(checkpoint.model).__name__} of width {width}; it belongs to "
                f"another checkpoint ({json.dumps(attachment.about.get('model', 'unknown'))})"
            )
        for name, network in (("bottleneck", bottleneck), ("decoder", decoder)):
            own = {n.removeprefix(f"{name}."): v for n, v in tensors.items() if n.startswith(f"{name}.")}
            network.load_state_dict(own)
        bottleneck.freeze_keys()
        method._bottleneck, method._decoder, method._classes = bottleneck.eval(), decoder.eval(), classes
        return method

    def estimate_fit(self, workload: Workload, texts: Any) -> Cost:
        """Estimate embedding the texts, fitting the keys and training the values."""
        count = len(load_labelled_examples(self.labels)) if self.labels else len(load_texts(texts))
        keys = count if self.key_texts == "labelled" else len(load_texts(texts))
        embedded = count if keys is count else count + keys
        pairs = self.num_codebooks * self.num_pairs
        lookups = 2.0 * pairs * self.key_dim * (keys * self.init_epochs + count)
        values = self.max_classes or 16
        return Cost(
            flops=2.0 * workload.block_parameters * embedded * self.length + lookups,
            extra_bytes=4 * (pairs * (2 * self.key_dim + values) + embedded * workload.hidden),
        )
