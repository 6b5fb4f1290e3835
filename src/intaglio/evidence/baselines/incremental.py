"""Classifiers that learn a stream of classes on fixed embeddings: running class means, SLDA, a linear probe.

Dimension letters: N texts, D encoder width, L classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.trainer.rng import generator


class NearestMean:
    """Running mean of each class; the nearest one is chosen.

    Args:
        metric: `euclidean`, `cosine`, or `slda`: the Mahalanobis distance of a running covariance that all classes
            share (Hayes and Kanan, Lifelong Machine Learning with Deep Streaming LDA, 2020).
        shrinkage: share of the identity in the covariance (slda), or of the grand mean in each mean. Default 0.
    """

    def __init__(self, metric: str = "euclidean", shrinkage: float = 0.0) -> None:
        self.metric, self.shrinkage = metric, shrinkage
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.scatter: Tensor | None = None

    def learn(self, z_ND: Tensor, labels: Sequence[str], seed: int = 0) -> None:
        """Add embeddings to their classes; `seed` is ignored."""
        z_ND = self._scaled(z_ND)
        for name in sorted(set(labels)):
            rows_ND = z_ND[[index for index, label in enumerate(labels) if label == name]]
            self.sums[name] = self.sums.get(name, torch.zeros(z_ND.shape[1])) + rows_ND.sum(0)
            self.counts[name] = self.counts.get(name, 0) + len(rows_ND)
            centred_ND = rows_ND - self.sums[name] / self.counts[name]
            own = centred_ND.T @ centred_ND
            self.scatter = own if self.scatter is None else self.scatter + own

    @property
    def classes(self) -> list[str]:
        """Names in the order of the scores."""
        return list(self.sums)

    def scores(self, z_ND: Tensor) -> Tensor:
        """Return the score of each class [N, L], largest for the nearest mean."""
        z_ND = self._scaled(z_ND)
        means_LD = torch.stack([self.sums[name] / self.counts[name] for name in self.classes])
        if self.metric == "slda":
            assert self.scatter is not None
            covariance = self.scatter / sum(self.counts.values())
            eye = torch.eye(len(covariance))
            precision = torch.linalg.inv((1 - self.shrinkage) * covariance + self.shrinkage * eye)
            return z_ND @ precision @ means_LD.T - 0.5 * ((means_LD @ precision) * means_LD).sum(1)
        means_LD = means_LD.lerp(means_LD.mean(0), self.shrinkage)
        return -torch.cdist(z_ND, self._scaled(means_LD))

    @property
    def numbers(self) -> int:
        """Numbers that are kept."""
        shared = self.scatter.numel() if self.metric == "slda" and self.scatter is not None else 0
        return sum(total_D.numel() + 1 for total_D in self.sums.values()) + shared

    def _scaled(self, z_ND: Tensor) -> Tensor:
        return F.normalize(z_ND, dim=1) if self.metric == "cosine" else z_ND


class LinearProbe:
    """Softmax regression by SGD over classes known from the start, in the order in which they come.

    Args:
        width: D.
        classes: names.
        learning_rate: of plain SGD. Default 0.05.
        epochs: passes over each task's texts. Default 20.
        batch_size: texts of a step. Default 64.
    """

    def __init__(
        self, width: int, classes: Sequence[str], learning_rate: float = 0.05, epochs: int = 20, batch_size: int = 64
    ) -> None:
        self.classes, self.epochs, self.batch_size = list(classes), epochs, batch_size
        self.layer = nn.Linear(width, len(self.classes))
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=learning_rate)

    def learn(self, z_ND: Tensor, labels: Sequence[str], seed: int = 0) -> None:
        """Train on the texts of a task."""
        target_N = torch.tensor([self.classes.index(label) for label in labels])
        for epoch in range(self.epochs):
            for rows in torch.randperm(len(z_ND), generator=generator(seed, "probe", epoch)).split(self.batch_size):
                self.optimizer.zero_grad()
                F.cross_entropy(self.layer(z_ND[rows]), target_N[rows]).backward()
                self.optimizer.step()

    @property
    def numbers(self) -> int:
        """Numbers that are kept."""
        return sum(parameter.numel() for parameter in self.layer.parameters())

    @torch.no_grad()
    def scores(self, z_ND: Tensor) -> Tensor:
        """Return the logits [N, L]."""
        logits_NL: Tensor = self.layer(z_ND)
        return logits_NL
