"""`prove`: tune, probe, look until decided, run the other arms, and write the record.

A run is a function of its claim and seed base: the order in which units finish, the number of processes and
interruptions change nothing but the measured costs.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shlex
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from intaglio import atomic_io
from intaglio.environment import releases, torch_threads, tuning
from intaglio.errors import DivergedError
from intaglio.evidence.engine import plot
from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.claim import (
    ABLATION_UNITS,
    PROBE_UNITS,
    Claim,
    Cost,
    Grid,
    Result,
    RunKey,
    Settings,
    Stage,
    combinations,
)
from intaglio.evidence.engine.journal import Entry, Journal, clean_values, entry_key, open_journal
from intaglio.evidence.engine.record import ArmSummary, LookSummary, Record
from intaglio.evidence.engine.registration import check_arguments, check_registered, commit_of_code, load_claim
from intaglio.evidence.engine.statistics import (
    MAX_DIVERGED,
    Array,
    Differences,
    Look,
    Values,
    best,
    diverged_share,
    look,
    pair,
    probe,
)
from intaglio.evidence.testbeds.cache import PREPARED
from intaglio.methods.base import Progress, no_progress

DIRECTORY = "intaglio-prove"
COPIED = (
    *("slug", "version", "digest", "says", "kind", "metric", "delta", "crossed", "unit_names", "tier", "parity"),
    *("minutes", "baseline", "method", "ceiling", "reason"),
)
"""Fields that a record takes from its claim."""
PACKAGES = ("scipy", "scikit-learn")
"""Libraries that intervals and testbeds need, beside those of the methods."""


class OutOfTimeError(Exception):
    """The deadline passed; the journal holds what finished."""


@dataclass(frozen=True)
class Task:
    """One arm of one unit, with its tuned settings."""

    arm: str
    key: RunKey
    settings: Settings


def prove(
    slug: str,
    *,
    seed_base: int = 0,
    units: int | None = None,
    tier: str | None = None,
    directory: str | os.PathLike[str] = DIRECTORY,
    workers: int = 1,
    record: bool = False,
    home: Path | None = None,
    deadline: float | None = None,
    claim: Claim | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Test a method's claim: method against baseline, and a verdict.

    Finished units are kept: called again with the same arguments it resumes. Writes `result.json`, `effect.svg` and
    `journal.jsonl` into a folder of `directory`.

    Args:
        slug: of the method.
        seed_base: that all seeds follow from, 0 to 999. Default 0.
        units: compare this many units in one look at alpha .05, without a probe. Default None: as the claim says.
        tier: `cpu` or `gpu`. Default None: the claim's.
        directory: where results go. Default `./intaglio-prove`.
        workers: processes that share the work; the result is the same. Default 1: this one.
        record: write the committed record instead (source checkout); the journal lies in `evidence/journals`.
        home: `evidence` folder that gets record and journal. Default None: this checkout's.
        deadline: `time.monotonic()` after which no unit is begun. Default None.
        claim: to test instead of the slug's own.
        progress: called after each arm of each unit.

    Returns:
        The record.

    Raises:
        IntaglioError: an argument, the machine, or a file in the directory is not as it must be.
        OutOfTimeError: the deadline passed.
    """
    claim = load_claim(slug, tier) if claim is None else claim
    check_arguments(claim, seed_base, units, workers)
    command = ["intaglio", "prove", slug, "--seed-base", str(seed_base)]
    name = f"{slug}-v{claim.version}"
    if record:
        check_registered(claim, seed_base, units)
        home = home or records.EVIDENCE
        path, target = home / "journals" / f"{name}.jsonl", home / "records" / f"{slug}.json"
    else:
        name += f"-seed{seed_base}"
        if units is not None:
            name, command = f"{name}-units{units}", [*command, "--units", str(units)]
        path = Path(directory) / name / "journal.jsonl"
        target = path.with_name("result.json")
    with open_journal(path, claim, seed_base) as journal, worker_pool(workers) as pool:
        session = Session(claim, journal, seed_base, pool, progress, deadline)
        result = session.run(units, judge_cost=record, command=shlex.join(command))
        records.write_record(result, target)
        if record:
            path.unlink()
        else:
            atomic_io.write_text(path.with_name("effect.svg"), plot.effects(result) + "\n")
    return result


@dataclass
class Session:
    """A run in progress."""

    claim: Claim
    journal: Journal
    base: int
    pool: Executor | None = None
    progress: Progress = no_progress
    deadline: float | None = None
    settings: Mapping[str, Settings] = field(default_factory=dict)

    def run(self, units: int | None, judge_cost: bool, command: str) -> Record:
        """Tune, probe, look and run the other arms; return the record."""
        claim = self.claim if units is None else replace(self.claim, looks=(units,))
        tuning = self.tune()
        why, shown = self.probe(judge_cost) if units is None else ("", {})
        looks, verdict = [], "untestable here"
        if not why:
            looks = self.look(claim)
            verdict = str(looks[-1].verdict)
            why = "futile" if looks[-1].futile else "last look" if verdict == "undecided" else "decided"
            others = [arm for arm in claim.arms if arm not in (claim.baseline, claim.method)]
            self.finish("look", others, ABLATION_UNITS, "other arms")
        return self.record(tuning, shown, looks, verdict, why, command)

    # Tuning

    def tune(self) -> dict[str, list[dict[str, Any]]]:
        """Choose the settings of baseline and method on validation data; return what was tried."""
        claim = self.claim
        trials = {arm: combinations(claim.grid(arm)) for arm in (claim.baseline, claim.method)}
        chosen = self.best_of(trials)
        steps = {step for arm in trials for step in extensions(claim.grid(arm), chosen[arm], claim.closed)}
        for arm, settings in chosen.items():
            more = [settings | {name: value} for name, value in sorted(steps) if name in settings]
            trials[arm] += [trial for trial in more if trial not in trials[arm]]
        self.settings = self.best_of(trials) if steps else chosen
        return {
            arm: [{"settings": settings, "mean": _mean(self.tuned(arm, settings))} for settings in choices]
            for arm, choices in trials.items()
            if len(choices) > 1
        }

    def best_of(self, trials: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """Run the trials of arms that have a choice and return each arm's best settings."""
        tasks = [
            Task(arm, self.key("tune", index), settings)
            for index in range(self.claim.tune_units)
            for arm, choices in trials.items()
            for settings in choices
            if len(choices) > 1
        ]
        self.run_all("tune", tasks, "tuning")
        return {
            arm: choices[best([self.tuned(arm, s) for s in choices], self.claim.metric) if len(choices) > 1 else 0]
            for arm, choices in trials.items()
        }

    def tuned(self, arm: str, settings: Settings) -> Array:
        """Return all validation values of an arm with some settings, NaN where diverged."""
        units = self.values("tune", self.claim.tune_units, arm, self.claim.metric.name, settings)
        return np.array([np.nan if value is None else value for unit in units for value in unit.values()])

    # Probe and looks

    def probe(self, judge_cost: bool) -> tuple[str, dict[str, Any]]:
        """Run the pilot units; return the reason to stop ("" if there is none) and what they showed."""
        claim, unit = self.claim, self.claim.metric.unit
        low, high = (claim.baseline, claim.ceiling) if claim.kind == "better" else (claim.floor, claim.baseline)
        self.finish("probe", (claim.baseline, claim.method, claim.ceiling, claim.floor), PROBE_UNITS, "probe")
        compared = self.differences("probe", PROBE_UNITS)
        room = self.differences("probe", PROBE_UNITS, low, high).x if low and high else None
        seen, minutes, n = probe(compared.x, room, claim), self.projected_minutes(), claim.looks[-1]
        width, headroom = float(seen.half_width), None if seen.headroom is None else _round(float(seen.headroom))
        why = ""
        if compared.baseline_diverged > MAX_DIVERGED:
            why = "the baseline diverges; it needs other settings"
        elif seen.flat:
            why = f"no headroom: {high} is at most {headroom:.3g} {unit} better than {low};"
            why += f" a testbed is needed where it is 2 delta = {2 * claim.delta:g}"
        elif seen.wide and not compared.method_diverged:
            needed = int(np.ceil(n * (width / (2 * claim.delta)) ** 2))
            why = f"too noisy: {n} units give an interval of ±{width:.3g} {unit}; about {needed:,} are"
            why += f" needed for ±{2 * claim.delta:g}"
        elif judge_cost and minutes > claim.minutes:
            why = f"too expensive: {minutes:.0f} core-minutes are projected, {claim.minutes:g} are allowed"
        return why, {"headroom": headroom, "half_width": _round(width), "minutes": round(minutes, 1)}

    def projected_minutes(self) -> float:
        """Return the core-minutes that the whole run takes if it goes on to its last look, by what the probe took.

        A unit is taken to cost the median of the probe's, since the first also pays for what the test bed prepares
        once. All looks are projected, those that a resumed run has finished as well.
        """
        claim, spent, seconds = self.claim, 0.0, dict[str, list[float]]()
        for entry in self.journal.entries.values():
            both = entry.core_seconds + entry.bed_seconds
            if entry.stage in ("tune", "probe"):
                spent += both
            if entry.stage == "probe":
                seconds.setdefault(entry.arm, []).append(both)
        arms = [float(np.median(seconds[arm])) for arm in (claim.baseline, claim.method)]
        return (spent + claim.looks[-1] * sum(arms) + ABLATION_UNITS * (len(claim.arms) - 2) * max(arms)) / 60

    def spent(self) -> dict[str, float]:
        """Return the core-minutes of each stage, of the test bed's trainings, and of all."""
        seconds = dict.fromkeys(("tune", "probe", "look", "test bed"), 0.0)
        for entry in self.journal.entries.values():
            seconds[entry.stage] += entry.core_seconds
            seconds["test bed"] += entry.bed_seconds
        return {name: value / 60 for name, value in seconds.items()} | {"all": sum(seconds.values()) / 60}

    def look(self, claim: Claim) -> list[Look]:
        """Look at the interval after each number of units until the claim is decided."""
        looks: list[Look] = []
        for number, units in enumerate(claim.looks):
            self.finish("look", (claim.baseline, claim.method), units, f"look {number + 1} of {len(claim.looks)}")
            looks.append(look(self.differences("look", units), claim, number))
            if looks[-1].stop:
                break
        return looks

    # Running

    def key(self, stage: Stage, index: int) -> RunKey:
        """Return the key of a unit."""
        return RunKey(stage, index, self.base, self.claim.version)

    def settings_of(self, arm: str) -> Settings:
        """Return the tuned settings of an arm: its source's, and its own values where it fixes one."""
        source, own = self.settings[self.claim.settings_source(arm)], self.claim.arms[arm].settings
        return {name: own.get(name, value) for name, value in source.items()}

    def finish(self, stage: Stage, arms: Iterable[str | None], units: int, what: str) -> None:
        """Run some arms on the first units of a stage."""
        named = [arm for arm in self.claim.arms if arm in arms]
        tasks = [Task(arm, self.key(stage, i), self.settings_of(arm)) for i in range(units) for arm in named]
        self.run_all(stage, tasks, what)

    def run_all(self, stage: Stage, tasks: Sequence[Task], what: str) -> None:
        """Run the tasks that the journal lacks, then check that the arms of each unit are comparable."""
        waiting = [t for t in tasks if entry_key(stage, t.key.index, t.arm, t.settings) not in self.journal.entries]
        done = len(tasks) - len(waiting)
        if done and waiting:
            self.progress(done, len(tasks), f"{what}: {done} of {len(tasks)} had finished before")
        for entry in run_tasks(self.claim, waiting, self.pool, self.deadline):
            self.journal.add(entry)
            done += 1
            self.progress(done, len(tasks), f"{what}: {entry.arm}, {self.claim.unit_names[0]} {entry.index + 1}")
        for index in {task.key.index for task in tasks}:
            self.check_pairs([e for e in self.journal.entries.values() if (e.stage, e.index) == (stage, index)])

    def check_pairs(self, entries: Sequence[Entry]) -> None:
        """Raise RuntimeError where arms of a unit are not comparable: a defect of the design."""
        claim, entries = self.claim, [entry for entry in entries if not entry.diverged]
        if not entries:
            return
        unit = f"of {entries[0].stage} unit {entries[0].index}"
        for first, other in pairwise(entries):
            if other.parity != first.parity:
                raise RuntimeError(f"{first.arm} and {other.arm} {unit} do not share {first.parity}")
            for metric in other.values.keys() & first.values.keys():
                if other.values[metric].keys() != first.values[metric].keys():
                    raise RuntimeError(f"{first.arm} and {other.arm} {unit} have different inner units of {metric}")
        for name in claim.unequal_costs(e.cost for e in entries if e.arm in (claim.baseline, claim.method)):
            raise RuntimeError(f"baseline and method {unit} differ in {name}")

    def entries(self, stage: Stage, units: int, arm: str, settings: Settings | None = None) -> list[Entry]:
        """Return the entries of an arm's first units."""
        chosen = self.settings_of(arm) if settings is None else settings
        return [self.journal.entries[entry_key(stage, index, arm, chosen)] for index in range(units)]

    def values(self, stage: Stage, units: int, arm: str, metric: str, settings: Settings | None = None) -> list[Values]:
        """Return the inner values of an arm's first units; none where it has no such metric.

        A run that ended without a result has the inner units of the other arms.
        """
        entries = self.entries(stage, units, arm, settings)
        if not any(entry.diverged for entry in entries):
            return [entry.values.get(metric, {}) for entry in entries]
        others = [
            e for e in self.journal.entries.values() if e.stage == stage and not e.diverged and metric in e.values
        ]
        names = {entry.index: entry.values[metric] for entry in others}
        common = others[0].values[metric] if others and self.claim.crossed else {"": None}
        return [
            dict.fromkeys(names.get(entry.index, common)) if entry.diverged else entry.values.get(metric, {})
            for entry in entries
        ]

    def differences(self, stage: Stage, units: int, baseline: str = "", method: str = "") -> Differences:
        """Return the paired differences of two arms, baseline and method by default."""
        claim = self.claim
        first = self.values(stage, units, baseline or claim.baseline, claim.metric.name)
        second = self.values(stage, units, method or claim.method, claim.metric.name)
        return pair(first, second, claim.metric, claim.crossed)

    # The record

    def record(
        self,
        tuning: dict[str, list[dict[str, Any]]],
        shown: dict[str, Any],
        looks: Sequence[Look],
        verdict: str,
        why: str,
        command: str,
    ) -> Record:
        """Return the record of what ran."""
        claim = self.claim
        stage: Stage = "look" if looks else "probe"
        compared, probed = (claim.baseline, claim.method), (claim.baseline, claim.method, claim.ceiling, claim.floor)
        n = looks[-1].units if looks else PROBE_UNITS
        ran = [arm for arm in claim.arms if looks or arm in probed]
        entries = {arm: self.entries(stage, n if arm in compared else ABLATION_UNITS, arm) for arm in ran}
        room = self.differences(stage, ABLATION_UNITS, method=claim.ceiling).x if claim.ceiling else None
        summaries = tuple(
            LookSummary(at.units, round(1 - at.alpha, 4), _round(float(at.effect)),
                        (_round(float(at.low)), _round(float(at.high))), str(at.verdict))
            for at in looks
        )  # fmt: skip
        last = summaries[-1] if summaries else None
        inner = self.values(stage, 1, claim.baseline, claim.metric.name)[0] if claim.crossed else {}
        return Record(
            **{name: getattr(claim, name) for name in COPIED},
            verdict=verdict,
            why=why,
            advice=records.compose_advice(claim, verdict, last.interval[0] if last else 0.0),
            otherwise=records.alternative(claim),
            effect=last.effect if last else None,
            interval=last.interval if last else None,
            level=last.level if last else 0.0,
            units=n,
            headroom=None if room is None else _round(float(room.mean())),
            arms={arm: self.summary(arm, entries[arm]) for arm in ran},
            looks=summaries,
            probe=shown,
            tuning=tuning,
            differences=np.vectorize(_round)(self.differences(stage, n).x).tolist(),
            inner=sorted({name.partition("/")[0] for name in inner}),
            values={
                m.name: {arm: [_mean_of(entry, m.name) for entry in entries[arm]] for arm in ran}
                for m in (claim.metric, *claim.metrics)
            },
            seconds={arm: [round(entry.core_seconds, 2) for entry in entries[arm]] for arm in ran},
            cost={name: round(minutes, 2) for name, minutes in self.spent().items()},
            seed_base=self.base,
            commit=commit_of_code(),
            versions=releases(PACKAGES),
            machine=" and ".join(sorted({entry.machine for arm in ran for entry in entries[arm]})),
            command=command,
            made=time.strftime("%Y-%m-%d", time.gmtime()),
        )

    def summary(self, arm: str, entries: Sequence[Entry]) -> ArmSummary:
        """Return an arm's summary."""
        claim, costs = self.claim, [entry.cost for entry in entries]
        roles = {claim.baseline: "baseline", claim.method: "method", claim.ceiling: "ceiling", claim.floor: "floor"}
        means = {m.name: _mean([_mean_of(entry, m.name) for entry in entries]) for m in (claim.metric, *claim.metrics)}
        of = {name: float(np.mean([getattr(cost, name) for cost in costs])) for name in Cost.__annotations__}
        return ArmSummary(
            what=claim.arms[arm].what,
            role=roles.get(arm, "ablation" if arm in claim.ablations else "reported"),
            units=len(entries),
            mean=means.pop(claim.metric.name),
            diverged=diverged_share([entry.values.get(claim.metric.name, {}) for entry in entries]),
            settings=dict(self.settings_of(arm)),
            cost=Cost(round(of["tokens"]), of["flops"], round(of["parameters"]), round(of["seconds"], 3),
                      max(cost.peak_bytes for cost in costs)),
            metrics=means,
        )  # fmt: skip


def extensions(grid: Grid, chosen: Settings, closed: Sequence[str]) -> list[tuple[str, Any]]:
    """Return `(setting, value)` beyond each edge of a grid at which the choice lies, by the grid's own ratio there."""
    steps = []
    for name, values in grid.items():
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        if name in closed or not numbers or len(values) < 2 or values[0] <= 0 or list(values) != sorted(set(values)):
            continue
        for edge, before in ((values[0], values[1]), (values[-1], values[-2])):
            new = float(f"{edge * edge / before:.3g}")
            new = round(new) if isinstance(edge, int) else new
            if chosen[name] == edge and new > 0 and new != edge:
                steps.append((name, new))
    return steps


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if value is not None and np.isfinite(value)]
    return _round(float(np.mean(finite))) if finite else None


def _mean_of(entry: Entry, metric: str) -> float | None:
    """Return the mean over an entry's inner units; None if one of them diverged."""
    values = list(entry.values.get(metric, {}).values())
    return None if None in values else _mean(values)


def _round(value: float) -> float:
    return float(f"{value:.6g}")


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """Yield a pool of processes; None for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    # Spawned, not forked: a fork of a process with torch's threads can hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def run_tasks(claim: Claim, tasks: Sequence[Task], pool: Executor | None, deadline: float | None) -> Iterator[Entry]:
    """Run tasks and yield their entries as they finish; running ones are finished before OutOfTimeError is raised."""
    if pool is None:
        yield from (run_task(claim, task, deadline) for task in tasks)
        return
    late = None
    for future in as_completed([pool.submit(run_task, claim, task, deadline) for task in tasks]):
        try:
            yield future.result()
        except OutOfTimeError as error:
            late = error
    if late is not None:
        raise late


def run_task(claim: Claim, task: Task, deadline: float | None = None) -> Entry:
    """Run one arm of one unit on one thread."""
    if deadline is not None and time.monotonic() > deadline:
        raise OutOfTimeError
    with torch_threads(1), tuning.using(None):
        began, prepared = time.process_time(), sum(PREPARED)
        try:
            result = claim.design.run(claim.arms[task.arm], task.key, task.settings)
        except DivergedError:
            result = Result({metric.name: None for metric in (claim.metric, *claim.metrics)})
        bed = sum(PREPARED) - prepared
        seconds = time.process_time() - began - bed
    if claim.metric.name not in result.values:
        raise RuntimeError(f"the design of {claim.slug} does not measure {claim.metric.name!r}")
    values, settings = clean_values(result), dict(task.settings)
    place = task.key.stage, task.key.index, task.arm
    return Entry(*place, settings, values, result.cost, result.parity, seconds, bed, machine(claim))


def machine(claim: Claim) -> str:
    """Return the processor that numbers depend on, such as `x86_64, AVX512`."""
    import torch

    if claim.tier == "gpu":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _end_with_parent() -> None:
    """Let this worker end when its parent is killed: a unit can take many minutes."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
