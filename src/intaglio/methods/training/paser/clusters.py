"""Samples that ask for the same capability: spectral coordinates of their vectors, factorised without negative parts.

    A_ij = exp(-|e_i - e_j|^2 / (2 sigma^2)),  D = diag(row sums of A),  L = I - D^-1 A
    Phi: the K eigenvectors of L with the smallest eigenvalues (diffusion coordinates)
    |Phi Phi^T| ~ W H, both non-negative of rank K;  the cluster of i is argmax over k of W_ik

L is not symmetric, so the eigenvectors are those of the symmetric I - D^-1/2 A D^-1/2, which has the same eigenvalues,
taken back by D^-1/2. Coifman and Lafon, Diffusion maps, 2006; Lee and Seung, 1999.

Dimension letters: N samples, D width, K clusters.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Init = Literal["nndsvda", "random"]

DENSE = 2000
"""Up to so many samples every pair counts; beyond, only nearest neighbours."""
NEIGHBOURS = 32
"""Of a sample, where not every pair counts."""
SMALLEST = 1e-6
"""An affinity that holds a graph together."""
PARSIMONY = 0.01
"""A factorisation whose error is within this of the least is as good."""
ITERATIONS = 500


@dataclass(frozen=True)
class Clusters:
    """What was found.

    Args:
        labels: of each sample, int64 [N]; numbered by their first sample.
        errors: `{K: |S - W H| / |S|}` of every K that was tried.
    """

    labels: np.ndarray
    errors: dict[int, float]


def affinity(x_ND: np.ndarray, neighbours: int | None = None) -> Any:
    """The graph of the samples: a symmetric sparse matrix [N, N] with ones on its diagonal, in one piece.

    Args:
        x_ND: vectors.
        neighbours: of each sample that it is joined to. Default: all, and sigma is the median of all distances;
            else it is the median over these neighbours. A graph in pieces is joined where they are closest.
    """
    from scipy import sparse
    from scipy.spatial.distance import pdist, squareform
    from sklearn.neighbors import NearestNeighbors

    n = len(x_ND)
    if neighbours is None or neighbours >= n - 1:
        distance_NN = squareform(pdist(x_ND))
        sigma = float(np.median(distance_NN[np.triu_indices(n, 1)])) if n > 1 else 1.0
        # Far outliers underflow, and would be pieces of their own.
        dense_NN = np.exp(-(distance_NN**2) / (2 * _positive(sigma) ** 2)).clip(min=np.finfo(float).tiny)
        np.fill_diagonal(dense_NN, 1.0)
        return sparse.csr_matrix(dense_NN)
    near = NearestNeighbors(n_neighbors=neighbours).fit(x_ND).kneighbors_graph(mode="distance").tocsr()
    sigma = _positive(float(np.median(near.data)))
    graph = near.copy()
    graph.data = np.exp(-(near.data**2) / (2 * sigma**2)).clip(min=SMALLEST)
    graph = graph.maximum(graph.T)
    return _joined(graph, x_ND, sigma) + sparse.identity(n, format="csr")


def _positive(sigma: float) -> float:
    """All samples alike: any width does."""
    return sigma if sigma > 0 else 1.0


def _joined(graph: Any, x_ND: np.ndarray, sigma: float) -> Any:
    """The graph with an edge from each piece but the largest to the sample outside that is closest to it."""
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import NearestNeighbors

    while True:
        pieces, label_N = connected_components(graph, directed=False)
        if pieces == 1:
            return graph
        graph = graph.tolil()
        largest = np.bincount(label_N).argmax()
        for piece in set(range(pieces)) - {int(largest)}:
            inside, outside = np.flatnonzero(label_N == piece), np.flatnonzero(label_N != piece)
            distance, nearest = NearestNeighbors(n_neighbors=1).fit(x_ND[outside]).kneighbors(x_ND[inside])
            a = int(distance.argmin())
            ends = inside[a], outside[nearest[a, 0]]
            value = max(SMALLEST, float(np.exp(-(distance[a, 0] ** 2) / (2 * sigma**2))))
            graph[ends] = graph[ends[::-1]] = value
        graph = graph.tocsr()


def coordinates(graph: Any, count: int, time: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Phi [N, K] and the eigenvalues of L [K], smallest first; the first is 0 and its vector constant.

    Args:
        graph: A, in one piece.
        count: K, at most N.
        time: each vector is weighted by (1 - eigenvalue) ** time. Default 0: not at all.
    """
    from scipy import sparse
    from scipy.sparse.linalg import eigsh

    degree_N = np.asarray(graph.sum(1)).ravel()
    root_N = 1 / np.sqrt(degree_N)
    normal = sparse.diags(root_N) @ graph @ sparse.diags(root_N)
    n = graph.shape[0]
    if n <= DENSE or count >= n - 1:
        # All of them: the solver for some gives up where many are equal, as between samples that are equally far apart.
        value_K, vector_NK = (part[..., -count:] for part in np.linalg.eigh(normal.toarray()))
    else:
        # The largest of D^-1/2 A D^-1/2 are the smallest of L; from a fixed start, so that a run can be repeated.
        start_N = np.random.Generator(np.random.Philox(key=0)).normal(size=n)
        value_K, vector_NK = eigsh(normal, k=count, which="LA", v0=start_N)
    order = np.argsort(-value_K, kind="stable")
    value_K, vector_NK = value_K[order], vector_NK[:, order]
    # Scaled so that the constant vector has length 1.
    phi_NK = vector_NK * root_N[:, None] * np.sqrt(degree_N.sum() / n)
    return phi_NK * np.abs(value_K) ** time, 1 - value_K


def cluster(
    x_ND: np.ndarray,
    count: int | None = None,
    *,
    most: int = 12,
    neighbours: int | None = None,
    landmarks: int = DENSE,
    time: float = 0.0,
    init: Init = "nndsvda",
    seed: int = 0,
) -> Clusters:
    """Cluster samples by their vectors.

    Args:
        x_ND: vectors.
        count: K. Default: of 2 to `most`, the K whose factorisation has the least error, relative to its own
            |Phi Phi^T|; the smaller K where errors are as good.
        most: clusters, where their number is found. Default 12.
        neighbours: see `affinity`. Default: all up to 2,000 samples, 32 beyond.
        landmarks: samples that are factorised, drawn where there are more; the others go with the landmark that is
            nearest in Phi. Default 2,000.
        time: see `coordinates`.
        init: of the factorisation: `nndsvda` (default), which does not hang on the order of the samples, or `random`.
        seed: of a random start and of the landmarks.
    """
    n = len(np.unique(x_ND, axis=0))
    if count == 1 or n == 1:
        return Clusters(np.zeros(len(x_ND), np.int64), {1: 0.0})
    tried = [min(count, n)] if count is not None else list(range(2, min(most, n) + 1))
    if neighbours is None and len(x_ND) > DENSE:
        neighbours = NEIGHBOURS
    phi_NK, _ = coordinates(affinity(x_ND, neighbours), tried[-1], time)
    draws = np.random.Generator(np.random.Philox(key=seed))
    kept = np.sort(draws.choice(len(x_ND), min(landmarks, len(x_ND)), replace=False))
    found = {k: _factorised(phi_NK[kept, :k], init, seed) for k in tried}
    errors = {k: error for k, (_, error) in found.items()}
    best = min(k for k in tried if errors[k] <= min(errors.values()) + PARSIMONY)
    labels_N = _spread(phi_NK[:, :best], kept, found[best][0])
    return Clusters(_numbered(labels_N), errors)


def _factorised(phi_NK: np.ndarray, init: Init, seed: int) -> tuple[np.ndarray, float]:
    """The labels of |Phi Phi^T| ~ W H, and the error of it."""
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    similar_NN = np.abs(phi_NK @ phi_NK.T)
    model = NMF(phi_NK.shape[1], init=init, random_state=seed, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # labels settle long before the error does
        part_NK = model.fit_transform(similar_NN)
    # A row of zeros has no largest part; it goes by what it resembles.
    empty = ~part_NK.any(1)
    part_NK[empty] = similar_NN[empty] @ model.components_.T
    return part_NK.argmax(1), float(model.reconstruction_err_ / np.linalg.norm(similar_NN))


def _spread(phi_NK: np.ndarray, kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The labels of all samples, given those of the landmarks."""
    from sklearn.neighbors import NearestNeighbors

    if len(kept) == len(phi_NK):
        return labels
    near = NearestNeighbors(n_neighbors=1).fit(phi_NK[kept]).kneighbors(phi_NK, return_distance=False)
    return np.asarray(labels[near[:, 0]])


def _numbered(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """The same clusters, numbered by their first sample, without gaps."""
    number: dict[int, int] = {}
    for label in labels:
        number.setdefault(int(label), len(number))
    return np.array([number[int(label)] for label in labels], np.int64)
