"""Golden numbers: values of a claim's toy configuration, which a changed constant, mask or data order moves.

`python -m intaglio.evidence.engine.golden SLUG` prints them, to be copied into the claim.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping

from intaglio.environment import torch_threads, tuning
from intaglio.evidence.engine.claim import Claim, Result, RunKey, combinations
from intaglio.evidence.engine.journal import clean_values
from intaglio.evidence.engine.registration import load_claim

TOLERANCE = 1e-3


def toy_results(claim: Claim, arms: Iterable[str] | None = None) -> dict[str, Result]:
    """Run the toy configuration of some arms (default: all), with the first settings of each grid."""
    design, key, results = claim.design.toy(**claim.toy), RunKey("toy", 0, version=claim.version), {}
    for arm in claim.arms if arms is None else arms:
        tuned = combinations(claim.grid(claim.settings_source(arm)))[0]
        own = claim.arms[arm].settings
        with torch_threads(1), tuning.using(None):
            results[arm] = design.run(
                claim.arms[arm], key, {name: own.get(name, value) for name, value in tuned.items()}
            )
    return results


def golden_values(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """Return `{arm: {metric: mean}}`."""
    return {
        arm: {
            metric: sum(math.nan if value is None else value for value in values.values()) / len(values)
            for metric, values in clean_values(result).items()
        }
        for arm, result in results.items()
    }


def moved(claim: Claim) -> list[str]:
    """Return a sentence for each golden number that the toy configuration no longer gives, to a relative 1e-3.

    Costs of baseline and method that the claim calls equal and that differ get a sentence as well.
    """
    results = toy_results(claim, dict.fromkeys([*claim.golden, claim.baseline, claim.method]))
    now = golden_values(results)
    numbers = [
        f"{claim.slug}: {metric} of {arm} is {now[arm].get(metric)}, golden {value}; raise the version if"
        " results may change"
        for arm, values in claim.golden.items()
        for metric, value in values.items()
        if not math.isclose(now[arm].get(metric, math.nan), value, rel_tol=TOLERANCE, abs_tol=1e-9)
    ]
    first, other = (results[arm].cost for arm in (claim.baseline, claim.method))
    return numbers + [
        f"{claim.slug}: {claim.baseline} and {claim.method} differ in {name}, {getattr(first, name)} and"
        f" {getattr(other, name)}"
        for name in claim.unequal_costs((first, other))
    ]


if __name__ == "__main__":
    for slug in sys.argv[1:]:
        claim = load_claim(slug)
        continuous = {m.name for m in (claim.metric, *claim.metrics) if m.continuous}
        for arm, values in golden_values(toy_results(claim)).items():
            print(f"{arm!r}: { ({k: float(f'{v:.6g}') for k, v in values.items() if k in continuous}) },")
