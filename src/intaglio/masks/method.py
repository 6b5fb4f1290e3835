"""`visibility` as a step of a recipe, and visibility as a live part of a checkpoint: kept as data, put back on loading.

steps:
  - visibility: {layers: "16:", rule: bidirectional}
  - visibility: {layers: [0, 1], rule: {sliding: {window: 64, sinks: 4}}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, shorten
from intaglio.masks.registry import describe, read_rule
from intaglio.masks.rules import Rule, rule_from_dict
from intaglio.masks.visibility import clear_visibility, get_visibility, set_visibility
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy

SLUG = "visibility"
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(\d+))?")


def layer_numbers(layers: str | int | Sequence[int], depth: int) -> list[int]:
    """Return the layers that a step names, in order, from 0.

    Args:
        layers: `all`, a number, numbers (negative ones count from the end), or a slice such as `"16:"` or `"::2"`.
        depth: layers of the model.

    Raises:
        IntaglioError: a layer does not exist, or none is named.
    """
    if layers == "all":
        return list(range(depth))
    if isinstance(layers, str):
        match = _SLICE.fullmatch(layers)
        if match is None or match[3] == "0":
            raise IntaglioError(f'layers is {shorten(repr(layers))}; accepted: all, numbers, or a slice such as "16:"')
        found = list(range(depth))[slice(*(int(part) if part else None for part in match.groups()))]
    else:
        numbers = [layers] if isinstance(layers, int) else list(layers)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not -depth <= number < depth:
                raise IntaglioError(f"layers names the layer {number!r}; the model has the layers 0 to {depth - 1}")
        found = sorted({number % depth for number in numbers})
    if not found:
        raise IntaglioError(f"layers is {layers!r}, which names no layer of the model")
    return found


def check_windows(windows: Sequence[int | None], rules: Mapping[int, Rule]) -> None:
    """Refuse a rule that names more positions than a layer's own sliding window has.

    Args:
        windows: of each layer, None where it sees everything (`Anatomy.windows`).
        rules: layer -> rule.

    Raises:
        IntaglioError: the window would cut the rule off in silence.
    """
    for layer, rule in rules.items():
        window = windows[layer]
        if window is not None and rule.extent is not None and rule.extent > window:
            asks = "any distance" if rule.extent == float("inf") else f"{rule.extent:g} positions"
            raise IntaglioError(
                f"the rule {describe(rule)} reaches over {asks}, and layer {layer} has a sliding window of {window}, "
                "which would cut it off; name a smaller one, or leave that layer out"
            )


def keep(checkpoint: Checkpoint, rules: Mapping[int, Rule]) -> None:
    """Set the rules of a checkpoint's layers, in place of all it had, and note them as its live part.

    Args:
        checkpoint: its model is changed in place.
        rules: layer -> rule; layers not named keep the model's own mask. Empty: the stock model again.

    Raises:
        IntaglioError: the model cannot have such rules (see `set_visibility`), or its windows are smaller.
    """
    check_windows(anatomy(checkpoint.model).windows, rules)
    if rules:
        set_visibility(checkpoint.model, rules)
    else:
        clear_visibility(checkpoint.model)
    checkpoint.set_runtime_state(SLUG, {"layers": as_data(rules)} if rules else None)


def as_data(rules: Mapping[int, Rule]) -> list[dict[str, Any]]:
    """Return rules as plain data, layers with equal rules together.

    Args:
        rules: layer -> rule.
    """
    groups: list[tuple[Rule, list[int]]] = []
    for layer in sorted(rules):
        same = next((layers for rule, layers in groups if rule == rules[layer]), None)
        if same is None:
            groups.append((rules[layer], [layer]))
        else:
            same.append(layer)
    return [{"layers": layers, "rule": rule.to_dict()} for rule, layers in groups]


def from_data(data: Iterable[Mapping[str, Any]]) -> dict[int, Rule]:
    """Return what `as_data` was given.

    Args:
        data: from `as_data`.
    """
    found: dict[int, Rule] = {}
    for group in data:
        found.update(dict.fromkeys(group["layers"], rule_from_dict(group["rule"])))
    return found


class Visibility(Method, slug=SLUG):
    """Says what layers of a model see: the named rules as a step of a recipe.

    Layers that the step does not name keep what they see. Rules are no weights: the checkpoint becomes a live one,
    which `intaglio.load` reads. A rule that looks right does away with next-token prediction and with the cache.

    Args:
        layers: `all` (default), a number, numbers (negative ones count from the end), or a slice such as `"16:"`.
        rule: a name (`causal`, `bidirectional`), a name with its fields (`prefix_lm`, `sliding`, `dilated`, `blocks`,
            `packed`, `arbitrary`), or rules joined by `and`, `or`, `not`. `stock` gives the model's own mask back.
    """

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"attention"})

    layers: str | int | list[int] = "all"
    rule: Any

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        layer_numbers(value, 1 << 20)  # its form; the depth is not known yet
        return value

    @field_validator("rule", mode="before")
    @classmethod
    def _rule(cls, value: Any) -> Any:
        return value if value == "stock" else read_rule(value).to_dict()

    @property
    def made(self) -> Rule | None:
        """The rule; None for the model's own mask."""
        return None if self.rule == "stock" else rule_from_dict(self.rule)

    @property
    def invalidates(self) -> frozenset[Capability]:  # type: ignore[override]
        """The stock mask that verifying drafts relies on; under a rule that looks right, next-token prediction too."""
        rule = self.made
        if rule is None:
            return frozenset()
        return frozenset({"cache", "causal"} if rule.is_noncausal else {"cache"})

    @property
    def restores(self) -> frozenset[Capability]:  # type: ignore[override]
        """Where every layer gets the model's own mask back, what rules had done away with."""
        return frozenset({"cache", "causal"} if self.made is None and self.layers == "all" else ())

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: they stay as they are."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, a model without the layers that are named, or with smaller windows.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: names the layer.
        """
        rule, layers = self.made, layer_numbers(self.layers, len(parts.blocks))
        if rule is not None:
            check_windows(parts.windows, dict.fromkeys(layers, rule))

    def estimate(self, workload: Workload) -> Cost:
        """Return nothing: no weight is looked at."""
        return Cost()

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Set the rule on the layers of `checkpoint` and return it.

        Args:
            checkpoint: changed in place.
            calibration: not used.
            seed: not used.
            batch_size: not used.
            progress: not used.

        Raises:
            IntaglioError: a layer does not exist, its window is smaller, or the model takes no rules.
        """
        parts, rule = anatomy(checkpoint.model), self.made
        self.check_model(parts)
        layers = layer_numbers(self.layers, len(parts.blocks))
        rules = {layer: known for layer, known in get_visibility(checkpoint.model).items() if layer not in layers}
        keep(checkpoint, rules if rule is None else {**rules, **dict.fromkeys(layers, rule)})
        checkpoint.record_step(SLUG, self.model_dump(), seed=seed)
        return checkpoint

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Set the rules of a record on a model that was just loaded.

        Args:
            part: of the record.
            checkpoint: its model is changed in place.
        """
        set_visibility(checkpoint.model, from_data(part["layers"]))
