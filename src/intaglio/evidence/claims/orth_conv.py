"""Orthogonal convolutions: the autocorrelation of kernels is regularised, against their reshaped matrices."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS
from intaglio.evidence.designs.convolutions import ROBUST, SPREAD, ClassifyConvolutions
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.digits import Digits
from intaglio.methods.training.orth_conv import OrthConv


def regularised(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm."""
    return {"modifiers": (OrthConv(**fields),)}


CLAIM = Claim(
    slug="orth_conv",
    version=1,
    says="Trained on digits of 8 x 8 pixels, convolutions regularised by L_orth have singular values in a narrower"
    " range at 32 x 32 pixels than those regularised by the Gram matrix of the reshaped kernel.",
    metric=SPREAD,
    delta=0.10,
    design=ClassifyConvolutions(Digits(training_images=400)),
    arms={
        "kernel": Arm("||W W^T - I||^2 of the reshaped kernels", regularised(form="kernel")),
        "orth_conv": Arm("L_orth", regularised()),
        "padding 1": Arm("L_orth with the incomplete autocorrelation of Wang et al.'s code", regularised(padding=1)),
        "unsquared": Arm("the norm of each layer instead of its square", regularised(squared=False)),
        "plain": Arm("no regulariser", {}),
        "spectral norm": Arm("reshaped kernels over their largest singular value", regularised(form="spectral_norm")),
    },
    baseline="kernel",
    method="orth_conv",
    ablations=("padding 1", "unsquared"),
    reported=("plain", "spectral norm"),
    tune={"regularization_weight": (0.1, 1.0, 10.0)},
    closed=("regularization_weight",),
    metrics=(ACCURACY, TEST_LOSS, *ROBUST),
    equal=("tokens",),
    parity="The same network, images, steps and attack for every arm, and three weights of the regulariser each, chosen"
    " by the spread itself; no arm's weight is chosen by its accuracy under attack.",
    minutes=25,
    use_when="a convolutional network must neither amplify nor shrink its input, at any image size",
    otherwise="plain training",
    toy={"width": 8, "measured_size": 8},
    golden={
        "kernel": {TEST_LOSS.name: 2.25532, SPREAD.name: 1.24609},
        "orth_conv": {TEST_LOSS.name: 2.26166, SPREAD.name: 0.943625},
    },
)
