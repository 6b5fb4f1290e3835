"""`train` as a step of a recipe: an objective, shapers, a selector, LoRA and a budget, named in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from intaglio.checkpoint import Checkpoint
from intaglio.data.streaming import TextStream
from intaglio.data.texts import Corpus, load_texts
from intaglio.data.token_classification import as_labelled, read_labelled
from intaglio.errors import IntaglioError, did_you_mean, shorten
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
from intaglio.methods.registry import get_method, list_methods
from intaglio.modeling.anatomy import Anatomy
from intaglio.trainer.instruction_data import load_pairs, train_eval_split
from intaglio.trainer.protocols import HasTrainingCost, Objective
from intaglio.trainer.settings import Settings

ROW = 512
"""Tokens of a row in estimates."""


class Train(Settings, Method, slug="train"):
    """A training step; the settings are those of `intaglio.train`.

    Args:
        objective: `{slug: fields}`. Default: next-token prediction, of instruction pairs that of the answers alone.
        shape: shapers, `[{slug: fields}, ...]`. Default: none.
        select: a selector, `{slug: fields}`. Default: every example.
        texts: what is trained on: a bundled name, a file, a folder or a hub id. Default: the recipe's calibration
            texts. Documents that are measured on are left out.
        stream: whether `texts` are read in their order as they are needed, for corpora larger than memory. Default: no.
        instructions: in place of texts, a file of instruction pairs, one JSON object a line; or `docstrings`, pairs out
            of Python's standard library.
        labels: in place of texts, a file of labelled words, one JSON object a line (`words` and `labels`, or `text`,
            `spans` and `labels`), for token_classification; without an objective its words are trained on as text.
        validation: another such file, on which the labels are scored while training.
        length: tokens of a row, for next-token prediction. Default: the model's context, at most 1,024.
        chat: whether the prompts of pairs are put into the tokenizer's chat template, if it has one; for instructions
            without an objective, which has its own. Default true.
        evaluate: share of the documents or pairs that is not trained on, but has the objective's loss taken on it while
            training. What the recipe measures on stays out of both. Default 0.
        seed: default: the recipe's.
    """

    storage: ClassVar[Literal["standalone"]] = "standalone"
    needs_calibration: ClassVar[bool] = False

    objective: dict[str, Any] | None = None
    shape: list[dict[str, Any]] = Field(default_factory=list)
    select: dict[str, Any] | None = None
    texts: Annotated[str, Field(min_length=1)] | None = None
    stream: bool = False
    instructions: Annotated[str, Field(min_length=1)] | None = None
    labels: Annotated[str, Field(min_length=1)] | None = None
    validation: Annotated[str, Field(min_length=1)] | None = None
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

    @field_validator("shape", mode="before")
    @classmethod
    def _shape(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("a list of shapers is needed, such as [progressive_nm: {}]")
        return [_named(item, "modifier") for item in value]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = [name for name in ("texts", "instructions", "labels") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; one of them says what is trained on")
        labels = self.objective is not None and "token_classification" in self.objective
        if labels and self.labels is None:
            raise ValueError("token_classification needs labels, a file of labelled words")
        if self.labels is not None and not labels and self.objective is not None:
            raise ValueError("labels need the objective token_classification, or none: then the words alone are read")
        if (self.validation is not None or self.evaluate) and labels != (self.validation is not None):
            raise ValueError(
                "token_classification is scored on a file of labels: name one as validation"
                if labels
                else "validation is a file of labels; it needs the objective token_classification"
            )
        if self.length is not None and self.objective is not None:
            raise ValueError("length belongs to next-token prediction; give it to the objective")
        if not self.chat and (self.instructions is None or self.objective is not None):
            raise ValueError(
                "chat belongs to instructions without an objective; leave it out, or give it to the objective"
            )
        whole = [part.slug for part in self.parts if getattr(part, "trains_weights", False)]
        if whole and (self.lora is not None or self.freeze):
            held = "freeze holds them still" if self.freeze else "lora trains adapters alone"
            raise ValueError(f"{whole[0]} trains the weights themselves, and {held}; leave one of the two out")
        shaping = [one.slug for one in map(_made, self.shape) if "weights" in one.changes]
        if len(shaping) > 1:
            raise ValueError(f"{shaping[0]} and {shaping[1]} both shape the weights; give each a train step of its own")
        if self.patience is not None and not self.evaluate and self.validation is None:
            raise ValueError("patience needs evaluate, a share of the data such as 0.05, or validation")
        if self.patience is not None and labels and self.watch == "loss":
            raise ValueError("patience watches the loss, which validation does not give; set watch: error")
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
        given = [self.objective, *self.shape, self.select]
        return [_made(named) for named in given if named is not None]

    # What a step changes and needs is what its parts do, so these hide the class's own.
    @property
    def changes(self) -> frozenset[ModelAspect]:  # type: ignore[override]
        """Weights, and what the parts change."""
        own: frozenset[ModelAspect] = frozenset({"weights"})
        return own.union(*(part.changes for part in self.parts))

    @property
    def requires(self) -> frozenset[Capability]:  # type: ignore[override]
        """What the parts need; next-token prediction needs a decoder, and adapters plain matrices."""
        own: set[Capability] = {"causal"} if self.objective is None else set()
        own |= set() if self.lora is None else {"linear_weights"}
        return frozenset(own).union(*(part.requires for part in self.parts))

    @property
    def invalidates(self) -> frozenset[Capability]:  # type: ignore[override]
        """What the parts do away with, and the zeros if they are given up."""
        own: frozenset[Capability] = frozenset(() if self.keep_mask else {"zeros"})
        return own.union(*(part.invalidates for part in self.parts))

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse LoRA targets that the model has no linear layer for, and what its shapers do not fit.

        Args:
            linears: `(name, rows, columns)`; the parts of a fused layer have their role behind its name.

        Raises:
            IntaglioError: names the target.
        """
        for shaper in map(_made, self.shape):
            if isinstance(shaper, Carving):
                shaper.check(linears)
        names = {name.partition("[")[0].rpartition(".")[2] for name, _, _ in linears}
        targets = [] if self.lora is None else self.lora.targets or []
        for target in targets:
            if target not in names:
                raise IntaglioError(f"lora: no linear layer is named {target!r}; {did_you_mean(target, names)}")

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model that a part of the step does not fit.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: names the layer.
        """
        for part in self.parts:
            if isinstance(part, ChecksModel):
                part.check_model(parts)

    def estimate(self, workload: Workload) -> Cost:
        """Return about what the step takes.

        A parameter and token costs 6 operations, 4 under LoRA or where the model is frozen (no gradient of weights), 2
        more with gradient checkpointing. Memory: the optimizer's two moments and the gradient of what is trained, and
        the activations of a batch. Shapers and selectors that make it dearer say by how much.

        Args:
            workload: of the model. A row that is not said counts as 512 tokens, an epoch as the calibration tokens, as
                neither is known before the texts are read.
        """
        named = next(iter(self.objective.values())) if self.objective else {}
        length = self.length or named.get("length") or ROW
        tokens: float = self.tokens or (self.steps or 0) * self.batch_size * self.accumulate * length
        if self.epochs is not None:
            fields = next(iter(self.select.values())) if self.select else {}
            some = fields["count"] * length if fields.get("count") else workload.tokens * fields.get("budget", 1.0)
            tokens = self.epochs * some
        trained = workload.parameters
        if self.lora or self.freeze:
            trained = sum(self.lora.r * (a + b) for a, b in workload.linears) if self.lora else 0
        operations = (4 if self.lora or self.freeze else 6) + 2 * self.gradient_checkpointing
        batch = self.batch_size * length
        # Each linear keeps its input for its gradient; without it only the blocks' inputs stay.
        per_token = sum(columns for _, columns in workload.linears) / (8 if self.gradient_checkpointing else 1)
        head = (
            3 * 4 * (workload.parameters - workload.block_parameters) / workload.hidden
        )  # logits, their copy, gradient
        flops = operations * workload.parameters * tokens
        steps = tokens / (batch * self.accumulate)
        dearer = [part for part in self.parts if isinstance(part, HasTrainingCost)]
        own = [part.training_cost(workload, steps, batch, operations * workload.parameters * batch) for part in dearer]
        return Cost(
            flops=flops + sum(cost.flops for cost in own),
            sorted_elements=sum(cost.sorted_elements for cost in own),
            extra_bytes=int(12 * trained + batch * (2 * workload.element_size * per_token + head))
            + sum(cost.extra_bytes for cost in own),
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
    ) -> Checkpoint:
        """Train `checkpoint` in place and return it.

        Args:
            checkpoint: what is trained.
            calibration: the texts to train on where the step names none.
            seed: where the step has none.
            held_out_hashes: documents that are never trained on.
            original: loads the checkpoint as it was before the recipe, for a selector that compares; asked for by such
                a one alone.
            directory: for the state of the run; None: it cannot be resumed.
            resume: whether to go on with what `directory` holds.
            progress: called after each optimizer step.

        Raises:
            IntaglioError: no texts, or as `intaglio.train`.
        """
        from intaglio.trainer.loop import train

        settings = {name: getattr(self, name) for name in Settings.model_fields}
        data, evaluated = self._data(calibration, held_out_hashes)
        train(
            checkpoint,
            data,
            objective=self._goal(),
            shape=[_made(named) for named in self.shape],  # type: ignore[misc]
            select=None if self.select is None else _made(self.select),  # type: ignore[arg-type]
            original=original,
            evaluate=evaluated,
            directory=directory,
            resume=resume,
            progress=progress,
            **{
                **settings,
                "seed": seed if self.seed is None else self.seed,
                # Not in the directory, which is gone after the step.
                "log_directory": self.log_directory or ("runs" if "tensorboard" in self.report_to else None),
            },
        )
        return checkpoint

    def _goal(self) -> Objective:
        from intaglio.trainer.causal_lm import CausalLM
        from intaglio.trainer.instruction_tuning import InstructionTuning

        if self.objective is not None:
            return cast(Objective, _made(self.objective))
        return InstructionTuning(self.length, chat=self.chat) if self.instructions else CausalLM(self.length)

    def _data(self, calibration: Corpus | None, sealed: frozenset[str]) -> tuple[Any, Any]:
        """What is trained on, and what is evaluated on, if anything."""
        if self.validation is not None:
            from intaglio.trainer.token_classification import make_evaluator

            return read_labelled(str(self.labels)), make_evaluator(
                read_labelled(self.validation), batch_size=self.batch_size
            )
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


def _made(named: Mapping[str, Any]) -> Method:
    slug, fields = next(iter(named.items()))
    return get_method(slug)(**fields)


def _named(value: Any, kind: Kind) -> dict[str, Any]:
    """`{slug: every field}` of a method of a kind, from what the file has."""
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
