"""BitNet b1.58 Reloaded: a ternary Llama at twice the width against full precision, as good as."""

from __future__ import annotations

from intaglio.evidence.baselines.inner_norms import InnerNorms
from intaglio.evidence.designs.measures import BITS, PROJECTION_BYTES, WEIGHT_BYTES, bits_per_byte, weight_bytes
from intaglio.evidence.designs.training import Pretrain
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.weights.bitnet import BitNet

WIDTH = 32
WIDE = {"model": {"width": 2 * WIDTH}}
RATES = (1e-3, 2e-3, 5e-3, 1.2e-2)

CLAIM = Claim(
    slug="bitnet",
    version=2,
    says="At twice the width a ternary language model is as good as one in full precision.",
    kind="as good as",
    metric=BITS,
    delta=0.02,
    design=Pretrain(
        SourceCode(width=WIDTH, depth=3, context=128, steps=600, batch=8), measures=(bits_per_byte, weight_bytes)
    ),
    arms={
        "full": Arm(
            "full precision, width h, with or without inner norms as validation chooses",
            {"prepare": InnerNorms()},
            tune={"learning_rate": RATES, "norms": (False, True)},
        ),
        "ternary 2h": Arm(
            "ternary by the median, width 2h: about 4 times the parameters",
            {"modifiers": (BitNet.paper(scale="median"),), **WIDE},
        ),
        "ternary h": Arm("ternary by the median, width h", {"modifiers": (BitNet.paper(scale="median"),)}),
        "mean 2h": Arm("ternary by the mean, width 2h", {"modifiers": (BitNet.paper(scale="mean"),), **WIDE}),
        "full 2h": Arm("full precision, width 2h, norms as for width h", {"prepare": InnerNorms(), **WIDE}),
    },
    baseline="full",
    method="ternary 2h",
    floor="ternary h",
    ablations=("mean 2h",),
    reported=("full 2h",),
    looks=(5, 10, 20),
    tune={"learning_rate": RATES},
    metrics=(WEIGHT_BYTES, PROJECTION_BYTES),
    equal=("tokens",),
    parity="Equal tokens in the same order; last step. At width 2h the blocks have about four times the parameters and"
    " operations; what is saved is bytes.",
    minutes=45,
    use_when="the bytes of the weights matter more than operations",
    otherwise="full precision of half the width",
    reason="The baseline of version 1 carried inner norms that cost it 0.3 bits (plain model 2.755, with norms 3.049);"
    " now validation chooses.",
    toy={"width": 16},
    golden={"full": {BITS.name: 7.9062}, "ternary 2h": {BITS.name: 7.10962}},
)
