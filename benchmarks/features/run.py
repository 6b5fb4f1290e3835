"""Training of TopK autoencoders against sae_lens, and dictionaries of every kind read by it.

    python benchmarks/features/run.py                     # activations of SmolLM2's middle layer
    python benchmarks/features/run.py --peer-python PATH --steps 4 --repeats 1

Same activations, width, k, batch, learning rate and number of steps, in alternated processes. The peer runs with dense
codes: the gradient of its sparse ones is missing on the CPU in torch 2.13. Writes `results.json` and `results.md` to
the output directory.
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

import torch
from safetensors.torch import save_file

from intaglio import atomic_io, load, load_texts
from intaglio.dictionaries.activations import ActivationStream, token_segments
from intaglio.dictionaries.training import geometric_median
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from machine import machine, title  # noqa: E402
from peer import peer_python  # noqa: E402

SIDES = ("ours", "peer")
TOLERANCE = 1e-5
"""Difference of codes, relative to the highest."""


def activations(file: Path, layer: int, tokens: int) -> None:
    """Write activations of a layer, around their geometric median and with a mean squared norm of 1."""
    checkpoint = load("smollm2")
    parts, site = anatomy(checkpoint.model), Site(layer)
    data = token_segments(checkpoint, load_texts("wikipedia"), tokens, 256, 1, 0)
    stream = ActivationStream(parts, (site,), data, tokens, tokens, 1, 8, 0)
    x_ND = stream.chunk(0)[site][:tokens]
    x_ND = x_ND - geometric_median(x_ND).float()
    save_file({"x": x_ND / x_ND.square().sum(1).mean().sqrt()}, file)


def worked(python: Path, side: str, what: str, *options: str) -> Any:
    """Run one side in its own process and return its line."""
    environment = {**os.environ}
    if side != "ours":
        environment.pop("PYTHONPATH", None)
    script = HERE / f"worker_{'ours' if side == 'ours' else 'peer'}.py"
    done = subprocess.run(
        [str(python), str(script), what, *options], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="TopK autoencoders against sae_lens.")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=53_248, help="activations, the last 4,096 held out")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with sae_lens")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"activations-{arguments.layer}-{arguments.tokens}.safetensors"
    if not file.is_file():
        activations(file, arguments.layer, arguments.tokens)
    peer = peer_python(HERE, arguments.peer_python)
    common = ["--activations", str(file), "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.repeats):
        for side in SIDES:
            rows[side].append(worked(Path(sys.executable) if side == "ours" else peer, side, "trained", *common))
    sides = {side: {name: statistics.median(row[name] for row in own) for name in own[0]} for side, own in rows.items()}
    folder = arguments.out / "dictionaries"
    folder.mkdir(exist_ok=True)
    shares = worked(Path(sys.executable), "ours", "saved", *common[:2], "--out", str(folder))
    read = worked(peer, "peer", "read", "--out", str(folder))
    wrong = [name for name, row in read.items() if row["codes"] > TOLERANCE * row["highest"]]
    torch.set_num_threads(arguments.threads)
    results = {
        "machine": machine(), "sides": sides, "runs": rows, "round_trip": read, "active": shares,
        "settings": vars(arguments),
    }  # fmt: skip
    atomic_io.write_json(arguments.out / "results.json", json.loads(json.dumps(results, default=str)))
    ratio = {name: sides["ours"][name] / sides["peer"][name] for name in ("tokens_per_s", "peak_bytes")}
    lines = [
        title(),
        f"tokens/s {ratio['tokens_per_s']:.2f} times the peer's, peak memory {ratio['peak_bytes']:.2f} times",
        "",
    ]
    lines += ["| | tokens/s | CPU µs a token | variance unexplained | peak MB |", "| --- | --- | --- | --- | --- |"]
    for side, row in sides.items():
        lines.append(
            f"| {side} | {row['tokens_per_s']:,.0f} | {row['cpu_us_per_token']:.0f} | {row['fvu']:.3f} |"
            f" {row['peak_bytes'] / 1e6:.0f} |"
        )
    lines += ["", "| dictionary | read as | largest difference of codes |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['architecture']} | {row['codes']:.1e} |" for name, row in read.items()]
    atomic_io.write_text(arguments.out / "results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    if wrong:
        raise IntaglioError(f"sae_lens reads other codes from {', '.join(wrong)}")


if __name__ == "__main__":
    main()
