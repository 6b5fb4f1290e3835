"""Renew a stale record: run a part of it again, and accept the changed code only if every raw value is the same.

A record is stale as soon as a file that it depends on does something else, and most such changes touch nothing that
the numbers come from. One run of every arm tells: its raw values, the digests of its data and its counted costs must
equal those on record to the last bit (a metric whose name begins with "seconds" is measured, and never the same twice:
it is left out). If they do, the record takes on the hashes of today's code and says when; if one
differs, the record stays stale and the claim has to be proven anew.

On another kind of machine, or with other libraries, even the code on record may give other bits. There the two codes
are compared beside each other: what was asked is whether the change of code changed a number.
"""

from __future__ import annotations

import time
from typing import Any

from intaglio import atomic_io
from intaglio.environment import torch_threads
from intaglio.errors import IntaglioError
from intaglio.evidence import record as records
from intaglio.evidence import sources
from intaglio.evidence.beside import code_of
from intaglio.evidence.experiment import Experiment, Unit
from intaglio.evidence.record import Record, Run, stale_parts
from intaglio.evidence.run import check_checkout, check_machine, choice_of, experiment_of, made_with, outcomes
from intaglio.methods.base import Progress, no_progress

INDEX = 0
"""Which run is done again: always the same, so that none can be picked."""
COUNTED = ("tokens", "flops", "parameters")
"""Costs that the code decides; seconds and memory are the machine's."""
MEASURED = "seconds"
"""What the name of a metric begins with that is the machine's too."""


def renew(
    slug: str,
    *,
    beside: bool = False,
    workers: int = 1,
    experiment: Experiment | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Run one run of every arm again, and renew the record's hashes if its values are the same.

    Args:
        slug: the method.
        beside: compare with what the code on record gives here and now, in the place of what it gave when the record
            was made; the data must be those on record all the same. Default False.
        workers: processes that share the work. Default 1: this one.
        experiment: in the place of the slug's own (tests).
        progress: called after each arm.

    Returns:
        `{slug, changed: [module], renewed, beside}`: what had changed since the record was made, the day, and the
        revision that today's code was compared with (None: the record itself); `changed` is empty and the rest as it
        was when the record is not stale.

    Raises:
        IntaglioError: there is no record, its experiment was another one, or a value differs.
    """
    check_checkout()
    found = records.shipped(slug)
    if found is None:
        raise IntaglioError(f"there is no record of {slug} to renew; intaglio prove {slug} --record makes one")
    changed = stale_parts(found)
    if not changed:
        return {"slug": slug, "changed": [], "renewed": found.renewed, "beside": found.beside}
    chosen = experiment if experiment is not None else experiment_of(slug, found.tier)
    if chosen.digest != found.preregistration_digest:
        raise IntaglioError(f"the experiment of {slug} is not the one on record: the claim has to be proven anew")
    check_machine(chosen)
    then = {run.arm: run for run in found.runs if (run.stage, run.index) == ("run", INDEX)}
    tasks = [(arm, Unit("run", INDEX, found.seed_base, choice_of(arm, found.tuned))) for arm in chosen.arms]
    fresh: dict[str, Any] = {"beside": None, "versions": made_with(chosen)}
    earlier = len(tasks) if beside else 0
    total = earlier + len(tasks)
    if beside:
        with code_of(found) as code:
            for done, run in enumerate(code.runs(found, tasks, workers), 1):
                _check_data(then[run.arm], run)
                then[run.arm] = run
                progress(done, total, f"the code on record: {run.arm}")
            # The numbers are still those that were made with the versions on record.
            fresh = {"beside": code.revision}
    with torch_threads(found.threads):
        for done, now in enumerate(outcomes(chosen, tasks, workers), earlier + 1):
            _check_same(then[now.arm], now, changed, beside)
            progress(done, total, f"renew: {now.arm}")
    fresh |= {"renewed": time.strftime("%Y-%m-%d", time.gmtime()), "sources": sources.of_slug(slug)}
    document = Record.model_validate(found.model_dump() | fresh).model_dump(mode="json")
    atomic_io.write_json(records.RESULTS / f"{slug}.json", document)
    return {"slug": slug, "changed": list(changed), "renewed": fresh["renewed"], "beside": fresh["beside"]}


def _check_data(then: Run, now: Run) -> None:
    if (then.seed, then.outcome.shared) != (now.seed, now.outcome.shared):
        raise IntaglioError(
            f"the data of {then.arm} in run {then.index} are not those on record, so nothing can be compared: the claim"
            " has to be proven anew"
        )


def _check_same(then: Run, now: Run, changed: tuple[str, ...], beside: bool) -> None:
    what = _difference(then, now)
    if not what:
        return
    where = "what the code on record gives here" if beside else "what is on record"
    hint = (
        ""
        if beside
        else "; on another kind of machine, or with other libraries, --beside compares with what the code on record"
        " gives there"
    )
    raise IntaglioError(
        f"{then.arm} of run {then.index} does not give {where} ({what}); changed since: {', '.join(changed)}; the"
        f" record stays stale and the claim has to be proven anew{hint}"
    )


def _difference(then: Run, now: Run) -> str:
    """The first difference of two runs in words, or an empty string."""
    if then.seed != now.seed:
        return f"seed {then.seed}, now {now.seed}"
    if then.outcome.shared != now.outcome.shared:
        return "other data"
    for metric in sorted(then.outcome.values.keys() | now.outcome.values.keys()):
        if metric.startswith(MEASURED):
            continue
        old, new = then.outcome.values.get(metric, {}), now.outcome.values.get(metric, {})
        for unit in sorted(old.keys() | new.keys()):
            if old.get(unit) != new.get(unit):
                return f"{metric} of {unit}: {old.get(unit)}, now {new.get(unit)}"
    for name in COUNTED:
        was, is_now = getattr(then.outcome.cost, name), getattr(now.outcome.cost, name)
        if was != is_now:
            return f"{name}: {was}, now {is_now}"
    return ""
