"""The claim of DySpec: more tokens a pass than the best fixed tree, at equally many rows verified.

A run is a prompt: a piece of a Wikipedia article or of a Python file, by turns. All arms draft with the same two-layer
model and go on from the same prompts, greedily but for those that say otherwise. The fixed trees are fitted on prompts
of the same kinds that no run goes on from, and that the draft model was not trained on: the target's text there says
which of the draft's choices was right at each token, and from that follows exactly how many passes any fixed tree would
have taken. DySpec itself is not fitted: it takes the draft's probabilities for chances of acceptance. Whether that is
why it wins or loses is told by an arm whose chances are counted on the same text.

Greedy text of a small model falls into loops, so tokens a pass are also given up to where the text begins to repeat
itself.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, cast

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError
from intaglio.evidence.continuing import Generated, loop_start, parameters
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Unit, digest
from intaglio.evidence.worlds.sealing import keyed
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.worlds.smollm2_draft import SmolLM2Draft
from intaglio.measures.memory import peak_memory
from intaglio.methods.decoding.dyspec import AcceptanceTable, DySpec
from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.dynamic_tree import probs_fn
from intaglio.speculative.drafters.rank_statistics import (
    Text,
    acceptance_by_rank,
    draft_ranks,
    sampled_acceptance_by_rank,
)
from intaglio.speculative.loop import Speculative
from intaglio.speculative.protocols import Drafter, Step
from intaglio.speculative.static_tree import StaticTree, best_tree, widths_within

TOKENS = "tokens a pass"
FRESH = "tokens a pass before a loop"
DRAFTS = "draft passes a token"
SECONDS = "seconds a token"
NODES = 32
"""Drafted tokens that an arm may verify in a pass, where it does not say otherwise."""
NEW = 64
WARM = 0.6
RANKS = 32
"""Choices of the draft that are counted; no node of a fitted tree has more children."""
PILOT, RUN = 12, 72
SECONDARY = 16

Part = Literal["fit", "pilot", "run"]
_CODE: dict[Part, tuple[int, int]] = {"fit": (0, 300), "pilot": (300, 500), "run": (500, 1000)}
"""Which remainders of a module's hash are in which set. The draft model is trained on modules inside packages alone."""
_ARTICLES: dict[Part, Literal["calibration", "pilot", "evaluation"]] = {
    "fit": "calibration", "pilot": "pilot", "run": "evaluation"
}  # fmt: skip
_FITTED_BELOW = 200
"""Of the calibration articles, those whose hashes modulo 1000 lie below: the draft model is trained on the others."""


class World(Hashable, Protocol):
    """What the experiment asks of a world; it compares by its fields."""

    def target(self) -> Checkpoint:
        """The target, shared."""

    def draft(self) -> Checkpoint:
        """The draft model, shared."""

    def prompts(self, part: Part, base: int = 0) -> list[list[int]]:
        """Token ids to go on from: articles and source code by turns."""


@dataclass(frozen=True)
class Drafted:
    """SmolLM2 and its draft model, with prompts of two kinds.

    Args:
        wikipedia: the target and the articles.
        drafted: how the draft model is made.
        tokens: of a prompt. Default 64.
        fit: prompts that fixed trees are fitted on. Default 32.
        pilot: of the pilot. Default 12.
        run: of a run. Default 72.
    """

    wikipedia: SmolLM2Wikipedia
    drafted: SmolLM2Draft
    tokens: int = 64
    fit: int = 32
    pilot: int = PILOT
    run: int = RUN

    def target(self) -> Checkpoint:
        """The model that is drafted for, one object a process."""
        return self.wikipedia.load()

    def draft(self) -> Checkpoint:
        """The draft model, made at the first use, one object a process."""
        return self.drafted.load()

    def prompts(self, part: Part, base: int = 0) -> list[list[int]]:
        """Pieces of articles and of Python files by turns; the sets share neither.

        Args:
            part: which set.
            base: another seed base gives another order, and other places.

        Raises:
            IntaglioError: too few texts are long enough.
        """
        count = {"fit": self.fit, "pilot": self.pilot, "run": self.run}[part]
        articles = self.wikipedia.part(_ARTICLES[part])
        texts = zip(articles.hashes, articles.documents, strict=True)
        low, high = _CODE[part]
        kinds = (
            [(name, text) for name, text in texts if part != "fit" or _remainder(name) < _FITTED_BELOW],
            [
                (file.hash, file.text)
                for file in source_files()
                if "." not in file.module and low <= _remainder(file.hash) < high
            ],
        )
        pieces = [self._pieces(kind, f"{part}:{base}", (count + 1) // 2) for kind in kinds]
        return [piece for both in zip(*pieces, strict=True) for piece in both][:count]

    def _pieces(self, texts: list[tuple[str, str]], key: str, count: int) -> list[list[int]]:
        tokenizer, found = self.target().tokenizer, list[list[int]]()
        for name, text in sorted(texts, key=lambda pair: keyed(key, pair[0])):
            if len(found) == count:
                return found
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= self.tokens:
                start = keyed(f"{key}:place", name) % (len(ids) - self.tokens + 1)
                found.append(list(ids[start : start + self.tokens]))
        if len(found) < count:
            raise IntaglioError(f"{len(found)} texts of a kind have {self.tokens} tokens; {count} are needed for {key}")
        return found


def _remainder(name: str) -> int:
    return int(name[:8], 16) % 1000


@dataclass(frozen=True)
class Arm:
    """How an arm drafts.

    Args:
        what: in a sentence.
        nodes: drafted tokens that it may verify in a pass. Default 32.
        warm: tokens are drawn at temperature 0.6. Default false: greedy.
        tree: `fixed`, the best of all fixed trees on the fitting prompts; `widths`, the best with as many children at
            every node of a level; `chain`. Default "": DySpec.
        fitted: DySpec's chances of acceptance are counted on the fitting prompts. Default false: they are the draft's
            probabilities.
        fields: of DySpec, as pairs; everything else is its default.
    """

    what: str
    nodes: int = NODES
    warm: bool = False
    tree: Literal["", "fixed", "widths", "chain"] = ""
    fitted: bool = False
    fields: tuple[tuple[str, Any], ...] = ()


_BEST = (
    "the fixed tree that would have taken the fewest passes on the fitting prompts, among Sequoia's of every depth, "
    "trees by widths and chains"
)
METHODS: dict[str, Arm] = {
    "fixed": Arm(f"{_BEST}; {NODES} nodes", tree="fixed"),
    "dyspec": Arm(f"DySpec's heap, {NODES} nodes, its other defaults (the likeliest children in order)"),
    "dyspec-fitted": Arm(
        "the same with chances of acceptance counted, by the draft's probability, on the prompts that the fixed trees "
        "are fitted on",
        fitted=True,
    ),
    "dyspec-drawn": Arm("DySpec with children drawn at temperature 0.6, as in the paper", fields=(("draw", "sample"),)),
    "dyspec-threshold": Arm("DySpec by the threshold 1/32, level by level", fields=(("algorithm", "threshold"),)),
    "dyspec-learnt": Arm("DySpec with acceptance learnt on the way", fields=(("calibrate", True),)),
    "chain": Arm(f"one chain of {NODES} tokens", tree="chain"),
    "k-ary": Arm("SpecInfer's trees: the best widths on the fitting prompts", tree="widths"),
    "fixed-16": Arm("the best fixed tree of 16 nodes", 16, tree="fixed"),
    "dyspec-16": Arm("DySpec with 16 nodes", 16),
    "fixed-64": Arm("the best fixed tree of 64 nodes", 64, tree="fixed"),
    "dyspec-64": Arm("DySpec with 64 nodes", 64),
    "fixed-warm": Arm("tokens drawn at 0.6: the best fixed tree for that", warm=True, tree="fixed"),
    "dyspec-warm": Arm("tokens drawn at 0.6: DySpec", warm=True),
    "dyspec-warm-learnt": Arm("the same with acceptance learnt on the way", warm=True, fields=(("calibrate", True),)),
    "chain-warm": Arm(f"tokens drawn at 0.6: one chain of {NODES}", warm=True, tree="chain"),
}


@dataclass(frozen=True)
class Continue:
    """The runner: go on from one prompt, and count.

    Args:
        world: gives target, draft and prompts.
        new: tokens that are generated. Default 64.
    """

    world: World
    new: int = NEW

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm on one prompt.

        Args:
            arm: a key of `METHODS`.
            unit: of which run; its index picks the prompt.
            seed: of the draws, where tokens are drawn.
        """
        prompts = _prompts(self.world, unit.stage, unit.base)
        if unit.index >= len(prompts):
            raise IntaglioError(f"prompt {unit.index} was asked for; the world has {len(prompts)}")
        prompt, target = prompts[unit.index], self.world.target()
        drafter = make(arm, self.world, self.new)
        with peak_memory(target.device) as peak:
            found = generate(target, drafter, prompt, self.new, seed if METHODS[arm].warm else None)
        calls = cast(Any, drafter).calls
        values = {
            TOKENS: found.rate(),
            FRESH: found.rate(loop_start(found.ids)),
            DRAFTS: calls.passes / len(found.ids),
            SECONDS: found.seconds / len(found.ids),
        }
        weights = parameters(target)
        # The draft model reads its prompt, every node that it is asked about, and what was emitted.
        drafted = parameters(self.world.draft()) * (len(prompt) + calls.nodes + len(found.ids))
        return Outcome(
            values={metric: {"prompt": value} for metric, value in values.items()},
            cost=Cost(
                tokens=len(prompt),
                flops=2.0 * (weights * found.rows + drafted),
                parameters=weights,
                seconds=found.seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"prompt": digest(prompt)},
        )


@lru_cache(maxsize=4)
def _prompts(world: World, part: Part, base: int) -> list[list[int]]:
    return world.prompts(part, base)


def make(arm: str, world: World, new: int) -> Drafter:
    """The drafter of an arm.

    Args:
        arm: a key of `METHODS`.
        world: gives the models and the fitting prompts.
        new: tokens that are generated, also from each fitting prompt.
    """
    spec, draft = METHODS[arm], world.draft().model
    if spec.tree:
        return DraftModel(draft, shape=shape(world, spec.tree, spec.nodes, spec.warm, new).parents)
    fields = dict(spec.fields)
    if spec.fitted:
        fields["acceptance"] = _acceptance(world, spec.nodes, new)
    return cast(Drafter, DySpec(draft=draft, budget=spec.nodes, **fields))


@lru_cache(maxsize=16)
def shape(world: World, tree: str, nodes: int, warm: bool, new: int) -> StaticTree:
    """The best fixed tree on the fitting prompts.

    For greedy text that is the one with the fewest passes, counted exactly. Where tokens are drawn, it is the one with
    the largest expectation by the chances of acceptance there.

    Args:
        world: gives the models and the fitting prompts.
        tree: as in `Arm`.
        nodes: of the tree.
        warm: fit for drawn tokens.
        new: tokens that are generated from each prompt.
    """
    if tree == "chain":
        return StaticTree.from_widths((1,) * nodes)
    chances = _chances(world, warm, new)
    found = [StaticTree.from_widths(widths) for widths in widths_within(nodes)]
    if tree == "fixed":
        found = [*(best_tree(chances, nodes, depth) for depth in (*range(2, 17), nodes)), *found]
    if warm:
        return max(found, key=lambda one: one.expected(chances))
    ranks = _ranks(world, new)
    return min(found, key=lambda one: sum(one.replay(of_text) for of_text in ranks))


@lru_cache(maxsize=4)
def _chances(world: World, warm: bool, new: int) -> tuple[float, ...]:
    """How often each of the draft's choices is the right one on the fitting prompts."""
    if not warm:
        return tuple(acceptance_by_rank(_ranks(world, new), RANKS))
    draws, law = torch.Generator().manual_seed(0), probs_fn(WARM)
    target, draft = world.target().model, world.draft().model
    return tuple(sampled_acceptance_by_rank(target, draft, list(_said(world, True, new)), law, law, RANKS, draws))


@lru_cache(maxsize=4)
def _acceptance(world: World, nodes: int, new: int) -> AcceptanceTable:
    """What became of the draft's choices on the fitting prompts, by their probability."""
    decoder = DySpec(draft=world.draft().model, budget=nodes)
    return decoder.fit_acceptance(world.target().model, _drafted(world, new))


@lru_cache(maxsize=2)
def _ranks(world: World, new: int) -> list[list[int]]:
    draft = world.draft().model
    return [draft_ranks(draft, text) for text in _drafted(world, new)]


def _drafted(world: World, new: int) -> list[Text]:
    """What the target says greedily after the fitting prompts, as far as it can be drafted."""
    # The first new token is the prefill's: no tree is tried for it.
    return [(ids, start + 1) for ids, start in _said(world, False, new)]


@lru_cache(maxsize=4)
def _said(world: World, warm: bool, new: int) -> tuple[Text, ...]:
    """What the target says after the fitting prompts."""

    def texts() -> Iterator[Text]:
        for place, prompt in enumerate(_prompts(world, "fit", 0)):
            found = generate(world.target(), None, prompt, new, place if warm else None)
            yield [*prompt, *found.ids], len(prompt)

    return tuple(texts())


def generate(
    target: Checkpoint, drafter: Drafter | None, prompt: Sequence[int], new: int, seed: int | None
) -> Generated:
    """Go on from a prompt for exactly so many tokens.

    Args:
        target: the model.
        drafter: what drafts for it; None: nothing.
        prompt: token ids.
        new: tokens.
        seed: of draws at temperature 0.6; None for greedy.
    """
    steps: list[int] = []
    rows = [0]

    def note(step: Step) -> None:
        steps.append(len(step.tokens))
        rows[0] += len(prompt) if step.tree is None else len(step.tree)

    ids = torch.tensor([list(prompt)], device=target.device)
    # Stop tokens are ignored, so that every prompt gives as many tokens.
    options: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0, "do_sample": False,
                               "temperature": None, "top_k": None, "top_p": None}  # fmt: skip
    if seed is not None:
        options |= {"do_sample": True, "temperature": WARM, "top_k": 0, "top_p": 1.0}
    if drafter is not None:
        draws = None if seed is None else torch.Generator(target.device).manual_seed(seed)
        options["custom_generate"] = Speculative(drafter, on_step=note, generator=draws)
    model: Any = target.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        start = time.perf_counter()
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds = time.perf_counter() - start
    return Generated(tuple(whole[0, len(prompt) :].tolist()), tuple(steps), rows[0], seconds)


def experiment(world: Any, new: int = NEW) -> Experiment:
    """The claim in a world.

    Args:
        world: a `World` that is a dataclass.
        new: tokens that are generated. Default 64.
    """
    return Experiment(
        slug="dyspec",
        claim="On SmolLM2-135M going on greedily with a two-layer draft model, DySpec emits more tokens a pass than "
        f"the best fixed tree, fitted on other prompts, by more than 0.1, when both may verify {NODES} drafted tokens "
        "a pass.",
        metric=TOKENS,
        unit="tokens a pass",
        direction="higher",
        delta=0.1,
        design="independent",
        factors=("prompt",),
        arms={name: arm.what for name, arm in METHODS.items()},
        baseline="fixed",
        method="dyspec",
        parity=f"Every arm drafts with the same model and may verify {NODES} drafted tokens a pass, but for those that "
        "say 16 or 64; the greedy ones emit the same text. Fixed trees are fitted on prompts of the same kinds, none "
        "of them a run's; DySpec is not fitted.",
        secondaries=(
            Secondary("acceptance fitted on the same prompts as the trees", "fixed", "dyspec-fitted", TOKENS, "higher"),
            Secondary("before the text loops", "fixed", "dyspec", FRESH, "higher"),
            Secondary("draft passes a token", "fixed", "dyspec", DRAFTS),
            Secondary("seconds a token", "fixed", "dyspec", SECONDS),
            Secondary("16 nodes", "fixed-16", "dyspec-16", TOKENS, "higher"),
            Secondary("64 nodes", "fixed-64", "dyspec-64", TOKENS, "higher"),
            Secondary("tokens drawn at 0.6", "fixed-warm", "dyspec-warm", TOKENS, "higher"),
            Secondary("tokens drawn at 0.6, learnt", "fixed-warm", "dyspec-warm-learnt", TOKENS, "higher"),
            Secondary("tokens drawn at 0.6, against a chain", "chain-warm", "dyspec-warm", TOKENS, "higher"),
            Secondary("against one chain", "chain", "dyspec", TOKENS, "higher"),
            Secondary("against trees by widths", "k-ary", "dyspec", TOKENS, "higher"),
            Secondary("children drawn, as in the paper", "fixed", "dyspec-drawn", TOKENS, "higher"),
            Secondary("by a threshold", "fixed", "dyspec-threshold", TOKENS, "higher"),
            Secondary("acceptance learnt on the way", "dyspec", "dyspec-learnt", TOKENS, "higher"),
        ),
        run_unit=Continue(world, new),
        pilot_runs=PILOT,
        most_runs=RUN,
        secondary_runs=SECONDARY,
        threads=1,
        settings={
            "world": asdict(world),
            "new tokens": new,
            "nodes": NODES,
            "ranks counted": RANKS,
            "temperature of drawn tokens": WARM,
            "arms": {name: asdict(arm) for name, arm in METHODS.items()},
            "dyspec": DySpec(draft="draft").model_dump(exclude={"draft"}),
            "sets of source code": _CODE,
            "fitting articles below": _FITTED_BELOW,
        },
    )


EXPERIMENTS = {"cpu": experiment(Drafted(SmolLM2Wikipedia(), SmolLM2Draft()))}
"""By tier."""
