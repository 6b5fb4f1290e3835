"""The environment of a benchmark's peers, which are never imported here."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from intaglio.errors import IntaglioError

ENVIRONMENT = ".venv-peer"
REQUIREMENTS = "peer-requirements.txt"


def peer_python(folder: Path, given: Path | None, environment: Path | None = None) -> Path:
    """Return a Python with a benchmark's peers; make its environment if it is missing or its requirements changed.

    Args:
        folder: of the benchmark, with its `peer-requirements.txt`.
        given: an interpreter to use as it is, or None.
        environment: where to make the environment. Default: `.venv-peer` in the folder.

    Raises:
        IntaglioError: the given interpreter is missing, or the installation fails.
    """
    environment = folder / ENVIRONMENT if environment is None else environment
    python, requirements = given or environment / "bin" / "python", folder / REQUIREMENTS
    # Written last, so that an interrupted installation is finished by the next run.
    ready = environment / "installed.txt"
    if given is None and not (ready.is_file() and ready.read_text() == requirements.read_text()):
        print(f"making {environment} for the peers, once", file=sys.stderr)
        venv.EnvBuilder(with_pip=True).create(environment)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=False)
        if done.returncode:
            raise IntaglioError(f"the peers could not be installed into {environment}; see pip's message above")
        ready.write_text(requirements.read_text())
    if not python.is_file():
        raise IntaglioError(f"the peers' python {python} does not exist")
    return python
