"""What a method that owns trained heads does: its settings, `fit` and `restore`, and the start of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Progress, Workload, no_progress
from intaglio.speculative.drafters.draft_model import draft_law
from intaglio.speculative.heads.chunked_loss import ROWS
from intaglio.speculative.heads.lm_head import MOST_WORDS, words_of
from intaglio.speculative.heads.objective import LENGTH, measured_chances, train_heads
from intaglio.speculative.heads.self_generated_data import own_text, prompts_of, to_go_on_from
from intaglio.speculative.heads.static_tree import Picker, Shape, assumed, likely, worth
from intaglio.speculative.protocols import Run, Session
from intaglio.speculative.target_model import Reader
from intaglio.trainer.protocols import Example

HELD_OUT = 20
"""One in so many texts is not trained on."""


class TrainedHeads(BaseModel):
    """The settings that every method with trained heads has.

    A subclass adds those of its heads, names them in `architecture`, and makes heads (`make`) and sessions (`begin`).
    This stands before `verify.decoder.Drafting` in a method's bases, which makes it a decoder.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    architecture: ClassVar[tuple[str, ...]] = ()
    needs_hidden: ClassVar[bool] = True
    level_cost: ClassVar[float] = 0.0
    """What drafting takes for each level of a tree, in passes of the target over one token."""
    slug: ClassVar[str]

    nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Drafted tokens of a tree. Default: as many as are worth their cost, see `token_cost`."""
    tree: list[list[Annotated[int, Field(ge=0)]]] | None = None
    """The nodes of the static tree, each by the ranks of its path (`[[0], [1], [0, 0]]`). Default: the best tree for
    the chances of each rank that were measured at the end of the training."""
    token_cost: Annotated[float, Field(ge=0, le=100)] = 0.035
    """What each drafted token adds to the cost of a pass, in passes over one token: of it, and of what the method's own
    drafting takes, follows how large a tree is where neither `nodes` nor `tree` says so. Default 0.035, as measured on
    a CPU; about 0.002 on a GPU, where rows cost nearly nothing."""
    drawn: bool = True
    """Under sampling, whether candidates are drawn from the heads and verified by recursive rejection (default), or are
    the most likely ones, of which the target's own draw may hit one."""
    draft_temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """Of the heads when they draw. Default: the target's."""
    vocabulary: Annotated[int, Field(ge=1)] | None = None
    """Tokens that the heads may guess: the most frequent ones of what they are trained on. Default: 8,192 where the
    model has more than twice as many, else all. Output does not depend on it; the time of a draft and of the training
    does."""
    own_text: bool = True
    """Whether heads are trained on what the model itself writes behind the first tokens of the texts (default), or on
    the texts as they are."""
    samples: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    """Texts that are used at the most. Where the model writes and there are fewer documents, it goes on from pieces of
    about 2,000 characters of them, but with `chat`. Default 1,000."""
    prompt: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Tokens of a text that the model goes on from. Default 32."""
    text_temperature: Annotated[float, Field(ge=0, le=100)] = 0.7
    """Of what it writes; 0 is greedy. Default 0.7."""
    text_batch: Annotated[int, Field(ge=1, le=4096)] = 16
    """Texts that it writes at a time; another number draws other texts. Default 16; give more on an accelerator."""
    chat: bool = False
    """Whether prompts are put into the chat template. Default false."""
    length: Annotated[int, Field(ge=4, le=100_000)] | None = None
    """Tokens of a training row, and of a text with its prompt. Default: 256, or the context where it is shorter."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the rows. Default 2."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, in the place of `epochs`."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rows of a batch. Default 8."""
    accumulate: Annotated[int, Field(ge=1, le=4096)] = 1
    """Batches of an optimizer step. Default 1."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """At its highest, cosine to 0."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the steps in which the rate rises. Default 0.01."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training's passes: `bfloat16` (autocast, the heads stay in float32) is faster on processors that have it.
    Default `float32`."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two states that a killed run goes on from. Default: a tenth of them."""
    untrained: bool = False
    """Let heads draft that were never trained (`seed` draws them): the output is the same, only slower. Default false:
    that is refused."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of untrained heads."""

    _heads: Any = PrivateAttr(None)
    _about: dict[str, Any] = PrivateAttr(default_factory=dict)

    # --- what a subclass gives --------------------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """Levels of a tree that the heads can fill."""
        raise NotImplementedError

    def make(self, model: nn.Module, seed: int, tokens_K: Tensor | None = None) -> Any:
        """Untrained heads for a model, in float32 on the CPU.

        Args:
            model: the target.
            seed: of what is drawn.
            tokens_K: the tokens that may be guessed; see `intaglio.speculative.heads.lm_head.Words`. Default: all.

        Raises:
            IntaglioError: a setting that does not fit the model.
        """
        raise NotImplementedError

    def begin(self, heads: Any, run: Run, picker: Picker, shape: Shape) -> Session:
        """A session.

        Args:
            heads: on the target's device, in its dtype.
            run: the run.
            picker: takes candidates from a draft's logits.
            shape: the static tree.
        """
        raise NotImplementedError

    def rows_a_node(self) -> float:
        """Rows that a node takes in a pass of the target, its own among them."""
        return 1.0

    def head_flops(self, workload: Workload) -> float:
        """Operations of the heads' training a token, beyond the model's own pass.

        Args:
            workload: of the model.
        """
        raise NotImplementedError

    def head_bytes(self, workload: Workload) -> float:
        """Bytes that the heads' training keeps of each token of a batch for the gradient.

        Args:
            workload: of the model.
        """
        raise NotImplementedError

    def guessed(self, workload: Workload) -> float:
        """How many tokens the heads may guess.

        Args:
            workload: of the model.
        """
        whole = _vocabulary(workload)
        most = self.vocabulary or (MOST_WORDS if whole > 2 * MOST_WORDS else whole)
        return min(most, whole)

    # --- drafting ---------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        """The static tree."""
        if self.tree is not None:
            return Shape.of(self.tree)
        chances = self._about.get("chances") or assumed(self.levels)
        if self.nodes is not None:
            return likely(self.nodes, chances)
        return worth(chances, self.token_cost * self.rows_a_node(), self.level_cost)

    def start(self, run: Run) -> Session:
        """Begin a run; see `Drafter.start`.

        Args:
            run: what is known before the first pass.

        Raises:
            IntaglioError: there are no heads, they belong to another model, or the tree does not fit them.
        """
        heads = self._heads_for(run.model).to(device=run.model.device, dtype=run.model.dtype).eval()
        picker = Picker(draft_law(run, self.draft_temperature), run.sampling and self.drawn, run.generator, heads.words)
        return self.begin(heads, run, picker, self.shape)

    def _heads_for(self, model: nn.Module) -> Any:
        slug, own = self.slug, fingerprint(model)
        if self._heads is None:
            if not self.untrained:
                raise IntaglioError(
                    f"{slug} has no heads; a recipe with the step fit: {{{slug}: {{}}}} trains them, and "
                    f"load(...).decoder({slug!r}) has them"
                )
            rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
            self._heads = self.make(model, self.seed, words_of((), rows, self.vocabulary))
            self._about["model"] = own
        if own not in (self._about.get("model"), self._about.get("float16")):
            raise IntaglioError(
                f"the heads of {slug} were trained for another checkpoint than this {type(model).__name__}; fit them "
                "again"
            )
        return self._heads

    # --- training ---------------------------------------------------------------------------------------------------

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
        """Train the heads and attach them to a checkpoint, whose weights stay as they are.

        The same arguments give the same heads; so does a run that was killed and goes on in the same `directory`.

        Args:
            checkpoint: a decoder with its tokenizer.
            texts: a name for `load_texts`, texts, or a corpus; examples with `input_ids` are trained on as they are.
            seed: of the heads, of the text that the model writes, and of the order of the rows.
            batch_size: not used; the field of that name is.
            directory: where the training keeps what it needs to go on. Default: nowhere.
            resume: whether to go on with what is there. Default False.
            progress: called as text is written and after each optimizer step.

        Raises:
            IntaglioError: no texts, a model that heads cannot be trained on, or as `intaglio.train`.
        """
        slug = self.slug
        Reader(checkpoint.model)  # an encoder, or attention that takes no mask: refused before any work
        self.make(checkpoint.model, seed)  # settings that do not fit the model: refused before any work, too
        self._check_tree()
        examples = self._examples(checkpoint, texts, seed, progress)
        heads = self.make(checkpoint.model, seed, self.words(checkpoint, examples))
        length = self._length(checkpoint)
        trained_on, held_out = split(examples)
        trained, noted = train_heads(
            checkpoint,
            heads,
            trained_on,
            settings={slug: self.model_dump()},
            length=length,
            directory=directory,
            resume=resume,
            progress=progress,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            precision=self.precision,
            save_every=self.save_every,
            seed=seed % (1 << 32),
            **({"steps": self.steps} if self.steps is not None else {"epochs": self.epochs}),
        )
        # Stored in bfloat16, and used as they are stored, so that a reload drafts the very same trees.
        tensors = stored(heads)
        parameters = self.model_dump()
        last = trained.history[-1]
        checkpoint.record_step(
            slug,
            parameters,
            seed=seed,
            chosen={
                **noted,
                "parameters": sum(value.numel() for value in tensors.values()),
                "bytes": sum(value.nbytes for value in tensors.values()),
                "last": {name: round(value, 4) for name, value in last.parts.items()},
            },
            verb="fit",
        )
        about = {
            "model": fingerprint(checkpoint.model),
            "float16": fingerprint(checkpoint.model, torch.float16),  # loaded so, it rounds otherwise
            "chances": measured_chances(checkpoint, heads, held_out, length),
        }
        checkpoint.attach(slug, tensors, parameters, about)
        return checkpoint

    def words(self, checkpoint: Checkpoint, examples: Sequence[Example]) -> Tensor | None:
        """The tokens that the heads may guess; None for all. See `vocabulary`.

        Args:
            checkpoint: a decoder.
            examples: what the heads are trained on, with `input_ids`.
        """
        texts = ([int(token) for token in example["input_ids"]] for example in examples)
        return words_of(texts, checkpoint.vocabulary, self.vocabulary)

    def _check_tree(self) -> None:
        if self.tree is not None:
            Shape.of(self.tree)

    def _length(self, checkpoint: Checkpoint) -> int:
        return min(LENGTH, checkpoint.context) if self.length is None else self.length

    def _examples(self, checkpoint: Checkpoint, texts: Any, seed: int, progress: Progress) -> list[Example]:
        """What is trained on."""
        slug = self.slug
        if texts is None:
            raise IntaglioError(f"heads are trained on texts; give {slug} some")
        if isinstance(texts, Sequence) and not isinstance(texts, str) and texts and isinstance(texts[0], Mapping):
            return [dict(example) for example in texts]
        corpus: Corpus = load_texts(texts)
        length = self._length(checkpoint)
        if self.own_text:
            if length <= self.prompt and not self.chat:
                raise IntaglioError(
                    f"prompt is {self.prompt} and length {length}; a text has room for what the model writes only if "
                    "length is larger"
                )
            prompts = prompts_of(checkpoint, corpus, self.prompt, self.samples, self.chat)
            return own_text(
                checkpoint,
                prompts,
                tokens=max(1, length - max(map(len, prompts), default=0)),
                temperature=self.text_temperature,
                batch_size=self.text_batch,
                seed=seed,
                progress=progress,
            )
        if checkpoint.tokenizer is None:
            raise IntaglioError(f"{checkpoint.source or 'the checkpoint'} has no tokenizer, so it can read no texts")
        drawn = [text for _, text in sorted(zip(corpus.hashes, corpus.documents, strict=True))[: self.samples]]
        found = checkpoint.tokenizer(drawn, verbose=False)["input_ids"]
        return [{"input_ids": ids} for ids in found if len(ids) > 1]

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """The decoder with the heads that `fit` attached.

        Args:
            attachment: of the checkpoint.
            checkpoint: whose heads they are.
            **fields: win over the fields that it was fitted with, but for those of the heads themselves.

        Raises:
            IntaglioError: a field that the heads were not fitted with, or an attachment that is not theirs.
        """
        for name in ("vocabulary", *cls.architecture):
            fitted = attachment.parameters.get(name)
            if name in fields and fields[name] != fitted:
                raise IntaglioError(
                    f"{name} is {fields[name]}; the heads of {attachment.slug} were fitted with {fitted}, fit them "
                    f"again for another"
                )
        found = cls(**attachment.parameters | fields)
        heads = found.make(checkpoint.model, 0, _words_in(attachment, checkpoint))
        wanted = {name: tuple(value.shape) for name, value in heads.state_dict().items()}
        there = {name: tuple(value.shape) for name, value in attachment.tensors.items()}
        if wanted != there:
            raise IntaglioError(
                f"the attachment {attachment.slug} does not fit {type(checkpoint.model).__name__}; it belongs to "
                "another checkpoint"
            )
        heads.load_state_dict(attachment.tensors)  # each is copied into what is there: float32, int64
        found._heads, found._about = heads.requires_grad_(False), dict(attachment.about)
        return found

    def estimate_fit(self, workload: Workload, texts: Corpus) -> Cost:
        """Writing the text, one pass of the model a training token, and the heads.

        Args:
            workload: of the model.
            texts: what prompts are taken from.
        """
        length = LENGTH if self.length is None else self.length
        pieces = self.own_text and not self.chat
        rows = min(self.samples, len(to_go_on_from(texts, self.samples) if pieces else texts))
        written = rows * max(0, length - self.prompt) if self.own_text else 0
        trained = self.epochs * rows * length
        if self.steps is not None:
            trained = float(self.steps * self.batch_size * self.accumulate * length)
        # A token that is written alone takes about ten times as long as one that is read among others.
        flops = 2.0 * workload.parameters * (10 * written + trained) + self.head_flops(workload) * trained
        # A piece of the loss holds the logits of its rows, and as much again a few times for the gradient.
        piece = 12.0 * ROWS * (self.levels * self.guessed(workload) + _vocabulary(workload))
        return Cost(flops=flops, extra_bytes=int(piece + self.batch_size * length * self.head_bytes(workload)))


def stored(heads: nn.Module) -> dict[str, Tensor]:
    """The content of heads as it is kept: numbers in bfloat16, token ids as they are.

    Args:
        heads: trained ones.
    """
    own = {name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}
    return {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in own.items()}


def _words_in(attachment: Attachment, checkpoint: Checkpoint) -> Tensor | None:
    """The tokens that may be guessed, which an attachment holds; another model's may not have them."""
    found = attachment.tensors.get("words.tokens_K")
    if found is not None and (found.dim() != 1 or not len(found) or int(found.max()) >= checkpoint.vocabulary):
        raise IntaglioError(
            f"the attachment {attachment.slug} does not fit {type(checkpoint.model).__name__}; it belongs to another "
            "checkpoint"
        )
    return found


def _vocabulary(workload: Workload) -> float:
    """Rows of what lies outside the blocks: the vocabulary, twice where the head is not tied."""
    return (workload.parameters - workload.block_parameters) / workload.hidden


def blocks_of(workload: Workload) -> int:
    """About how many blocks a model has: one of the width D has some 12 D^2 parameters.

    Args:
        workload: of the model.
    """
    return max(1, round(workload.block_parameters / (12 * workload.hidden**2)))


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and one in twenty to measure the chances of each rank on; too few serve for both.

    Args:
        examples: at least one.
    """
    if len(examples) < 2 * HELD_OUT:
        return list(examples), list(examples)
    return [e for n, e in enumerate(examples) if n % HELD_OUT], list(examples[::HELD_OUT])
