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
from intaglio.masks.visibility import attention_functions, clear_visibility, get_visibility, set_visibility
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy

SLUG = "visibility"
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(\d+))?")


def layer_numbers(layers: str | int | Sequence[int], depth: int) -> list[int]:
    """Return the layer indices that a step names, in order, from 0."""
    if layers == "all":
        return list(range(depth))
    if isinstance(layers, str):
        match = _SLICE.fullmatch(layers)
        if match is None or match[3] == "0":
            raise IntaglioError(f'layers is {shorten(repr(layers))}; accepted: all, numbers, or a slice such as "16:"')
        indices = list(range(depth))[slice(*(int(part) if part else None for part in match.groups()))]
    else:
        numbers = [layers] if isinstance(layers, int) else list(layers)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not -depth <= number < depth:
                raise IntaglioError(f"layers names the layer {number!r}; the model has the layers 0 to {depth - 1}")
        indices = sorted({number % depth for number in numbers})
    if not indices:
        raise IntaglioError(f"layers is {layers!r}, which names no layer of the model")
    return indices


def check_windows(windows: Sequence[int | None], rules: Mapping[int, Rule]) -> None:
    """Refuse a rule that needs more positions than a layer's own sliding window has."""
    for layer, rule in rules.items():
        window = windows[layer]
        if window is not None and rule.extent is not None and rule.extent > window:
            reach = "any distance" if rule.extent == float("inf") else f"{rule.extent:g} positions"
            raise IntaglioError(
                f"the rule {describe(rule)} reaches over {reach}, and layer {layer} has a sliding window of {window}, "
                "which would cut it off; name a smaller one, or leave that layer out"
            )


def keep(checkpoint: Checkpoint, rules: Mapping[int, Rule]) -> None:
    """Replace all rules of a checkpoint's layers and record them as its live part."""
    check_windows(anatomy(checkpoint.model).windows, rules)
    for layer, function in attention_functions(checkpoint.model).items():
        if layer in rules and getattr(function, "takes_request", False):
            raise IntaglioError(
                f"layer {layer} has the attention of another step, which a rule cannot mask; leave it out"
            )
    if rules:
        set_visibility(checkpoint.model, rules)
    else:
        clear_visibility(checkpoint.model)
    checkpoint.set_runtime_state(SLUG, {"layers": as_data(rules)} if rules else None)


def as_data(rules: Mapping[int, Rule]) -> list[dict[str, Any]]:
    """Return rules as plain data, layers with equal rules together."""
    groups: list[tuple[Rule, list[int]]] = []
    for layer in sorted(rules):
        same = next((layers for rule, layers in groups if rule == rules[layer]), None)
        if same is None:
            groups.append((rules[layer], [layer]))
        else:
            same.append(layer)
    return [{"layers": layers, "rule": rule.to_dict()} for rule, layers in groups]


def from_data(data: Iterable[Mapping[str, Any]]) -> dict[int, Rule]:
    """Return rules from the data of `as_data`."""
    rules: dict[int, Rule] = {}
    for group in data:
        rules.update(dict.fromkeys(group["layers"], rule_from_dict(group["rule"])))
    return rules


class Visibility(Method, slug=SLUG):
    """Set the attention mask of layers by a named rule, as a recipe step.

    Other layers keep their masks. Rules are not weights: the checkpoint becomes a live one, which `intaglio.load`
    reads. A rule that sees later tokens rules out next-token prediction and the KV cache.

    Args:
        layers: `all` (default), a number, numbers (negative ones count from the end), or a slice such as `"16:"`.
        rule: a name (`causal`, `bidirectional`), a name with its fields (`prefix_lm`, `sliding`, `dilated`, `blocks`,
            `packed`, `arbitrary`), or rules joined by `and`, `or`, `not`. `stock` restores the model's own mask.
    """

    kinds = ("carving", "visibility")
    summary = "sets by rule which positions the attention layers see"

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"attention"})

    layers: str | int | list[int] = "all"
    rule: Any

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        layer_numbers(value, 1 << 20)  # checks the format only: the depth is not known yet
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
        """The stock mask, needed to verify drafts; under a rule that sees later tokens, next-token prediction too."""
        rule = self.made
        if rule is None:
            return frozenset()
        return frozenset({"cache", "causal"} if rule.is_noncausal else {"cache"})

    @property
    def restores(self) -> frozenset[Capability]:  # type: ignore[override]
        """Where every layer gets the model's own mask back, the capabilities that rules had removed."""
        return frozenset({"cache", "causal"} if self.made is None and self.layers == "all" else ())

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: they stay as they are."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model without the named layers, or with smaller windows."""
        rule, layers = self.made, layer_numbers(self.layers, len(parts.blocks))
        if rule is not None:
            check_windows(parts.windows, dict.fromkeys(layers, rule))

    def estimate(self, workload: Workload) -> Cost:
        """Return a cost of zero."""
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
        """Set the rule on the layers of `checkpoint` and return it."""
        parts, rule = anatomy(checkpoint.model), self.made
        self.check_model(parts)
        layers = layer_numbers(self.layers, len(parts.blocks))
        rules = {layer: known for layer, known in get_visibility(checkpoint.model).items() if layer not in layers}
        keep(checkpoint, rules if rule is None else {**rules, **dict.fromkeys(layers, rule)})
        checkpoint.record_step(SLUG, self.model_dump(), seed=seed)
        return checkpoint

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Set the rules of a record on a loaded model."""
        set_visibility(checkpoint.model, from_data(part["layers"]))
