"""Search of hyperparameters by whole trainings: random search, and Optuna's tree-structured Parzen estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.splits import generator

Ranges = Mapping[str, tuple[float, float]]
Trial = Callable[[Mapping[str, float]], float]
"""Trains under some hyperparameters, and returns the value to minimise."""


def search(trial: Trial, ranges: Ranges, trials: int, sampler: Literal["random", "tpe"], seed: int) -> None:
    """Run trials whose hyperparameters are drawn uniformly, or by TPE from the results so far.

    Raises:
        IntaglioError: Optuna is not installed.
    """
    if sampler == "random":
        draws = generator(f"random search:{seed}")
        for _ in range(trials):
            trial({name: float(draws.uniform(*bounds)) for name, bounds in ranges.items()})
        return
    try:
        import optuna
    except ImportError:
        raise IntaglioError("TPE needs the package optuna: pip install 'intaglio[evidence]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(suggested: optuna.Trial) -> float:
        return trial({name: suggested.suggest_float(name, *bounds) for name, bounds in ranges.items()})

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed % 2**32))
    study.optimize(objective, n_trials=trials)
