"""BERT4Rec on MovieLens-100K against RecTools: quality at equal dimensions and steps, and training examples a second.

    python benchmarks/recommend/run.py                                  # three seeds of each, alternated
    python benchmarks/recommend/run.py --seeds 1 --epochs 4 --peer-python PATH

Both sides get the same last items of each user, one sequence a user and no windows, and train for the same number of
steps with the same width, depth, heads, length, batch size, learning rate, mask share and dropout. The last item but
one of each user is ranked among all unseen items, and both sides' ranks go through one NDCG. Every training is a fresh
process. Writes `out/results.json` and `out/results.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from intaglio import atomic_io
from intaglio.data.interactions import load_interactions
from intaglio.data.item_sequences import ItemSequences

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from peer import peer_python  # noqa: E402

MOST_BELOW, LEAST_FASTER = 0.01, 2.0
"""Targets: NDCG@10 at most this much below the peer's; examples a second over the peer's."""


def prepare(path: Path, length: int) -> None:
    """Write each user's last training items and the item that follows them."""
    items = ItemSequences.from_interactions(load_interactions("movielens"))
    data = {
        "items": items.items,
        "names": items.names[1:],
        "sequences": {user: ids[-length:] for user, ids in items.training().items()},
        "seen": items.training(),
        "targets": {question.user: question.target for question in items.validation()},
    }
    atomic_io.write_json(path, data)


def ndcg(ranks: list[int | None]) -> float:
    """Return the mean NDCG@10 of ranks from 0; None is a rank below the tenth."""
    return mean(0.0 if rank is None or rank >= 10 else 1 / math.log2(rank + 2) for rank in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description="BERT4Rec against RecTools.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "width": 64, "depth": 2, "heads": 2, "length": 50, "batch_size": 64, "learning_rate": 2e-3, "dropout": 0.2,
        "mask_ratio": 0.2, "epochs": arguments.epochs, "threads": arguments.threads,
    }  # fmt: skip
    prepare(arguments.out / "data.json", int(settings["length"]))
    sides = {"ours": sys.executable, "peer": peer_python(HERE, arguments.peer_python)}
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for side in list(sides)[:: 1 if seed % 2 == 0 else -1]:
            command = [sides[side], str(HERE / f"worker_{side}.py"), str(arguments.out / "data.json")]
            done = subprocess.run(
                [*command, json.dumps({**settings, "seed": seed})], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"the worker of {side} failed:\n{done.stderr[-3000:]}")
            run = {"side": side, "seed": seed, **json.loads(done.stdout.splitlines()[-1])}
            runs.append(run | {"ndcg": ndcg(run.pop("ranks"))})
            print(f"{side} {seed}: NDCG@10 {runs[-1]['ndcg']:.4f}, {runs[-1]['seconds']:.1f} s", file=sys.stderr)
    by = {side: [run for run in runs if run["side"] == side] for side in sides}
    quality = {side: mean(run["ndcg"] for run in own) for side, own in by.items()}
    speed = {side: median(run["examples"] / run["seconds"] for run in own) for side, own in by.items()}
    lines = ["| | NDCG@10 | examples a second | steps |", "| --- | --- | --- | --- |"]
    lines += [f"| {side} | {quality[side]:.4f} | {speed[side]:.0f} | {by[side][0]['steps']} |" for side in sides]
    difference, ratio = quality["ours"] - quality["peer"], speed["ours"] / speed["peer"]
    lines += [
        "",
        f"NDCG@10 at most {MOST_BELOW} below: {difference:+.4f}, {'met' if difference >= -MOST_BELOW else 'MISSED'}",
        f"at least {LEAST_FASTER} times its examples: {ratio:.2f}, {'met' if ratio >= LEAST_FASTER else 'MISSED'}",
    ]
    atomic_io.write_json(arguments.out / "results.json", {"settings": settings, "runs": runs})
    atomic_io.write_text(arguments.out / "results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
