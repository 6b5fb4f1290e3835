"""Wrong labels: F1 of ELR's table and of cleanlab's confident learning, and the cost of a step of ELR and of mixing.

    python benchmarks/training/labels.py                  # three draws of wrong labels; cleanlab in an own environment
    python benchmarks/training/labels.py --peer PYTHON    # an interpreter that has cleanlab
    python benchmarks/training/labels.py --cost           # the cost of a step alone

Both search the same digits with 40 % wrong labels. cleanlab needs out-of-sample probabilities: five trainings on four
fifths each, by cross-entropy, at the same learning rate, to the last epoch or to the best by held-out labels (wrong
ones included). ELR is one training. Steps are timed in alternation. Writes `labels.json`, or `cost.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new_image_model
from intaglio.data.images import Images
from intaglio.evidence.designs.classify import fit_images, mlp
from intaglio.evidence.testbeds.digits import Digits
from intaglio.methods.training.decoupled_mixup import DecoupledMixup
from intaglio.methods.training.elr import ELR
from intaglio.trainer import train
from intaglio.trainer.classification import Classification
from peer import peer_python

HERE = Path(__file__).resolve().parent
NOISE, WIDTH, FOLDS = 0.4, 256, 5
SETTINGS: dict[str, Any] = {"batch_size": 128, "learning_rate": 0.1, "optimizer": "sgd", "weight_decay": 5e-4}
STEPS = 1000
FILTERS = ("prune_by_noise_rate", "low_self_confidence")
MOST_COST = 1.03
"""Target: time of a step over plain training."""


def targets(images: Images, seed: int) -> Tensor:
    """Return ELR's table [N, K] after a training of a perceptron."""
    checkpoint = Checkpoint(_network(seed))
    pairs = zip(images.pixels_NCHW, images.labels_N, strict=True)
    rows = [{"pixel_values": pixels, "label": int(label)} for pixels, label in pairs]
    train(checkpoint, rows, objective=Classification(), modifiers=[ELR()], steps=STEPS, seed=seed, **SETTINGS)
    return checkpoint.attachments["elr"].tensors["targets"]


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mlp((1, 8, 8), WIDTH)


def out_of_sample(images: Images, seed: int, stopped: bool) -> Tensor:
    """Return the probabilities [N, K] of each image by a network that was not trained on it.

    With `stopped`, a network ends with its best epoch on the held-out images by their labels, wrong ones included.
    """
    fold_N = torch.arange(len(images)) % FOLDS
    probs_NK = torch.zeros(len(images), 10)
    recipe = {"objective": Classification(), "steps": STEPS, "seed": seed, **SETTINGS}
    for fold in range(FOLDS):
        kept, held_out = (images.take((fold_N == fold).eq(wanted).nonzero().flatten()) for wanted in (False, True))
        network = _network(seed)
        fit_images(network, kept, recipe, held_out if stopped else None)
        with torch.no_grad():
            probs_NK[fold_N == fold] = network.eval()(held_out.pixels_NCHW).softmax(1)
    return probs_NK


def f1(chosen: Sequence[int], wrong: Sequence[int]) -> float:
    """Return the F1 of a search for the wrong labels."""
    hits = len(set(chosen) & set(wrong))
    return 2 * hits / max(1, len(chosen) + len(wrong))


def search(seed: int, python: Path) -> dict[str, float]:
    """Return the F1 of each search on one draw of wrong labels."""
    images = Digits(noise=NOISE).training(seed)
    wrong = (images.labels_N != images.true_N).nonzero().flatten().tolist()
    results = {"elr": f1((targets(images, seed).argmax(1) != images.labels_N).nonzero().flatten().tolist(), wrong)}
    for stopped in (True, False):
        probs_NK = out_of_sample(images, seed, stopped).double().numpy()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "probs.npz"
            np.savez(file, labels=images.labels_N.numpy(), probs=probs_NK)
            for name in FILTERS:
                command = [str(python), str(HERE / "worker_peer.py"), str(file), name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                way = f"cleanlab, {name}, {'best epoch' if stopped else 'last epoch'}"
                results[way] = f1(json.loads(done.stdout.splitlines()[-1]), wrong)
    return results


class Stopwatch:
    """CPU times of the steps of a training."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, *_: Any) -> None:
        """Record the end of a step."""
        self.times.append(time.process_time())

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return float(np.median(np.diff(self.times)[10:]))


def cost(repeats: int, steps: int) -> dict[str, Any]:
    """Return the CPU time of a step of each modifier over a plain one, of a ViT on 32 images of 32 x 32 pixels."""
    draws = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=draws), "label": f"{n % 10}"} for n in range(640)]
    arms: dict[str, list[Any]] = {"plain": [], "elr": [ELR()], "decoupled_mixup": [DecoupledMixup()]}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in [*arms][:: 1 if repeat % 2 else -1]:
            checkpoint, clock = new_image_model("vit", width=96, depth=4, image_size=32), Stopwatch()
            train(checkpoint, rows, objective=Classification(), modifiers=arms[name], steps=steps, batch_size=32,
                  progress=clock)  # fmt: skip
            seconds[name].append(clock.step)
    ratios = {name: [t / plain for t, plain in zip(seconds[name], seconds["plain"], strict=True)] for name in arms}
    return {"ms": {name: 1000 * median(values) for name, values in seconds.items()},
            "ratio": {name: median(values) for name, values in ratios.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Wrong labels: ELR beside cleanlab.")
    parser.add_argument("--seeds", type=int, default=3, help="draws of wrong labels; default: %(default)s")
    parser.add_argument("--peer", type=Path, help="a Python with cleanlab; default: one is made")
    parser.add_argument("--cost", action="store_true", help="time the steps alone")
    parser.add_argument("--repeats", type=int, default=5, help="of the timed trainings; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"cost": cost(arguments.repeats, 60)} if arguments.cost else {}
    if not arguments.cost:
        python = peer_python(HERE, arguments.peer)
        rows = [search(seed, python) for seed in range(arguments.seeds)]
        results["F1"] = {name: [row[name] for row in rows] for name in rows[0]}
        results["mean F1"] = {name: mean(values) for name, values in results["F1"].items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(arguments.out / ("cost.json" if arguments.cost else "labels.json"), results)
    print(json.dumps(results, indent=1))
    if arguments.cost:
        for name in ("elr", "decoupled_mixup"):
            met = results["cost"]["ratio"][name] <= MOST_COST
            print(f"a step of {name} takes at most {MOST_COST} of a plain one: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
