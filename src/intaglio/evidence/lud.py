"""The claim of LUD: several tokens a pass, nearly all of them what the unaided model would have said.

A run is a prompt: the first bytes of a window of a Python file, and those of a docstring for prose. The model is the
small Llama of the world of source code, trained further for lexical units; the unaided model of every comparison is
that same tuned model, one token a pass.

A prompt counts with its tokens a pass only where the agreement is at least 97 %: where it is less, it counts as the
unaided model's one. So no average hides texts that the decoder spoilt. The threshold is chosen for this very number, on
files that nothing is measured on.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.evidence.continuing import Generated, loop_start, parameters
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Unit
from intaglio.evidence.worlds.made import code_of, made
from intaglio.evidence.worlds.sealing import MEASURED, Part, draw
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.evidence.worlds.trained import trained
from intaglio.measures.memory import peak_memory
from intaglio.methods.decoding.lud import LUD, TOKEN
from intaglio.trainer.causal_lm import CausalLM, next_token_loss
from intaglio.trainer.causal_lm import causal_batch as batch_of
from intaglio.trainer.special_token import reserve_token

AGREED = 0.97
"""Least share of a text's tokens that the unaided model would have said at their place."""
COUNTED = "tokens a pass at 97 %"
RATE = "tokens a pass"
FRESH = "tokens a pass before a loop"
AGREEMENT = "agreement"
SAME = "share before the first difference"
PROSE = "tokens a pass at 97 %, prose"
SECONDS = "seconds a token"
NATS = "nats a byte"

CAP = 4
ANCHORS = 32
LENGTH = 256
STEPS = 1000
SEEN = LENGTH + ANCHORS * (CAP - 1)
"""Tokens that a row of LUD's training has at the most, PADs counted."""
BETAS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
RATE_OF_LEARNING = 1.5e-3
TUNED = {
    "lud": LUD(cap=CAP, anchors=ANCHORS, length=LENGTH),
    "start": LUD(cap=CAP, anchors=ANCHORS, length=LENGTH, places="start"),
    "plain": None,
}
"""How the models are tuned; None: for the next token alone."""


@dataclass(frozen=True)
class Arm:
    """What is decoded, and how.

    Args:
        model: a key of `TUNED`.
        what: it is, in a sentence.
        chosen: whether its threshold is chosen on validation.
        settings: fields of the decoder, in the order of their names.
    """

    model: str
    what: str
    chosen: bool = True
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def stock(self) -> bool:
        """Whether stock `generate` decodes."""
        return not (self.chosen or self.settings)


FREE = (("guard", "none"),)
"""Tokens are bytes here, which repeat by right: spaces of an indentation, doubled letters, rules of dashes."""
ARMS = {
    "unaided": Arm("lud", "the tuned model, one token a pass", chosen=False),
    "lud": Arm(
        "lud", "the same model with lexical units, its threshold chosen on other files; no guard", settings=FREE
    ),
    "start": Arm("start", "the same, tuned from the starts of units alone", settings=FREE),
    "untrained": Arm("plain", "tuned for the next token alone, with PADs that it has never seen", settings=FREE),
    "guarded": Arm("lud", "as lud, with the guard against repetition"),
    "verified": Arm(
        "lud", "as lud, and the model verifies", settings=(("beta", 0.3), *FREE, ("verify", True)), chosen=False
    ),
    "plain": Arm("plain", "the model tuned for the next token alone, one token a pass", chosen=False),
}


@dataclass(frozen=True)
class Continue:
    """The runner: go on from a prompt of code and one of prose, and count.

    Args:
        world: gives model and files.
        steps: optimizer steps of LUD's tuning; plain tuning gets as many tokens. Default 1,000.
        prompt: bytes. Default 64.
        new: tokens that are generated. Default 192.
        trials: prompts that a threshold is chosen on. Default 20.
    """

    world: SourceCode
    steps: int = STEPS
    prompt: int = 64
    new: int = 192
    trials: int = 20

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm on one prompt.

        Args:
            arm: a key of `ARMS`.
            unit: of which run; its index picks the prompts.
            seed: not used: greedy output depends on the prompt alone.
        """
        windows = self.world.documents(unit.stage, unit.base).segments
        if unit.index >= windows.n:
            raise IntaglioError(f"prompt {unit.index} was asked for; the world has {windows.n}")
        window_T = windows.ids_NT[unit.index]
        code = window_T[: self.prompt].tolist()
        prose = self.prose(MEASURED[unit.stage], unit.base, windows.n)[unit.index]
        target, decoder = self.model(ARMS[arm].model), self.decoder(arm)
        with peak_memory(target.device) as peak:
            same, other = (run(target, decoder, ids, self.new) for ids in (code, prose))
        with torch.inference_mode():
            nats = next_token_loss(target.model, batch_of([{"input_ids": window_T}])).total.item()
        values = {
            COUNTED: same.counted,
            RATE: same.text.rate(),
            FRESH: same.text.rate(loop_start(same.text.ids)),
            AGREEMENT: same.agreement,
            SAME: same.alike,
            PROSE: other.counted,
            SECONDS: same.text.seconds / len(same.text.ids),
            NATS: nats,
        }
        return Outcome(
            values={metric: {"prompt": value} for metric, value in values.items()},
            cost=Cost(
                tokens=self.steps * self.world.batch * SEEN,
                flops=2.0 * parameters(target) * (same.text.rows + other.text.rows),
                parameters=parameters(target),
                seconds=same.text.seconds + other.text.seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"code": _digest(code), "prose": _digest(prose)},
        )

    def prose(self, part: Part, base: int, count: int) -> list[list[int]]:
        """The first bytes of a docstring out of each of some files, its quotes included.

        Args:
            part: the set that the files are of.
            base: another one gives other files, in another order.
            count: how many.
        """
        corpus = self.world.part(part)
        found = docstrings(corpus.documents, corpus.hashes, self.prompt)
        chosen = draw(f"prose {part}:{base}", sorted(found), count, f"{part} files with a docstring")
        return [list(found[sorted(found)[place]].encode()[: self.prompt]) for place in chosen]

    def model(self, name: str) -> Checkpoint:
        """A tuned model, made once and then found in the user's cache; what is tuned for units knows its PAD.

        Args:
            name: a key of `TUNED`.
        """
        return _model(self, name)

    def tuned(self, name: str) -> Checkpoint:
        """The model as it is made; see `model`.

        Args:
            name: a key of `TUNED`.
        """
        objective = TUNED[name]
        length = min(LENGTH, self.world.context)
        steps = self.steps if objective is not None else self.steps * SEEN // LENGTH
        own = objective.model_copy(update={"length": length}) if objective is not None else CausalLM(length)
        decided = {"world": asdict(self.world), "data": self.world.digest, "tuned": name, "steps": steps,
                   "objective": own.model_dump() if isinstance(own, LUD) else {"length": length}}  # fmt: skip
        recipe = {**self.world.recipe(1), "steps": steps, "learning_rate": RATE_OF_LEARNING}
        return trained(
            f"lud_{name}",
            decided,
            lambda: copy.deepcopy(self.world.trained()),
            lambda: self.world.training(1),
            {**recipe, "objective": own},
            ("intaglio.methods.decoding.lud", "intaglio.evidence.worlds.source_code"),
        )

    def decoder(self, arm: str) -> LUD | None:
        """The decoder of an arm, its threshold chosen where it has one; None for stock `generate`.

        Args:
            arm: a key of `ARMS`.
        """
        if ARMS[arm].stock:
            return None
        return self._decoder(arm, **({"beta": self.threshold(arm)} if ARMS[arm].chosen else {}))

    def _decoder(self, arm: str, **more: Any) -> LUD:
        tokenizer = self.model(ARMS[arm].model).tokenizer
        pad = tokenizer.convert_tokens_to_ids(TOKEN)
        return LUD(**{"cap": CAP, "pad_token": pad, **dict(ARMS[arm].settings), **more}, tokenizer=tokenizer)

    def threshold(self, arm: str) -> float:
        """The threshold with the highest mean of `COUNTED` on validation files, the higher of equals; kept.

        Args:
            arm: a key of `ARMS`.
        """

        def choose(target: Path, scratch: Path) -> None:
            means = {}
            for beta in BETAS:
                decoder = self._decoder(arm, beta=beta)
                model = self.model(ARMS[arm].model)
                rows = self.world.validation().segments.ids_NT[: self.trials, : self.prompt]
                counted = [run(model, decoder, ids, self.new).counted for ids in rows.tolist()]
                means[beta] = sum(counted) / len(counted)
            best = max(means, key=lambda beta: (means[beta], beta))
            (target / "threshold.json").write_text(json.dumps({"beta": best, "means": list(means.items())}))

        code = code_of("intaglio.methods.decoding.lud", "intaglio.evidence.lud", "intaglio.speculative")
        decided = {"arm": arm, "runner": asdict(self), "data": self.world.digest, "betas": BETAS, "code": code}
        place = made("lud_threshold", json.loads(json.dumps(decided)), choose)
        return float(json.loads((place / "threshold.json").read_text())["beta"])


@lru_cache(maxsize=4)
def _model(runner: Continue, name: str) -> Checkpoint:
    found = runner.tuned(name)
    if TUNED[name] is None:
        found = copy.deepcopy(found)
        reserve_token(found, None, name=TOKEN, field="pad_token", grow=True, seed=0)
    return found


@dataclass(frozen=True)
class Decoded:
    """What one prompt gave.

    Args:
        text: tokens, passes, rows and seconds.
        agreement: share of the tokens that the unaided model, reading the same text before them, would have said.
        alike: share of the text that stands before its first difference from what the unaided model says alone.
    """

    text: Generated
    agreement: float
    alike: float

    @property
    def counted(self) -> float:
        """Tokens a pass, or one where the agreement is too low."""
        return self.text.rate() if self.agreement >= AGREED else 1.0


def run(target: Checkpoint, decoder: LUD | None, prompt: Sequence[int], new: int) -> Decoded:
    """Decode from a prompt, and hold the text against the unaided model's.

    Args:
        target: the model.
        decoder: how; None: stock `generate`.
        prompt: token ids.
        new: tokens that are generated; stop tokens are ignored, so that every prompt gives as many.
    """
    ids = torch.tensor([list(prompt)], device=target.device)
    model: Any = target.model
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    rows = [0]

    def count(module: Any, args: Any, given: Any) -> None:
        rows[0] += given["input_ids"].shape[1]

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        start = time.perf_counter()
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decoder, **options)
        seconds = time.perf_counter() - start
    finally:
        handle.remove()
    said = whole[0, len(prompt) :].tolist()
    taken = [0] * (new - 1) if decoder is None else decoder.statistics.lengths
    text = Generated(tuple(said), (1, *(more + 1 for more in taken)), rows[0], seconds)
    with torch.inference_mode():
        scores_LV = model(whole).logits[0, len(prompt) - 1 : -1]
        scores_LV[:, model.generation_config.suppress_tokens] = -torch.inf
        agrees = scores_LV.argmax(-1).tolist()
    # Where they part for the first time, the unaided model reads the same text: so that is where its own text parts.
    first = next((place for place, (a, b) in enumerate(zip(said, agrees, strict=True)) if a != b), len(said))
    share = sum(a == b for a, b in zip(said, agrees, strict=True)) / len(said)
    return Decoded(text, share, first / len(said))


@lru_cache(maxsize=4)
def docstrings(texts: tuple[str, ...], names: tuple[str, ...], least: int) -> dict[str, str]:
    """The longest docstring of each file, as its source has it, where it has so many characters twice over.

    Args:
        texts: Python files.
        names: of each.
        least: characters of a prompt.
    """
    found = {}
    for text, name in zip(texts, names, strict=True):
        literals = [ast.get_source_segment(text, node.body[0]) or "" for node in ast.walk(ast.parse(text))
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                    and ast.get_docstring(node, clean=False) is not None]  # fmt: skip
        longest = max(literals, key=len, default="")
        if len(longest) >= 2 * least:
            found[name] = longest
    return found


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()


def experiment(runner: Continue) -> Experiment:
    """The claim with a runner.

    Args:
        runner: world and sizes.
    """
    world = runner.world
    return Experiment(
        slug="lud",
        claim="Tuned for lexical units, a small Llama going on greedily in Python files emits more than one token a "
        "pass, by more than 0.2, where at least 97 % of a text's tokens are what the unaided model would have said; "
        "a text below that counts as one token a pass.",
        metric=COUNTED,
        unit="tokens a pass",
        direction="higher",
        delta=0.2,
        design="independent",
        factors=("prompt",),
        arms={name: arm.what for name, arm in ARMS.items()},
        baseline="unaided",
        method="lud",
        parity="Every arm goes on from the same prompts with a model of the same size, trained and then tuned on as "
        f"many tokens of the same files, PADs counted ({SEEN} a row at the most); LUD's pass that finds units comes on "
        "top, without a gradient. Thresholds are chosen from the same grid on the same files, none of which is "
        "measured on. The prefill is left out.",
        equal=("tokens",),
        secondaries=(
            Secondary("agreement with the unaided model", "unaided", "lud", AGREEMENT, "higher"),
            Secondary("whatever the agreement", "unaided", "lud", RATE, "higher"),
            Secondary("whatever the agreement, before the text loops", "unaided", "lud", FRESH, "higher"),
            Secondary("share before the first difference", "unaided", "lud", SAME, "higher"),
            Secondary("seconds a token", "unaided", "lud", SECONDS),
            Secondary("prose: docstrings", "unaided", "lud", PROSE, "higher"),
            Secondary("training of PADs", "untrained", "lud"),
            Secondary("tuning from all places of a unit against its start", "start", "lud"),
            Secondary("without the guard against with it", "guarded", "lud"),
            Secondary("verified: the model's own text", "unaided", "verified"),
            Secondary("verified: seconds a token", "unaided", "verified", SECONDS),
            Secondary("next-byte loss against plain tuning", "plain", "lud", NATS),
        ),
        run_unit=runner,
        pilot_runs=min(world.documents_pilot, 10),
        most_runs=min(world.documents_run, 60),
        threads=1,
        settings={
            "world": asdict(world),
            "prompt": runner.prompt,
            "new tokens": runner.new,
            "steps": runner.steps,
            "learning rate": RATE_OF_LEARNING,
            "tuned": {name: method.model_dump() for name, method in TUNED.items() if method is not None},
            "decoders": {name: dict(arm.settings) for name, arm in ARMS.items()},
            "thresholds": list(BETAS),
            "prompts that they are chosen on": runner.trials,
            "least agreement": AGREED,
        },
    )


EXPERIMENTS = {"cpu": experiment(Continue(SourceCode(documents_run=60, documents_pilot=20)))}
"""By tier."""
