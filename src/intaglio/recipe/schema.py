"""Recipe: an ordered list of steps and what they share, validated before any model loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from intaglio.errors import IntaglioError, did_you_mean, shorten
from intaglio.methods.base import Kind, Method, accepted_fields, check_order, unknown_field, validation_sentence
from intaglio.methods.registry import METHODS, get_method, list_fitted, list_methods
from intaglio.recipe.yaml import Document, Position, read_yaml

IMAGE_FAMILIES = ("convnext", "resnet", "vit")
"""New models of images."""


class Calibration(BaseModel):
    """The calibration data of a recipe's steps.

    Args:
        texts: a bundled name, a text file, a folder or a datasets id. Default `wikipedia`.
        samples: number of segments. Default 128.
        length: tokens of a segment, at most the model's context. Default 512.
        batch_size: segments of a batch; statistics are summed by batch. Default 4.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    texts: Annotated[str, Field(min_length=1)] = "wikipedia"
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    length: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4


class Measure(BaseModel):
    """The measurements before and after the steps.

    Args:
        texts: held-out text, as in `calibration`; calibration documents are excluded by hash.
        samples: number of segments. Default 16.
        length: tokens of a segment, at most the model's context. Default 512.
        batch_size: segments of a batch. Default 4.
        speed: whether to time prefill and decode. Default true.
        continuations: number of segments whose first 32 tokens are continued greedily to 256, shown side by side in the
            report with their repetition. Default 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    texts: Annotated[str, Field(min_length=1)] = "wikipedia"
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    length: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    speed: bool = True
    continuations: Annotated[int, Field(ge=0, le=1_000_000)] = 0


class New(BaseModel):
    """A small model from scratch, as `intaglio.new` makes it from the recipe's seed.

    Args:
        family: `llama`, `qwen3`, `mistral`, `gemma3`, `gpt2`, `bert` or `modernbert`, of images `resnet`, `convnext` or
            `vit`. Default `llama`.
        width: hidden size.
        depth: number of layers.
        heads: attention heads. Default: by width.
        kv_heads: key-value heads. Default: `heads`.
        context: longest input in tokens. Default 512.
        tokenizer: `bytes`, `texts` (a vocabulary trained on the recipe's calibration texts), or `items` (those of the
            interactions that a `train` step names). Default `bytes`.
        vocab: size of a trained vocabulary. Default 4,096.
        dropout: of a recommender (`tokenizer: items`). Default 0.2.
        image_size: of a model of images, pixels of a side. Default 32.
        num_channels: of a model of images, 1 (grey) or 3. Default 3.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    family: str = "llama"
    width: Annotated[int, Field(ge=2, le=65_536)]
    depth: Annotated[int, Field(ge=1, le=1024)]
    heads: Annotated[int, Field(ge=1)] | None = None
    kv_heads: Annotated[int, Field(ge=1)] | None = None
    context: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    tokenizer: Literal["bytes", "texts", "items"] = "bytes"
    vocab: Annotated[int, Field(ge=260, le=1_000_000)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    num_channels: Literal[1, 3] | None = None

    @property
    def of_images(self) -> bool:
        """Whether it is a model of images."""
        return self.family in IMAGE_FAMILIES

    @model_validator(mode="after")
    def _vocabulary(self) -> Self:
        if self.vocab is not None and self.tokenizer != "texts":
            raise ValueError("vocab is the size of a trained vocabulary; add tokenizer: texts")
        if self.dropout is not None and self.tokenizer != "items":
            raise ValueError("dropout belongs to recommenders; add tokenizer: items")
        if not self.of_images and (self.image_size, self.num_channels) != (None, None):
            families = ", ".join(IMAGE_FAMILIES)
            raise ValueError(f"image_size and num_channels belong to models of images ({families}), not {self.family}")
        if self.of_images and (self.kv_heads, self.context, self.tokenizer) != (None, 512, "bytes"):
            raise ValueError(f"kv_heads, context and tokenizer do not apply to {self.family}, a model of images")
        return self


class RecipeHeader(BaseModel):
    """The settings that the steps of a recipe share.

    Args:
        model: a bundled name, a directory or a hub id, pinned by `user/name@revision`; a model on the command line
            overrides it.
        new: instead of a model, a small one from scratch.
        seed: of all randomness. Default 0.
        calibration: the calibration data of the steps.
        measure: the measurements before and after the steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[str, Field(min_length=1)] | None = None
    new: New | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    calibration: Calibration = Calibration()
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.model is not None and self.new is not None:
            raise ValueError("model and new are given; give one of them")
        return self


@dataclass(frozen=True)
class Fit:
    """A step `fit: {SLUG: {...}}`: builds or trains what a method owns and attaches it; the weights stay unchanged."""

    method: Method

    @property
    def slug(self) -> str:
        """The method's slug."""
        return self.method.slug


Step = Method | Fit
"""A step of a recipe: a method that is applied, or one that is fitted."""


def method_of(step: Step) -> Method:
    """Return the method that a step applies or fits."""
    return step.method if isinstance(step, Fit) else step


def fitted_methods(steps: Iterable[Step]) -> list[Method]:
    """Return the methods that are fitted in a recipe's steps."""
    return [step.method for step in steps if isinstance(step, Fit)]


class Recipe(RecipeHeader):
    """An ordered list of steps and the settings that they share.

    Args:
        steps: methods to apply or fit, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    steps: tuple[Step, ...]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and validate a recipe file.

        Args:
            path: a YAML file.

        Raises:
            IntaglioError: one sentence with the place in the file and what is accepted.
        """
        return cls.from_document(read_yaml(Path(path)))

    @classmethod
    def from_dict(cls, value: dict[str, Any], name: str = "recipe") -> Self:
        """Validate a recipe given as plain data.

        Args:
            value: the content of a recipe file.
            name: of the recipe, for error messages.

        Raises:
            IntaglioError: as `read`.
        """
        return cls.from_document(Document(name, value, {}))

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Validate a parsed file; see `read`."""
        value = document.value
        if not isinstance(value, dict):
            raise IntaglioError(f"{document.name} is not a recipe: it must be a mapping with the key steps")
        fields = {name: field for name, field in value.items() if name != "steps"}
        header = _validate(RecipeHeader, fields, document, (), described_as=cls)
        if "steps" not in value:
            raise IntaglioError(f"{document.name} is not a recipe: the key steps is missing")
        given = value["steps"]
        if not isinstance(given, list) or not given:
            raise IntaglioError(f"{document.where(('steps',))}: a list of at least one step is needed")
        steps = tuple(_step(step, document, ("steps", index)) for index, step in enumerate(given))
        try:
            check_order(map(method_of, steps), fitted=fitted_methods(steps))
            _check_fits_last(steps)
            _check_items(steps, header)
        except IntaglioError as error:
            raise IntaglioError(f"{document.where(('steps',))}: {error}") from error
        return cls(**{name: getattr(header, name) for name in RecipeHeader.model_fields}, steps=steps)

    def dump(self) -> dict[str, Any]:
        """Return the recipe as plain data with every default written out; `Recipe.from_dict` reads it."""
        header = {name: getattr(self, name) for name in RecipeHeader.model_fields}
        plain = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in header.items()}
        steps = [{step.slug: method_of(step).model_dump()} for step in self.steps]
        steps = [
            {"fit": named} if isinstance(step, Fit) else named for step, named in zip(self.steps, steps, strict=True)
        ]
        return {**plain, "steps": steps}

    def with_seed(self, seed: int | None) -> Self:
        """Return the recipe with another seed, or unchanged for None.

        Raises:
            IntaglioError: the seed is negative or too large.
        """
        return self if seed is None else self.from_dict(self.dump() | {"seed": seed}, "--seed")

    def digest(self, model: str) -> str:
        """Return a hash of everything that determines the result; `model` identifies the source and environment."""
        text = json.dumps([self.dump() | {"model": model}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _check_fits_last(steps: Sequence[Step]) -> None:
    """Refuse a step that changes weights after a fit, whose attachment belongs to the weights before."""
    fitted = None
    for step in steps:
        if isinstance(step, Fit):
            fitted = step.slug
        elif fitted is not None and not step.keeps_fits:
            raise IntaglioError(
                f"{step.slug} cannot follow the fit of {fitted}, which belongs to the weights at that point; put fit "
                "after the steps that change them"
            )


def _check_items(steps: Sequence[Step], header: RecipeHeader) -> None:
    """Refuse interactions beside other steps or texts, and a new model whose tokens do not suit its data."""
    new = header.new
    logs, classes = (
        [step for step in steps if getattr(step, name, None) is not None] for name in ("interactions", "classes")
    )
    for what, given in (("interactions", logs), ("classes", classes)):
        if given and len(steps) > 1:
            raise IntaglioError(f"a recipe on {what} has one step, train; put other steps into a recipe of their own")
        if given and (header.calibration, header.measure) != (Calibration(), Measure()):
            scored = "items are ranked" if given is logs else "examples are scored"
            raise IntaglioError(f"calibration and measure do not apply to {what}, whose held-out {scored}")
    if new is not None and new.of_images and not classes:
        raise IntaglioError(f"new is {new.family}, a model of images, which needs a train step with classes")
    if new is not None and (new.tokenizer == "items") != bool(logs):
        raise IntaglioError(
            "new has tokenizer: items, which needs a train step with interactions"
            if not logs
            else f"new has tokenizer: {new.tokenizer}; a model of interactions needs tokenizer: items"
        )


def _step(step: Any, document: Document, position: Position) -> Step:
    key, value = _only_item(
        step, document, position, "a step is one method with its parameters", "wanda: {sparsity: 0.5}"
    )
    reader = _READERS.get(key) if isinstance(key, str) else None
    if reader is not None:
        return reader(value, document, (*position, key))
    return _method(key, value, document, position, list_methods("carving"))


def _fit(value: Any, document: Document, position: Position) -> Fit:
    slug, fields = _only_item(value, document, position, "fit names one method with its parameters", "fit: {aded: {}}")
    return Fit(_method(slug, fields, document, position, list_fitted()))


def _train(value: Any, document: Document, position: Position) -> Method:
    from intaglio.trainer.recipe_step import Train  # imports transformers, which most recipes do not need here

    if not isinstance(value, dict):
        raise IntaglioError(f"{document.where(position)}: train takes a mapping, such as train: {{steps: 500}}")
    return _validate(Train, value, document, position)


_READERS: dict[str, Callable[[Any, Document, Position], Step]] = {"fit": _fit, "train": _train}
"""Steps whose key is not a method that is applied."""


def _only_item(value: Any, document: Document, position: Position, what: str, example: str) -> tuple[Any, Any]:
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise IntaglioError(f"{document.where(position)}: {what}, such as {example}")
    item: tuple[Any, Any] = next(iter(value.items()))
    return item


def _method(slug: Any, fields: Any, document: Document, position: Position, accepted: list[str]) -> Method:
    """Return the validated method of a step; `accepted` are the slugs that the step can name."""
    if slug not in accepted:
        fits = position[-1:] == ("fit",)
        names = accepted if fits else [*accepted, *_READERS]
        if slug not in METHODS:
            problem = f"there is no method named {shorten(repr(slug))}; {did_you_mean(str(slug), names)}"
        elif fits:
            problem = f"{slug!r} is a method, but not one that is fitted; {did_you_mean(str(slug), names)}"
        elif METHODS[slug].fitted:
            problem = f"{slug} is fitted, not applied; write fit: {{{slug}: {{}}}}"
        else:
            problem = f"{slug!r} is a method, but not a step of a recipe; {did_you_mean(str(slug), names)}"
        raise IntaglioError(f"{document.where(position)}: {problem}")
    fields = {} if fields is None else fields
    if not isinstance(fields, dict):
        raise IntaglioError(f"{document.where((*position, slug))}: the parameters of {slug} must be a mapping")
    return _validate(get_method(slug), fields, document, (*position, slug))


_Model = TypeVar("_Model", bound=BaseModel)


def from_cli(cls: type[_Model], words: dict[str, str], name: str) -> _Model:
    """Return a model from words of the command line, each converted to its field's type.

    Args:
        cls: a method or another model.
        words: `{field: word}`.
        name: of the option, for error messages.

    Raises:
        IntaglioError: one sentence on the first field that is wrong.
    """
    return _validate(cls, words, Document(name, words, {}), (), validate=cls.model_validate_strings)


def _validate(
    cls: type[_Model],
    value: Any,
    document: Document,
    position: Position,
    validate: Callable[[Any], _Model] | None = None,
    described_as: type[BaseModel] | None = None,
) -> _Model:
    """Validate a part of a document; `described_as` has the fields that error messages list. Default: `cls`."""
    shown = described_as or cls
    for name in value:
        if name in cls.model_fields and name not in accepted_fields(cls):
            raise IntaglioError(f"{document.where((*position, name))}: {unknown_field(name, shown)}")
    try:
        return (validate or cls.model_validate)(value)
    except ValidationError as error:
        sentence = validation_sentence(error, shown, value, lambda inside: document.where((*position, *inside)))
        raise IntaglioError(sentence) from error


def _one_key(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a mapping with one key."""
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


def _choices(slugs: list[str], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of `{slug: fields}`; those of the methods join the definitions."""
    for slug in slugs:
        if slug not in definitions:
            definitions[slug] = _inlined(get_method(slug), definitions) | {"description": METHODS[slug].summary}
    return [_one_key(slug, {"$ref": f"#/$defs/{slug}"}) for slug in slugs]


def _inlined(cls: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a model; those of its nested models join the definitions."""
    schema = cls.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(schema.pop("$defs", {}))
    schema.pop("title", None)
    return schema


def _train_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    from intaglio.trainer.recipe_step import Train

    schema = _inlined(Train, definitions)
    kinds: dict[str, Kind] = {"objective": "objective", "select": "selector"}
    for field, kind in kinds.items():
        choices = _choices(list_methods(kind), definitions)
        schema["properties"][field] = {"oneOf": choices, "description": f"one {kind}"}
    schema["properties"]["modifiers"]["items"] = {"oneOf": _choices(list_methods("modifier"), definitions)}
    schema["description"] = "trains the weights"
    return schema


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, every method's parameters included."""
    schema = RecipeHeader.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = _choices(list_methods("carving"), definitions)
    about = "builds or trains what a method owns and attaches it; the weights stay unchanged"
    choices.append(_one_key("fit", {"oneOf": _choices(list_fitted(), definitions), "description": about}))
    choices.append(_one_key("train", _train_schema(definitions)))
    schema["properties"]["steps"] = {
        "type": "array",
        "minItems": 1,
        "items": {"oneOf": choices},
        "description": "in order: each item is one slug with its parameters, fit with one, or train",
    }
    schema["required"] = ["steps"]
    schema["title"] = "Intaglio recipe"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
