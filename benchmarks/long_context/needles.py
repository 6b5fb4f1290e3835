"""Accuracy of cache policies on facts of long documents, for a model with sliding windows such as Gemma 3.

    python benchmarks/long_context/needles.py MODEL --lengths 4096,8192,16384

Eight facts stand in Wikipedia text, and the questions for them come after it, as in the claim of sparse_frontier. The
document is read once, dense; layers with a sliding window keep their own cache, the others are under the policy. Only
accuracy is measured: the share of answers whose digits are all right, and their log-probability.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.evidence.designs.long_context import RETRIEVAL, SCORE, SPARSITY, Retrieval
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.long_needles import LongNeedles
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from machine import title  # noqa: E402

POLICIES = ("quest", "snapkv", "ada_snapkv", "sink_window")
WINDOW = 512
"""Tokens of a window of Wikipedia text."""


def rows(model: str, length: int, sparsities: list[float], documents: int) -> list[str]:
    """Return the rows of a length as Markdown, and print each as it is known."""
    texts = SmolLM2Wikipedia(model, documents_run=length // WINDOW + 1, tokens=WINDOW)
    design = Retrieval(LongNeedles(texts, length, length))
    arms = {"dense": Arm("dense attention", {"policy": None})}
    for sparsity in sparsities:
        arms |= {f"{p} {sparsity:.0%}": Arm(p, {"policy": p, "sparsity": sparsity}) for p in POLICIES}
    results = {name: [] for name in arms}
    for index in range(documents):
        for name, arm in arms.items():
            results[name].append(design.run(arm, RunKey("look", index), {}).values)
    lines = []
    for name, values in results.items():
        right, score = (mean(v for each in values for v in each[m.name].values()) for m in (RETRIEVAL, SCORE))
        sparsity = mean(each[SPARSITY.name] for each in values)
        lines.append(f"| {length:,} | {name} | {sparsity:.1%} | {right:.0f} % | {score:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled name or directory")
    parser.add_argument("--lengths", default="4096,8192,16384", help="tokens, comma-separated")
    parser.add_argument("--sparsities", default="0.5,0.8,0.9", help="comma-separated")
    parser.add_argument("--documents", type=int, default=1, help="of each length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="output directory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = [title(), "", "| tokens | attention | measured sparsity | right | log-probability |", "| --- " * 5 + "|"]
    for length in map(int, given.lengths.split(",")):
        lines += rows(given.model, length, [float(s) for s in given.sparsities.split(",")], given.documents)
        atomic_io.write_text(given.out / "needles.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
