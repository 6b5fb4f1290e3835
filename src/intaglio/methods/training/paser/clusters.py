"""Clusters of samples: non-negative factorisation of spectral coordinates.

    A_ij = exp(-|e_i - e_j|^2 / (2 sigma^2)),  D = diag(row sums of A),  L = I - D^-1 A
    Phi: the K eigenvectors of L with the smallest eigenvalues (diffusion coordinates)
    |Phi Phi^T| ~ W H, both non-negative of rank K;  the cluster of i is argmax over k of W_ik

L is not symmetric, so the eigenvectors are those of the symmetric I - D^-1/2 A D^-1/2, which has the same eigenvalues,
multiplied by D^-1/2. Coifman and Lafon, Diffusion maps, 2006; Lee and Seung, 1999.

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
"""Up to this many samples the graph is complete; beyond, only nearest neighbours are linked."""
NEIGHBOURS = 32
"""Neighbours of a sample in a sparse graph."""
SMALLEST = 1e-6
"""Smallest affinity of an edge."""
PARSIMONY = 0.01
"""Errors of factorisations within this of the least count as equal."""
ITERATIONS = 500


@dataclass(frozen=True)
class Clusters:
    """Labels [N], numbered by their first sample, and the error |S - W H| / |S| of every K that was tried."""

    labels: np.ndarray
    errors: dict[int, float]


def affinity(x_ND: np.ndarray, neighbours: int | None = None) -> Any:
    """Return the similarity graph: a connected symmetric sparse matrix [N, N] with ones on its diagonal."""
    from scipy import sparse
    from scipy.spatial.distance import pdist, squareform
    from sklearn.neighbors import NearestNeighbors

    n = len(x_ND)
    if neighbours is None or neighbours >= n - 1:
        distance_NN = squareform(pdist(x_ND))
        sigma = float(np.median(distance_NN[np.triu_indices(n, 1)])) if n > 1 else 1.0
        # Far outliers would underflow and become separate components.
        dense_NN = np.exp(-(distance_NN**2) / (2 * _positive(sigma) ** 2)).clip(min=np.finfo(float).tiny)
        np.fill_diagonal(dense_NN, 1.0)
        return sparse.csr_matrix(dense_NN)
    near = NearestNeighbors(n_neighbors=neighbours).fit(x_ND).kneighbors_graph(mode="distance").tocsr()
    sigma = _positive(float(np.median(near.data)))
    graph = near.copy()
    graph.data = np.exp(-(near.data**2) / (2 * sigma**2)).clip(min=SMALLEST)
    graph = graph.maximum(graph.T)
    return _connect(graph, x_ND, sigma) + sparse.identity(n, format="csr")


def _positive(sigma: float) -> float:
    return sigma if sigma > 0 else 1.0


def _connect(graph: Any, x_ND: np.ndarray, sigma: float) -> Any:
    """Connect each component but the largest to the closest sample outside it."""
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
    """Return Phi [N, K] and the eigenvalues of L [K], smallest first; the first is 0 and its vector constant."""
    from scipy import sparse
    from scipy.sparse.linalg import eigsh

    degree_N = np.asarray(graph.sum(1)).ravel()
    root_N = 1 / np.sqrt(degree_N)
    normal = sparse.diags(root_N) @ graph @ sparse.diags(root_N)
    n = graph.shape[0]
    if n <= DENSE or count >= n - 1:
        # The full solver: the partial one fails where many eigenvalues are equal, as for equidistant samples.
        value_K, vector_NK = (part[..., -count:] for part in np.linalg.eigh(normal.toarray()))
    else:
        # The largest of D^-1/2 A D^-1/2 are the smallest of L; a fixed start makes it reproducible.
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
    """Cluster samples by their vectors, into `count` clusters or by the paper's rule."""
    n = len(np.unique(x_ND, axis=0))
    if count == 1 or n == 1:
        return Clusters(np.zeros(len(x_ND), np.int64), {1: 0.0})
    sizes = [min(count, n)] if count is not None else list(range(2, min(most, n) + 1))
    if neighbours is None and len(x_ND) > DENSE:
        neighbours = NEIGHBOURS
    phi_NK, _ = coordinates(affinity(x_ND, neighbours), sizes[-1], time)
    draws = np.random.Generator(np.random.Philox(key=seed))
    landmark_rows = np.sort(draws.choice(len(x_ND), min(landmarks, len(x_ND)), replace=False))
    factorisations = {k: _factorise(phi_NK[landmark_rows, :k], init, seed) for k in sizes}
    errors = {k: error for k, (_, error) in factorisations.items()}
    best = min(k for k in sizes if errors[k] <= min(errors.values()) + PARSIMONY)
    labels_N = _propagate(phi_NK[:, :best], landmark_rows, factorisations[best][0])
    return Clusters(_renumber(labels_N), errors)


def _factorise(phi_NK: np.ndarray, init: Init, seed: int) -> tuple[np.ndarray, float]:
    """Return the labels of |Phi Phi^T| ~ W H, and its error."""
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    similar_NN = np.abs(phi_NK @ phi_NK.T)
    model = NMF(phi_NK.shape[1], init=init, random_state=seed, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # labels converge long before the error does
        part_NK = model.fit_transform(similar_NN)
    # A row of zeros has no largest entry; use its similarity to the components.
    empty = ~part_NK.any(1)
    part_NK[empty] = similar_NN[empty] @ model.components_.T
    return part_NK.argmax(1), float(model.reconstruction_err_ / np.linalg.norm(similar_NN))


def _propagate(phi_NK: np.ndarray, kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the labels of all samples, given those of the landmarks."""
    from sklearn.neighbors import NearestNeighbors

    if len(kept) == len(phi_NK):
        return labels
    near = NearestNeighbors(n_neighbors=1).fit(phi_NK[kept]).kneighbors(phi_NK, return_distance=False)
    return np.asarray(labels[near[:, 0]])


def _renumber(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Renumber clusters by their first sample, without gaps."""
    number: dict[int, int] = {}
    for label in labels:
        number.setdefault(int(label), len(number))
    return np.array([number[int(label)] for label in labels], np.int64)
