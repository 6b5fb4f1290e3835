"""What claims about trained heads share: the text they learn from, training, tuning, and decoding.

Every arm is trained on the same text, written by the target itself behind the first tokens of pieces of Wikipedia
articles of the calibration set (there are far fewer articles than texts), for as many tokens; its learning rate is the
best of the same few, each tried for the same few steps, by what its own best tree is expected to accept on texts that
no arm is trained on. Every arm verifies trees of as many nodes, made from its own measured chances on those texts,
and may guess the same tokens: the frequent ones of the text. Heads are stored in bfloat16.

A run is a prompt: the first tokens of a Wikipedia article of the evaluation set, and those of a Python file for the
shifted text. Dimension letters: V vocabulary, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment, read_attachments
from intaglio.data.texts import Corpus
from intaglio.environment import torch_threads
from intaglio.errors import IntaglioError
from intaglio.evidence.continuing import go_on, loop_start, parameters, shifted_prompt
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Stage, Unit
from intaglio.evidence.worlds.made import code_of, made
from intaglio.evidence.worlds.smollm2 import Part, SmolLM2Wikipedia, Windows
from intaglio.measures.memory import peak_memory
from intaglio.modeling.anatomy import anatomy
from intaglio.speculative.drafters.medusa import Medusa, MedusaHeads
from intaglio.speculative.heads.base import TrainedHeads, split, stored
from intaglio.speculative.heads.objective import measure_acceptance, train_heads
from intaglio.speculative.heads.self_generated_data import extract_prompts, generate_corpus
from intaglio.speculative.protocols import Drafter
from intaglio.speculative.static_tree import best_tree
from intaglio.trainer.protocols import Example

TOKENS = "tokens a pass"
FRESH = "tokens a pass before a loop"
SHIFTED = "tokens a pass, shifted text"
SECONDS = "seconds a token"
NODES = 15
"""Drafted tokens that an arm verifies in a pass."""
NEW = 96
SEED = 0


class World(Hashable, Protocol):
    """What the experiments ask of a world; it compares by its fields."""

    def load(self) -> Checkpoint:
        """The target, shared."""

    def part(self, part: Part) -> Corpus:
        """The documents of a sealed set."""

    def documents(self, stage: Stage, base: int = 0) -> Windows:
        """The prompts of a stage."""


@dataclass(frozen=True)
class Training:
    """What every arm of an experiment is trained on and with.

    Args:
        texts: that the target writes, one a piece of about 2,000 characters of the world's documents where there are
            fewer documents. Default 400.
        prompt: tokens of each that are given. Default 32.
        length: tokens of each. Default 160.
        epochs: over them. Default 1.
        batch_size: rows of a step. Default 8.
        rates: learning rates that are tried.
        trial: steps of a trial. Default 6.
        precision: of the training's passes, in every arm. Default `bfloat16`.
        threads: of torch while heads are trained: part of what makes their last bits. Default 2.
    """

    texts: int = 400
    prompt: int = 32
    length: int = 160
    epochs: int = 1
    batch_size: int = 8
    rates: tuple[float, ...] = (3e-4, 1e-3)
    trial: int = 6
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int = 2

    def examples(self, world: World) -> list[Example]:
        """The text: written once, found again.

        Args:
            world: whose calibration set prompts are taken from.

        Raises:
            IntaglioError: the set gives fewer prompts than texts are to be written.
        """
        target = world.load()
        prompts = extract_prompts(target, world.part("calibration"), self.prompt, self.texts)
        if len(prompts) < self.texts:
            raise IntaglioError(
                f"the calibration set gives {len(prompts)} prompts; {self.texts} texts are to be written"
            )
        return generate_corpus(target, prompts, tokens=self.length - self.prompt, seed=SEED)


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        what: it is, and how it differs.
        method: its settings; None for Medusa heads.
        medusa: for Medusa heads: arguments of `MedusaHeads`, but for those that follow from `like`.
        like: for Medusa heads: the settings whose number of parameters they get.
    """

    what: str
    method: TrainedHeads | None = None
    medusa: Mapping[str, Any] | None = None
    like: TrainedHeads | None = None

    def plain(self) -> dict[str, Any]:
        """The arm as plain data."""
        return {
            "method": None if self.method is None else self.method.model_dump(),
            "medusa": None if self.medusa is None else dict(self.medusa),
            "like": None if self.like is None else self.like.model_dump(),
        }


def matched(model: Any, heads: int, budget: int, words: int | None = None) -> dict[str, int]:
    """Layers and rank of Medusa heads that have nearly as many parameters as a budget allows, and no more.

    As many layers as fit beside a vocabulary change of at least the rank 32 if the budget leaves room for that; what is
    left widens the rank.

    Args:
        model: the target.
        heads: K.
        budget: parameters.
        words: tokens that may be guessed. Default: all.
    """
    vocabulary, width = model.get_output_embeddings().weight.shape
    vocabulary = words or vocabulary
    layer, rank = heads * (width**2 + width), vocabulary + heads * width
    reserved = 32 * rank if budget - layer >= 32 * rank else 0
    layers = max(1, (budget - reserved) // layer)
    return {"layers": int(layers), "rank": int(max(0, (budget - layers * layer) // rank))}


def size(heads: Any) -> int:
    """Parameters of heads.

    Args:
        heads: a module.
    """
    return sum(parameter.numel() for parameter in heads.parameters())


def medusa_heads(target: Checkpoint, arm: Arm, examples: Sequence[Example]) -> MedusaHeads:
    """Untrained Medusa heads of an arm.

    Args:
        target: the target.
        arm: with `medusa` and `like`.
        examples: what they will be trained on, from which follows what they may guess.
    """
    assert arm.like is not None
    tokens_K = arm.like.words(target, examples)
    words = None if tokens_K is None else len(tokens_K)
    chosen: dict[str, Any] = dict(arm.medusa or {})
    chosen |= matched(target.model, chosen["heads"], size(arm.like.make(target.model, SEED, tokens_K)), words)
    return MedusaHeads(target.model, **chosen, tokens_K=tokens_K, seed=SEED)


@dataclass(frozen=True)
class Trainer:
    """Trains the heads of arms, and finds them again in the user's cache.

    Args:
        world: the target and its texts.
        training: what on and with.
        name: of the experiment.
        arms: by name.
    """

    world: World
    training: Training
    name: str
    arms: Mapping[str, Arm]

    def heads(self, arm: str) -> Attachment:
        """The trained heads of an arm.

        Args:
            arm: its name.
        """
        target, training = self.world.load(), self.training
        examples = training.examples(self.world)
        decided = {
            "arm": self.arms[arm].plain(),
            "training": {**asdict(training), "rates": list(training.rates)},
            "text": hashlib.sha256(repr(examples).encode()).hexdigest(),
            "nodes": NODES,
            "seed": SEED,
            "code": code_of("intaglio.speculative.heads", "intaglio.methods.decoding.chimera", "intaglio.methods.decoding.hidden_transfer",
                            "intaglio.speculative.drafters.medusa", "intaglio.evidence.trained_heads"),
        }  # fmt: skip

        def make(folder: Path, scratch: Path) -> None:
            with torch_threads(training.threads):
                rate = self._best_rate(target, arm, examples, scratch)
                whole = self._train(target, arm, examples, rate, None, scratch / "whole")
            Attachment(whole.slug, whole.tensors, whole.parameters, 0, {**whole.about, "rate": rate}, whole.base).write(
                _made(folder / "attachments")
            )

        place = made(f"{self.name}-{arm}", decided, make)
        (found,) = read_attachments(place).values()
        return found

    def _best_rate(self, target: Checkpoint, arm: str, examples: list[Example], scratch: Path) -> float:
        if len(self.training.rates) == 1:
            return self.training.rates[0]
        expected = {}
        for rate in self.training.rates:
            found = self._train(target, arm, examples, rate, self.training.trial, scratch / f"trial-{rate}")
            expected[rate] = accepted(found.about["chances"])
        return max(expected, key=lambda rate: expected[rate])

    def _train(
        self, target: Checkpoint, arm: str, examples: list[Example], rate: float, steps: int | None, directory: Path
    ) -> Attachment:
        training, chosen = self.training, self.arms[arm]
        shadow = Checkpoint(target.model, target.tokenizer, target.source)
        if chosen.method is not None:
            update = {"learning_rate": rate, "steps": steps, "epochs": float(training.epochs),
                      "batch_size": training.batch_size, "length": training.length,
                      "precision": training.precision}  # fmt: skip
            method: Any = chosen.method.model_copy(update=update)
            method.fit(shadow, examples, seed=SEED, directory=directory, resume=True)
            (found,) = shadow.attachments.values()
            return found
        heads = medusa_heads(target, chosen, examples)
        trained_on, held_out = split(examples)
        train_heads(
            shadow,
            heads,
            trained_on,
            settings={"medusa": chosen.plain(), "rate": rate},
            length=training.length,
            directory=directory,
            resume=True,
            batch_size=training.batch_size,
            learning_rate=rate,
            warmup=0.01,
            precision=training.precision,
            seed=SEED,
            **({"steps": steps} if steps is not None else {"epochs": float(training.epochs)}),
        )
        chances = measure_acceptance(shadow, heads, held_out, training.length)
        return Attachment("medusa", stored(heads), dict(chosen.medusa or {}), 0, {"chances": chances})

    def drafter(self, arm: str) -> tuple[Drafter, int]:
        """An arm ready to draft, and the number of its parameters.

        Args:
            arm: its name.
        """
        return _drafter(self.world, self.training, self.name, tuple(self.arms.items()), arm)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def accepted(chances: Sequence[Sequence[float]]) -> float:
    """Drafted tokens that the best tree of `NODES` nodes is expected to have accepted, were levels independent.

    Args:
        chances: by level and rank.
    """
    return best_tree(chances, NODES).expected(chances) - 1.0


_ready: dict[Any, tuple[Drafter, int]] = {}


def _drafter(
    world: World, training: Training, name: str, arms: tuple[tuple[str, Arm], ...], arm: str
) -> tuple[Drafter, int]:
    key = (world, training, name, arm)
    if key not in _ready:
        chosen, target = dict(arms)[arm], world.load()
        found = Trainer(world, training, name, dict(arms)).heads(arm)
        parameters_of = sum(tensor.numel() for tensor in found.tensors.values() if tensor.is_floating_point())
        if chosen.method is not None:
            method: Any = type(chosen.method)
            _ready[key] = (cast(Drafter, method.restore(found, target, nodes=NODES)), parameters_of)
        else:
            heads = medusa_heads(target, chosen, training.examples(world))
            heads.load_state_dict(found.tensors)
            _ready[key] = (Medusa(heads, best_tree(found.about["chances"], NODES)), parameters_of)
    return _ready[key]


@dataclass(frozen=True)
class Continue:
    """The runner: go on greedily from one prompt of each kind, and count.

    Args:
        world: gives target, texts and prompts.
        training: of the heads.
        name: of the experiment.
        arms: `(name, arm)` of each.
        new: tokens that are generated. Default 96.
    """

    world: World
    training: Training
    name: str
    arms: tuple[tuple[str, Arm], ...]
    new: int = NEW

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm on one prompt.

        Args:
            arm: its name.
            unit: of which run; its index picks the prompts.
            seed: not used: greedy output depends on the prompt alone, and heads are trained once.
        """
        target = self.world.load()
        windows = self.world.documents(unit.stage, unit.base)
        if unit.index >= windows.segments.n:
            raise IntaglioError(f"prompt {unit.index} was asked for; the world has {windows.segments.n}")
        prompt = windows.segments.ids_NT[unit.index].tolist()
        shifted = shifted_prompt(target, unit, len(prompt))
        drafter, own = _drafter(self.world, self.training, self.name, self.arms, arm)
        with peak_memory(target.device) as peak:
            same, other = (go_on(target, drafter, ids, self.new, prepack=None) for ids in (prompt, shifted))
        values = {TOKENS: same.rate(), FRESH: same.rate(loop_start(same.ids)), SHIFTED: other.rate(),
                  SECONDS: same.seconds / len(same.ids)}  # fmt: skip
        rows = same.rows + other.rows
        return Outcome(
            values={metric: {"prompt": value} for metric, value in values.items()},
            cost=Cost(
                tokens=trained_tokens(self.training, self.world),
                flops=2.0 * parameters(target) * rows + extra_flops(target, dict(self.arms)[arm], rows, own),
                parameters=own,
                seconds=same.seconds + other.seconds,
                peak_bytes=peak.bytes,
            ),
            shared={name: hashlib.sha256(repr(ids).encode()).hexdigest()
                    for name, ids in (("prompt", prompt), ("shifted", shifted))},
        )  # fmt: skip


@lru_cache(maxsize=2)
def trained_tokens(training: Training, world: World) -> int:
    """Tokens of training that every arm's heads have seen, one with another.

    Args:
        training: of the heads.
        world: gives the text.
    """
    trained_on, _ = split(training.examples(world))
    return training.epochs * sum(len(example["input_ids"]) for example in trained_on)


def extra_flops(target: Checkpoint, arm: Arm, rows: int, own: int) -> float:
    """Operations of drafting: an upper bound that lets every head run once for every row of the target.

    Args:
        target: the target.
        arm: whose pseudo states, if it has them, take rows of the upper blocks.
        rows: that the target read.
        own: parameters of the heads.
    """
    layers = getattr(arm.method, "transfer_layers", None)
    if layers is None:
        return 2.0 * own * rows
    parts = anatomy(target.model)
    block = sum(p.numel() for p in parts.blocks[-1].parameters())
    return 2.0 * rows * (own + sum(block * (len(parts.blocks) - layer) for layer in layers(len(parts.blocks))))


def against_medusa(
    slug: str,
    name: str,
    arms: Mapping[str, Arm],
    secondaries: tuple[Secondary, ...],
    parity: str,
    world: SmolLM2Wikipedia,
    training: Training,
    new: int = NEW,
) -> Experiment:
    """The claim of a method with trained heads: more tokens a pass than Medusa heads.

    Args:
        slug: the method's, and the name of its arm.
        name: the method's in the claim.
        arms: by name; `medusa` and the method's own are among them.
        secondaries: behind those that all such claims share.
        parity: as in `Experiment`.
        world: target and texts.
        training: of all arms.
        new: tokens that are generated. Default 96.
    """
    return Experiment(
        slug=slug,
        claim=f"On SmolLM2-135M going on greedily from Wikipedia articles, {name} emits more tokens a pass than Medusa "
        f"heads of as many parameters, by more than 0.1, when both verify {NODES} drafted tokens a pass and were "
        "trained on the same text.",
        metric=TOKENS,
        unit="tokens a pass",
        direction="higher",
        delta=0.1,
        design="independent",
        factors=("prompt",),
        arms={arm: chosen.what for arm, chosen in arms.items()},
        baseline="medusa",
        method=slug,
        parity=parity,
        equal=("tokens",),
        secondaries=(
            Secondary("before the text loops", "medusa", slug, FRESH, "higher"),
            Secondary("shifted text: Python files", "medusa", slug, SHIFTED, "higher"),
            Secondary("seconds a token", "medusa", slug, SECONDS),
            *secondaries,
        ),
        run_unit=Continue(world, training, slug, tuple(arms.items()), new),
        pilot_runs=min(world.documents_pilot, 10),
        most_runs=world.documents_run,
        threads=1,
        settings={
            "world": asdict(world),
            "training": {**asdict(training), "rates": list(training.rates)},
            "texts begin with": "the first tokens of pieces of about 2,000 characters of the calibration articles",
            "new tokens": new,
            "nodes": NODES,
            "arms": {arm: chosen.plain() for arm, chosen in arms.items()},
        },
        why="Registered anew after a pilot of chimera, with nothing else changed: 60 prompts were asked for, and the "
        "evaluation articles give 38. None of these had been gone on from.",
    )


WORLD = SmolLM2Wikipedia(documents_run=38, documents_pilot=10, tokens=64)
"""Of the claims: as many prompts as there are evaluation articles that are long enough."""
