"""The transplant against mergekit's tokensurgeon: the same checkpoints, anchors and number of atoms.

    python benchmarks/transplant/run.py                                # two small models on source code, and SmolLM2
    python benchmarks/transplant/run.py --pairs small --k 8,64
    python benchmarks/transplant/run.py --base DIR --donor DIR --texts FILE

Both sides run with one thread in alternated processes; times are CPU time. Writes `results.json` and `results.md` to
the output directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import intaglio
from intaglio import atomic_io
from intaglio.checkpoint.from_scratch import new, trained_tokenizer
from intaglio.data.python_source import source_files
from intaglio.data.texts import Corpus, load_texts
from intaglio.evidence.testbeds.two_tokenizers import TwoTokenizers, nats_per_byte
from intaglio.methods.weights.omp_transplant import Donor, Vocabulary, match_tokens

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from peer import peer_python  # noqa: E402

PAIRS = ("small", "smollm2")
SEED = 900_001
"""Of the small models; none of the claim's."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The transplant against mergekit's tokensurgeon.")
    parser.add_argument("--pairs", default=",".join(PAIRS), help=f"of {', '.join(PAIRS)}; default: all")
    parser.add_argument("--k", default="8,64", help="numbers of atoms; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", type=Path, help="checkpoint directory; with --donor, instead of the pairs")
    parser.add_argument("--donor", type=Path)
    parser.add_argument("--texts", help="evaluation texts; default: held-out source, or the bundled Wikipedia")
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with mergekit")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    return parser.parse_args()


def prepared(name: str, arguments: argparse.Namespace) -> tuple[Path, Path, dict[str, str]]:
    """Return the checkpoints of a pair on disk, and evaluation documents.

    `small`: the two models of the claim's test bed, with a seed of their own. `smollm2`: SmolLM2 in float32, and a
    Llama as wide with a vocabulary of Python source and random weights: for time and rows; what it says means nothing.
    """
    if name == "given":
        texts = load_texts(arguments.texts or "wikipedia").documents[:20]
        return arguments.base, arguments.donor, {str(i): text[:2000] for i, text in enumerate(texts)}
    place = arguments.out / name
    bed = TwoTokenizers()
    if name == "small":
        models = {which: bed.trained(which, SEED) for which in ("base", "donor")}  # type: ignore[arg-type]
        documents = bed.documents("pilot", 9)
    else:
        source = Corpus("source", tuple(file.text for file in source_files())[:400])
        tokenizer = trained_tokenizer(source, 16_384, 2048)
        donor = new("llama", width=576, depth=1, tokenizer=tokenizer, context=2048, seed=1)
        models = {"base": intaglio.load("smollm2", dtype="float32"), "donor": donor}
        texts = load_texts("wikipedia").split()[1].documents[:5]
        documents = {str(i): text[:1500] for i, text in enumerate(texts)}
    for which, checkpoint in models.items():
        if not (place / which).is_dir():
            checkpoint.save(place / which)
    return place / "base", place / "donor", documents


def worked(python: Path, side: str, what: str, k: int, **paths: Path) -> dict[str, float]:
    """Run one side in its own process."""
    shutil.rmtree(paths["out"], ignore_errors=True)
    options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if side == "peer":
        environment.pop("PYTHONPATH", None)
    command = [str(python), str(HERE / f"worker_{side}.py"), what, "--k", str(k), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    results: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return results


def tensors_of(base: Path, donor: Path, out: Path) -> dict[str, Any]:
    """Write the targets and atoms of the input embedding for both sides, and return their sizes."""
    read = Donor.load(str(donor))
    own = intaglio.load(base)
    joined = match_tokens(
        Vocabulary.from_tokenizer(own.tokenizer), Vocabulary.from_tokenizer(read.tokenizer), "strings"
    )
    shared = sorted(joined.ids)
    fresh = sorted(joined.donor.tokens.keys() - joined.ids.keys())
    rows = read.embedding_VD.float()
    save_file({"targets": rows[fresh].contiguous(), "atoms": rows[shared].contiguous()}, out)
    return {"shared": shared, "new": fresh, "base": [joined.ids[i] for i in shared], "width": rows.shape[1]}


def judged(outs: dict[str, Path], summary: dict[str, Any], documents: dict[str, str]) -> dict[str, float]:
    """Compare the matrices of both sides, and the losses of both models on the documents."""
    models = {side: intaglio.load(path) for side, path in outs.items()}
    results: dict[str, float] = {}
    for name in ("input", "output"):
        ours, peer = (getattr(m.model, f"get_{name}_embeddings")().weight.detach().float() for m in models.values())
        rows = min(len(ours), len(peer))
        difference = (ours[:rows] - peer[:rows]).abs()
        results[f"{name}: largest difference, shared rows"] = float(difference[summary["shared"]].max())
        results[f"{name}: largest difference, new rows"] = float(difference[summary["new"]].max())
        results[f"{name}: median difference, new rows"] = float(difference[summary["new"]].median())
    for side, model in models.items():
        results[f"nats a byte, {side}"] = statistics.fmean(nats_per_byte(model, documents).values())
    return results


def compared(name: str, k: int, python: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a pair with a number of atoms."""
    base, donor, documents = prepared(name, arguments)
    place = arguments.out / name
    place.mkdir(parents=True, exist_ok=True)
    summary = tensors_of(base, donor, place / "tensors.safetensors")
    pythons = {"ours": Path(sys.executable), "peer": python}
    runs: dict[str, dict[str, list[dict[str, float]]]] = {what: {s: [] for s in pythons} for what in ("coded", "whole")}
    for repeat in range(arguments.repeats):
        for side in list(pythons)[:: 1 if repeat % 2 else -1]:
            coded = {"tensors": place / "tensors.safetensors", "out": place / f"{side}.safetensors"}
            runs["coded"][side].append(worked(pythons[side], side, "coded", k, **coded))
            whole = {"base": base, "donor": donor, "out": place / f"out-{side}"}
            runs["whole"][side].append(worked(pythons[side], side, "whole", k, **whole))
            print(f"{name}, k {k}, run {repeat + 1}: {side}", file=sys.stderr)
    row: dict[str, Any] = {"pair": name, "k": k, "shared": len(summary["shared"]), "new": len(summary["new"])}
    given = load_file(place / "tensors.safetensors")
    supports = {}
    for side in pythons:
        code = load_file(place / f"{side}.safetensors")
        made = torch.nn.functional.embedding_bag(
            code["support"], given["atoms"], mode="sum", per_sample_weights=code["weight"]
        )
        error = (given["targets"] - made).norm(dim=1) / given["targets"].norm(dim=1)
        row[f"reconstruction error, {side}"] = float(error.mean())
        supports[side] = code["support"].sort(1).values
    row["equal supports"] = float((supports["ours"] == supports["peer"]).all(1).float().mean())
    for what, sides in runs.items():
        for measure in ("cpu_seconds", "peak_bytes"):
            ours, peer = (statistics.median(run[measure] for run in sides[side]) for side in ("ours", "peer"))
            row |= {f"{what}, {measure}, ours": ours, f"{what}, {measure}, peer": peer}
            row[f"{what}, {measure}, ratio"] = ours / peer
    return row | judged({side: place / f"out-{side}" for side in pythons}, summary, documents)


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    python = peer_python(HERE, arguments.peer_python)
    names = ["given"] if arguments.base else arguments.pairs.split(",")
    rows = [compared(name, int(k), python, arguments) for name in names for k in arguments.k.split(",")]
    atomic_io.write_json(arguments.out / "results.json", rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(["", *(f"{row['pair']}, k {row['k']}" for row in rows)]) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(rows) + 1)) + " |")
    for key in keys[2:]:
        cells = [f"{row[key]:,.6g}" if key in row else "-" for row in rows]
        lines.append("| " + " | ".join([key, *cells]) + " |")
    (arguments.out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
