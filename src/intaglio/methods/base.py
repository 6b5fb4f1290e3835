"""Method, the base class of every published technique, and the protocols that a method may implement.

A method is a frozen pydantic model: its fields are its hyperparameters, so a recipe validates before any model loads.
Its class attributes describe it (`kinds`, `summary`, `citation`, `url`); the registry's table is generated from them.
The protocols are structural: `kinds` names those that a method implements, and the conformance suite checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, get_args, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError

from intaglio.errors import IntaglioError, did_you_mean, shorten

Kind = Literal[
    "carving",
    "objective",
    "modifier",
    "selector",
    "decoder",
    "drafter",
    "visibility",
    "encoder",
    "dictionary",
    "probe",
    "study",
    "classifier",
    "autoencoder",
]
"""A protocol that a method implements: `carving` (edits a checkpoint as a step of a recipe), `objective` (the loss of a
`train` step), `modifier` (acts on the weights, gradients or examples of a `train` step), `selector` (chooses its
training examples), `decoder` (generates), `drafter` (proposes tokens for speculative decoding), `visibility` (sets
which positions attend to which), `encoder` (vectors of texts), `dictionary` (sparse features of activations), `probe`
(measures a model), `study` (compares settings), `classifier` (learns classes on a frozen encoder), `autoencoder`
(latents of images)."""

ModelAspect = Literal["weights", "width", "depth", "vocabulary", "attention", "cache", "activations"]
"""A part of a checkpoint that a method edits."""

Capability = Literal["linear_weights", "matrix_products", "causal", "cache", "tokenizer", "zeros"]
"""A property of a checkpoint that a later step may require: `linear_weights` (the blocks' projections are plain
matrices), `matrix_products` (the projections, plain or replaced, multiply by a matrix), `causal` (a decoder that
generates), `cache` (a stock key-value cache), `tokenizer` (token ids keep their original meaning), `zeros` (the zeros
of an earlier pruning step are kept)."""

TrainingData = Literal["texts", "labels", "interactions", "pairs", "classes"]
"""Training data of an objective: texts or ids, labelled words, logs of users and items, pairs of texts, or labelled
texts and images."""

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, label)` after each unit of long work."""

# The protocols below take a `Checkpoint`, an `Anatomy` and an `Attachment`. Those modules import this one.
AnyCheckpoint = Any
AnyAnatomy = Any
AnyAttachment = Any


def no_progress(done: int, total: int, what: str) -> None:
    """Report no progress; the default `Progress`."""


class Method(BaseModel):
    """One published technique; its fields are its hyperparameters.

    A subclass passes its slug (`class Wanda(Method, slug="wanda")`), sets the class attributes below and adds the
    functions of the protocols in `kinds` (`apply` for a carving).

    Attributes:
        slug: name in recipes, on the command line and of the file.
        kinds: protocols it implements; empty for a base class.
        summary: what it does, in one clause.
        citation: authors, title, venue and year of the paper; empty for shared machinery that no paper describes.
        url: of the paper.
        fitted: whether a `fit` step builds or trains what it owns. Default False.
        changes: parts of the checkpoint that it edits.
        requires: properties that the checkpoint must have.
        invalidates: properties that the checkpoint loses.
        restores: properties that it gives back, where only steps whose `changes` are among its own took them away.
        keeps_fits: whether attachments that were fitted before it stay valid.
        edits_experts: whether it edits the matrices of stacked experts; otherwise a model with such is refused.
        trains_on: data that an objective is trained on, or a modifier needs. Default `texts`.
        sets_targets: whether a modifier mixes the examples of a batch, or keeps targets of single ones. Default False.
    """

    # strict: neither "0.5" nor true is taken for a number, nor 1 for true.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    slug: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]] = ()
    summary: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    url: ClassVar[str] = ""
    fitted: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset()
    requires: ClassVar[frozenset[Capability]] = frozenset()
    invalidates: ClassVar[frozenset[Capability]] = frozenset()
    vocabulary_config_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of the model's config in which it keeps token ids; a step that replaces the vocabulary removes them."""
    restores: ClassVar[frozenset[Capability]] = frozenset()
    keeps_fits: ClassVar[bool] = False
    edits_experts: ClassVar[bool] = False
    trains_on: ClassVar[TrainingData] = "texts"
    sets_targets: ClassVar[bool] = False

    def __init_subclass__(cls, slug: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if slug is not None:
            cls.slug = slug

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the paper's constants, where the defaults scale with the model.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**overrides)


@dataclass(frozen=True)
class Workload:
    """Sizes from which time and memory are estimated; no weights are read for it.

    Args:
        linears: `(rows, columns)` of every linear layer in the blocks.
        block_parameters: parameters of all blocks.
        parameters: parameters of the whole model.
        hidden: hidden size.
        tokens: calibration tokens.
        batch_tokens: calibration tokens of a batch.
        element_size: bytes of a parameter.
        blocks: number of transformer blocks. Default 1.
    """

    linears: tuple[tuple[int, int], ...]
    block_parameters: int
    parameters: int
    hidden: int
    tokens: int
    batch_tokens: int
    element_size: int
    blocks: int = 1


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a step.

    Args:
        flops: floating-point operations in matrix products.
        sorted_elements: elements that pass through a sort or a selection.
        extra_bytes: peak memory beyond the model itself.
    """

    flops: float = 0.0
    sorted_elements: float = 0.0
    extra_bytes: int = 0


@runtime_checkable
class Carving(Protocol):
    """A method that edits a checkpoint in place and appends itself to its record.

    `storage` is `standalone` where the result is plain tensors that the stock loader reads, `runtime` where loading it
    needs Intaglio.
    """

    storage: ClassVar[Literal["standalone", "runtime"]]
    needs_calibration: ClassVar[bool]

    def apply(
        self,
        checkpoint: AnyCheckpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> AnyCheckpoint:
        """Edit `checkpoint` and return it."""

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse, before any work, a model whose linear layers `(name, rows, columns)` do not fit."""

    def estimate(self, workload: Workload) -> Cost:
        """Estimate the cost of `apply`."""


@runtime_checkable
class ChecksModel(Protocol):
    """A carving that can refuse a model from its anatomy alone."""

    def check_model(self, parts: AnyAnatomy) -> None:
        """Refuse a model that does not fit."""


@runtime_checkable
class ChecksFits(Protocol):
    """A carving that uses what earlier steps fit, and can refuse before they do."""

    def check_fits(self, checkpoint: Any, fits: Sequence[Method]) -> None:
        """Refuse a checkpoint that will not have what the carving uses after the fits."""


@runtime_checkable
class ChecksData(Protocol):
    """A step that reads data of its own."""

    def check_data(self) -> None:
        """Refuse, before any work, data that cannot be read."""


@runtime_checkable
class RemovesBlocks(Protocol):
    """A carving that removes blocks, so that later steps are checked against the remaining ones."""

    def anatomy_after(self, parts: AnyAnatomy) -> AnyAnatomy:
        """Return the anatomy after the step, as far as it is known before any work."""


@runtime_checkable
class Resumable(Protocol):
    """A carving that may run long enough to be resumed; `apply` then takes `directory` and `resume`."""

    @property
    def long(self) -> bool:
        """Whether it does with its fields as they are."""


@runtime_checkable
class RestoresRuntime(Protocol):
    """A method whose result includes data in the record, restored after a load; see `Checkpoint.set_runtime_state`."""

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: AnyCheckpoint) -> None:
        """Restore a part of the record in a model that was just loaded."""


@runtime_checkable
class HasCustomModules(Protocol):
    """A `RestoresRuntime` method with modules of its own in the model (`intaglio.modeling.replacement`)."""

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: Any) -> None:
        """Insert the modules, without weights, into a model on the meta device; their weights are loaded next."""


@runtime_checkable
class ReplacesTokenizer(Protocol):
    """A carving that replaces the tokenizer, so that calibration and held-out texts are tokenized again."""

    def check_tokenizer(self, tokenizer: Any, source: str) -> None:
        """Refuse, before any work, the tokenizer of the checkpoint named `source` if it does not fit."""

    def new_tokens(self, before: Any, after: Any) -> frozenset[int]:
        """Return the ids of `after`'s tokens that the tokenizer `before` did not have."""


@runtime_checkable
class Fittable(Protocol):
    """A method that builds or trains an attachment and leaves the weights alone; a `fit` step runs it."""

    def fit(
        self,
        checkpoint: AnyCheckpoint,
        texts: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
    ) -> AnyCheckpoint:
        """Build the attachment, record the step (`verb="fit"`), attach it to `checkpoint` and return that.

        Long work keeps its state in `directory` and resumes from it if `resume`; other methods ignore both.
        """

    @classmethod
    def restore(cls, attachment: AnyAttachment, checkpoint: AnyCheckpoint, **fields: Any) -> Self:
        """Return the method, ready to use, from its attachment; `fields` override those it was fitted with."""

    def estimate_fit(self, workload: Workload, texts: Any) -> Cost:
        """Estimate the cost of `fit` on these texts."""


@runtime_checkable
class SamplesConstrained(Protocol):
    """A decoder that samples outputs under a constraint by its own rule, and weights them.

    `sample_fields` are the fields that `constrained` sets if a number of samples is given. After `generate`,
    `populations` has an entry a row, with its `checks` and `log_probability`.
    """

    sample_fields: ClassVar[frozenset[str]]

    def constrained(self, constraint: Any, vocabulary: Any, samples: int | None) -> Any:
        """Return the decoder with a constraint, the byte forms of the model's tokens, and a number of samples."""


@runtime_checkable
class Classifier(Protocol):
    """A fitted method that classifies texts or images; `Checkpoint.fitted` returns it ready to use."""

    def classify(
        self, checkpoint: AnyCheckpoint, texts: Sequence[Any], *, batch_size: int = 32, progress: Progress = no_progress
    ) -> list[dict[str, float]]:
        """Return the probability of every class for each text or image."""

    def learn(
        self, checkpoint: AnyCheckpoint, examples: Any, *, seed: int = 0, progress: Progress = no_progress
    ) -> AnyCheckpoint:
        """Learn further labelled texts or images, also of new classes, and replace the attachment."""


class StepContract(Protocol):
    """The declarations by which the order of steps is checked: those of a method, or of a recorded step."""

    @property
    def slug(self) -> str:
        """Name of the method."""

    @property
    def changes(self) -> frozenset[ModelAspect]:
        """Parts of the checkpoint that it edits."""

    @property
    def requires(self) -> frozenset[Capability]:
        """Properties that the checkpoint must have."""

    @property
    def invalidates(self) -> frozenset[Capability]:
        """Properties that the checkpoint loses."""

    @property
    def restores(self) -> frozenset[Capability]:
        """Properties that it gives back."""


@dataclass(frozen=True)
class RecordedStep:
    """A step of an earlier run, from a checkpoint's record; a `StepContract` that requires nothing more."""

    slug: str
    changes: frozenset[ModelAspect] = frozenset()
    invalidates: frozenset[Capability] = frozenset()
    restores: frozenset[Capability] = frozenset()
    requires: frozenset[Capability] = frozenset()


def check_order(
    methods: Iterable[StepContract], earlier: Iterable[StepContract] = (), fitted: Iterable[Method] = ()
) -> None:
    """Refuse a sequence in which a step requires a property that an earlier step has invalidated.

    Args:
        methods: the steps in order.
        earlier: steps recorded in the checkpoint. Default: none.
        fitted: those of `methods` that are fitted; they learn the tokenizer's ids anew, so they do not require it.

    Raises:
        IntaglioError: names both steps and the property.
    """
    lost: dict[Capability, list[StepContract]] = {}
    recorded, fitted_ids = tuple(earlier), set(map(id, fitted))
    for method in (*recorded, *methods):
        learnt: set[Capability] = {"tokenizer"} if id(method) in fitted_ids else set()
        for capability in sorted(method.requires - learnt):
            if lost.get(capability):
                last = lost[capability][-1]
                from_record = any(last is step for step in recorded)
                name = f"{last.slug}, which the checkpoint's record names" if from_record else last.slug
                raise IntaglioError(
                    f"{method.slug} cannot follow {name}: it needs {capability}, which {last.slug} does away with"
                )
        for capability in method.restores:
            lost[capability] = [step for step in lost.get(capability, []) if not step.changes <= method.changes]
        for capability in method.invalidates:
            lost.setdefault(capability, []).append(method)


def accepted_fields(cls: type[BaseModel]) -> list[str]:
    """Return the fields that a file or the command line can set; the others take Python objects."""
    return [name for name, field in cls.model_fields.items() if not field.exclude]


def unknown_field(name: str, cls: type[BaseModel]) -> str:
    """Return the message for a field that a model does not have."""
    return f"there is no such field here; {did_you_mean(name, accepted_fields(cls))}"


def validation_sentence(
    error: ValidationError,
    cls: type[BaseModel],
    value: Any,
    where: Callable[[tuple[Any, ...]], str] = lambda location: ".".join(map(str, location)),
) -> str:
    """Return one sentence on the first problem that pydantic reports: the place, the value, what is accepted.

    Args:
        error: raised while `value` was validated as a `cls`.
        where: names a place in `value`, given by keys and indices. Default: joined by dots.
    """
    problems = [(_location(value, problem), problem) for problem in error.errors(include_url=False)]
    of_field = [(at, problem) for at, problem in problems if problem["loc"][:1] == problems[0][1]["loc"][:1]]
    # Of a union's branches the user meant that whose error is deepest.
    location, first = max(of_field, key=lambda item: len(item[0]))
    if first["type"] == "extra_forbidden":
        message = unknown_field(str(first["loc"][-1]), _owner(cls, first["loc"]))
    elif first["type"] == "union_tag_invalid":
        context = first["ctx"]
        tags = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        message = f"there is no {context['tag']!r}; {did_you_mean(context['tag'], tags)}"
    elif first["type"] == "union_tag_not_found":
        message = f"the field {first['ctx']['discriminator']} is missing"
    elif first["type"] in ("missing", "value_error"):
        message = _message(first)
    else:
        expected = dict.fromkeys(_message(problem) for at, problem in of_field if at == location)
        message = f"{shorten(repr(first['input']))} is not accepted, {', or '.join(expected)}"
    place = where(location)
    return f"{place}: {message}" if place else message


def _location(value: Any, problem: Any) -> tuple[Any, ...]:
    """Return the place of a problem without the parts that only name a branch of a union."""
    location = []
    for part in problem["loc"]:
        if part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int):
            value = value[part]
            location.append(part)
    missing = problem["type"] == "missing"
    return (*location, problem["loc"][-1]) if missing else tuple(location)


def _owner(cls: type[BaseModel], place: tuple[Any, ...]) -> type[BaseModel]:
    """Return the model, nested in `cls`, to which the last part of a problem's place belongs."""
    options: list[type[BaseModel]] = []
    for part in place[:-1]:
        # A union's branch is named by its class, or by the field that tells the branches apart.
        named = [o for o in options if part in (o.__name__, *(field.default for field in o.model_fields.values()))]
        if named:
            cls = named[0]
        elif part in cls.model_fields:
            options = _models(cls.model_fields[part].annotation)
            cls = options[-1] if options else cls
        else:
            break
    return cls


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for option in get_args(annotation) for model in _models(option)]


def _message(problem: Any) -> str:
    if problem["type"] in ("model_type", "dict_type"):
        return "it should be a mapping"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return message if problem["type"] in ("missing", "value_error") else message.replace("input", "it", 1)
