"""R-Sparse: columns by scaled scores and a low rank for the rest against plain thresholds, at equal bytes read."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.base import Measured, Values
from intaglio.evidence.designs.measures import LOG_PERPLEXITY, log_perplexity
from intaglio.evidence.designs.one_shot import OneShot
from intaglio.evidence.engine.claim import Arm, Claim, Metric
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.measures.input_sparsity import count_inputs
from intaglio.methods.activations.r_sparse import RSparse, measure_bytes_read

READ = Metric("share of the weights read", "share", continuous=False)


def sparse_log_perplexity(measured: Measured) -> Values:
    """Return the loss of each document, every token sparse, and the share of the projections' weights read there."""
    with count_inputs(measured.checkpoint.model) as counters:
        values = log_perplexity(measured)
    left_out = {name: counter.left_out for name, counter in counters.items()}
    return {**values, READ.name: measure_bytes_read(measured.checkpoint, left_out).share}


def sparse(how: str = "r_sparse", **fields: Any) -> dict[str, Any]:
    """Return the settings of an arm at 50 %."""
    return {"method": RSparse(sparsity=0.5, how=how, **fields)}  # type: ignore[arg-type]


CLAIM = Claim(
    slug="r_sparse",
    version=3,
    says="At equal bytes read, columns chosen by scaled scores with a low rank for the rest lose less than thresholds"
    " on activations alone.",
    metric=LOG_PERPLEXITY,
    delta=0.02,
    design=OneShot(SmolLM2Wikipedia(samples=8), measures=(sparse_log_perplexity,)),
    arms={
        "plain": Arm("|x| above a threshold, 50 % (TEAL with a uniform allocation)", sparse("teal")),
        "r_sparse": Arm("R-Sparse, α of each projection by its output error, 50 %", sparse(alpha="error")),
        "dense": Arm("the model as it is"),
        "columns alone": Arm("|x| times the column's norm, no low rank, 50 %", sparse(low_rank=False)),
        "α 0.95": Arm("R-Sparse, α 0.95 everywhere, 50 %", sparse(alpha=0.95)),
        "low rank": Arm("a low rank alone, 50 %", sparse(alpha=0.0)),
        "TEAL": Arm(
            "|x| above a threshold, shares of the projections by TEAL's greedy allocation, 50 %",
            sparse("teal", allocation="greedy"),
        ),
    },
    baseline="plain",
    method="r_sparse",
    ceiling="dense",
    ablations=("columns alone", "α 0.95", "low rank"),
    reported=("TEAL",),
    crossed=True,
    unit_names=("calibration draw", "document"),
    # Measuring SmolLM2 on 24 documents alone takes ten seconds of a core.
    looks=(4, 8, 16),
    metrics=(READ,),
    equal=("tokens",),
    parity="The same calibration tokens; all arms but the dense one read half of the weights on them, factors of low"
    " rank counted. On the documents the shares differ a little. Nothing is tuned.",
    minutes=45,
    use_when="decoding is bound by the bytes of the weights, and factors of low rank fit in memory",
    otherwise="TEAL's greedy allocation",
    advice="It makes no difference to thresholds on activations alone here. On three draws TEAL's greedy allocation of"
    " these thresholds (`how: teal`, `allocation: greedy`) was well ahead of both: take that.",
    reason="The search of 64 evaluations over 210 projections in version 1 overfitted its calibration draw; since"
    " version 2, α follows from each projection's own output error. The probe of version 2 found eight draws too few.",
    toy={"depth": 2, "width": 64, "steps": 60},
    golden={"plain": {LOG_PERPLEXITY.name: 2.30408}, "r_sparse": {LOG_PERPLEXITY.name: 2.29772}},
)
