"""One-time script: convert records of format 1 (`evidence/results/SLUG.json`) to columnar ones of version 1.

Intervals and verdicts follow from the recorded values by the present rules: one look at alpha .05. Run it again for a
claim that was migrated unchanged, so that its record carries the claim's digest; delete it when the claims are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.claim import Cost, Metric
from intaglio.evidence.engine.record import ArmSummary, LookSummary, Record
from intaglio.evidence.engine.registration import git, load_claim
from intaglio.evidence.engine.run import _mean, _round
from intaglio.evidence.engine.statistics import MAX_DIVERGED, diverged_share, pair, spread, verdicts

RESULTS = records.EVIDENCE / "results"


def converted(path: Path) -> Record:
    """Return the new record of an old one."""
    old: dict[str, Any] = json.loads(path.read_text())
    slug, kind, delta = old["slug"], old["kind"], old["delta"]
    metric = Metric(old["metric"], old["unit"], old["direction"])
    crossed = old["design"] == "crossed"
    names = sorted({name for run in old["runs"] for name in run["outcome"]["values"]} - {metric.name})
    values = {
        name: {
            arm: [r["outcome"]["values"].get(name, {}) for r in old["runs"] if (r["stage"], r["arm"]) == ("run", arm)]
            for arm in old["arms"]
        }
        for name in (metric.name, *names)
    }
    primary = values[metric.name]
    differences = pair(primary[old["baseline"]], primary[old["method"]], metric, crossed)
    seen = spread(differences.x, delta, crossed)
    effect, reach = float(seen.effect), float(seen.half_width(0.05))
    verdict = str(verdicts(effect - reach, effect + reach, delta, kind))
    if differences.baseline_diverged > MAX_DIVERGED:
        verdict = "undecided"
    elif differences.method_diverged > MAX_DIVERGED:
        verdict = "worse"
    interval = (_round(effect - reach), _round(effect + reach))

    def unit_means(name: str, arm: str) -> list[float | None]:
        return [None if None in unit.values() else _mean(unit.values()) for unit in values[name][arm]]

    roles = {old["baseline"]: "baseline", old["method"]: "method"}
    arms = {
        arm: ArmSummary(
            what=summary["what"],
            role=roles.get(arm, "reported"),
            units=len(primary[arm]),
            mean=_mean(unit_means(metric.name, arm)),
            diverged=diverged_share(primary[arm]),
            settings={"choice": old["tuned"][arm]["chosen"]} if arm in old["tuned"] else {},
            cost=Cost(**old["cost"][arm]),
            metrics={name: _mean(unit_means(name, arm)) for name in names},
        )
        for arm, summary in old["arms"].items()
    }
    claim = load_claim(slug) if records.is_registered(slug) else None
    if claim is not None and claim.version > 1:
        claim = None
    prose = claim or SimpleNamespace(
        use_when="your setting is like the one tested",
        otherwise=old["arms"][old["baseline"]]["what"],
        advice="",
        kind=kind,
    )
    seconds = {
        arm: [round(r["outcome"]["cost"]["seconds"], 2) for r in old["runs"] if (r["stage"], r["arm"]) == ("run", arm)]
        for arm in old["arms"]
    }
    stages = {"tune": "tuning", "probe": "pilot", "look": "run"}
    spent = {
        new: round(sum(r["outcome"]["cost"]["seconds"] for r in old["runs"] if r["stage"] == then) / 60, 2)
        for new, then in stages.items()
    }
    return Record(
        slug=slug,
        version=1,
        digest="" if claim is None else claim.digest,
        says=old["claim"],
        kind=kind,
        metric=metric,
        delta=delta,
        crossed=crossed,
        unit_names=tuple(old["preregistration"]["factors"]),
        tier=old["tier"],
        parity=old["parity"],
        minutes=60,
        verdict=verdict,
        why="last look" if verdict == "undecided" else "decided",
        advice=records.compose_advice(prose, verdict, interval[0]),  # type: ignore[arg-type]
        otherwise=records.alternative(prose),  # type: ignore[arg-type]
        effect=_round(effect),
        interval=interval,
        level=0.95,
        units=len(differences.x),
        baseline=old["baseline"],
        method=old["method"],
        ceiling=None,
        headroom=None,
        arms=arms,
        looks=(LookSummary(len(differences.x), 0.95, _round(effect), interval, verdict),),
        probe={},
        tuning={
            arm: [{"settings": {"choice": choice}, "mean": mean} for choice, mean in tuned["means"].items()]
            for arm, tuned in old["tuned"].items()
        },
        differences=np.vectorize(lambda x: float(f"{x:.4g}"))(differences.x).tolist(),
        inner=sorted(primary[old["baseline"]][0]) if crossed else [],
        values={metric.name: {arm: unit_means(metric.name, arm) for arm in arms}},
        seconds=seconds,
        cost=spent | {"all": round(sum(spent.values()), 2)},
        seed_base=old["seed_base"],
        reason="",
        commit=git("log", "-1", "--format=%H", "--", str(path), at=RESULTS) or "",
        versions=old["versions"],
        machine="",
        command=old["command"],
        made=old["made"],
    )


if __name__ == "__main__":
    for slug in sys.argv[1:] or [path.stem for path in sorted(RESULTS.glob("*.json"))]:
        record = converted(RESULTS / f"{slug}.json")
        target = records.RECORDS / f"{slug}.json"
        records.write_record(record, target)
        records.read_record(target, slug)
        before = json.loads((RESULTS / f"{slug}.json").read_text())
        print(f"{slug:22} {before['verdict']:13} {before['effect']:+.4f} {before['interval']} -> {record.reading:18}"
              f" {record.effect:+.4f} {record.interval} {target.stat().st_size:,} bytes")  # fmt: skip
