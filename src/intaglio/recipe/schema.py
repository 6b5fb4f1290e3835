"""Recipe: an ordered list of steps, YAML <-> objects; it validates before any model loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from intaglio.errors import IntaglioError, did_you_mean, shorten
from intaglio.methods.base import Kind, Method, StepContract, check_order
from intaglio.methods.registry import PUBLISHED, get_method, list_methods
from intaglio.recipe.yaml import Document, Place, read_yaml


class Calibration(BaseModel):
    """The data that steps are calibrated on.

    Args:
        texts: a bundled name, a text file, a folder or a datasets id. Default `wikipedia`.
        samples: segments. Default 128.
        length: tokens of a segment, cut to the model's context. Default 512.
        batch_size: segments that pass at a time; sums are grouped by it. Default 4.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    texts: Annotated[str, Field(min_length=1)] = "wikipedia"
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    length: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4


class Measure(BaseModel):
    """What is measured before and after.

    Args:
        texts: held-out text, as under `calibration`; documents that are calibrated on are left out, by hash.
        samples: segments. Default 16.
        length: tokens of a segment, cut to the model's context. Default 512.
        batch_size: segments that pass at a time. Default 4.
        speed: whether to time prefill and decode. Default true.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    texts: Annotated[str, Field(min_length=1)] = "wikipedia"
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    length: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    speed: bool = True


class New(BaseModel):
    """A small model from scratch, as `intaglio.new` makes it from the recipe's seed.

    Args:
        family: `llama`, `qwen3`, `mistral`, `gemma3`, `bert` or `modernbert`. Default `llama`.
        width: of the hidden state.
        depth: layers.
        heads: of attention. Default: by width.
        kv_heads: of keys and values. Default: `heads`.
        context: longest input in tokens. Default 512.
        tokenizer: `bytes`, or `texts`: a vocabulary trained on the recipe's calibration texts. Default `bytes`.
        vocab: entries of a vocabulary that is trained. Default 4,096.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    family: str = "llama"
    width: Annotated[int, Field(ge=2, le=65_536)]
    depth: Annotated[int, Field(ge=1, le=1024)]
    heads: Annotated[int, Field(ge=1)] | None = None
    kv_heads: Annotated[int, Field(ge=1)] | None = None
    context: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    tokenizer: Literal["bytes", "texts"] = "bytes"
    vocab: Annotated[int, Field(ge=260, le=1_000_000)] | None = None

    @model_validator(mode="after")
    def _vocabulary(self) -> Self:
        if self.vocab is not None and self.tokenizer == "bytes":
            raise ValueError("vocab belongs to a vocabulary that is trained; add tokenizer: texts")
        return self


class Header(BaseModel):
    """What the steps of a recipe share.

    Args:
        model: a bundled name, a directory or a hub id, pinned by `user/name@revision`; a model on the command line wins
            over it.
        new: in place of a model, a small one from scratch.
        seed: of everything random. Default 0.
        calibration: the data that steps are calibrated on.
        measure: what is measured before and after.
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
            raise ValueError("model and new are given; one of them says what is carved")
        return self


@dataclass(frozen=True)
class Fit:
    """A step `fit: {SLUG: {...}}`: builds or trains what a method owns and attaches it; the weights stay as they are.

    Args:
        method: what is fitted.
    """

    method: Method

    @property
    def slug(self) -> str:
        """The method's."""
        return self.method.slug


Step = Method | Fit
"""One step of a recipe: a carving, or something that is done with a method."""


def method_of(step: Step) -> Method:
    """The method of a step, whatever is done with it.

    Args:
        step: of a recipe.
    """
    return step.method if isinstance(step, Fit) else step


class Recipe(Header):
    """An ordered list of steps and what they share.

    Args:
        steps: in order: carvings, each a method, and fits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    steps: tuple[Step, ...]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and validate a recipe file.

        Args:
            path: a YAML file.

        Raises:
            IntaglioError: one sentence that names the place in the file and what would be accepted.
        """
        return cls.from_document(read_yaml(Path(path)))

    @classmethod
    def of(cls, value: dict[str, Any], name: str = "recipe") -> Self:
        """Validate a recipe given as plain data.

        Args:
            value: what the YAML file would hold.
            name: used in sentences.
        """
        return cls.from_document(Document(name, value, {}))

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Validate a parsed file; see `read`."""
        value = document.value
        if not isinstance(value, dict):
            raise IntaglioError(f"{document.name} is not a recipe: it must be a mapping with the key steps")
        header = _validate(Header, {k: v for k, v in value.items() if k != "steps"}, document, ())
        if "steps" not in value:
            raise IntaglioError(f"{document.name} is not a recipe: the key steps is missing")
        steps = value["steps"]
        if not isinstance(steps, list) or not steps:
            raise IntaglioError(f"{document.where(('steps',))}: a list of at least one step is needed")
        read = tuple(_step(step, document, ("steps", index)) for index, step in enumerate(steps))
        try:
            check_steps(read)
            _check_fits_last(read)
        except IntaglioError as error:
            raise IntaglioError(f"{document.where(('steps',))}: {error}") from error
        return cls(**{name: getattr(header, name) for name in Header.model_fields}, steps=read)

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data, every default written out; `Recipe.from_dict` takes it back."""
        header = {name: getattr(self, name) for name in Header.model_fields}
        plain = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in header.items()}
        return {**plain, "steps": [_plain(step) for step in self.steps]}

    def digest(self, model: str) -> str:
        """A hash of everything that decides the result.

        Args:
            model: what is carved.
        """
        text = json.dumps([self.dump() | {"model": model}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _plain(step: Step) -> dict[str, Any]:
    """A step as the YAML file would hold it, every default written out."""
    named = {step.slug: method_of(step).model_dump()}
    return {"fit": named} if isinstance(step, Fit) else named


def check_steps(steps: Sequence[Step], earlier: Iterable[StepContract] = ()) -> None:
    """Refuse steps of which one needs what another before it has undone; see `check_order`.

    Args:
        steps: of a recipe, in order.
        earlier: what was done before them. Default: nothing.

    Raises:
        IntaglioError: names both and the fact.
    """
    check_order(map(method_of, steps), earlier, [step.method for step in steps if isinstance(step, Fit)])


def _check_fits_last(steps: tuple[Step, ...]) -> None:
    """What is fitted belongs to the weights as they are then."""
    fitted = None
    for step in steps:
        if isinstance(step, Fit):
            fitted = step.slug
        elif fitted is not None:
            raise IntaglioError(
                f"{step.slug} cannot follow the fit of {fitted}, which belongs to the weights as they were; put fit "
                "behind the steps that change them"
            )


def _carvings() -> list[str]:
    return list_methods("carving")


def _fitted() -> list[str]:
    return [slug for slug, entry in PUBLISHED.items() if entry.fitted]


def _step(step: Any, document: Document, place: Place) -> Step:
    verb, value = _only_item(
        step, document, place, "a step is one method with its parameters", "wanda: {sparsity: 0.5}"
    )
    reader = _VERBS.get(verb) if isinstance(verb, str) else None
    if reader is not None:
        return reader(value, document, (*place, verb))
    return _method(verb, value, document, place, _carvings())


def _fit(value: Any, document: Document, place: Place) -> Fit:
    slug, fields = _only_item(value, document, place, "fit names one method with its parameters", "fit: {aded: {}}")
    return Fit(_method(slug, fields, document, place, _fitted()))


def _train(value: Any, document: Document, place: Place) -> Method:
    from intaglio.trainer.recipe_step import Train  # imports transformers, which most recipes do not need here

    if not isinstance(value, dict):
        raise IntaglioError(f"{document.where(place)}: train takes a mapping, such as train: {{steps: 500}}")
    return _validate(Train, value, document, place)


_VERBS: dict[str, Callable[[Any, Document, Place], Step]] = {"fit": _fit, "train": _train}
"""Steps that are no carving: what to do with a method, and what reads it."""


def _only_item(value: Any, document: Document, place: Place, what: str, example: str) -> tuple[Any, Any]:
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise IntaglioError(f"{document.where(place)}: {what}, such as {example}")
    found: tuple[Any, Any] = next(iter(value.items()))
    return found


def _method(slug: Any, fields: Any, document: Document, place: Place, accepted: list[str]) -> Method:
    """The method that a step names, if it can stand there."""
    if slug not in accepted:
        fits = place[-1:] == ("fit",)
        if slug in PUBLISHED and (fits or slug not in _fitted()):
            known = f"{slug!r} is a method, but " + ("not one that is fitted" if fits else "no step of a recipe")
        elif slug in PUBLISHED:
            raise IntaglioError(f"{document.where(place)}: {slug} is fitted, not applied; write fit: {{{slug}: {{}}}}")
        else:
            known = f"there is no method named {_show(slug)}"
        names = accepted if fits else [*accepted, *_VERBS]
        raise IntaglioError(f"{document.where(place)}: {known}; {did_you_mean(str(slug), names)}")
    fields = {} if fields is None else fields
    if not isinstance(fields, dict):
        raise IntaglioError(f"{document.where((*place, slug))}: the parameters of {slug} must be a mapping")
    return _validate(get_method(slug), fields, document, (*place, slug))


def accepted_fields(cls: type[BaseModel]) -> list[str]:
    """The fields that can be set in a file or on the command line; the others take objects of Python.

    Args:
        cls: a method or another model.
    """
    return [name for name, found in cls.model_fields.items() if not found.exclude]


_Model = TypeVar("_Model", bound=BaseModel)


def from_words(cls: type[_Model], words: dict[str, str], name: str) -> _Model:
    """A model whose fields were given as words on the command line; each word is read as its field's type.

    Args:
        cls: a method or another model.
        words: `{field: word}`.
        name: of the option, for sentences.

    Raises:
        IntaglioError: one sentence on the first field that is wrong.
    """
    return _checked(cls, words, Document(name, words, {}), (), cls.model_validate_strings)


def _validate(cls: type[_Model], value: Any, document: Document, place: Place) -> _Model:
    return _checked(cls, value, document, place, cls.model_validate)


def _checked(cls: type[_Model], value: Any, document: Document, place: Place, read: Callable[[Any], _Model]) -> _Model:
    for name in value:
        if name in cls.model_fields and name not in accepted_fields(cls):
            raise IntaglioError(_no_such_field(document.where((*place, name)), name, accepted_fields(cls)))
    try:
        return read(value)
    except ValidationError as error:
        raise IntaglioError(_sentence(cls, value, error, document, place)) from error


def _no_such_field(where: str, name: str, fields: list[str]) -> str:
    return f"{where}: there is no such field here; {did_you_mean(name, fields)}"


def _in_file(value: Any, error: Any) -> tuple[Any, ...]:
    """Where an error is, without what is in no file: which of several types a value was tried as."""
    found = []
    for part in error["loc"]:
        if part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int):
            value = value[part]
            found.append(part)
    missing = error["type"] == "missing"
    return (*found, error["loc"][-1]) if missing else tuple(found)


def _sentence(cls: type[BaseModel], value: Any, error: ValidationError, document: Document, place: Place) -> str:
    """One sentence on the first thing that is wrong: where, what was given, what is accepted."""
    errors = [(_in_file(value, e), e) for e in error.errors(include_url=False)]
    of_field = [(at, e) for at, e in errors if e["loc"][:1] == errors[0][1]["loc"][:1]]
    # Of a value that may be of several types, what was found furthest inside it is what was meant.
    inside, first = max(of_field, key=lambda found: len(found[0]))
    where = document.where((*place, *inside))
    owner: type[BaseModel] = cls
    for part in inside[:-1]:
        if str(part) not in owner.model_fields:
            break
        annotation = owner.model_fields[str(part)].annotation
        for kind in (annotation, *get_args(annotation)):  # a field that may be left out is a union with None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                owner = kind
    if first["type"] == "extra_forbidden":
        fields = [*accepted_fields(owner), "steps"] if owner is Header else accepted_fields(owner)
        return _no_such_field(where, str(first["loc"][-1]), fields)
    if first["type"] in ("missing", "value_error"):
        return f"{where}: {_message(first)}"
    told = dict.fromkeys(_message(e) for at, e in of_field if at == inside)
    return f"{where}: {_show(first['input'])} is not accepted, {', or '.join(told)}"


def _message(error: Any) -> str:
    """What pydantic says is wrong, in our words."""
    if error["type"] in ("model_type", "dict_type"):
        return "it should be a mapping"
    said = error["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:]
    return said if error["type"] in ("missing", "value_error") else said.replace("input", "it", 1)


def _show(value: Any) -> str:
    return shorten(repr(value))


def _one_key(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping with one key."""
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


def _train_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a training step; those of the methods that it can name join the definitions."""
    from intaglio.trainer.recipe_step import Train

    own = Train.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(own.pop("$defs", {}))
    own.pop("title", None)
    kinds: dict[str, Kind] = {"objective": "objective", "select": "selector"}
    for field, kind in kinds.items():
        own["properties"][field] = {"oneOf": _schemas_of(kind, definitions), "description": f"one {kind}"}
    own["properties"]["modifiers"]["items"] = {"oneOf": _schemas_of("modifier", definitions)}
    own["description"] = "trains the weights"
    return own


def _schemas_of(kind: Kind, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    found = list_methods(kind)
    for slug in found:
        if slug not in definitions:  # a method may be a step of its own, too
            definitions[slug] = get_method(slug).model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(definitions[slug].pop("$defs", {}))
    # Nothing is accepted where no method of the kind is there yet.
    return [_one_key(slug, {"$ref": f"#/$defs/{slug}"}) for slug in found] or [{"not": {}}]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, every method's parameters included."""
    schema = Header.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for slug in dict.fromkeys([*_carvings(), *_fitted()]):
        own = get_method(slug).model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        own.pop("title", None)
        if slug in PUBLISHED:
            own["description"] = PUBLISHED[slug].summary
        definitions[slug] = own
    choices = [_one_key(slug, {"$ref": f"#/$defs/{slug}"}) for slug in _carvings()]
    fitted = [_one_key(slug, {"$ref": f"#/$defs/{slug}"}) for slug in _fitted()]
    about = "builds or trains what a method owns and attaches it; the weights stay as they are"
    choices.append(_one_key("fit", {"oneOf": fitted, "description": about}))
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
