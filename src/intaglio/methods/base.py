"""What a method is, the protocols it may implement, and the registry.

A method is one published technique: a frozen pydantic model whose fields are its hyperparameters (so a recipe validates
before any model loads), plus what it does. It is called once and returns. Which protocols it implements is said by the
catalogue's `kinds` and checked by the conformance suite; there is no class per protocol to inherit from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict

from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Kind
from intaglio.methods.registry import PUBLISHED, Entry

if TYPE_CHECKING:
    from torch import nn

    from intaglio.checkpoint import Checkpoint
    from intaglio.modeling.anatomy import Anatomy

ModelAspect = Literal["weights", "width", "depth", "vocabulary", "attention", "cache", "activations"]
"""A part of a checkpoint that a method edits."""

Capability = Literal["linear_weights", "matrix_products", "causal", "cache", "tokenizer", "zeros"]
"""Something that holds of a checkpoint and that a later step may need: `linear_weights` (the blocks' projections are
plain matrices), `matrix_products` (whatever stands in their place multiplies with a matrix), `causal` (a decoder that
generates), `cache` (its key-value cache is stock), `tokenizer` (ids mean what the original's meant), `zeros` (the
pattern of zeros that an earlier step made)."""

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, what)` after each unit of long work."""


def no_progress(done: int, total: int, what: str) -> None:
    """The default `Progress`: shows nothing."""


class Method(BaseModel):
    """One published technique: its hyperparameters are its fields.

    Subclasses name their slug: `class Wanda(Method, slug="wanda")`. A subclass adds the functions of the protocols it
    implements (`apply` for a carving).
    """

    # strict: the word "0.5", yes and no are not taken for numbers, nor 1 for true.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    slug: ClassVar[str]
    changes: ClassVar[frozenset[ModelAspect]] = frozenset()
    requires: ClassVar[frozenset[Capability]] = frozenset()
    invalidates: ClassVar[frozenset[Capability]] = frozenset()
    vocabulary_config_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of the model's config in which it keeps token ids; a step that replaces the vocabulary removes them."""
    restores: ClassVar[frozenset[Capability]] = frozenset()
    """What it gives back, where steps that changed nothing but what it changes itself had done away with it."""

    def __init_subclass__(cls, slug: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if slug is not None:
            cls.slug = slug

    @classmethod
    def entry(cls) -> Entry:
        """The method's line in the catalogue."""
        return PUBLISHED[cls.slug]

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The method with the constants of its paper, where the defaults here are scaled to the model in hand.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**overrides)


class Depends:
    """A class's attribute that says what holds for most steps, and on a step what holds for that one.

    Args:
        mostly: on the class.
        of: a step -> its own.
    """

    def __init__(self, mostly: Any, of: Callable[[Any], Any]) -> None:
        self.mostly, self.of = mostly, of

    def __get__(self, step: Method | None, owner: type) -> Any:
        return self.mostly if step is None else self.of(step)


@dataclass(frozen=True)
class Workload:
    """What an estimate of time and memory is made from; no weights are read for it.

    Args:
        linears: `(rows, columns)` of every linear that a carving of weights would edit.
        block_parameters: parameters of all blocks together.
        parameters: parameters of the whole model.
        hidden: width of the hidden state.
        tokens: calibration tokens.
        batch_tokens: calibration tokens that pass at a time.
        element_size: bytes of one parameter.
        blocks: transformer blocks. Default 1: not told apart.
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
    """What a step is expected to take.

    Args:
        flops: floating-point operations in matrix products.
        sorted_elements: elements that pass through a sort or a selection.
        extra_bytes: memory at the peak, beyond the model itself.
    """

    flops: float = 0.0
    sorted_elements: float = 0.0
    extra_bytes: int = 0


@runtime_checkable
class Carving(Protocol):
    """A method that edits a checkpoint in place and appends itself to its record.

    `storage` says whether the result is plain tensors that the stock loader reads (`baked`), or needs Intaglio to put
    live parts back (`live`).
    """

    storage: ClassVar[Literal["standalone", "runtime"]]
    needs_calibration: ClassVar[bool]

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Edit `checkpoint` and return it."""

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse, before any work, a model whose linears `(name, rows, columns)` do not fit."""

    def estimate(self, workload: Workload) -> Cost:
        """Say what `apply` will take."""


@runtime_checkable
class ChecksModel(Protocol):
    """A carving that can tell from a model's anatomy, before any work, that it does not fit."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model."""


@runtime_checkable
class RemovesBlocks(Protocol):
    """A carving that leaves a model with fewer blocks, so that later steps are held against what is left."""

    def anatomy_after(self, parts: Anatomy) -> Anatomy:
        """The anatomy behind the step, as far as it can be told before any work."""


@runtime_checkable
class Resumable(Protocol):
    """A carving that may be long enough to go on after it was killed; `apply` then takes `directory` and `resume`."""

    @property
    def long(self) -> bool:
        """Whether it is, as its fields are."""


@runtime_checkable
class RestoresRuntime(Protocol):
    """A method whose result is data in the record that must be put back after a load; see `Checkpoint.set_runtime_state`."""

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Put a live part back into a model that was just loaded."""


@runtime_checkable
class HasCustomModules(Protocol):
    """A `Live` method whose part has modules of its own in the model (`intaglio.modeling.replacement`)."""

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put the modules, empty, into a model that has no weights yet: they are read into it next.

        Args:
            part: as it was given to `set_runtime_state`.
            model: on the meta device.
        """


@runtime_checkable
class ReplacesTokenizer(Protocol):
    """A carving that gives the checkpoint another tokenizer: what is calibrated and measured on is cut anew then."""

    def check_tokenizer(self, tokenizer: Any, source: str) -> None:
        """Refuse, before any work, a checkpoint of that name whose tokenizer does not fit."""

    def new_tokens(self, before: Any, after: Any) -> frozenset[int]:
        """Ids of the new tokenizer's tokens that an earlier one did not have."""


@dataclass(frozen=True)
class Shared:
    """What a recipe can name beside the published methods: machinery that several of them need.

    Args:
        module: where its class is.
        name: of the class.
        kinds: the protocols it implements.
    """

    module: str
    name: str
    kinds: tuple[Kind, ...]


SHARED: dict[str, Shared] = {
    "token_classification": Shared("intaglio.trainer.token_classification", "TokenClassification", ("objective",)),
    "random": Shared("intaglio.trainer.data_selection", "RandomExamples", ("selector",)),
    "drop_blocks": Shared("intaglio.methods.weights.drop_blocks", "DropBlocks", ("carving",)),
    "visibility": Shared("intaglio.masks.method", "Visibility", ("carving", "visibility")),
}


def slugs(kind: Kind) -> list[str]:
    """Return the names of all methods of a kind, shared machinery behind the published ones.

    Args:
        kind: a protocol.
    """
    return [slug for table in (PUBLISHED, SHARED) for slug, entry in table.items() if kind in entry.kinds]


def get(slug: str) -> type[Method]:
    """Return the class of a method.

    Args:
        slug: its name in the catalogue, or in `SHARED`.

    Raises:
        IntaglioError: no method has that name.
    """
    entry: Entry | Shared | None = PUBLISHED.get(slug) or SHARED.get(slug)
    if entry is None:
        raise IntaglioError(f"there is no method named {slug!r}; {did_you_mean(slug, PUBLISHED)}")
    found: type[Method] = getattr(import_module(entry.module), entry.name)
    return found


def vocabulary_config_keys() -> frozenset[str]:
    """Return the config keys in which any method keeps token ids."""
    return frozenset().union(*(get(slug).vocabulary_config_keys for slug in (*PUBLISHED, *SHARED)))


class StepContract(Protocol):
    """What an order of steps is judged by: a method, or what is known of one that was applied before."""

    @property
    def slug(self) -> str:
        """Its name."""

    @property
    def changes(self) -> frozenset[ModelAspect]:
        """What it edits."""

    @property
    def requires(self) -> frozenset[Capability]:
        """What it needs."""

    @property
    def invalidates(self) -> frozenset[Capability]:
        """What it does away with."""

    @property
    def restores(self) -> frozenset[Capability]:
        """What it gives back."""


@dataclass(frozen=True)
class RecordedStep:
    """A step of an earlier run, as a checkpoint's record has it.

    Args:
        slug: the method.
        changes: what it edited.
        invalidates: what it did away with.
        restores: what it gave back.
        requires: nothing: it is done.
    """

    slug: str
    changes: frozenset[ModelAspect] = frozenset()
    invalidates: frozenset[Capability] = frozenset()
    restores: frozenset[Capability] = frozenset()
    requires: frozenset[Capability] = frozenset()


def check_order(
    methods: Iterable[StepContract], earlier: Iterable[StepContract] = (), fitted: Sequence[Method] = ()
) -> None:
    """Refuse a sequence in which a step needs what an earlier one has undone.

    Args:
        methods: the steps in order.
        earlier: what was done before them to the checkpoint that they begin with. Default: nothing.
        fitted: those of them that are fitted there: they learn the ids that they find, whatever these meant before.

    Raises:
        IntaglioError: names both steps and the fact.
    """
    undone: dict[Capability, list[StepContract]] = {}
    done = tuple(earlier)
    for method in (*done, *methods):
        learnt = {"tokenizer"} if any(method is one for one in fitted) else set()
        for fact in sorted(method.requires - learnt):
            if undone.get(fact):
                last = undone[fact][-1]
                whose = (
                    f"{last.slug}, which the checkpoint's record names"
                    if any(last is one for one in done)
                    else last.slug
                )
                raise IntaglioError(
                    f"{method.slug} cannot follow {whose}: it needs {fact}, which {last.slug} does away with"
                )
        for fact in method.restores:
            undone[fact] = [one for one in undone.get(fact, []) if not one.changes <= method.changes]
        for fact in method.invalidates:
            undone.setdefault(fact, []).append(method)
