"""LUD: several tokens per pass, nearly all of them the unaided model's own, against a token per pass."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import lru_cache
from statistics import fmean
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs import replay
from intaglio.evidence.engine.claim import Arm, Claim, describe
from intaglio.evidence.testbeds.cached_models import trained_model
from intaglio.evidence.testbeds.source_code import TOY, SourceCode
from intaglio.methods.decoding.lud import LUD, TOKEN
from intaglio.trainer.causal_lm import CausalLM
from intaglio.trainer.special_token import reserve_token

CAP, ANCHORS, LENGTH = 4, 32, 256
SEEN = LENGTH + ANCHORS * (CAP - 1)
"""Tokens that a row of LUD's training has at most, PADs counted."""
BETAS, TRIALS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99), 20
"""Thresholds, of which these many validation prompts choose."""


def units(bed: SourceCode, places: Any = "any") -> Checkpoint:
    """Return the model trained for lexical units."""
    return _tuned(bed, LUD(cap=CAP, anchors=ANCHORS, length=min(LENGTH, bed.context), places=places), 1000)


def starts(bed: SourceCode) -> Checkpoint:
    """Return the model trained from the starts of units alone."""
    return units(bed, "start")


@lru_cache(maxsize=1)
def plain(bed: SourceCode) -> Checkpoint:
    """Return the model trained for the next token alone on as many tokens, with a PAD that it has never seen."""
    checkpoint = copy.deepcopy(_tuned(bed, CausalLM(length=min(LENGTH, bed.context)), 1000 * SEEN // LENGTH))
    reserve_token(checkpoint, None, name=TOKEN, field="pad_token", grow=True, seed=0)
    return checkpoint


def _tuned(bed: SourceCode, objective: Any, steps: int) -> Checkpoint:
    steps = 3 if bed.packages == (TOY,) else steps
    return trained_model(
        "lud",
        {"bed": asdict(bed), "data": bed.digest, "objective": describe(objective)},
        lambda: copy.deepcopy(bed.load()),
        lambda: bed.training(1),
        {**bed.recipe(1), "steps": steps, "learning_rate": 1.5e-3, "objective": objective},
    )


def lexical_units(context: replay.Context, beta: float | None = None, **fields: Any) -> LUD:
    """Return the decoder; without `beta` its threshold is the one with the most tokens on validation prompts."""
    tokenizer = context.target.tokenizer
    fields |= {"cap": CAP, "pad_token": tokenizer.convert_tokens_to_ids(TOKEN), "tokenizer": tokenizer}
    return LUD(beta=beta or _threshold(context.bed, context.target, context.design.new, **fields), **fields)


@lru_cache(maxsize=8)
def _threshold(bed: SourceCode, target: Checkpoint, new: int, **fields: Any) -> float:
    prompts = [bed.source("validation", index)[0].ids for index in range(min(TRIALS, bed.documents_pilot))]

    def counted(beta: float) -> float:
        passes = replay.decode(target, lambda note: LUD(beta=beta, on_step=note, **fields), prompts, new)
        return fmean(replay.agreed_tokens(target, prompts, passes)[1])

    return max(BETAS, key=lambda beta: (counted(beta), beta))


def arm(what: str, target: Any = units, **settings: Any) -> Arm:
    """Return an arm."""
    return Arm(what, {"target": target, "decoder": lexical_units, **settings})


CLAIM = Claim(
    slug="lud",
    version=1,
    says="Trained for lexical units, a small Llama that continues Python files greedily emits more tokens per pass than"
    " one, counting a text as one token per pass if less than 97 % of it is what the unaided model would have emitted.",
    metric=replay.AGREED_TOKENS,
    delta=0.2,
    design=replay.Replay(SourceCode(documents_run=60, documents_pilot=20, prompt=64), new=192),
    arms={
        "unaided": arm("the model trained for units, one token per pass", beta=2.0),
        # Tokens are bytes here, which repeat legitimately, as in indentation.
        "lud": arm("the same model with lexical units, its threshold chosen on other files; no guard", guard="none"),
        "start": arm("the same, trained from the starts of units alone", starts, guard="none"),
        "untrained": arm("trained for the next token alone, with PADs that it has never seen", plain, guard="none"),
        "guarded": arm("as lud, with the guard against repetition"),
        "verified": arm("as lud, verified: the model's own text", beta=0.3, guard="none", verify=True),
    },
    baseline="unaided",
    method="lud",
    ablations=("start", "untrained", "guarded", "verified"),
    unit_names=("prompt",),
    looks=(60,),
    metrics=(replay.TOKENS, replay.BEFORE_LOOP, replay.AGREEMENT),
    equal=("tokens",),
    parity="Every arm continues the same prompts with a model of the same size, trained on as many tokens of the same"
    f" files, PADs counted ({SEEN} a row at most). Thresholds are chosen from one grid on other files.",
    minutes=60,
    use_when="you may train the model further, and nearly its own text will do",
    otherwise="`verify: true`, which keeps the model's own text",
    advice="Use it when you may train the model further and nearly its own text will do, otherwise take `verify: true`."
    " Much of the gain is in text that repeats itself.",
    golden={"unaided": {}, "lud": {}},
)
