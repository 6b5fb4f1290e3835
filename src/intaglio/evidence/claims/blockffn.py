"""BlockFFN: ReLU-routed experts with activation locality and chunk sparsification, against TopK experts."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.base import Measured, Values
from intaglio.evidence.designs.measures import BITS, CHUNK_SPARSITY, TOKEN_SPARSITY, activation_sparsity, bits_per_byte
from intaglio.evidence.designs.training import Pretrain
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.activations.blockffn import BlockFFN

EXPERTS, K, SPARE = 16, 3, 0.05
SIZES: dict[str, Any] = {"experts": EXPERTS, "expert_width": 16}


def bits_at_equal_experts(measured: Measured) -> Values:
    """Return bits and sparsities; a training of BlockFFN that uses more than K experts a token counts as diverged."""
    values = {**bits_per_byte(measured), **activation_sparsity(measured)}
    (method,) = measured.settings["modifiers"]
    active = EXPERTS * (1 - float(values[TOKEN_SPARSITY.name]))  # type: ignore[arg-type]
    if method.router == "relu" and method.chunk_weight and active > K * (1 + SPARE):
        values[BITS.name] = None
    return values


def experts(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm."""
    return {"modifiers": (BlockFFN(**SIZES, **fields),)}


BARE = {"locality": 0.0, "chunk_weight": 0.0}
CLAIM = Claim(
    slug="blockffn",
    version=2,
    says="With no more activated parameters, experts routed by ReLU with chunk-level sparsity predict better than TopK"
    " experts.",
    metric=BITS,
    delta=0.02,
    design=Pretrain(
        SourceCode(width=64, depth=3, context=128, steps=500, batch=8, tokens=128), measures=(bits_at_equal_experts,)
    ),
    arms={
        "topk": Arm(
            f"softmax over {EXPERTS} experts, the {K} largest, with the balance loss",
            experts(router="topk", k=K),
            # As many trials as the method's.
            tune={"learning_rate": (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2)},
        ),
        "blockffn": Arm(
            "ReLU and RMSNorm, with activation locality and chunk sparsification",
            experts(chunk=8),
            tune={"learning_rate": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "chunk_weight": (0.05, 0.08)},
        ),
        "without losses": Arm("the same without the two losses: more experts a token", experts(**BARE)),
        "without norm": Arm("ReLU alone, without norm and losses", experts(norm="none", **BARE)),
        "ReMoE": Arm(f"ReLU alone, with ReMoE's penalty held at {K} experts", experts(router="remoe", k=K)),
        "plain MLP": Arm("all experts with a score of 1", experts(router="none")),
    },
    baseline="topk",
    method="blockffn",
    ceiling="without losses",
    ablations=("without norm",),
    reported=("ReMoE", "plain MLP"),
    looks=(5, 10),
    metrics=(TOKEN_SPARSITY, CHUNK_SPARSITY),
    equal=("tokens",),
    parity=f"Activated parameters: TopK uses {K} of {EXPERTS} experts a token, and a training of BlockFFN that uses"
    f" more than {K * (1 + SPARE):g} on the files measured counts as diverged. Equal tokens, ten trials each.",
    minutes=60,
    use_when="neighbouring tokens should share their experts, as in speculative decoding on a device",
    otherwise="TopK experts",
    reason="The method's grid of version 1 lacked the rate that every other arm chose, and three of ten of its"
    " trainings used too many experts. Smaller model, so that a run takes half a minute.",
    toy={"width": 32},
    golden={"topk": {BITS.name: 7.8593}, "blockffn": {BITS.name: 7.75504}},
)
