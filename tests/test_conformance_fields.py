"""What every published method promises of its fields: each changes a result, and defaults and presets are pinned."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from torch.nn import Module

from intaglio.errors import IntaglioError
from intaglio.methods.base import Carving, Fittable, accepted_fields
from intaglio.methods.registry import PUBLISHED, get_method
from tests import alive
from tests.examples import EXAMPLES, TEST_FILES
from tests.pins import COSTS_FILE, PINS_FILE, costs, pins

FIELDS = [(slug, field) for slug in PUBLISHED for field in accepted_fields(get_method(slug))]


@cache
def result(slug: str, fields: str) -> str:
    """The digest of a run; runs with the same fields are shared."""
    observe = getattr(TEST_FILES[slug], "observe", alive.observe)
    return alive.digest(observe(get_method(slug)(**_FIELDS[fields])))


_FIELDS: dict[str, dict[str, Any]] = {}


def run(slug: str, fields: dict[str, Any]) -> str:
    key = "".join(
        f"{name}: {value!r} {id(value) if isinstance(value, Module) else ''};" for name, value in fields.items()
    )
    _FIELDS[key] = fields
    return result(slug, key)


@pytest.mark.parametrize(
    ("slug", "field"),
    [pytest.param(*case, marks=pytest.mark.xdist_group(case[0]), id="-".join(case)) for case in FIELDS],
)
def test_every_field_changes_a_result(slug: str, field: str) -> None:
    values = TEST_FILES[slug].ALIVE
    assert field in values, (
        f"give {slug}.{field} another value in ALIVE of tests/methods/{PUBLISHED[slug].area}/test_{slug}.py"
    )
    value = values[field]
    if isinstance(value, str) and value.startswith("test_"):
        file, _, name = value.rpartition(":")
        module = import_module(f"tests.methods.{PUBLISHED[slug].area}.{file}") if file else TEST_FILES[slug]
        assert callable(getattr(module, name))
        return
    given = getattr(TEST_FILES[slug], "BASE", EXAMPLES[slug][0])
    if isinstance(value, alive.Alive):
        value, given = value.value, {**given, **value.given}
        if values[field].refused:
            with pytest.raises((IntaglioError, ValidationError)):
                run(slug, given | {field: value})
            return
    rest = {name: other for name, other in given.items() if name != field}
    assert value != given.get(field, get_method(slug).model_fields[field].default)
    assert run(slug, rest | {field: value}) != run(slug, given)


@pytest.mark.parametrize("slug", PUBLISHED)
def test_no_field_is_listed_that_is_not_there(slug: str) -> None:
    assert TEST_FILES[slug].ALIVE.keys() == set(accepted_fields(get_method(slug)))


@pytest.mark.parametrize("slug", PUBLISHED)
def test_the_repr_shows_the_accepted_fields(slug: str) -> None:
    method = get_method(slug)(**EXAMPLES[slug][0])
    assert {name for name, _ in method.__repr_args__()} == set(accepted_fields(type(method)))


PINNED: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(PINS_FILE.read_text(encoding="utf-8"))
COSTS: dict[str, list[list[list[float]]]] = yaml.safe_load(COSTS_FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("slug", PUBLISHED)
def test_defaults_and_presets_are_pinned_beside_the_card(slug: str) -> None:
    """A change shows in the diff of `make pins`."""
    values = {name: {k: v for k, v in row.items() if k not in ("card", "why")} for name, row in PINNED[slug].items()}
    assert values == pins(slug)


@pytest.mark.parametrize("slug", PUBLISHED)
def test_where_default_and_card_differ_the_reason_is_given(slug: str) -> None:
    differ = [name for name, row in PINNED[slug].items() if "card" in row and row["card"] != row["default"]]
    assert [name for name in differ if not PINNED[slug][name].get("why")] == []


@pytest.mark.parametrize("slug", PUBLISHED)
def test_a_value_of_the_paper_is_the_cards(slug: str) -> None:
    """`paper()` sets a field to the card's value, or the reason says which of two sources it follows."""
    rows = {name: row for name, row in PINNED[slug].items() if "paper" in row}
    assert [name for name, row in rows.items() if row["paper"] != row.get("card", ...) and not row.get("why")] == []


@pytest.mark.parametrize("slug", PUBLISHED)
def test_the_arguments_of_apply_and_fit_have_the_defaults_of_the_protocols(slug: str) -> None:
    for protocol, name in ((Carving, "apply"), (Fittable, "fit")):
        own, promised = getattr(get_method(slug), name, None), signature(getattr(protocol, name)).parameters
        for argument, parameter in signature(own).parameters.items() if own is not None else ():
            if argument in promised:
                assert parameter.default == promised[argument].default, f"{name}({argument})"


@pytest.mark.parametrize("slug", PUBLISHED)
def test_estimates_are_pinned(slug: str) -> None:
    found = [costs(get_method(slug)(**fields)) for fields in EXAMPLES[slug]]
    assert found == [[pytest.approx(cost, rel=1e-9) for cost in row] for row in COSTS[slug]]
