"""Self-tuning networks: tuning dropouts and weight decay in one training against random search at equal operations."""

from __future__ import annotations

from intaglio.evidence.designs.classify import TEST_LOSS
from intaglio.evidence.designs.tune_regularizers import VALIDATION_LOSS, TuneRegularizers
from intaglio.evidence.engine.claim import Arm, Claim

RATES = (3e-4, 1e-3, 3e-3)

CLAIM = Claim(
    slug="stn",
    version=1,
    says="At equal multiply-adds, one training that tunes its own regularization has a lower test loss than the best of"
    " a random search.",
    metric=TEST_LOSS,
    delta=0.02,
    design=TuneRegularizers(),
    arms={
        "random search": Arm(
            "trainings under random hyperparameters",
            {"tuner": "random"},
            tune={"learning_rate": RATES, "trials": (4, 8)},
        ),
        "STN": Arm(
            "one training, the hyperparameters tuned on held-out images",
            {"tuner": "stn"},
            tune={"learning_rate": RATES, "hyper_learning_rate": (3e-3, 1e-2)},
        ),
        "far start": Arm("STN with dropouts that begin at 0.6", {"tuner": "stn", "start": 0.6}),
        "replay": Arm("a plain network under the schedule that STN found", {"tuner": "replay"}),
        "TPE": Arm("trainings chosen by Optuna's TPE", {"tuner": "tpe"}),
        "default": Arm("dropout 0.05 and next to no weight decay", {"tuner": "fixed"}),
    },
    baseline="random search",
    method="STN",
    ablations=("far start", "replay"),
    reported=("TPE", "default"),
    looks=(5, 10, 20),
    closed=("trials",),
    tune_units=2,
    metrics=(VALIDATION_LOSS,),
    equal=("flops",),
    parity="The same 200 training and 300 validation images, initial weights and multiply-adds, the second weights and"
    " hyper steps of STN counted; every arm is tested at its least validation loss, on images that no arm has seen.",
    minutes=60,
    use_when="several dropouts and penalties are to be tuned and there is compute for two or three trainings",
    otherwise="a random search with early stopping",
    golden={
        "random search": {TEST_LOSS.name: 2.32469, VALIDATION_LOSS.name: 2.3103},
        "STN": {TEST_LOSS.name: 2.32047, VALIDATION_LOSS.name: 2.30629},
    },
)
