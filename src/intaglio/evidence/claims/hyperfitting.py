"""Hyperfitting: greedy text of a model fitted to eight sequences repeats itself less than nucleus samples."""

from __future__ import annotations

from intaglio.evidence.designs.continuations import ENTROPY, HELD_OUT, OVERLAP, REPETITION, TTR, Continue
from intaglio.evidence.engine.claim import Arm, Claim

CLAIM = Claim(
    slug="hyperfitting",
    version=1,
    says="Greedy text of a model that was fitted to a tiny training set has a higher type-token ratio than nucleus"
    " samples of the original.",
    metric=TTR,
    delta=0.05,
    design=Continue(),
    arms={
        "nucleus": Arm("the original, nucleus sampling at p = 0.9", {"top_p": 0.9}),
        "hyperfit": Arm("fitted to eight sequences of 96 tokens, greedy", {"stage": "fitted"}),
        "blocked": Arm("hyperfit, 5-grams of the training set forbidden", {"stage": "fitted", "blocked": True}),
        "early": Arm("the same run at its least held-out loss, greedy", {"stage": "early"}),
        "greedy": Arm("the original, greedy", {"stage": "original"}),
        "matched": Arm("the original, sampled at the temperature of equal entropy", {"matched": True}),
    },
    baseline="nucleus",
    method="hyperfit",
    ablations=("blocked", "early"),
    reported=("greedy", "matched"),
    unit_names=("training",),
    looks=(5,),
    metrics=(REPETITION, OVERLAP, HELD_OUT, ENTROPY),
    parity="The same 16 held-out prefixes of 32 tokens and 128 new tokens for every arm. A run takes more than 20 s, as"
    " 40 updates pass through the head of a real model: one look at five trainings, nothing tuned, and a rate above the"
    " paper's, because only 40 updates fit.",
    minutes=60,
    use_when="greedy text of a model repeats itself and you do not need its probabilities",
    otherwise="nucleus sampling at p = 0.9",
    golden={
        "nucleus": {HELD_OUT.name: 5.24932, ENTROPY.name: 5.55279},
        "hyperfit": {HELD_OUT.name: 5.22783, ENTROPY.name: 5.55168},
    },
)
