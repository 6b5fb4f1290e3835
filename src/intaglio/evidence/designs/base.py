"""Shared parts of designs: the model that is measured, tuned fields of methods, and costs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.evidence.engine.claim import Arm, Cost, RunKey
from intaglio.evidence.testbeds.splits import Windows
from intaglio.measures.memory import Peak

Settings = Mapping[str, Any]
Values = Mapping[str, float | Mapping[str, float | None] | None]


@dataclass(frozen=True, eq=False)
class Measured:
    """A model in evaluation mode, and what it came from (None: unknown)."""

    checkpoint: Checkpoint
    bed: Any
    key: RunKey
    settings: Settings
    original: Checkpoint | None = None

    @cached_property
    def documents(self) -> Windows:
        """The documents of the run's set."""
        windows: Windows = self.bed.documents(self.key.split, self.key.base)
        return windows


Measure = Callable[[Measured], Values]


def training_cost(checkpoint: Checkpoint, tokens: int, spent: Peak) -> Cost:
    """Return the cost of a training, 6 operations a parameter and token."""
    parameters = nonzero_parameters(checkpoint)
    return Cost(tokens, 6.0 * parameters * tokens, parameters, spent.seconds, spent.bytes)


def nonzero_parameters(checkpoint: Checkpoint) -> int:
    """Return the number of parameters that are not zero."""
    return sum(int(p.count_nonzero()) for p in checkpoint.model.parameters())


class BedDesign:
    """Base of designs on a test bed `bed`; `MINIATURE` holds the fields that change with the test bed in miniature."""

    bed: Any
    MINIATURE: ClassVar[Mapping[str, Any]] = {}

    def toy(self, **changes: Any) -> Any:
        """Return the design on its test bed in miniature; `changes` are fields of the test bed."""
        return dataclasses.replace(self, bed=self.bed.toy(**changes), **self.MINIATURE)  # type: ignore[type-var]


class Configured:
    """The settings of an arm, tuned ones included: a design pops its own, the rest are fields of the arm's methods."""

    def __init__(self, arm: Arm, tuned: Settings) -> None:
        self.settings: dict[str, Any] = {**tuned, **arm.settings}
        self._own = set(arm.settings)
        self.used: set[str] = set()

    def pop(self, name: str, default: Any = None) -> Any:
        """Remove and return a setting."""
        return self.settings.pop(name, default)

    def pop_all(self, names: Sequence[str]) -> dict[str, Any]:
        """Remove and return the settings of some names that are given."""
        return {name: self.settings.pop(name) for name in names if name in self.settings}

    def fill(self, method: Any) -> Any:
        """Return a method with the remaining settings that are fields of it."""
        pydantic = hasattr(method, "model_fields_set")
        declared = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
        names = type(method).model_fields if pydantic else [f.name for f in declared]
        own = {name: value for name, value in self.settings.items() if name in names}
        self.used |= own.keys()
        if not own:
            return method
        if not pydantic:
            return dataclasses.replace(method, **own)
        return type(method)(**{**{name: getattr(method, name) for name in method.model_fields_set}, **own})

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the arm's own settings, and the tuned ones that a function takes."""
        names = inspect.signature(function).parameters
        return {name: value for name, value in self.settings.items() if name in self._own or name in names}

    def check(self) -> None:
        """Raise an IntaglioError if a setting of the arm itself reached nothing; tuned ones may, as in a dense arm."""
        unused = self.settings.keys() & self._own - self.used
        if unused:
            raise IntaglioError(f"the settings {', '.join(sorted(unused))} of the arm are no field of its methods")
