"""The code that a record was made with, run once more, on this machine and with the libraries that are here.

Another processor or another release of a library can move the last bits of a number, and with them everything that
follows. Where today's code does not give what is on record, the code on record tells which of the two it was: taken out
of the repository's history, it runs beside today's.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import IntaglioError, shorten
from intaglio.evidence import record as records
from intaglio.evidence import sources
from intaglio.evidence.experiment import Unit
from intaglio.evidence.record import Record, Run

ROOT = sources.PACKAGE.parent.parent
"""Of the source checkout."""
SOURCES = """
import json, sys
from intaglio.evidence import sources
print(json.dumps(sources.of_slug(json.load(sys.stdin))))
"""
RUN = """
import json, sys
from intaglio.evidence.experiment import Unit
from intaglio.evidence.run import experiment_of, outcomes
from intaglio.environment import with_threads
asked = json.load(sys.stdin)
experiment = experiment_of(asked["slug"], asked["tier"])
tasks = [(arm, Unit(**unit)) for arm, unit in asked["tasks"]]
with with_threads(asked["threads"]):
    for run in outcomes(experiment, tasks, asked["workers"]):
        print("run", run.model_dump_json(), flush=True)
"""
"""What the code on record is asked, in the words that `prove` has used since the first record."""


@dataclass(frozen=True)
class OldCode:
    """The code of a record, in a folder of its own.

    Args:
        revision: of the repository, whole.
        path: holds its `intaglio` package.
    """

    revision: str
    path: Path

    def runs(self, found: Record, tasks: Sequence[tuple[str, Unit]], workers: int) -> Iterator[Run]:
        """Run arms with it, in the order in which they finish.

        Args:
            found: the record.
            tasks: `(arm, unit)` of each.
            workers: processes that share the work.

        Raises:
            IntaglioError: it does not run with the libraries that are installed.
        """
        asked = {
            "slug": found.slug,
            "tier": found.tier,
            "threads": found.threads,
            "workers": workers,
            # A code from before arms could choose knows no choice, and a record without one needs none.
            "tasks": [(arm, _said(unit)) for arm, unit in tasks],
        }
        for line in self._ask(RUN, json.dumps(asked)):
            if line.startswith("run "):
                yield Run.model_validate_json(line.removeprefix("run "))

    def sources(self, slug: str) -> dict[str, str]:
        """The hashes of this code by its own rule, which another code may reckon otherwise.

        Args:
            slug: of the method.
        """
        return dict(json.loads("".join(self._ask(SOURCES, json.dumps(slug)))))

    def _ask(self, script: str, given: str) -> Iterator[str]:
        """What a script says, line by line; its standard input is `given`."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, tempfile.TemporaryFile("w+") as asked:
            asked.write(given)
            asked.seek(0)
            # Its own folder first: the package that is installed here is another one.
            process = subprocess.Popen(
                [sys.executable, "-c", script],
                cwd=self.path,
                env=os.environ | {"PYTHONPATH": str(self.path)},
                stdin=asked,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                assert process.stdout is not None
                yield from process.stdout
                failed = process.wait() != 0
            finally:
                process.kill()
                process.wait()
            if failed:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["it says nothing"])[-1]
                raise IntaglioError(
                    f"the code on record ({self.revision[:12]}) does not run with the libraries that are installed:"
                    f" {shorten(last, 200)}"
                )


def _said(unit: Unit) -> dict[str, Any]:
    said: dict[str, Any] = {"stage": unit.stage, "index": unit.index, "base": unit.base}
    return said | ({"choice": unit.choice} if unit.choice else {})


@contextmanager
def code_of(found: Record) -> Iterator[OldCode]:
    """The code of a record: that of the commit which last wrote it, taken out of the history for as long as it is used.

    Args:
        found: a shipped record.

    Raises:
        IntaglioError: there is no such commit, or its code is not the one on record, by hash.
    """
    name = f"{found.slug}.json"
    revision = _git("log", "-1", "--format=%H", "--", str(records.RESULTS / name)).decode().strip()
    if not revision:
        raise IntaglioError(f"the record of {found.slug} is in no commit here, so the code that made it cannot be had")
    with tempfile.TemporaryDirectory(prefix="intaglio-beside-") as folder:
        source = sources.PACKAGE.parent.relative_to(ROOT).as_posix()
        with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", revision, source))) as tar:
            tar.extractall(folder, filter="data")
        code = OldCode(revision, Path(folder) / source)
        if code.sources(found.slug) != found.sources:
            raise IntaglioError(
                f"the code of {revision[:12]}, which wrote the record of {found.slug}, is not the one that the record"
                " names; the claim has to be proven anew"
            )
        yield code


def _git(*words: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise IntaglioError("the code of a record is taken out of the repository by git, and there is none") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
        raise IntaglioError(f"git cannot tell the code of a record: {shorten(said[-1], 200)}")
    return done.stdout
