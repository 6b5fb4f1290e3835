"""Classification of images; the objective `ImageClassification`.

Dimension letters: N images, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.trainer.protocols import Loss


@dataclass(frozen=True)
class ImageClassification:
    """Cross-entropy over the classes of images, `-mean_n log p(label_n | pixels_n)`.

    An example is `{pixels, label}`, float32 [C, H, W] and a class; the model maps pixels [N, C, H, W] to logits [N, K].
    """

    def modules(self) -> nn.ModuleDict:
        """Return none."""
        return nn.ModuleDict()

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Any], rng: Any) -> Iterable[Any]:
        """Return the examples."""
        return examples

    def collate(self, examples: Sequence[Any], rng: Any) -> dict[str, Any]:
        """Return a batch `{pixels, labels, weight}`."""
        labels = torch.tensor([example["label"] for example in examples])
        return {"pixels": torch.stack([example["pixels"] for example in examples]), "labels": labels,
                "weight": len(labels)}  # fmt: skip

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        """Return the mean cross-entropy of a batch."""
        logits_NK = model(batch["pixels"])
        return Loss(F.cross_entropy(logits_NK, batch["labels"]), outputs=logits_NK)
