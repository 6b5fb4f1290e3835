"""Singular value decompositions of weights, cached in the user's directory under the weight's hash.

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
MIN_SIDE = 256
"""Narrower side from which on a decomposition is cached: it takes some tens of milliseconds there."""
FLOPS = 22
"""Operations of a decomposition over (the narrower side)² · (the wider side)."""


def low_rank_pair(weight_OI: Tensor, rank: int, max_rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the factors V_rᵀ [R, I] and (U_r S_r)ᵀ [R, O] of W = U S Vᵀ, float32, decomposed in float64.

    Args:
        weight_OI: W.
        rank: R, at most the narrower side.
        max_rank: triples to cache, at least R, for other ranks of the same weight. Default: R.
    """
    max_rank = max(rank, min(max_rank or rank, *weight_OI.shape))
    if min(weight_OI.shape) < MIN_SIDE:
        return _decompose(weight_OI, rank)
    file = _cache_file(weight_OI)
    cached = _read(file)
    if cached is None or len(cached[0]) < rank:
        cached = _decompose(weight_OI, max_rank)
        # A cache that cannot be written costs time, and nothing else.
        with contextlib.suppress(IntaglioError):
            atomic_io.write_bytes(file, save({"down": cached[0], "up": cached[1]}))
    down_RI, up_RO = (part[:rank].to(weight_OI.device) for part in cached)
    return down_RI, up_RO


def _decompose(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U_OK, S_K, V_KI = torch.linalg.svd(weight_OI.detach().to("cpu", torch.float64), full_matrices=False)
    up_RO = (U_OK[:, :rank] * S_K[:rank]).T
    return V_KI[:rank].float().contiguous(), up_RO.float().contiguous()


def _cache_file(weight_OI: Tensor) -> Path:
    # The last bits of a decomposition depend on the number of threads.
    raw = weight_OI.detach().cpu().contiguous().view(torch.uint8)
    about = f"{list(weight_OI.shape)} {weight_OI.dtype} {torch.get_num_threads()} {torch.__version__}"
    digest = hashlib.sha256(about.encode() + raw.numpy().tobytes()).hexdigest()
    return assets.cache_dir() / FOLDER / f"{digest[:32]}.safetensors"


def _read(file: Path) -> tuple[Tensor, Tensor] | None:
    """Return the cached factors; None where there are none, or they are damaged."""
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
        return tensors["down"], tensors["up"]
    except (OSError, KeyError, SafetensorError):
        return None
