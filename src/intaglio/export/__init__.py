"""`export`: a checkpoint in a format that stock transformers loads by itself, without Intaglio.

    export(checkpoint, "out/", "safetensors")            # plain weights: pruned, trained, merged
    export(checkpoint, "out/", "compressed-tensors")     # whole numbers of few bits, `pack-quantized`
    export(checkpoint, "out/", "bitnet")                 # ternary, transformers' own format

A format holds what it holds: where the checkpoint computes anything that the format cannot say, it is refused, and
never written as something near to it.

- `compressed`, `bitnet`: the two formats of quantized weights.
- `quantized`: what both ask of a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.export import bitnet, compressed_tensors
from intaglio.export.base import Exported, write
from intaglio.methods import base

Format = Literal["safetensors", "compressed-tensors", "bitnet"]
FORMATS: tuple[Format, ...] = get_args(Format)
_QUANTIZED: dict[str, Callable[[Checkpoint], Exported]] = {
    "compressed-tensors": compressed_tensors.exported,
    "bitnet": bitnet.exported,
}


def export(
    checkpoint: Checkpoint, path: str | os.PathLike[str], format: Format = "safetensors", overwrite: bool = False
) -> Path:
    """Write a checkpoint for stock transformers, atomically: weights, configuration, tokenizer.

    Args:
        checkpoint: what is written; it stays as it is.
        path: the directory to make.
        format: `safetensors` (default) for plain weights, `compressed-tensors` (its `pack-quantized`; the package of
            that name is needed to load it) or `bitnet` for those that `bitnet` quantized.
        overwrite: replace a directory that is there. Default False.

    Raises:
        IntaglioError: an unknown format, a checkpoint that the format cannot hold, or the directory is taken.
    """
    if format not in FORMATS:
        raise IntaglioError(f"the format {format!r} is unknown; {did_you_mean(str(format), FORMATS)}")
    target = Path(path)
    atomic_io.check_target(target, overwrite)
    if format == "safetensors":
        if checkpoint.kind == "runtime":
            slugs = sorted({str(part.get("slug")) for part in checkpoint.record.live})
            merging = [slug for slug in slugs if "merge" in base.get(slug).model_fields]
            way = (
                f"a step `{merging[0]}: {{merge: true}}` makes plain ones of those of {merging[0]}"
                if merging
                else "quantized weights have the formats compressed-tensors and bitnet"
            )
            raise IntaglioError(
                f"the checkpoint has live parts ({', '.join(slugs)}), which plain weights cannot say; {way}"
            )
        found = Exported({}, {})
    else:
        found = _QUANTIZED[format](checkpoint)
    with atomic_io.directory(target, overwrite) as temporary:
        write(checkpoint, found, temporary)
    return target


__all__ = ["FORMATS", "Format", "export"]
