"""The claim of DSnoT: refining Wanda's mask at 70 % zeros lowers the perplexity of a language model.

A run is a calibration draw; each arm carves the dense model with that draw and is measured on the same documents. The
unit of pairing is a document crossed with a draw. Nothing is tuned in any arm: every method has its defaults.

Dimension letters: N documents, T tokens of a document, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.carving import BATCH, World, carved
from intaglio.evidence.experiment import Experiment, Outcome, Secondary, Unit
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.measures.language_modeling import quality
from intaglio.methods.base import Method
from intaglio.methods.weights.dsnot import DSnoT
from intaglio.methods.weights.sparsegpt import SparseGPT
from intaglio.methods.weights.wanda import Wanda
from intaglio.modeling.anatomy import Linear, anatomy, final_hidden

LOSS = "log-perplexity"
ERROR = "layer error"
ERROR_TOKENS = 32
"""Tokens of each document that the layer errors are taken on: they cost as much as a pass of the model for each arm."""


METHODS: dict[str, tuple[Method, str]] = {
    "wanda": (Wanda(sparsity=0.7), "Wanda, 70 % zeros in each row"),
    "dsnot": (
        DSnoT(sparsity=0.7),
        "the same mask refined by DSnoT (defaults: cycles and threshold scaled, all layers)",
    ),
    "wanda-50": (Wanda(sparsity=0.5), "Wanda, 50 %"),
    "dsnot-50": (DSnoT(sparsity=0.5), "Wanda refined by DSnoT, 50 %"),
    "wanda-2:4": (Wanda(pattern="2:4"), "Wanda, 2:4"),
    "dsnot-2:4": (DSnoT(pattern="2:4"), "Wanda refined by DSnoT, 2:4"),
    # Magnitude's own rule takes the whole layer: DSnoT's start takes rows, and rows are compared with rows.
    "magnitude": (
        DSnoT(sparsity=0.7, base="magnitude", max_cycles=0),
        "the smallest weights of each row, 70 % (DSnoT's start, not refined; plain magnitude takes whole layers)",
    ),
    "dsnot-magnitude": (DSnoT(sparsity=0.7, base="magnitude"), "that refined by DSnoT, 70 %"),
    "sparsegpt": (SparseGPT(sparsity=0.7, block=128), "SparseGPT, 70 %; it also changes the weights that it keeps"),
}
"""`{arm: (method, what it is)}`."""


@dataclass(frozen=True)
class Carve:
    """The runner: carve a copy of the dense model, then measure it.

    Args:
        world: gives model, calibration data and documents.
    """

    world: World

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm with one calibration draw.

        Args:
            arm: a key of `METHODS`.
            unit: of which run.
            seed: of the calibration draw.
        """
        done = carved(self.world, METHODS[arm][0], unit, seed)
        segments, names = done.documents.segments, done.documents.names
        losses = quality(done.checkpoint, segments, batch_size=BATCH).losses
        errors = layer_errors(done.dense, done.checkpoint, segments.ids_NT[:, :ERROR_TOKENS])
        return done.outcome({LOSS: dict(zip(names, losses, strict=True)), ERROR: dict(zip(names, errors, strict=True))})


@torch.no_grad()
def layer_errors(dense: Checkpoint, carved: Checkpoint, ids_NT: Tensor) -> list[float]:
    """Σ ||(W - Ŵ) x||² / Σ ||W x||² of each document, over all linears and tokens; x is what enters in the dense model.

    Args:
        dense: W.
        carved: Ŵ, of the same architecture.
        ids_NT: tokens of the documents.
    """
    change = {
        name: linear.read() - other.read()
        for (name, linear), (_, other) in zip(
            anatomy(dense.model).all_linears(), anatomy(carved.model).all_linears(), strict=True
        )
    }
    lost_N, whole_N = torch.zeros(2, len(ids_NT), dtype=torch.float64)

    def see(name: str, linear: Linear, x_NTI: Tensor) -> None:
        lost_N.add_((x_NTI @ change[name].T).double().square().sum((1, 2)).cpu())
        whole_N.add_((x_NTI @ linear.read().T).double().square().sum((1, 2)).cpu())

    with _seen(dense, see):
        final_hidden(anatomy(dense.model), {"input_ids": ids_NT})
    return [float(value) for value in lost_N / whole_N]


@contextmanager
def _seen(checkpoint: Checkpoint, see: Any) -> Iterator[None]:
    """Call `see(name, linear, input)` for every linear of a pass."""

    def hook(name: str, linear: Linear) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, linear, args[0])

        return linear.module.register_forward_pre_hook(before)

    handles = [hook(name, linear) for name, linear in anatomy(checkpoint.model).all_linears()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def experiment(world: SmolLM2Wikipedia) -> Experiment:
    """The claim in a world.

    Args:
        world: model and data.
    """
    return Experiment(
        slug="dsnot",
        claim="On SmolLM2-135M with 70 % of the weights pruned, refining Wanda's mask with DSnoT lowers the held-out "
        "log-perplexity by more than 0.02 nats a token.",
        metric=LOSS,
        unit="nats a token",
        direction="lower",
        delta=0.02,
        design="crossed",
        factors=("calibration draw", "document"),
        arms={arm: what for arm, (_, what) in METHODS.items()},
        baseline="wanda",
        method="dsnot",
        parity="All arms of a draw see the very same calibration tokens; no arm is tuned.",
        equal=("tokens",),
        secondaries=(
            Secondary("50 %: DSnoT against Wanda", "wanda-50", "dsnot-50"),
            Secondary("2:4: DSnoT against Wanda", "wanda-2:4", "dsnot-2:4"),
            Secondary("70 %: DSnoT from magnitude against magnitude by rows", "magnitude", "dsnot-magnitude"),
            Secondary("70 %: DSnoT against SparseGPT", "sparsegpt", "dsnot"),
            Secondary("layer error, 70 %", "wanda", "dsnot", ERROR),
            Secondary("layer error, 50 %", "wanda-50", "dsnot-50", ERROR),
            Secondary("layer error, 2:4", "wanda-2:4", "dsnot-2:4", ERROR),
        ),
        run_unit=Carve(world),
        pilot_runs=5,
        units=world.documents_run,
        # An arm takes about two minutes on one core: with two workers 14 draws, 4 of them with all arms, and the pilot
        # are an hour. One thread an arm: two threads of two processes on two cores wait for each other.
        most_runs=14,
        secondary_runs=4,
        threads=1,
        why="Claim, delta and tier are as named. A first pilot, at 16 calibration windows, had a spread over draws of"
        " 0.13. Before any run the windows of a draw were doubled, and arms that only secondary comparisons need were"
        " left to the first four draws, so that the claim itself gets more of them.",
        settings={
            "world": asdict(world),
            "methods": {arm: method.model_dump() for arm, (method, _) in METHODS.items()},
            "batch size": BATCH,
            "tokens of a document for layer errors": ERROR_TOKENS,
        },
    )


EXPERIMENTS = {"cpu": experiment(SmolLM2Wikipedia())}
"""By tier."""
