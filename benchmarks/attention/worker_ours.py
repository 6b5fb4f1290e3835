"""Worker for our side, with the same weights and rules as a peer; prints one JSON line."""

from __future__ import annotations

from typing import Any

import common

import intaglio
from intaglio.masks import Bidirectional, set_visibility


def main() -> None:
    arguments = common.worker_options("Times intaglio.").parse_args()

    def make() -> Any:
        model: Any = intaglio.load(arguments.model, dtype="float32").model
        if arguments.variant != "stock":
            layers = range(arguments.start, model.config.num_hidden_layers)
            set_visibility(model, dict.fromkeys(layers, Bidirectional()))
        return model.base_model

    common.report(make, arguments)


if __name__ == "__main__":
    main()
