"""Defaults, presets and estimates of a method, as `pinned.yaml` and `pinned_costs.yaml` hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from intaglio.data.texts import load_texts
from intaglio.methods.base import Workload, accepted_fields
from intaglio.methods.registry import get_method

PINS_FILE, COSTS_FILE = (Path(__file__).with_name(name) for name in ("pinned.yaml", "pinned_costs.yaml"))
REQUIRED: dict[str, dict[str, Any]] = {"omp_transplant": {"donor": "DONOR"}, "dyspec": {"draft": "DRAFT"}} | {
    slug: {"sparsity": 0.5} for slug in ("dsnot", "wanda", "magnitude", "sparsegpt")
}
"""Fields that a preset cannot be made without."""
WORKLOAD = Workload(((64, 32), (32, 64), (48, 32)), 40960, 81920, 32, 128, 32, 4, 2)


def presets(slug: str) -> dict[str, dict[str, Any]]:
    """Return the fields of what each named constructor of the class itself returns."""
    method = get_method(slug)
    names = [
        name
        for name, made in vars(method).items()
        if isinstance(made, classmethod)
        and name not in ("restore", "from_checkpoint")
        and made.__func__.__annotations__.get("return") == "Self"
    ]
    return {name: getattr(method, name)(**REQUIRED.get(slug, {})).model_dump() for name in names}


def pins(slug: str) -> dict[str, dict[str, Any]]:
    """Return for each field the default, and the values of the presets that differ from it."""
    fields, made, required = get_method(slug).model_fields, presets(slug), REQUIRED.get(slug, {})
    rows = {}
    for name in accepted_fields(get_method(slug)):
        if not fields[name].is_required():
            default = fields[name].get_default(call_default_factory=True)
            if isinstance(default, list):
                default = [item.model_dump() if isinstance(item, BaseModel) else item for item in default]
            others = {preset: values[name] for preset, values in made.items() if values[name] != default}
            rows[name] = {"default": default} | (others if name not in required else {})
    return rows


def costs(method: Any) -> list[list[float]]:
    """Return every estimate that a method makes, as numbers."""
    made = []
    if "carving" in method.kinds:
        made.append(method.estimate(WORKLOAD))
    if hasattr(method, "training_cost"):
        made.append(method.training_cost(WORKLOAD, 100.0, 64, 1e6))
    if type(method).fitted:
        made.append(method.estimate_fit(WORKLOAD, load_texts(["the quick brown fox", "a lazy dog"] * 9)))
    return [[float(cost.flops), float(cost.sorted_elements), float(cost.extra_bytes)] for cost in made]
