"""DKVB: classes learned one after another, against running class means."""

from __future__ import annotations

from intaglio.evidence.designs.class_incremental import FIRST_TASK, INCREMENTAL, LOSS, MEMORY, ClassIncremental
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.methods.activations.dkvb import DKVB

METHOD = DKVB(num_codebooks=256, num_pairs=256, key_dim=14)
PROBE_RATE = 0.01
"""The best of 0.01, 0.03, 0.1 and 0.3 on validation texts, task by task."""

CLAIM = Claim(
    slug="dkvb",
    version=1,
    says="Learning 20 classes two at a time, without rehearsal or task boundaries, a discrete key-value bottleneck on a"
    " frozen text encoder is more accurate over all classes than running class means.",
    metric=INCREMENTAL,
    delta=2.0,
    design=ClassIncremental(),
    arms={
        "means": Arm(
            "running class means",
            {"baseline": "nearest mean"},
            tune={"metric": ("euclidean", "cosine"), "shrinkage": (0.0, 0.1, 0.3)},
        ),
        "dkvb": Arm("DKVB, keys fitted to unlabelled texts of all classes", {"method": METHOD, "keys": "own"}),
        "other keys": Arm("DKVB, keys fitted to Wikipedia", {"method": METHOD, "keys": "others"}),
        "all at once": Arm("DKVB, all classes in one task", {"method": METHOD, "keys": "own", "at_once": True}),
        "slda": Arm(
            "running class means with a shared covariance",
            {"baseline": "nearest mean", "metric": "slda", "shrinkage": 0.05},
        ),
        "linear probe": Arm("softmax regression by SGD", {"baseline": "linear probe", "learning_rate": PROBE_RATE}),
        "linear probe at once": Arm(
            "softmax regression, all classes in one task",
            {"baseline": "linear probe", "at_once": True, "learning_rate": 0.3},
        ),
    },
    baseline="means",
    method="dkvb",
    ceiling="linear probe at once",
    ablations=("other keys", "all at once"),
    reported=("slda", "linear probe"),
    tune={"learning_rate": (10.0, 30.0, 100.0), "epochs": (10, 30)},
    closed=("metric", "shrinkage"),
    unit_names=("order of classes and training draw",),
    metrics=(FIRST_TASK, LOSS, MEMORY),
    parity="The same embeddings of MiniLM, the same training texts in the same order of tasks, one decision over all 20"
    " classes. Six trials each on validation texts. Numbers kept are printed: the bottleneck keeps far more.",
    minutes=30,
    use_when="classes arrive one after another, old texts cannot be kept, and memory is plentiful",
    otherwise="running class means with a shared covariance",
    toy={"training_texts": 12},
    golden={"means": {LOSS.name: 0.0928801}, "dkvb": {LOSS.name: 1.72528}},
)
