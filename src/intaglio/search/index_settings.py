"""The settings that an index records: kind, chunk size, BM25 and encoder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from intaglio.errors import IntaglioError
from intaglio.search.encoders import DEFAULT_ENCODER, TextEncoder, describe_encoder, resolve_encoder
from intaglio.search.lexical import BM25, Analyzer, check_installed

KINDS = ("bm25", "dense", "sparse", "hybrid")


def new_settings(
    kind: str,
    encoder: str | os.PathLike[str] | TextEncoder | None,
    chunk: int,
    bm25: BM25,
    language: str,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], TextEncoder | None]:
    """Check the options of `Index.create`; return the settings that are recorded, and the encoder."""
    if kind not in KINDS:
        raise IntaglioError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 0 or 0 < chunk < 50:
        raise IntaglioError(f"chunk is {chunk!r}; accepted: 0 (whole documents) or at least 50 characters")
    if not (bm25.k1 >= 0 and math.isfinite(bm25.k1)) or not 0 <= bm25.b <= 1:
        raise IntaglioError(f"k1 is {bm25.k1} and b is {bm25.b}; accepted: k1 of at least 0, b between 0 and 1")
    settings: dict[str, Any] = {"kind": kind, "chunk": chunk, "bm25": None, "encoder": None}
    loaded: TextEncoder | None = None
    if kind in ("bm25", "hybrid"):
        Analyzer(language)
        settings["bm25"] = {"language": language, "k1": bm25.k1, "b": bm25.b}
    if kind == "sparse":
        check_installed()
    if kind == "bm25":
        if encoder is not None or options:
            raise IntaglioError("a bm25 index has no encoder; one of kind dense, sparse or hybrid has")
    else:
        loaded = resolve_encoder(encoder or DEFAULT_ENCODER[kind], options)
        if kind in ("dense", "sparse") and loaded.kind != kind:
            raise IntaglioError(f"the encoder {loaded.name!r} is {loaded.kind}, but the index is to be {kind}")
        settings["encoder"] = describe_encoder(loaded)
    return settings, loaded


def space(value: Any) -> Any:
    """Return what identifies a setting: the fingerprint of an encoder, not its name."""
    return value["fingerprint"] if isinstance(value, dict) and "fingerprint" in value else value


__all__ = ["new_settings", "space"]
