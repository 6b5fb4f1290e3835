"""SAE evaluation: edits with a supervised dictionary against edits with the best TopK dictionary of its width."""

from __future__ import annotations

from typing import Any

from intaglio.dictionaries.baselines import L1SAE, TopKSAE
from intaglio.evidence.designs.grade_dictionaries import (
    ACCURACY,
    AGREEMENT,
    NECESSITY,
    SUFFICIENCY,
    UNEDITED,
    UNEXPLAINED,
    GradeDictionaries,
)
from intaglio.evidence.engine.claim import Arm, Claim

WIDTH = 62
"""Features of the supervised dictionary: 30 names as indirect object, 30 as subject, and two orders."""


def learned(cls: type[Any], **fields: Any) -> dict[str, Any]:
    """Return the settings of an arm with a trained dictionary."""
    return {"dictionary": cls(width=WIDTH, **fields)}


CLAIM = Claim(
    slug="sae_eval",
    version=1,
    says="On held-out pairs of names, swapping one feature of a supervised dictionary makes a small model answer as"
    " with the counterfactual activations more often than two features of the best TopK dictionary.",
    metric=AGREEMENT,
    delta=10,
    design=GradeDictionaries(),
    arms={
        "topk": Arm(
            "TopK dictionary of equal width, two features changed",
            learned(TopKSAE, k=3),
            tune={"k": (3, 8), "learning_rate": (1e-3, 3e-3, 1e-2)},
        ),
        "supervised": Arm("mean codes, one feature swapped for another", {"supervised": "mean"}, tune={}),
        "truth": Arm("the counterfactual activations", {"truth": True}),
        "mse": Arm("least-squares codes, one feature swapped for another", {"supervised": "mse"}),
        "l1": Arm("dictionary with an L1 penalty, two features changed", learned(L1SAE)),
        "frozen": Arm("TopK dictionary with random frozen directions", learned(TopKSAE, k=3, frozen_decoder=True)),
        "components": Arm("31 principal components with their opposites", {"components": WIDTH // 2}),
    },
    baseline="topk",
    method="supervised",
    ceiling="truth",
    ablations=("mse",),
    reported=("l1", "frozen", "components"),
    looks=(5,),  # a model is trained for each unit
    closed=("k",),
    metrics=(UNEDITED, SUFFICIENCY, NECESSITY, UNEXPLAINED, ACCURACY),
    equal=("tokens",),
    parity="The same model, prompts and activations; 62 features each; an edit removes and adds one feature, or changes"
    " two. Six trials for TopK, none for the supervised codes.",
    minutes=45,
    use_when="you must know how far a dictionary is from what labels alone would give on your task",
    otherwise="the variance unexplained and the loss recovered of the fit",
    toy={"steps": 20},
    golden={
        "topk": {UNEXPLAINED.name: 0.929296, SUFFICIENCY.name: 0.12088},
        "supervised": {UNEXPLAINED.name: 0.691111, SUFFICIENCY.name: 0.805116},
    },
)
