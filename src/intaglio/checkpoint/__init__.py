"""Checkpoint: a model, its tokenizer, and the record of what was done to it (`intaglio.json`).

    from intaglio.checkpoint import load

    checkpoint = load("smollm2")
    checkpoint.save("out/")

- `kept`: `Checkpoint`, what every method is applied to, and how it is saved.
- `loading`: `load`; configuration, record, class and tokenizer alone; dtypes and devices by name.
- `rebuilding`: weights of live parts, read into modules that are not the stock ones.
- `record`: `Record` and its `StepRecord`s, and reading them.
- `files`: where a name leads, what is refused unread, digests and stamps, what lies beside the weights.
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
