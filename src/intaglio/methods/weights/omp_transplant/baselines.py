"""Baselines for new embedding rows: those of the released tool, and a linear map.

Dimension letters: T targets, V rows of the base, N shared tokens, D the donor's width, E the base's width, K neighbours
or atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from intaglio.methods.weights.omp_transplant.matching_pursuit import SparseCode, least_squares, omp

Metric = Literal["euclidean", "cosine"]
Weighting = Literal["distance", "barycentric", "least_squares"]
Pieces = Literal["mean", "sum", "weighted_mean", "first_last"]
Role = Literal["embedding", "head"]

NEAREST = 1e-6
"""Smallest distance used in weights."""


def normal(rows_VE: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw rows [count, E] from a normal distribution with mean and covariance of the given ones.

    Sampling goes through the eigenvectors of the covariance, so it need not have full rank. Source: Hewitt,
    Initializing New Word Embeddings for Pretrained Language Models, 2021.
    """
    mean_E = rows_VE.mean(0)
    value_E, vector_EE = torch.linalg.eigh(torch.cov(rows_VE.T, correction=0).reshape(len(mean_E), -1))
    drawn_TE = torch.randn((count, len(mean_E)), generator=generator, dtype=rows_VE.dtype).to(rows_VE.device)
    return mean_E + (drawn_TE * value_E.clamp(min=0).sqrt()) @ vector_EE.T


def subword(rows_VE: Tensor, pieces: Sequence[Sequence[int]], how: Pieces, role: Role) -> Tensor:
    """Return rows [T, E] built from those of each token's pieces under the base's tokenizer; zero for no pieces.

    `weighted_mean` weights the i-th of n pieces by i in the embedding, where the last one determines most of what
    follows, and by n + 1 - i in the head, which has to predict the first; `first_last` takes the last or the first
    alone.
    """
    rows_TE = rows_VE.new_zeros((len(pieces), rows_VE.shape[1]))
    for row, ids in enumerate(pieces):
        if not ids:
            continue
        count = len(ids)
        weight_K = rows_VE.new_ones(count)
        if how == "weighted_mean":
            weight_K = torch.arange(1, count + 1, dtype=rows_VE.dtype, device=rows_VE.device)
            weight_K = weight_K if role == "embedding" else weight_K.flip(0)
        elif how == "first_last":
            weight_K = torch.zeros_like(weight_K)
            weight_K[-1 if role == "embedding" else 0] = 1
        rows_TE[row] = weight_K @ rows_VE[list(ids)] / (1 if how == "sum" else weight_K.sum())
    return rows_TE


def neighbours(y_TD: Tensor, atoms_ND: Tensor, k: int, metric: Metric, weighting: Weighting, batch: int) -> SparseCode:
    """Return targets as combinations of their k nearest atoms.

    Weights: `distance`, 1 / distance (cosine: the similarity, at least 0), normalised to sum to one; `barycentric`, the
    least squares that sum to one; `least_squares`.
    """
    unit_ND = torch.nn.functional.normalize(atoms_ND, dim=1)
    supports, weights = [], []
    for y_BD in y_TD.split(batch):
        if metric == "cosine":
            distance_BN = 1 - torch.nn.functional.normalize(y_BD, dim=1) @ unit_ND.T
        else:
            distance_BN = torch.cdist(y_BD, atoms_ND)
        near_BK, support_BK = distance_BN.topk(k, dim=1, largest=False)
        points_BKD = atoms_ND[support_BK]
        if weighting == "distance":
            weight_BK = (1 - near_BK).clamp(min=NEAREST) if metric == "cosine" else 1 / near_BK.clamp(min=NEAREST)
            weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
        elif weighting == "barycentric":
            weight_BK = _barycentric(points_BKD, y_BD)
        else:
            weight_BK = least_squares(points_BKD, y_BD)
        supports.append(support_BK)
        weights.append(weight_BK)
    if not supports:
        return SparseCode(y_TD.new_zeros((0, k), dtype=torch.int64), y_TD.new_zeros((0, k)))
    return SparseCode(torch.cat(supports), torch.cat(weights))


def _barycentric(points_BKD: Tensor, y_BD: Tensor) -> Tensor:
    """Solve in the differences to the first point, whose weight is one less the sum of the others."""
    first_BD = points_BKD[:, 0]
    others_BJ = least_squares(points_BKD[:, 1:] - first_BD[:, None], y_BD - first_BD)
    return torch.cat([1 - others_BJ.sum(1, keepdim=True), others_BJ], dim=1)


def linear_map(atoms_ND: Tensor, base_NE: Tensor) -> Tensor:
    """Return W [D, E] of least norm that minimises ||A W - B||_F over the shared tokens."""
    solution: Tensor = torch.linalg.lstsq(atoms_ND.cpu(), base_NE.cpu(), driver="gelsd").solution
    return solution.to(base_NE.device)


def _principal(centred_ND: Tensor, count: int) -> Tensor:
    """Return the first principal directions [D, count], strongest first."""
    _, vector_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
    return vector_DD.flip(1)[:, :count]


def landmark_pca(y_TD: Tensor, atoms_ND: Tensor, base_NE: Tensor) -> Tensor:
    """Return rows [T, E]: targets in the donor's principal axes, rotated onto the base's to fit the shared tokens best.

    Both spaces are centred on the shared tokens and cut to the narrower width; R = U V^T of the singular vectors of
    A_pca^T B_pca minimises ||A_pca R - B_pca||. The released tool takes the transposed rotation, with which the shared
    tokens fit worse than with none.
    """
    mean_D, mean_E = atoms_ND.mean(0), base_NE.mean(0)
    a_ND, b_NE = atoms_ND - mean_D, base_NE - mean_E
    count = min(a_ND.shape[1], b_NE.shape[1])
    from_DP, to_EP = _principal(a_ND, count), _principal(b_NE, count)
    u_PP, _, v_PP = torch.linalg.svd((a_ND @ from_DP).T @ (b_NE @ to_EP))
    return (y_TD - mean_D) @ from_DP @ (u_PP @ v_PP) @ to_EP.T + mean_E


def sparse_basis(y_TD: Tensor, atoms_ND: Tensor, base_NE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return rows [T, E] through a basis of each space that combines the same few shared tokens.

    The principal directions of the narrower space are coded by k shared tokens each; the same combinations give a basis
    of the other space. Targets are expressed in the donor's basis and read out in the base's. All is centred on the
    shared tokens (the released tool centres in part, and on whole vocabularies).

    Returns:
        The rows, and the donor basis's approximation of the targets [T, D].
    """
    mean_D, mean_E = atoms_ND.mean(0), base_NE.mean(0)
    a_ND, b_NE = atoms_ND - mean_D, base_NE - mean_E
    narrow = a_ND if a_ND.shape[1] <= b_NE.shape[1] else b_NE
    code = omp(_principal(narrow, narrow.shape[1]).T.contiguous(), narrow, k)
    donor_PD, base_PE = code.combine(a_ND), code.combine(b_NE)
    solution: Tensor = torch.linalg.lstsq(donor_PD.T.cpu(), (y_TD - mean_D).T.cpu(), driver="gelsd").solution
    part_TP = solution.T.to(y_TD.device)
    return part_TP @ base_PE + mean_E, part_TP @ donor_PD + mean_D


def undertrained(
    rows_VD: Tensor, head_VD: Tensor | None, unused_ids: Sequence[int], used: Sequence[int], quantile: float = 0.01
) -> set[int]:
    """Return ids of tokens that look untrained (Land and Bartolo, Fishing for Magikarp, 2024).

    Rows without a token and tokens named as unused count as untrained. So do the lowest `quantile` by norm of the input
    embedding (only with an untied head: a tied row is pushed by the softmax), and rows whose cosine to the mean of the
    untrained ones lies above the 1 - `quantile` quantile and above 0.5, in either matrix.
    """
    unused = set(range(len(rows_VD))) - set(used) | set(unused_ids)
    suspects = set(unused)
    if head_VD is not None:
        norm_V = rows_VD.norm(dim=1)
        suspects |= set((norm_V < torch.quantile(norm_V, quantile)).nonzero().squeeze(1).tolist())
    if unused:
        for matrix_VD in (rows_VD, head_VD):
            if matrix_VD is not None:
                mean_D = matrix_VD[sorted(unused)].mean(0)
                cosine_V = torch.nn.functional.cosine_similarity(matrix_VD, mean_D[None], dim=1)
                highest = torch.quantile(cosine_V, 1 - quantile).clamp(min=0.5)
                suspects |= set((cosine_V > highest).nonzero().squeeze(1).tolist())
    return suspects
