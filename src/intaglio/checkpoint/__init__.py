"""Checkpoint: a model, its tokenizer, and the record of the steps applied to it (`intaglio.json`).

    from intaglio.checkpoint import load

    checkpoint = load("smollm2")
    checkpoint.save("out/")

- `checkpoint`: `Checkpoint`, the object that every method is applied to, and saving.
- `loading`: `load`; reading config, record, class and tokenizer alone; dtypes and devices by name.
- `quantizer_hook`: loading weights into replaced modules.
- `record`: `Record` and its `StepRecord`s.
- `resolve`: name resolution, directory checks, digests, other files beside the weights.
"""

from __future__ import annotations

from intaglio.checkpoint.checkpoint import Checkpoint
from intaglio.checkpoint.loading import (
    DTYPES,
    load,
    load_config,
    load_record,
    load_tokenizer,
    model_class,
    parse_device,
    parse_dtype,
)
from intaglio.checkpoint.record import RECORD, Record, StepRecord
from intaglio.checkpoint.resolve import LIVE_WEIGHTS, stat_fingerprint, weights_digest

__all__ = [
    "DTYPES",
    "LIVE_WEIGHTS",
    "RECORD",
    "Checkpoint",
    "Record",
    "StepRecord",
    "load",
    "load_config",
    "load_record",
    "load_tokenizer",
    "model_class",
    "parse_device",
    "parse_dtype",
    "stat_fingerprint",
    "weights_digest",
]
