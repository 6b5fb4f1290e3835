"""Refrag (Lin et al., 2025): retrieved passages reach a decoder as one embedding a chunk instead of as its tokens.

    intaglio.Refrag(chunk_size=16).fit(ckpt, texts)                # or a recipe with fit: {refrag: {...}}
    refrag = ckpt.fitted("refrag")
    passages = refrag.compress(ckpt, ["...", "..."])               # cached beside the passages by `intaglio ask`
    refrag.answer(ckpt, "Who built the tower?", passages)

- `compressor.py`: encoder of chunks, projection, expansion policy
- `passages.py`: compressed passages, expanders, mixed prompts; `functional.py`: layout, curriculum, GRPO
- `training_rows.py`: rows of the stages; `policy_training.py`: stage C
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment, to_store
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.retrieval.refrag.compressor import EMBEDDING, ChunkReader, Compressor, make_compressor
from intaglio.methods.retrieval.refrag.functional import (
    draw_length,
    effective_rate,
    expansion_count,
    is_compressible,
    layout,
)
from intaglio.methods.retrieval.refrag.passages import (
    Expander,
    MixedPrompt,
    Passage,
    choose_expanded,
    chunk_losses,
    compress_passages,
    compressible_chunks,
    generate_answer,
    mixed_embeddings,
    mixed_prompt,
    prompt_pieces,
)
from intaglio.methods.retrieval.refrag.policy_training import train_policy
from intaglio.methods.retrieval.refrag.training_rows import (
    Order,
    bos_ids,
    document_rows,
    passage_ids,
    passages_of,
    question_parts,
    question_rows,
    read_questions,
    text_ids,
)
from intaglio.trainer.causal_lm import IGNORED, check_causal, cross_entropy
from intaglio.trainer.dataset import read_rows
from intaglio.trainer.loop import train
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG

Stage = Literal["reconstruction", "continual", "task", "policy"]
STAGES: tuple[Stage, ...] = ("reconstruction", "continual", "policy")
"""Default stages of a fit."""
LEARNING_RATES: dict[str, float] = {"reconstruction": 2e-4, "continual": 5e-5, "task": 2e-5, "policy": 1e-4}
"""Peak learning rates of the stages; that of the policy is ours."""
WARMUP = 0.04
LENGTH = 256
"""Longest default context of a training row, in tokens."""
OVERRIDABLE = frozenset({"expand", "expander"})
"""Fields that may change after the fit."""
ARCHITECTURE = ("chunk_size", "encoder", "encoder_width", "encoder_depth", "pooling", "projection", "match_scale")
"""Fields that decide the compressor's weights."""

Positive = Annotated[int, Field(ge=1)]


class Refrag(Method, slug="refrag"):
    """Compressed context: chunks of k tokens as one projected embedding each, a few of them expanded to tokens.

        e_i = phi(pool(E(chunk_i))),      input = [tokens of the question, e_1 .. e_L]      q + L positions, not q + s

    The decoder itself is stock (`inputs_embeds`): causal attention, consecutive positions over the short sequence. An
    e_i depends on its chunk alone, so an index caches it. A share p of the chunks stays tokens, in place: q + (1 - p) L
    + p L k positions.

    Stages: `reconstruction` (A) trains E and phi to let the frozen decoder repeat the chunks' tokens; `continual` (B)
    predicts the tokens after them; `task` (D) the answers to questions about passages. Their number of chunks follows a
    curriculum (A and B). `policy` (C) trains the choice of expanded chunks by GRPO, with the log-likelihood of the next
    tokens as the reward. A `fit` step runs the stages in order and leaves the decoder alone. The decoder is trained too
    by `train: {objective: {refrag: {stages: [continual]}}}`, one stage a step, each from the last step's compressor;
    reconstruction then needs `freeze: true`, and the policy follows by `fit: {refrag: {stages: [policy]}}`.

    Args:
        chunk_size: tokens k of a chunk. Default 16.
        tail: a passage's shorter last chunk is one embedding too (`encode`), or stays tokens (`tokens`). Default
            `encode`.
        encoder: name or directory of a pretrained encoder, which reads the chunks' decoded text; `embedding`, the mean
            of the decoder's own embeddings. Default: a new encoder of the decoder's ids.
        encoder_width: of a new encoder. Default: the decoder's width.
        encoder_depth: layers of a new encoder. Default 2.
        pooling: `cls`, the encoder's first state, or `mean`. Default `cls`.
        projection: `mlp`, two layers, or `identity`. Default `mlp`.
        match_scale: whether embeddings are normalised to the root mean square of the decoder's, times a learned scale;
            an extension. Default false.
        order: whether question or passages come first. Default `question_first`, as in the paper.
        stages: see above. Default: reconstruction, continual, policy.
        questions: (task, policy) file with a JSON object a line: `question`, `answer`, `passages`.
        length: tokens s of a training context, a multiple of `chunk_size`. Default: half the context, at most 256.
        target_length: tokens o after the context that are predicted. Default: as `length`.
        curriculum: whether stages A and B begin with few chunks. Default true.
        steps: optimizer steps of a stage (fit). Default 300.
        batch_size: rows of a step (fit). Default 8.
        learning_rate: peak learning rate of every stage (fit). Default: 2e-4, 5e-5, 2e-5 for A, B, D as in the paper,
            1e-4 for the policy.
        expand: share p of the chunks that stay tokens, while the policy is trained and after. Default 0.1.
        expander: chooses them: `policy`; `cosine`, nearest to the question's state; `high_perplexity` or
            `low_perplexity`, by the decoder's loss on the chunk; `random`. Default `policy`.
        group_size: (policy) sets G sampled of a context. Default 8.
        clip: (policy) of the probability ratio. Default 0.2.
        updates: (policy) optimizer updates on each sample. Default 2.

    Raises:
        IntaglioError: a decoder, text or option that does not fit.

    Source: Lin et al., REFRAG: Rethinking RAG based Decoding, 2025, arXiv 2509.01092. No official code was published;
    the pooling, GELU, the curriculum's ratios and the details of GRPO are choices within the paper's description.
    """

    kinds = ("objective",)
    summary = "compresses retrieved passages to one embedding a chunk, and expands a few chunks by a learned policy"
    citation = "Lin et al., REFRAG: Rethinking RAG based Decoding, 2025"
    url = "https://arxiv.org/abs/2509.01092"
    fitted: ClassVar[bool] = True
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    chunk_size: Positive = 16
    tail: Literal["encode", "tokens"] = "encode"
    encoder: Annotated[str, Field(min_length=1)] | None = None
    encoder_width: Annotated[int, Field(ge=2)] | None = None
    encoder_depth: Positive = 2
    pooling: Literal["cls", "mean"] = "cls"
    projection: Literal["mlp", "identity"] = "mlp"
    match_scale: bool = False
    order: Order = "question_first"
    stages: Annotated[list[Stage], Field(min_length=1)] = Field(default_factory=lambda: list(STAGES))
    questions: Annotated[str, Field(min_length=1)] | None = None
    length: Positive | None = None
    target_length: Positive | None = None
    curriculum: bool = True
    steps: Positive = 300
    batch_size: Positive = 8
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    expand: Annotated[float, Field(ge=0, le=1)] = 0.1
    expander: Expander = "policy"
    group_size: Annotated[int, Field(ge=2)] = 8
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    updates: Positive = 2

    _compressor: Any = PrivateAttr(None)
    _reader: Any = PrivateAttr(None)
    _bos: Any = PrivateAttr(None)
    _context: int = PrivateAttr(0)
    _held: bool = PrivateAttr(False)
    """True between the stages of a fit: `prepare` keeps the compressor."""
    _asked: bool = PrivateAttr(False)
    """True where a fit got questions with passages instead of texts."""
    _sizes: tuple[int, int] = PrivateAttr((0, 0))
    """Tokens of a context and of its targets."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.length is not None and self.length % self.chunk_size:
            raise ValueError(f"length is {self.length}; a multiple of chunk_size, {self.chunk_size}, is accepted")
        if self.encoder is not None and self.encoder_width is not None:
            raise ValueError("encoder_width is of a new encoder; leave out encoder or encoder_width")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the settings of the paper: RoBERTa-large, rows of 2,048 and 2,048 tokens, batches of 256."""
        sizes = {"encoder": "FacebookAI/roberta-large", "length": 2048, "target_length": 2048, "batch_size": 256}
        return cls(**{**sizes, **overrides})

    @property
    def compressor(self) -> Compressor | None:
        """The compressor, after `prepare`, `restore` or `untrained`."""
        return self._compressor

    def rate(self, share: float | None = None) -> float:
        """Return tokens of context per position, k / (1 - p + k p)."""
        return effective_rate(self.chunk_size, self.expand if share is None else share)

    # --- training ---------------------------------------------------------------------------------------------------

    def make(self, checkpoint: Checkpoint, seed: int) -> tuple[Compressor, ChunkReader]:
        """Return the compressor and its reader: those of the checkpoint's attachment, or untrained ones.

        Raises:
            IntaglioError: the attachment has another architecture or belongs to another decoder.
        """
        compressor, reader = make_compressor(
            checkpoint, self.encoder, self.encoder_width, self.encoder_depth, self.chunk_size, seed,
            pooling=self.pooling, projection=self.projection, match_scale=self.match_scale,
        )  # fmt: skip
        attachment = checkpoint.attachments.get(self.slug)
        if attachment is not None:
            for name in ARCHITECTURE:
                if attachment.parameters.get(name) != getattr(self, name):
                    raise IntaglioError(
                        f"{name} is {getattr(self, name)}; the attachment refrag was trained with "
                        f"{attachment.parameters.get(name)}"
                    )
            own = {name.removeprefix("compressor."): value for name, value in attachment.tensors.items()}
            if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in compressor.state_dict().items()}:
                raise IntaglioError(
                    f"the attachment refrag does not fit {type(checkpoint.model).__name__}; it belongs to another "
                    "checkpoint"
                )
            compressor.load_state_dict(own)
        return compressor.to(checkpoint.device), reader

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Make the compressor, and rows of the stage."""
        check_causal(checkpoint, packing=False)
        if not self._held and (rng.training or self._compressor is None):
            if len(self.stages) > 1 or self.stages == ["policy"]:
                raise IntaglioError(
                    f"stages is {', '.join(self.stages)}; a train step takes one of reconstruction, continual and task,"
                    " and fit: {refrag: {...}} all of them"
                )
            self._begin(checkpoint, rng.seed)
        return self._rows(checkpoint, examples, self.stages[0])

    def _begin(self, checkpoint: Checkpoint, seed: int) -> None:
        self._compressor, self._reader = self.make(checkpoint, seed)
        self._bos, self._context = bos_ids(checkpoint), checkpoint.context

    def _rows(self, checkpoint: Checkpoint, examples: Iterable[Example], stage: Stage) -> Iterable[Example]:
        if stage in ("task", "policy") and self.questions is not None:
            return question_rows(checkpoint, read_questions(self.questions), self.order)
        if stage == "task" or (stage == "policy" and self._asked):
            return question_rows(checkpoint, examples, self.order)
        length, target = self._sizes = self._lengths(checkpoint, stage)
        # The tokens of reconstruction are the context's own; those of other stages follow it.
        if stage == "reconstruction":
            return document_rows(checkpoint, examples, length, self.chunk_size)
        return document_rows(checkpoint, examples, length + target, self.chunk_size + 1)

    def _lengths(self, checkpoint: Checkpoint, stage: Stage) -> tuple[int, int]:
        """Return the tokens of a context and of its targets."""
        size = self.chunk_size
        length = self.length or size * max(1, min(LENGTH, checkpoint.context // 2) // size)
        target = length if stage == "reconstruction" else self.target_length or length
        chunks = length // size
        more = expansion_count(chunks, self.expand) * (size - 1) if stage == "policy" else 0
        positions = len(self._bos) + chunks + more + target - 1  # the last target is predicted, not read
        if positions > checkpoint.context:
            raise IntaglioError(
                f"length {length} and target_length {target} take {positions} positions; the model's context is "
                f"{checkpoint.context}"
            )
        return length, target

    def modules(self) -> nn.ModuleDict:
        """Return the compressor, which is trained with the model."""
        return nn.ModuleDict({} if self._compressor is None else {"compressor": self._compressor})

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a batch of mixed rows; in stages A and B each row draws its number of chunks from the curriculum."""
        return self.batch([self._split(row, self.stages[0], rng) for row in examples], [()] * len(examples))

    def _split(self, row: Example, stage: Stage, rng: KeyedRNG) -> Example:
        """Return a text's row as context and answer; the number of chunks is drawn while training."""
        if "document" not in row:
            return row
        ids_T, size, (length, target) = row["document"], self.chunk_size, self._sizes
        own = stage == "reconstruction"
        # A short text is divided as a whole one.
        count = max(1, min(length, len(ids_T) if own else len(ids_T) * length // (length + target)) // size)
        if self.curriculum and rng.training:
            count = draw_length(count, row.get("step", 0) / max(1, row.get("steps", 1)), rng(row, "refrag"))
        context, after = ids_T[: count * size], ids_T[count * size :]
        answer, none = context if own else after[:target], ids_T[:0]
        parts = {"context": context, "before": none, "after": none, "answer": answer, "labels": answer}
        return {**row, **parts, "passages": torch.tensor([len(context)])}

    def batch(self, rows: Sequence[Example], expanded: Sequence[Sequence[int]]) -> Batch:
        """Return rows as `input_ids`, `slots`, `target`, `attention_mask` [B, T], and the table of their chunks."""
        chunks: list[Tensor] = []
        ids, slots, targets = [], [], []
        for row, kept in zip(rows, expanded, strict=True):
            before = row["before"] if len(row["before"]) else self._bos
            passages = passages_of(row)
            pieces = prompt_pieces(before, passages, row["after"], self.chunk_size, self.tail, kept)
            prompt_T, slot_T = layout(pieces)
            slots.append(torch.cat([torch.where(slot_T < 0, slot_T, slot_T + len(chunks)), row["answer"][:-1] * 0 - 1]))
            ids.append(torch.cat([prompt_T, row["answer"][:-1]]))
            if len(ids[-1]) > self._context:
                raise IntaglioError(
                    f"a training row takes {len(ids[-1])} positions; the model's context is {self._context}"
                )
            targets.append(torch.cat([torch.full((len(prompt_T) - 1,), IGNORED), row["labels"]]))
            chunks += compressible_chunks(passages, self.chunk_size, self.tail)
        chunk_ids, chunk_mask = self._reader(chunks)
        values = {"input_ids": (ids, 0), "slots": (slots, -1), "target": (targets, IGNORED)}
        batch: Batch = {
            name: nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)
            for name, (parts, value) in values.items()
        }
        lengths = torch.tensor([len(row) for row in ids])
        mask_BT = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).to(torch.int64)
        weight = int((batch["target"] != IGNORED).sum())
        return {**batch, "attention_mask": mask_BT, "chunk_ids": chunk_ids, "chunk_mask": chunk_mask, "weight": weight}

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Return the mean negative log-likelihood of the targets; chunks and questions have none.

        Raises:
            IntaglioError: the decoder is trained in the stage reconstruction.
        """
        if self.stages[0] == "reconstruction" and any(p.requires_grad for p in model.parameters()):
            raise IntaglioError("reconstruction trains the compressor of a frozen decoder; set freeze: true")
        embedding = model.get_input_embeddings()
        states_NE = self._compressor.states(batch["chunk_ids"], batch["chunk_mask"], embedding)
        chunks_ND = self._compressor.project(states_NE, embedding)
        inputs_BTD = mixed_embeddings(model, batch["input_ids"], batch["slots"], chunks_ND)
        logits_BTV = model(inputs_embeds=inputs_BTD, attention_mask=batch["attention_mask"], use_cache=False).logits
        return Loss(cross_entropy(logits_BTV, batch["target"]), outputs=logits_BTV)

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
        """Run the stages on the frozen decoder, and attach the compressor.

        Args:
            checkpoint: a decoder, with its tokenizer where text is read.
            texts: texts for `load_texts`; questions with passages for the stages task and policy, if `questions` is
                not set. An attached compressor is trained further.
            seed: of the compressor and of all draws.
            batch_size: ignored; the field of that name is used.
            directory: for the states of stages, from which a stopped fit resumes. Default: none.
            resume: whether to continue from them. Default False.
            progress: called after each optimizer step.

        Raises:
            IntaglioError: see the class.
        """
        check_causal(checkpoint, packing=False)
        self._check_trains()
        held = self.model_copy()
        held._begin(checkpoint, seed)
        held._held = True
        held._asked = isinstance(texts, Sequence) and bool(texts) and isinstance(texts[0], Mapping)
        losses: dict[str, float | None] = {}
        for number, stage in enumerate(self.stages):
            own = held.model_copy(update={"stages": [stage]})
            if stage == "task" and self.questions is None and not held._asked:
                raise IntaglioError("questions is missing; the stage task is trained on questions with passages")
            data = [{}] if self.questions is not None and stage in ("task", "policy") else texts
            if data is None:
                raise IntaglioError(f"the stage {stage} is trained on texts; give refrag some")
            place = None if directory is None else directory / f"{number}-{stage}"
            losses[stage] = own._run(checkpoint, data, stage, seed, place, resume, progress)
        held._compressor.eval().requires_grad_(False)
        tensors = to_store(held._compressor.state_dict(), "compressor.")
        chosen = {"steps": self.steps, "loss": {stage: loss for stage, loss in losses.items() if loss is not None}}
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen, verb="fit")
        checkpoint.attach(self.slug, tensors, self.model_dump(), {"model": fingerprint(checkpoint.model)})
        return checkpoint

    def _check_trains(self) -> None:
        bare = self.encoder == EMBEDDING and self.projection == "identity" and not self.match_scale
        if bare and any(stage != "policy" for stage in self.stages):
            raise IntaglioError("encoder: embedding with projection: identity has no weights that a fit could train")
        if "policy" in self.stages and not self.expand:
            raise IntaglioError("expand is 0, so the policy has nothing to choose; a share above 0 is accepted")

    def _run(
        self,
        checkpoint: Checkpoint,
        data: Any,
        stage: Stage,
        seed: int,
        directory: Path | None,
        resume: bool,
        progress: Progress,
    ) -> float | None:
        """Train a stage, and return its last loss (of the policy, minus the last mean reward)."""
        rate = LEARNING_RATES[stage] if self.learning_rate is None else self.learning_rate
        sizes: dict[str, Any] = {"steps": self.steps, "batch_size": self.batch_size, "learning_rate": rate}
        if stage != "policy":
            trained = train(
                checkpoint, data, objective=self, freeze=True, note=False, keep_mask=False, directory=directory,
                resume=resume, progress=progress, warmup=WARMUP, seed=seed % (1 << 32), **sizes,
            )  # fmt: skip
            loss = [row.loss for row in trained.history if row.loss is not None]
            return loss[-1] if loss else None
        rows = read_rows(checkpoint, data, self, KeyedRNG(seed))
        if rows.table is None:
            raise IntaglioError("the policy is trained on texts in memory; a stream is not accepted")
        whole = [self._split(row, stage, KeyedRNG(seed, training=False)) for row in rows.table]
        curve = train_policy(
            checkpoint, self._compressor, whole, self.batch, share=self.expand, groups=self.group_size,
            clip=self.clip, updates=self.updates, seed=seed, data=rows.digest, directory=directory, resume=resume,
            progress=progress, **sizes,
        )  # fmt: skip
        return -curve[-1]

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the method, ready to use, from its attachment.

        Args:
            attachment: of the checkpoint.
            checkpoint: the decoder.
            **fields: override those of the fit; see `OVERRIDABLE`.

        Raises:
            IntaglioError: a field that cannot change after the fit, or an attachment of another model.
        """
        method = attachment.restored(cls, fields, OVERRIDABLE)
        return method._ready(checkpoint, 0)

    def untrained(self, checkpoint: Checkpoint, seed: int = 0) -> Self:
        """Return the method with random weights, for an unfitted checkpoint: good for measuring speed alone."""
        return self.model_copy()._ready(checkpoint, seed)

    def _ready(self, checkpoint: Checkpoint, seed: int) -> Self:
        self._begin(checkpoint, seed)
        self._compressor.eval().requires_grad_(False)
        return self

    def estimate_fit(self, workload: Workload, texts: Any) -> Cost:
        """Estimate the passes of the frozen decoder over short rows, and those of the encoder over the context."""
        length = self.length or LENGTH
        target = self.target_length or length
        encoder = 12.0 * self.encoder_depth * (self.encoder_width or workload.hidden) ** 2
        flops = 0.0
        for stage in self.stages:
            rows = self.steps * self.batch_size
            positions = length // self.chunk_size + target
            if stage == "policy":
                mixed = positions + self.expand * length
                flops += rows * (2.0 * workload.parameters * self.group_size * mixed + 2.0 * encoder * length)
            else:
                flops += rows * (4.0 * workload.parameters * positions + 6.0 * encoder * length)
        positions = self.batch_size * (length // self.chunk_size + target)
        return Cost(flops=flops, extra_bytes=int(positions * workload.hidden * 4 * 12 * workload.blocks))

    # --- answering --------------------------------------------------------------------------------------------------

    def compress(
        self, checkpoint: Checkpoint, passages: Sequence[str | Tensor], *, losses: bool | None = None
    ) -> list[Passage]:
        """Return passages with their chunk embeddings; each is independent of the others and of the question.

        Args:
            checkpoint: the decoder that the compressor was fitted to.
            passages: texts, or token ids, int64 [S].
            losses: whether the decoder's loss on each chunk is measured, which the perplexity expanders need. Default:
                if the expander is one of them.

        Raises:
            IntaglioError: nothing was fitted, or a passage without text.
        """
        self._require_fit()
        ids = [passage_ids(checkpoint, text) if isinstance(text, str) else text for text in passages]
        for number, (text, ids_S) in enumerate(zip(passages, ids, strict=True), 1):
            if not len(ids_S) or (isinstance(text, str) and not text.strip()):
                raise IntaglioError(f"passage {number} has no text, so there is nothing to compress")
        made = compress_passages(checkpoint, self._compressor, self._reader, ids, self.chunk_size, self.tail)
        if losses or (losses is None and "perplexity" in self.expander):
            return [self.with_losses(checkpoint, passage) for passage in made]
        return made

    def with_losses(self, checkpoint: Checkpoint, passage: Passage) -> Passage:
        """Return a passage with the decoder's loss on each chunk."""
        count = len(passage.states)
        measured = chunk_losses(checkpoint, passage.ids, self._bos, self.chunk_size, count)
        return Passage(passage.ids, passage.states, passage.embeddings, measured)

    def from_cache(self, checkpoint: Checkpoint, text: str, tensors: Mapping[str, Tensor]) -> Passage | None:
        """Return a passage from cached tensors; None if they are not those of the text."""
        ids_S = passage_ids(checkpoint, text)
        count = sum(is_compressible(ids_S, self.chunk_size, self.tail))
        width = int(checkpoint.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        shapes = {"states": (count, self._compressor.state_width), "embeddings": (count, width), "losses": (count,)}
        if not {"states", "embeddings"} <= tensors.keys() <= shapes.keys():
            return None
        if any(tuple(value.shape) != shapes[name] for name, value in tensors.items()):
            return None
        return Passage(ids_S, **tensors)

    def space(self, checkpoint: Checkpoint) -> str:
        """Return what identifies cached passages: decoder, compressor with its pooling, chunk size and tail."""
        weights = (fingerprint(checkpoint.model), fingerprint(self._compressor))
        parts = (*weights, self.pooling, str(self.chunk_size), self.tail)
        return ":".join(parts)

    def prompt(
        self, checkpoint: Checkpoint, question: str | tuple[Tensor, Tensor], passages: Sequence[Passage], seed: int = 0
    ) -> MixedPrompt:
        """Return the mixed prompt of a question; the passages' order is kept.

        Args:
            checkpoint: the decoder.
            question: its text, put into the chat template if there is one; or the token ids before and after the
                passages.
            passages: from `compress`.
            seed: of the expander `random`. Default 0.

        Raises:
            IntaglioError: nothing was fitted, or the passages lack the losses that the expander needs.
        """
        self._require_fit()
        before, after = question_parts(checkpoint, question, self.order) if isinstance(question, str) else question
        question_E = None
        if self.expander == "cosine":
            asked = text_ids(checkpoint, question) if isinstance(question, str) else torch.cat([before, after])
            (encoded,) = compress_passages(
                checkpoint, self._compressor, self._reader, [asked], self.chunk_size, "encode"
            )
            question_E = encoded.states.mean(0)
        if "perplexity" in self.expander and any(passage.losses is None for passage in passages):
            raise IntaglioError(f"the expander {self.expander} needs the passages' losses; compress with losses=True")
        expanded = choose_expanded(
            passages, self.expand, self.expander, compressor=self._compressor, question_E=question_E, seed=seed
        )
        return mixed_prompt(before, passages, after, self.chunk_size, self.tail, expanded)

    def answer(
        self,
        checkpoint: Checkpoint,
        question: str,
        passages: Sequence[Passage],
        *,
        max_new_tokens: int = 128,
        streamer: Any = None,
    ) -> str:
        """Return the greedy answer to a question from compressed passages."""
        ids = generate_answer(checkpoint, self.prompt(checkpoint, question, passages), max_new_tokens, streamer)
        text: str = checkpoint.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _require_fit(self) -> None:
        if self._compressor is None:
            raise IntaglioError(
                "refrag has not been fitted; a recipe with fit: {refrag: {}} does that, and load(...).fitted('refrag') "
                "returns it"
            )


__all__ = ["MixedPrompt", "Passage", "Refrag", "generate_answer", "mixed_embeddings"]
