"""The claim of OMP transplant: right after the swap, rows coded by shared tokens predict better than untaught ones.

A run is a training seed: a base and a donor, trained on the same Python source with tokenizers of their own. Every arm
gives a copy of the base the donor's tokenizer; they differ in what new rows are made of, and in nothing else. Each
is measured on the same held-out documents, in nats a byte, right after the swap and once more after 50 equal steps.

The baseline is the best of four initialisations that look at no donor (zero rows, the mean row, rows drawn with the
base's mean and covariance, random rows), chosen on validation documents; so it is the better of mean and zero,
or better than both. OMP chooses its number of atoms there, among as many.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Tuning, Unit
from intaglio.evidence.worlds.two_tokenizers import TwoTokenizers, Which, nats_per_byte
from intaglio.measures.memory import peak_memory
from intaglio.methods.weights.omp_transplant import Donor, OMPTransplant
from intaglio.trainer import train

LOSS = "nats a byte"
AFTER = "nats a byte after 50 steps"
NEW = "share of new tokens"
STEPS = 50

UNTAUGHT = {
    "zero": "zero rows",
    "mean": "the mean of the base's rows",
    "john_hewitt": "drawn with the base's mean and covariance",
    "randn": "drawn with deviation 1",
}
ATOMS = {"4": "4 atoms", "8": "8 atoms", "16": "16 atoms", "32": "32 atoms"}
CHOICES: dict[str, Mapping[str, str]] = {"untaught": UNTAUGHT, "omp": ATOMS}
ARMS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "untaught": ({}, "the best of zero, mean, John Hewitt's and random rows, chosen on validation"),
    "omp": ({"method": "omp"}, "orthogonal matching pursuit, its atoms chosen on validation"),
    "zero": ({"method": "zero"}, "zero rows"),
    "mean": ({"method": "mean"}, "the mean of the base's rows"),
    "omp-default": ({"method": "omp"}, "OMP with the default number of atoms, a tenth of the donor's width"),
    "omp-64": ({"method": "omp", "k": 64}, "OMP with the paper's 64 atoms, over half of this donor's width"),
    "subword": ({"method": "subword"}, "the mean of the rows of the base's own pieces"),
    "linear": ({"method": "linear"}, "least squares from the donor's space to the base's over all shared tokens"),
    "own": (None, "the base with its own tokenizer, nothing swapped: the ceiling"),
    "donor": (None, "the donor itself"),
}
"""`{arm: (fields of the method, what it is)}`."""


@dataclass(frozen=True)
class Transplant:
    """The runner: transplant one arm's way, measure, tune a little, measure again.

    Args:
        world: two tokenizers and the models that go with them.
        steps: of fine-tuning. Default 50.
    """

    world: TwoTokenizers
    steps: int = STEPS

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm with the models of one training seed.

        Args:
            arm: a key of `ARMS`.
            unit: of which run, with the choice of arms that have one.
            seed: of both models.
        """
        documents = self.world.documents(unit.stage, unit.base)
        fields = ARMS[arm][0]
        reads: Which = "base" if arm == "own" else "donor"  # whose tokenizer it reads with in the end
        done = copy.deepcopy(_model(self.world, reads if fields is None else "base", seed))
        vocabulary = set(self.world.tokenizer("base").get_vocab())
        with peak_memory(done.device) as peak:
            begun = time.perf_counter()
            if fields is not None:
                donor = Donor.from_checkpoint(_model(self.world, "donor", seed))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # 64 atoms are too many, which is what that arm shows
                    OMPTransplant(donor="donor", **fields | _chosen(arm, unit.choice)).transplant(
                        done, donor, seed=seed
                    )
            seconds = time.perf_counter() - begun
        values = {LOSS: nats_per_byte(done, documents), NEW: new_share(done, documents, vocabulary)}
        if unit.stage != "tuning":
            values[AFTER] = nats_per_byte(self._tuned(done, reads, seed), documents)
        windows = self.world.training(reads, seed, self.steps)
        return Outcome(
            values={metric: dict(found) for metric, found in values.items()},
            cost=Cost(
                tokens=windows.tokens,
                flops=0.0,
                parameters=sum(p.numel() for p in done.model.parameters()),
                seconds=seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"documents": "".join(documents), "models": str(seed)},
        )

    def _tuned(self, checkpoint: Checkpoint, which: Which, seed: int) -> Checkpoint:
        """The same checkpoint after a few steps on training windows that neither model began with."""
        other = seed + 2**32
        train(checkpoint, self.world.training(which, other, self.steps), **self.world.recipe(other, self.steps))
        checkpoint.model.eval()
        return checkpoint


@lru_cache(maxsize=2)
def _model(world: TwoTokenizers, which: Which, seed: int) -> Checkpoint:
    """Both models of a seed, as every arm of it needs them; they are copied, never changed."""
    return world.trained(which, seed)


def _chosen(arm: str, choice: str) -> dict[str, Any]:
    """The fields that a choice stands for."""
    if arm == "untaught":
        return {"method": choice or "zero"}
    return {"k": int(choice)} if arm == "omp" and choice else {}


def new_share(checkpoint: Checkpoint, documents: Mapping[str, str], known: set[str]) -> dict[str, float]:
    """Of each document's tokens, the share that the base's vocabulary lacks.

    Args:
        checkpoint: whose tokenizer writes them.
        documents: `{name: text}`.
        known: the base's tokens, as it spells them (both vocabularies spell alike).
    """
    tokenizer = checkpoint.tokenizer
    lacks = torch.tensor([text not in known for text in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    rows = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in documents.items()}
    return {name: float(lacks[torch.tensor(ids)].float().mean()) for name, ids in rows.items()}


def experiment(run: Transplant) -> Experiment:
    """The claim in a world.

    Args:
        run: the world and what is done in it.
    """
    world = run.world
    return Experiment(
        slug="omp_transplant",
        claim="Right after a small Llama got another one's tokenizer, new rows coded by orthogonal matching pursuit"
        " lower the log-perplexity of held-out source by more than 0.1 nats a byte against the better of mean and zero"
        " rows.",
        metric=LOSS,
        unit="nats a byte",
        direction="lower",
        delta=0.1,
        design="crossed",
        factors=("training seed", "document"),
        arms={arm: what for arm, (_, what) in ARMS.items()},
        baseline="untaught",
        method="omp",
        parity="All arms of a seed begin with the same base and the same donor; fine-tuning sees the same windows.",
        equal=("tokens",),
        secondaries=(
            Secondary("OMP against zero rows", "zero", "omp"),
            Secondary("OMP against mean rows", "mean", "omp"),
            Secondary("OMP with the default k against zero rows", "zero", "omp-default"),
            Secondary("OMP against the paper's k", "omp-64", "omp"),
            Secondary("OMP against a linear map", "linear", "omp"),
            Secondary("OMP against the mean of subwords", "subword", "omp"),
            Secondary("after 50 steps: OMP against the untaught", "untaught", "omp", AFTER),
            Secondary("after 50 steps: OMP against a linear map", "linear", "omp", AFTER),
            Secondary("what is still missing: OMP against the base with its own tokenizer", "own", "omp"),
        ),
        run_unit=run,
        pilot_runs=4,
        units=world.documents_run,
        # Both models of a seed take three minutes of one core together, an arm six seconds: with tuning and pilot,
        # that is fifty minutes.
        most_runs=8,
        secondary_runs=4,
        threads=1,
        tuning=Tuning(CHOICES, runs=1),
        why="Claim, delta and tier are as named; log-perplexity is told by the byte, so that the arms with other"
        " tokenizers (the base with its own, the donor) stand beside the others. A trial on another seed, before any"
        " run, set the base's vocabulary to 1,000: of the donor's tokens in the text about a fifth are then new, in the"
        " place of an eighth with 1,500.",
        settings={
            "world": asdict(world),
            "fine-tuning": {"steps": run.steps, "rate": "a tenth of pretraining's"},
            "methods": {
                arm: OMPTransplant(donor="donor", **fields).model_dump()
                for arm, (fields, _) in ARMS.items()
                if fields is not None
            },
        },
    )


EXPERIMENTS = {"cpu": experiment(Transplant(TwoTokenizers()))}
"""By tier."""
