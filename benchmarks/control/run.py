"""Constrained sampling against masking by the same predicate, genlm-control's AWRS and xgrammar's masks.

    python benchmarks/control/run.py
    python benchmarks/control/run.py --tokens 12 --repeats 5 --peer-python PATH

Both sides read the same stored logits of SmolLM2, in processes of their own, alternated; one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.data.assets import path
from intaglio.errors import IntaglioError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from peer import peer_python  # noqa: E402


def work(python: Path | str, script: str, *arguments: object) -> None:
    """Run a script of this folder.

    Raises:
        IntaglioError: it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, HERE / script, *map(str, arguments)], env=environment, check=False)
    if done.returncode:
        raise IntaglioError(f"{script} failed with exit code {done.returncode}")


def medians(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the documents of several runs as one, each number the median."""
    merged: dict[str, Any] = {}
    for key, first in documents[0].items():
        values = [document[key] for document in documents]
        merged[key] = (
            medians(values)
            if isinstance(first, dict)
            else first
            if isinstance(first, list)
            else statistics.median(values)
        )
    return merged


def rows(ours: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    """Return the comparison as lines of a Markdown table."""
    lines = ["| constraint | method | checks a token, median | mean | ms a token, median | mean |", "|" + " --- |" * 6]

    def add(constraint: str, name: str, row: dict[str, Any]) -> None:
        numbers = [row.get("checks_median"), row.get("checks_mean"), row["seconds_median"], row.get("seconds_mean")]
        scale = (1, 1, 1000, 1000)
        shown = ["" if value is None else f"{value * by:.3g}" for value, by in zip(numbers, scale, strict=True)]
        lines.append(f"| {constraint} | {name} | {' | '.join(shown)} |")

    for constraint in (name for name in ours if name != "grammar"):
        for name, row in ours[constraint].items():
            add(constraint, f"ours, {name}", row)
        for name, row in peer[constraint].items():
            add(constraint, f"genlm-control, {name}", row)
    add("JSON Schema", "ours, by llguidance", ours["grammar"]["ours"])
    add("JSON Schema", "llguidance's mask", ours["grammar"]["llguidance"])
    add("JSON Schema", "xgrammar's mask", peer["grammar"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Constrained sampling: ours against masking and the peers.")
    parser.add_argument("--tokens", type=int, default=32, help="contexts of each constraint")
    parser.add_argument("--repeats", type=int, default=20, help="draws in each context")
    parser.add_argument("--rounds", type=int, default=3, help="alternated processes of each side")
    parser.add_argument("--masked", type=int, default=3, help="tokens that are masked by the predicate")
    parser.add_argument("--prepared", action="store_true", help="use the stored logits of an earlier run")
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with the peers")
    parser.add_argument("--peer-venv", type=Path, default=HERE / ".venv-peer", help="created if missing")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    given = parser.parse_args()
    peer = peer_python(HERE, given.peer_python, given.peer_venv.absolute())
    if not given.prepared:
        work(sys.executable, "prepare.py", given.out, "--tokens", given.tokens)
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(given.rounds):
        work(sys.executable, "worker_ours.py", given.out, "--repeats", given.repeats, "--masked", given.masked)
        work(peer, "worker_peer.py", given.out, "--repeats", given.repeats, "--tokenizer", path("smollm2"))
        for side, documents in results.items():
            documents.append(json.loads((given.out / f"{side}.json").read_text()))
    merged = {side: medians(documents) for side, documents in results.items()}
    atomic_io.write_text(given.out / "results.json", atomic_io.to_json(merged))
    table = "\n".join(rows(merged["ours"], merged["peer"]))
    atomic_io.write_text(given.out / "results.md", table + "\n")
    print(table)


if __name__ == "__main__":
    main()
