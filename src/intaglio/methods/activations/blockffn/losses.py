"""What is added to the loss, so that tokens take few experts and neighbours take the same.

Each takes the routers' outputs of all layers at once, raw [N, K, E], and is the mean over layers. All is float32.

Dimension letters: N tokens, K layers, E experts, C chunks, L tokens of a chunk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.methods.activations.blockffn.places import Places
from intaglio.methods.activations.blockffn.routing import EPS, Form, normalised, parts


def locality(raw_NKE: Tensor, places: Places, steep: float = 100.0) -> Tensor:
    """Activation locality: how badly a token's pattern tells that of the next one in its document, in nats.

        mean over pairs (t - 1, t) and experts of BCE(σ(steep raw_{t-1}), σ(steep raw_t))

    The second is not detached: both move towards each other. It is about 0 where neighbours are alike and
    steep |raw| is large, and ln 2 at raw = 0. 0 where no token has a neighbour.

    Args:
        raw_NKE: the routers' outputs.
        places: of the tokens.
        steep: of the sigmoid. Default 100.
    """
    later = places.follows_N.nonzero()[:, 0]
    if not later.numel():
        return raw_NKE.new_zeros((), dtype=torch.float32)
    steep_NKE = steep * raw_NKE.float()
    return F.binary_cross_entropy_with_logits(steep_NKE[later - 1], steep_NKE[later].sigmoid())


def chunk_firing(raw_NKE: Tensor, places: Places, form: Form) -> Tensor:
    """Chunk sparsification: the probability that some token of a chunk takes an expert, if its parts were chances.

        1 - mean over chunks and experts of exp( Σ_t in chunk log(1 - p_te + 1e-5) )

    with p the parts of `routing`, before the gain. A chunk that its document does not fill is filled up with tokens
    that take nothing. Between 1/E (all tokens take one expert) and min(1, L/E); 1/E whatever the routers say for L = 1.

    Args:
        raw_NKE: the routers' outputs.
        places: of the tokens.
        form: of the layers.
    """
    return chunk_firing_of(parts(normalised(raw_NKE, form)), places)


def chunk_firing_of(p_NKE: Tensor, places: Places) -> Tensor:
    """The same from p; 0 where there is no token.

    Args:
        p_NKE: parts, each token's at most 1 together.
        places: of the tokens.
    """
    if not places.size_C.numel():
        return p_NKE.new_zeros(())
    # Padding takes nothing, and neither does what a short chunk lacks.
    log_NKE = torch.log(1 - p_NKE + EPS) * places.real_N[:, None, None]
    rest_CKE = p_NKE.new_zeros((len(places.size_C), *p_NKE.shape[1:])).index_add(0, places.chunk_N, log_NKE)
    missing_C = (places.length - places.size_C).to(p_NKE.dtype)
    return 1 - torch.exp(rest_CKE + math.log1p(EPS) * missing_C[:, None, None]).mean()


def balance(raw_NKE: Tensor, places: Places, k: int) -> Tensor:
    """The auxiliary loss of `topk`: E Σ_e importance_e load_e, 1 where all experts are taken equally.

    Importance is the mean of the softmax, load the share of all choices that fell on the expert (Fedus et al., Switch
    Transformers, JMLR 2022).

    Args:
        raw_NKE: the routers' outputs.
        places: of the tokens.
        k: experts of a token.
    """
    share_NKE = raw_NKE.float().softmax(-1)[places.real_N]
    if not len(share_NKE):
        return raw_NKE.new_zeros((), dtype=torch.float32)
    chosen_NKE = torch.zeros_like(share_NKE).scatter(-1, share_NKE.detach().topk(k, dim=-1).indices, 1.0)
    load_KE = chosen_NKE.mean(0) / k
    return share_NKE.shape[-1] * (share_NKE.mean(0) * load_KE).sum(-1).mean()


def l1(raw_NKE: Tensor, places: Places, k: int) -> Tensor:
    """The penalty of `remoe`: the mean over tokens of Σ_e f_e ReLU(raw_e), f_e = (E / k) (share of tokens that take e).

    Source: Wang et al., ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, ICLR 2025, section 3.

    Args:
        raw_NKE: the routers' outputs.
        places: of the tokens.
        k: experts that a token shall take.
    """
    a_NKE = F.relu(raw_NKE.float())[places.real_N]
    if not len(a_NKE):
        return raw_NKE.new_zeros((), dtype=torch.float32)
    share_KE = (a_NKE.detach() > 0).float().mean(0)
    return (a_NKE * share_KE * (a_NKE.shape[-1] / k)).sum(-1).mean()


def resting(raw_NKE: Tensor, places: Places, form: Form) -> tuple[Tensor, Tensor]:
    """TLS and CLS of a batch, for the log: the share of experts that rest for a token, and through a chunk.

    Args:
        raw_NKE: the routers' outputs.
        places: of the tokens; short chunks count, too.
        form: of the layers.
    """
    if form.router == "none" or not places.size_C.numel():
        return raw_NKE.new_zeros(()), raw_NKE.new_zeros(())
    if form.router == "topk":
        assert form.k is not None
        active_NKE = torch.zeros_like(raw_NKE).scatter(-1, raw_NKE.topk(form.k, dim=-1).indices, 1.0)
    else:
        active_NKE = (raw_NKE > 0).to(raw_NKE.dtype)
    active_NKE = active_NKE * places.real_N[:, None, None]
    tokens = places.real_N.sum() * active_NKE[0].numel()
    union_CKE = active_NKE.new_zeros((len(places.size_C), *active_NKE.shape[1:]))
    union_CKE = union_CKE.index_add(0, places.chunk_N, active_NKE).clamp(max=1)
    return 1 - active_NKE.float().sum() / tokens, 1 - union_CKE.float().mean()


__all__ = ["balance", "chunk_firing", "chunk_firing_of", "l1", "locality", "resting"]
