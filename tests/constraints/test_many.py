"""Many constraints: no invalid output, no hang, and every refusal for a reason that holds.

JSON Schemas are the definitions of real ones (GitHub workflows, compose files, CI) and mutations of them; regular
expressions are drawn from a grammar of their syntax. `jsonschema` and `re` judge the outputs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from transformers import LogitsProcessor

from intaglio.checkpoint import load
from intaglio.cli.generate import generate
from intaglio.constraints import Constraint, ConstraintProcessor, JSONSchema, Regex, check_output
from intaglio.errors import IntaglioError
from tests.constraints.toys import VOCABULARY
from tests.families import tiny_model

KEYS = ("properties", "patternProperties", "definitions", "$defs", "dependencies", "dependentSchemas")
SIMPLE = [None, True, False, 0, 1, -1, 2.5, "", "a", "ab", [], [0], ["a"], {}, {"a": 0}]
"""Values of which a satisfiable schema of this pool usually accepts one."""


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The subschemas of a schema."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in KEYS and isinstance(value, dict):
            for inner in value.values():
                yield from parts(inner)
        elif key in ("items", "additionalProperties", "not", "if", "then", "else"):
            yield from parts(value)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            for inner in value:
                yield from parts(inner)


def references(value: Any) -> Iterator[tuple[str, str]]:
    """The definitions that a schema names."""
    for part in parts(value):
        where = re.fullmatch(r"#/(definitions|\$defs)/([^/]+)", str(part.get("$ref", "")))
        if where:
            yield where[1], where[2]


def closed(part: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """The subschema with the definitions that it needs."""
    needed: dict[str, dict[str, Any]] = {}
    waiting = [part]
    while waiting:
        for group, name in references(waiting.pop()):
            if name not in needed.setdefault(group, {}) and name in root.get(group, {}):
                needed[group][name] = root[group][name]
                waiting.append(root[group][name])
    own = {key: value for key, value in part.items() if key not in ("definitions", "$defs", "$id", "id", "$schema")}
    return json.loads(json.dumps({**own, **needed}))


@functools.lru_cache
def real_schemas() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Distinct parts of the real schemas, each with the whole schema around it."""
    spec = importlib.util.find_spec("check_jsonschema")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    seen: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for path in sorted(Path(spec.submodule_search_locations[0], "builtin_schemas", "vendor").glob("*.json")):
        root = json.loads(path.read_text(encoding="utf-8"))
        for part in parts(root):
            if part is not root and {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"} & part.keys():
                seen.setdefault(json.dumps(part, sort_keys=True), (part, root))
    return [pair for words, pair in seen.items() if len(words) < 3000]


def mutated(schema: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A schema with a few keywords changed, or wrapped into another one."""
    schema = json.loads(json.dumps(schema))
    for part in list(parts(schema)):
        if rng.random() < 0.3:
            change = rng.choice(["drop", "type", "bounds", "enum", "require", "unsupported"])
            if change == "drop" and part:
                part.pop(rng.choice(sorted(part)))
            elif change == "type":
                part["type"] = rng.choice(["string", "integer", "boolean", "array", "object", "null", "numbr"])
            elif change == "bounds":
                low = rng.randint(0, 4)
                part |= {
                    "minLength": low,
                    "maxLength": rng.randint(0, 8),
                    "minimum": low,
                    "maximum": rng.randint(-1, 9),
                }
            elif change == "enum":
                part["enum"] = rng.sample(["a", "b b", 1, 2.5, None, True, {"a": [1]}], 3)
            elif change == "require" and isinstance(part.get("properties"), dict) and part["properties"]:
                part["required"] = [rng.choice(sorted(part["properties"]))]
            elif change == "unsupported":
                part |= rng.choice([{"uniqueItems": True}, {"not": {"type": "null"}}, {"$ref": "other.json#/a"}])
    wrap = rng.random()
    if wrap < 0.2:
        kept = {key: schema.pop(key) for key in ("definitions", "$defs") if key in schema}
        return {"type": "array", "items": schema, "minItems": 1, "maxItems": 2, **kept}
    return schema


def schemas(count: int) -> list[dict[str, Any]]:
    """Half real ones, half mutations, each with the definitions that it needs, none large."""
    rng, made = random.Random(0), []
    while len(made) < count:
        schema = closed(*rng.choice(real_schemas()))
        if len(json.dumps(schema)) < 6000:
            made.append(schema if len(made) % 2 else mutated(schema, rng))
    return made


def pattern(rng: random.Random, depth: int = 0) -> str:
    """A random regular expression, now and then with something that no automaton follows."""
    atoms = ["a", "b", "xyz", r"\d", r"\w", r"\s", r"\.", "[a-f]", "[^a-z]", r"[\d_-]", ".", r"\+", "é", r"\x41", "/"]
    made = []
    for _ in range(rng.randint(1, 4)):
        if depth < 3 and rng.random() < 0.3:
            opening = rng.choice(["(", "(?:", f"(?P<n{rng.randrange(10**9)}>"])
            atom = opening + "|".join(pattern(rng, depth + 1) for _ in range(rng.randint(1, 3))) + ")"
        elif rng.random() < 0.02:
            atom = rng.choice([r"\b", "(?=a)", "(?<!b)", "(", "[[:alpha:]]", "*"])
        else:
            atom = rng.choice(atoms)
        made.append(atom + (rng.choice(["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}"]) if rng.random() < 0.3 else ""))
    return ("(?i)" if depth == 0 and rng.random() < 0.05 else "") + "".join(made)


def patterns(count: int) -> list[str]:
    rng = random.Random(1)
    return [pattern(rng) for _ in range(count)]


class Closing(LogitsProcessor):
    """Prefers what closes strings, lists, objects and the output, so that most outputs end."""

    def __init__(self) -> None:
        closing = [id for id, form in enumerate(VOCABULARY.forms) if form in (b'"', b"]", b"}", b"0")]
        self.bias = torch.zeros(len(VOCABULARY))
        self.bias[[*closing, *VOCABULARY.stops]] = 6.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.bias


@functools.lru_cache
def model() -> Any:
    return tiny_model("llama", layers=1, vocab_size=len(VOCABULARY), eos_token_id=2, pad_token_id=0)


def tiny_output(constraint: Constraint, seed: int, most: int = 60) -> str:
    processor = ConstraintProcessor(constraint, VOCABULARY, 1)
    torch.manual_seed(seed)
    output = model().generate(
        torch.tensor([[5]]), logits_processor=[Closing(), processor], do_sample=True, top_k=0, max_new_tokens=most
    )
    return check_output(processor, output[0, 1:].tolist())


def judge_schema(schema: dict[str, Any], write: Any) -> str:
    """`valid`, `unfinished` or `refused`, after the output or the reason was judged."""
    try:
        text = write(JSONSchema(schema))
    except IntaglioError as error:
        says = str(error)
        assert "\n" not in says
        if "not complete after" in says:
            return "unfinished"
        if "malformed at" in says:
            with pytest.raises(SchemaError):
                validator_for(schema).check_schema(schema)
        elif "Unimplemented keys" in says:
            (names,) = re.findall(r"Unimplemented keys: \[(.*?)\]", says)
            assert all(name in json.dumps(schema) for name in names.split(", "))
        elif "only references inside" in says:
            assert re.search(r'"\$ref": "[^#"]', json.dumps(schema))
        elif re.search("Unsatisfiable|cannot be satisfied", says):
            assert not any(jsonschema.validators.validator_for(schema)(schema).is_valid(value) for value in SIMPLE)
        else:
            # Keywords and combinations that llguidance does not compile, each named.
            assert re.search("is not accepted: .{8,}|too complex", says), says
        return "refused"
    jsonschema.validate(json.loads(text), schema)
    return "valid"


def judge_pattern(pattern: str, write: Any) -> str:
    try:
        text = write(Regex(pattern))
    except IntaglioError as error:
        says = str(error)
        assert "\n" not in says
        if "not complete after" in says:
            return "unfinished"
        if "malformed" in says:
            with pytest.raises((re.error, FutureWarning)):
                _strict(pattern)
        else:
            assert re.search(r"\\b|\(\?[=<!]", pattern), says
            assert "look" in says
        return "refused"
    assert re.fullmatch(pattern, text, re.ASCII)
    return "valid"


def _strict(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        re.purge()
        re.compile(pattern, re.ASCII)


def tally(outcomes: list[str], count: int) -> None:
    assert outcomes.count("valid") >= count / 2, {name: outcomes.count(name) for name in set(outcomes)}
    assert outcomes.count("refused") >= 1 or count <= 20


def test_twenty_schemas() -> None:
    tally([judge_schema(schema, lambda c: tiny_output(c, 0)) for schema in schemas(20)], 20)


def test_twenty_regular_expressions() -> None:
    tally([judge_pattern(pattern, lambda c: tiny_output(c, 0)) for pattern in patterns(500)[::25]], 20)


@pytest.mark.slow
def test_five_hundred_schemas() -> None:
    """500 JSON Schemas (real ones and mutations) on a tiny random model: no invalid output, no hang."""
    tally([judge_schema(schema, lambda c, n=n: tiny_output(c, n, 100)) for n, schema in enumerate(schemas(500))], 500)


@pytest.mark.slow
def test_five_hundred_regular_expressions() -> None:
    """500 regular expressions on a tiny random model."""
    tally([judge_pattern(made, lambda c, n=n: tiny_output(c, n, 100)) for n, made in enumerate(patterns(500))], 500)


@pytest.mark.slow
def test_twenty_of_each_on_smollm2() -> None:
    checkpoint = load("smollm2")

    def write(constraint: Constraint) -> str:
        result = generate(checkpoint, "Give an example value:", constraint=constraint, max_new_tokens=64, chat=True)
        return str(result["text"])

    outcomes = [judge_schema(schema, write) for schema in schemas(500)[::25]]
    outcomes += [judge_pattern(made, write) for made in patterns(500)[::25]]
    tally(outcomes, 40)
