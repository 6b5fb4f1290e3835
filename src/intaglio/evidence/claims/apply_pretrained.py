"""Apply-pretrained: steps on the cached states lower the loss of shifted text more than steps on the weights."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.baselines.dynamic_evaluation import dynamic_evaluation
from intaglio.evidence.designs.text_loss import NATS, TextLoss
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.methods.decoding.apply_pretrained import ApplyPretrained

WINDOW = 32


def hso(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm: a forward pass, and the backward pass to the states; fields are not tuned."""
    return {"method": ApplyPretrained(window=WINDOW), "passes": 2, **fields}


CLAIM = Claim(
    slug="apply_pretrained",
    version=2,
    says="Gradient steps on the cached keys and values lower a small chat model's loss of prose in capitals more than"
    " gradient steps on the weights do.",
    metric=NATS,
    delta=0.01,
    design=TextLoss(SmolLM2Wikipedia(upper=True, documents_run=40, documents_pilot=6, tokens=256), texts=2),
    arms={
        "dynamic evaluation": Arm(
            "a normalised step on all weights after each window",
            {"score": dynamic_evaluation, "window": WINDOW, "passes": 3},
            {"learning_rate": (1e-6, 3e-6, 1e-5)},
        ),
        "hso": Arm(
            "a normalised step on the earlier windows' cached states after each window",
            hso(),
            {"step_size": (3e-4, 1e-3, 3e-3)},
        ),
        "plain gradient": Arm("the gradient itself, step 0.1", hso(rule="sgd", step_size=0.1)),
        "own states": Arm("the window's own states are updated too", hso(update_own=True)),
        "plain model": Arm("the model as it is", {**hso(step_size=0.0), "passes": 1}),
    },
    baseline="dynamic evaluation",
    method="hso",
    ablations=("plain gradient", "own states"),
    reported=("plain model",),
    unit_names=("pair of texts",),
    looks=(5, 10, 20),
    tune_units=3,
    equal=("tokens",),
    parity="The same windows of 32 tokens, each with the whole text before it as context. Dynamic evaluation makes 7"
    " updates and the cache 6, since the first window has no states before it. Dynamic evaluation also computes the"
    " gradients of the weights: three passes against two.",
    minutes=45,
    reason="the model was trained on Python source, the text of version 1, which is therefore no shift",
    use_when="you score or continue a text in a domain that the model was not trained on, and can take gradients",
    otherwise="dynamic evaluation",
    toy={"width": 16, "context": 96, "tokens": 96, "overrides": (("initializer_range", 0.2),)},
    golden={"dynamic evaluation": {NATS.name: 5.10045}, "hso": {NATS.name: 5.13805}},
)
