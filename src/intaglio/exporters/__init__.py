"""`export`: write a checkpoint in a format that stock transformers loads without Intaglio.

    export(checkpoint, "out/", "safetensors")            # plain weights: pruned, trained, merged
    export(checkpoint, "out/", "compressed-tensors")     # low-bit integers, `pack-quantized`
    export(checkpoint, "out/", "bitnet")                 # ternary, transformers' own format
    export(checkpoint, "out/", "sentence-transformers")  # an encoder, as stock modules

A checkpoint that a format cannot represent exactly is refused, never approximated.

- `compressed_tensors`, `bitnet`: the two formats of quantized weights.
- `base`: their common part.
- `sentence_transformers`: encoders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.exporters import bitnet, compressed_tensors, sentence_transformers
from intaglio.exporters.base import Exported, write
from intaglio.methods.registry import get_method

Format = Literal["safetensors", "compressed-tensors", "bitnet", "sentence-transformers"]
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
        checkpoint: the checkpoint; it stays unchanged.
        path: the directory to make.
        format: `safetensors` (default) for plain weights, `compressed-tensors` (its `pack-quantized`; the package of
            that name is needed to load it) or `bitnet` for weights quantized by `bitnet`; `sentence-transformers` for
            an encoder that was trained on pairs.
        overwrite: replace an existing directory. Default False.

    Raises:
        IntaglioError: an unknown format, a checkpoint that the format cannot hold, or the directory is taken.
    """
    if format not in FORMATS:
        raise IntaglioError(f"the format {format!r} is unknown; {did_you_mean(str(format), FORMATS)}")
    target = Path(path)
    atomic_io.check_target(target, overwrite)
    if format == sentence_transformers.FORMAT:
        with atomic_io.directory(target, overwrite) as temporary:
            sentence_transformers.write(checkpoint, temporary)
        return target
    if format == "safetensors":
        if checkpoint.kind == "runtime":
            slugs = sorted({str(part.get("slug")) for part in checkpoint.record.live})
            merging = [slug for slug in slugs if "merge" in get_method(slug).model_fields]
            way = (
                f"a step `{merging[0]}: {{merge: true}}` merges those of {merging[0]} into plain weights"
                if merging
                else "export quantized weights as compressed-tensors or bitnet"
            )
            raise IntaglioError(
                f"the checkpoint has runtime parts ({', '.join(slugs)}), which plain weights cannot represent; {way}"
            )
        exported = Exported({}, {})
    else:
        exported = _QUANTIZED[format](checkpoint)
    with atomic_io.directory(target, overwrite) as temporary:
        write(checkpoint, exported, temporary)
    return target


__all__ = ["FORMATS", "Format", "export"]
