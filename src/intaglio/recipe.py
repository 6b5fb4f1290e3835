"""Recipe: an ordered list of steps, YAML <-> objects; it validates before any model loads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intaglio.catalogue import ENTRIES
from intaglio.errors import IntaglioError, did_you_mean, shorten
from intaglio.method import Method, check_order, get
from intaglio.yamlfile import Document, Place, read_yaml


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


class Header(BaseModel):
    """What the steps of a recipe share.

    Args:
        model: a bundled name, a directory or a hub id; a model on the command line wins over it.
        seed: of everything random. Default 0.
        calibration: the data that steps are calibrated on.
        measure: what is measured before and after.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[str, Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    calibration: Calibration = Calibration()
    measure: Measure = Measure()


class Recipe(Header):
    """An ordered list of methods and what they share.

    Args:
        steps: the methods, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    steps: tuple[Method, ...]

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
        methods = tuple(_step(step, document, ("steps", index)) for index, step in enumerate(steps))
        try:
            check_order(methods)
        except IntaglioError as error:
            raise IntaglioError(f"{document.where(('steps',))}: {error}") from error
        return cls(**{name: getattr(header, name) for name in Header.model_fields}, steps=methods)

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data, every default written out; `Recipe.of` takes it back."""
        header = {name: getattr(self, name) for name in Header.model_fields}
        plain = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in header.items()}
        return {**plain, "steps": [{step.slug: step.model_dump()} for step in self.steps]}

    def digest(self, model: str) -> str:
        """A hash of everything that decides the result.

        Args:
            model: what is carved.
        """
        text = json.dumps([self.dump() | {"model": model}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _carvings() -> list[str]:
    return [slug for slug, entry in ENTRIES.items() if "carving" in entry.kinds]


def _step(step: Any, document: Document, place: Place) -> Method:
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, dict) or len(step) != 1:
        raise IntaglioError(
            f"{document.where(place)}: a step is one method with its parameters, such as wanda: {{sparsity: 0.5}}"
        )
    slug, parameters = next(iter(step.items()))
    if slug not in _carvings():
        known = (
            f"{slug!r} is a method, but no step of a recipe"
            if slug in ENTRIES
            else f"there is no method named {_show(slug)}"
        )
        raise IntaglioError(f"{document.where(place)}: {known}; {did_you_mean(str(slug), _carvings())}")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise IntaglioError(f"{document.where((*place, slug))}: the parameters of {slug} must be a mapping")
    return _validate(get(slug), parameters, document, (*place, slug))


_Model = TypeVar("_Model", bound=BaseModel)


def _validate(cls: type[_Model], value: Any, document: Document, place: Place) -> _Model:
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise IntaglioError(_sentence(cls, error, document, place)) from error


def _sentence(cls: type[BaseModel], error: ValidationError, document: Document, place: Place) -> str:
    """One sentence on the first thing that is wrong: where, what was given, what is accepted."""
    first = error.errors(include_url=False)[0]
    where = document.where((*place, *first["loc"]))
    owner: type[BaseModel] = cls
    for part in first["loc"][:-1]:
        annotation = owner.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
    if first["type"] == "extra_forbidden":
        fields = [*owner.model_fields, "steps"] if owner is Header else [*owner.model_fields]
        return f"{where}: there is no such field here; {did_you_mean(str(first['loc'][-1]), fields)}"
    message = "it should be a mapping" if first["type"] == "model_type" else first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] in ("missing", "value_error"):
        return f"{where}: {message}"
    return f"{where}: {_show(first['input'])} is not accepted, {message.replace('input', 'it', 1)}"


def _show(value: Any) -> str:
    return shorten(repr(value))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, every method's parameters included."""
    schema = Header.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = []
    for slug in _carvings():
        method = get(slug)
        own = method.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        own.pop("title", None)
        own["description"] = ENTRIES[slug].summary
        definitions[slug] = own
        one: dict[str, Any] = {
            "type": "object",
            "properties": {slug: {"$ref": f"#/$defs/{slug}"}},
            "required": [slug],
            "additionalProperties": False,
        }
        choices.append(one)
    schema["properties"]["steps"] = {
        "type": "array",
        "minItems": 1,
        "items": {"oneOf": choices},
        "description": "the methods, in order: each item is one slug with its parameters",
    }
    schema["required"] = ["steps"]
    schema["title"] = "Intaglio recipe"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
