"""Design that counts how many tokens a drafter or decoder emits per pass of the target: `Replay`.

Greedy text is fixed, so for a drafter whose proposals depend on accepted tokens and hidden states alone, the passes
follow from the target's text and hidden states, which are computed once and cached: no pass of the target is needed.
Drafters that draft inside the target's pass, and decoders that are not lossless, run their true pass, all prompts of a
unit in one batch.

Settings of an arm: `drafter`, a function `(context, **settings) -> Drafter`, or `decoder`, one that returns a decoder
with an `on_step` field; everything else is given to that function.

Dimension letters: P prompt tokens, N new tokens, T = P + N, D width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest, preparation
from intaglio.evidence.testbeds.prompts import Prompts
from intaglio.measures.memory import peak_memory
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden
from intaglio.speculative.heads.self_generated_data import generate_corpus
from intaglio.speculative.loop import Speculative
from intaglio.speculative.protocols import DecodingRun, Drafter, ForwardSession, Session, Step
from intaglio.speculative.tree import TokenTree
from intaglio.trainer.causal_lm import IGNORED

TOKENS = Metric("tokens a pass", "tokens", "higher", continuous=False)
BEFORE_LOOP = Metric("tokens a pass before the text loops", "tokens", "higher", continuous=False)
DRAFT_PASSES = Metric("draft passes a token", "passes", continuous=False)
AGREEMENT = Metric("agreement with the unaided model", "share", "higher", continuous=False)
AGREED_TOKENS = Metric("tokens a pass at 97 % agreement", "tokens", "higher", continuous=False)
LEAST_AGREEMENT = 0.97
LONGEST_LOOP = 32
"""Tokens of the longest period that counts as a loop."""


@dataclass(frozen=True)
class Context:
    """Inputs of a function that makes a drafter: test bed, shared target model, key of the run, and the design."""

    bed: Any
    target: Checkpoint
    key: RunKey
    design: Replay


@dataclass(eq=False)
class Text:
    """Token ids of a prompt and its continuation, and last hidden states of both where a drafter needs them."""

    prompt: tuple[int, ...]
    new: tuple[int, ...]
    hidden_TD: Tensor | None = None


@dataclass(eq=False)
class Passes:
    """Tokens that each pass emitted for one prompt, the prefill's first; `rows` counts tokens that the target read."""

    new: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    rows: int = 0

    def count(self, tokens: int | None = None) -> tuple[int, int]:
        """Return tokens and passes after the prefill, of the first passes until `tokens` are there (default all)."""
        emitted = passes = 0
        for step in self.steps[1:]:
            if tokens is not None and emitted >= tokens:
                break
            emitted, passes = emitted + step, passes + 1
        return emitted, passes


@dataclass(frozen=True)
class Replay:
    """Count the passes of an arm on the prompts of a unit.

    `bed` gives `load()`, the target, and `source(part, index, base)`, the prompts of a unit; `new` limits new tokens.
    `real_loop` decodes with the real loop, one prompt after the other.
    """

    bed: Any = field(default_factory=Prompts)
    new: int = 64
    real_loop: bool = False

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Count the passes of an arm on a unit."""
        own = {**settings, **arm.settings}
        make = own.pop("target", None)
        target: Checkpoint = make(self.bed) if make else self.bed.load()
        prompts = [tuple(prompt.ids) for prompt in self.bed.source(key.split, key.index, key.base)]
        context = Context(self.bed, target, key, self)
        drafter: Any = None
        decoder, drafter = own.pop("decoder", None), own.pop("drafter", None)
        with peak_memory(target.device) as spent:
            if decoder is not None:
                passes = decode(target, _decoding(decoder(context, **own)), prompts, self.new)
            else:
                drafter = drafter(context, **own)
                passes = self._passes(target, drafter, prompts)
        values: dict[str, float | None] = {
            TOKENS.name: ratio(result.count() for result in passes),
            BEFORE_LOOP.name: ratio(result.count(loop_start(result.new)) for result in passes),
        }
        if hasattr(drafter, "calls"):
            values[DRAFT_PASSES.name] = drafter.calls.passes / sum(len(result.new) for result in passes)
        if decoder is not None:
            shares, rates = agreed_tokens(target, prompts, passes)
            values |= {AGREEMENT.name: fmean(shares), AGREED_TOKENS.name: fmean(rates)}
        rows = sum(result.rows for result in passes)
        parameters = sum(p.numel() for p in target.model.parameters())
        tokens = sum(map(len, prompts))
        cost = Cost(tokens, 2.0 * parameters * rows, parameters, spent.seconds, spent.bytes)
        return Result(values, cost, {"prompts": digest(prompts)})

    def _passes(self, target: Checkpoint, drafter: Drafter, prompts: Sequence[tuple[int, ...]]) -> list[Passes]:
        if self.real_loop:
            return [decode(target, _drafting(drafter), [prompt], self.new)[0] for prompt in prompts]
        if isinstance(_start(target, drafter, prompts[:1], self.new), ForwardSession):
            return decode(target, _drafting(drafter), prompts, self.new)
        texts = continuations(target, tuple(prompts), self.new, drafter.needs_hidden)
        return replay(target, drafter, texts, self.new)

    def toy(self, **changes: Any) -> Replay:
        """Return the design on a small model of bytes; `changes` are fields of its test bed."""
        return dataclasses.replace(self, bed=self.bed.toy(**{"context": 64, "tokens": 24, **changes}), new=12)


def ratio(counts: Any) -> float:
    """Return tokens over passes, summed over prompts; 1 where there was no pass."""
    pairs = list(counts)
    passes = sum(count for _, count in pairs)
    return sum(tokens for tokens, _ in pairs) / passes if passes else 1.0


@lru_cache(maxsize=4)
@torch.inference_mode()
def continuations(
    target: Checkpoint, prompts: tuple[tuple[int, ...], ...], new: int, hidden: bool
) -> tuple[Text, ...]:  # fmt: skip
    """Return the greedy continuation of each prompt, generated once and cached, and its hidden states if required."""
    with preparation():
        examples = generate_corpus(target, prompts, tokens=new, temperature=0.0)
    texts = []
    for prompt, example in zip(prompts, examples, strict=True):
        ids = list(map(int, example["input_ids"]))
        start = sum(label == IGNORED for label in example["labels"])
        batch = {"input_ids": torch.tensor([ids])}
        hidden_TD = final_hidden(anatomy(target.model), batch)[0] if hidden else None  # after the final norm
        texts.append(Text(prompt, tuple(ids[start:]), hidden_TD))
    return tuple(texts)


def _start(target: Checkpoint, drafter: Drafter, prompts: Sequence[tuple[int, ...]], new: int) -> Session:
    config: Any = copy.copy(target.model.generation_config)
    config.do_sample = False
    run = DecodingRun(target.model, tuple(prompts), sampling=False, config=config, limit=new)
    return drafter.start(run)


@torch.inference_mode()
def replay(target: Checkpoint, drafter: Drafter, texts: Sequence[Text], new: int) -> list[Passes]:
    """Return the passes that the verify loop would take to emit the target's own texts, without running the target."""
    session = _start(target, drafter, [text.prompt for text in texts], new)
    results = [Passes([text.new[0]], [1], len(text.prompt)) for text in texts]
    logits = torch.empty(0)  # a drafter that read them could not be replayed
    session.observe(
        [
            Step(row, [text.new[0]], 0, None, (), _states(text, 0, len(text.prompt)), logits, len(text.new) == 1)
            for row, text in enumerate(texts)
        ]
    )
    while rows := [row for row, text in enumerate(texts) if len(results[row].new) < len(text.new)]:
        room = [new - len(results[row].new) - 1 for row in rows]
        steps = []
        for row, most, proposed in zip(rows, room, session.propose(rows, room), strict=True):
            text, result, tree = texts[row], results[row], proposed.truncate(most)
            tokens, drafted, path = _accept(tree, text.new[len(result.new) :])
            root = len(text.prompt) + len(result.new) - 1
            result.new += tokens
            result.steps.append(len(tokens))
            result.rows += len(tree)
            hidden = _states(text, root, root + len(path))
            done = len(result.new) == len(text.new)
            steps.append(Step(row, tokens, drafted, tree, path, hidden, logits, done))
        session.observe(steps)
    return results


def _states(text: Text, start: int, end: int) -> Tensor | None:
    return None if text.hidden_TD is None else text.hidden_TD[start:end]


def _accept(tree: TokenTree, expected: Sequence[int]) -> tuple[list[int], int, list[int]]:
    """Tokens emitted, how many of them were drafted, and the nodes that stay in the cache, as in `verify.walk`."""
    same: list[int] = [0]
    tokens: list[int] = []
    while True:
        node, token = same[0], expected[len(tokens)]
        tokens.append(token)
        same = [below for above in same for below in tree.children[above] if tree.tokens[below] == token]
        if len(tokens) == len(expected) or not same:
            return tokens, len(tokens) - (not same), tree.path(node)


def _drafting(drafter: Drafter) -> Any:
    return lambda note: Speculative(drafter, on_step=note, prepack=False)


def _decoding(decoder: Any) -> Any:
    return lambda note: decoder.model_copy(update={"on_step": note, "prepack": False})


def decode(target: Checkpoint, make: Any, prompts: Sequence[tuple[int, ...]], new: int) -> list[Passes]:
    """Return the passes of the true decoding of a batch of prompts by `make(on_step)`, a `custom_generate` callable."""
    results = [Passes(rows=len(prompt)) for prompt in prompts]

    def note(step: Step) -> None:
        result = results[step.row]
        result.new += step.tokens
        if step.drafted and not step.path:  # taken unverified, in the pass of the token before
            result.steps[-1] += len(step.tokens)
            return
        result.steps.append(len(step.tokens))
        result.rows += 0 if len(result.steps) == 1 else 1 if step.tree is None else len(step.tree)

    longest = max(map(len, prompts))
    rows = [(0,) * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    model: Any = target.model
    model.generate(
        torch.tensor(rows, device=target.device), attention_mask=torch.tensor(mask, device=target.device),
        custom_generate=make(note), do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=new,
        pad_token_id=0,
    )  # fmt: skip
    return results


@torch.inference_mode()
def agreement(target: Checkpoint, prompt: Sequence[int], new: Sequence[int]) -> float:
    """Return the share of new tokens that the unaided model, reading the same text before them, would have emitted."""
    model: Any = target.model
    ids_1T = torch.tensor([[*prompt, *new]], device=target.device)
    scores_NV = model(ids_1T).logits[0, len(prompt) - 1 : -1]
    scores_NV[:, model.generation_config.suppress_tokens or []] = -torch.inf
    return float((scores_NV.argmax(-1).cpu() == torch.tensor(list(new))).double().mean())


def agreed_tokens(
    target: Checkpoint, prompts: Sequence[Sequence[int]], passes: Sequence[Passes]
) -> tuple[list[float], list[float]]:
    """Return each prompt's agreement, and its tokens per pass, which count as 1 below 97 % agreement."""
    shares = [agreement(target, prompt, result.new) for prompt, result in zip(prompts, passes, strict=True)]
    rates = [ratio([result.count()]) for result in passes]
    return shares, [rate if share >= LEAST_AGREEMENT else 1.0 for rate, share in zip(rates, shares, strict=True)]


def loop_start(ids: Sequence[int]) -> int:
    """Return the position from which a text repeats itself to its end; the text's length where it does not.

    The period is at most 32 tokens, seen at least twice.
    """
    start = len(ids)
    for period in range(1, min(LONGEST_LOOP, len(ids) // 2) + 1):
        position = len(ids) - period
        while position > 0 and ids[position - 1] == ids[position - 1 + period]:
            position -= 1
        if len(ids) - position >= 2 * period:
            start = min(start, position)
    return start
