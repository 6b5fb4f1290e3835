"""The recipe step `train`: an objective, modifiers, a selector, LoRA and a budget, named in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator

from intaglio.checkpoint import Checkpoint
from intaglio.data.facts import Fact, load_facts
from intaglio.data.item_sequences import HELD_OUT, LEAST
from intaglio.data.labelled_examples import (
    LabelledExamples,
    check_classes,
    check_validation,
    load_labelled_examples,
)
from intaglio.data.streaming import TextStream
from intaglio.data.text_pairs import DOCSTRINGS, TextPair, as_pair, load_text_pairs
from intaglio.data.texts import Corpus, check_texts, load_texts
from intaglio.data.token_classification import as_labelled, read_labelled
from intaglio.errors import IntaglioError, did_you_mean, shorten
from intaglio.measures.fact_recall import Recall, fact_recall
from intaglio.methods.base import (
    Capability,
    Carving,
    ChecksModel,
    Cost,
    Kind,
    Method,
    ModelAspect,
    Progress,
    Workload,
    no_progress,
    validation_sentence,
)
from intaglio.methods.registry import get_method, list_methods, list_objectives
from intaglio.modeling.anatomy import Anatomy
from intaglio.trainer.encoder_training import EncoderObjective
from intaglio.trainer.instruction_data import load_pairs, train_eval_split
from intaglio.trainer.mining import Mine, Mining
from intaglio.trainer.modified_loss import check_modifiers
from intaglio.trainer.protocols import HasTrainingCost, Objective
from intaglio.trainer.retrieval_evaluation import retrieval_evaluator, retrieval_samples
from intaglio.trainer.samples import DrawsSamples, Sample, Samples, Show, record_samples
from intaglio.trainer.settings import Settings

SHOWN = 4
"""Answers of each direction in the report."""

ROW = 512
"""Tokens of a row in estimates."""
CHARACTERS = 4
"""Characters of a token in estimates."""


class Train(Settings, Method, slug="train"):
    """A training step; the settings are those of `intaglio.train`.

    Args:
        objective: `{slug: fields}`. Default: next-token prediction, of instruction pairs that of the answers alone.
        modifiers: training modifiers, `[{slug: fields}, ...]`. Default: none.
        select: a selector, `{slug: fields}`. Default: every example.
        texts: training texts: a bundled name, a file, a folder or a hub id. Default: the recipe's calibration texts.
            Documents that the recipe measures on are left out.
        stream: whether `texts` are read in order as they are needed, for corpora larger than memory. Default: no.
        instructions: instead of texts, a file of instruction pairs, one JSON object a line; or `docstrings`, pairs from
            Python's standard library.
        labels: instead of texts, a file of labelled words, one JSON object a line (`words` and `labels`, or `text`,
            `spans` and `labels`), for token_classification; without an objective its words are trained on as text.
        interactions: instead of texts, a log of users, items and times (a CSV file, a bundled name, or a directory in
            RecBole's format), for bert4rec or sasrec. Each user's last two items are held out.
        least: users and items with fewer interactions are dropped. Default 5.
        held_out: items at the end of each sequence that are not trained on: 2, or 1, the validation items joining the
            training of a final model. Default 2.
        facts: instead of texts, a file of facts, one JSON object a line with `subject`, `object` and perhaps `texts`
            that state it in this order; or `invented`. The model is asked in both directions while training. Facts
            with `both: true` are stated in both orders, and not asked for.
        pairs: instead of texts, a file of queries with relevant texts, one JSON object a line (`query`, `positive` and
            perhaps `negatives`), for an encoder; or `docstrings`. With `evaluate`, whole held-out pairs are searched.
        classes: instead of texts, labelled texts (a `.jsonl` file of `text` and `label`, or a bundled name) or labelled
            images (a folder of class folders, an `.npz` file), or a data set of the hub, for the objective
            `classification`, the default for them.
        skip_broken: whether broken image files of classes and validation are left out, and named in the report.
            Default: no, they are refused.
        negatives: mines hard negatives of the pairs before training; see `Mining`. Default: the pairs' own.
        validation: another such file as labels or classes, on which the labels are scored while training.
        length: tokens of a row, for next-token prediction. Default: the model's context, at most 1,024.
        chat: whether the prompts of pairs are put into the tokenizer's chat template, if it has one; for instructions
            without an objective, which has its own. Default true.
        evaluate: share of the documents or pairs held out, on which the objective's loss is taken while training. Data
            that the recipe measures on stay out of both. Default 0.
        seed: seed of the step. Default: the recipe's.
    """

    storage: ClassVar[Literal["standalone"]] = "standalone"
    needs_calibration: ClassVar[bool] = False

    objective: dict[str, Any] | None = None
    modifiers: list[dict[str, Any]] = Field(default_factory=list, validation_alias=AliasChoices("modifiers", "shape"))
    select: dict[str, Any] | None = None
    texts: Annotated[str, Field(min_length=1)] | None = None
    stream: bool = False
    instructions: Annotated[str, Field(min_length=1)] | None = None
    labels: Annotated[str, Field(min_length=1)] | None = None
    facts: Annotated[str, Field(min_length=1)] | None = None
    pairs: Annotated[str, Field(min_length=1)] | None = None
    classes: Annotated[str, Field(min_length=1)] | None = None
    skip_broken: bool = False
    negatives: Mining | None = None
    validation: Annotated[str, Field(min_length=1)] | None = None
    interactions: Annotated[str, Field(min_length=1)] | None = None
    least: Annotated[int, Field(ge=1)] = LEAST
    held_out: Literal[1, 2] = HELD_OUT
    length: Annotated[int, Field(ge=2)] | None = None
    chat: bool = True
    evaluate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None  # type: ignore[assignment]

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> Any:
        return None if value is None else _named(value, "objective")

    @field_validator("select", mode="before")
    @classmethod
    def _select(cls, value: Any) -> Any:
        return None if value is None else _named(value, "selector")

    @field_validator("modifiers", mode="before")
    @classmethod
    def _modifiers(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("a list of modifiers is needed, such as [progressive_nm: {}]")
        return [_named(item, "modifier") for item in value]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sources = ("texts", "instructions", "labels", "facts", "interactions", "pairs", "classes")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; give one source of training data")
        slug = next(iter(self.objective or {}), "")
        trains_on = get_method(slug).trains_on if slug else "texts" if self.classes is None else "classes"
        classifies = trains_on == "classes"
        labels, recommends, encodes = (trains_on == kind for kind in ("labels", "interactions", "pairs"))
        if classifies != (self.classes is not None):
            raise ValueError(
                f"{slug} needs classes, labelled texts or images"
                if classifies
                else f"classes need the objective {' or '.join(list_objectives('classes'))}, or none"
            )
        for modifier in map(_make, self.modifiers):
            if modifier.trains_on == "classes" and not classifies:
                raise ValueError(f"{modifier.slug} is for classifiers; it needs classes, labelled texts or images")
        if self.skip_broken and not classifies:
            raise ValueError("skip_broken belongs to classes; name labelled images")
        if classifies and self.validation is not None and self.evaluate:
            raise ValueError("validation and evaluate are given; give one of them")
        if labels and self.labels is None:
            raise ValueError(f"{slug} needs labels, a file of labelled words")
        if self.labels is not None and not labels and slug:
            accepted = " or ".join(list_objectives("labels"))
            raise ValueError(f"labels need the objective {accepted}, or none, to train on the words alone")
        if recommends != (self.interactions is not None):
            raise ValueError(
                f"{slug} needs interactions, a log of users, items and times"
                if recommends
                else f"interactions need one of the objectives {' and '.join(list_objectives('interactions'))}"
            )
        if encodes != (self.pairs is not None):
            raise ValueError(
                f"{slug} needs pairs, a file of queries with relevant texts"
                if encodes
                else f"pairs need an objective that trains an encoder: {', '.join(list_objectives('pairs'))}"
            )
        if self.negatives is not None and not encodes:
            raise ValueError("negatives are mined for pairs; name a file of queries with relevant texts")
        if encodes and self.tokens is not None:
            raise ValueError("tokens does not apply to pairs, whose sides are padded; give steps or epochs")
        if encodes and self.select is not None:
            raise ValueError("select does not apply to pairs; leave it out")
        if not recommends and (self.least, self.held_out) != (LEAST, HELD_OUT):
            raise ValueError("least and held_out belong to interactions; name a log of users, items and times")
        if recommends and (self.evaluate or self.select is not None):
            raise ValueError("evaluate and select do not apply to interactions, whose last items are held out")
        scoring = self.validation is not None or self.evaluate
        if scoring and not classifies and labels != (self.validation is not None):
            raise ValueError(
                f"{slug} is scored on a file of labels: name one as validation"
                if labels
                else f"validation is a file of labels; it needs the objective {' or '.join(list_objectives('labels'))}"
            )
        if self.facts is not None and self.evaluate:
            raise ValueError("facts are asked while training, so evaluate does not apply; leave it out")
        if self.length is not None and self.objective is not None:
            raise ValueError("length belongs to next-token prediction; give it to the objective")
        if not self.chat and (self.instructions is None or self.objective is not None):
            raise ValueError("chat belongs to instructions without an objective; give it to the objective")
        whole = [part.slug for part in self.parts if getattr(part, "trains_weights", False)]
        if whole and (self.lora is not None or self.freeze or self.trainable_blocks is not None):
            held = "lora trains adapters alone" if self.lora else "trainable_blocks holds most still"
            held = "freeze holds them still" if self.freeze else held
            raise ValueError(f"{whole[0]} trains the weights themselves, and {held}; leave one of the two out")
        editing = [modifier.slug for modifier in map(_make, self.modifiers) if "weights" in modifier.changes]
        if len(editing) > 1:
            raise ValueError(f"{editing[0]} and {editing[1]} both change the weights; give each its own train step")
        try:
            check_modifiers(list(map(_make, self.modifiers)))
        except IntaglioError as error:
            raise ValueError(str(error)) from None
        scored = self.evaluate or self.validation is not None or (recommends and self.held_out == HELD_OUT)
        if self.early_stopping_patience is not None and not scored:
            raise ValueError("early_stopping_patience needs evaluate, a share of the data such as 0.05, or validation")
        measured = labels or recommends or encodes
        if self.early_stopping_patience is not None and measured and self.metric_for_best_model == "loss":
            raise ValueError("validation gives no loss to stop early by; set metric_for_best_model: error")
        replacing = [part.slug for part in self.parts if "linear_weights" in part.invalidates]
        if self.lora is not None and replacing:
            raise ValueError(f"lora adapts plain matrices, and {replacing[0]} leaves none; leave one of the two out")
        if self.stream and self.texts is None:
            raise ValueError("stream needs texts to read; name a file, a folder or a data set")
        for name, value in (("epochs", self.epochs), ("select", self.select), ("evaluate", self.evaluate)):
            if self.stream and value:
                raise ValueError(f"{name} needs the texts in memory; leave stream out")
        return self

    @property
    def parts(self) -> list[Method]:
        """Every method of the step."""
        given = [self.objective, *self.modifiers, self.select]
        return [_make(named) for named in given if named is not None]

    @property
    def changes(self) -> frozenset[ModelAspect]:  # type: ignore[override]
        """Weights, and the changes of the parts."""
        own: frozenset[ModelAspect] = frozenset({"weights"})
        return own.union(*(part.changes for part in self.parts))

    @property
    def requires(self) -> frozenset[Capability]:  # type: ignore[override]
        """Requirements of the parts; next-token prediction needs a decoder, and adapters plain matrices."""
        own: set[Capability] = {"causal"} if self.objective is None and self.classes is None else set()
        own |= set() if self.lora is None else {"linear_weights"}
        return frozenset(own).union(*(part.requires for part in self.parts))

    @property
    def invalidates(self) -> frozenset[Capability]:  # type: ignore[override]
        """Invalidated by the parts, and the zeros where `keep_mask` is off."""
        own: frozenset[Capability] = frozenset(() if self.keep_mask else {"zeros"})
        return own.union(*(part.invalidates for part in self.parts))

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse LoRA targets that name no linear layer, and a model that a modifier does not fit."""
        for modifier in map(_make, self.modifiers):
            if isinstance(modifier, Carving):
                modifier.check(linears)
        names = {name.partition("[")[0].rpartition(".")[2] for name, _, _ in linears}
        targets = [] if self.lora is None else self.lora.targets or []
        for target in targets:
            if target not in names:
                raise IntaglioError(f"lora: no linear layer is named {target!r}; {did_you_mean(target, names)}")

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model that a part of the step does not fit."""
        for part in self.parts:
            if isinstance(part, ChecksModel):
                part.check_model(parts)

    def check_data(self) -> None:
        """Refuse files of training data that cannot be read; of texts, the first document is."""
        if self.texts is not None:
            check_texts(self.texts, TextStream(self.texts) if self.stream else None)
        readers: tuple[tuple[Callable[[str], Any], str | None], ...] = (
            (load_facts, self.facts),
            (load_pairs, self.instructions),
            (load_text_pairs, self.pairs),
            (read_labelled, self.labels),
            (read_labelled, self.validation if self.labels else None),
        )
        for read, file in readers:
            if file is not None and file != DOCSTRINGS:
                read(file)

    def estimate(self, workload: Workload) -> Cost:
        """Return the estimated cost of the step.

        A parameter and token costs 6 operations, 4 under LoRA or where the model is frozen (no gradient of weights), 2
        more with gradient checkpointing. Under `trainable_blocks` the blocks below cost a forward pass alone, and none
        where their outputs are kept. Memory: the optimizer's two moments and the gradient of the trained weights, and
        the activations of a batch. Modifiers and selectors with a `training_cost` add it.

        A row counts as 512 tokens by default, a pair as its texts at full length; a dense encoder's embeddings cost
        nothing. An epoch is the objective's own samples or the facts; of other data, which are not counted, it is
        as long as the calibration.
        """
        named = next(iter(self.objective.values())) if self.objective else {}
        length, used = self.length or named.get("length") or ROW, workload.parameters
        if self.pairs is not None and isinstance(encoder := self.parts[0], EncoderObjective):
            length = encoder.pair_tokens(self.negatives.count if self.negatives else 0)
            used = workload.parameters if encoder.sparse else workload.block_parameters
        tokens: float = self.tokens or (self.steps or 0) * self.step_rows * length
        if self.epochs is not None:
            fields = next(iter(self.select.values())) if self.select else {}
            rows = fields.get("count") or named.get("samples")
            per_epoch = rows * length if rows else workload.tokens * fields.get("budget", 1.0)
            if self.facts is not None:
                texts = [text for fact in load_facts(self.facts) for text in fact.texts]
                per_epoch = sum(min(length, 2 + len(text) // CHARACTERS) for text in texts)
            tokens = self.epochs * per_epoch
        still = max(0.0, 1 - (self.trainable_blocks or workload.blocks) / workload.blocks)  # share of the blocks
        upper = 1 - still * workload.block_parameters / workload.parameters
        trained = workload.parameters * upper
        if self.lora or self.freeze:
            trained = (1 - still) * sum(self.lora.r * (a + b) for a, b in workload.linears) if self.lora else 0.0
        operations = ((2 if self.lora or self.freeze else 4) + 2 * self.gradient_checkpointing) * upper
        operations += 2 * (upper if named.get("cache_hidden") else 1.0)
        batch = self.batch_size * length
        # Each linear keeps its input for its gradient; without it only the blocks' inputs stay.
        per_token = (1 - still) * sum(columns for _, columns in workload.linears)
        per_token /= 8 if self.gradient_checkpointing else 1
        # Logits, their copy and their gradient.
        head = 3 * 4 * (used - workload.block_parameters) / workload.hidden
        steps = tokens / (batch * self.gradient_accumulation_steps)
        dearer = [part for part in self.parts if isinstance(part, HasTrainingCost)]
        own = [part.training_cost(workload, steps, batch, operations * used * batch) for part in dearer]
        memory = int(12 * trained + batch * (2 * workload.element_size * per_token + head))
        return Cost(
            flops=operations * used * tokens + sum(cost.flops for cost in own),
            sorted_elements=sum(cost.sorted_elements for cost in own),
            extra_bytes=memory + sum(cost.extra_bytes for cost in own),
        )

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Corpus | None = None,
        *,
        seed: int = 0,
        held_out_hashes: frozenset[str] = frozenset(),
        original: Callable[[], Checkpoint] | None = None,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
        data: tuple[Any, Any] | None = None,
        mine: Callable[[EncoderObjective, Checkpoint], Mine] | None = None,
    ) -> Checkpoint:
        """Train `checkpoint` in place and return it.

        `data` replaces the step's own training and evaluation data. `mine` makes the function that finds the hard
        negatives of pairs; it comes from the caller, as the search engine stands above the trainer.
        """
        from intaglio.trainer.loop import train

        settings = {name: getattr(self, name) for name in Settings.model_fields}
        settings["seed"] = seed if self.seed is None else self.seed
        if "tensorboard" in self.report_to:  # not in the directory, which is removed after the step
            settings["log_directory"] = self.log_directory or "runs"
        facts = None if self.facts is None else load_facts(self.facts)
        objective = self.objective_method()
        held_out: Any = None
        if self.pairs is not None:
            encoder = cast(EncoderObjective, objective)
            encoder.setup(checkpoint, settings["seed"])
            examples, held_out = self._pairs(encoder, checkpoint, mine)
            evaluate = None if held_out is None else retrieval_evaluator(encoder, held_out)
        else:
            examples, evaluate = self._data(calibration, held_out_hashes, facts) if data is None else data
        show = self._show(objective, held_out or evaluate, facts)
        before = None if show is None else show(checkpoint)
        train(
            checkpoint,
            examples,
            objective=objective,
            modifiers=[_make(named) for named in self.modifiers],  # type: ignore[misc]
            select=None if self.select is None else _make(self.select),  # type: ignore[arg-type]
            original=original,
            evaluate=evaluate,
            directory=directory,
            resume=resume,
            progress=progress,
            **settings,
        )
        checkpoint.record.steps[-1].chosen["data"] |= self._source()
        if show is not None and before is not None:
            record_samples(checkpoint, before, show(checkpoint))
        return checkpoint

    def _source(self) -> dict[str, str]:
        """Return the name of the training data for the record; none where they are the recipe's calibration texts."""
        sources = (self.texts, self.instructions, self.labels, self.interactions, self.facts, self.pairs)
        given = (*sources, self.classes)
        name = next((name for name in given if name is not None), None)
        return {} if name is None else {"source": name}

    def _show(self, objective: Objective, held_out: Any, facts: list[Fact] | None) -> Show | None:
        """Return the function that draws samples before and after training, if there is anything to show."""
        if facts is not None:
            return lambda checkpoint: recall_samples(fact_recall(checkpoint, facts))
        if isinstance(objective, EncoderObjective) and isinstance(held_out, list):
            return lambda checkpoint: retrieval_samples(objective, checkpoint, held_out)
        if isinstance(objective, DrawsSamples) and isinstance(held_out, list):
            texts = [text for text in held_out if isinstance(text, str)]
            return lambda checkpoint: objective.samples(checkpoint, texts)
        return None

    def _pairs(
        self,
        objective: EncoderObjective,
        checkpoint: Checkpoint,
        mine: Callable[[EncoderObjective, Checkpoint], Mine] | None,
    ) -> tuple[list[Any], list[TextPair] | None]:
        """Return the training pairs as rows, with mined negatives, and the held-out pairs, if any."""
        rows = [pair.row() for pair in load_text_pairs(str(self.pairs))]
        kept, held_out = train_eval_split(rows, self.evaluate) if self.evaluate else (rows, [])
        if self.negatives is not None:
            if mine is None:
                raise IntaglioError("negatives are mined by a recipe; from Python, call mine_hard_negatives before")
            pairs = [as_pair(row, "a pair") for row in kept]
            kept = [pair.row() for pair in mine(objective, checkpoint)(pairs, self.negatives)]
        return kept, [as_pair(row, "a pair") for row in held_out] or None

    def objective_method(self) -> Objective:
        """Return the objective, by default that of the data."""
        from intaglio.trainer.causal_lm import CausalLM
        from intaglio.trainer.classification import Classification
        from intaglio.trainer.instruction_tuning import InstructionTuning

        if self.objective is not None:
            return cast(Objective, _make(self.objective))
        if self.classes is not None:
            return Classification(length=self.length)
        return InstructionTuning(self.length, chat=self.chat) if self.instructions else CausalLM(self.length)

    def labelled(self) -> tuple[LabelledExamples, LabelledExamples | None, int]:
        """Return the training examples of `classes`, the validation examples, if any, and how many are in both.

        Of a split, only examples with a class are held out, and those whose class has no other example are not.

        Raises:
            IntaglioError: they have one class, or the validation split is the training split.
        """
        whole = load_labelled_examples(self.classes, skip_broken=self.skip_broken)
        check_classes(whole)
        if self.evaluate:
            nothing = (self.objective or {}).get("classification", {}).get("unlabelled")
            return _split_labelled(whole, self.evaluate, nothing)
        if self.validation is None:
            return whole, None, 0
        validation = load_labelled_examples(self.validation, skip_broken=self.skip_broken)
        return whole, validation, check_validation(whole, validation)

    def _data(self, calibration: Corpus | None, sealed: frozenset[str], facts: list[Fact] | None) -> tuple[Any, Any]:
        """Return the training data and the evaluation data or function, if any."""
        if self.classes is not None:
            from intaglio.trainer.classification import make_evaluator as classes_evaluator

            training, validation, _ = self.labelled()
            length = getattr(self.objective_method(), "length", None)
            sizes: dict[str, Any] = {"batch_size": self.batch_size, "length": length}
            scored = None if validation is None else classes_evaluator(validation.rows, **sizes)
            return list(training.rows), scored
        if self.validation is not None:
            from intaglio.trainer.token_classification import make_evaluator

            evaluator = make_evaluator(read_labelled(self.validation), batch_size=self.batch_size)
            return read_labelled(str(self.labels)), evaluator
        if facts is not None:
            return [text for fact in facts for text in fact.texts], lambda model: fact_recall(model, facts).shares
        if self.instructions is not None:
            whole: list[Any] = load_pairs(self.instructions)
        elif self.labels is not None:
            whole = read_labelled(self.labels)
            if self.objective is None:
                whole = [as_labelled(example, self.labels).text for example in whole]
        elif self.stream:
            assert self.texts is not None  # checked when the step was read
            return TextStream(self.texts, sealed), None
        else:
            texts = calibration if self.texts is None else load_texts(self.texts)
            if texts is None:
                raise IntaglioError("training data is missing: name texts or instructions")
            whole = list(texts.without(sealed).documents)
        return train_eval_split(whole, self.evaluate) if self.evaluate else (whole, None)


def recall_samples(recall: Recall) -> Samples:
    """Return the first answers in both directions, and the shares of right answers."""
    every = [Sample(*row) for row in zip(recall.prompts, recall.expected, recall.answers, strict=True)]
    half = len(every) // 2
    scores = {f"{direction} questions answered": share for direction, share in recall.shares.items()}
    return Samples([*every[:SHOWN], *every[half : half + SHOWN]], scores)


def _split_labelled(
    whole: LabelledExamples, share: float, unlabelled: str | None
) -> tuple[LabelledExamples, LabelledExamples, int]:
    """Return training and held-out examples, by contents and not by place, and how many are in both by content."""
    known = [row for row in whole.rows if row["label"] != unlabelled]
    _, chosen = train_eval_split([{name: row[name] for name in ("hash", "index", "label")} for row in known], share)
    names = {key["index"] for key in chosen}
    trained = {row["label"] for row in known if row["index"] not in names}
    held_out = tuple(row for row in known if row["index"] in names and row["label"] in trained)
    if not held_out:
        raise IntaglioError(f"evaluate is {share}; no class of {whole.name} has an example to hold out beside another")
    names = {row["index"] for row in held_out}
    kept = tuple(row for row in whole.rows if row["index"] not in names)
    hashes = {row["hash"] for row in kept}
    return replace(whole, rows=kept), replace(whole, rows=held_out), sum(row["hash"] in hashes for row in held_out)


def _make(named: Mapping[str, Any]) -> Method:
    slug, fields = next(iter(named.items()))
    return get_method(slug)(**fields)


def _named(value: Any, kind: Kind) -> dict[str, Any]:
    """Validate a method named in a recipe; returns `{slug: every field}`."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"one {kind} with its parameters is needed, such as {{SLUG: {{}}}}")
    slug, fields = next(iter(value.items()))
    known = list_methods(kind)
    if slug not in known:
        raise ValueError(f"there is no {kind} named {shorten(repr(slug))}; {did_you_mean(str(slug), known)}")
    if not isinstance(fields or {}, Mapping):
        raise ValueError(f"the parameters of {slug} must be a mapping")
    try:
        return {slug: get_method(slug).model_validate(dict(fields or {})).model_dump()}
    except ValidationError as error:
        raise ValueError(
            validation_sentence(error, get_method(slug), fields or {}, lambda at: ".".join(map(str, (slug, *at))))
        ) from None
