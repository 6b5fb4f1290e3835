"""The claim of PASER: a pruned model that recovers on what it chose predicts better than on as many random tokens.

A run is a draw: of the pool, of the calibration data that the model is pruned with, and of the training. Every arm
recovers a copy of the same pruned model on tokens out of the same pool, exactly as many in each, in as many steps at
the same rate; they differ in what they take. Each is measured on the same held-out answers, of the kinds of the pool.

Divergences are taken on the pool alone. Every arm that trains chooses its rate out of the same two on validation
answers; PASER has its defaults otherwise, ten clusters among them, where the pool has four kinds.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Tuning, Unit
from intaglio.evidence.worlds.instructions import Instruction, Instructions, answer_losses, as_row
from intaglio.evidence.worlds.made import code_of, made
from intaglio.evidence.worlds.sealing import draw
from intaglio.measures.memory import peak_memory
from intaglio.methods.training.paser import PASER, Pool
from intaglio.methods.weights.wanda import Wanda
from intaglio.trainer import CausalLM, train
from intaglio.trainer.protocols import Example

LOSS = "log-perplexity"
POOL = "pool.json"
MADE_BY = (
    "intaglio.methods.training.paser",
    "intaglio.evidence.worlds.instructions",
    "intaglio.methods.weights.one_shot",
    "intaglio.methods.weights.wanda",
    "intaglio.checkpoint.calibration",
)
"""What decides what is found out about a pool."""

ARMS: dict[str, tuple[PASER | str, str]] = {
    "random": ("random", "pairs at random"),
    "paser": (PASER(chat=False), "PASER, its defaults"),
    "uniform": (PASER.uniform(chat=False), "as many of each of PASER's clusters, at random"),
    "top": (PASER.top(chat=False), "the highest divergences, without clusters, length or graph"),
    "paser-no-graph": (PASER(chat=False, consistency=False), "PASER without the graph of concepts"),
    "full": ("full", "twice as many random pairs, each seen once: the pool at the same number of steps"),
    "none": ("none", "no recovery"),
}
"""`{arm: (how it takes pairs, what it is)}`."""
RATES = {"0.001": "a rate of 0.001", "0.0003": "a rate of 0.0003"}


@dataclass(frozen=True)
class Recover:
    """The runner: prune a copy of the dense model, choose, train on the choice, measure.

    Args:
        world: model, pools and held-out answers.
        pattern: of the pruning. Default `2:4`.
        tokens: that an arm may take out of the pool. Default 2,304, about a sixth of it.
        row: tokens of a row, packed. Default 128.
        batch: rows of a step. Default 2.
        passes: over what was taken. Default 2.
        rate: of learning, where none was chosen. Default 1e-3.
        rank: of the adapters. Default 8, the paper's.
        embedding: what PASER clusters by. Default `minilm`.
    """

    world: Instructions = field(default_factory=Instructions)
    pattern: str = "2:4"
    tokens: int = 2304
    row: int = 128
    batch: int = 2
    passes: int = 2
    rate: float = 1e-3
    rank: int = 8
    embedding: str = "minilm"

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm of one draw.

        Args:
            arm: a key of `ARMS`.
            unit: of which run.
            seed: of pool, calibration and training.
        """
        measured = self.world.measured(unit.stage, unit.base)
        pruned = _pruned(self, seed)
        done = Checkpoint(copy.deepcopy(pruned.model), pruned.tokenizer, pruned.source)
        looked, trained = 0.0, 0
        with peak_memory(done.device) as peak:
            begun = time.perf_counter()
            if arm != "none":
                taken, looked = self.taken(arm, seed)
                trained = train(
                    done,
                    taken,
                    objective=CausalLM(length=self.row),
                    steps=self.passes * self.tokens // (self.row * self.batch),
                    batch_size=self.batch,
                    learning_rate=float(unit.choice or self.rate),
                    lora={"r": self.rank, "alpha": 2 * self.rank},
                    seed=seed % 2**32,
                ).tokens
            seconds = time.perf_counter() - begun + looked
        parameters = sum(int(p.count_nonzero()) for p in done.model.parameters())
        passed = sum(p.numel() for p in done.model.parameters())
        done.model.eval()
        return Outcome(
            values={LOSS: answer_losses(done, measured)},
            cost=Cost(
                tokens=trained,
                flops=4.0 * passed * trained + (4.0 * passed * self._pool_tokens(seed) if looked else 0.0),
                parameters=parameters,
                seconds=seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"pool": str(seed), "measured": str(len(measured))},
        )

    def taken(self, arm: str, seed: int) -> tuple[list[Example], float]:
        """The pairs that an arm trains on, the last one cut, and the seconds that looking at the pool took.

        Args:
            arm: a key of `ARMS`.
            seed: of the draw.
        """
        how = ARMS[arm][0]
        if isinstance(how, str):
            wanted = self.tokens * (self.passes if how == "full" else 1)
            order: Sequence[int] = draw(f"random:{seed}", [one.name for one in self.world.pool(seed)], self._size)
            looked = 0.0
        else:
            wanted, pool = self.tokens, look(self, seed)
            order = self._order(how, pool, seed)
            needed = pool.seconds if how.compares else {n: s for n, s in pool.seconds.items() if n in _CLUSTERING}
            looked = sum(needed.values())
        pairs = self.world.pool(seed)
        tokenizer, documents, left = self.world.load().tokenizer, [], wanted
        for place in order:
            row = as_row(tokenizer, pairs[place])
            documents.append({name: value[:left] for name, value in row.items()})
            left -= len(documents[-1]["input_ids"])
            if not left:
                return documents, looked
        raise ValueError(f"the pool of seed {seed} is {left} tokens short of {wanted}")

    def _order(self, how: PASER, pool: Pool, seed: int) -> Sequence[int]:
        """The first choice, by its number of pairs, that has the tokens."""
        tokenizer = self.world.load().tokenizer
        tokens = [len(as_row(tokenizer, pair)["input_ids"]) for pair in self.world.pool(seed)]
        for count in range(max(1, self.tokens // max(tokens)), self._size + 1):
            order = how.pick(pool, count, seed=seed).indices
            if sum(tokens[n] for n in order) >= self.tokens:
                break
        return order

    def _pool_tokens(self, seed: int) -> int:
        return sum(sample.tokens for sample in look(self, seed).samples)

    @property
    def _size(self) -> int:
        return 4 * self.world.each_pool


_CLUSTERING = ("embedding", "clustering")


@lru_cache(maxsize=1)
def _pruned(run: Recover, seed: int) -> Checkpoint:
    """The pruned model of a draw, shared by its arms: copied, never changed."""
    dense = run.world.load()
    pruned = Checkpoint(copy.deepcopy(dense.model), dense.tokenizer, dense.source)
    data = run.world.prompts.articles.calibration(seed, "tuning")  # articles that pools are drawn from, none of others
    Wanda(pattern=run.pattern).apply(pruned, data.segments, seed=seed, batch_size=8)
    return pruned


@lru_cache(maxsize=1)
def look(run: Recover, seed: int) -> Pool:
    """What PASER finds out about a pool: once for all arms, and for every process that works on them.

    Args:
        run: the world and how it is pruned.
        seed: of the draw.
    """
    pairs = run.world.pool(seed)
    examples = [as_example(n, pair) for n, pair in enumerate(pairs)]
    paser = PASER(chat=False, embedding=run.embedding)
    choices = {
        "world": asdict(run.world),
        "pruned": run.pattern,
        "paser": paser.model_dump(),
        "seed": seed,
        "code": code_of(*MADE_BY),
    }

    def make(target: Path, scratch: Path) -> None:
        found = paser.look(examples, _pruned(run, seed), run.world.load(), seed=seed)
        plain = {name: list(getattr(found, name)) for name in ("indices", "labels", "degradation", "concepts")}
        atomic_io.write_json(target / POOL, plain | {"seconds": found.seconds})

    told = json.loads((made("paser-pool", choices, make) / POOL).read_text(encoding="utf-8"))
    samples = paser.read([examples[n] for n in told["indices"]], run.world.load())
    return Pool(
        told["indices"], samples, told["labels"], told["degradation"], told["concepts"], told["seconds"], {}, len(pairs)
    )


def as_example(number: int, pair: Instruction) -> Example:
    """A pair as a selector sees it.

    Args:
        number: in the pool.
        pair: prompt and answer.
    """
    return {"id": number, "prompt": pair.prompt, "answer": pair.answer}


def experiment(run: Recover) -> Experiment:
    """The claim in a world.

    Args:
        run: the world and what is done in it.
    """
    world = run.world
    settings: dict[str, Any] = {name: value for name, value in asdict(run).items() if name != "world"}
    return Experiment(
        slug="paser",
        claim="SmolLM2-135M, pruned to 2:4 and recovered with LoRA on a sixth of a pool of instructions, predicts"
        " held-out answers better by more than 0.02 nats a token where PASER chose the sixth than where chance did.",
        metric=LOSS,
        unit="nats a token",
        direction="lower",
        delta=0.02,
        design="crossed",
        factors=("draw of pool and training", "answer"),
        arms={arm: what for arm, (_, what) in ARMS.items()},
        baseline="random",
        method="paser",
        parity="All arms of a draw recover the same pruned model on exactly as many tokens out of the same pool, in as"
        " many steps (no recovery excepted); a last pair that is too long is cut. Choosing takes"
        " passes of both models over the pool, which the cost counts and the parity does not.",
        secondaries=(
            Secondary("PASER against as many of each cluster", "uniform", "paser"),
            Secondary("PASER against the highest divergences", "top", "paser"),
            Secondary("the graph of concepts", "paser-no-graph", "paser"),
            Secondary("PASER against the pool at as many steps", "full", "paser"),
            Secondary("random pairs against no recovery", "none", "random"),
        ),
        run_unit=run,
        pilot_runs=4,
        units=4 * world.each_run,
        # An arm takes a minute and a half of one core, looking at a pool two: with tuning, the pilot and the arms of
        # the secondaries that is an hour and a half of the core, or a little more.
        most_runs=8,
        secondary_runs=2,
        threads=1,
        tuning=Tuning({arm: RATES for arm in ARMS if arm != "none"}, runs=1),
        why="Claim, delta and tier are as named. A trial of the random arm alone, on validation answers and before any"
        " run, showed that a rate of 0.001 regains about a quarter of what pruning to 2:4 lost within 12 steps.",
        settings={
            "world": asdict(world),
            "recovery": settings,
            "methods": {arm: how.model_dump() for arm, (how, _) in ARMS.items() if isinstance(how, PASER)},
        },
    )


EXPERIMENTS = {"cpu": experiment(Recover())}
"""By tier."""
