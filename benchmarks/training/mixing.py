"""Mixed batches and losses against timm's and torchvision's on equal batches, and the cost of a mixed step.

    python benchmarks/training/mixing.py              # the peers' environment is made on the first run
    python benchmarks/training/mixing.py --cost       # also the CPU time of a step of plain training and of each mixing

Both sides get one batch and one matrix of logits; shares are read from the peers' targets. Writes `out/mixing.json`,
and prints what differs.

Dimension letters: B rows, C classes, H and W pixels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.classify import cnn
from intaglio.methods.training.adamixup import AdaMixUp
from intaglio.methods.training.decoupled_mixup import DecoupledMixup
from intaglio.trainer.classification import Classification
from intaglio.trainer.mixing import Mix, mixed_targets, soft_cross_entropy
from intaglio.trainer.modified_loss import modified_loss
from intaglio.trainer.protocols import TrainingRun

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from peer import peer_python  # noqa: E402

ROWS, CLASSES, SIDE, SMOOTHING = 64, 10, 28, 0.1
STEPS = 60
MOST = 1e-5


def inputs() -> dict[str, Tensor]:
    """Return a batch and logits."""
    draws = torch.Generator().manual_seed(0)
    return {
        "pixels": torch.rand(ROWS, 1, SIDE, SIDE, generator=draws),
        "labels": torch.randint(CLASSES, (ROWS,), generator=draws),
        "logits": 3 * torch.randn(ROWS, CLASSES, generator=draws),
    }


def differences(given: dict[str, Tensor], peer: dict[str, Tensor]) -> dict[str, float]:
    """Return the greatest differences of mixed pixels, targets and losses, by the peer's names."""
    found = {}
    labels_B, logits_BC = given["labels"], given["logits"]
    for key in [name.removesuffix(".pixels") for name in peer if name.endswith(".pixels")]:
        smoothing = SMOOTHING if key.endswith("smooth") else 0.0
        partner_B = torch.arange(ROWS).flip(0) if key.startswith("timm") else torch.arange(ROWS).roll(1)
        shares_BK = _shares(labels_B, partner_B, peer[f"{key}.targets"], smoothing)
        mix = Mix(torch.stack([torch.arange(ROWS), partner_B], 1), shares_BK)
        if "cutmix" in key:
            changed_BHW = (peer[f"{key}.pixels"] != given["pixels"]).any(1)
            # A partner may have equal pixels in the box, so all rows show it together.
            mix = Mix(mix.rows_BK, mix.shares_BK, changed_BHW.any(0).expand(ROWS, SIDE, SIDE))
        targets_BC = mixed_targets(mix, labels_B, CLASSES) * (1 - smoothing) + smoothing / CLASSES
        goal = Classification(loss_type="binary_cross_entropy", label_smoothing=smoothing)
        ours = {"pixels": mix.combine(given["pixels"]), "targets": targets_BC}
        ours["cross"] = soft_cross_entropy(logits_BC, targets_BC).mean()
        batch = {"pixel_values": logits_BC, "labels": labels_B, "targets": mixed_targets(mix, labels_B, CLASSES)}
        ours["binary"] = goal.loss(nn.Identity(), batch).total
        for name, value in ours.items():
            if f"{key}.{name}" in peer:
                found[f"{key}.{name}"] = float((value - peer[f"{key}.{name}"]).abs().max())
        plain = DecoupledMixup(eta=0.0).mixed_losses(logits_BC, mix, labels_B).mean()
        if not smoothing:
            found[f"{key}.eta 0"] = float((plain - peer[f"{key}.cross"]).abs())
    return found


def _shares(labels_B: Tensor, partner_B: Tensor, targets_BC: Tensor, smoothing: float) -> Tensor:
    """Return the shares of a batch, read from a row of two classes."""
    row = int((labels_B != labels_B[partner_B]).nonzero()[0])
    low = smoothing / CLASSES
    share = (targets_BC[row, labels_B[row]] - low) / (1 - smoothing)
    return torch.stack([share, 1 - share]).expand(ROWS, 2)


def costs(given: dict[str, Tensor]) -> dict[str, float]:
    """Return CPU milliseconds a step on one thread, alternated: plain training, mixup, and both methods."""
    goal, arms = Classification(), {"plain": None, "mixup": DecoupledMixup(eta=0.0),
                                    "decoupled_mixup": DecoupledMixup(), "adamixup": AdaMixUp()}  # fmt: skip
    batch = {"pixel_values": given["pixels"], "labels": given["labels"]}
    rows = [{"pixel_values": pixels, "label": int(n)} for pixels, n in zip(*batch.values(), strict=True)]
    times: dict[str, list[float]] = {name: [] for name in arms}
    made: dict[str, Any] = {}
    for name, method in arms.items():
        torch.manual_seed(0)
        net = cnn((1, SIDE, SIDE), 16, CLASSES)
        run = TrainingRun(
            Checkpoint(net), STEPS, ROWS, 0, lambda b, net=net: goal.loss(net, b), examples=rows, objective=goal
        )
        session = None if method is None else method.attach(run)
        owned = [p for group in ([] if session is None else session.param_groups()) for p in group["params"]]
        made[name] = net, session, torch.optim.SGD([*net.parameters(), *owned], lr=0.01, momentum=0.9)
    for step in range(1, STEPS + 1):
        for name, (net, session, optimizer) in made.items():
            start = time.thread_time()
            if session is not None:
                session.before_step(step, batch)
            sessions = [] if session is None else [session]
            modified_loss(goal, net, batch, torch.arange(ROWS), sessions).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.thread_time() - start)
    return {name: 1000 * median(values[5:]) for name, values in times.items()}


def main() -> None:
    """Run both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with the peers")
    parser.add_argument("--cost", action="store_true", help="also time a step")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    given = inputs()
    files = [arguments.out / name for name in ("mixing.safetensors", "mixing-peer.safetensors")]
    save_file(given, files[0])
    subprocess.run([peer_python(HERE, arguments.peer_python), str(HERE / "worker_mixing.py"), *files], check=True)
    found = differences(given, load_file(files[1]))
    result = {"differences": found, **({"CPU milliseconds a step": costs(given)} if arguments.cost else {})}
    atomic_io.write_json(arguments.out / "mixing.json", result)
    for name, value in [*found.items(), *result.get("CPU milliseconds a step", {}).items()]:
        print(f"{name}: {value:.3g}")
    sys.exit(0 if max(found.values()) < MOST else 1)


if __name__ == "__main__":
    main()
