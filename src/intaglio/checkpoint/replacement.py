"""Bases of methods that replace projections or whole MLPs by modules of their own.

They select the layers, refuse models that do not fit before any work, and check a reloaded model; `modeling.targets`
replaces the modules. Both are mixed in beside `Method`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, Field
from torch import nn

from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.modeling.replacement import ReplacedLinear, ReplacedMLP
from intaglio.modeling.targets import check_patterns, plan_replacements, projections, select_layers


class _Replaces(BaseModel):
    """Shared part of both bases."""

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "activations"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    module_types: ClassVar[tuple[type[nn.Module], ...]]
    """The modules that the method puts into a model."""

    @classmethod
    def modules_of(cls, model: nn.Module) -> dict[str, Any]:
        """Return the method's modules in a model by name, parts of fused modules apart."""
        return {name: module for name, module in model.named_modules() if isinstance(module, cls.module_types)}

    @classmethod
    def check_restored(cls, model: nn.Module, count: int) -> None:
        """Refuse a loaded model that has another number of the method's modules than its record names."""
        there = len(cls.modules_of(model))
        if there != count:
            slug = cast(type[Method], cls).slug
            raise IntaglioError(f"the model has {there} layers of {slug}, and its record names {count}")

    def refuse_frozen(self, model: nn.Module, weights: Iterable[nn.Parameter] | None = None) -> None:
        """Refuse to train beside adapters, or where none of some weights (default: of the model's) is trained.

        Raises:
            IntaglioError: LoRA adapters are attached, or the weights are frozen.
        """
        trained = model.parameters() if weights is None else weights
        # Adapters stand where the projections were.
        if getattr(model, "peft_config", None) or not any(weight.requires_grad for weight in trained):
            slug = cast(Method, self).slug
            raise IntaglioError(f"{slug} trains weights of the layers that it replaces; leave lora and freeze out")


class ReplacesLinears(_Replaces):
    """Base of methods that replace projections.

    Args:
        targets: projections by name or shell pattern. Default: all of the blocks'.
        ignore: projections left alone, in the same way. Default: none.
    """

    module_types: ClassVar[tuple[type[ReplacedLinear], ...]]
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})

    targets: Annotated[list[str], Field(min_length=1)] | None = None
    ignore: list[str] = Field(default_factory=list)

    @property
    def patterns(self) -> dict[str, Sequence[str]]:
        """The names and patterns of all fields that select projections."""
        return {"targets": self.targets or [], "ignore": self.ignore}

    def target_names(self, names: Sequence[str]) -> list[str]:
        """Return the projections that are replaced, in order.

        Args:
            names: all plain projections, such as `layers.3.self_attn.q_proj`.

        Raises:
            IntaglioError: there is none, a pattern matches none, or none is left.
        """
        if not names:
            slug = cast(Method, self).slug
            raise IntaglioError(f"no projection of this model is a plain matrix, so {slug} has nothing to replace")
        check_patterns(names, self.patterns)
        indices = select_layers(names, self.targets, self.ignore)
        if not indices:
            raise IntaglioError("targets and ignore leave no layer of this model to replace")
        return [names[index] for index in indices]

    def plan(self, model: nn.Module) -> list[str]:
        """Return the names of the projections to replace in a model, before any work.

        Raises:
            IntaglioError: see `target_names` and `layers.plan_replacements`.
        """
        names = self.target_names([name for name, _ in projections(model)])
        plan_replacements(model, names)
        return names

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse names that match none of the projections `(name, rows, columns)`."""
        self.target_names([name for name, _, _ in linears])


class ReplacesMLPs(_Replaces):
    """Base of methods that replace the MLP of blocks."""

    module_types: ClassVar[tuple[type[ReplacedMLP], ...]]

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any projections: whole MLPs are replaced."""


def non_default_fields(method: BaseModel) -> list[str]:
    """Return the names of the fields whose value is not the default."""
    fields = type(method).model_fields.items()
    return [name for name, field in fields if getattr(method, name) != field.get_default(call_default_factory=True)]
