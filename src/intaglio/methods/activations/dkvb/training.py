"""Training of a bottleneck's values by plain SGD with sparse updates, on embeddings.

Dimension letters: B rows, D encoder width, C codebooks, T fetched pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.methods.activations.dkvb.bottleneck import DiscreteKeyValueBottleneck, clip_grad_norm
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer.rng import generator

LOOKUPS = 1024
"""Embeddings that are looked up at a time."""


def train_values(
    bottleneck: DiscreteKeyValueBottleneck,
    decoder: nn.Module,
    z_ND: Tensor,
    labels_N: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    head_learning_rate: float = 0.0,
    label_smoothing: float = 0.1,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Minimise the cross-entropy of the decoder's logits over the values, and over the decoder if it has a rate.

    Encoder and keys are frozen, so without Gumbel sampling each text is looked up once.

    Args:
        bottleneck: with frozen keys; its fetches are counted.
        decoder: of the values.
        z_ND: embeddings, float32.
        labels_N: indices of the classes, int64.
        epochs: passes over the embeddings.
        batch_size: embeddings of a step.
        learning_rate: of the values.
        head_learning_rate: of the decoder; 0 (default) freezes it.
        label_smoothing: of the cross-entropy. Default 0.1.
        max_grad_norm: joint norm that gradients are clipped to; 0: none. Default 1.
        seed: of the order of the embeddings. Default 0.
        progress: called after each epoch.
    """
    bottleneck.train()
    decoder.requires_grad_(bool(head_learning_rate))
    groups = [{"params": [bottleneck.values], "lr": learning_rate}]
    trained = list(decoder.parameters()) if head_learning_rate else []
    if trained:
        groups.append({"params": trained, "lr": head_learning_rate})
    optimizer = torch.optim.SGD(groups)
    looked_up = None
    if not bottleneck.temperature:
        looked_up = torch.cat([bottleneck.lookup(bottleneck.heads(z))[0] for z in z_ND.split(LOOKUPS)])
    for epoch in range(epochs):
        order_N = torch.randperm(len(z_ND), generator=generator(seed, "values", epoch)).to(z_ND.device)
        for rows in order_N.split(batch_size):
            indices = bottleneck.lookup(bottleneck.heads(z_ND[rows]))[0] if looked_up is None else looked_up[rows]
            bottleneck.count(indices)
            logits_BL = decoder(bottleneck.fetch(indices))
            loss = F.cross_entropy(logits_BL, labels_N[rows], label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm([bottleneck.values, *trained], max_grad_norm)
            optimizer.step()
        progress(epoch + 1, epochs, "dkvb: training")
    bottleneck.values.grad = None
    bottleneck.eval()
