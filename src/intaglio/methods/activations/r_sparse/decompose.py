"""Singular value decompositions of weights, kept in the user's cache under the weight's hash.

Dimension letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from intaglio import atomic_io
from intaglio.data import assets
from intaglio.errors import IntaglioError

FOLDER = "decompositions"
LEAST = 256
"""Narrower side from which on a decomposition is worth keeping: it takes some tens of milliseconds there."""
FLOPS = 22
"""Operations of a decomposition over (the narrower side)² · (the wider side)."""


def pair(weight_OI: Tensor, rank: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The low-rank factors V_rᵀ [R, I] and (U_r S_r)ᵀ [R, O] of W = U S Vᵀ, float32, of a decomposition in float64.

    Args:
        weight_OI: W.
        rank: R, at most the narrower side.
        most: triples that are kept for later, at least R: other ranks of the same weight are then at hand. Default: R.
    """
    most = max(rank, min(most or rank, *weight_OI.shape))
    if min(weight_OI.shape) < LEAST:
        return _decomposed(weight_OI, rank)
    file = _file(weight_OI)
    known = _read(file)
    if known is None or len(known[0]) < rank:
        known = _decomposed(weight_OI, most)
        # A cache that cannot be written costs time, and nothing else.
        with contextlib.suppress(IntaglioError):
            atomic_io.write_bytes(file, save({"down": known[0], "up": known[1]}))
    down_RI, up_RO = (part[:rank].to(weight_OI.device) for part in known)
    return down_RI, up_RO


def _decomposed(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U_OK, S_K, V_KI = torch.linalg.svd(weight_OI.detach().to("cpu", torch.float64), full_matrices=False)
    up_RO = (U_OK[:, :rank] * S_K[:rank]).T
    return V_KI[:rank].float().contiguous(), up_RO.float().contiguous()


def _file(weight_OI: Tensor) -> Path:
    """Where the factors of a weight are; the last bits of a decomposition depend on the number of threads."""
    raw = weight_OI.detach().cpu().contiguous().view(torch.uint8)
    about = f"{list(weight_OI.shape)} {weight_OI.dtype} {torch.get_num_threads()} {torch.__version__}"
    digest = hashlib.sha256(about.encode() + raw.numpy().tobytes()).hexdigest()
    return assets.cache_dir() / FOLDER / f"{digest[:32]}.safetensors"


def _read(file: Path) -> tuple[Tensor, Tensor] | None:
    """What is kept; None where nothing is, or it is damaged and to be made again."""
    if not file.is_file():
        return None
    try:
        found = load_file(file)
        return found["down"], found["up"]
    except (OSError, KeyError, SafetensorError):
        return None


__all__ = ["FLOPS", "FOLDER", "LEAST", "pair"]
