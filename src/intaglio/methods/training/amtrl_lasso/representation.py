"""Shared representations of several tasks with linear heads: a linear map by alternating least squares, or a network.

Dimension letters: N samples, D inputs, K representation, H heads of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from intaglio.trainer.rng import generator


@dataclass(frozen=True)
class Samples:
    """Inputs [N, ...] and targets [N, H] of a source, a column for each of its heads."""

    x: np.ndarray
    y_NH: np.ndarray


def ridge(Z_NK: np.ndarray, Y_NH: np.ndarray, strength: float) -> np.ndarray:
    """Return `argmin_W ||Z W - Y||^2 + strength N ||W||^2`, [K, H]."""
    gram = Z_NK.T @ Z_NK + strength * len(Z_NK) * np.eye(Z_NK.shape[1])
    solution: np.ndarray = np.linalg.solve(gram, Z_NK.T @ Y_NH)
    return solution


def linear_representation(
    sources: Sequence[Samples], rank: int, *, iterations: int = 30, strength: float = 1e-3
) -> np.ndarray:
    """Return B [D, K] with orthonormal columns, which minimises `sum_t ||Y_t - X_t B W_t||^2` over B and W.

    Spectral start, the first K left singular vectors of the tasks' `X_t^T Y_t / n_t`; then least squares in W and B in
    turn.

    Args:
        sources: samples of each source, inputs [N, D].
        rank: K, at most D and the number of heads.
        iterations: of the alternation. Default 30.
        strength: of the ridge on heads and B, for each sample. Default 1e-3.
    """
    moments = [s.x.T @ s.y_NH for s in sources]
    grams = np.stack([s.x.T @ s.x for s in sources])
    counts = np.array([len(s.x) for s in sources])
    start = np.hstack([moment / n for moment, n in zip(moments, counts, strict=True)])
    B_DK = np.linalg.svd(start, full_matrices=False)[0][:, :rank]
    d, k = B_DK.shape
    for _ in range(iterations):
        heads = []
        for gram, moment, n in zip(grams, moments, counts, strict=True):
            heads.append(np.linalg.solve(B_DK.T @ gram @ B_DK + strength * n * np.eye(k), B_DK.T @ moment))
        outer = np.stack([W @ W.T for W in heads])
        normal = np.einsum("tij,tkl->ikjl", grams, outer).reshape(d * k, d * k)
        normal += strength * np.trace(normal) / (d * k) * np.eye(d * k)
        right = sum(moment @ W.T for moment, W in zip(moments, heads, strict=True))
        B_DK = np.linalg.qr(np.linalg.solve(normal, np.asarray(right).reshape(-1)).reshape(d, k))[0]
    return B_DK


class LinearMap(nn.Module):
    """`phi(x) = x B`, in float64."""

    def __init__(self, inputs: int, rank: int) -> None:
        super().__init__()
        self.B_DK = nn.Parameter(torch.zeros(inputs, rank, dtype=torch.float64), requires_grad=False)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return the representation [N, K]."""
        return x_ND @ self.B_DK


class Whitened(nn.Module):
    """A network whose outputs are mapped linearly to unit second moments, in which relevance is measured."""

    def __init__(self, network: nn.Module, rank: int) -> None:
        super().__init__()
        self.network = network
        self.map_KK = nn.Parameter(torch.eye(rank, dtype=torch.float64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the representation [N, K]."""
        return self.network(x.float()).double() @ self.map_KK


def perceptron(inputs: int, hidden: int, rank: int) -> nn.Module:
    """Return a network with one hidden layer, from D inputs to K features."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, rank))


def neural_representation(
    sources: Sequence[Samples],
    rank: int,
    make: Callable[[], nn.Module],
    *,
    steps: int,
    learning_rate: float,
    strength: float,
    seed: int,
) -> Whitened:
    """Return a network trained on all sources with a linear head each, by Adam on full batches.

    Args:
        sources: samples of each source, inputs of any shape.
        rank: K, outputs of the network.
        make: makes the untrained network.
        steps: of training.
        learning_rate: of Adam.
        strength: weight decay.
        seed: of the initial values.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(generator(seed, "amtrl_lasso").initial_seed())
        network = make()
        heads = nn.ModuleList([nn.Linear(rank, s.y_NH.shape[1]) for s in sources])
        x = torch.cat([torch.from_numpy(np.asarray(s.x, dtype=np.float32)) for s in sources])
        sizes = [len(s.x) for s in sources]
        targets = [torch.from_numpy(s.y_NH.astype(np.float32)) for s in sources]
        trained = [*network.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=strength)
        for _ in range(steps):
            parts = zip(heads, network(x).split(sizes), targets, strict=True)
            loss = sum((head(z) - y).square().sum() for head, z, y in parts) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        phi = Whitened(network, rank)
        with torch.no_grad():
            features = phi(x)
            moments, vectors = torch.linalg.eigh(features.T @ features / len(x))
            phi.map_KK.copy_(vectors / (moments.clamp_min(1e-8 * moments.max().clamp_min(1e-30))).sqrt())
    return phi
