"""`prove --pending`: work through all registered claims without a record, cheapest first.

Claims run at low priority in a detached worktree of HEAD, so that the code may be edited meanwhile; journals and
records go to the main checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intaglio.errors import IntaglioError
from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.registration import check_machine, git, load_claim
from intaglio.evidence.engine.run import OutOfTimeError, prove

NICE = 19


def pending_claims(home: Path) -> list[str]:
    """Return the claims without a record that this machine can run, those with the fewest core-minutes left first."""
    waiting = []
    for path in sorted(records.CLAIMS.glob("[a-z]*.py")):
        claim = load_claim(path.stem)
        record = home / "records" / path.with_suffix(".json").name
        if record.is_file() and records.read_record(record).version >= claim.version:
            continue
        try:
            check_machine(claim)
        except IntaglioError:
            continue
        journal = home / "journals" / f"{claim.slug}-v{claim.version}.jsonl"
        lines = journal.read_text().splitlines()[1:] if journal.is_file() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        spent = sum(entry["core_seconds"] + entry["bed_seconds"] for entry in entries)
        waiting.append((claim.minutes - spent / 60, claim.slug))
    return [slug for _, slug in sorted(waiting)]


def prove_pending(minutes: float, workers: int = 1, home: Path = records.EVIDENCE) -> Iterator[str]:
    """Run pending claims for some minutes of wall time; yield a sentence for each."""
    deadline = time.monotonic() + 60 * minutes
    with detached_worktree(home) as tree:
        waiting = pending_claims(home)
        for position, slug in enumerate(waiting):
            left = (deadline - time.monotonic()) / 60
            if left <= 0:
                yield f"time is over; not run: {', '.join(waiting[position:])}"
                return
            words = (slug, str(home), str(left), str(workers))
            command = [sys.executable, "-m", "intaglio.evidence.engine.pending", *words]
            environment = os.environ | {"PYTHONPATH": str(tree / "src")}
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
            last = ((done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no message"])[-1]
            yield f"{slug}: failed with {last}" if done.returncode else last


@contextmanager
def detached_worktree(home: Path) -> Iterator[Path]:
    """Yield a temporary worktree of HEAD."""
    with tempfile.TemporaryDirectory(prefix="intaglio-prove-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "prune", at=home)
        if git("worktree", "add", "--detach", str(tree), "HEAD", at=home) is None:
            raise IntaglioError("pending claims run in a source checkout only, and this Intaglio is not in one")
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), at=home)


def main(slug: str, home: Path, minutes: float, workers: int) -> str:
    """Record one claim in the worktree and return a sentence."""
    os.nice(NICE)
    try:
        record = prove(slug, record=True, home=home, deadline=time.monotonic() + 60 * minutes, workers=workers)
    except OutOfTimeError:
        return f"{slug}: time is over; its journal is kept"
    except IntaglioError as error:
        return f"{slug}: {error}"
    return f"{slug}: {record.verdict} ({record.cost['all']:g} core-minutes)"


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
