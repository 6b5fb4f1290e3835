"""OMP transplant: rows of a new vocabulary from tokens that both models share, against rows that look at no donor."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.transplant import NATS, TUNED_NATS, Transplant
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.methods.weights.omp_transplant import OMPTransplant


def rows(method: str, **fields: Any) -> dict[str, Any]:
    """Return the settings of an arm."""
    return {"transplant": OMPTransplant(donor="donor", method=method, **fields)}  # type: ignore[arg-type]


CLAIM = Claim(
    slug="omp_transplant",
    version=1,
    says="Right after a small Llama got another one's tokenizer, new rows coded by orthogonal matching pursuit lower"
    " the log-perplexity of held-out source against the best rows that look at no donor.",
    metric=NATS,
    delta=0.1,
    design=Transplant(),
    arms={
        "untaught": Arm(
            "the best of zero rows, the mean row, rows drawn with the base's mean and covariance, and random rows",
            rows("zero"),
            tune={"method": ("zero", "mean", "john_hewitt", "randn")},
        ),
        "omp": Arm("orthogonal matching pursuit", rows("omp"), tune={"k": (4, 8, 16, 32)}),
        "own": Arm("the base with its own tokenizer, nothing swapped"),
        "omp-64": Arm("OMP with the paper's 64 atoms, over half of this donor's width", rows("omp") | {"k": 64}),
        "mean": Arm("the mean of the base's rows", rows("mean") | {"method": "mean"}),
        "subword": Arm("the mean of the rows of the base's own pieces", rows("subword") | {"method": "subword"}),
        "linear": Arm(
            "least squares from the donor's space to the base's over all shared tokens",
            rows("linear") | {"method": "linear"},
        ),
    },
    baseline="untaught",
    method="omp",
    ceiling="own",
    ablations=("omp-64",),
    reported=("mean", "subword", "linear"),
    crossed=True,
    unit_names=("training seed", "document"),
    looks=(4,),  # both models of a seed take minutes
    closed=("k",),
    metrics=(TUNED_NATS,),
    equal=("tokens",),
    parity="All arms of a seed begin with the same base and the same donor; fine-tuning sees the same windows; four"
    " choices each on validation documents.",
    minutes=45,
    use_when="a model must read another one's tokenizer, and that model is at hand",
    otherwise="`method: linear`, which was as good here, or zero rows where there is no donor",
    golden={"untaught": {NATS.name: 2.48702}, "omp": {NATS.name: 2.49199}},
)
