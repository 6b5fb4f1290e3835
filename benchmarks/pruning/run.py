"""Pruning against llmcompressor: the same checkpoint and token ids, alternated fresh processes.

    python benchmarks/pruning/run.py --out bench-out            # everything: five repeats of six variants
    python benchmarks/pruning/run.py --variants wanda-50 --repeats 1 --peer-python PATH

Each finished run is a line of `runs.jsonl` in the output directory and is not repeated, so an interrupted benchmark
continues. Writes `results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import prepare
import table

from intaglio import atomic_io
from intaglio.errors import IntaglioError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from peer import peer_python  # noqa: E402

SOURCE = HERE.parents[1] / "src" / "intaglio"
VARIANTS = ("magnitude-50", "magnitude-2:4", "wanda-50", "wanda-2:4", "sparsegpt-50", "sparsegpt-2:4")
# What a pruning call of ours runs: when one of these changes, our finished runs no longer count.
OURS = ("weights/**/*.py", "calibrate.py", "anatomy.py", "checkpoint/*.py")

Run = dict[str, Any]


def amount(variant: str) -> tuple[str, list[str]]:
    """Return a variant's method and the workers' option for how much is pruned.

    Raises:
        IntaglioError: it is neither.
    """
    collected = re.fullmatch(r"(magnitude|wanda|sparsegpt)-(?:(\d{1,2})|(\d+:\d+))", variant)
    if not collected:
        raise IntaglioError(f"the variant {variant!r} is unknown; accepted: {', '.join(VARIANTS)} and other amounts")
    method, percent, pattern = collected.groups()
    return method, ["--pattern", pattern] if pattern else ["--sparsity", str(int(percent) / 100)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pruning: ours against llmcompressor.")
    parser.add_argument("--model", default="smollm2", help="checkpoint directory or bundled name")
    parser.add_argument("--texts", default="wikipedia", help="bundled name, file or directory")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32, help="calibration segments")
    parser.add_argument("--held-out", type=int, default=64, help="held-out segments")
    parser.add_argument("--length", type=int, default=512, help="tokens per segment")
    parser.add_argument("--seed", type=int, default=0, help="orders the documents")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences per forward pass, ours")
    parser.add_argument("--peer-batch-size", type=int, default=2, help="sequences per forward pass, the peer's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with llmcompressor")
    parser.add_argument("--peer-venv", type=Path, default=HERE / ".venv-peer", help="created if missing")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints (538 MB each)")
    return parser.parse_args()


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


class Bench:
    """A benchmark: its settings and finished runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out.resolve()
        self.model = prepare.checkpoint_directory(arguments.model)
        self.python = {
            "ours": Path(sys.executable),
            "peer": peer_python(HERE, arguments.peer_python, arguments.peer_venv.absolute()),
        }
        self.batch_size = {"ours": arguments.batch_size, "peer": arguments.peer_batch_size}
        counts = arguments.samples, arguments.held_out, arguments.length, arguments.seed
        self.calibration, self.held_out, self.digests = prepare.token_files(
            self.model, arguments.texts, self.out, *counts
        )
        ours = sorted(path for pattern in OURS for path in SOURCE.glob(pattern))
        self.code = {
            "ours": _digest([*ours, HERE / "common.py", HERE / "worker_ours.py"]),
            "peer": _digest([HERE / "common.py", HERE / "worker_peer.py", prepare.REQUIREMENTS]),
        }
        self.weights = _digest([self.model / "model.safetensors"])
        self.journal = self.out / "runs.jsonl"
        self.done = self._read_journal()

    def _read_journal(self) -> dict[str, Run]:
        if not self.journal.is_file():
            return {}
        done = {}
        for line in self.journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                # The process was stopped while it wrote the last line: that run is done again.
                print("a half-written line of runs.jsonl is ignored", file=sys.stderr)
                continue
            done[entry["key"]] = entry
        return done

    def _append(self, entry: Run) -> None:
        self.done[entry["key"]] = entry
        with self.journal.open("a") as file:
            if file.tell() and not self.journal.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _execute(self, side: str, script: str, options: list[str], log: str) -> Run:
        threads = str(self.arguments.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        path = self.out / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as errors:
            command = [str(self.python[side]), str(HERE / script), "--threads", threads, *options]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, check=False)
        if done.returncode:
            raise IntaglioError(f"{script} for {log} ended with {done.returncode}; its messages are in {path}")
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    def checkpoint(self, variant: str, side: str) -> Path:
        """Return the path of a side's pruned checkpoint of a variant until it is judged."""
        return self.out / "checkpoints" / f"{variant.replace(':', 'of')}-{side}"

    def _key(self, variant: str, side: str, repeat: int) -> str:
        base = f"{self.weights}/{self.digests['calibration'][:16]}/{self.arguments.threads}"
        return f"{base}/{self.code[side]}/{self.batch_size[side]}/{variant}/{side}/{repeat}"

    def _work(self, variant: str, side: str, repeat: int, save: bool) -> Run:
        """Run a worker once; with `save`, keep its checkpoint and the id of the run that made it."""
        method, how_much = amount(variant)
        options = ["--model", str(self.model), "--calibration", str(self.calibration)]
        options += ["--method", method, *how_much, "--batch-size", str(self.batch_size[side])]
        target = self.checkpoint(variant, side)
        if save:
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            options += ["--output", str(target)]
        answer = self._execute(side, f"worker_{side}.py", options, f"{variant.replace(':', 'of')}-{side}-{repeat}")
        if save:
            target.with_suffix(".key").write_text(self._key(variant, side, 0))
        return answer

    def saved(self, variant: str, side: str) -> Path:
        """Return the checkpoint of a side's first run, remade untimed if it is missing or of another run."""
        target = self.checkpoint(variant, side)
        note = target.with_suffix(".key")
        if not (target.is_dir() and note.is_file() and note.read_text() == self._key(variant, side, 0)):
            print(f"{variant} {side}: its checkpoint is made again to be judged; this run is not timed", flush=True)
            self._work(variant, side, 0, save=True)
        return target

    def prune(self, variant: str, side: str, repeat: int) -> Run:
        """Return one run, from the log or newly measured; the first repeat's checkpoint is kept for the judge."""
        key = self._key(variant, side, repeat)
        if key not in self.done:
            answer = self._work(variant, side, repeat, save=repeat == 0)
            entry = {"variant": variant, "side": side, "repeat": repeat, "batch_size": self.batch_size[side]}
            self._append({"key": key, **entry, **answer})
            shown = answer.get("unsupported") or f"{answer['seconds']:.1f} s, peak {answer['peak_mib']:.0f} MiB"
            print(f"{variant} {side} {repeat + 1}: {shown}", flush=True)
        return self.done[key]

    def judge(self, name: str, runs: list[Run]) -> Run:
        """Return the output of `judge.py` for the runs' checkpoints (the dense one if there are none), cached."""
        tail = "+".join(run["key"] for run in runs)
        code = _digest([HERE / "judge.py", HERE / "common.py"])
        key = f"{self.weights}/{self.digests['held_out'][:16]}/{code}/judge/{name}/{tail}"
        if key not in self.done:
            checkpoints = [self.saved(name, run["side"]) for run in runs] or [self.model]
            options = ["--evaluation", str(self.held_out), *map(str, checkpoints)]
            self._append({"key": key, **self._execute("ours", "judge.py", options, f"judge-{name.replace(':', 'of')}")})
        return self.done[key]

    def variant(self, variant: str) -> dict[str, Any]:
        """Return the finished row of a variant: alternated runs, then the judge."""
        runs: list[Run] = []
        for repeat in range(self.arguments.repeats):
            for side in table.SIDES:
                if repeat and any("unsupported" in run for run in runs if run["side"] == side):
                    continue
                runs.append(self.prune(variant, side, repeat))
        first = [run for run in runs if run["repeat"] == 0 and "unsupported" not in run]
        judged = self.judge(variant, first) if first else None
        if not self.arguments.keep:
            for run in first:
                shutil.rmtree(self.checkpoint(variant, run["side"]), ignore_errors=True)
        return table.summary(variant, runs, judged)

    def results(self) -> dict[str, Any]:
        """Run everything that is missing and return the results."""
        names = self.arguments.variants.split(",")
        for name in names:
            amount(name)
        dense = self.judge("dense", [])
        asked = ("repeats", "samples", "held_out", "length", "seed", "threads", "texts", "model")
        return {
            "settings": {name: getattr(self.arguments, name) for name in asked},
            "digests": {**self.digests, "weights": self.weights, "code": self.code},
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
            "dense_perplexity": dense["checkpoints"][0]["perplexity"],
            "variants": [self.variant(name) for name in names],
        }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    try:
        bench = Bench(_arguments())
        results = bench.results()
        atomic_io.write_json(bench.out / "results.json", results)
        atomic_io.write_text(bench.out / "results.md", table.markdown(results))
    except IntaglioError as error:
        print(error, file=sys.stderr)
        return 2
    print(table.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
