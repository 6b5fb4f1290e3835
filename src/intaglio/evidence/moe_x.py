"""The claim of MoE-X: single units tell more of a game's state than a dense model's of equal activated parameters.

A run is a training seed. A small GPT-2 is trained on games whose board is known exactly, and every arm goes on from it:
its MLPs of D units become k D units in the dense arms, k noisy copies side by side, and 8 noisy copies of which a token
goes to k in the others. All see the same games in the same order, and a token passes through k D units in all of them.
Arms whose units have the same activation begin with the very same model; those of both begin with the same weights.

Coverage is the mean over properties of the board of the F1 of the best single unit, with the expert's gate in its
activation. Unit and cut are chosen on games that the models were trained beside, and judged on games that no model and
no choice has seen. Experts have E / k times as many units to choose from, so
coverage is told beside it among as many units as the dense arm has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Tuning, Unit
from intaglio.evidence.worlds.board_game import PAD, BoardGame, Boards
from intaglio.evidence.worlds.sealing import MEASURED
from intaglio.measures.feature_coverage import Counts, coverage, cuts, random_coverage, reconstruction
from intaglio.measures.memory import peak_memory
from intaglio.methods.activations.moe_x import MoELayer, MoELayerConfig, MoEX, moe_layers
from intaglio.methods.activations.moe_x.routing import entropy
from intaglio.methods.activations.moe_x.upcycling import UpcycleConfig
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import count_parameters
from intaglio.trainer import TrainingModifier, train
from intaglio.trainer.rng import generator

COVERAGE = "coverage"
EQUAL = "coverage among as many units as the dense arm has"
RECONSTRUCTION = "reconstruction"
LOSS = "nats a token"
L0 = "units of a layer that fire for a token"
LOAD = "entropy of the experts' loads"

EXPERTS, ACTIVE, NOISE, BALANCE = 8, 2, 0.05, 0.01
RATES = ("0.001", "0.003", "0.006")
DRAWS = 8
"""Draws of units that coverage at an equal number is averaged over."""
EVALUATED = 128
"""Games that pass at a time where a model is measured."""


@dataclass(frozen=True)
class Arm:
    """A model and what it goes on with.

    Args:
        what: it is.
        activation: of its units, from the first step of all on.
        router: of its experts; None: a dense MLP of as many units as a token has there.
    """

    what: str
    activation: str
    router: str | None = None

    def method(self) -> MoEX:
        """What makes its experts."""
        return MoEX(
            experts=EXPERTS,
            active=ACTIVE,
            router=self.router,  # type: ignore[arg-type]
            activation=self.activation,  # type: ignore[arg-type]
            noise=NOISE,
            balance=BALANCE,
        )


ARMS: dict[str, Arm] = {
    "dense-relu": Arm(f"dense, ReLU, {ACTIVE} D units", "relu"),
    "moe-x": Arm(
        f"{EXPERTS} experts of D ReLU units, the {ACTIVE} that are expected to be sparsest", "relu", "sparsity"
    ),
    "dense-gelu": Arm(f"dense, GELU, {ACTIVE} D units", "gelu"),
    "switch": Arm(f"{EXPERTS} experts of D GELU units, {ACTIVE} by a linear router", "gelu", "linear"),
    "switch-relu": Arm(f"{EXPERTS} experts of D ReLU units, {ACTIVE} by a linear router", "relu", "linear"),
    "sparsity-gelu": Arm(f"{EXPERTS} experts of D GELU units, {ACTIVE} by MoE-X's router", "gelu", "sparsity"),
}
BASELINE, METHOD = "dense-relu", "moe-x"


@dataclass(frozen=True)
class Continue:
    """The runner: go on from the dense model in one way, then read the units.

    Args:
        world: games, the model's size and how it is trained.
    """

    world: BoardGame

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm with one training seed.

        Args:
            arm: a key of `ARMS`.
            unit: of which run; its choice is one of `RATES`.
            seed: of weights, games and their order.
        """
        world, one = self.world, ARMS[arm]
        checkpoint = self.begin(arm, seed)
        games = world.training(seed)
        recipe = {**world.recipe(seed), "learning_rate": float(unit.choice)}
        shapers: list[TrainingModifier] = [] if one.router is None else [MoEX(experts=None, balance=BALANCE)]
        with peak_memory(checkpoint.device) as peak:
            done = train(checkpoint, games.examples(), shape=shapers, **recipe)
        read, judged = world.boards("train", seed), world.boards(MEASURED[unit.stage], unit.base)
        active = count_parameters(checkpoint.model) - _idle(checkpoint.model)
        return Outcome(
            values={name: {"seed": value} for name, value in self.measured(checkpoint, read, judged, seed).items()},
            cost=Cost(
                # Of what goes on; the dense model before it is the same for all.
                tokens=done.tokens,
                flops=6.0 * active * done.tokens,
                parameters=count_parameters(checkpoint.model),
                seconds=done.seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"games": games.digest, "read": read.games.digest, "judged": judged.games.digest},
        )

    def begin(self, arm: str, seed: int) -> Checkpoint:
        """What an arm is before it goes on.

        Args:
            arm: a key of `ARMS`.
            seed: of the dense model, and of the noise.
        """
        one, base = ARMS[arm], self.world.base(seed, ARMS[arm].activation)
        if one.router is None:
            return widened(base, self.world.new(seed % 2**32, one.activation, ACTIVE * self.world.inner), seed)
        return one.method().apply(base, seed=seed)

    def measured(self, checkpoint: Checkpoint, read: Boards, judged: Boards, seed: int) -> dict[str, float | None]:
        """Every metric of a trained model.

        Args:
            checkpoint: of an arm.
            read: games on which units and cuts are chosen.
            judged: those on which they are judged.
            seed: of the units that are drawn for the comparison of equally many.
        """
        read_PN, _, _ = activations(checkpoint, read)
        z_PN, nats, load = activations(checkpoint, judged)
        if not math.isfinite(nats):
            return dict.fromkeys((COVERAGE, EQUAL, RECONSTRUCTION, LOSS, L0, LOAD), None)
        cuts_CN = cuts(read_PN)
        chosen, found = Counts.of(read_PN, read.true_PK, cuts_CN), Counts.of(z_PN, judged.true_PK, cuts_CN)
        dense = self.world.depth * ACTIVE * self.world.inner
        cells = self.world.cells
        return {
            COVERAGE: float(coverage(chosen, found).nanmean()),
            EQUAL: random_coverage(chosen, found, dense, DRAWS, generator(seed, "moe_x", "units")),
            RECONSTRUCTION: reconstruction(read_PN, read.true_PK[:, :cells], z_PN, judged.true_PK[:, :cells]),
            LOSS: nats,
            L0: float((z_PN > 0).sum(1).double().mean()) / self.world.depth,
            LOAD: load,
        }


@torch.no_grad()
def widened(base: Checkpoint, wide: Checkpoint, seed: int) -> Checkpoint:
    """A dense model each of whose MLPs is noisy copies of another's side by side, drawn as those of experts are.

    Args:
        base: the dense model.
        wide: of its architecture, with k times the units; takes everything from it.
        seed: of the noise.
    """
    of_base, of_wide = anatomy(base.model), anatomy(wide.model)
    own = wide.model.state_dict()
    wide.model.load_state_dict(
        {name: t for name, t in base.model.state_dict().items() if own[name].shape == t.shape}, strict=False
    )
    for index in range(len(of_base.blocks)):
        narrow, broad = of_base.mlp(index), of_wide.mlp(index)
        units, hidden = narrow.into.shape
        config = MoELayerConfig(hidden, units, ACTIVE, ACTIVE, narrow.activation, biases=(True, False, True))
        start = UpcycleConfig(noise=NOISE, seed=seed)
        copies = start.build(f"layers.{index}.{narrow.where.place}", narrow, config)
        assert copies.encoder_bias is not None  # GPT-2 has biases
        broad.into.write(copies.encoder.flatten(0, 1))
        broad.into.module.bias.copy_(copies.encoder_bias)  # type: ignore[operator]
        broad.out.write(copies.wide_decoder() / ACTIVE)
    return wide


@torch.no_grad()
def activations(checkpoint: Checkpoint, boards: Boards) -> tuple[Tensor, float, float]:
    """The units of all layers behind every move [P, N], nats a token, and the entropy of the loads (1 where dense).

    Args:
        checkpoint: of an arm.
        boards: games.
    """
    model, games = checkpoint.model.eval(), boards.games
    found: list[Tensor] = []
    lost, told = 0.0, 0
    chosen = {name: torch.zeros(EXPERTS) for name in moe_layers(model)}
    for start in range(0, len(games.ids_NT), EVALUATED):
        part = slice(start, start + EVALUATED)
        ids_NT, real_NT, played_NT = games.ids_NT[part], games.real_NT[part], games.played_NT[part]
        with _units(checkpoint) as seen:
            logits_NTV = model(input_ids=ids_NT, attention_mask=real_NT.long()).logits
        found.append(torch.cat([z_NTF[played_NT] for z_NTF in seen], dim=-1))
        target_NT = ids_NT[:, 1:].masked_fill(ids_NT[:, 1:] == PAD, -100)
        lost += float(F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), target_NT.flatten(), reduction="sum"))
        told += int((target_NT != -100).sum())
        for name, layer in moe_layers(model).items():
            routed = layer.routed
            assert routed is not None  # watched inside
            chosen[name] += torch.bincount(routed.chosen_TK[real_NT.flatten()].flatten(), minlength=EXPERTS)
            layer.routed = None
    loads = [entropy(count_E / count_E.sum()) for count_E in chosen.values()]
    return torch.cat(found), lost / told, fmean(loads or [1.0])


@contextmanager
def _units(checkpoint: Checkpoint) -> Iterator[list[Tensor]]:
    """The units of each layer's MLP in a pass, as a list that is filled: with their gates, where there are experts."""
    seen: list[Tensor] = []
    handles = []

    def gated(layer: MoELayer, args: tuple[Tensor, ...]) -> None:
        seen.append(layer.features(args[0]))

    def plain(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    for block in anatomy(checkpoint.model).blocks:
        mlp: Any = block.mlp
        if isinstance(mlp, MoELayer):
            mlp.watched = True
            handles.append(mlp.register_forward_pre_hook(gated))
        else:
            handles.append(mlp.act.register_forward_hook(plain))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for layer in moe_layers(checkpoint.model).values():
            layer.watched = False


def _idle(model: nn.Module) -> int:
    """Numbers of the experts that a token does not pass through."""
    configs = [layer.config for layer in moe_layers(model).values()]
    return sum((config.experts - config.active) * config.expert_parameters for config in configs)


def experiment(world: BoardGame) -> Experiment:
    """The claim in a world.

    Args:
        world: games, the model's size and how it is trained.
    """
    return Experiment(
        slug="moe_x",
        claim="Trained on the same games from the same dense start, a small GPT-2 with MoE-X has single units that tell"
        " more of the board than those of a dense ReLU model of equal activated parameters: its coverage is higher by"
        " more than 0.03.",
        metric=COVERAGE,
        unit="mean F1",
        direction="higher",
        delta=0.03,
        design="independent",
        factors=("training seed",),
        arms={name: arm.what for name, arm in ARMS.items()},
        baseline=BASELINE,
        method=METHOD,
        parity="All arms of a seed begin with a dense model that saw the same games, copy its MLPs with noise of one"
        " size, and see the same games in the same order; last step. A token passes through equally many units in all"
        " arms; the linear routers' weights and a bias an expert come on top. The experts' coverage is also told among"
        " as many units as the dense arms have.",
        equal=("tokens",),
        secondaries=(
            Secondary("coverage among as many units as the dense arm has", BASELINE, METHOD, EQUAL, "higher"),
            Secondary("reconstruction", BASELINE, METHOD, RECONSTRUCTION, "higher"),
            Secondary("loss", BASELINE, METHOD, LOSS),
            Secondary("against a dense GELU model", "dense-gelu", METHOD),
            Secondary("against Switch: both changes", "switch", METHOD),
            Secondary("ReLU units, under a linear router", "switch", "switch-relu"),
            Secondary("the router, with ReLU units", "switch-relu", METHOD),
            Secondary("the router, with GELU units", "switch", "sparsity-gelu"),
            Secondary("reconstruction against Switch", "switch", METHOD, RECONSTRUCTION, "higher"),
            Secondary("units that fire, the router with ReLU units", "switch-relu", METHOD, L0),
        ),
        run_unit=Continue(world),
        pilot_runs=5,
        # An arm of experts takes about two minutes on one core, a dense one half of that: tuning, pilot and eight runs,
        # five of them with all arms, are less than two hours.
        most_runs=8,
        secondary_runs=5,
        threads=1,
        settings={
            "world": asdict(world),
            "properties": list(world.properties),
            "recipe": {name: value for name, value in world.recipe(0).items() if name != "objective"},
            "experts": {name: arm.method().model_dump() for name, arm in ARMS.items() if arm.router is not None},
        },
        why="Claim, delta and tier are as named. A first look at one seed on validation games, trained for a third of"
        " the steps, had discs alone for properties, and there the coverage of the experts was below that of the dense"
        " model, their reconstruction above it. Many discs are there at every second position, while a unit of an"
        " expert fires for a quarter of the tokens at most; in the paper's chess properties hold seldom. So lines that"
        " lack one disc were added before any run, and nothing was measured with them. Reconstruction is of discs"
        " alone, as it was.",
        tuning=Tuning({arm: {rate: f"learning rate {rate}" for rate in RATES} for arm in ARMS}),
    )


EXPERIMENTS = {"cpu": experiment(BoardGame())}
"""By tier."""
