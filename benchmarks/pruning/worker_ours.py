"""Prune one variant with intaglio; prints one JSON line; same interface as `worker_peer.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import common
import transformers

import intaglio
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.methods.weights.sparsegpt import SparseGPT
from intaglio.methods.weights.wanda import Wanda

METHODS: dict[str, Any] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}


def pruning_call(arguments: argparse.Namespace, checkpoint: Any) -> Callable[[], object]:
    """Return the timed call: the method's `apply`."""
    amount = {"pattern": arguments.pattern} if arguments.pattern else {"sparsity": arguments.sparsity}
    method = METHODS[arguments.method](**amount)
    if arguments.method == "magnitude":
        return lambda: method.apply(checkpoint)
    ids_NT = common.load_ids(arguments.calibration)
    return lambda: method.apply(checkpoint, calibration=ids_NT, batch_size=arguments.batch_size)


def main() -> None:
    imports_mib = common.resident_mib()
    arguments = common.worker_arguments("Prune with intaglio.")
    checkpoint = intaglio.load(str(arguments.model))
    cost = common.measure(pruning_call(arguments, checkpoint))
    counts = common.zeros(checkpoint.model)
    if arguments.output:
        checkpoint.save(arguments.output)
    versions = {"library": f"intaglio {version('intaglio')}", "transformers": transformers.__version__}
    common.emit({**versions, "imports_mib": imports_mib, **cost, **counts})


if __name__ == "__main__":
    main()
