"""DSnoT: refining Wanda's mask without training lowers the output error of the projections."""

from __future__ import annotations

from intaglio.evidence.designs.measures import LOG_PERPLEXITY, OUTPUT_ERROR, log_perplexity, output_error
from intaglio.evidence.designs.one_shot import OneShot
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.methods.weights.dsnot import DSnoT
from intaglio.methods.weights.sparsegpt import SparseGPT
from intaglio.methods.weights.wanda import Wanda

CLAIM = Claim(
    slug="dsnot",
    version=2,
    says="Refining Wanda's mask without training brings the pruned layers closer to the dense ones.",
    metric=OUTPUT_ERROR,
    delta=0.03,
    design=OneShot(
        SmolLM2Wikipedia(samples=16, length=128, documents_run=12, documents_pilot=8, tokens=128),
        measures=(output_error, log_perplexity),
    ),
    arms={
        "wanda": Arm("Wanda, 50 % zeros in each row", {"method": Wanda(sparsity=0.5)}),
        "dsnot": Arm("the same mask refined by DSnoT", {"method": DSnoT(sparsity=0.5)}),
        "dense": Arm("the model as it is"),
        "dsnot 70 %": Arm("DSnoT, 70 % zeros", {"method": DSnoT(sparsity=0.7)}),
        "wanda 70 %": Arm("Wanda, 70 % zeros", {"method": Wanda(sparsity=0.7)}),
        "sparsegpt": Arm("SparseGPT, 50 %, which changes kept weights", {"method": SparseGPT(sparsity=0.5, block=128)}),
    },
    baseline="wanda",
    method="dsnot",
    ceiling="dense",
    ablations=("dsnot 70 %",),
    reported=("wanda 70 %", "sparsegpt"),
    unit_names=("calibration draw",),
    # A pass of calibration on SmolLM2 alone takes more than 20 seconds of a core.
    looks=(5, 10),
    metrics=(LOG_PERPLEXITY,),
    equal=("tokens",),
    parity="All arms of a unit see the same calibration tokens and have equally many zeros; nothing is tuned.",
    minutes=45,
    use_when="you prune in one shot, cannot change kept weights, and have a minute more",
    otherwise="Wanda alone",
    reason="At 70 % the model is ruined (6.5 nats against 3.3) and draws differ by 0.09. The layer error of version 1"
    " mixed all matrices and was 97 % attention sink: now a mean of ratios, first token left out.",
    toy={"depth": 2, "width": 32},
    golden={"wanda": {OUTPUT_ERROR.name: 0.0233381}, "dsnot": {OUTPUT_ERROR.name: 0.0149592}},
)
