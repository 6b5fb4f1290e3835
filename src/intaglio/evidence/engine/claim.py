"""Claims: one primary comparison, fixed and committed before its first run, and the protocol of what runs it.

A claim names *arms* (method, baseline, ceiling, ablations) and a *design* that runs one arm of one unit:

    result = claim.design.run(arm, key, settings)

- `arm` is the `Arm` of the claim; its `settings` say what differs from the other arms.
- `key` is the `RunKey`: the stage, the unit's index, and the seed that follows from them. Everything random is drawn
  from `key.seed` (never from the arm), so that the arms of a unit are pairs. `key.split` names the data to measure on.
- `settings` are the tuned values, such as `{"learning_rate": 1e-3}`, overridden by the arm's own.
- `result` holds the metrics, the cost, and digests of what all arms of a unit must share.

Nothing here imports torch or numpy.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol

Stage = Literal["tune", "probe", "look", "toy"]
Split = Literal["validation", "pilot", "evaluation"]
Kind = Literal["better", "as good as"]
Tier = Literal["cpu", "gpu"]
Settings = Mapping[str, Any]
Grid = Mapping[str, Sequence[Any]]

ALPHAS: Mapping[int, tuple[float, ...]] = {
    1: (0.05,),
    2: (0.02, 0.03),
    3: (0.01, 0.015, 0.025),
    4: (0.005, 0.01, 0.015, 0.02),
}
"""Two-sided alpha of each look by the number of looks; they add up to 5 % (union bound)."""
PROBE_UNITS = 3
ABLATION_UNITS = 3
MAX_ABLATIONS = 4
MAX_INDEX = 50_000
MAX_SEED_BASE = 1_000


@dataclass(frozen=True)
class Metric:
    """A quantity that a design measures, `name` in `Result.values`.

    `relative` compares arms by (method - baseline) / baseline, so that `delta` is a share. Golden numbers may hold
    `continuous` metrics: losses and scores, not counts, accuracies or argmaxes.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"] = "lower"
    relative: bool = False
    continuous: bool = True


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: what it is, in a few words, and how it differs from the others.

    `settings` are what the design needs to build it: numbers, strings, methods, and mappings or sequences of these.
    They override tuned settings. `tune` is a grid of its own instead of the claim's.
    """

    what: str
    settings: Settings = field(default_factory=dict)
    tune: Grid | None = None


@dataclass(frozen=True)
class RunKey:
    """Identity of a unit: what its seed and its data follow from. It is the same for all arms of the unit.

    Stages are `tune` (validation data), `probe` (pilot data), `look` (sealed evaluation data) and `toy`; the seed base
    is 0 for the committed record and differs in reruns; each version of a claim has seeds of its own.
    """

    stage: Stage
    index: int
    base: int = 0
    version: int = 1

    @property
    def seed(self) -> int:
        """A number below 2**32 that no other stage, index, base or version (below 20) has."""
        index = self.index + (MAX_INDEX if self.stage == "tune" else 0)
        block = MAX_SEED_BASE * (self.version - 1) + self.base
        return 2 * (2 * MAX_INDEX * block + index) + (self.stage != "look")

    @property
    def split(self) -> Split:
        """The data set that the unit is measured on."""
        return "validation" if self.stage == "tune" else "evaluation" if self.stage == "look" else "pilot"


@dataclass(frozen=True)
class Cost:
    """Tokens that the method saw, its operations, nonzero parameters left, wall time and peak memory of its work."""

    tokens: int = 0
    flops: float = 0.0
    parameters: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Result:
    """Measurements of one arm of one unit.

    `values` are `{metric: value}`, or `{metric: {inner unit: value}}` where a unit measures several things, such as
    documents. Members of a cluster are named `cluster/member`, such as `numpy/17`; they are averaged first. None, NaN
    or an infinity is a diverged value. All arms of a unit have the same inner units and the same `parity`, such as a
    digest of their training data.
    """

    values: Mapping[str, float | Mapping[str, float | None] | None]
    cost: Cost = Cost()
    parity: Mapping[str, str] = field(default_factory=dict)


class Design(Protocol):
    """Runner of one arm of one unit: a picklable frozen dataclass, whose fields are part of the registration."""

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Run an arm on a unit; equal arguments give equal values on one machine."""
        ...

    def toy(self, **changes: Any) -> Design:
        """Return the same design in miniature (well under a second a run, no downloads), for golden numbers."""
        ...


@dataclass(frozen=True)
class Claim:
    """One claim of one method.

    Effects are always "larger = the method is better", whatever the metric's direction.

    Args:
        version: from 1; raised when mechanism or experiment change in a way that may change results.
        says: the paper's headline in one plain sentence.
        delta: least difference that would matter to a user, above 0, in the metric's unit (a share where relative).
        arms: by name, in the order in which tables show them. Each one has a role in the fields below.
        baseline: arm that a user would otherwise take.
        ceiling: arm with the best value that the metric could reach here (dense model, all data, oracle). Probe: the
            claim needs headroom. Default None: not judged.
        floor: for `as good as`, an arm known to be worse than the baseline: the metric must be able to tell. Default
            None: not judged.
        kind: `better` (by more than delta) or `as good as` (not worse by more than delta). Default `better`.
        crossed: whether every unit measures the same inner units (documents, prompts), which are then sampled as well;
            otherwise inner units belong to their unit and are averaged. Default False.
        unit_names: of a unit, and of an inner unit if there are any. Default `("training seed",)`.
        looks: numbers of units at which the interval is looked at. Default (5, 10, 20, 40).
        tune: `{setting: values}` tried on validation data by baseline and method, all combinations. Numbers in
            increasing order are extended once where the best is at an edge. Default: nothing is tuned.
        closed: tuned settings whose grid covers all sensible values, so that it is not extended. Default: none.
        tune_units: units that each combination is tried on. Default 1.
        ablations: arms run on three units with the method's settings, reported without a verdict. Default: none.
        reported: the same with the baseline's settings (peers, reference points). At most four with the ablations.
        equal: fields of `Cost` that must be equal for baseline and method; it is checked. Default: none.
        parity: budget that is equal over the arms, in a sentence.
        minutes: core-minutes that the whole run may take by the probe's projection, at most 60. Default 15.
        use_when: completes "Use it when ..."; `otherwise` completes "otherwise take ..." (default: the baseline).
        advice: sentence for the user that replaces the composed one; written after the run. Default "": composed.
        reason: why this version differs from the one before, from CLAIMS or the paper. Default "".
        toy: changes for `Design.toy`. Default: none.
        golden: `{arm: {metric: value}}` of the toy configuration, checked to a relative 1e-3. Default: none.

    Raises:
        ValueError: the claim contradicts itself.
    """

    slug: str
    version: int
    says: str
    metric: Metric
    delta: float
    design: Design
    arms: Mapping[str, Arm]
    baseline: str
    method: str
    parity: str
    use_when: str
    ceiling: str | None = None
    floor: str | None = None
    kind: Kind = "better"
    crossed: bool = False
    unit_names: tuple[str, ...] = ("training seed",)
    looks: tuple[int, ...] = (5, 10, 20, 40)
    tune: Grid = field(default_factory=dict)
    closed: tuple[str, ...] = ()
    tune_units: int = 1
    ablations: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    equal: tuple[str, ...] = ()
    minutes: float = 15
    tier: Tier = "cpu"
    otherwise: str = ""
    advice: str = ""
    reason: str = ""
    toy: Settings = field(default_factory=dict)
    golden: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = [self.baseline, self.method, self.ceiling, self.floor, *self.ablations, *self.reported]
        named = [arm for arm in roles if arm is not None]
        metrics = {metric.name: metric for metric in (self.metric, *self.metrics)}
        trials = {arm: len(combinations(self.grid(arm))) for arm in (self.baseline, self.method) if arm in self.arms}
        for wrong, reason in (
            (not 0 < self.delta < float("inf"), f"delta is {self.delta}; it must be above 0"),
            (not 1 <= self.version < 20, f"version is {self.version}; accepted: 1 to 19"),
            (sorted(named) != sorted(self.arms), "every arm has exactly one role, and every role an arm"),
            (list(self.looks) != sorted(set(self.looks)) or len(self.looks) not in ALPHAS, "looks must increase, 1-4"),
            (bool(self.looks) and not 3 <= self.looks[0] <= self.looks[-1] <= MAX_INDEX, "a look needs 3 units"),
            (len(self.ablations) + len(self.reported) > MAX_ABLATIONS, f"at most {MAX_ABLATIONS} ablations"),
            (self.crossed and len(self.unit_names) != 2, "a crossed claim names its units and its inner units"),
            (self.floor is not None and self.kind == "better", "a floor is for claims of the kind 'as good as'"),
            (bool(set(self.equal) - {f.name for f in fields(Cost)}), f"equal names no cost: {', '.join(self.equal)}"),
            (not 0 < self.minutes <= 60, f"minutes is {self.minutes}; accepted: up to 60"),
            (trials.get(self.baseline, 0) < trials.get(self.method, 0), "the baseline is tuned less than the method"),
            (self.version > 1 and not self.reason, "a version above 1 gives its reason"),
        ):
            if wrong:
                raise ValueError(f"the claim of {self.slug}: {reason}")
        for arm, values in self.golden.items():
            for name in values:
                if arm not in self.arms or (name in metrics and not metrics[name].continuous):
                    raise ValueError(f"the claim of {self.slug}: golden numbers cannot hold {name!r} of arm {arm!r}")

    @property
    def alphas(self) -> tuple[float, ...]:
        """Two-sided alpha of each look."""
        return ALPHAS[len(self.looks)]

    def grid(self, arm: str) -> Grid:
        """Return the grid that an arm is tuned over."""
        own = self.arms[arm].tune
        return self.tune if own is None else own

    def settings_source(self, arm: str) -> str:
        """Return the tuned arm whose settings an arm uses: the method for its ablations, the baseline for others."""
        return self.method if arm == self.method or arm in self.ablations else self.baseline

    def registered(self) -> dict[str, Any]:
        """Return every choice that decides the result, as JSON.

        Left out are prose for users, the toy and its golden numbers. Everything else is described by its name and
        non-default fields, so that an option added later changes nothing.
        """
        prose = {"parity", "use_when", "otherwise", "advice", "reason", "toy", "golden", "minutes"}
        chosen = {name: value for name, value in _changed(self).items() if name not in prose}
        return describe(chosen) | {"looks": list(self.looks), "alphas": list(self.alphas)}

    def unequal_costs(self, costs: Iterable[Cost]) -> list[str]:
        """Return the names in `equal` that differ among some costs."""
        of_arms = list(costs)
        return [name for name in self.equal if len({getattr(cost, name) for cost in of_arms}) > 1]

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the registered choices."""
        text = json.dumps(self.registered(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def combinations(grid: Grid) -> list[dict[str, Any]]:
    """Return all combinations of a grid's values; an empty grid has one, without settings."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def describe(value: Any) -> Any:
    """Return a setting as JSON: a method or dataclass becomes its name and non-default fields."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Arm):
        return {"settings": describe(value.settings), "tune": describe(value.tune)}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(describe(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: describe(_changed(value))}
    if hasattr(value, "model_dump"):
        return {getattr(value, "slug", type(value).__name__): value.model_dump(mode="json", exclude_defaults=True)}
    if callable(value):
        return value.__qualname__
    raise TypeError(f"{type(value).__name__} cannot be a setting of a claim")


def _changed(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    defaults = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(value)}
    return {name: getattr(value, name) for name, default in defaults.items() if getattr(value, name) != default}
