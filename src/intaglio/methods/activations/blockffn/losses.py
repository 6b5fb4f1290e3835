"""Auxiliary losses that make tokens take few experts, and neighbours the same.

Each takes the routers' outputs of all layers at once, raw [N, K, E], and is the mean over layers. All is float32.

Dimension letters: N tokens, K layers, E experts, C chunks, L tokens of a chunk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.methods.activations.blockffn.chunk_index import ChunkIndex
from intaglio.methods.activations.blockffn.router import EPS, BlockFFNConfig, expert_shares, normalize


def locality(raw_NKE: Tensor, index: ChunkIndex, steepness: float = 100.0) -> Tensor:
    """Return the activation locality loss: how badly a token's pattern predicts that of its successor, in nats.

        mean over pairs (t - 1, t) and experts of BCE(σ(steepness raw_{t-1}), σ(steepness raw_t))

    The second is not detached: both move towards each other. It is about 0 where neighbours are alike and
    steepness |raw| is large, and ln 2 at raw = 0. 0 where no token has a neighbour in its document.

    Args:
        raw_NKE: the routers' outputs.
        index: of the tokens.
        steepness: of the sigmoid. Default 100.
    """
    later = index.follows_N.nonzero()[:, 0]
    if not later.numel():
        return raw_NKE.new_zeros((), dtype=torch.float32)
    steep_NKE = steepness * raw_NKE.float()
    return F.binary_cross_entropy_with_logits(steep_NKE[later - 1], steep_NKE[later].sigmoid())


def chunk_firing(raw_NKE: Tensor, index: ChunkIndex, config: BlockFFNConfig) -> Tensor:
    """Return the chunk sparsification loss: the probability that some token of a chunk takes an expert.

        1 - mean over chunks and experts of exp( Σ_t in chunk log(1 - p_te + 1e-5) )

    with p the shares of `router`, before the gain, taken for probabilities. A chunk that its document does not fill is
    filled up with tokens that take nothing. Between 1/E (all tokens take one expert) and min(1, L/E); 1/E whatever the
    routers say for L = 1.

    Args:
        raw_NKE: the routers' outputs.
        index: of the tokens.
        config: of the layers.
    """
    return chunk_firing_from_shares(expert_shares(normalize(raw_NKE, config)), index)


def chunk_firing_from_shares(p_NKE: Tensor, index: ChunkIndex) -> Tensor:
    """Return the same loss from the shares p, each token's at most 1 together; 0 where there is no token."""
    if not index.size_C.numel():
        return p_NKE.new_zeros(())
    # Padding takes nothing, and neither does what a short chunk lacks.
    log_NKE = torch.log(1 - p_NKE + EPS) * index.real_N[:, None, None]
    rest_CKE = p_NKE.new_zeros((len(index.size_C), *p_NKE.shape[1:])).index_add(0, index.chunk_N, log_NKE)
    missing_C = (index.length - index.size_C).to(p_NKE.dtype)
    return 1 - torch.exp(rest_CKE + math.log1p(EPS) * missing_C[:, None, None]).mean()


def balance(raw_NKE: Tensor, index: ChunkIndex, k: int) -> Tensor:
    """Return the auxiliary loss of `topk`: E Σ_e importance_e load_e, 1 where all experts are taken equally.

    Importance is the mean of the softmax, load the share of all choices that fell on the expert (Fedus et al., Switch
    Transformers, JMLR 2022).

    Args:
        raw_NKE: the routers' outputs.
        index: of the tokens.
        k: experts of a token.
    """
    probs_NKE = raw_NKE.float().softmax(-1)[index.real_N]
    if not len(probs_NKE):
        return raw_NKE.new_zeros((), dtype=torch.float32)
    chosen_NKE = torch.zeros_like(probs_NKE).scatter(-1, probs_NKE.detach().topk(k, dim=-1).indices, 1.0)
    load_KE = chosen_NKE.mean(0) / k
    return probs_NKE.shape[-1] * (probs_NKE.mean(0) * load_KE).sum(-1).mean()


def l1(raw_NKE: Tensor, index: ChunkIndex, k: int) -> Tensor:
    """Return the penalty of `remoe`.

        mean over tokens of Σ_e f_e ReLU(raw_e),   f_e = (E / k) (share of tokens that take e)

    Source: Wang et al., ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, ICLR 2025, section 3.

    Args:
        raw_NKE: the routers' outputs.
        index: of the tokens.
        k: target number of experts of a token.
    """
    a_NKE = F.relu(raw_NKE.float())[index.real_N]
    if not len(a_NKE):
        return raw_NKE.new_zeros((), dtype=torch.float32)
    share_KE = (a_NKE.detach() > 0).float().mean(0)
    return (a_NKE * share_KE * (a_NKE.shape[-1] / k)).sum(-1).mean()


def inactive_fraction(raw_NKE: Tensor, index: ChunkIndex, config: BlockFFNConfig) -> tuple[Tensor, Tensor]:
    """Return the share of experts that are inactive for a token (TLS) and throughout a chunk (CLS), for the log.

    Short chunks count, too.
    """
    if config.router == "none" or not index.size_C.numel():
        return raw_NKE.new_zeros(()), raw_NKE.new_zeros(())
    if config.router == "topk":
        assert config.k is not None
        active_NKE = torch.zeros_like(raw_NKE).scatter(-1, raw_NKE.topk(config.k, dim=-1).indices, 1.0)
    else:
        active_NKE = (raw_NKE > 0).to(raw_NKE.dtype)
    active_NKE = active_NKE * index.real_N[:, None, None]
    tokens = index.real_N.sum() * active_NKE[0].numel()
    union_CKE = active_NKE.new_zeros((len(index.size_C), *active_NKE.shape[1:]))
    union_CKE = union_CKE.index_add(0, index.chunk_N, active_NKE).clamp(max=1)
    return 1 - active_NKE.float().sum() / tokens, 1 - union_CKE.float().mean()
