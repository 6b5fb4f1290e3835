"""Base of the methods that own trained heads: settings, `fit` and `restore`, and the start of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Progress, Workload, no_progress
from intaglio.speculative._utils import vocabulary_size
from intaglio.speculative.decoder_mixin import SpeculativeDecoder
from intaglio.speculative.drafters.dynamic_tree import draft_probs_fn
from intaglio.speculative.drafters.undrafted import Undrafted
from intaglio.speculative.drafting_trial import on_trial, pass_ratio
from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.heads.chunked_loss import ROWS
from intaglio.speculative.heads.lm_head import MAX_DRAFT_VOCABULARY, build_draft_vocabulary
from intaglio.speculative.heads.objective import LENGTH, measure_acceptance, train_heads
from intaglio.speculative.heads.self_generated_data import extract_prompts, generate_corpus, prompt_sources
from intaglio.speculative.pass_cost import FIXED, PassCosts, shapes_name
from intaglio.speculative.protocols import DecodingRun, Session
from intaglio.speculative.static_tree import StaticTree, best_tree, best_tree_for_cost, default_acceptance
from intaglio.speculative.target_model import CachedModel
from intaglio.trainer.protocols import Example

HELD_OUT = 20
"""One text in so many is held out from training."""
_REMEDY = "nodes=N drafts all the same"


class TrainedHeads(SpeculativeDecoder):
    """A decoder with trained heads.

    A subclass adds the settings of its heads, names them in `architecture`, and implements `make` (heads) and `begin`
    (sessions).
    """

    architecture: ClassVar[tuple[str, ...]] = ()
    needs_hidden: ClassVar[bool] = True
    level_cost: ClassVar[float] = 0.0
    """Cost of drafting each level of a tree, in passes of the target over one token."""

    nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Drafted tokens of a tree. Default: as many as are worth their cost, see `token_cost`."""
    tree: list[list[Annotated[int, Field(ge=0)]]] | None = None
    """Nodes of the static tree, each by the ranks of its path (`[[0], [1], [0, 0]]`). Default: the best tree for the
    acceptance of each rank that was measured at the end of the training."""
    token_cost: Annotated[float, Field(ge=0, le=100)] | None = None
    """Cost that each drafted token adds to a pass for each row that shares it, in passes over one token; with the cost
    of the method's own drafting it decides how large a tree is if neither `nodes` nor `tree` does. Default: as measured
    on the processor at hand (0.035 where nothing is measured); there nothing is drafted where the best tree is expected
    to lose, and drafting ends where it is measured to. About 0.002 on a GPU, where rows cost nearly nothing."""
    drawn: bool = True
    """Under sampling, whether candidates are drawn from the heads and verified by recursive rejection (default), or are
    the most likely ones, of which the target's own draw may hit one."""
    draft_temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """Temperature of the heads when they draw. Default: the target's."""
    vocabulary: Annotated[int, Field(ge=1)] | None = None
    """Number of tokens that the heads may guess: the most frequent ones of their training data. Default: 8,192 if the
    model has more than twice as many, else all. The output does not depend on it; the time of a draft and of the
    training does."""
    own_text: bool = True
    """Whether heads are trained on text that the model itself generates after the first tokens of the texts (default),
    or on the texts themselves."""
    samples: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    """Most texts used. If the model generates and there are fewer documents, it continues pieces of about 2,000
    characters of them, except with `chat`. Default 1,000."""
    prompt: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Tokens of a text that the model continues. Default 32."""
    text_temperature: Annotated[float, Field(ge=0, le=100)] = 0.7
    """Temperature of the generated text; 0 is greedy. Default 0.7."""
    text_batch: Annotated[int, Field(ge=1, le=4096)] = 16
    """Texts generated at a time; another number draws other texts. Default 16; increase it on an accelerator."""
    chat: bool = False
    """Whether prompts are put into the chat template. Default false."""
    length: Annotated[int, Field(ge=4, le=100_000)] | None = None
    """Tokens of a training row, and of a text with its prompt. Default: 256, or the context if it is shorter."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the rows. Default 2."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of `epochs`."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rows of a batch. Default 8."""
    accumulate: Annotated[int, Field(ge=1, le=4096)] = 1
    """Batches of an optimizer step. Default 1."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate, cosine to 0. Default 1e-3."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the steps in which the rate rises. Default 0.01."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the training's passes: `bfloat16` (autocast, the heads stay in float32) is faster on processors that
    have it. Default `float32`."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two states that a killed run resumes from. Default: a tenth of the steps."""
    untrained: bool = False
    """Let heads draft that were never trained: the output is the same, only slower. Default false: refuse them."""

    _heads: Any = PrivateAttr(None)
    _about: dict[str, Any] = PrivateAttr(default_factory=dict)

    # --- implemented by a subclass ----------------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """Levels of a tree that the heads can fill."""
        raise NotImplementedError

    def make(self, model: nn.Module, seed: int, tokens_K: Tensor | None = None) -> Any:
        """Return untrained heads for a model, in float32 on the CPU.

        Args:
            model: the target.
            seed: of the initial weights.
            tokens_K: tokens that may be guessed; see `heads.lm_head.DraftVocabulary`. Default: all.

        Raises:
            IntaglioError: a setting that does not fit the model.
        """
        raise NotImplementedError

    def begin(self, heads: Any, run: DecodingRun, sampler: CandidateSampler, tree: StaticTree) -> Session:
        """Return a session with heads on the target's device, in its dtype."""
        raise NotImplementedError

    def rows_per_node(self) -> float:
        """Return the rows that a node takes in a pass of the target, its own included."""
        return 1.0

    def head_flops(self, workload: Workload) -> float:
        """Return the operations of the heads' training per token, beyond the model's own pass."""
        raise NotImplementedError

    def head_bytes(self, workload: Workload) -> float:
        """Return the bytes that the heads' training keeps for the gradient of each token of a batch."""
        raise NotImplementedError

    def draft_vocabulary(self, workload: Workload) -> float:
        """Return the number of tokens that the heads may guess."""
        whole = _vocabulary(workload)
        most = self.vocabulary or (MAX_DRAFT_VOCABULARY if whole > 2 * MAX_DRAFT_VOCABULARY else whole)
        return min(most, whole)

    # --- drafting ---------------------------------------------------------------------------------------------------

    @property
    def acceptance(self) -> list[list[float]]:
        """Acceptance by level and rank, as measured at the end of the training."""
        measured: list[list[float]] | None = self._about.get("chances")
        return measured or default_acceptance(self.levels)

    def static_tree(self, rows: int = 1, costs: PassCosts = FIXED) -> StaticTree:
        """Return the static tree of a run; a drafted token costs a slot in each of the rows that share a pass."""
        if self.tree is not None:
            return StaticTree.from_paths(self.tree)
        if self.nodes is not None:
            return best_tree(self.acceptance, self.nodes)
        return best_tree_for_cost(self.acceptance, lambda nodes: self._cost(nodes, rows, costs), self.level_cost)

    def _cost(self, nodes: int, rows: int, costs: PassCosts) -> float:
        """Return the cost of a pass with so many drafted tokens of each row, in passes over one token."""
        tokens = nodes * self.rows_per_node()
        if self.token_cost is None:
            return costs.cost(1 + tokens, rows)
        return 1.0 + self.token_cost * self.rows_per_node() * rows * nodes

    def expected_speed(self, tree: StaticTree, rows: int, costs: PassCosts, key: str = "") -> float:
        """Return the expected tokens for the time of a pass over one token: above 1, drafting this tree pays.

        Passes with this tree take as long as a run has measured under `key`, or else as `costs` and `level_cost` say.
        """
        cost = pass_ratio(key) or self._cost(len(tree), rows, costs) + self.level_cost * tree.depth
        return tree.expected(self.acceptance) / cost

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`.

        Raises:
            IntaglioError: there are no heads, they belong to another model, or the tree does not fit them.
        """
        heads = self._heads_for(run.model).to(device=run.model.device, dtype=run.model.dtype).eval()
        to_probs = draft_probs_fn(run, self.draft_temperature)
        sampler = CandidateSampler(to_probs, run.sampling and self.drawn, run.generator, heads.words)
        rows, costs = len(run.prompts), FIXED if self.token_cost is not None else run.costs()
        tree = self.static_tree(rows, costs)
        if not costs.measured or self.tree is not None or self.nodes is not None:
            return self.begin(heads, run, sampler, tree)
        speed = self.expected_speed(tree, rows, costs, key := self.drafting_key(run.model, tree, rows))
        if speed <= 1:
            run.statistics.note = (
                f"nothing was drafted: on this processor the best tree of {self.slug} is expected to run at "
                f"{speed:.2f} times the speed without drafts ({_REMEDY})"
            )
            return Undrafted().start(run)
        return on_trial(self.begin(heads, run, sampler, tree), run, key, _REMEDY)

    def drafting_key(self, model: Any, tree: StaticTree, rows: int) -> str:
        """Return the key of the seconds of passes with this tree in the tuner's table."""
        size = f"{len(tree)} drafted in {tree.depth} levels rows {rows} threads {torch.get_num_threads()}"
        return f"drafting {self.slug} {shapes_name(model)} {size}"

    def _heads_for(self, model: nn.Module) -> Any:
        slug, own = self.slug, fingerprint(model)
        if self._heads is None:
            if not self.untrained:
                raise IntaglioError(
                    f"{slug} has no heads; a recipe with the step fit: {{{slug}: {{}}}} trains them, and "
                    f"load(...).decoder({slug!r}) has them"
                )
            tokens_K = build_draft_vocabulary((), vocabulary_size(model), self.vocabulary)
            seed: int = getattr(self, "seed", 0)  # a field where the start is drawn
            self._heads = self.make(model, seed, tokens_K)
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
        """Train the heads and attach them to a checkpoint, whose weights stay unchanged.

        The same arguments give the same heads; so does a killed run that resumes in the same `directory`.

        Args:
            checkpoint: a decoder with its tokenizer.
            texts: a name for `load_texts`, texts, or a corpus; examples with `input_ids` are trained on directly.
            seed: of the heads, of the generated text, and of the order of the rows.
            batch_size: ignored; the field of that name is used.
            directory: for the state of a run that can be resumed. Default: none.
            resume: whether to continue from that state. Default False.
            progress: called as text is generated and after each optimizer step.

        Raises:
            IntaglioError: no texts, a model that heads cannot be trained on, or as `intaglio.train`.
        """
        slug = self.slug
        CachedModel(checkpoint.model)  # an encoder, or attention that takes no mask: refused before any work
        self.make(checkpoint.model, seed)  # settings that do not fit the model: refused before any work, too
        if self.tree is not None:
            StaticTree.from_paths(self.tree)
        examples = self._examples(checkpoint, texts, seed, progress)
        heads = self.make(checkpoint.model, seed, self.words(checkpoint, examples))
        length = self._length(checkpoint)
        training, held_out = split(examples)
        trained, noted = train_heads(
            checkpoint,
            heads,
            training,
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
        # Stored in bfloat16, and used as stored, so that a reload drafts the very same trees.
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
            "chances": measure_acceptance(checkpoint, heads, held_out, length),
        }
        checkpoint.attach(slug, tensors, parameters, about)
        return checkpoint

    def words(self, checkpoint: Checkpoint, examples: Sequence[Example]) -> Tensor | None:
        """Return the tokens that heads trained on examples may guess; None for all. See `lm_head`."""
        texts = ([int(token) for token in example["input_ids"]] for example in examples)
        return build_draft_vocabulary(texts, checkpoint.vocabulary, self.vocabulary)

    def _length(self, checkpoint: Checkpoint) -> int:
        return min(LENGTH, checkpoint.context) if self.length is None else self.length

    def _examples(self, checkpoint: Checkpoint, texts: Any, seed: int, progress: Progress) -> list[Example]:
        """Return the training examples."""
        if texts is None:
            raise IntaglioError(f"heads are trained on texts; give {self.slug} some")
        if isinstance(texts, Sequence) and not isinstance(texts, str) and texts and isinstance(texts[0], Mapping):
            return [dict(example) for example in texts]
        corpus: Corpus = load_texts(texts)
        length = self._length(checkpoint)
        if self.own_text:
            if length <= self.prompt and not self.chat:
                raise IntaglioError(
                    f"prompt is {self.prompt} and length {length}; a text has room for generated tokens only if length "
                    "is larger"
                )
            prompts = extract_prompts(checkpoint, corpus, self.prompt, self.samples, self.chat)
            return generate_corpus(
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
        return [{"input_ids": ids} for ids in checkpoint.tokenizer(drawn, verbose=False)["input_ids"] if len(ids) > 1]

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the decoder with the heads that `fit` attached.

        Args:
            attachment: of the checkpoint.
            checkpoint: owner of the heads.
            **fields: override the fields of the fit, except those of the heads themselves.

        Raises:
            IntaglioError: a field that the heads were not fitted with, or an attachment that does not fit the model.
        """
        for name in ("vocabulary", *cls.architecture):
            fitted = attachment.parameters.get(name)
            if name in fields and fields[name] != fitted:
                raise IntaglioError(
                    f"{name} is {fields[name]}; the heads of {attachment.slug} were fitted with {fitted}, fit them "
                    f"again for another"
                )
        # Heads were once saved with a seed by methods that draw nothing.
        kept = {
            name: value for name, value in attachment.parameters.items() if name != "seed" or name in cls.model_fields
        }
        decoder = cls(**kept | fields)
        tokens_K = attachment.tensors.get("words.tokens_K")
        fits = tokens_K is None or (
            tokens_K.dim() == 1 and len(tokens_K) > 0 and int(tokens_K.max()) < checkpoint.vocabulary
        )
        heads = decoder.make(checkpoint.model, 0, tokens_K) if fits else None
        if heads is None or _shapes(heads.state_dict()) != _shapes(attachment.tensors):
            raise IntaglioError(
                f"the attachment {attachment.slug} does not fit {type(checkpoint.model).__name__}; it belongs to "
                "another checkpoint"
            )
        heads.load_state_dict(attachment.tensors)  # copies in place: float32, int64
        decoder._heads, decoder._about = heads.requires_grad_(False), dict(attachment.about)
        return decoder

    def estimate_fit(self, workload: Workload, texts: Corpus) -> Cost:
        """Estimate generating the text, one pass of the model per training token, and the heads."""
        length = LENGTH if self.length is None else self.length
        pieces = self.own_text and not self.chat
        rows = min(self.samples, len(prompt_sources(texts, self.samples) if pieces else texts))
        generated = rows * max(0, length - self.prompt) if self.own_text else 0
        trained = self.epochs * rows * length
        if self.steps is not None:
            trained = float(self.steps * self.batch_size * self.accumulate * length)
        # Generating a token takes about ten times as long as reading it among others.
        flops = 2.0 * workload.parameters * (10 * generated + trained) + self.head_flops(workload) * trained
        # A chunk of the loss holds the logits of its rows, and as much again a few times for the gradient.
        chunk = 12.0 * ROWS * (self.levels * self.draft_vocabulary(workload) + _vocabulary(workload))
        return Cost(flops=flops, extra_bytes=int(chunk + self.batch_size * length * self.head_bytes(workload)))


def stored(heads: nn.Module) -> dict[str, Tensor]:
    """Return the state of heads as it is stored: floats in bfloat16, token ids unchanged."""
    state = {name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}
    return {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in state.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _vocabulary(workload: Workload) -> float:
    """Return the parameters outside the blocks per unit of width: the vocabulary, twice if the head is not tied."""
    return (workload.parameters - workload.block_parameters) / workload.hidden


def blocks_of(workload: Workload) -> int:
    """Estimate the number of blocks: a block of width D has about 12 D^2 parameters."""
    return max(1, round(workload.block_parameters / (12 * workload.hidden**2)))


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split off one example in twenty to measure acceptance; too few examples serve for both."""
    if len(examples) < 2 * HELD_OUT:
        return list(examples), list(examples)
    return [e for n, e in enumerate(examples) if n % HELD_OUT], list(examples[::HELD_OUT])
