"""`prove`: run an experiment, pilot first, one unit after the other, and report the verdict that falls.

A run is a function of its preregistration, the seed base and the number of runs: the order in which units finish and
the number of processes change nothing but the measured costs.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shlex
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

from intaglio import atomic_io
from intaglio.environment import torch_threads, versions
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.evidence import plot, sources
from intaglio.evidence import record as records
from intaglio.evidence import statistics as stats
from intaglio.evidence.experiment import FEWEST_RUNS, MOST_INDEX, Cost, Direction, Experiment, Outcome, Stage, Unit
from intaglio.evidence.journal import Journal, Key, open_journal
from intaglio.evidence.record import ArmSummary, Compared, Pilot, Record, Run, Tuned
from intaglio.methods.base import Progress, no_progress
from intaglio.methods.registry import PUBLISHED

DIRECTORY = "intaglio-prove"
COUNTING = ("scipy", "scikit-learn")
"""What intervals and worlds are reckoned with, beside what carves."""
Task = tuple[str, Unit]
Runs = Mapping[Key, Run]


def experiment_of(slug: str, tier: str | None = None) -> Experiment:
    """The experiment of a method.

    Args:
        slug: the method.
        tier: `cpu` or `gpu`. Default None: the one that the claim is made for.

    Raises:
        IntaglioError: there is no such method, it has no experiment, or none for that tier.
    """
    if slug not in PUBLISHED:
        raise IntaglioError(f"there is no method named {slug!r}; {did_you_mean(slug, PUBLISHED)}")
    if tier not in ("cpu", "gpu", None):
        raise IntaglioError(f"the tier {tier!r} is unknown; accepted: cpu, gpu")
    name = f"intaglio.evidence.{slug}"
    if find_spec(name) is None:
        raise IntaglioError(f"{slug} has no experiment yet, so nothing can be proved about it")
    found = cast(dict[str, Experiment], import_module(name).EXPERIMENTS)
    if tier is None:
        return next(iter(found.values()))
    if tier not in found:
        raise IntaglioError(f"the claim of {slug} is not made for the tier {tier}; accepted: {', '.join(found)}")
    return found[tier]


def prove(
    slug: str,
    *,
    seed_base: int = 0,
    units: int | None = None,
    tier: str | None = None,
    directory: str | os.PathLike[str] = DIRECTORY,
    workers: int = 1,
    record: bool = False,
    experiment: Experiment | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Run a method's claim: baseline and method side by side, and a verdict.

    Where arms have settings to choose from, these are tried on validation data first. A pilot on seeds of its own fixes
    the number of runs, unless `units` does. What has finished is kept: called again with the same arguments it goes on
    where it was. Writes `result.json`, `effect.svg` and `runs.jsonl` into a folder
    of `directory` named after the slug, the seed base, and tier and units where they are not the default.

    Args:
        slug: the method.
        seed_base: that all seeds follow from, 0 or above. Default 0.
        units: runs to compare, in the place of the pilot. Default None: the pilot says.
        tier: `cpu` or `gpu`. Default None: the one that the claim is made for.
        directory: where results go. Default `./intaglio-prove`.
        workers: processes that share the work. Default 1: this one.
        record: also write the record that is shipped; in a source checkout only. Default False.
        experiment: in the place of the slug's own (tests).
        progress: called after each arm of each run.

    Returns:
        What `result.json` holds; see `record.Record`.

    Raises:
        IntaglioError: one sentence on what is wrong with an argument, the machine, or what lies in the directory.
    """
    chosen = experiment if experiment is not None else experiment_of(slug, tier)
    _check(chosen, seed_base, units, workers, record)
    header = {
        "choices": chosen.digest,
        "seed_base": seed_base,
        "units": units,
        "versions": made_with(chosen),
        "code": sources.together(sources.of_slug(slug)),
    }
    folder = Path(directory) / _folder(chosen, seed_base, units)
    with open_journal(folder, header) as journal, torch_threads(chosen.threads):
        tuned = _tuned(chosen, journal, seed_base, workers, progress)
        pilot = None
        if units is None:
            pilot = _pilot(chosen, journal, seed_base, tuned, workers, progress)
            units = pilot.most if pilot.asked is None else min(pilot.asked, pilot.most)
        tasks = [
            (arm, Unit("run", index, seed_base, choice_of(arm, tuned)))
            for index in range(units)
            for arm in chosen.arms
            if index < chosen.runs_of(arm, units)
        ]
        _finish(chosen, journal, tasks, workers, progress)
        command = _command(chosen, seed_base, None if pilot else units)
        found = _record(chosen, journal, seed_base, units, tuned, pilot, command)
    document = found.model_dump(mode="json")
    atomic_io.write_json(folder / "result.json", document)
    atomic_io.write_text(folder / "effect.svg", plot.effects(found) + "\n")
    if record:
        atomic_io.write_json(records.RESULTS / f"{slug}.json", document)
    return document


def paired(record: Record) -> stats.Paired:
    """The differences of a record's primary comparison, from its raw values.

    Args:
        record: any.
    """
    runs = {run.key: run for run in record.runs}
    baseline = _rows(runs, "run", record.units, record.baseline, record.metric)
    method = _rows(runs, "run", record.units, record.method, record.metric)
    return stats.pair(baseline, method, record.direction)


def reckoned(record: Record) -> tuple[stats.Interval, stats.Verdict]:
    """What the raw values of a record say now: equal to what it says itself, or one of the two is wrong.

    Args:
        record: any.
    """
    differences = paired(record)
    found = stats.interval(record.design, differences.rows)
    return found, stats.verdict(found, record.delta, record.kind, differences.method_diverged)


def register(slug: str, tier: str | None = None) -> Path:
    """Write the preregistration of an experiment, to be committed before its first run.

    Args:
        slug: the method.
        tier: of the claim. Default None: the first that the experiment has.
    """
    chosen = experiment_of(slug, tier)
    check_checkout()
    path = records.PREREGISTERED / f"{slug}.json"
    atomic_io.write_json(path, {"digest": chosen.digest, **chosen.preregistration()})
    return path


def _check(experiment: Experiment, seed_base: int, units: int | None, workers: int, record: bool) -> None:
    if seed_base < 0:
        raise IntaglioError(f"the seed base is {seed_base}; it must be 0 or above")
    if workers < 1:
        raise IntaglioError(f"workers is {workers}; it must be at least 1")
    fewest = FEWEST_RUNS[experiment.design]
    if units is not None and not fewest <= units <= MOST_INDEX:
        raise IntaglioError(f"units is {units}; an interval needs at least {fewest}, and {MOST_INDEX:,} are the most")
    check_machine(experiment)
    if record:
        check_checkout()
        committed = records.preregistered(experiment.slug)
        if committed is None or committed.get("digest") != experiment.digest:
            raise IntaglioError(
                f"the experiment of {experiment.slug} is not the one that was committed in"
                f" {records.PREREGISTERED.name}/{experiment.slug}.json before its first run, so it cannot be recorded"
            )


def check_machine(experiment: Experiment) -> None:
    """Refuse an experiment whose tier this machine lacks.

    Args:
        experiment: any.

    Raises:
        IntaglioError: it needs a CUDA device, and there is none.
    """
    if experiment.tier == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise IntaglioError("the tier gpu needs a CUDA device, and this machine has none")


def made_with(experiment: Experiment) -> dict[str, str]:
    """What decides the numbers beside our code: versions, and the device where it is no CPU.

    Args:
        experiment: any.
    """
    # Without the label of a build (2.13.0+cpu), which names a place to install from.
    found = {name: version.partition("+")[0] for name, version in versions(COUNTING).items()}
    if experiment.tier == "gpu":
        import torch

        found["device"] = torch.cuda.get_device_name()
    return found


def check_checkout() -> None:
    """Refuse to write what is committed from an installed package.

    Raises:
        IntaglioError: this is no source checkout.
    """
    root = sources.PACKAGE.parent.parent
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        raise IntaglioError(
            "records are written in a source checkout only, and this Intaglio was installed from a wheel"
        )


def _folder(experiment: Experiment, seed_base: int, units: int | None) -> str:
    tier = "" if experiment.tier == "cpu" else f"-{experiment.tier}"
    return f"{experiment.slug}-seed{seed_base}{tier}" + ("" if units is None else f"-units{units}")


def _command(experiment: Experiment, seed_base: int, units: int | None) -> str:
    words = ["intaglio", "prove", experiment.slug, "--seed-base", str(seed_base), "--tier", experiment.tier]
    return shlex.join(words if units is None else [*words, "--units", str(units)])


def choice_of(arm: str, tuned: Mapping[str, Tuned]) -> str:
    """The settings that an arm chose; "" where it had none to choose from.

    Args:
        arm: of an experiment.
        tuned: what its arms chose.
    """
    return tuned[arm].chosen if arm in tuned else ""


def _tuned(experiment: Experiment, journal: Journal, base: int, workers: int, progress: Progress) -> dict[str, Tuned]:
    """Try every choice of every arm on validation data, and take the best of each arm."""
    tuning = experiment.tuning
    if tuning is None:
        return {}
    tasks = [
        (arm, Unit("tuning", index, base, choice))
        for index in range(tuning.runs)
        for arm, choices in tuning.choices.items()
        for choice in choices
    ]
    _finish(experiment, journal, tasks, workers, progress)
    found = {}
    for arm, choices in tuning.choices.items():
        values = {
            choice: np.concatenate(_rows(journal.runs, "tuning", tuning.runs, f"{arm}: {choice}", experiment.metric))
            for choice in choices
        }
        found[arm] = Tuned(
            chosen=stats.best(values, experiment.direction),
            means={choice: _mean(flat) for choice, flat in values.items()},
            diverged={choice: float((~np.isfinite(flat)).mean()) for choice, flat in values.items()},
        )
    return found


def _mean(flat: stats.Array) -> float | None:
    """Of the finite values; None if there are none."""
    finite = flat[np.isfinite(flat)]
    return float(finite.mean()) if len(finite) else None


def _pilot(
    experiment: Experiment,
    journal: Journal,
    base: int,
    tuned: Mapping[str, Tuned],
    workers: int,
    progress: Progress,
) -> Pilot:
    arms = (experiment.baseline, experiment.method)
    tasks = [
        (arm, Unit("pilot", index, base, choice_of(arm, tuned)))
        for index in range(experiment.pilot_runs)
        for arm in arms
    ]
    _finish(experiment, journal, tasks, workers, progress)
    paired = _paired(
        experiment, journal, "pilot", experiment.pilot_runs, *arms, experiment.metric, experiment.direction
    )
    asked = stats.runs_needed(experiment.design, paired.rows, experiment.delta, experiment.units)
    return Pilot(runs=experiment.pilot_runs, asked=asked, most=experiment.most_runs)


def _finish(experiment: Experiment, journal: Journal, tasks: Sequence[Task], workers: int, progress: Progress) -> None:
    """Run what is not in the journal yet, then check that the arms of each run are pairs."""
    waiting = [(arm, unit) for arm, unit in tasks if _key(arm, unit) not in journal.runs]
    done = len(tasks) - len(waiting)
    stage = tasks[0][1].stage
    if done and waiting:
        progress(done, len(tasks), f"{stage}: {done} of {len(tasks)} were finished before")
    for run in outcomes(experiment, waiting, workers):
        journal.add(run)
        done += 1
        progress(done, len(tasks), f"{stage}: {run.arm}, {experiment.factors[0]} {run.index + 1}")
    for index in {unit.index for _, unit in tasks}:
        _check_pairs(experiment, [journal.runs[_key(arm, unit)] for arm, unit in tasks if unit.index == index])


def _key(arm: str, unit: Unit) -> Key:
    return unit.stage, unit.index, f"{arm}: {unit.choice}" if unit.stage == "tuning" else arm


def outcomes(experiment: Experiment, tasks: Sequence[Task], workers: int) -> Iterator[Run]:
    """Run arms, in the order in which they finish.

    Args:
        experiment: whose.
        tasks: `(arm, unit)` of each.
        workers: processes that share the work; 1 for this one.
    """
    if workers == 1 or len(tasks) < 2:
        yield from (_one(experiment, task) for task in tasks)
        return
    # Spawned, not forked: a fork of a process with torch's threads can hang.
    with ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn"), initializer=_begin,
        initargs=(experiment,),
    ) as pool:  # fmt: skip
        futures = [pool.submit(_in_worker, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_here: list[Experiment] = []  # the experiment of a worker process


def _begin(experiment: Experiment) -> None:
    _here.append(experiment)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A unit can take many minutes, and nobody waits for it once the process that asked for it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(task: Task) -> Run:
    with torch_threads(_here[0].threads):
        return _one(_here[0], task)


def _one(experiment: Experiment, task: Task) -> Run:
    arm, unit = task
    outcome = experiment.run_unit(arm, unit, unit.seed)
    values = {
        metric: {name: _finite(value) for name, value in of_units.items()}
        for metric, of_units in outcome.values.items()
    }
    clean = Outcome(values=values, cost=outcome.cost, shared=outcome.shared)
    return Run(stage=unit.stage, index=unit.index, seed=unit.seed, arm=arm, choice=unit.choice, outcome=clean)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _check_pairs(experiment: Experiment, runs: Sequence[Run]) -> None:
    """What the arms of a run must have in common, they have; an experiment that breaks this is a defect of ours."""
    first = runs[0]
    for other in runs[1:]:
        if other.outcome.shared != first.outcome.shared:
            raise RuntimeError(f"{first.arm} and {other.arm} of run {first.index} did not share {first.outcome.shared}")
        for name in experiment.equal:
            if getattr(other.outcome.cost, name) != getattr(first.outcome.cost, name):
                raise RuntimeError(f"{first.arm} and {other.arm} of run {first.index} differ in {name}")
        for metric in other.outcome.values.keys() & first.outcome.values.keys():
            if other.outcome.values[metric].keys() != first.outcome.values[metric].keys():
                raise RuntimeError(f"{first.arm} and {other.arm} of run {first.index} have other units of {metric}")


def _rows(runs: Runs, stage: Stage, count: int, arm: str, metric: str) -> list[stats.Array]:
    """Values of each run, units in the order of their names; NaN where diverged."""
    found = []
    for index in range(count):
        values = runs[stage, index, arm].outcome.values[metric]
        ordered = [values[name] for name in sorted(values)]
        found.append(np.array([math.nan if value is None else value for value in ordered]))
    return found


def _paired(
    experiment: Experiment,
    journal: Journal,
    stage: Stage,
    count: int,
    baseline: str,
    method: str,
    metric: str,
    direction: Direction,
) -> stats.Paired:
    names = {tuple(sorted(journal.runs[stage, i, method].outcome.values[metric])) for i in range(count)}
    if experiment.design == "crossed" and len(names) > 1:
        raise RuntimeError(f"the runs of {experiment.slug} are crossed, but they have other units of {metric}")
    rows = {arm: _rows(journal.runs, stage, count, arm, metric) for arm in (baseline, method)}
    return stats.pair(rows[baseline], rows[method], direction)


def _record(
    experiment: Experiment,
    journal: Journal,
    base: int,
    count: int,
    tuned: dict[str, Tuned],
    pilot: Pilot | None,
    command: str,
) -> Record:
    order = list(experiment.arms)
    wanted: dict[Stage, int] = {"pilot": pilot.runs if pilot else 0, "run": count}
    if experiment.tuning is not None:
        wanted["tuning"] = experiment.tuning.runs
    runs = sorted(journal.runs.values(), key=lambda run: (run.stage, run.index, order.index(run.arm), run.choice))
    runs = [run for run in runs if run.index < wanted[run.stage]]
    primary = _paired(
        experiment, journal, "run", count, experiment.baseline, experiment.method, experiment.metric,
        experiment.direction,
    )  # fmt: skip
    found = stats.interval(experiment.design, primary.rows)
    sizes = {experiment.factors[0]: count, "pairs": sum(len(row) for row in primary.rows)}
    if experiment.design == "crossed":
        sizes[experiment.factors[1]] = len(primary.rows[0])
    return Record(
        slug=experiment.slug,
        claim=experiment.claim,
        kind=experiment.kind,
        metric=experiment.metric,
        unit=experiment.unit,
        direction=experiment.direction,
        tier=experiment.tier,
        delta=experiment.delta,
        verdict=stats.verdict(found, experiment.delta, experiment.kind, primary.method_diverged),
        effect=found.effect,
        interval=(found.low, found.high),
        units=count,
        sizes=sizes,
        design=experiment.design,
        baseline=experiment.baseline,
        method=experiment.method,
        arms={arm: _summary(experiment, journal, experiment.runs_of(arm, count), arm) for arm in order},
        parity=experiment.parity,
        cost={
            arm: _mean_cost(journal.runs["run", i, arm].outcome.cost for i in range(experiment.runs_of(arm, count)))
            for arm in order
        },
        secondaries=_secondaries(experiment, journal, count),
        tuned=tuned,
        pilot=pilot,
        seed_base=base,
        seeds={stage: sorted({run.seed for run in runs if run.stage == stage}) for stage in wanted},
        threads=experiment.threads,
        versions=made_with(experiment),
        command=command,
        made=time.strftime("%Y-%m-%d", time.gmtime()),
        preregistration=experiment.preregistration(),
        preregistration_digest=experiment.digest,
        sources=sources.of_slug(experiment.slug),
        runs=runs,
    )


def _summary(experiment: Experiment, journal: Journal, count: int, arm: str) -> ArmSummary:
    if experiment.metric not in journal.runs["run", 0, arm].outcome.values:
        return ArmSummary(what=experiment.arms[arm], runs=count, mean=None, diverged=0.0)
    flat = np.concatenate(_rows(journal.runs, "run", count, arm, experiment.metric))
    return ArmSummary(
        what=experiment.arms[arm],
        runs=count,
        mean=_mean(flat),
        diverged=float((~np.isfinite(flat)).mean()),
    )


def _secondaries(experiment: Experiment, journal: Journal, count: int) -> list[Compared]:
    found = []
    for second in experiment.secondaries:
        metric = second.metric or experiment.metric
        direction = second.direction if second.metric else experiment.direction
        both = min(experiment.runs_of(arm, count) for arm in (second.baseline, second.method))
        paired = _paired(experiment, journal, "run", both, second.baseline, second.method, metric, direction)
        found.append((second, both, metric, direction, paired, stats.interval(experiment.design, paired.rows)))
    corrected = stats.holm([interval.p for *_, interval in found])
    return [
        Compared(
            name=second.name,
            metric=metric,
            direction=direction,
            baseline=second.baseline,
            method=second.method,
            runs=both,
            effect=interval.effect,
            interval=(interval.low, interval.high),
            p=interval.p,
            p_holm=p,
            diverged=paired.method_diverged,
        )
        for (second, both, metric, direction, paired, interval), p in zip(found, corrected, strict=True)
    ]


def _mean_cost(costs: Iterable[Cost]) -> Cost:
    """Means over runs; of memory the most."""
    costs = list(costs)
    n = len(costs)
    return Cost(
        tokens=round(sum(cost.tokens for cost in costs) / n),
        flops=sum(cost.flops for cost in costs) / n,
        parameters=round(sum(cost.parameters for cost in costs) / n),
        seconds=sum(cost.seconds for cost in costs) / n,
        peak_bytes=max(cost.peak_bytes for cost in costs),
    )
