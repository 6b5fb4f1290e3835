"""Tuning regularization: STN against Optuna's TPE and random search, at equal multiply-adds.

    python benchmarks/training/tuning.py                    # three seeds of each
    python benchmarks/training/tuning.py --seeds 1 --steps 300

A perceptron on scikit-learn's digits, 200 training and 300 validation images: three dropouts and weight decay. STN
trains once, its second weights and hyper steps counted; the searches train several times, with as many multiply-adds
together. The test loss is that at the least validation loss. Writes `tuning.json` and `tuning.md` beside the results of
`run.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from intaglio import atomic_io
from intaglio.evidence.claims.stn import CLAIM
from intaglio.evidence.designs.classify import TEST_LOSS
from intaglio.evidence.designs.tune_regularizers import VALIDATION_LOSS
from intaglio.evidence.engine.claim import RunKey

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402

ARMS = ("STN", "TPE", "random search", "default")


def measure(seeds: int, **changes: Any) -> dict[str, Any]:
    """Return the results of every arm, means over the seeds and the single values."""
    design = dataclasses.replace(CLAIM.design, **changes)  # type: ignore[type-var]
    results: dict[str, Any] = {arm: {"test": [], "validation": [], "flops": []} for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            done = design.run(CLAIM.arms[arm], RunKey("probe", 1000 + seed), {})
            row = (done.values[TEST_LOSS.name], done.values[VALIDATION_LOSS.name], done.cost.flops)
            for name, value in zip(results[arm], row, strict=True):
                results[arm][name].append(value)
    return results


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| tuner | test loss, nats | each seed | validation loss | GFLOP |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, its in results.items():
        each = ", ".join(f"{value:.3f}" for value in its["test"])
        lines.append(
            f"| {arm} | {mean(its['test']):.3f} | {each} | {mean(its['validation']):.3f} | "
            f"{mean(its['flops']) / 1e9:.0f} |"
        )
    return "\n".join([*lines, "", machine.title(), ""])


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=CLAIM.design.steps)  # type: ignore[attr-defined]
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args()
    results = measure(given.seeds, steps=given.steps)
    given.output.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(given.output / "tuning.json", {"machine": machine.machine(), "results": results})
    table = markdown(results)
    atomic_io.write_text(given.output / "tuning.md", table)
    print(table)


if __name__ == "__main__":
    main()
