"""The claim of BiP: at 95 % zeros it beats iterative magnitude pruning that takes as many passes.

A run is a training seed: it draws the training images, the weights of a dense network, and the order of all batches.
Every arm prunes that same network with the same batches in the same order, by `evidence.baselines.bip.prune`, within a
budget of forward-backward passes (one arm, told apart, has its usual full cost). BiP's iteration counts as two: its
implicit term comes out of the upper level's one backward. No arm sees validation or evaluation images, the last step is
what is measured, and every arm has equally many settings to choose from on validation images.

Dimension letters: N images, C channels, H and W pixels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.evidence.baselines.bip import prune, rounds
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Tuning, Unit
from intaglio.evidence.worlds.digits import CLASSES, Digits, Images
from intaglio.evidence.worlds.sealing import generator
from intaglio.measures.memory import peak_memory

ACCURACY = "accuracy"
OVERLAP = "mask overlap"
SIDE = 8
"""Pixels of a side."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Arm:
    """What an arm does.

    Args:
        how: of `prune`.
        keep: share of the weights kept.
        net: a key of `NETS`.
        full: whether each round of iterative pruning has the whole budget.
        what: in words.
    """

    how: str
    what: str
    keep: float = 0.05
    net: str = "mlp"
    full: bool = False


ARMS: dict[str, Arm] = {
    "imp": Arm("imp", "iterative magnitude pruning, 80 % kept a round, the rounds sharing the budget"),
    "bip": Arm("bip", "BiP: weights and scores in turn, with the implicit term"),
    "alternate": Arm("alternate", "the same without the implicit term"),
    "omp": Arm("omp", "one-shot magnitude with a global ranking, then retraining"),
    "hydra": Arm("hydra", "HYDRA: scores alone for half of the budget, then the weights alone"),
    "imp-full": Arm("imp", "iterative magnitude pruning at its usual cost: the whole budget in every round", full=True),
    "imp-10": Arm("imp", "iterative magnitude pruning, 90 % zeros", 0.1),
    "bip-10": Arm("bip", "BiP, 90 % zeros", 0.1),
    "imp-2": Arm("imp", "iterative magnitude pruning, 98 % zeros", 0.02),
    "bip-2": Arm("bip", "BiP, 98 % zeros", 0.02),
    "imp-conv": Arm("imp", "iterative magnitude pruning of a convolutional net, 95 % zeros", net="conv"),
    "bip-conv": Arm("bip", "BiP on a convolutional net, 95 % zeros", net="conv"),
}


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def _conv(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for into, out, stride in ((1, width // 2, 1), (width // 2, width, 2), (width, width, 2)):
        layers += [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


NETS: dict[str, tuple[Callable[[int], nn.Module], int]] = {"mlp": (_mlp, 48), "conv": (_conv, 32)}
"""`{name: (makes it, width)}`."""

RATES = (0.05, 0.1, 0.2)


def _settings() -> dict[str, dict[str, dict[str, Any]]]:
    """`{how: {choice: settings of prune}}`, six each."""
    wide = (0.025, *RATES, 0.3, 0.4)
    return {
        "bip": {f"lr {r}, gamma {g}": {"lr": r, "gamma": g} for r in RATES[1:] for g in (1.0, 0.1, 0.01)},
        "alternate": {f"lr {r}, scores {m}": {"lr": r, "lr_mask": m} for r in RATES[1:] for m in (0.03, 0.1, 0.3)},
        "imp": {
            f"lr {r}, {'rewound' if back else 'going on'}": {"lr": r, "rewind": back}
            for r in RATES
            for back in (False, True)
        },
        "omp": {f"lr {r}": {"lr": r} for r in wide},
        "hydra": {f"lr {r}, scores {m}": {"lr": r, "lr_mask": m} for r in RATES for m in (1.0, 10.0)},
    }


SETTINGS = _settings()


def loss_fn(net: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy.

    Args:
        net: a classifier.
        batch: pixels [N, 1, 8, 8] and labels [N].
    """
    return F.cross_entropy(net(batch[0]), batch[1])


def batches(images: Images, size: int, key: str) -> Iterator[Batch]:
    """Batches without end, shuffled anew each epoch; what is left over of an epoch is dropped.

    Args:
        images: to draw from.
        size: of a batch.
        key: decides the order.
    """
    draws = generator(key)
    while True:
        order = torch.from_numpy(draws.permutation(len(images)))
        for places in order[: len(images) // size * size].split(size):
            yield images.pixels_NCHW[places], images.labels_N[places]


@torch.no_grad()
def accuracy(net: nn.Module, images: Images) -> float:
    """Right answers, in percent.

    Args:
        net: a classifier.
        images: with their true classes.
    """
    net.eval()
    return 100 * float((net(images.pixels_NCHW).argmax(1) == images.true_N).double().mean())


@dataclass(frozen=True)
class Prune:
    """The runner: train a dense network, prune it one arm's way, and measure it.

    Args:
        world: digits.
        passes: the budget of an arm; by default as many as the dense training takes, rounded up to a multiple of the
            14 rounds of iterative pruning.
        dense_epochs: of the dense training.
        batch: images of a batch.
        dense_rate: learning rate of the dense training (SGD, momentum 0.9, cosine).
        dense_decay: its weight decay.
    """

    world: Digits
    passes: int = 756
    dense_epochs: int = 30
    batch: int = 32
    dense_rate: float = 0.1
    dense_decay: float = 5e-4

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm from one training seed.

        Args:
            arm: a key of `ARMS`.
            unit: of which run, with the arm's choice.
            seed: of images, weights and order.
        """
        chosen, images = ARMS[arm], self.world.training(seed)
        measured = self.world.images(unit.stage, unit.base)
        net = copy.deepcopy(self.dense(chosen.net, seed)).train()
        passes = self.passes * (len(rounds(chosen.keep)) if chosen.full else 1)
        with peak_memory(torch.device("cpu")) as peak:
            begun = time.perf_counter()
            found = prune(
                net,
                chosen.keep,
                batches(images, self.batch, f"bip order:{seed}"),
                loss_fn,
                passes=passes,
                how=chosen.how,  # type: ignore[arg-type]
                **SETTINGS[chosen.how][unit.choice],
            )
            seconds = time.perf_counter() - begun
        return Outcome(
            values={ACCURACY: {"seed": accuracy(net, measured)}, OVERLAP: {"seed": found.overlap}},
            cost=Cost(
                tokens=found.passes * self.batch,
                flops=float(found.passes * self.batch * _pass_flops(net)),
                parameters=sum(int(p.count_nonzero()) for p in net.parameters()),
                seconds=seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"training": images.digest, "images": measured.digest},
        )

    def dense(self, name: str, seed: int) -> nn.Module:
        """The trained dense network of a seed; the last of each kind is kept for the other arms.

        Args:
            name: a key of `NETS`.
            seed: of images, weights and order.
        """
        if _kept.get(name, (None,))[0] != (self, seed):
            _kept[name] = ((self, seed), self._trained(name, seed))
        return _kept[name][1]

    def _trained(self, name: str, seed: int) -> nn.Module:
        make, width = NETS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = make(width)
        images = self.world.training(seed)
        steps = self.dense_epochs * (len(images) // self.batch)
        sgd = torch.optim.SGD(net.parameters(), lr=self.dense_rate, momentum=0.9, weight_decay=self.dense_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
        for _, batch in zip(range(steps), batches(images, self.batch, f"bip dense:{seed}"), strict=False):
            sgd.zero_grad()
            loss_fn(net, batch).backward()
            sgd.step()
            schedule.step()
        return net


_kept: dict[str, tuple[tuple[Prune, int], nn.Module]] = {}


def _pass_flops(net: nn.Module) -> int:
    """Operations of a forward and backward of one image, dense: zeros are multiplied like any number."""
    total = 0
    side = SIDE
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            side //= module.stride[0]
            total += 6 * module.weight.numel() * side * side
        elif isinstance(module, nn.Linear):
            total += 6 * module.weight.numel()
    return total


def _choices(how: str) -> Mapping[str, str]:
    return {name: ", ".join(f"{k} {v}" for k, v in fields.items()) for name, fields in SETTINGS[how].items()}


def experiment(run: Prune) -> Experiment:
    """The claim in a world.

    Args:
        run: the world and what is done in it.
    """
    return Experiment(
        slug="bip",
        claim="Pruned to 95 % zeros from the same trained network, within the same number of forward-backward passes, a"
        " small perceptron recognises held-out digits more often when BiP learned the mask than after iterative"
        " magnitude pruning, by more than 0.5 points of accuracy.",
        metric=ACCURACY,
        unit="points",
        direction="higher",
        delta=0.5,
        design="independent",
        factors=("training seed",),
        arms={name: arm.what for name, arm in ARMS.items()},
        baseline="imp",
        method="bip",
        parity="All arms but one take as many forward-backward passes over the same batches in the same order from the"
        " same dense network, a BiP iteration counted as two; imp-full has that budget in each of its rounds.",
        secondaries=(
            Secondary("iterative pruning at its usual full cost", "imp-full", "bip"),
            Secondary("one-shot magnitude and retraining", "omp", "bip"),
            Secondary("HYDRA and fine-tuning", "hydra", "bip"),
            Secondary("what the implicit term adds to plain alternation", "alternate", "bip"),
            Secondary("90 % zeros", "imp-10", "bip-10"),
            Secondary("98 % zeros", "imp-2", "bip-2"),
            Secondary("a convolutional net, 95 % zeros", "imp-conv", "bip-conv"),
            Secondary("how far the mask moves from that of the dense net's magnitude", "imp", "bip", OVERLAP, "lower"),
        ),
        run_unit=run,
        pilot_runs=20,
        most_runs=400,
        secondary_runs=30,
        threads=1,
        tuning=Tuning({name: dict(_choices(arm.how)) for name, arm in ARMS.items()}, runs=5),
        settings={
            "world": asdict(run.world),
            "passes": run.passes,
            "dense training": {
                "epochs": run.dense_epochs,
                "batch": run.batch,
                "rate": run.dense_rate,
                "decay": run.dense_decay,
            },
            "networks": {name: width for name, (_, width) in NETS.items()},
            "keep": {name: arm.keep for name, arm in ARMS.items()},
            "fixed": "global ranking, momentum 0.9 of both levels, weight decay 1e-4, rate of the weights by a cosine"
            " to 0 (for imp in each round), rate of the scores 0.1 where it is no choice, with the paper's steps",
            "choices": SETTINGS,
        },
    )


EXPERIMENTS = {"cpu": experiment(Prune(Digits()))}
"""By tier."""
